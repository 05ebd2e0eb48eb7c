"""Row programs on CUDA, whole unrollings and many rows at a time: the host side of `block_kernels`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.arrays import aligned_zeros, for_all_streams
from warp_phys.programs import block_kernels as kernels
from warp_phys.programs import block_plan
from warp_phys.programs.block_code import NUMBERS, PARTS, contract_blocks
from warp_phys.programs.block_plan import SAMPLES
from warp_phys.programs.program import Program


class BlockNetwork:
    """A program, and the memory of its weights on a device.

    Args:
        program: The program.
        real: wp.float32 or wp.float64.
        device: A CUDA device; the CPU will do, slowly.
    """

    def __init__(self, program: Program, real: type, device: Any):
        self.program, self.real, self.device = program, real, wp.get_device(device)
        self.own = block_plan.with_slopes_told(program)
        """What the kernels run."""
        self.threads = block_plan.thread_count(self.own)
        self._constants: dict[tuple[Any, tuple[int, ...]], wp.array] = {}  # for good: a captured graph reads them
        self._arrays: dict[tuple[Any, str, int], wp.array] = {}

    def samples(self, batch: int) -> int:
        """Return the number of samples of a block: one as long as there is a multiprocessor for each."""
        return min(SAMPLES, -(-batch // max(1, self.device.sm_count)))

    def pack(self, weights: Sequence[int]) -> wp.array:
        """Return what is read of tensors, as the kernels take it.

        Args:
            weights: Addresses of the tensors of `Program.read` in turn, in contiguous memory of the device, or 0.
        """
        packed = self._array("packed", block_plan.weight_starts(self.own)[-1])
        kernel, inputs = kernels.pack_kernel(self.own, self.real), [self.constant(weights, np.uint64)]
        wp.launch(kernel, len(packed), inputs, [packed], device=self.device, record_tape=False)
        return packed

    def unroll(
        self,
        weights: Sequence[int],
        system: Any,
        states: wp.array,
        controls: wp.array,
        parameters: wp.array,
        samples: int | None = None,
    ) -> None:
        """Write states[1:] and controls from states[0].

        Args:
            weights: As in `pack`.
            system: The system.
            states: Shape (steps + 1, batch, D).
            controls: Shape (steps, batch, K).
            parameters: Physical parameters, a struct array of length 1 or batch.
            samples: Samples of a block; None chooses.
        """
        packed, samples = self.pack(weights), samples or self.samples(states.shape[1])
        blocks, tile = -(-states.shape[1] // samples), block_plan.tile_of(samples)
        shared = self.device.is_cuda and block_plan.is_shared(self.own, self.real, tile)
        memory = self._array("memory", 0 if shared else blocks * tile * block_plan.block_numbers(self.own))
        kernel = kernels.unroll_kernel(system.structure, self.own, self.real, tile)
        self.launch(kernel, blocks, [packed, parameters, samples, states, memory], [controls])

    def launch(self, kernel: Any, blocks: int, inputs: list[Any], outputs: list[Any], threads: int = 0) -> None:
        """Launch a kernel in blocks of threads."""
        wp.launch_tiled(
            kernel, dim=[blocks], block_dim=threads or self.threads, inputs=inputs, outputs=outputs,
            device=self.device, record_tape=False,
        )  # fmt: skip

    def constant(self, numbers: Sequence[int], dtype: Any) -> wp.array:
        """Return whole numbers on the device, of a type of numpy's; they are kept for good."""
        key = dtype, tuple(numbers)
        if key not in self._constants:
            self._constants[key] = for_all_streams(wp.array(np.array(key[1], dtype=dtype), device=self.device))
        return self._constants[key]

    def _array(self, name: str, length: int) -> wp.array:
        """Return an array of the current stream's own: work on another one may go on at the same time."""
        stream = self.device.stream.cuda_stream if self.device.is_cuda else None
        key = (stream, name, length)
        if key not in self._arrays:
            self._arrays[key] = aligned_zeros((length,), self.real, self.device)
        return self._arrays[key]


class BlockLinearisation:
    """A program linearised at rows x (N, D): see `phases.Linearisation`.

    Args:
        network: The program.
        weights: Addresses of its tensors, as in `BlockNetwork.pack`.
        offsets: Where the gradient of each tensor of `Program.read` begins in a flat array of gradients; −1 for none.
        x: The rows.
        workspace: Keeps the arrays of all nodes.
    """

    def __init__(
        self, network: BlockNetwork, weights: Sequence[int], offsets: Sequence[int], x: wp.array, workspace: Any
    ):
        self.network, self.offsets, self.count, self.workspace = network, offsets, len(x), workspace
        self.blocks = -(-self.count // SAMPLES)
        self._packed, self._rows = network.pack(weights), self._nodes("values")
        kernel = kernels.evaluate_kernel(network.own, network.real)
        network.launch(kernel, self.blocks, [self._packed, x], [self._rows])

    def jacobian(self, out: wp.array) -> None:
        """Write ∂N/∂x, shape (N, K, D)."""
        for k in range(out.shape[1]):
            self._pull(self._nothing(), k, out[:, k])

    def pull(self, mu: wp.array, adj_x: wp.array) -> None:
        """Write adj_x = (∂N/∂x)ᵀ mu for rows mu (N, K)."""
        self._pull(mu, -1, adj_x)

    def contract(self, mu: wp.array, gradients: Sequence[Any]) -> None:
        """Add Σ (∂N/∂θ)ᵀ mu[f] over the rows of each flow f to the flat array gradients[f]."""
        network = self.network
        kernel = kernels.contract_kernel(network.own, network.real)
        offsets, threads = network.constant(self.offsets, np.int64), NUMBERS * PARTS
        for f, gradient in enumerate(gradients):
            deltas = self._pull(mu[f], -1, self._nothing())
            for reader, blocks in contract_blocks(network.own, self.offsets):
                size = 0 if network.device.is_cuda else blocks * threads
                memory = self.workspace.array("parts of sums", (size,), network.real, network.device)
                inputs = [self._rows, deltas, self.count, offsets, reader, memory]
                network.launch(kernel, blocks, inputs, [gradient], threads)

    def _pull(self, mu: wp.array, unit: int, adj_x: wp.array) -> wp.array:
        """Return the adjoints of all nodes."""
        deltas, network = self._nodes("adjoints"), self.network
        kernel = kernels.pull_kernel(network.own, network.real)
        network.launch(kernel, self.blocks, [self._packed, self._rows, mu, unit], [deltas, adj_x])
        return deltas

    def _nodes(self, name: str) -> wp.array:
        """Return room for a number, or an adjoint, of all nodes."""
        size = self.blocks * SAMPLES * block_plan.max_numbers(self.network.own)
        return self.workspace.array(f"{name} at {self.count} rows", (size,), self.network.real, self.network.device)

    def _nothing(self) -> wp.array:
        return self.workspace.array("nothing", (0, 0), self.network.real, self.network.device)
