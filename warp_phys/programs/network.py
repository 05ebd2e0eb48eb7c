"""Small networks on a CPU, whole unrollings and whole backward passes at a time: the host side of `native_kernels`."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import warp as wp

from warp_phys.core.arrays import aligned_zeros
from warp_phys.core.flow_gates import are_single
from warp_phys.programs import native_kernels as native
from warp_phys.programs import row_buffers
from warp_phys.programs.layout import layout_of
from warp_phys.programs.program import SAMPLES, Program
from warp_phys.programs.row_buffers import Buffers, Rows

CACHED_BYTES = 2**20
"""Activations that a pass forward leaves in the cache for the pass back."""

WORKER_BLOCKS = 4
"""Fewest blocks of samples for which another thread is worth its while."""


class OwnLoss(NamedTuple):
    """The loss of a system, for `Network.sweep_launches`: differentiated where it is needed, never stored."""

    chosen: wp.array
    """A number for every step 0 … T, not 0 where the pointwise cost counts; int32."""
    cost_weight: float
    """Factor of the cost of a sample at a step."""
    control_weight: float
    """Factor of the square of a control."""


class Sweeps(NamedTuple):
    """What the launches of one backward pass have in common."""

    system: Any
    """The system."""
    trajectory: Any
    """States, controls and physical parameters."""
    loss: Any
    """Its explicit derivatives (`phases.Seeds`), or an `OwnLoss`."""
    gates: wp.array
    """Gates, see `phases.all_gates`."""
    adj_x: wp.array
    """Written: λ_0 per flow, shape (flows, batch, D)."""
    adj_p: wp.array | None = None
    """Written if given: adjoints of the physical parameters, shape (flows, batch, P); for an `OwnLoss` one more, after
    those of the flows, for the derivative of the cost itself."""
    adj_inputs: wp.array | None = None
    """Written if given: adjoints of what is given to every step, shape (flows, steps, batch, E)."""


class Kept:
    """The rows that one forward pass left: its own until a backward pass gives their buffer back."""

    def __init__(self, network: "Network", rows: Rows):
        self.network, self.rows, self.write, self.owned = network, rows, rows.writes, True


class Network:
    """A program, and the memory of its weights.

    Args:
        plan: The program.
        real: wp.float32 or wp.float64.
        threads: Most threads that share a batch; where several do (`WORKER_BLOCKS`), the order of sums depends on it.
    """

    def __init__(self, plan: Program, real: type, threads: int = 1):
        self.plan, self.real, self.threads = plan, real, threads
        self.layout = layout = layout_of(plan)
        self._packed = aligned_zeros((layout.packed[-1],), real, "cpu")
        self._transposed = aligned_zeros((max(1, layout.transposed[-1]),), real, "cpu")
        self._buffers = Buffers(real)
        self._lasting: dict[tuple, wp.array] = {}
        self._deltas = f"deltas of {plan}"
        self._read: tuple[tuple, wp.array, Any] | None = None  # addresses, and if they last; as an array; the launch

    def pack(self, weights: Sequence[int], lasting: bool = False) -> None:
        """Read the weights and biases, given by their addresses in turn; the memory must be the CPU's, contiguous.

        The addresses are kept for the life of the network if they are `lasting`: a captured graph reads them.
        """
        key, read = (tuple(weights), lasting), self._read
        if read is None or read[0] != key:
            addresses = self._addresses([weights], lasting)
            read = self._read = key, addresses, self.pack_launch(addresses)
        read[2].launch()

    def unroll(
        self, system: Any, states: wp.array, controls: wp.array, parameters: wp.array, keep: bool
    ) -> Kept | None:
        """Write states[1:] and controls from states[0], with the weights packed last.

        Returns:
            The activations of all rows if `keep` asks for them and there is room, for `sweep`.
        """
        keep = keep and self.can_keep(controls)
        length = self.row_count(controls, keep)
        rows = self._buffers.borrow_kept(length) if keep else self._buffers.borrow(length)
        run(self.unroll_launches(system, states, controls, parameters, rows.array, keep))
        if keep:
            return Kept(self, rows)
        self._buffers.give_back(rows)
        return None

    def sweep(
        self,
        system: Any,
        trajectory: Any,
        seeds: Any,
        gates: wp.array,
        adj_x: wp.array,
        workspace: Any,
        adj_p: wp.array | None = None,
        adj_inputs: wp.array | None = None,
    ) -> wp.array:
        """Run all flows backward, with the weights packed last.

        Args:
            system: The system.
            trajectory: States, controls and physical parameters (`phases.Trajectory`).
            seeds: The explicit derivatives of the loss (`phases.Seeds`).
            gates: Gates, see `phases.all_gates`.
            adj_x: Written: λ_0 per flow, shape (flows, batch, D).
            workspace: Keeps the scratch arrays.
            adj_p: Written if given: each sample's adjoints of the physical parameters, shape (flows, batch, P).
            adj_inputs: Written if given: adjoints of what is given to every step, shape (flows, steps, batch, E).

        Returns:
            The gradients of the weights in the packed layout, for `unpack`.
        """
        kept = self._take(trajectory.kept)
        rows = kept or self._buffers.borrow(self.scratch_count(trajectory.controls))
        gradients = self.gradients(len(adj_x), trajectory.controls.shape[1], workspace)
        gradients.zero_()
        sweeps = Sweeps(system, trajectory, seeds, gates, adj_x, adj_p, adj_inputs)
        run(self.sweep_launches(sweeps, rows.array, kept is not None, gradients, workspace))
        if kept is None:
            self._buffers.give_back(rows)
        else:
            self._buffers.set_aside(rows)
        return gradients

    def unpack(self, gradients: wp.array, targets: Sequence[Sequence[int]], lasting: bool = False) -> None:
        """Add packed gradients to contiguous memory: per flow the addresses for weights and biases in turn, or 0.

        `lasting`: as in `pack`.
        """
        addresses = self._addresses(targets, lasting)
        for launch in self.unpack_launches(gradients, addresses):
            launch.launch()

    def can_keep(self, controls: wp.array) -> bool:
        """Whether there is room for the activations of all rows of a trajectory."""
        return self.row_count(controls, keep=True) * self._packed.strides[0] <= row_buffers.KEPT_BYTES

    def row_count(self, controls: wp.array, keep: bool) -> int:
        """Return the length of the buffer that an unrolling writes its rows to."""
        steps, batch, _ = controls.shape
        return (steps * batch if keep else SAMPLES * len(self.shares(batch))) * self.layout.row

    def scratch_count(self, controls: wp.array) -> int:
        """Return the length of the buffer in which a backward pass computes activations again."""
        return self.chunk(controls) * SAMPLES * len(self.shares(controls.shape[1])) * self.layout.row

    def chunk(self, controls: wp.array) -> int:
        """Return the number of time steps that a backward pass takes at a time."""
        steps, batch, _ = controls.shape
        return min(steps, max(1, self.layout.chunk // min(batch, SAMPLES)))

    def shares(self, batch: int) -> list[tuple[int, int]]:
        """Return the first sample of every thread's share of a batch, and the one after its last."""
        blocks = -(-batch // SAMPLES)
        workers = max(1, min(self.threads, blocks // WORKER_BLOCKS))
        bounds = [SAMPLES * (i * blocks // workers) for i in range(workers)] + [batch]
        return list(pairwise(bounds))

    def gradients(self, flows: int, batch: int, workspace: Any) -> wp.array:
        """Return the workspace's array for the packed gradients, shape (threads, flows · packed length)."""
        return workspace.array(
            "packed gradients", (len(self.shares(batch)), flows * self.layout.packed[-1]), self.real, "cpu"
        )

    # What follows returns launches to be run, so that they can be kept and run many times.

    def pack_launch(self, addresses: wp.array) -> Any:
        """Return the launch that reads the weights."""
        return _record(native.pack_kernel(self.plan, self.real), 1, [addresses, self._packed, self._transposed])

    def unroll_launches(
        self, system: Any, states: wp.array, controls: wp.array, parameters: wp.array, rows: wp.array, keep: bool
    ) -> list[Any]:
        """Return the launches of the unrolling, one per thread."""
        arrays, shares = (states, controls, parameters), self.shares(controls.shape[1])
        return [
            self._unroll(system, arrays, share, 0, rows if keep else _share(rows, i, len(shares)), keep)
            for i, share in enumerate(shares)
        ]

    def sweep_launches(
        self, sweeps: Sweeps, rows: wp.array, kept: bool, gradients: wp.array, workspace: Any
    ) -> list[Any]:
        """Return the launches of the backward pass, one per thread.

        They add to `gradients`; `rows` holds the activations if they are `kept`.
        """
        shares = self.shares(sweeps.trajectory.controls.shape[1])
        return [
            self._sweep(
                sweeps, share, 0, rows if kept else _share(rows, i, len(shares)), kept, gradients[i], workspace, i
            )
            for i, share in enumerate(shares)
        ]

    def pass_launches(self, sweeps: Sweeps, gradients: wp.array, workspace: Any) -> list[list[Any]]:
        """Return every thread's launches, forward and backward in turns: activations are still in the cache.

        What they compute is what all of `unroll_launches` and then all of `sweep_launches` do.
        """
        system, trajectory = sweeps.system, sweeps.trajectory
        controls = trajectory.controls
        arrays, shares = (trajectory.states, controls, trajectory.parameters), self.shares(controls.shape[1])
        length = len(controls) * SAMPLES * self.layout.row
        bytes_of_block = length * self._packed.strides[0]
        keep = bytes_of_block * len(shares) <= row_buffers.KEPT_BYTES
        samples = SAMPLES * max(1, CACHED_BYTES // bytes_of_block) if keep else controls.shape[1]
        length = length * (samples // SAMPLES) if keep else self.chunk(controls) * SAMPLES * self.layout.row
        sequences = []
        for i, (begin, end) in enumerate(shares):
            rows = workspace.array(f"rows of a thread, {i}", (length,), self.real, "cpu")
            sequence = []
            for first in range(begin, end, samples):
                part = first, min(first + samples, end)
                sequence.append(self._unroll(system, arrays, part, first, rows, keep))
                sequence.append(self._sweep(sweeps, part, first, rows, keep, gradients[i], workspace, i))
            sequences.append(sequence)
        return sequences

    def _unroll(
        self, system: Any, arrays: tuple[wp.array, ...], share: tuple[int, int], origin: int, rows: wp.array, keep: bool
    ) -> Any:
        """Return the launch that unrolls a share of the batch; the rows begin with those of sample `origin`."""
        kernel, (begin, end) = native.unroll_kernel(system.structure, self.plan, self.real), share
        states, controls, parameters = arrays
        inputs = [self._packed, parameters, begin, origin, int(keep), states, controls, rows]
        return _record(kernel, -(-(end - begin) // SAMPLES), inputs)

    def _sweep(
        self,
        sweeps: Sweeps,
        share: tuple[int, int],
        origin: int,
        rows: wp.array,
        kept: bool,
        gradients: wp.array,
        workspace: Any,
        thread: int,
    ) -> Any:
        """Return the launch that takes a share of the batch backward; each thread has scratch arrays of its own."""
        system, trajectory, loss, gates, adj_x, adj_p, adj_inputs = sweeps
        flows, chunk, plan, real = len(adj_x), self.chunk(trajectory.controls), self.plan, self.real
        nothing = workspace.array("nothing", (0, 0, 0), real, "cpu")
        none_given = workspace.array("no adj_inputs", (0, 0, 0, 0), real, "cpu")
        if isinstance(loss, OwnLoss):
            derivatives = [nothing, nothing, *loss]
        else:
            none_chosen = workspace.array("none chosen", (0,), wp.int32, "cpu")
            derivatives = [loss.states, loss.controls, none_chosen, 0.0, 0.0]
        deltas = workspace.array(f"{self._deltas}, {thread}", (flows * chunk * SAMPLES * self.layout.row,), real, "cpu")
        adj_c = workspace.array(f"adj_c of a block, {thread}", (flows, SAMPLES, plan.outputs), real, "cpu")
        seeds = workspace.array(f"seeds of a block, {thread}", (SAMPLES, plan.inputs), real, "cpu")
        inputs = [
            self._packed, self._transposed, trajectory.parameters, trajectory.states, trajectory.controls,
            *derivatives, gates, *share, origin, chunk, int(kept), rows, deltas, adj_c, seeds, adj_x,
            nothing if adj_p is None else adj_p, none_given if adj_inputs is None else adj_inputs, gradients,
        ]  # fmt: skip
        kernel = native.sweep_kernel(system.structure, plan, real, adj_p is not None, are_single(gates))
        return _record(kernel, 1, inputs)

    def unpack_launches(self, gradients: wp.array, addresses: wp.array) -> list[Any]:
        """Return the launches of the unpacking, to be run one after the other: the threads' shares are added."""
        kernel = native.unpack_kernel(self.plan, self.real)
        return [
            _record(kernel, len(addresses), [self._packed, self._transposed, addresses, gradients[i]])
            for i in range(len(gradients))
        ]

    def _addresses(self, rows: Sequence[Sequence[int]], lasting: bool) -> wp.array:
        if not lasting:
            return address_array(rows)
        key = tuple(map(tuple, rows))
        if key not in self._lasting:
            self._lasting[key] = address_array(rows)
        return self._lasting[key]

    def _take(self, kept: Any) -> Rows | None:
        """Return the rows of a forward pass of this network, or None; see `Buffers.take`."""
        return self._buffers.take(kept) if isinstance(kept, Kept) and kept.network is self else None


def address_array(rows: Sequence[Sequence[int]] | np.ndarray) -> wp.array:
    """Return addresses as the kernels take them, shape (rows, addresses); the caller keeps the memory there alive."""
    return wp.array(np.array(rows, dtype=np.uint64), dtype=wp.uint64, device="cpu")


def run(launches: Sequence[Any]) -> None:
    """Run launches at the same time, each in a thread of its own; a launch lets other Python threads run."""
    run_sequences([[launch] for launch in launches])


def run_sequences(sequences: Sequence[Sequence[Any]]) -> None:
    """Run sequences of launches at the same time, each in a thread of its own."""
    others = [_pool().submit(_run_in_turn, sequence) for sequence in sequences[1:]]
    _run_in_turn(sequences[0])
    for other in others:
        other.result()


def _run_in_turn(launches: Sequence[Any]) -> None:
    for launch in launches:
        launch.launch()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="warp_phys")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has no threads but its own


def _share(rows: wp.array, i: int, count: int) -> wp.array:
    """Return part i of `count` equal parts."""
    length = len(rows) // count
    return rows[i * length : (i + 1) * length]


def _record(kernel: wp.Kernel, dim: int, inputs: Sequence[Any]) -> Any:
    return wp.launch(kernel, dim=dim, inputs=inputs, device="cpu", record_tape=False, record_cmd=True)
