"""Kernels of small networks on CUDA: a whole unrolling in one launch, a block of threads per few samples.

The threads of a block share out the outputs of a layer (`native/blocks.h`), wait for one another, go on to the next
layer; then one thread per sample takes the step of the physics, and all go on to the next time step. A block's
activations stay in the memory of its multiprocessor where they fit. The kernels run on a CPU too, one thread a block,
where `native_kernels` are faster.
"""

import functools
from importlib.resources import files
from typing import Any

import warp as wp

from warp_phys.core.rows import row_functions, scalar_name
from warp_phys.programs.activations import activation
from warp_phys.programs.block_plan import (
    SAMPLES,
    TILES,
    block_numbers,
    is_shared,
    kept_starts,
    part_count,
    places,
    thread_count,
    weight_starts,
)
from warp_phys.programs.plan import Plan


@functools.cache
def module_options() -> dict[str, Any]:
    """Put the C++ of `native/blocks.h` in front of a module's own code, on either kind of device."""
    source = files("warp_phys.programs").joinpath("native").joinpath("blocks.h").read_text(encoding="utf-8")
    options = wp.ModuleBuildOptions(extra_cuda_preamble=source, extra_cpu_preamble=source)
    return {"extra_build_options": options, "enable_backward": False}


@functools.cache
def pack_kernel(plan: Plan, real: type) -> wp.Kernel:
    """Write weights and biases, given by their addresses in turn, as native/blocks.h has them; a thread per number.

    A bias at address 0 is zero.
    """
    scalar, starts, lines = scalar_name(real), weight_starts(plan), []
    for i, layer in enumerate(plan.layers):
        order = f"k % {layer.channels} * {layer.window // layer.channels} + k / {layer.channels}"
        lines += [
            f"if (i < {starts[i + 1]}) {{",
            f"const {scalar}* w = (const {scalar}*)addresses.data[{2 * i}];",
            f"const {scalar}* b = (const {scalar}*)addresses.data[{2 * i + 1}];",
            f"const int o = (i - {starts[i]}) % {layer.outputs}, k = (i - {starts[i]}) / {layer.outputs} - 1;",
            f"packed.data[i] = k >= 0 ? w[o * {layer.window} + {order}] : b ? b[o] : 0;",
            "} else",
        ]
    lines.append("{}")

    @wp.func_native("\n".join(lines))
    def pack(addresses: wp.array[wp.uint64], packed: wp.array[real], i: int): ...

    @wp.kernel(module="unique", module_options=module_options())
    def pack_layers(
        # in
        addresses: wp.array[wp.uint64],
        # out
        packed: wp.array[real],
    ):
        pack(addresses, packed, wp.tid())

    return pack_layers


@wp.func_native("warp_phys::barrier();")
def _barrier(): ...


def _memory(plan: Plan, real: type) -> str:
    """Return C++ for the memory of a block."""
    size = block_numbers(plan)
    shared, own = size if is_shared(plan, real) else 0, f"memory.data + (long long)block * {size}"
    return f"warp_phys::block_memory<{scalar_name(real)}, {shared}>({own})"


@functools.cache
def _layer(plan: Plan, real: type, tile: int, i: int) -> Any:
    """Return the function that evaluates layer i for all samples of a block, and keeps what it finds."""
    layer, act, parts = plan.layers[i], activation(plan.layers[i].activation, real).value, part_count(plan, i)
    at, weights, memory = places(plan), weight_starts(plan)[i], _memory(plan, real)
    outputs, start = layer.positions * layer.outputs, kept_starts(plan)[i]
    name = f"warp_phys::BlockLayer<{scalar_name(real)}, {tile}, {', '.join(map(str, layer[:4]))}, {parts}>"
    hidden, Tile = i < len(plan.layers) - 1, wp.types.vector(length=tile, dtype=real)

    @wp.func_native(f"return {name}::sums({memory} + {at[i] * tile}, packed.data + {weights}, item);")
    def sums(packed: wp.array[real], memory: wp.array[real], block: int, item: int) -> Tile: ...

    @wp.func_native(f"warp_phys::put({memory} + {at[-2] * tile}, item, value);")
    def put_part(memory: wp.array[real], block: int, item: int, value: Tile): ...

    @wp.func_native(f"return {name}::total({memory} + {at[-2] * tile}, item);")
    def total(memory: wp.array[real], block: int, item: int) -> Tile: ...

    @wp.func_native(f"warp_phys::put({memory} + {at[i + 1] * tile}, item, value);")
    def put(memory: wp.array[real], block: int, item: int, value: Tile): ...

    @wp.func_native(f"""
        auto* to = kept.data + (long long)rows * {start} + (long long)first * {outputs} + item;
        for (int s = 0; s < {tile}; ++s) if (s < count) to[s * {outputs}] = value[s];
    """)
    def keep(kept: wp.array[real], rows: int, first: int, count: int, item: int, value: Tile): ...

    @wp.func
    def finish(
        z: Tile, memory: wp.array[real], kept: wp.array[real], block: int, rows: int, first: int, count: int, item: int
    ):
        y = Tile()
        for s in range(wp.static(tile)):
            y[s] = act(z[s])
        put(memory, block, item, y)
        if wp.static(hidden):
            if kept.shape[0] > 0:
                keep(kept, rows, first, count, item, y)

    @wp.func
    def evaluate(
        packed: wp.array[real], memory: wp.array[real], kept: wp.array[real], block: int, thread: int, rows: int,
        first: int, count: int,
    ):  # fmt: skip
        threads = wp.block_dim()
        if wp.static(parts > 1):
            for item in range(thread, wp.static(outputs * parts), threads):
                put_part(memory, block, item, sums(packed, memory, block, item))
            _barrier()
            for item in range(thread, wp.static(outputs), threads):
                finish(total(memory, block, item), memory, kept, block, rows, first, count, item)
        else:
            for item in range(thread, wp.static(outputs), threads):
                finish(sums(packed, memory, block, item), memory, kept, block, rows, first, count, item)
        _barrier()

    return evaluate


@functools.cache
def _network(plan: Plan, real: type, tile: int, depth: int) -> Any:
    """Return the function that evaluates the first `depth` layers."""
    last = _layer(plan, real, tile, depth - 1)
    if depth == 1:
        return last
    before = _network(plan, real, tile, depth - 1)

    @wp.func
    def network(
        packed: wp.array[real], memory: wp.array[real], kept: wp.array[real], block: int, thread: int, rows: int,
        first: int, count: int,
    ):  # fmt: skip
        before(packed, memory, kept, block, thread, rows, first, count)
        last(packed, memory, kept, block, thread, rows, first, count)

    return network


@functools.cache
def _physics(structure: Any, plan: Plan, real: type) -> tuple[Any, Any]:
    """Return functions of one sample of a block: `begin` reads its initial state, `advance` takes a time step."""
    types, step = structure.types(real), structure.functions(real).step
    State, Control, Parameters = types.State, types.Control, types.Parameters
    x_row, c_row = row_functions(structure.state_size, real), row_functions(structure.control_size, real)
    load_x, store_x, store_c = x_row.load_at, x_row.store_at, c_row.store_at
    inputs, channels, out = plan.inputs, plan.channels, places(plan)[-3]
    number = f"({_memory(plan, real)})[k * tile + s]"

    @wp.func_native(f"return {number};")
    def get(memory: wp.array[real], block: int, tile: int, k: int, s: int) -> real: ...

    @wp.func_native(f"{number} = value;")
    def put(memory: wp.array[real], block: int, tile: int, k: int, s: int, value: real): ...

    @wp.func
    def get_state(memory: wp.array[real], block: int, tile: int, s: int):
        x = State()
        for k in range(wp.static(inputs)):
            x[k % wp.static(channels) * wp.static(inputs // channels) + k // wp.static(channels)] = get(
                memory, block, tile, k, s
            )
        return x

    @wp.func
    def put_state(memory: wp.array[real], block: int, tile: int, s: int, x: State):
        for k in range(wp.static(inputs)):
            i = k % wp.static(channels) * wp.static(inputs // channels) + k // wp.static(channels)
            put(memory, block, tile, k, s, x[i])

    @wp.func
    def get_control(memory: wp.array[real], block: int, tile: int, s: int):
        c = Control()
        for k in range(wp.static(structure.control_size)):
            c[k] = get(memory, block, tile, wp.static(out) + k, s)
        return c

    @wp.func
    def begin(states: wp.array3d[real], memory: wp.array[real], block: int, tile: int, s: int, b: int):
        put_state(memory, block, tile, s, load_x(states, 0, b))

    @wp.func
    def advance(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], memory: wp.array[real],
        block: int, tile: int, s: int, n: int, b: int,
    ):  # fmt: skip
        c = get_control(memory, block, tile, s)
        x = step(get_state(memory, block, tile, s), c, p[b % p.shape[0]])
        put_state(memory, block, tile, s, x)
        store_c(controls, n, b, c)
        store_x(states, n + 1, b, x)

    return begin, advance


@functools.cache
def unroll_kernel(structure: Any, plan: Plan, real: type) -> wp.Kernel:
    """The whole forward unrolling, network and physics, all steps; launched as blocks × threads of a block.

    The activations of the hidden layers are kept where there is an array for them: a matrix (steps · batch, outputs)
    per layer, one after the other (`kept_starts`).

    Barriers are safe: without a grid-stride loop a thread has one index, and no thread of a block leaves early, since
    the launch's size is a multiple of the block's; what decides between the barriers is the same for a whole block.
    """
    Parameters, depth = structure.types(real).Parameters, len(plan.layers)
    one, few, many = (_network(plan, real, tile, depth) for tile in TILES)
    begin, advance = _physics(structure, plan, real)

    @wp.kernel(module="unique", module_options=module_options(), launch_bounds=thread_count(plan), grid_stride=False)
    def unroll_blocks(
        # in; samples of a block, at most `block_plan.SAMPLES`
        packed: wp.array[real],
        p: wp.array[Parameters],
        samples: int,
        # in and out: time step 0 is read, the others are written
        states: wp.array3d[real],
        # scratch: `block_numbers` per block, on CUDA only if they are not `is_shared`
        memory: wp.array[real],
        # out; kept of length 0 is not written
        controls: wp.array3d[real],
        kept: wp.array[real],
    ):
        block, thread = wp.tid()
        batch = states.shape[1]
        rows = controls.shape[0] * batch
        first = block * samples
        count = wp.min(samples, batch - first)
        tile = wp.where(samples == 1, 1, wp.where(samples <= wp.static(TILES[1]), wp.static(TILES[1]), SAMPLES))
        for s in range(thread, count, wp.block_dim()):
            begin(states, memory, block, tile, s, first + s)
        _barrier()
        for n in range(controls.shape[0]):
            if tile == 1:
                one(packed, memory, kept, block, thread, rows, n * batch + first, count)
            elif tile == wp.static(TILES[1]):
                few(packed, memory, kept, block, thread, rows, n * batch + first, count)
            else:
                many(packed, memory, kept, block, thread, rows, n * batch + first, count)
            for s in range(thread, count, wp.block_dim()):
                advance(states, controls, p, memory, block, tile, s, n, first + s)
            _barrier()

    return unroll_blocks
