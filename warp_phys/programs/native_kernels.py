"""Kernels of small networks on a CPU: a whole unrolling, or a whole backward pass, in one launch.

A network is a row program; `programs.native_code` makes C++ of it, with the products of `native/layers.h`. The kernels
here put network and physics together, for blocks of samples that stay in the cache. They run where the vectors of a CPU
are; `block_kernels` has what runs on CUDA.
"""

import functools
from importlib.resources import files
from typing import Any

import warp as wp

from warp_phys.core.flow_gates import gate_function, gate_lines, record_line
from warp_phys.core.kernels import weighted_cost_function
from warp_phys.core.rows import row_functions, scalar_name
from warp_phys.programs import native_code
from warp_phys.programs.layout import layout_of
from warp_phys.programs.native_physics import add_parameters_function, advance_function, retreat_function
from warp_phys.programs.program import SAMPLES, Program

HEADERS = ("layers.h", "lanes.h", "rows.h", "repulsion.h", "quantum.h", "update.h")
"""The C++ that stands in front of the kernels' own."""


@functools.cache
def module_options() -> dict[str, Any]:
    """Put the C++ of the folder `native` in front of a module's own code."""
    folder = files("warp_phys.programs").joinpath("native")
    source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in HEADERS)
    return {"extra_build_options": wp.ModuleBuildOptions(extra_cpu_preamble=source), "enable_backward": False}


@functools.cache
def _evaluate(program: Program, real: type) -> Any:
    """Return the function that evaluates the network at rows of states and writes all levels."""
    code = "\n".join(native_code.evaluate_lines(program, scalar_name(real)))

    @wp.func_native(code)
    def evaluate(
        packed: wp.array[real],
        states: wp.array3d[real],
        batch: int,
        n: int,
        first: int,
        count: int,
        rows: wp.array[real],
        slot: int,
    ): ...

    return evaluate


@functools.cache
def _pull(program: Program, real: type) -> Any:
    """Return the function that takes adjoints of the output level back to every level before it."""
    code = "\n".join(native_code.pull_lines(program, scalar_name(real)))

    @wp.func_native(code)
    def pull(
        packed: wp.array[real],
        transposed: wp.array[real],
        rows: wp.array[real],
        slot: int,
        deltas: wp.array[real],
        delta_slot: int,
        count: int,
        to_input: int,
    ): ...

    return pull


@functools.cache
def _contract(program: Program, real: type) -> Any:
    """Return the function that adds the gradients of the weights over rows, in the packed layout."""
    code = "\n".join(native_code.contract_lines(program, scalar_name(real)))

    @wp.func_native(code)
    def contract(
        rows: wp.array[real],
        slot: int,
        deltas: wp.array[real],
        delta_slot: int,
        count: int,
        gradients: wp.array[real],
        gradient: int,
    ): ...

    return contract


@functools.cache
def pack_kernel(program: Program, real: type) -> wp.Kernel:
    """Write weights and biases, given by their addresses in turn, into the packed and the transposed layout.

    A bias at address 0 is zero.
    """
    code = "\n".join(native_code.pack_lines(program, scalar_name(real)))

    @wp.func_native(code)
    def pack(addresses: wp.array2d[wp.uint64], packed: wp.array[real], transposed: wp.array[real]): ...

    @wp.kernel(module="unique", module_options=module_options())
    def pack_layers(
        # in
        addresses: wp.array2d[wp.uint64],
        # out
        packed: wp.array[real],
        transposed: wp.array[real],
    ):
        pack(addresses, packed, transposed)

    return pack_layers


@functools.cache
def unpack_kernel(program: Program, real: type) -> wp.Kernel:
    """Add packed gradients to those of weights and biases, given by their addresses in turn for every flow, or 0."""
    code = "\n".join(native_code.unpack_lines(program, scalar_name(real)))

    @wp.func_native(code)
    def unpack(
        gradients: wp.array[real],
        flow: int,
        packed: wp.array[real],
        transposed: wp.array[real],
        addresses: wp.array2d[wp.uint64],
    ): ...

    @wp.kernel(module="unique", module_options=module_options())
    def unpack_layers(
        # in
        packed: wp.array[real],
        transposed: wp.array[real],
        addresses: wp.array2d[wp.uint64],
        # in, and room for work
        gradients: wp.array[real],
    ):
        unpack(gradients, wp.tid(), packed, transposed, addresses)

    return unpack_layers


@functools.cache
def unroll_kernel(structure: Any, program: Program, real: type) -> wp.Kernel:
    """The whole forward unrolling, network and physics, all steps; one thread per block of `SAMPLES` samples.

    The rows of a block's trajectory stand together, sample by sample within a time step, so that a backward pass finds
    them side by side, those of sample `origin` first; without `keep` there is room for one time step of one block.
    """
    types, advance, evaluate = structure.types(real), advance_function(structure, real), _evaluate(program, real)
    layout, Parameters = layout_of(program), types.Parameters
    row, out = layout.row, layout.output

    @wp.kernel(module="unique", module_options=module_options())
    def unroll_blocks(
        # in; the first sample
        packed: wp.array[real],
        p: wp.array[Parameters],
        begin: int,
        origin: int,
        keep: int,
        # in and out: time step 0 is read, the others are written
        states: wp.array3d[real],
        # out
        controls: wp.array3d[real],
        rows: wp.array[real],
    ):
        batch = states.shape[1]
        first = begin + SAMPLES * wp.tid()
        count = wp.min(SAMPLES, batch - first)
        for n in range(controls.shape[0]):
            slot = int(0)
            if keep != 0:
                slot = (first - origin) * controls.shape[0] + n * count
            evaluate(packed, states, batch, n, first, count, rows, slot)
            for s in range(count):
                for k in range(controls.shape[2]):
                    controls[n, first + s, k] = rows[(slot + s) * row + out + k]
            advance(states, controls, p, n, first, count)

    return unroll_blocks


@functools.cache
def steps_kernel(structure: Any, real: type) -> wp.Kernel:
    """So many time steps under given controls, from step n on; one thread per block of `SAMPLES` samples."""
    types, advance = structure.types(real), advance_function(structure, real)
    Parameters = types.Parameters

    @wp.kernel(module="unique", module_options=module_options())
    def step_blocks(
        # in and out: states[n] is read, those behind it are written
        states: wp.array3d[real],
        # in
        controls: wp.array3d[real],
        p: wp.array[Parameters],
        n: int,
        steps: int,
    ):
        first = SAMPLES * wp.tid()
        for i in range(n, n + steps):
            advance(states, controls, p, i, first, wp.min(SAMPLES, states.shape[1] - first))

    return step_blocks


@functools.cache
def trajectory_vjp_kernel(structure: Any, real: type, parameters: bool, single: bool) -> wp.Kernel:
    """The way back of all steps by one flow, of which the physics gates count; one thread takes its blocks in turn.

    λ_n and μ_n are those of `kernels.sweep_kernel` without a controller, of a loss of the states.
    """
    retreat, size, written = retreat_function(structure, real, parameters), structure.state_size, structure.written_size
    gated = gate_function(structure.own_size, structure.remembering_size, size, real)
    x_row = row_functions(size, real)
    load_at, store_at, Row, Parameters = x_row.load_at, x_row.store_at, x_row.vector, structure.types(real).Parameters

    @wp.kernel(module="unique", module_options=module_options())
    def retreat_blocks(
        # in
        states: wp.array3d[real],
        controls: wp.array3d[real],
        p: wp.array[Parameters],
        loss_states: wp.array3d[real],
        gates: wp.array3d[real],
        # scratch: (1, SAMPLES, K)
        adj_c: wp.array3d[real],
        # out: λ_0 (1, batch, D), μ; adjoints of parameters (1, batch, P) and of inputs, or nothing
        adj_x: wp.array3d[real],
        adj_controls: wp.array3d[real],
        adj_p: wp.array3d[real],
        adj_inputs: wp.array3d[real],
    ):
        steps = controls.shape[0]
        for first in range(0, states.shape[1], SAMPLES):
            count = wp.min(SAMPLES, states.shape[1] - first)
            for b in range(first, first + count):
                store_at(adj_x, 0, b, load_at(loss_states, steps, b))
                for i in range(adj_p.shape[2]):
                    adj_p[0, b, i] = real(0.0)
            for back in range(steps):
                n = steps - 1 - back
                retreat(states, controls, p, n, first, count, adj_x, adj_c, adj_p)
                for s in range(count):
                    b = first + s
                    for k in range(controls.shape[2]):
                        adj_controls[n, b, k] = adj_c[0, s, k]
                    if wp.static(single):
                        seed = load_at(loss_states, n, b)
                        store_at(adj_x, 0, b, gated(seed, load_at(adj_x, 0, b), Row(), gates, 0, n, b))
                    else:
                        alpha = gates[0, n, 0]
                        for k in range(wp.static(size)):
                            lam = loss_states[n, b, k]
                            if alpha != real(0.0):
                                lam += alpha * adj_x[0, b, k]
                            adj_x[0, b, k] = lam
                    for k in range(adj_inputs.shape[2]):
                        adj_inputs[n, b, k] = adj_x[0, b, wp.static(written) + k]

    return retreat_blocks


@functools.cache
def _seed_function(structure: Any, real: type, parameters: bool) -> Any:
    """Return the function that writes ∂L/∂x_n of a block: as given, or from the system's own cost at chosen steps.

    With `parameters` that cost's ∂L/∂p is added to row `flows` of by_p.
    """
    Parameters, weighted_cost = structure.types(real).Parameters, weighted_cost_function(structure, real)
    add_parameters = add_parameters_function(structure, real)
    x_row = row_functions(structure.state_size, real)
    load_x, store_x = x_row.load_at, x_row.store

    @wp.func
    def seed_block(
        states: wp.array3d[real], p: wp.array[Parameters], loss_states: wp.array3d[real], chosen: wp.array[int],
        weight: real, n: int, first: int, count: int, flows: int, seeds: wp.array2d[real], by_p: wp.array3d[real],
    ):  # fmt: skip
        for s in range(count):
            b = first + s
            if chosen.shape[0] == 0:
                for i in range(seeds.shape[1]):
                    seeds[s, i] = loss_states[n, b, i]
            elif chosen[n] == 0:
                for i in range(seeds.shape[1]):
                    seeds[s, i] = real(0.0)
            else:
                dx, dp, _dw = wp.grad(weighted_cost)(load_x(states, n, b), p[b % p.shape[0]], weight)
                store_x(seeds, s, dx)
                if wp.static(parameters):
                    add_parameters(dp, flows, b, by_p)

    return seed_block


def _gate_functions(structure: Any, program: Program, real: type, single: bool) -> tuple[Any, Any]:
    """Return the function that makes λ_n of a block by a flow's gates, and the one that says if a controller's is open.

    `single` gates are those of samples and components, see `flow_gates`.
    """
    inputs, row, own, end = program.inputs, layout_of(program).row, structure.own_size, structure.remembering_size
    written = structure.written_size

    @wp.func_native(f"""
        for (int s = 0; s < count; ++s) {{
            const int b = first + s;
            {record_line(own)}
            const bool open = to_input;
            const auto *seed = &wp::index(seeds, s, 0), *pulled = deltas.data + (long long)(slot + s) * {row};
            auto* out = &wp::index(adj_x, f, b, 0);
            const auto* dx = out;
            {gate_lines(own, end, inputs, real)}
            if (adj_inputs.shape[0]) {{
                auto* given = &wp::index(adj_inputs, f, n, b, 0);
                for (int k = {written}; k < {inputs}; ++k) given[k - {written}] = out[k];
            }}
        }}""")
    def gate_singly(
        seeds: wp.array2d[real], deltas: wp.array[real], slot: int, to_input: int, gates: wp.array3d[real],
        f: int, n: int, first: int, count: int, adj_x: wp.array3d[real], adj_inputs: wp.array4d[real],
    ): ...  # fmt: skip

    @wp.func_native(f"""
        for (int b = first; b < first + count; ++b) {{
            {record_line(own)}
            for (int k = {own}; k < {2 * own + (end > own)}; ++k) if (g[k] != 0) return 1;
        }}
        return 0;""")
    def is_open(gates: wp.array3d[real], f: int, n: int, first: int, count: int) -> int: ...  # type: ignore[empty-body]

    @wp.func
    def gate_block(
        seeds: wp.array2d[real], deltas: wp.array[real], slot: int, to_input: int, gates: wp.array3d[real],
        f: int, n: int, first: int, count: int, adj_x: wp.array3d[real], adj_inputs: wp.array4d[real],
    ):  # fmt: skip
        alpha = gates[f, n, 0]
        beta = gates[f, n, 1]
        for s in range(count):
            for k in range(wp.static(inputs)):
                lam = seeds[s, k]
                if alpha != real(0.0):
                    lam += alpha * adj_x[f, first + s, k]
                if to_input != 0:
                    lam += beta * deltas[(slot + s) * wp.static(row) + k]
                adj_x[f, first + s, k] = lam

    @wp.func
    def is_block_open(gates: wp.array3d[real], f: int, n: int, first: int, count: int):
        return wp.where(gates[f, n, 1] != real(0.0), 1, 0)

    return (gate_singly, is_open) if single else (gate_block, is_block_open)


@functools.cache
def sweep_kernel(
    structure: Any, program: Program, real: type, parameters: bool = False, single: bool = False
) -> wp.Kernel:
    """The whole backward pass of all flows: adjoints from the last step to the first, and the gradients of the weights.

    Per time step and flow, μ_n and λ_n as in `kernels.sweep_kernel`, the network's part by its own transposed layers;
    after every chunk of time steps, while its rows are in the cache, their share of the gradients. One thread takes
    its blocks of samples in turn, so the order of all sums is fixed. The loss comes as its derivatives, or, where
    `chosen` has a number for every step, as the system's own cost at the steps whose number is not 0, times
    `cost_weight`, and the squared controls times `control_weight`.

    With `parameters` it also writes each sample's adjoints of the physical parameters, Σ_n (∂S/∂p)ᵀ λ_{n+1} for every
    flow, and after those of the flows the derivative of the system's own cost; where `adj_inputs` has room, the
    adjoints of what is given to every step. Gates are those of `single` components or not, as in
    `kernels.sweep_kernel`.
    """
    retreat, evaluate = retreat_function(structure, real, parameters), _evaluate(program, real)
    pull, contract = _pull(program, real), _contract(program, real)
    seed_block = _seed_function(structure, real, parameters)
    Parameters = structure.types(real).Parameters
    layout, inputs = layout_of(program), program.inputs
    row, out, own_controls = layout.row, layout.output, structure.own_controls
    gate_block, is_open = _gate_functions(structure, program, real, single)

    @wp.kernel(module="unique", module_options=module_options())
    def sweep_blocks(
        # in
        packed: wp.array[real],
        transposed: wp.array[real],
        p: wp.array[Parameters],
        states: wp.array3d[real],
        controls: wp.array3d[real],
        loss_states: wp.array3d[real],
        loss_controls: wp.array3d[real],
        chosen: wp.array[int],
        cost_weight: real,
        control_weight: real,
        gates: wp.array3d[real],
        begin: int,
        end: int,
        origin: int,
        chunk: int,
        kept: int,
        # in if `kept`, else scratch for a chunk
        rows: wp.array[real],
        # scratch: a chunk of rows per flow, (flows, SAMPLES, K), (SAMPLES, D)
        deltas: wp.array[real],
        adj_c: wp.array3d[real],
        seeds: wp.array2d[real],
        # out: λ_0; adjoints of parameters, or nothing; of what is given, or nothing
        adj_x: wp.array3d[real],
        adj_p: wp.array3d[real],
        adj_inputs: wp.array4d[real],
        # in and out
        gradients: wp.array[real],
    ):
        batch = states.shape[1]
        steps = controls.shape[0]
        flows = adj_x.shape[0]
        for first in range(begin, end, SAMPLES):
            count = wp.min(SAMPLES, end - first)
            if wp.static(parameters):
                for f in range(adj_p.shape[0]):
                    for s in range(count):
                        for i in range(adj_p.shape[2]):
                            adj_p[f, first + s, i] = real(0.0)
            seed_block(states, p, loss_states, chosen, cost_weight, steps, first, count, flows, seeds, adj_p)
            for f in range(flows):
                for s in range(count):
                    for i in range(inputs):
                        adj_x[f, first + s, i] = seeds[s, i]
            stop = int(steps)
            while stop > 0:
                start = wp.max(0, stop - chunk)
                base = int(0)
                if kept != 0:
                    base = (first - origin) * steps + start * count
                else:
                    for n in range(start, stop):
                        evaluate(packed, states, batch, n, first, count, rows, (n - start) * count)
                for back in range(stop - start):
                    n = stop - 1 - back
                    slot = (n - start) * count
                    retreat(states, controls, p, n, first, count, adj_x, adj_c, adj_p)
                    seed_block(states, p, loss_states, chosen, cost_weight, n, first, count, flows, seeds, adj_p)
                    for f in range(flows):
                        own_slot = f * chunk * SAMPLES + slot
                        for s in range(count):
                            for k in range(controls.shape[2]):
                                mu = adj_c[f, s, k]
                                if chosen.shape[0] == 0:
                                    mu += loss_controls[n, first + s, k]
                                elif k < wp.static(own_controls):
                                    mu += real(2.0) * control_weight * controls[n, first + s, k]
                                deltas[(own_slot + s) * row + out + k] = mu
                        to_input = int(1)
                        if adj_inputs.shape[0] == 0:
                            to_input = is_open(gates, f, n, first, count)
                        pull(packed, transposed, rows, base + slot, deltas, own_slot, count, to_input)
                        gate_block(seeds, deltas, own_slot, to_input, gates, f, n, first, count, adj_x, adj_inputs)
                for f in range(flows):
                    contract(rows, base, deltas, f * chunk * SAMPLES, (stop - start) * count, gradients, f)
                stop = start

    return sweep_blocks
