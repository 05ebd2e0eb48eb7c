"""What an optimiser of torch keeps, as the kernel and the graphs of an update read it: numbers of groups, addresses."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import optimizer as optimisers


def numbers_of(optimiser: torch.optim.Optimizer) -> list[tuple[float, ...]] | None:
    """Return the numbers of all groups of parameters, or None if the optimiser does more than Adam's plain step."""
    if type(optimiser) not in (torch.optim.Adam, torch.optim.AdamW) or has_step_hooks(optimiser):
        return None
    numbers = []
    for group in optimiser.param_groups:
        if group["amsgrad"] or group["maximize"] or group["differentiable"]:
            return None
        decoupled = group.get("decoupled_weight_decay", type(optimiser) is torch.optim.AdamW)  # newer torch says it
        values = group["lr"], *group["betas"], group["eps"], group["weight_decay"], decoupled
        numbers.append(tuple(map(float, values)))
    return numbers


def check_trains(optimiser: torch.optim.Optimizer, controller: torch.nn.Module) -> None:
    """Raise a TypeError or ValueError if an optimiser's step would train nothing of the controller."""
    closure = inspect.signature(optimiser.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimiser must take a step without a closure, {type(optimiser).__name__} needs one: call value_and_grad "
            "in it"
        )
    held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in controller.parameters()):
        raise ValueError("optimiser must hold parameters of the rollout's controller, it holds none of them")


def check_capturable(optimiser: torch.optim.Optimizer) -> None:
    """Raise a ValueError unless a CUDA graph can hold the optimiser's steps, and a number on the device stop them."""
    fits = type(optimiser) in (torch.optim.Adam, torch.optim.AdamW) and not has_step_hooks(optimiser)
    if not fits or not all(group["fused"] and group["capturable"] for group in optimiser.param_groups):
        raise ValueError(
            "optimiser must be Adam or AdamW with fused=True and capturable=True, without hooks, for a graph on CUDA, "
            f"got {optimiser}"
        )


def options_of(optimiser: torch.optim.Optimizer) -> tuple:
    """Return what a captured step has taken in; a tensor on a device is read at every replay."""

    def taken(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return float(value) if value.device.type == "cpu" else (value.device, value.data_ptr())

    groups = optimiser.param_groups
    return tuple((name, taken(value)) for group in groups for name, value in group.items() if name != "params")


def has_step_hooks(optimiser: torch.optim.Optimizer) -> bool:
    """Whether a step does more than the class says; a learning-rate scheduler only notes that it was taken."""
    own = vars(optimiser).get("step")
    hooks = (
        optimiser._optimizer_step_pre_hooks, optimiser._optimizer_step_post_hooks,
        optimisers._global_optimizer_pre_hooks, optimisers._global_optimizer_post_hooks,
    )  # fmt: skip
    return any(hooks) or not (own is None or hasattr(own, "_wrapped_by_lr_sched"))


def memory_of(
    optimiser: torch.optim.Optimizer, trainable: Sequence[torch.Tensor], make_state: bool = False
) -> list[tuple[int, ...]] | None:
    """Return the addresses of every trained parameter, of its state, and its group.

    None where there is no state yet, unless Adam's shall be made; None, too, if the optimiser trains anything else, or
    not all of them.
    """
    groups = {p: i for i, group in enumerate(optimiser.param_groups) for p in group["params"] if p.requires_grad}
    if len(groups) != len(trainable) or any(parameter not in groups for parameter in trainable):
        return None
    rows = []
    for parameter in trainable:
        own = optimiser.state.get(parameter)
        if not own:
            if not make_state:
                return None
            own = optimiser.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if not own.keys() >= {"exp_avg", "exp_avg_sq", "step"}:
            return None
        tensors = parameter, own["exp_avg"], own["exp_avg_sq"], own["step"]
        rows.append((*[tensor.data_ptr() for tensor in tensors], groups[parameter]))
    return rows


def is_plain(optimiser: torch.optim.Optimizer, trainable: Sequence[torch.Tensor]) -> bool:
    """Whether the optimiser's state lies in memory as the kernel reads it."""
    for parameter in trainable:
        own = optimiser.state[parameter]
        for tensor in (own["exp_avg"], own["exp_avg_sq"]):
            if tensor.dtype != parameter.dtype or tensor.shape != parameter.shape or not tensor.is_contiguous():
                return False
        step = own["step"]
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != parameter.device:
            return False
    return True
