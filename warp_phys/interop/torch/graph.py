"""An update by any backend as one CUDA graph: torch's work and Warp's, on fixed memory, without a host in between."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import Seeds, Trajectory, backward, forward
from warp_phys.flow import Combined, combine, linear_parts
from warp_phys.interop.torch.chain import are_hooks_everywhere, has_hooks
from warp_phys.interop.torch.combine import has_own_hooks, size_of, split
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.direct import hand_out
from warp_phys.interop.torch.loss import costs_at, costs_vjp, torch_stream
from warp_phys.interop.torch.memory import combine_remembering
from warp_phys.interop.torch.optimiser import clip_gradients
from warp_phys.interop.torch.report import Report
from warp_phys.interop.torch.rollout import Rollout
from warp_phys.interop.torch.rows import NOTHING, Beside, fill
from warp_phys.programs.update_kernels import Clip
from warp_phys.systems.losses import chosen_array, chosen_times, weights

WARM_UP = 2
"""Passes before a capture: kernels are loaded, libraries and workspaces have their memory."""


class WholeUpdate:
    """Forward, loss, backward, combination, clipping and the optimiser's step on memory of their own.

    Nothing here waits for the device: whether the trajectory is finite stands in `diverged`, and where it is not the
    optimiser, told so as by a gradient scaler, takes no step.

    Args:
        rollout: The rollout, of a `System`.
        optimiser: One whose steps take `found_inf`: Adam or AdamW with `fused=True`.
        batch: Number of initial states.
        when: Steps at which the pointwise cost counts, see `System.loss`.
        control_cost: Factor of the mean squared control.
        clip: "none", "value" or "norm".
        clip_at: The limit.
        mean: The average, where the flow has a memory.
        beside: Inputs and memory of the shapes that replays have.
    """

    def __init__(
        self,
        rollout: Rollout,
        optimiser: torch.optim.Optimizer,
        batch: int,
        when: Any,
        control_cost: float,
        clip: Clip,
        clip_at: float,
        mean: torch.Tensor | None = None,
        beside: Beside = NOTHING,
    ):
        system, flow, steps = rollout._inner, rollout.flow, rollout.steps
        self.rollout, self.optimiser, self.flow = rollout, optimiser, flow
        self.times, self.control_cost, self.clip, self.clip_at = chosen_times(when, steps), control_cost, clip, clip_at
        self.flows = rollout.running_flows(flow)
        kind: dict[str, Any] = {"dtype": rollout.dtype, "device": rollout.device}
        self.x0 = torch.zeros((batch, rollout.system.state_size), **kind)
        self.beside = Beside(*(None if tensor is None else torch.zeros_like(tensor) for tensor in beside))
        self.states = torch.zeros((steps + 1, batch, system.state_size), **kind)
        self.controls = torch.zeros((steps, batch, system.control_size), **kind)
        self.trainable = rollout._adapter.trainable
        size = size_of(self.trainable)
        self.updates = torch.zeros((len(self.flows), size), **kind)
        self.update, self.grad = torch.zeros(size, **kind), torch.zeros(size, **kind)
        self.grads = [part.data for part in split(self.grad, self.trainable)]  # each with a version of its own
        self.loss = torch.zeros((), **kind)
        self.diverged = torch.zeros((), dtype=torch.float32, device=rollout.device)
        self.frozen = [p for p in rollout.trained.parameters() if not p.requires_grad]
        self._workspace = Workspace()
        self._gates = rollout._gates_of(self.flows, steps, batch)
        # whatever else a graph reads must live as long as it does, also when caches and modules forget it
        options = [value for group in optimiser.param_groups for name, value in group.items() if name != "params"]
        own = rollout._structs(None, self.states), chosen_array(self.times, str(rollout.device))
        self._mean = mean
        self._held = [own, options, rollout._adapter.held(), list(rollout.trained.modules()), _buffers(rollout)]

    def run(self, step: bool) -> None:
        """Do all of it on `x0`; without `step` the weights stay."""
        fill(self.states, self.x0, self.beside, self.rollout._inner)
        device = self.rollout.device
        with torch.no_grad(), torch_stream(device), torch.autocast(device.type, enabled=False):
            kept = self._forward()
            seeds = self._loss()
            self._backward(kept, seeds)
        self._combine(step)
        if step:
            self._step()

    def _forward(self) -> Any:
        rollout, arrays = self.rollout, (as_array(self.states), as_array(self.controls))
        own, fused = rollout._structs(None, self.states), rollout.backend == "fused"
        return forward(rollout._inner, rollout._adapter, *arrays, own, fused, keep=True)

    def _loss(self) -> Seeds:
        """Write the loss and whether it diverged; return the derivatives of the loss."""
        system: Any = self.rollout._inner
        costs = costs_at(system, self.states, self.times, None)
        per_sample, weight = weights(system, costs, self.controls, self.control_cost)
        controls = self.controls[:, :, : system.own_controls]
        finite = torch.isfinite(self.states).all()
        self.diverged.copy_(~finite)
        self.loss.copy_(costs.sum() * per_sample + controls.square().sum() * weight)
        adj_states, _ = costs_vjp(system, self.states, self.times, None, torch.full_like(costs, per_sample), False)
        adj_controls = torch.zeros_like(self.controls)
        adj_controls[:, :, : system.own_controls] = controls * (2.0 * weight)
        return Seeds(as_array(adj_states), as_array(adj_controls))

    def _backward(self, kept: Any, seeds: Seeds) -> None:
        rollout, arrays = self.rollout, (as_array(self.states), as_array(self.controls))
        self.updates.zero_()
        trajectory = Trajectory(*arrays, rollout._structs(None, self.states), kept)
        backward(
            rollout._inner, rollout._adapter, trajectory, seeds, *self._gates, list(self.updates), self._workspace,
            fused=rollout.backend == "fused",
        )  # fmt: skip

    def _combine(self, step: bool) -> None:
        """Write the flow's update, and the clipped one into the memory behind the `.grad` of the parameters."""
        parts = [self.updates[self.flows.index(part)] for part in linear_parts(self.flow)]
        if self._mean is None:
            self.update.copy_(combine(self.flow, parts))
        else:
            assert isinstance(self.flow, Combined)
            skip = self.diverged if step else torch.ones_like(self.diverged)
            self.update.copy_(combine_remembering(self.flow, parts[0], parts[1], self._mean, skip))
        self.grad.copy_(self.update)
        clip_gradients([self.grad], self.clip, self.clip_at)

    def _step(self) -> None:
        optimiser: Any = self.optimiser
        self._hand_out()
        optimiser.grad_scale, optimiser.found_inf = None, self.diverged
        try:
            optimiser.step()
        finally:
            del optimiser.grad_scale, optimiser.found_inf

    def _hand_out(self) -> None:
        hand_out(self.trainable, self.grads)
        for parameter in self.frozen:
            parameter.grad = None

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Capture all of it in a graph of torch's, on this stream."""
        with beside(stream):
            for _ in range(WARM_UP):
                self.run(step=False)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self.run(step=True)

    def replay(self, x0: torch.Tensor, beside: Beside = NOTHING) -> bool:
        """Take a step from x0; return whether all states were finite, else no weight has changed."""
        self.x0.copy_(x0)
        for own, given in zip(self.beside, beside, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self._graph.replay()
        self._hand_out()
        return not bool(self.diverged)

    def report(self) -> Report:
        """Return what the pass tells about itself, a copy."""
        return Report(self.flows, self.updates.clone(), (self.update.clone(),))


def key_of(rollout: Rollout, batch: int) -> tuple | None:
    """Return what a captured update depends on besides the numbers in the memory that it reads.

    None where the module or its parameters have hooks, which a replay would not call, or where the backward pass is one
    of `contract.Found`.
    """
    modules, known = list(rollout.trained.modules()), rollout._adapter.examination
    if known.whole or known.others:
        return None
    if any(map(has_own_hooks, rollout._adapter.trainable)):
        return None
    if are_hooks_everywhere() or any(has_hooks(module) for module in modules):
        return None
    parts = tuple((id(module), type(module), plain_attributes(module)) for module in modules)
    buffers = tuple((id(buffer), buffer.data_ptr()) for buffer in _buffers(rollout))
    _, parameters = rollout._adapter.signature()
    adapter = rollout._adapter
    own = rollout.steps, batch, rollout.flow, tuple(rollout.observe), id(adapter.dense()), adapter.program_key()
    return *own, parts, buffers, tuple(parameters)


def plain_attributes(module: torch.nn.Module) -> tuple:
    """Return the attributes that are numbers, words or tuples of such: a stride, a slope, the mode of training.

    A module that counts its calls in one is never the same twice, and so is never captured.
    """
    return tuple((name, value) for name, value in vars(module).items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | torch.dtype)


def _buffers(rollout: Rollout) -> list[torch.Tensor]:
    return list(rollout.trained.buffers())


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make this torch's current stream, after what the current one has to do and before what it will have to."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
