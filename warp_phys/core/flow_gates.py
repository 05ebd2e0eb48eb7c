"""Gates of single samples and components, and limits, inside kernels: what `Flow.all_gates` gives for a step.

Of a row the first `own` numbers are the state, those up to `remembering` a controller's memory; what lies behind them
is given from outside, and has no gate. A gate of zero is a cut, not a product: what lies behind it may be infinite.
"""

import functools
from typing import Any

import warp as wp

from warp_phys.core.rows import row_functions


def _record_function(own: int, real: type) -> Any:
    """Return the function that says where the numbers for a sample begin: its own, or those of all."""

    @wp.func
    def record_of(gates: wp.array3d[real], b: int):
        width = wp.static(2 * own + 2)
        return (b % (gates.shape[2] // width)) * width

    return record_of


@functools.cache
def _limit_function(own: int, size: int, real: type) -> Any:
    """Return `limited(physics, controller, limit)`, the controller's feedback, not longer than so much of the other."""
    Row = row_functions(size, real).vector

    @wp.func
    def largest(row: Row):
        out = real(0.0)
        for k in range(wp.static(own)):
            out = wp.max(out, wp.abs(row[k]))
        return out

    @wp.func
    def norm(row: Row, scale: real):
        total = real(0.0)
        for k in range(wp.static(own)):
            total += (row[k] / scale) * (row[k] / scale)
        return scale * wp.sqrt(total)

    @wp.func
    def scaled(row: Row, factor: real):
        out = row
        for k in range(wp.static(own)):
            out[k] = wp.where(factor == real(0.0), real(0.0), factor * row[k])
        return out

    @wp.func
    def limited(physics: Row, controller: Row, limit: real):
        least = largest(physics)
        most = largest(controller)
        factor = real(1.0)
        if most > real(0.0):
            if least == real(0.0) or wp.isinf(most):  # what is infinite has no direction
                factor = real(0.0)
            else:
                # lengths in units of the largest component: squares would overflow
                bound = limit * norm(physics, least)
                length = norm(controller, most)
                if length > bound:
                    factor = bound / length
        return scaled(controller, factor)

    return limited


@functools.cache
def gate_functions(own: int, remembering: int, size: int, real: type) -> tuple[Any, Any]:
    """Return how gates act on rows of adjoints, and whether any of a controller's is open.

    `gated(lam, dx, pulled, gates, f, n, b)` returns λ_n of ∂L/∂x_n, (∂S/∂x)ᵀ λ_{n+1} and (∂N/∂x)ᵀ ν_n, by the numbers
    gates[f, n] for all samples, one after the other or the same for all. `is_open(gates, f, n, first, count)` is not 0
    if one of so many samples has a gate of the controller that is not 0.
    """
    Row, record_of = row_functions(size, real).vector, _record_function(own, real)
    limited = _limit_function(own, size, real)

    @wp.func
    def physics_part(dx: Row, gates: wp.array3d[real], f: int, n: int, at: int):
        out = Row()
        for k in range(wp.static(size)):
            alpha = real(1.0)
            if k < wp.static(own):
                alpha = gates[f, n, at + k]
            if alpha != real(0.0):
                out[k] = alpha * dx[k]
        return out

    @wp.func
    def controller_part(pulled: Row, gates: wp.array3d[real], f: int, n: int, at: int):
        out = Row()
        for k in range(wp.static(size)):
            beta = real(1.0)
            if k < wp.static(own):
                beta = gates[f, n, at + wp.static(own) + k]
            elif k < wp.static(remembering):
                beta = gates[f, n, at + wp.static(2 * own)]
            if beta != real(0.0):
                out[k] = beta * pulled[k]
        return out

    @wp.func
    def gated(lam: Row, dx: Row, pulled: Row, gates: wp.array3d[real], f: int, n: int, b: int):
        at = record_of(gates, b)
        physics = physics_part(dx, gates, f, n, at)
        controller = controller_part(pulled, gates, f, n, at)
        limit = gates[f, n, at + wp.static(2 * own + 1)]
        if not wp.isinf(limit):
            controller = limited(physics, controller, limit)
        return lam + physics + controller

    @wp.func
    def size_of(gates: wp.array3d[real], f: int, n: int, at: int):
        total = real(0.0)
        for k in range(wp.static(own), wp.static(2 * own + int(remembering > own))):
            total += wp.abs(gates[f, n, at + k])
        return total

    @wp.func
    def is_open(gates: wp.array3d[real], f: int, n: int, first: int, count: int):
        total = real(0.0)
        for s in range(count):
            total += size_of(gates, f, n, record_of(gates, first + s))
        return wp.where(total != real(0.0), 1, 0)

    return gated, is_open
