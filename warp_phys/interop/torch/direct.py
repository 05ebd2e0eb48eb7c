"""Loss and update in one go, without autograd's graph: for training loops that do the same thing many times."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import as_structs
from warp_phys.core.checks import check_given, check_lengths, range_of, within
from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import Trajectory, all_gates
from warp_phys.flow import Combined, Flow, combine, linear_parts
from warp_phys.interop.torch.combine import announce, has_own_hooks, places_of, size_of, split
from warp_phys.interop.torch.controller import TorchController, addresses_of
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.report import Report
from warp_phys.interop.torch.rows import NOTHING, Beside, fill
from warp_phys.programs.network import OwnLoss, Sweeps, address_array, run_sequences
from warp_phys.systems.losses import chosen_array, weights


class Given:
    """Physical parameters of a call: numbers, and leaves of autograd's graph that get a gradient.

    Args:
        system: The system.
        values: Numbers or tensors by name.
        like: Initial states (batch, D).

    Raises:
        TypeError, ValueError: As `rows_of_parameters`.
    """

    def __init__(self, system: Any, values: Mapping[str, Any], like: torch.Tensor):
        names = getattr(system, "parameter_names", ())
        check_given(names, values)
        self.columns: list[tuple[int, np.ndarray]] = []
        self.leaves: list[tuple[int, torch.Tensor]] = []
        """Column and leaf."""
        self.are_plain = like.device.type == "cpu"
        """Whether no graph is needed to get from the parameters' rows to the leaves."""
        for name, value in values.items():
            i, is_tensor = names.index(name), isinstance(value, torch.Tensor)
            self.columns.append((i, value.detach().to("cpu", like.dtype).numpy() if is_tensor else np.asarray(value)))
            check_lengths(name, self.columns[-1][1].shape, len(like))
            if is_tensor and value.requires_grad:
                self.leaves.append((i, value))
                plain = value.is_leaf and value.dtype == like.dtype and not has_own_hooks(value)
                self.are_plain = self.are_plain and plain and value.device == like.device
        self.rows = max((column.size for _, column in self.columns), default=1)
        """1, or the batch."""
        ids = [id(leaf) for _, leaf in self.leaves]
        self.are_plain = self.are_plain and len(set(ids)) == len(ids)
        self.key = (self.rows, tuple(values), tuple((i, id(leaf), leaf.shape) for i, leaf in self.leaves))

    def write(self, rows: np.ndarray) -> bool:
        """Write the parameters' rows; return whether they are what physical parameters may be, dt apart."""
        for i, column in self.columns:
            rows[:, i] = column.reshape(-1)
        return bool(np.isfinite(rows).all())


class DirectPass:
    """Forward pass, loss and backward pass of one batch size and horizon, with all their memory.

    Args:
        system: The system.
        adapter: The controller, whose `fits` and `sweeps` hold; its parameters must stay where they are.
        shape: Steps and batch.
        flow: The flow of the update.
        flows: The flows that run: its parts, and further ones for the report.
        times: Steps at which the pointwise cost counts.
        control_cost: Factor of the mean squared control.
        dtype: Precision.
        given: Physical parameters, whose numbers `begin` takes up and whose leaves are trained too; None for the
            system's own.
    """

    def __init__(
        self,
        system: Any,
        adapter: TorchController,
        shape: tuple[int, int],
        flow: Flow | Combined,
        flows: tuple[Flow, ...],
        times: tuple[int, ...],
        control_cost: float,
        dtype: torch.dtype,
        given: Given | None = None,
    ):
        steps, batch = shape
        self.flow, self.flows, self.control_cost = flow, flows, control_cost
        self.parts = [flows.index(part) for part in linear_parts(flow)]
        self.states = torch.zeros((steps + 1, batch, system.state_size), dtype=dtype)
        self._inner, self.own_controls = system, system.own_controls
        self.controls = torch.zeros((steps, batch, system.control_size), dtype=dtype)
        self.lam = torch.zeros((len(self.flows), batch, system.state_size), dtype=dtype)
        self.costs = torch.zeros((len(times), batch), dtype=dtype)
        self.planned = adapter.planned()
        """What runs in place of the module."""
        self.trainable = adapter.trainable
        self.unused = adapter.unused()
        self.still = [*self.unused, *(p for p in adapter.module.parameters() if not p.requires_grad)]
        unused = {id(p) for p in self.unused}
        self.moved = [p for p in self.trainable if id(p) not in unused]
        self._own_size = size_of(self.trainable)
        self._leaves = [] if given is None else given.leaves
        self.receivers = [*self.trainable, *(leaf for _, leaf in self._leaves)]
        """What gets a gradient."""
        size = size_of(self.receivers)
        self.updates = torch.zeros((len(self.flows), size), dtype=dtype)
        self.grad = torch.zeros(size, dtype=dtype)
        # the same memory, each with a version of its own, as gradients of different parameters have
        self.grads = [part.data for part in split(self.grad, self.receivers)]
        self._left: list[int] = []  # the versions that `leave` wrote
        if isinstance(flow, Combined):
            announce(self, self.grads)
        own = [getattr(getattr(system, "wrapped", system), name) for name in system.parameter_names]
        self._rows = None if given is None else torch.tensor([own] * given.rows, dtype=dtype)
        ranges = [range_of(system, name) for name in system.parameter_names]
        self._ranges = [(i, range_) for i, range_ in enumerate(ranges) if range_ != "finite"]
        # of each flow, and of the cost itself
        self._adj_p = torch.zeros((len(flows) + 1, batch, len(own)), dtype=dtype) if self._leaves else None
        self.per_sample, self.control_weight = weights(system, self.costs, self.controls, control_cost)
        self._record_cost(system, times)
        self._record_passes(system, adapter)

    def _parameters(self, system: Any, like: wp.array) -> wp.array:
        """Return the physical parameters as the kernels take them."""
        if self._rows is None:
            return system.check_parameters(None, like, 1)
        return as_structs(as_array(self._rows), system.types(like.dtype).Parameters)

    def _record_cost(self, system: Any, times: tuple[int, ...]) -> None:
        """Record the launch of the cost."""
        x, costs, chosen = as_array(self.states), as_array(self.costs), chosen_array(times, "cpu")
        own, kernel = self._parameters(system, x), kernels.cost_kernel(system.structure, x.dtype)
        self._cost = wp.launch(
            kernel, costs.shape, [x, chosen, own, costs], device="cpu", record_tape=False, record_cmd=True
        )
        self._held: list[Any] = [own, chosen]  # a recorded launch does not keep its arrays alive
        counts = np.zeros(len(self.states), dtype=np.int32)
        counts[list(times)] = 1
        self._loss = OwnLoss(wp.array(counts, dtype=wp.int32, device="cpu"), self.per_sample, self.control_weight)

    def _record_passes(self, system: Any, adapter: TorchController) -> None:
        """Record the launches of the forward and of the backward pass."""
        network, tensors = adapter.network()
        x, c, lam = as_array(self.states), as_array(self.controls), as_array(self.lam)
        own, workspace, (steps, batch, _) = self._parameters(system, x), Workspace(), c.shape
        gates = wp.array(all_gates(self.flows, steps, batch, system), dtype=x.dtype, device="cpu")
        gradients = network.gradients(len(self.flows), batch, workspace)
        sources = address_array([addresses_of(tensors)])
        addresses = np.array(adapter.targets(tensors, list(self.updates)), dtype=np.uint64)
        self._trained = addresses != 0
        self._offsets = addresses - np.uint64(self.updates.data_ptr())
        targets = address_array(addresses)
        self._targets = targets.numpy()  # a view
        self._pack = network.pack_launch(sources)
        trajectory = Trajectory(x, c, own)
        adj_p = None if self._adj_p is None else as_array(self._adj_p)
        sweeps = Sweeps(system, trajectory, self._loss, gates, lam, adj_p)
        self._passes = network.pass_launches(sweeps, gradients, workspace)
        self._unpack = network.unpack_launches(gradients, targets)
        self._gradients = gradients
        self._held += [network, adapter, x, c, lam, own, workspace, gates, sources, targets, adj_p]

    def take_parameters(self, given: Given) -> bool:
        """Take up physical parameters; return whether they are finite and in their ranges."""
        rows = self._rows.numpy()  # type: ignore[union-attr]
        return given.write(rows) and all(within(range_, rows[:, i]).all() for i, range_ in self._ranges)

    def _start(self, x0: torch.Tensor, beside: Beside) -> None:
        if self._inner.state_size == x0.shape[1]:
            self.states[0].copy_(x0)
        else:
            fill(self.states, x0, beside, self._inner)

    def begin(self, x0: torch.Tensor, beside: Beside = NOTHING) -> None:
        """Take up what a trajectory starts from, and make room for the updates: the report keeps the last ones."""
        self._start(x0, beside)
        self._left = []
        self.updates = torch.zeros_like(self.updates)
        np.add(self._offsets, np.uint64(self.updates.data_ptr()), out=self._targets, where=self._trained)

    def begin_again(self, x0: torch.Tensor, beside: Beside = NOTHING) -> None:
        """Do the same in the room of the last updates."""
        self._left = []
        self.updates.zero_()
        self._start(x0, beside)

    def launch(self) -> None:
        """Write states, controls, costs, and every flow's update in `updates`, shape (flows, parameters)."""
        self._gradients.zero_()
        self._pack.launch()
        run_sequences(self._passes)
        for launch in self._unpack:
            launch.launch()
        self._cost.launch()

    def capture(self, end: Any) -> Any:
        """Return `launch`, and then the recorded launch `end`, as a graph; None where threads share the batch."""
        if len(self._passes) > 1:
            return None
        with wp.ScopedCapture(device="cpu") as capture:
            self.launch()
            end.launch()
        return capture.graph

    def loss(self) -> torch.Tensor:
        """Return the loss of what `launch` left."""
        value = self.costs.sum() * self.per_sample
        if self.control_cost:
            controls = self.controls[:, :, : self.own_controls].reshape(-1)
            value.add_(torch.dot(controls, controls), alpha=self.control_weight)
        return value

    def _gather(self) -> torch.Tensor | None:
        """Put the leaves' adjoints beside the updates of the weights; return the derivatives of the cost itself."""
        if self._adj_p is None:
            return None
        per_sample = self._adj_p.numpy()
        total, start = per_sample.sum(axis=1), self._own_size
        found = np.empty((len(per_sample), self.updates.shape[1] - start), per_sample.dtype)
        for (i, leaf), part in zip(self._leaves, places_of(leaf for _, leaf in self._leaves), strict=True):
            found[:, part] = per_sample[:, :, i] if leaf.numel() == per_sample.shape[1] else total[:, i : i + 1]
        self.updates[:, start:] = torch.from_numpy(found[:-1])
        return torch.from_numpy(found[-1])

    def leave(self) -> Report:
        """Put the flow's update into the `.grad` of the parameters; return what the pass tells about itself."""
        of_cost = self._gather()
        update = combine(self.flow, [self.updates[i] for i in self.parts])
        self.grad.copy_(update)
        if of_cost is not None:
            self.grad[self._own_size :] += of_cost
        torch.autograd.graph.increment_version(self.grads)
        if isinstance(self.flow, Combined):
            self._left = [grad._version for grad in self.grads]
        return self.report(update)

    def left(self, index: int, version: int) -> tuple[Combined, torch.Tensor, torch.Tensor] | None:
        """Return what a gradient of this version is made of, see `combine.Source`."""
        if not self._left or version != self._left[index]:
            return None
        assert isinstance(self.flow, Combined)
        base, other = (self.updates[i] for i in self.parts)
        return self.flow, base, other

    def report(self, update: torch.Tensor) -> Report:
        """See that the `.grad` of the parameters is what `grad` holds; return what the pass tells about itself."""
        hand_out(self.receivers, self.grads)
        for parameter in self.still:
            parameter.grad = None
        return Report(self.flows, self.updates[:, : self._own_size], (update[: self._own_size],))


def hand_out(parameters: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """Make these tensors the `.grad` of the parameters."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if parameter.grad is not grad:
            parameter.grad = grad
