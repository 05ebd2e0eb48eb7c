"""Kernels of small networks on a CPU: a whole unrolling, or a whole backward pass, in one launch.

A network is a `Plan` of layers, each a dense layer on windows of its input (`native/layers.h` says more). The C++ there
holds the products of a layer; the kernels here put layers and physics together, for blocks of samples that stay in the
cache. They run where the vectors of a CPU are; `block_kernels` has what runs on CUDA.
"""

import functools
from importlib.resources import files
from typing import Any

import warp as wp

from warp_phys.core.kernels import weighted_cost_function
from warp_phys.core.native_physics import advance_function, retreat_function
from warp_phys.core.rows import row_functions, scalar_name
from warp_phys.programs import native_code
from warp_phys.programs.plan import SAMPLES, Plan, padded
from warp_phys.programs.program import Program

HEADERS = ("layers.h", "lanes.h", "rows.h", "cartpole.h", "repulsion.h", "quantum.h", "update.h")
"""The C++ that stands in front of the kernels' own."""

_CPP = {
    "tanh": "hyperbolic_tangent", "relu": "relu", "elu": "elu", "silu": "silu", "sigmoid": "sigmoid",
    "identity": "identity",
}  # fmt: skip


@functools.cache
def module_options() -> dict[str, Any]:
    """Put the C++ of the folder `native` in front of a module's own code."""
    folder = files("warp_phys.programs").joinpath("native")
    source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in HEADERS)
    return {"extra_build_options": wp.ModuleBuildOptions(extra_cpu_preamble=source), "enable_backward": False}


def _types(plan: Plan, real: type) -> list[str]:
    """Return the C++ types of the layers."""
    scalar = scalar_name(real)
    return [
        f"warp_phys::Layer<{scalar}, warp_phys::{_CPP[a.activation]}, "
        f"{a.positions}, {a.window}, {a.stride}, {a.outputs}>"
        for a in plan.layers
    ]


@functools.cache
def _evaluate(plan: Plan, real: type) -> Any:
    """Return the function that evaluates the network at rows of states and writes all levels."""
    if isinstance(plan, Program):
        lines = native_code.evaluate_lines(plan, scalar_name(real))
    else:
        lines = _evaluate_lines(plan, real)

    @wp.func_native("\n".join(lines))
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


def _evaluate_lines(plan: Plan, real: type) -> list[str]:
    row, at, weights = plan.row, plan.offsets, plan.packed
    order = f"k % {plan.channels} * {plan.inputs // plan.channels} + k / {plan.channels}"
    lines = [
        f"auto* row = rows.data + (long long)slot * {row};",
        f"const auto* x = states.data + ((long long)n * batch + first) * {plan.inputs};",
        f"for (int s = 0; s < count; ++s) for (int k = 0; k < {plan.inputs}; ++k)",
        f"    row[s * {row} + k] = x[s * {plan.inputs} + {order}];",
    ]
    for i, layer in enumerate(_types(plan, real)):
        verb = "forward_few" if plan.few(i) else "forward"
        ends = f"row + {at[i]}, {row}, packed.data + {weights[i]}, row + {at[i + 1]}, {row}, {plan.slopes}"
        lines.append(f"{layer}::{verb}(count, {ends});")
    return lines


@functools.cache
def _pull(plan: Plan, real: type) -> Any:
    """Return the function that takes adjoints of the output level back to every level before it."""
    if isinstance(plan, Program):
        lines = native_code.pull_lines(plan, scalar_name(real))
    else:
        lines = _pull_lines(plan, real)

    @wp.func_native("\n".join(lines))
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


def _pull_lines(plan: Plan, real: type) -> list[str]:
    row, at, slopes = plan.row, plan.offsets, plan.slopes
    lines = [
        f"auto* d = deltas.data + (long long)delta_slot * {row};",
        f"const auto* h = rows.data + (long long)slot * {row};",
    ]
    last = plan.layers[-1].activation
    if last != "identity":
        kept = slopes if last == "silu" else 0
        lines += [
            f"for (int s = 0; s < count; ++s) for (int k = 0; k < {plan.outputs}; ++k)",
            f"    d[s * {row} + {at[-2]} + k] *= "
            f"warp_phys::slope_at<warp_phys::{_CPP[last]}>(h[s * {row} + {at[-2] + kept} + k]);",
        ]
    for i, layer in reversed(list(enumerate(_types(plan, real)))):
        weights = f"packed.data + {plan.packed[i] + padded(plan.layers[i].outputs)}"
        if not plan.few(i):
            weights = f"transposed.data + {plan.transposed[i]}"
        before = plan.layers[i - 1].activation if i else "identity"
        kept = at[i] + (slopes if before == "silu" else 0)
        call = f"{layer}::pull<warp_phys::{_CPP[before]}, {'true' if i else 'false'}>"
        ends = f"d + {at[i + 1]}, {row}, {weights}, d + {at[i]}, {row}, h + {kept}, {row}"
        lines.append(f"{'' if i else 'if (to_input) '}{call}(count, {ends});")
    return lines


@functools.cache
def _contract(plan: Plan, real: type) -> Any:
    """Return the function that adds the gradients of the weights over rows, in the packed layout."""
    if isinstance(plan, Program):
        lines = native_code.contract_lines(plan, scalar_name(real))
    else:
        lines = _contract_lines(plan, real)

    @wp.func_native("\n".join(lines))
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


def _contract_lines(plan: Plan, real: type) -> list[str]:
    row, at, weights = plan.row, plan.offsets, plan.packed
    lines = [
        f"const auto* d = deltas.data + (long long)delta_slot * {row};",
        f"const auto* x = rows.data + (long long)slot * {row};",
        f"auto* g = gradients.data + (long long)gradient * {weights[-1]};",
    ]
    for i, layer in enumerate(_types(plan, real)):
        verb = "contract_few" if plan.few(i) else "contract"
        lines.append(f"{layer}::{verb}(count, x + {at[i]}, {row}, d + {at[i + 1]}, {row}, g + {weights[i]});")
    return lines


@functools.cache
def pack_kernel(plan: Plan, real: type) -> wp.Kernel:
    """Write weights and biases, given by their addresses in turn, into the packed and the transposed layout.

    A bias at address 0 is zero.
    """
    if isinstance(plan, Program):
        lines = native_code.pack_lines(plan, scalar_name(real))
    else:
        lines = _pack_lines(plan, scalar_name(real))

    @wp.func_native("\n".join(lines))
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


def _pack_lines(plan: Plan, scalar: str) -> list[str]:
    lines: list[str] = []
    for i, layer in enumerate(plan.layers):
        width, out = padded(layer.window), padded(layer.outputs)
        order = f"k % {layer.channels} * {layer.window // layer.channels} + k / {layer.channels}"
        lines += [
            "{",
            f"const {scalar}* w = (const {scalar}*)addresses.data[{2 * i}];",
            f"const {scalar}* b = (const {scalar}*)addresses.data[{2 * i + 1}];",
            f"{scalar}* to = packed.data + {plan.packed[i]};",
            f"for (int o = 0; o < {layer.outputs}; ++o) to[o] = b ? b[o] : 0;",
            f"to += {out};",
            f"{scalar}* back = {'to' if plan.few(i) else f'transposed.data + {plan.transposed[i]}'};",
            f"for (int o = 0; o < {layer.outputs}; ++o) for (int k = 0; k < {layer.window}; ++k) {{",
            f"    const {scalar} value = w[o * {layer.window} + {order}];",
            f"    back[o * {width} + k] = value;",
            "" if plan.few(i) else f"    to[k * {out} + o] = value;",
            "}}",
        ]
    return lines


@functools.cache
def unpack_kernel(plan: Plan, real: type) -> wp.Kernel:
    """Add packed gradients to those of weights and biases, given by their addresses in turn for every flow, or 0."""
    if isinstance(plan, Program):
        lines = native_code.unpack_lines(plan, scalar_name(real))
    else:
        lines = _unpack_lines(plan, scalar_name(real))

    @wp.func_native("\n".join(lines))
    def unpack(gradients: wp.array[real], flow: int, addresses: wp.array2d[wp.uint64]): ...

    @wp.kernel(module="unique", module_options=module_options())
    def unpack_layers(
        # in
        gradients: wp.array[real],
        addresses: wp.array2d[wp.uint64],
    ):
        unpack(gradients, wp.tid(), addresses)

    return unpack_layers


def _unpack_lines(plan: Plan, scalar: str) -> list[str]:
    lines: list[str] = []
    for i, layer in enumerate(plan.layers):
        width, out = padded(layer.window), padded(layer.outputs)
        order = f"k % {layer.channels} * {layer.window // layer.channels} + k / {layer.channels}"
        source = f"g[{out} + o * {width} + k]" if plan.few(i) else f"g[{out} + k * {out} + o]"
        lines += [
            "{",
            f"const {scalar}* g = gradients.data + (long long)flow * {plan.packed[-1]} + {plan.packed[i]};",
            f"{scalar}* w = ({scalar}*)addresses.data[flow * {2 * len(plan.layers)} + {2 * i}];",
            f"{scalar}* b = ({scalar}*)addresses.data[flow * {2 * len(plan.layers)} + {2 * i + 1}];",
            f"if (w) for (int o = 0; o < {layer.outputs}; ++o) for (int k = 0; k < {layer.window}; ++k)",
            f"    w[o * {layer.window} + {order}] += {source};",
            f"if (b) for (int o = 0; o < {layer.outputs}; ++o) b[o] += g[o];",
            "}",
        ]
    return lines


@functools.cache
def unroll_kernel(structure: Any, plan: Plan, real: type) -> wp.Kernel:
    """The whole forward unrolling, network and physics, all steps; one thread per block of `SAMPLES` samples.

    The rows of a block's trajectory stand together, sample by sample within a time step, so that a backward pass finds
    them side by side, those of sample `origin` first; without `keep` there is room for one time step of one block.
    """
    types, advance, evaluate = structure.types(real), advance_function(structure, real), _evaluate(plan, real)
    Parameters, row, out = types.Parameters, plan.row, plan.offsets[-2]

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
def step_kernel(structure: Any, real: type) -> wp.Kernel:
    """One time step n, from states[n] and controls[n] to states[n + 1]; one thread per block of `SAMPLES` samples."""
    types, advance = structure.types(real), advance_function(structure, real)
    Parameters = types.Parameters

    @wp.kernel(module="unique", module_options=module_options())
    def step_blocks(
        # in and out: states[n + 1] is written
        states: wp.array3d[real],
        # in
        controls: wp.array3d[real],
        p: wp.array[Parameters],
        n: int,
    ):
        first = SAMPLES * wp.tid()
        advance(states, controls, p, n, first, wp.min(SAMPLES, states.shape[1] - first))

    return step_blocks


@functools.cache
def _seed_function(structure: Any, real: type) -> Any:
    """Return the function that writes ∂L/∂x_n of a block: as given, or from the system's own cost at chosen steps."""
    Parameters, weighted_cost = structure.types(real).Parameters, weighted_cost_function(structure, real)
    x_row = row_functions(structure.state_size, real)
    load_x, store_x = x_row.load_at, x_row.store

    @wp.func
    def seed_block(
        states: wp.array3d[real], p: wp.array[Parameters], loss_states: wp.array3d[real], chosen: wp.array[int],
        weight: real, n: int, first: int, count: int, seeds: wp.array2d[real],
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
                dx, _dp, _dw = wp.grad(weighted_cost)(load_x(states, n, b), p[b % p.shape[0]], weight)
                store_x(seeds, s, dx)

    return seed_block


@functools.cache
def sweep_kernel(structure: Any, plan: Plan, real: type) -> wp.Kernel:
    """The whole backward pass of all flows: adjoints from the last step to the first, and the gradients of the weights.

    Per time step and flow, μ_n and λ_n as in `kernels.sweep_kernel`, the network's part by its own transposed layers;
    after every chunk of time steps, while its rows are in the cache, their share of the gradients. One thread takes
    its blocks of samples in turn, so the order of all sums is fixed. The loss comes as its derivatives, or, where
    `chosen` has a number for every step, as the system's own cost at the steps whose number is not 0, times
    `cost_weight`, and the squared controls times `control_weight`.
    """
    retreat, evaluate = retreat_function(structure, real), _evaluate(plan, real)
    pull, contract, seed_block = _pull(plan, real), _contract(plan, real), _seed_function(structure, real)
    Parameters = structure.types(real).Parameters
    row, out, inputs, channels = plan.row, plan.offsets[-2], plan.inputs, plan.channels

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
        # out: λ_0
        adj_x: wp.array3d[real],
        # in and out
        gradients: wp.array[real],
    ):
        batch = states.shape[1]
        steps = controls.shape[0]
        flows = adj_x.shape[0]
        for first in range(begin, end, SAMPLES):
            count = wp.min(SAMPLES, end - first)
            seed_block(states, p, loss_states, chosen, cost_weight, steps, first, count, seeds)
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
                    retreat(states, controls, p, n, first, count, adj_x, adj_c)
                    seed_block(states, p, loss_states, chosen, cost_weight, n, first, count, seeds)
                    for f in range(flows):
                        alpha = gates[f, n, 0]
                        beta = gates[f, n, 1]
                        own_slot = f * chunk * SAMPLES + slot
                        for s in range(count):
                            for k in range(controls.shape[2]):
                                mu = adj_c[f, s, k]
                                if chosen.shape[0] == 0:
                                    mu += loss_controls[n, first + s, k]
                                else:
                                    mu += real(2.0) * control_weight * controls[n, first + s, k]
                                deltas[(own_slot + s) * row + out + k] = mu
                        to_input = wp.where(beta != real(0.0), 1, 0)
                        pull(packed, transposed, rows, base + slot, deltas, own_slot, count, to_input)
                        for s in range(count):
                            for k in range(inputs):
                                i = k % wp.static(channels) * wp.static(inputs // channels) + k // wp.static(channels)
                                lam = seeds[s, i]
                                if alpha != real(0.0):
                                    lam += alpha * adj_x[f, first + s, i]
                                if to_input != 0:
                                    lam += beta * deltas[(own_slot + s) * row + k]
                                adj_x[f, first + s, i] = lam
                for f in range(flows):
                    contract(rows, base, deltas, f * chunk * SAMPLES, (stop - start) * count, gradients, f)
                stop = start

    return sweep_blocks
