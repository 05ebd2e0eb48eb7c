"""How a block of threads goes about a `Program`: threads, the parts of a sum, and where numbers stand."""

import re
from typing import Any

import warp as wp

from warp_phys.programs.operations import OPERATIONS
from warp_phys.programs.program import Dense, Node, Program

TILES = (1, 4, 8)
"""Samples for which a block has room; they share a weight once it is loaded."""

SAMPLES = TILES[-1]
"""Most samples of a block."""

THREADS = 256
"""Most threads of a block."""

PART = 8
"""Fewest multiply-adds for which another thread is worth its while."""

SHARED_BYTES = 46 * 1024
"""Most memory of a multiprocessor for a block's numbers; 48 KB are there, of which Warp takes a little."""


def with_slopes_told(program: Program) -> Program:
    """Return a program with its dense nodes apart from those activations whose slopes are not told by their values."""
    nodes, number = list[Node](), dict[int, int]()
    for i, node in enumerate(program.nodes):
        moved = node._replace(inputs=tuple(number[j] for j in node.inputs))
        activation = Dense(*node.numbers).activation if node.operation == "dense" else "identity"
        if activation != "identity" and re.search(r"\ba\b", OPERATIONS[activation].adjoints[0]):
            dense: Any = Dense(*node.numbers)
            nodes.append(moved._replace(numbers=tuple(dense._replace(activation="identity"))))
            moved = Node(activation, (len(nodes) - 1,), node.size, (1.0,) if activation == "elu" else ())
        number[i] = len(nodes)
        nodes.append(moved)
    return Program(tuple(nodes), program.slots)


def tile_of(samples: int) -> int:
    """Return the samples for which a block has room that shall have so many."""
    return next(tile for tile in TILES if samples <= tile)


def thread_count(program: Program) -> int:
    """Return the number of threads of a block: two per output of the widest layer, in whole warps."""
    widest = max(node.size * (2 if node.operation == "dense" else 1) for node in program.nodes)
    return max(64, min(THREADS, -(-widest // 32) * 32))


def part_count(program: Program, sums: int, length: int) -> int:
    """Return the number of threads that share each of some sums of so many products."""
    parts = 1
    while 2 * parts * sums <= thread_count(program) and 2 * parts * PART <= length:
        parts *= 2
    return min(parts, 32)


def layer_parts(program: Program, i: int) -> tuple[int, int]:
    """Return the number of threads that share a sum of the dense node i, and one of its way back."""
    dense, node = Dense(*program.nodes[i].numbers), program.nodes[i]
    return part_count(program, node.size, dense.window), part_count(program, _inputs(dense), dense.outputs)


def places(program: Program) -> tuple[int, ...]:
    """Return where the nodes, and last the sums of parts, start in a block's memory.

    They are counted in numbers of a sample, and are multiples of 4.
    """
    starts = [0]
    for node in program.nodes:
        starts.append(starts[-1] + -(-node.size // 4) * 4)
    return tuple(starts)


def block_numbers(program: Program, back: bool = False) -> int:
    """Return the numbers of a sample that a block holds, all nodes and the sums of parts, there or on the way back."""
    most = 0
    for i, node in enumerate(program.nodes):
        if node.operation == "dense":
            parts, sums = layer_parts(program, i)[back], _inputs(Dense(*node.numbers)) if back else node.size
            most = max(most, parts * sums if parts > 1 else 0)
    return places(program)[-1] + -(-most // 4) * 4


def max_numbers(program: Program) -> int:
    """Return the numbers of a sample that there and back need: rows have one length either way."""
    return max(block_numbers(program, back) for back in (False, True))


def weight_starts(program: Program) -> tuple[int, ...]:
    """Return where each reader's numbers start in the packed weights; the last entry is their length."""
    starts = [0]
    for i in program.readers:
        node, size = program.nodes[i], program.nodes[i].size
        if node.operation == "dense":
            dense = Dense(*node.numbers)
            size = dense.outputs * (1 + 2 * dense.window)
        starts.append(starts[-1] + size)
    return tuple(starts)


def is_shared(program: Program, real: type, tile: int) -> bool:
    """Whether a block's numbers stand in the memory of its multiprocessor on CUDA; else it needs some of its own."""
    return tile * block_numbers(program) * wp.types.type_size_in_bytes(real) <= SHARED_BYTES


def _inputs(dense: Dense) -> int:
    """Return how many numbers of its input a dense node takes."""
    return (dense.positions - 1) * dense.stride + dense.window
