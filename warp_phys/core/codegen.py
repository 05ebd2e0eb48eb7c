"""A fault of Warp's code generator, and its remedy."""

import functools
from typing import Any

import warp as wp

DOUBLES = (wp.float64, wp.int64, wp.uint64)


@functools.cache
def mend_constants() -> None:
    """Keep conversions of constants to 64 bits from taking the constant's own variable.

    Warp 1.19 makes the variable of the constant one of the wider type, and sets it at the place of the conversion. In
    `for i in range(3): y += x[i] * wp.float64(i)` the loop's counter is such a constant: x[i] reads it before it is
    set. What comes of that is up to the optimiser: without one, x[0] or what lies beyond x. Here each conversion gets a
    constant of its own.
    """
    adjoint: Any = getattr(wp._src.codegen, "Adjoint", None)  # Warp has no public name for it
    if adjoint is None or not hasattr(adjoint, "add_call") or not hasattr(adjoint, "add_constant"):
        return
    add_call = adjoint.add_call

    @functools.wraps(add_call)
    def add_call_with_own_constants(adj: Any, func: Any, args: Any, *others: Any, **named: Any) -> Any:
        value_type = getattr(func, "value_type", None)
        if value_type in DOUBLES and len(args) == 1 and getattr(args[0], "constant", None) is not None:
            args = [adj.add_constant(args[0].constant)]
        return add_call(adj, func, args, *others, **named)

    adjoint.add_call = add_call_with_own_constants
