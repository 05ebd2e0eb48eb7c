"""Loss and update in one go, without autograd's graph: for training loops that do the same thing many times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import warp as wp

from warp_phys import kernels
from warp_phys.flow import Combined, Flow
from warp_phys.interop.report import Report
from warp_phys.interop.sums import split
from warp_phys.interop.torch_controller import TorchController
from warp_phys.interop.torch_dense import as_array
from warp_phys.layers import Workspace
from warp_phys.phases import Seeds, Trajectory, flow_gates
from warp_phys.systems.losses import chosen_array


class DirectPass:
    """Forward pass, loss and backward pass of one batch size and horizon, with all their memory.

    Args:
        system: The system.
        adapter: The controller, whose `fits` and `sweeps` hold.
        shape: Steps and batch.
        flows: The flows that run; the first ones are those of the update.
        times: Steps at which the pointwise cost counts.
        control_cost: Factor of the mean squared control.
        dtype: Precision.
    """

    def __init__(
        self,
        system: Any,
        adapter: TorchController,
        shape: tuple[int, int],
        flows: Sequence[Flow],
        times: tuple[int, ...],
        control_cost: float,
        dtype: torch.dtype,
    ):
        steps, batch = shape
        real = wp.dtype_from_torch(dtype)
        self.system, self.adapter, self.flows, self.control_cost = system, adapter, tuple(flows), control_cost
        self.states = torch.zeros((steps + 1, batch, system.state_size), dtype=dtype)
        self.controls = torch.zeros((steps, batch, system.control_size), dtype=dtype)
        self.adj_states, self.adj_controls = torch.zeros_like(self.states), torch.zeros_like(self.controls)
        self.lam = torch.zeros((len(flows), batch, system.state_size), dtype=dtype)
        self.costs = torch.zeros((len(times), batch), dtype=dtype)
        self.trainable = adapter.trainable
        size = sum(p.numel() for p in self.trainable)
        self.updates = torch.zeros((len(flows), size), dtype=dtype)
        self.grad = torch.zeros(size, dtype=dtype)
        self.grads = split(self.grad, self.trainable)
        self.per_sample = 1.0 / (self.costs.numel() if system.time_average else batch)
        self._workspace = Workspace()
        self._x, self._c = as_array(self.states), as_array(self.controls)
        self._seeds = Seeds(as_array(self.adj_states), as_array(self.adj_controls))
        self._lam, self._rows = as_array(self.lam), list(self.updates)
        self._gates = wp.array(flow_gates(self.flows, steps), dtype=real, device="cpu")
        self._own = system.check_parameters(None, self._x, 1)
        weights = as_array(torch.full_like(self.costs, self.per_sample))
        chosen = chosen_array(times, "cpu")
        self._cost = self._record(
            kernels.cost_kernel(system.structure, real), [self._x, chosen, self._own, as_array(self.costs)]
        )
        self._cost_vjp = self._record(
            kernels.cost_vjp_kernel(system.structure, real),
            [self._x, chosen, self._own, weights, self._seeds.states, system._no_structs(self._x).reshape((0, 0))],
        )
        self._kept: Any = None

    def forward(self, x0: torch.Tensor) -> None:
        """Write states and controls."""
        self.states[0] = x0
        self._kept = self.adapter.unroll(self.system, self._x, self._c, self._own, keep=True)

    def loss(self) -> torch.Tensor:
        """Return the loss of the states and controls that `forward` left."""
        self._cost.launch()
        value = self.costs.sum() * self.per_sample
        if self.control_cost:
            value += self.control_cost * self.controls.square().mean()
        return value

    def backward(self) -> torch.Tensor:
        """Return every flow's update, shape (flows, parameters); overwritten by the next call."""
        self._cost_vjp.launch()
        if self.control_cost:
            torch.mul(self.controls, 2.0 * self.control_cost / self.controls.numel(), out=self.adj_controls)
        self.lam.copy_(self.adj_states[-1])
        self.updates.zero_()
        trajectory = Trajectory(self._x, self._c, self._own, self._kept)
        self.adapter.sweep(
            self.system, trajectory, self._seeds, self._gates, self._lam, self._rows, self._workspace
        )  # fmt: skip
        return self.updates

    def leave(self, flow: Flow | Combined) -> Report:
        """Put the flow's update into the `.grad` of the parameters; return what the pass tells about itself."""
        if isinstance(flow, Combined):
            self.grad.copy_(flow.rule(self.updates[0], self.updates[1]))
        else:
            self.grad.copy_(self.updates[0])
        for parameter, grad in zip(self.trainable, self.grads, strict=True):
            parameter.grad = grad
        return Report(self.flows, self.updates.clone(), tuple(self.grads))

    def _record(self, kernel: wp.Kernel, arguments: Sequence[Any]) -> Any:
        dim = tuple(self.costs.shape)
        return wp.launch(kernel, dim=dim, inputs=arguments, device="cpu", record_tape=False, record_cmd=True)


def is_finite(states: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return bool(np.isfinite(float(states.sum()))) or bool(torch.isfinite(states).all())
