"""The end of an update: clipping, what an optimiser of torch keeps, and the one launch that does it all on a CPU."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import warp as wp
from torch.optim import optimizer as optimisers

from warp_phys.flow import Combined, Flow, memory_in
from warp_phys.interop.torch.combine import places_of, size_of
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.direct import DirectPass
from warp_phys.programs.update_kernels import CLIPPING, GROUP, TENSOR, Clip, finish_kernel


def gradients_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the `.grad` of all parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_gradients(gradients: Sequence[torch.Tensor], clip: Clip, limit: float) -> None:
    """Clip in place: "value" each component to [−limit, limit], "norm" the norm of all together to at most limit."""
    if clip == "value":
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
    elif clip == "norm" and gradients:
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        factor = (limit / torch.linalg.vector_norm(torch.stack(norms))).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor)


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


def check_trains(optimiser: torch.optim.Optimizer, trained: Sequence[Any]) -> None:
    """Raise a TypeError or ValueError if an optimiser's step would train nothing of the controller's, or beside it."""
    closure = inspect.signature(optimiser.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimiser must take a step without a closure, {type(optimiser).__name__} needs one: call value_and_grad "
            "in it"
        )
    held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in trained):
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
    optimiser: torch.optim.Optimizer,
    trainable: Sequence[torch.Tensor],
    unused: Sequence[torch.Tensor] = (),
    make_state: bool = False,
) -> list[tuple[int, ...]] | None:
    """Return the addresses of every trained parameter, of its state, and its group; 0 for those that have no gradient.

    None where there is no state yet, unless Adam's shall be made; None, too, if the optimiser trains anything else, or
    not all of them.
    """
    groups = {p: i for i, group in enumerate(optimiser.param_groups) for p in group["params"] if p.requires_grad}
    still = set(unused)
    if groups.keys() - still != set(trainable) - still:
        return None
    rows: list[tuple[int, ...]] = []
    for parameter in trainable:
        if parameter in still:
            rows.append((0,) * TENSOR)
            continue
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


class End(NamedTuple):
    """The launch, and views of what it reads and writes."""

    launch: Any
    graph: Any
    """All launches of the update in one graph, or None."""
    memory: list[tuple[int, ...]]
    """Addresses of every trained tensor and of its state, and its group."""
    mean: torch.Tensor | None
    """The average, where the flow has a memory."""
    addresses: np.ndarray
    """Of the updates of base and other, of the combined update, and of the average where the flow has a memory."""
    numbers: list[tuple[float, ...]]
    """What stands in `groups`."""
    groups: np.ndarray
    """Learning rate and so on of every group, shape (groups, GROUP)."""
    status: np.ndarray
    """1 where the last update was finite and is done, 0 where nothing has changed."""
    loss: np.ndarray
    held: tuple

    def aim(self, direct: DirectPass, update: torch.Tensor) -> None:
        """Combine the updates where they now are, into `update`."""
        base, other = direct.updates[direct.parts[0]], direct.updates[direct.parts[-1]]
        self.addresses[:3] = base.data_ptr(), other.data_ptr(), update.data_ptr()

    def run(self, direct: DirectPass) -> None:
        """Run the pass, and this launch after it."""
        if self.graph is None:
            direct.launch()
            self.launch.launch()
        else:
            wp.capture_launch(self.graph)


def record_end(
    direct: DirectPass,
    flow: Flow | Combined,
    mean: torch.Tensor | None,
    memory: list,
    groups: list,
    clipping: tuple[str, float],
    graph: bool,
) -> End:
    """Record the launch that ends the updates of a pass.

    Args:
        direct: The pass.
        flow: The flow; the rule of a combined one has a kernel.
        mean: The average, where the flow has a memory.
        memory: As `memory_of` returns it.
        groups: As `numbers_of` returns it.
        clipping: Kind and limit.
        graph: Whether to make a graph of pass and end.
    """
    addresses = wp.zeros(4, dtype=wp.uint64, device="cpu")
    if mean is not None:
        addresses.numpy()[3] = mean.data_ptr()
    tensors = wp.array(np.array(memory, dtype=np.uint64).reshape(-1, TENSOR), dtype=wp.uint64, device="cpu")
    starts = [*(place.start for place in places_of(direct.trainable)), size_of(direct.trainable)]
    numbers = wp.array(np.array(groups).reshape(-1, GROUP), dtype=wp.float64, device="cpu")
    status, loss = wp.zeros(1, dtype=wp.int32, device="cpu"), torch.zeros(1, dtype=direct.grad.dtype)
    states, controls, costs = (as_array(tensor) for tensor in (direct.states, direct.controls, direct.costs))
    kind, limit = clipping
    inputs = [
        states, controls, direct.own_controls, costs, direct.per_sample, direct.control_weight, addresses,
        memory_in(flow), CLIPPING[kind], limit, tensors, wp.array(starts, dtype=wp.int32, device="cpu"), numbers,
    ]  # fmt: skip
    outputs = [status, as_array(loss), as_array(direct.grad)]
    rule = flow.rule if isinstance(flow, Combined) else None
    either = isinstance(flow, Combined) and flow.either
    kernel = finish_kernel(rule, mean is not None, either, wp.dtype_from_torch(direct.grad.dtype))
    launch = wp.launch(kernel, 1, inputs, outputs, device="cpu", record_tape=False, record_cmd=True)
    held = (*inputs, *outputs, mean)  # a recorded launch does not keep its arrays alive
    whole = direct.capture(launch) if graph else None
    views = addresses.numpy(), list(groups), numbers.numpy(), status.numpy(), loss.numpy()
    return End(launch, whole, memory, mean, *views, held)
