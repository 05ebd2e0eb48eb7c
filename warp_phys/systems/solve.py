"""Small systems of linear equations inside Warp functions: `solve`, for mass matrices."""

from collections.abc import Sequence
from typing import Any

import warp as wp

from warp_phys.core.rows import scalar_name
from warp_phys.programs.trace import NATIVE, Matrix, Row, square_root

LARGEST = 16
"""Most unknowns of `solve`."""

# Of the symmetric part of a: the Cholesky factor, below the diagonal, and the inverses of its diagonal.
_FACTORISE = """
    typedef {scalar} T;
    constexpr int N = {size};
    T lower[N][N], inverse[N];
    for (int j = 0; j < N; ++j) {{
        T pivot = a.data[j][j];
        for (int k = 0; k < j; ++k) pivot -= lower[j][k] * lower[j][k];
        inverse[j] = T(1) / wp::sqrt(pivot > T(0) ? pivot : T(-1));  // nan where a is not positive definite
        for (int i = j + 1; i < N; ++i) {{
            T sum = T(0.5) * (a.data[i][j] + a.data[j][i]);
            for (int k = 0; k < j; ++k) sum -= lower[i][k] * lower[j][k];
            lower[i][j] = sum * inverse[j];
        }}
    }}
    const auto substitute = [&](auto& x) {{
        for (int i = 0; i < N; ++i) {{
            for (int k = 0; k < i; ++k) x.c[i] -= lower[i][k] * x.c[k];
            x.c[i] *= inverse[i];
        }}
        for (int i = N - 1; i >= 0; --i) {{
            for (int k = i + 1; k < N; ++k) x.c[i] -= lower[k][i] * x.c[k];
            x.c[i] *= inverse[i];
        }}
    }};
    auto x = b;
    substitute(x);
"""

_SOLVE = _FACTORISE + "    return x;"

_ADJ_SOLVE = (
    _FACTORISE
    + """
    auto lambda = adj_ret;
    substitute(lambda);
    for (int i = 0; i < N; ++i) {{
        adj_b.c[i] += lambda.c[i];
        for (int j = 0; j < N; ++j) adj_a.data[i][j] -= T(0.5) * (lambda.c[i] * x.c[j] + lambda.c[j] * x.c[i]);
    }}
"""
)


def _overload(solve: Any, size: int, real: type) -> Any:
    """Return `solve`, which Warp finds under this name, with an overload for one size and precision."""
    Matrix, Vector = wp.types.matrix(shape=(size, size), dtype=real), wp.types.vector(length=size, dtype=real)
    sizes = {"size": size, "scalar": scalar_name(real)}

    @wp.func_native(_SOLVE.format(**sizes), _ADJ_SOLVE.format(**sizes))  # type: ignore[no-redef]
    def solve(a: Matrix, b: Vector) -> Vector: ...  # type: ignore[valid-type]

    return solve


solve: Any = None
for _real in (wp.float32, wp.float64):
    for _size in range(1, LARGEST + 1):
        solve = _overload(solve, _size, _real)
"""`solve(a, b)`, a Warp function: x with a x = b, for a symmetric positive definite a of up to 16 rows.

    x = ((a + aᵀ) / 2)⁻¹ b
    λ = ((a + aᵀ) / 2)⁻¹ adj_x,   adj_b += λ,   adj_a −= (λ xᵀ + x λᵀ) / 2

By Cholesky's factorisation, in the precision of its arguments: the relative error is that of rounding times the
condition number of a. The adjoint, exact for each element of a, stands for itself: nothing of the factorisation is
differentiated by Warp. Where a is not positive definite, all of x is nan.

Args:
    a: Matrix, `wp.types.matrix(shape=(n, n), dtype=real)`, n ≤ 16, float32 or float64.
    b: Vector, `wp.types.vector(length=n, dtype=real)`.
"""


def _solve_symbols(a: Matrix, b: Row) -> Row:
    """Return the same, of symbols."""
    n = len(b)
    lower, inverse, x = Matrix([[0.0] * n] * n), [], Row(b.values)
    for j in range(n):
        inverse.append(1.0 / square_root(_less(a[j, j], [(lower[j, k], lower[j, k]) for k in range(j)])))
        for i in range(j + 1, n):
            mean = 0.5 * (a[i, j] + a[j, i])
            lower[i, j] = _less(mean, [(lower[i, k], lower[j, k]) for k in range(j)]) * inverse[j]
    for i in range(n):
        x[i] = _less(x[i], [(lower[i, k], x[k]) for k in range(i)]) * inverse[i]
    for i in reversed(range(n)):
        x[i] = _less(x[i], [(lower[k, i], x[k]) for k in range(i + 1, n)]) * inverse[i]
    return x


def _less(value: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
    for a, b in pairs:
        value = value - a * b
    return value


NATIVE[solve] = _solve_symbols
