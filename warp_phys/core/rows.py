"""Reading and writing rows of arrays as vectors inside kernels.

Every loop over the components of a row stands in a function of its own. Warp unrolls loops of up to 16 iterations; a
longer loop stays a loop, and the backward pass of the function that contains it does not run it again: values that such
a loop computes are missing there. A function call, however, is always run again. So the rule of this code base: what a
loop computes is what its function returns.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import warp as wp

REAL_TYPES: dict[type, type] = {np.float32: wp.float32, np.float64: wp.float64}
"""The precisions of the engine, numpy to Warp."""


def scalar_name(real: type) -> str:
    """Return the name of a precision in C++."""
    return "double" if real is wp.float64 else "float"


class RowFunctions(NamedTuple):
    """Warp functions on rows of one length and precision."""

    vector: Any
    """Vector type of the row."""
    load: Any
    """`load(array2d, row)` returns a row as a vector."""
    store: Any
    """`store(array2d, row, vector)` writes a row."""
    load_at: Any
    """`load_at(array3d, n, row)` returns a row of time step n."""
    store_at: Any
    """`store_at(array3d, n, row, vector)` writes a row of time step n."""


@functools.cache
def row_functions(length: int, real: type, written: int | None = None) -> RowFunctions:
    """Return the functions for rows of `length` numbers of type `real` (wp.float32 or wp.float64).

    Of a row only the first numbers are written, if `written` says how many.
    """
    stored = length if written is None else written
    Row = wp.types.vector(length=length, dtype=real)

    @wp.func
    def load_row(source: wp.array2d[real], row: int):
        out = Row()
        for i in range(wp.static(length)):
            out[i] = source[row, i]
        return out

    @wp.func
    def store_row(target: wp.array2d[real], row: int, value: Row):
        for i in range(wp.static(stored)):
            target[row, i] = value[i]

    @wp.func
    def load_row_at(source: wp.array3d[real], n: int, row: int):
        out = Row()
        for i in range(wp.static(length)):
            out[i] = source[n, row, i]
        return out

    @wp.func
    def store_row_at(target: wp.array3d[real], n: int, row: int, value: Row):
        for i in range(wp.static(stored)):
            target[n, row, i] = value[i]

    return RowFunctions(Row, load_row, store_row, load_row_at, store_row_at)


@functools.cache
def part_function(whole: Any, part: Any, first: int, count: int) -> Any:
    """Return the function that takes so many numbers of a vector, from the first one on; what `part` has more is 0."""

    @wp.func
    def part_of(given: whole):
        out = part()
        for i in range(wp.static(count)):
            out[i] = given[wp.static(first) + i]
        return out

    return part_of
