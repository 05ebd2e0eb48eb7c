"""Physics in C++ for blocks of samples on a CPU, eight at a time, one in each lane of a vector.

It is made from a system's Warp functions by `trace`. Systems with very many operations may bring their own, with loops,
in `native/`: the Warp functions stay the definition, and the tests hold one against the other. What has neither goes
through Warp's own code, sample by sample.
"""

import functools
from typing import Any

import warp as wp

from warp_phys.core.kernels import state_row, weighted_step_function
from warp_phys.core.rows import row_functions, scalar_name
from warp_phys.programs.trace import FAILURES, step_struct


def lanes_of(name: str, sizes: tuple[int, ...], real: type) -> str:
    """Return a struct of the folder `native` in C++, for `SystemFunctions.lanes`; see native/lanes.h for what it has.

    Args:
        name: Name of the struct; it takes the system's parameters in the order of `parameter_names`.
        sizes: Its template arguments after the number type.
        real: wp.float32 or wp.float64.
    """
    return f"warp_phys::{name}<{', '.join([scalar_name(real), *map(str, sizes)])}>"


@functools.cache
def lane_functions(structure: Any, real: type, parameters: bool = False) -> tuple[Any, Any]:
    """Return the functions `advance` and `retreat` in lanes, of a system's own struct or made from its step.

    None each where it cannot be traced, or where `retreat` is to write adjoints of `parameters` and the struct is the
    system's own, which has none. A controller's memory goes by the lanes, sample by sample.
    """
    inner = getattr(structure, "wrapped", structure)
    if inner.inputs:
        inner = structure  # of which the step takes all
    functions, source = inner.functions(real), ""
    struct = functions.lanes
    if struct and parameters:
        return None, None
    if not struct:
        try:
            struct, source = "Step", step_struct(inner, functions.step, real, parameters)
        except FAILURES:
            return None, None
    return _block_functions(structure, inner, struct, source, real)


def _block_functions(structure: Any, inner: Any, struct: str, source: str, real: type) -> tuple[Any, Any]:
    types, names = structure.types(real), structure.parameter_names
    Parameters, inputs, outputs = types.Parameters, structure.state_size, structure.control_size
    size, controls, written = inner.state_size, inner.control_size, inner.written_size
    remembered = outputs - controls
    scalar = scalar_name(real)
    block = f"warp_phys::Block<{scalar}, {struct}, {inputs}, {outputs}, {written}>"
    numbers = "\n".join(f"own[{i}][s] = from.{field};" for i, field in enumerate(names))
    arguments = f"""{source}
        warp_phys::lanes<{scalar}> own[{len(names)}];
        for (int s = 0; s < warp_phys::LANES; ++s) {{
            const int sample = first + (s < count ? s : count - 1);
            const auto& from = wp::index(p, p.shape[0] == 1 ? 0 : sample % p.shape[0]);
            {numbers}
        }}
        const long long at = (long long)n * states.shape[1] + first;
        const auto* x = states.data + at * {inputs};
        const auto* c = controls.data + at * {outputs};
        auto* y = states.data + (at + states.shape[1]) * {inputs};
    """
    each = f"for (int s = 0; s < count; ++s) for (int k = 0; k < {remembered}; ++k)"
    keep = f"{each} y[s * {inputs} + {size} + k] = c[s * {outputs} + {controls} + k];" if remembered else ""
    back = f"""
        for (int f = 0; f < adj_x.shape[0]; ++f) for (int s = 0; s < count; ++s) {{
            auto* lam = &wp::index(adj_x, f, first + s, 0);
            for (int k = 0; k < {remembered}; ++k)
                adj_c.data[(f * warp_phys::LANES + s) * {outputs} + {controls} + k] = lam[{size} + k];
            for (int k = {size}; k < {inputs}; ++k) lam[k] = 0;
        }}"""

    @wp.func_native(f"{arguments} {block}::advance(count, x, c, own, y); {keep}")
    def advance(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], n: int, first: int, count: int
    ): ...

    @wp.func_native(f"""{arguments}
        {block}::retreat(
            count, adj_x.shape[0], x, c, own, y, adj_x.data + (long long)first * {inputs},
            (long long)adj_x.shape[1] * {inputs}, adj_c.data, by_p.data + (long long)first * {len(names)},
            (long long)by_p.shape[1] * {len(names)}
        );
        {back if size < inputs else ""}""")
    def retreat(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], n: int, first: int, count: int,
        adj_x: wp.array3d[real], adj_c: wp.array3d[real], by_p: wp.array3d[real],
    ): ...  # fmt: skip

    return advance, retreat


@functools.cache
def advance_function(structure: Any, real: type) -> Any:
    """Return `advance(states, controls, p, n, first, count)`: states[n + 1] of a block of samples from states[n]."""
    types, functions = structure.types(real), structure.functions(real)
    given = lane_functions(structure, real)[0]
    if given is not None:
        return given
    Parameters, step = types.Parameters, functions.step
    x_row, c_row = state_row(structure, real), row_functions(structure.control_size, real)
    load_x, store_x, load_c = x_row.load_at, x_row.store_at, c_row.load_at

    @wp.func
    def advance(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], n: int, first: int, count: int
    ):
        for b in range(first, first + count):
            store_x(states, n + 1, b, step(load_x(states, n, b), load_c(controls, n, b), p[b % p.shape[0]]))

    return advance


@functools.cache
def add_parameters_function(structure: Any, real: type) -> Any:
    """Return `add_parameters(value, f, b, total)`: total[f, b] += value, a struct of parameters as a row of numbers."""
    lines = [f"row[{i}] += value.{name};" for i, name in enumerate(structure.parameter_names)]
    Parameters = structure.types(real).Parameters

    @wp.func_native("\n".join(["auto* row = &wp::index(total, f, b, 0);", *lines]))
    def add_parameters(value: Parameters, f: int, b: int, total: wp.array3d[real]): ...

    return add_parameters


@functools.cache
def retreat_function(structure: Any, real: type, parameters: bool = False) -> Any:
    """Return `retreat(states, controls, p, n, first, count, adj_x, adj_c, by_p)`, the adjoint of `advance_function`.

    For every flow f and sample b of the block, adj_x[f, b] becomes (∂S/∂x)ᵀ adj_x[f, b], and adj_c[f, b − first]
    becomes (∂S/∂c)ᵀ adj_x[f, b]. With `parameters` by_p[f, b] grows by (∂S/∂p)ᵀ adj_x[f, b], else it may be empty.
    states[n + 1] may be read: it holds the step's result.
    """
    types = structure.types(real)
    given = lane_functions(structure, real, parameters)[1]
    if given is not None:
        return given
    Parameters, weighted_step = types.Parameters, weighted_step_function(structure, real)
    add_parameters = add_parameters_function(structure, real)
    x_row, c_row = row_functions(structure.state_size, real), row_functions(structure.control_size, real)
    load_x, store_x, load_c, store_c = x_row.load_at, x_row.store_at, c_row.load_at, c_row.store_at

    @wp.func
    def retreat(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], n: int, first: int, count: int,
        adj_x: wp.array3d[real], adj_c: wp.array3d[real], by_p: wp.array3d[real],
    ):  # fmt: skip
        for f in range(adj_x.shape[0]):
            for b in range(first, first + count):
                dx, dc, dp, _dy = wp.grad(weighted_step)(
                    load_x(states, n, b), load_c(controls, n, b), p[b % p.shape[0]], load_x(adj_x, f, b)
                )
                store_x(adj_x, f, b, dx)
                store_c(adj_c, f, b - first, dc)
                if wp.static(parameters):
                    add_parameters(dp, f, b, by_p)

    return retreat
