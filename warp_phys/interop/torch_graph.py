"""An update by any backend as one CUDA graph: torch's work and Warp's, on fixed memory, without a host in between."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from warp_phys.flow import Combined, distinct, linear_parts, resolve
from warp_phys.interop.report import Report
from warp_phys.interop.sums import split
from warp_phys.interop.torch_dense import as_array
from warp_phys.interop.torch_direct import hand_out
from warp_phys.interop.torch_loss import costs_at, costs_vjp, torch_stream
from warp_phys.interop.torch_rollout import Rollout
from warp_phys.layers import Workspace
from warp_phys.phases import Seeds, Trajectory, backward, forward
from warp_phys.systems.losses import chosen_times

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
    """

    def __init__(
        self,
        rollout: Rollout,
        optimiser: torch.optim.Optimizer,
        batch: int,
        when: Any,
        control_cost: float,
        clip: str,
        clip_at: float,
    ):
        system, flow, steps = rollout.system, rollout.flow, rollout.steps
        self.rollout, self.optimiser, self.flow = rollout, optimiser, flow
        self.times, self.control_cost, self.clip, self.clip_at = chosen_times(when, steps), control_cost, clip, clip_at
        observe = [part for own in rollout.observe for part in linear_parts(resolve(own))]
        self.flows = distinct([*linear_parts(flow), *observe])
        kind: dict[str, Any] = {"dtype": rollout.dtype, "device": rollout.device}
        self.x0 = torch.zeros((batch, system.state_size), **kind)
        self.states = torch.zeros((steps + 1, batch, system.state_size), **kind)
        self.controls = torch.zeros((steps, batch, system.control_size), **kind)
        self.trainable = rollout._adapter.trainable
        size = sum(parameter.numel() for parameter in self.trainable)
        self.updates = torch.zeros((len(self.flows), size), **kind)
        self.update, self.grad = torch.zeros(size, **kind), torch.zeros(size, **kind)
        self.grads = split(self.grad, self.trainable)
        self.loss = torch.zeros((), **kind)
        self.diverged = torch.zeros((), dtype=torch.float32, device=rollout.device)
        self._workspace = Workspace()
        self._gates = rollout._gates_of(self.flows, steps)

    def run(self, step: bool) -> None:
        """Do all of it on `x0`; without `step` the weights stay."""
        self.states[0].copy_(self.x0)
        device = self.rollout.device
        with torch.no_grad(), torch_stream(device), torch.autocast(device.type, enabled=False):
            kept = self._forward()
            seeds = self._loss()
            self._backward(kept, seeds)
        self._combine()
        if step:
            self._step()

    def _forward(self) -> Any:
        rollout, arrays = self.rollout, (as_array(self.states), as_array(self.controls))
        own, fused = rollout._structs(None, arrays[0]), rollout.backend == "fused"
        return forward(rollout.system, rollout._adapter, *arrays, own, fused, keep=True)

    def _loss(self) -> Seeds:
        """Write the loss and whether it diverged; return the derivatives of the loss."""
        system: Any = self.rollout.system
        costs = costs_at(system, self.states, self.times, None)
        per_sample = 1.0 / (costs.numel() if system.time_average else costs.shape[1])
        weight = self.control_cost / self.controls.numel()
        finite = torch.isfinite(self.states).all()
        self.diverged.copy_(~finite)
        self.loss.copy_(costs.sum() * per_sample + self.controls.square().sum() * weight)
        adj_states, _ = costs_vjp(system, self.states, self.times, None, torch.full_like(costs, per_sample), False)
        return Seeds(as_array(adj_states), as_array(self.controls * (2.0 * weight)))

    def _backward(self, kept: Any, seeds: Seeds) -> None:
        rollout, arrays = self.rollout, (as_array(self.states), as_array(self.controls))
        self.updates.zero_()
        trajectory = Trajectory(*arrays, rollout._structs(None, arrays[0]), kept)
        backward(
            rollout.system, rollout._adapter, trajectory, seeds, *self._gates, list(self.updates), self._workspace,
            fused=rollout.backend == "fused",
        )  # fmt: skip

    def _combine(self) -> None:
        """Write the flow's update, and the clipped one into the memory behind the `.grad` of the parameters."""
        parts = [self.updates[self.flows.index(part)] for part in linear_parts(self.flow)]
        self.update.copy_(self.flow.rule(*parts) if isinstance(self.flow, Combined) else parts[0])
        self.grad.copy_(self.update)
        if self.clip == "value":
            self.grad.clamp_(-self.clip_at, self.clip_at)
        elif self.clip == "norm":
            self.grad.mul_((self.clip_at / torch.linalg.vector_norm(self.grad)).clamp(max=1))

    def _step(self) -> None:
        optimiser: Any = self.optimiser
        hand_out(self.trainable, self.grads)
        optimiser.grad_scale, optimiser.found_inf = None, self.diverged
        try:
            optimiser.step()
        finally:
            del optimiser.grad_scale, optimiser.found_inf

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Capture all of it in a graph of torch's, on this stream."""
        with beside(stream):
            for _ in range(WARM_UP):
                self.run(step=False)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self.run(step=True)

    def replay(self, x0: torch.Tensor) -> bool:
        """Take a step from x0; return whether all states were finite, else no weight has changed."""
        self.x0.copy_(x0)
        self._graph.replay()
        hand_out(self.trainable, self.grads)
        return not bool(self.diverged)

    def report(self) -> Report:
        """Return what the pass tells about itself, a copy."""
        return Report(self.flows, self.updates.clone(), (self.update.clone(),))


def key_of(rollout: Rollout, batch: int) -> tuple:
    """Return what a captured update depends on besides the numbers in the memory that it reads."""
    modes = tuple(part.training for part in rollout.controller.modules())
    kinds, parameters = rollout._adapter.signature()
    return rollout.steps, batch, rollout.flow, tuple(rollout.observe), modes, kinds, tuple(parameters)


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make this torch's current stream, after what the current one has to do and before what it will have to."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
