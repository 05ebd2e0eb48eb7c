"""Small networks on a CPU, whole unrollings and whole backward passes at a time: the host side of `native_kernels`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys import native_kernels as native
from warp_phys.native_kernels import SAMPLES, Plan

KEPT_BYTES = 48 * 2**20
"""Most memory for the activations of a forward pass; a longer one computes them again on its way back."""


class Rows:
    """A buffer for the rows of a trajectory, and a count of the passes that have written to it."""

    def __init__(self, length: int, real: type):
        self.array = wp.zeros(length, dtype=real, device="cpu")
        self.writes = 0
        self.lent = True


class Kept:
    """The rows that one forward pass left, as long as no other pass has taken the buffer."""

    def __init__(self, rows: Rows):
        self.rows, self.write = rows, rows.writes

    @property
    def valid(self) -> bool:
        """Whether the rows are still those of that forward pass."""
        return self.rows.writes == self.write


class Network:
    """A plan, and the memory of its weights.

    Args:
        plan: The layers.
        real: wp.float32 or wp.float64.
    """

    def __init__(self, plan: Plan, real: type):
        self.plan, self.real = plan, real
        self._packed = wp.zeros(plan.packed[-1], dtype=real, device="cpu")
        self._transposed = wp.zeros(max(1, plan.transposed[-1]), dtype=real, device="cpu")
        self._free: dict[int, list[Rows]] = {}
        self._lasting: dict[tuple, wp.array] = {}

    def pack(self, weights: Sequence[int]) -> None:
        """Read the weights and biases, given by their addresses in turn; the memory must be the CPU's, contiguous."""
        inputs, outputs = [self._addresses([weights])], [self._packed, self._transposed]
        wp.launch(native.pack_kernel(self.plan, self.real), 1, inputs, outputs, device="cpu", record_tape=False)

    def unroll(self, system: Any, states: wp.array, controls: wp.array, parameters: wp.array, keep: bool) -> Kept:
        """Write states[1:] and controls from states[0], with the weights packed last.

        Returns:
            The activations of all rows if `keep` asks for them and there is room, for `sweep`; else of the last ones.
        """
        steps, batch, _ = controls.shape
        length = steps * batch * self.plan.row
        keep = keep and length * self._packed.strides[0] <= KEPT_BYTES
        rows = self._borrow(length if keep else SAMPLES * self.plan.row)
        rows.writes += 1
        inputs, outputs = [self._packed, parameters, int(keep), states], [controls, rows.array]
        kernel, threads = native.unroll_kernel(system.structure, self.plan, self.real), -(-batch // SAMPLES)
        wp.launch(kernel, threads, inputs, outputs, device="cpu", record_tape=False)
        kept = Kept(rows)
        if not keep:
            self._return(rows)
            rows.writes += 1
        return kept

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
        plan, real, flows = self.plan, self.real, len(adj_x)
        steps, batch, _ = trajectory.controls.shape
        chunk = min(steps, max(1, plan.chunk // min(batch, SAMPLES)))
        kept = trajectory.kept
        use = isinstance(kept, Kept) and kept.valid
        rows = kept.rows if use else self._borrow(chunk * SAMPLES * plan.row)
        if not use:
            rows.writes += 1
        deltas = workspace.array("deltas", (flows * chunk * SAMPLES * plan.row,), real, "cpu")
        adj_c = workspace.array("adj_c of a block", (flows, SAMPLES, plan.outputs), real, "cpu")
        gradients = workspace.array("packed gradients", (flows * plan.packed[-1],), real, "cpu")
        gradients.zero_()
        kernel = native.sweep_kernel(system.structure, plan, real)
        inputs = [
            self._packed, self._transposed, trajectory.parameters, trajectory.states, trajectory.controls,
            seeds.states, seeds.controls, gates, chunk, int(use), rows.array, deltas, adj_c, adj_x, gradients,
        ]  # fmt: skip
        wp.launch(kernel, 1, inputs, device="cpu", record_tape=False)
        self._return(rows)
        return gradients

    def unpack(self, gradients: wp.array, targets: Sequence[Sequence[int]], lasting: bool = False) -> None:
        """Add packed gradients to contiguous memory: per flow the addresses for weights and biases in turn, or 0.

        The addresses are kept for the life of the network if they are `lasting`: a captured graph reads them.
        """
        inputs = [gradients, self._addresses(targets) if lasting else _address_array(targets)]
        kernel = native.unpack_kernel(self.plan, self.real)
        wp.launch(kernel, len(targets), inputs, device="cpu", record_tape=False)

    def _addresses(self, rows: Sequence[Sequence[int]]) -> wp.array:
        key = tuple(map(tuple, rows))
        if key not in self._lasting:
            self._lasting[key] = _address_array(rows)
        return self._lasting[key]

    def _borrow(self, length: int) -> Rows:
        """Return a buffer that nobody holds; its contents are what was written last, or zero."""
        try:
            rows = self._free.setdefault(length, []).pop()
        except IndexError:
            rows = Rows(length, self.real)
        rows.lent = True
        return rows

    def _return(self, rows: Rows) -> None:
        """Take a buffer back; a second backward pass of one forward pass has nothing to give back."""
        if rows.lent:
            rows.lent = False
            self._free[len(rows.array)].append(rows)


def _address_array(rows: Sequence[Sequence[int]]) -> wp.array:
    return wp.array(np.array(rows, dtype=np.uint64), dtype=wp.uint64, device="cpu")


