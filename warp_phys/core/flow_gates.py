"""Gates of single samples and components, and limits, inside kernels: what `Flow.all_gates` gives for a step.

Of a row the first `own` numbers are the state, those up to `remembering` a controller's memory; what lies behind them
is given from outside, and has no gate. A gate of zero is a cut, not a product: what lies behind it may be infinite.
"""

import functools
from typing import Any

import warp as wp

from warp_phys.core.rows import row_functions, scalar_name


def are_single(gates: Any) -> bool:
    """Whether gates, an array (flows, steps, N), are those of single samples and components; else of α and β alone."""
    return bool(gates.shape[2] != 2)


def gate_lines(own: int, remembering: int, size: int, real: type) -> str:
    """Return C++ that makes `out`, λ_n, of `seed`, ∂L/∂x_n, of `dx`, (∂S/∂x)ᵀ λ_{n+1}, and of `pulled`, (∂N/∂x)ᵀ ν_n.

    All are pointers to a row, `g` to the numbers of a sample; `pulled` counts only if `open`. `out` may be `dx`.
    """
    scalar = scalar_name(real)
    return f"""
        const {scalar} none = 0, limit = g[{2 * own + 1}];
        {scalar} factor = 1;
        if (open && !isinf(limit)) {{
            {scalar} most[2] = {{0, 0}}, sums[2] = {{0, 0}};  // lengths in units of the largest number: no overflow
            bool finite = true;
            for (int k = 0; k < {own}; ++k) {{
                const {scalar} a = g[k] != none ? g[k] * dx[k] : none;
                const {scalar} b = g[{own} + k] != none ? g[{own} + k] * pulled[k] : none;
                finite = finite && isfinite(b);
                most[0] = a > most[0] ? a : -a > most[0] ? -a : most[0];
                most[1] = b > most[1] ? b : -b > most[1] ? -b : most[1];
            }}
            if (!finite || limit == none || most[0] == none) factor = 0;  // what is not finite has no direction
            else if (most[1] != none) {{
                for (int k = 0; k < {own}; ++k) {{
                    const {scalar} a = g[k] != none ? g[k] * dx[k] / most[0] : none;
                    const {scalar} b = g[{own} + k] != none ? g[{own} + k] * pulled[k] / most[1] : none;
                    sums[0] += a * a;
                    sums[1] += b * b;
                }}
                const {scalar} bound = limit * most[0] * sqrt(sums[0]), length = most[1] * sqrt(sums[1]);
                if (length > bound) factor = bound / length;
            }}
        }}
        const bool feeds = open && factor != none;
        for (int k = 0; k < {own}; ++k) {{
            {scalar} value = seed[k] + (g[k] != none ? g[k] * dx[k] : none);
            if (feeds) value += g[{own} + k] != none ? factor * (g[{own} + k] * pulled[k]) : none;
            out[k] = value;
        }}
        const {scalar} gamma = g[{2 * own}];
        const bool remembers = open && gamma != none;
        for (int k = {own}; k < {remembering}; ++k) out[k] = seed[k] + (remembers ? gamma * pulled[k] : none);
        for (int k = {remembering}; k < {size}; ++k) out[k] = seed[k] + dx[k] + (open ? pulled[k] : none);
    """


def record_line(own: int) -> str:
    """Return C++ for `g`, the numbers of a sample `b`: its own, or those of all."""
    return f"const auto* g = &wp::index(gates, f, n, b % (gates.shape[2] / {2 * own + 2}) * {2 * own + 2});"


@functools.cache
def gate_function(own: int, remembering: int, size: int, real: type) -> Any:
    """Return `gated(lam, dx, pulled, gates, f, n, b)`, which does the same for rows as vectors."""
    Row = row_functions(size, real).vector

    @wp.func_native(f"""
        {record_line(own)}
        const bool open = true;
        const auto *seed = lam.c, *dx = by_physics.c, *pulled = by_controller.c;
        auto row = lam;
        auto* out = row.c;
        {gate_lines(own, remembering, size, real)}
        return row;
        """)
    def gated(
        lam: Row, by_physics: Row, by_controller: Row, gates: wp.array3d[real], f: int, n: int, b: int
    ) -> Row: ...

    return gated
