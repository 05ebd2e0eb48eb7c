"""Kernels of row programs on CUDA, in blocks of threads: a whole unrolling in one launch, many rows there and back.

The threads of a block share out the numbers of every node (`block_code.py`) of a tile of samples, and wait for
one another where they need each other's; in an unrolling one thread per sample then takes the step of the physics, and
all go on to the next time step. A block's numbers stay in the memory of its multiprocessor where they fit. The kernels
run on a CPU too, where `native_kernels` are faster.
"""

import functools
from importlib.resources import files
from typing import Any

import warp as wp

from warp_phys.core.kernels import state_row
from warp_phys.core.rows import row_functions, scalar_name
from warp_phys.programs import block_code
from warp_phys.programs.block_plan import SAMPLES, block_numbers, is_shared, max_numbers, places, thread_count
from warp_phys.programs.program import Program

HEADERS = ("scalars.h", "rows.h", "blocks.h")
"""The C++ that stands in front of the kernels' own."""


@functools.cache
def module_options() -> dict[str, Any]:
    """Put the C++ of the folder `native` in front of a module's own code, on either kind of device."""
    folder = files("warp_phys.programs").joinpath("native")
    source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in HEADERS)
    options = wp.ModuleBuildOptions(extra_cuda_preamble=source, extra_cpu_preamble=source)
    return {"extra_build_options": options, "enable_backward": False}


def _options(program: Program) -> dict[str, Any]:
    """Return the options of a kernel whose blocks wait for their threads.

    Barriers are safe: without a grid-stride loop a thread has one index, and no thread of a block leaves early, since
    the launch's size is a multiple of the block's; what decides between the barriers is the same for a whole block.
    """
    options = {"module": "unique", "module_options": module_options(), "grid_stride": False}
    return {**options, "launch_bounds": thread_count(program)}


@wp.func_native("warp_phys::barrier();")
def _barrier(): ...


@functools.cache
def pack_kernel(program: Program, real: type) -> wp.Kernel:
    """Write what is read of tensors, given by their addresses in turn, as native/blocks.h has it; a thread per number.

    A bias at address 0 is zero.
    """

    @wp.func_native("\n".join(block_code.pack_lines(program, scalar_name(real))))
    def pack(addresses: wp.array[wp.uint64], packed: wp.array[real], i: int): ...

    @wp.kernel(module="unique", module_options=module_options())
    def pack_numbers(
        # in
        addresses: wp.array[wp.uint64],
        # out
        packed: wp.array[real],
    ):
        pack(addresses, packed, wp.tid())

    return pack_numbers


def _memory(program: Program, real: type, tile: int) -> str:
    """Return C++ for the memory of a block of an unrolling."""
    size = tile * block_numbers(program)
    shared = size if is_shared(program, real, tile) else 0
    return f"block_memory<{scalar_name(real)}, {shared}>(memory.data + (long long)block * {size})"


def _evaluate(program: Program, real: type, tile: int, memory: str) -> Any:
    """Return the function that evaluates a block's tile, whose input is in its memory, and waits for all threads."""

    @wp.func_native("\n".join(block_code.evaluate_lines(program, scalar_name(real), tile, memory)))
    def evaluate(packed: wp.array[real], memory: wp.array[real], block: int, thread: int, threads: int): ...

    return evaluate


@functools.cache
def _physics(structure: Any, program: Program, real: type, tile: int) -> tuple[Any, Any]:
    """Return functions of one sample of a block: `begin` reads its initial state, `advance` takes a time step."""
    types, step = structure.types(real), structure.functions(real).step
    State, Control, Parameters = types.State, types.Control, types.Parameters
    x_row, c_row = state_row(structure, real), row_functions(structure.control_size, real)
    load_x, store_x, store_c = x_row.load_at, x_row.store_at, c_row.store_at
    out = places(program)[len(program.nodes) - 1]
    number = f"(warp_phys::{_memory(program, real, tile)})[k * {tile} + s]"

    @wp.func_native(f"return {number};")
    def get(memory: wp.array[real], block: int, k: int, s: int) -> real: ...

    @wp.func_native(f"{number} = value;")
    def put(memory: wp.array[real], block: int, k: int, s: int, value: real): ...

    @wp.func
    def get_state(memory: wp.array[real], block: int, s: int):
        x = State()
        for k in range(wp.static(structure.state_size)):
            x[k] = get(memory, block, k, s)
        return x

    @wp.func
    def put_state(memory: wp.array[real], block: int, s: int, x: State):
        for k in range(wp.static(structure.state_size)):
            put(memory, block, k, s, x[k])

    @wp.func
    def get_control(memory: wp.array[real], block: int, s: int):
        c = Control()
        for k in range(wp.static(structure.control_size)):
            c[k] = get(memory, block, wp.static(out) + k, s)
        return c

    @wp.func
    def begin(states: wp.array3d[real], memory: wp.array[real], block: int, s: int, b: int):
        put_state(memory, block, s, load_x(states, 0, b))

    @wp.func
    def advance(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], memory: wp.array[real],
        block: int, s: int, n: int, b: int,
    ):  # fmt: skip
        c = get_control(memory, block, s)
        x = step(get_state(memory, block, s), c, p[b % p.shape[0]])
        store_c(controls, n, b, c)
        store_x(states, n + 1, b, x)
        if wp.static(structure.written_size < structure.state_size):
            x = load_x(states, n + 1, b)
        put_state(memory, block, s, x)

    return begin, advance


@functools.cache
def unroll_kernel(structure: Any, program: Program, real: type, tile: int) -> wp.Kernel:
    """The whole forward unrolling, program and physics, all steps; launched as blocks × threads of a block."""
    Parameters = structure.types(real).Parameters
    evaluate = _evaluate(program, real, tile, _memory(program, real, tile))
    begin, advance = _physics(structure, program, real, tile)

    @wp.kernel(**_options(program))
    def unroll_blocks(
        # in; samples of a block, at most `tile`
        packed: wp.array[real],
        p: wp.array[Parameters],
        samples: int,
        # in and out: time step 0 is read, the others are written
        states: wp.array3d[real],
        # scratch: `tile` times the numbers of a sample per block, on CUDA only if they are not `is_shared`
        memory: wp.array[real],
        # out
        controls: wp.array3d[real],
    ):
        block, thread = wp.tid()
        first = block * samples
        count = wp.min(samples, states.shape[1] - first)
        for s in range(thread, count, wp.block_dim()):
            begin(states, memory, block, s, first + s)
        _barrier()
        for n in range(controls.shape[0]):
            evaluate(packed, memory, block, thread, wp.block_dim())
            for s in range(thread, count, wp.block_dim()):
                advance(states, controls, p, memory, block, s, n, first + s)
            _barrier()

    return unroll_blocks


@functools.cache
def evaluate_kernel(program: Program, real: type) -> wp.Kernel:
    """All nodes of many rows; a block per `SAMPLES` rows, whose nodes stand together."""
    tile, size = SAMPLES, SAMPLES * max_numbers(program)
    evaluate = _evaluate(program, real, tile, f"memory.data + (long long)block * {size}")

    @wp.kernel(**_options(program))
    def evaluate_blocks(
        # in
        packed: wp.array[real],
        x: wp.array2d[real],
        # out
        rows: wp.array[real],
    ):
        block, thread = wp.tid()
        for i in range(thread, wp.static(program.inputs * tile), wp.block_dim()):
            row = wp.min(block * tile + i % tile, x.shape[0] - 1)
            rows[block * size + i] = x[row, i // tile]
        _barrier()
        evaluate(packed, rows, block, thread, wp.block_dim())

    return evaluate_blocks


@functools.cache
def pull_kernel(program: Program, real: type) -> wp.Kernel:
    """Adjoints of all nodes of many rows that `evaluate_kernel` has evaluated, from those of the output."""
    tile, at = SAMPLES, places(program)
    size, out = tile * max_numbers(program), tile * at[len(program.nodes) - 1]

    @wp.func_native("\n".join(block_code.pull_lines(program, scalar_name(real), tile)))
    def pull(
        packed: wp.array[real], rows: wp.array[real], deltas: wp.array[real], block: int, thread: int, threads: int
    ): ...

    @wp.kernel(**_options(program))
    def pull_blocks(
        # in; if `unit` is not negative, the adjoint is the unit vector of that number, whatever mu is
        packed: wp.array[real],
        rows: wp.array[real],
        mu: wp.array2d[real],
        unit: int,
        # out: adjoints of all nodes, and of the input once more; no rows of these where they are not wanted
        deltas: wp.array[real],
        adj_x: wp.array2d[real],
    ):
        block, thread = wp.tid()
        for i in range(thread, wp.static(size), wp.block_dim()):
            deltas[block * size + i] = real(0.0)
        _barrier()
        for i in range(thread, wp.static(program.outputs * tile), wp.block_dim()):
            row = block * tile + i % tile
            k = i // tile
            if unit >= 0:
                deltas[block * size + out + i] = wp.where(k == unit, real(1.0), real(0.0))
            elif row < mu.shape[0]:
                deltas[block * size + out + i] = mu[row, k]
        _barrier()
        pull(packed, rows, deltas, block, thread, wp.block_dim())
        for i in range(thread, wp.static(program.inputs * tile), wp.block_dim()):
            row = block * tile + i % tile
            if row < adj_x.shape[0]:
                adj_x[row, i // tile] = deltas[block * size + i]

    return pull_blocks


@functools.cache
def contract_kernel(program: Program, real: type) -> wp.Kernel:
    """Gradients of what one reader reads, summed over rows in an order that is always the same.

    They are added to a flat array of gradients, at the offset of each tensor of `Program.read`; −1 where it has none.
    """
    shared = block_code.NUMBERS * block_code.PARTS
    memory = f"block_memory<{scalar_name(real)}, {shared}>(memory.data + block * {shared})"

    @wp.func_native("\n".join(block_code.contract_lines(program, scalar_name(real), SAMPLES, memory)))
    def contract(
        rows: wp.array[real], deltas: wp.array[real], count: int, offsets: wp.array[wp.int64], reader: int,
        memory: wp.array[real], gradient: wp.array[real], block: int, thread: int, threads: int,
    ): ...  # fmt: skip

    @wp.kernel(module="unique", module_options=module_options(), launch_bounds=shared, grid_stride=False)
    def contract_blocks(
        # in
        rows: wp.array[real],
        deltas: wp.array[real],
        count: int,
        offsets: wp.array[wp.int64],
        reader: int,
        # scratch, on a CPU
        memory: wp.array[real],
        # in and out
        gradient: wp.array[real],
    ):
        block, thread = wp.tid()
        contract(rows, deltas, count, offsets, reader, memory, gradient, block, thread, wp.block_dim())

    return contract_blocks
