"""Small networks on a CPU, whole unrollings and whole backward passes at a time: the host side of `native_kernels`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys import native_kernels as native
from warp_phys.arrays import aligned_zeros
from warp_phys.native_kernels import SAMPLES, Plan

KEPT_BYTES = 48 * 2**20
"""Most memory for the activations of a forward pass; a longer one computes them again on its way back.

Buffers that wait for a later pass take as much again at most.
"""


class Rows:
    """A buffer for the rows of a trajectory, and a count of the passes that have written to it."""

    def __init__(self, length: int, real: type):
        self.array = aligned_zeros((length,), real, "cpu")
        self.writes = 0


class Kept:
    """The rows that one forward pass left: its own until a backward pass gives their buffer back."""

    def __init__(self, network: "Network", rows: Rows):
        self.network, self.rows, self.write, self.owned = network, rows, rows.writes, True


class Network:
    """A plan, and the memory of its weights.

    Args:
        plan: The layers.
        real: wp.float32 or wp.float64.
    """

    def __init__(self, plan: Plan, real: type):
        self.plan, self.real = plan, real
        self._packed = aligned_zeros((plan.packed[-1],), real, "cpu")
        self._transposed = aligned_zeros((max(1, plan.transposed[-1]),), real, "cpu")
        self._scratch: dict[int, list[Rows]] = {}  # by length, for good: a captured graph goes on using it
        self._idle: list[Rows] = []  # what forward passes had kept
        self._lasting: dict[tuple, wp.array] = {}
        self._deltas = f"deltas of {plan}"

    def pack(self, weights: Sequence[int]) -> None:
        """Read the weights and biases, given by their addresses in turn; the memory must be the CPU's, contiguous."""
        self.pack_launch(self._addresses([weights]))

    def unroll(
        self, system: Any, states: wp.array, controls: wp.array, parameters: wp.array, keep: bool
    ) -> Kept | None:
        """Write states[1:] and controls from states[0], with the weights packed last.

        Returns:
            The activations of all rows if `keep` asks for them and there is room, for `sweep`.
        """
        keep = keep and self.can_keep(controls)
        length = self.row_count(controls, keep)
        rows = self._borrow_kept(length) if keep else self._borrow(length)
        self.unroll_launch(system, states, controls, parameters, rows.array, keep)
        if keep:
            return Kept(self, rows)
        self._return(rows)
        return None

    def sweep(
        self,
        system: Any,
        trajectory: Any,
        seeds: Any,
        gates: wp.array,
        adj_x: wp.array,
        workspace: Any,
    ) -> wp.array:
        """Run all flows backward, with the weights packed last.

        Args:
            system: The system.
            trajectory: States, controls and physical parameters (`phases.Trajectory`).
            seeds: The explicit derivatives of the loss (`phases.Seeds`).
            gates: α and β, shape (flows, steps, 2).
            adj_x: ∂L/∂x_T per flow on entry, λ_0 on return; shape (flows, batch, D).
            workspace: Keeps the scratch arrays.

        Returns:
            The gradients of the weights in the packed layout, shape (flows · packed length).
        """
        kept = self._take(trajectory.kept)
        rows = kept or self._borrow(self.chunk(trajectory.controls) * SAMPLES * self.plan.row)
        gradients = self.gradients(len(adj_x), workspace)
        gradients.zero_()
        self.sweep_launch(system, trajectory, seeds, gates, adj_x, rows.array, kept is not None, gradients, workspace)
        if kept is None:
            self._return(rows)
        else:
            self._set_aside(rows)
        return gradients

    def unpack(self, gradients: wp.array, targets: Sequence[Sequence[int]], lasting: bool = False) -> None:
        """Add packed gradients to contiguous memory: per flow the addresses for weights and biases in turn, or 0.

        The addresses are kept for the life of the network if they are `lasting`: a captured graph reads them.
        """
        self.unpack_launch(gradients, self._addresses(targets) if lasting else address_array(targets))

    def can_keep(self, controls: wp.array) -> bool:
        """Whether there is room for the activations of all rows of a trajectory."""
        return self.row_count(controls, keep=True) * self._packed.strides[0] <= KEPT_BYTES

    def row_count(self, controls: wp.array, keep: bool) -> int:
        """Return the length of the buffer that `unroll_launch` writes its rows to."""
        return (controls.shape[0] * controls.shape[1] if keep else SAMPLES) * self.plan.row

    def chunk(self, controls: wp.array) -> int:
        """Return the number of time steps that a backward pass takes at a time."""
        steps, batch, _ = controls.shape
        return min(steps, max(1, self.plan.chunk // min(batch, SAMPLES)))

    def gradients(self, flows: int, workspace: Any) -> wp.array:
        """Return the workspace's array for the packed gradients of all flows; it holds those of the last pass."""
        return workspace.array("packed gradients", (flows * self.plan.packed[-1],), self.real, "cpu")

    def pack_launch(self, addresses: wp.array, record: bool = False) -> Any:
        """Launch the packing, or return the launch if it is to be recorded; so do the three below."""
        inputs = [addresses, self._packed, self._transposed]
        return _launch(native.pack_kernel(self.plan, self.real), 1, inputs, record)

    def unroll_launch(
        self,
        system: Any,
        states: wp.array,
        controls: wp.array,
        parameters: wp.array,
        rows: wp.array,
        keep: bool,
        record: bool = False,
    ) -> Any:
        """Launch the unrolling."""
        inputs = [self._packed, parameters, int(keep), states, controls, rows]
        blocks = -(-controls.shape[1] // SAMPLES)
        return _launch(native.unroll_kernel(system.structure, self.plan, self.real), blocks, inputs, record)

    def sweep_launch(
        self,
        system: Any,
        trajectory: Any,
        seeds: Any,
        gates: wp.array,
        adj_x: wp.array,
        rows: wp.array,
        kept: bool,
        gradients: wp.array,
        workspace: Any,
        record: bool = False,
    ) -> Any:
        """Launch the backward pass, which adds to `gradients`; `rows` holds the activations if they are `kept`."""
        flows, chunk, plan = len(adj_x), self.chunk(trajectory.controls), self.plan
        # of this plan alone: the adjoints of numbers that no window reads are never written, and must stay zero
        deltas = workspace.array(self._deltas, (flows * chunk * SAMPLES * plan.row,), self.real, "cpu")
        adj_c = workspace.array("adj_c of a block", (flows, SAMPLES, plan.outputs), self.real, "cpu")
        inputs = [
            self._packed, self._transposed, trajectory.parameters, trajectory.states, trajectory.controls,
            seeds.states, seeds.controls, gates, chunk, int(kept), rows, deltas, adj_c, adj_x, gradients,
        ]  # fmt: skip
        return _launch(native.sweep_kernel(system.structure, plan, self.real), 1, inputs, record)

    def unpack_launch(self, gradients: wp.array, addresses: wp.array, record: bool = False) -> Any:
        """Launch the unpacking."""
        kernel = native.unpack_kernel(self.plan, self.real)
        return _launch(kernel, len(addresses), [gradients, addresses], record)

    def _addresses(self, rows: Sequence[Sequence[int]]) -> wp.array:
        key = tuple(map(tuple, rows))
        if key not in self._lasting:
            self._lasting[key] = address_array(rows)
        return self._lasting[key]

    # A pass takes a buffer off a list and puts it back: passes in several threads, or in one another, do not share.

    def _borrow(self, length: int) -> Rows:
        """Return scratch memory that nobody holds; its contents are what was written last, or zero."""
        try:
            return self._scratch.setdefault(length, []).pop()
        except IndexError:
            return Rows(length, self.real)

    def _return(self, rows: Rows) -> None:
        self._scratch[len(rows.array)].append(rows)

    def _borrow_kept(self, length: int) -> Rows:
        """Return a buffer of at least that length, for a forward pass that is about to write to it."""
        fitting = sorted((rows for rows in list(self._idle) if len(rows.array) >= length), key=lambda r: len(r.array))
        rows = next((rows for rows in fitting if self._pick(rows)), None) or Rows(length, self.real)
        rows.writes += 1
        return rows

    def _set_aside(self, rows: Rows) -> None:
        """Put a buffer back for later passes; where too many wait, those that have waited longest go."""
        self._idle.append(rows)
        waiting = list(self._idle)
        while sum(len(rows.array) for rows in waiting) * self._packed.strides[0] > KEPT_BYTES:
            self._pick(waiting.pop(0))

    def _pick(self, rows: Rows) -> bool:
        """Take a buffer off the list of those that wait; return whether it was still there."""
        try:
            self._idle.remove(rows)
        except ValueError:
            return False
        return True

    def _take(self, kept: Any) -> Rows | None:
        """Return the rows of a forward pass, or None if there are none or another pass has had their buffer."""
        if not isinstance(kept, Kept) or kept.network is not self:
            return None
        if kept.owned:
            kept.owned = False
            return kept.rows
        if not self._pick(kept.rows):
            return None
        if kept.rows.writes != kept.write:
            self._idle.append(kept.rows)
            return None
        return kept.rows


def address_array(rows: Sequence[Sequence[int]]) -> wp.array:
    """Return addresses as the kernels take them, shape (rows, addresses); the caller keeps the memory there alive."""
    return wp.array(np.array(rows, dtype=np.uint64), dtype=wp.uint64, device="cpu")


def _launch(kernel: wp.Kernel, dim: int, inputs: Sequence[Any], record: bool) -> Any:
    return wp.launch(kernel, dim=dim, inputs=inputs, device="cpu", record_tape=False, record_cmd=record)
