"""How a block of threads goes about a `Plan`: threads, the parts of a sum, and where numbers stand."""

import warp as wp

from warp_phys.programs.plan import Plan

TILES = (1, 4, 8)
"""Samples for which a block has room; they share a weight once it is loaded."""

SAMPLES = TILES[-1]
"""Most samples of a block."""

THREADS = 256
"""Most threads of a block."""

PART = 8
"""Fewest multiply-adds for which another thread is worth its while."""

SHARED_BYTES = 46 * 1024
"""Most memory of a multiprocessor for a block's activations; 48 KB are there, of which Warp takes a little."""


def thread_count(plan: Plan) -> int:
    """Return the number of threads of a block: two per output of the widest layer, in whole warps."""
    widest = max(layer.positions * layer.outputs for layer in plan.layers)
    return max(64, min(THREADS, -(-2 * widest // 32) * 32))


def part_count(plan: Plan, i: int) -> int:
    """Return the number of threads that share the sum of an output of layer i."""
    layer, parts = plan.layers[i], 1
    while 2 * parts * layer.positions * layer.outputs <= thread_count(plan) and 2 * parts * PART <= layer.window:
        parts *= 2
    return min(parts, 32)


def places(plan: Plan) -> tuple[int, ...]:
    """Return where the levels, input first, and then the sums of parts start in a block's memory, and the end.

    They are counted in numbers of a sample, and are multiples of 4.
    """
    sizes, partial = [plan.inputs], [0]
    for i, layer in enumerate(plan.layers):
        outputs, parts = layer.positions * layer.outputs, part_count(plan, i)
        sizes.append(outputs)
        partial.append(outputs * parts if parts > 1 else 0)
    starts = [0]
    for size in (*sizes, max(partial)):
        starts.append(starts[-1] + -(-size // 4) * 4)
    return tuple(starts)


def weight_starts(plan: Plan) -> tuple[int, ...]:
    """Return where each layer starts in the packed weights; the last entry is their length."""
    starts = [0]
    for layer in plan.layers:
        starts.append(starts[-1] + layer.outputs * (1 + layer.window))
    return tuple(starts)


def kept_starts(plan: Plan) -> tuple[int, ...]:
    """Return where each hidden layer starts among the activations kept of one row; the last entry is their length."""
    starts = [0]
    for layer in plan.layers[:-1]:
        starts.append(starts[-1] + layer.positions * layer.outputs)
    return tuple(starts)


def block_numbers(plan: Plan) -> int:
    """Return the numbers that a block holds: all levels of `SAMPLES` samples, and the sums of parts."""
    return SAMPLES * places(plan)[-1]


def is_shared(plan: Plan, real: type) -> bool:
    """Whether a block's numbers stand in the memory of its multiprocessor on CUDA; else it needs some of its own."""
    return block_numbers(plan) * wp.types.type_size_in_bytes(real) <= SHARED_BYTES
