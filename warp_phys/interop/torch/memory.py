"""The running average of an update that a flow with a memory consults."""

from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

import torch

from warp_phys.flow import Combined, Flow, linear_parts
from warp_phys.interop.torch.combine import has_own_hooks, size_of, split
from warp_phys.interop.torch.rollout import Rollout
from warp_phys.interop.torch.rows import NOTHING, Beside
from warp_phys.systems.losses import When


class Memory:
    """Running averages over the updates of a training by one flow, for each parameter of a controller, by name.

    They begin at zero, and again where the flow becomes another. Those of parameters that are not trained now are kept.
    """

    def __init__(self) -> None:
        self._flow: tuple | None = None
        self._means: dict[str, torch.Tensor] = {}
        self._flat: torch.Tensor | None = None
        self._trained: list[tuple[int, torch.Size]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what knows parameters by their place in memory."""
        means = {name: mean.clone() for name, mean in self._means.items()}
        return {"_flow": self._flow, "_means": means, "_flat": None, "_trained": []}

    def mean(self, flow: Combined, controller: torch.nn.Module) -> torch.Tensor | None:
        """Return the averages of all parameters that are trained, in one flat tensor that stays as long as they do.

        None where no parameter is trained.
        """
        if self._flow != astuple(flow.other):
            self._flow, self._means, self._flat = astuple(flow.other), {}, None
        trained = [p for p in controller.parameters() if p.requires_grad]
        known = [(id(p), p.shape) for p in trained]
        if self._flat is None or self._trained != known or not _is_beside(self._flat, trained[0]):
            self._trained, self._flat = known, self._gather(controller) if trained else None
        return self._flat

    def _gather(self, controller: torch.nn.Module) -> torch.Tensor:
        """Return a new flat tensor with what is known of the trained parameters, zero for the others."""
        named = {name: p for name, p in controller.named_parameters() if p.requires_grad}
        flat = next(iter(named.values())).new_zeros(size_of(named.values()))
        for name, part in zip(named, split(flat, list(named.values())), strict=True):
            before = self._means.get(name)
            if before is not None and before.shape == part.shape:
                part.copy_(before)
            self._means[name] = part
        return flat

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: copies of the averages, by the names of parameters, and what they are of."""
        return {"flow": self._flow, "means": {name: mean.clone() for name, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any], controller: torch.nn.Module) -> None:
        """Take up what `state_dict` returned, of another precision or device if need be.

        Raises:
            TypeError, ValueError: It returned something else, or its averages are not of this controller's parameters.
        """
        if not isinstance(state, Mapping) or set(state) != {"flow", "means"}:
            raise ValueError(f"state must have flow and means, as state_dict returns them, got {state!r:.80}")
        shapes = {name: tuple(p.shape) for name, p in controller.named_parameters()}
        for name, mean in state["means"].items():
            if not isinstance(mean, torch.Tensor):
                raise TypeError(f"the mean of {name} must be a tensor, got {type(mean).__name__}")
            if shapes.get(name) != tuple(mean.shape):
                wanted = f"has shape {shapes[name]}" if name in shapes else "is no parameter of the controller"
                raise ValueError(f"state has a mean of {name} of shape {tuple(mean.shape)}, but {name} {wanted}")
        self._flow = None if state["flow"] is None else astuple(Flow(*state["flow"]))
        self._means, self._flat = {name: mean.clone() for name, mean in state["means"].items()}, None


def _is_beside(mean: torch.Tensor, parameter: torch.Tensor) -> bool:
    return (mean.dtype, mean.device) == (parameter.dtype, parameter.device)


def combine_remembering(
    flow: Combined, base: torch.Tensor, other: torch.Tensor, mean: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a flow's update, after the consulted flow's has gone into the average; nothing here waits for a device.

    Args:
        flow: A flow with a memory.
        base: The update of its base, flat.
        other: The update of its other flow, flat.
        mean: The average, changed in place: decay · mean + (1 − decay) · other / |other|. Where that is not finite it
            stays, and `other` is not consulted.
        skip: A number on the device; where it is not 0, the average stays.
    """
    length = torch.linalg.vector_norm(other, dtype=torch.float64)
    is_known = torch.isfinite(length)
    wide = other.double() * torch.where(length > 0.0, (1.0 - flow.memory) / length, 0.0)
    keep = is_known if skip is None else is_known & (skip == 0.0)
    mean.copy_(torch.where(keep, mean.double() * flow.memory + wide, mean.double()))
    return flow.apply(base, torch.where(is_known, other, mean), mean)


def value_and_grad(
    rollout: Rollout,
    mean: torch.Tensor | None,
    x0: torch.Tensor,
    when: When,
    control_cost: float,
    parameters: Mapping[str, Any] | None = None,
    beside: Beside = NOTHING,
) -> torch.Tensor:
    """Do what `Rollout.value_and_grad` does, for a flow with a memory too.

    Args:
        rollout: The rollout.
        mean: The average for its flow, as `Memory.mean` returns it; None for a flow without a memory.
        x0: As there.
        when: As there.
        control_cost: As there.
        parameters: As there.
        beside: Inputs and memory, as there.

    Raises:
        ValueError: As there; or the flow has a memory, and a parameter has hooks, or a physical one a gradient.
    """
    flow = rollout.flow
    if not isinstance(flow, Combined) or not flow.memory:
        return rollout.value_and_grad(x0, when, control_cost, parameters, *beside)
    wanted = [name for name, value in (parameters or {}).items() if getattr(value, "requires_grad", False)]
    if wanted:
        raise ValueError(
            f"physical parameters must have no gradient for the flow {flow.name!r}, which keeps an average for each of "
            f"the controller's parameters alone; {', '.join(wanted)} require one: detach them"
        )
    hooked = [name for name, p in rollout.trained.named_parameters() if p.requires_grad and has_own_hooks(p)]
    if hooked:
        raise ValueError(
            f"parameters must have no hooks for the flow {flow.name!r}, whose update is no gradient of autograd's; "
            f"{', '.join(hooked)} have. One that is not to be trained: requires_grad_(False)"
        )
    forgetful = replace(flow, memory=0.0, either=False)
    loss = rollout._value_and_grad(forgetful, x0, when, control_cost, parameters, beside)
    if rollout._has_others:
        raise ValueError(
            f"controller and system must depend on the controller's own parameters alone for the flow {flow.name!r}, "
            "which keeps an average for each of them: give what else there is requires_grad_(False), or make it "
            "parameters of the controller"
        )
    if mean is None:
        return loss
    report, trainable = rollout.report, rollout._adapter.trainable
    assert report.updates is not None
    base, other = (report.updates[report.flows.index(part)] for part in linear_parts(flow))
    with torch.no_grad():
        update = combine_remembering(flow, base, other, mean)
        for parameter, part in zip(trainable, split(update, trainable), strict=True):
            if parameter.grad is not None:  # the controls depend on it
                parameter.grad.copy_(part)
    rollout.report = replace(report, changes=(update,))
    return loss
