"""Small networks on CUDA, whole unrollings at a time: the host side of `block_kernels`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.arrays import aligned_zeros, for_all_streams
from warp_phys.programs import block_kernels as kernels
from warp_phys.programs import block_plan
from warp_phys.programs.plan import Plan, plan_of
from warp_phys.programs.program import Program


class BlockNetwork:
    """A chain of layers, and the memory of its weights on a device.

    Args:
        program: The layers: dense nodes, one after the other.
        real: wp.float32 or wp.float64.
        device: A CUDA device; the CPU will do, slowly.
    """

    def __init__(self, program: Program | Plan, real: type, device: Any):
        self.program, self.plan = program, program if isinstance(program, Plan) else plan_of(program)
        self.real, self.device = real, wp.get_device(device)
        self.threads = block_plan.thread_count(self.plan)
        self._addresses: dict[tuple[int, ...], wp.array] = {}  # for good: a captured graph reads them
        self._arrays: dict[tuple[Any, str, int], wp.array] = {}

    def samples(self, batch: int) -> int:
        """Return the number of samples of a block: one as long as there is a multiprocessor for each."""
        return min(block_plan.SAMPLES, -(-batch // max(1, self.device.sm_count)))

    def unroll(
        self,
        weights: Sequence[int],
        system: Any,
        states: wp.array,
        controls: wp.array,
        parameters: wp.array,
        kept: wp.array | None = None,
        samples: int | None = None,
    ) -> None:
        """Write states[1:] and controls from states[0].

        Args:
            weights: Addresses of weights and biases in turn, in contiguous memory of the device, or 0.
            system: The system.
            states: Shape (steps + 1, batch, D).
            controls: Shape (steps, batch, K).
            parameters: Physical parameters, a struct array of length 1 or batch.
            kept: Where the activations of the hidden layers go, if they are wanted: see `block_kernels.unroll_kernel`.
            samples: Samples of a block; None chooses.
        """
        packed = self._array("packed", block_plan.weight_starts(self.plan)[-1])
        kernel: Any = kernels.pack_kernel(self.plan, self.real)
        inputs: list[Any] = [self._address_array(tuple(weights))]
        wp.launch(kernel, len(packed), inputs, [packed], device=self.device, record_tape=False)
        samples = samples or self.samples(states.shape[1])
        blocks = -(-states.shape[1] // samples)
        shared = self.device.is_cuda and block_plan.is_shared(self.plan, self.real)
        memory = self._array("memory", 0 if shared else blocks * block_plan.block_numbers(self.plan))
        outputs = [controls, self._array("nothing", 0) if kept is None else kept]
        kernel, inputs = kernels.unroll_kernel(system.structure, self.plan, self.real), [packed, parameters, samples]
        wp.launch_tiled(
            kernel, dim=[blocks], block_dim=self.threads, inputs=[*inputs, states, memory], outputs=outputs,
            device=self.device, record_tape=False,
        )  # fmt: skip

    def _address_array(self, weights: tuple[int, ...]) -> wp.array:
        if weights not in self._addresses:
            array = wp.array(np.array(weights, dtype=np.uint64), dtype=wp.uint64, device=self.device)
            self._addresses[weights] = for_all_streams(array)
        return self._addresses[weights]

    def _array(self, name: str, length: int) -> wp.array:
        """Return an array of the current stream's own: work on another one may go on at the same time."""
        stream = self.device.stream.cuda_stream if self.device.is_cuda else None
        key = (stream, name, length)
        if key not in self._arrays:
            self._arrays[key] = aligned_zeros((length,), self.real, self.device)
        return self._arrays[key]
