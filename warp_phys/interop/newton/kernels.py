"""Kernels that carry rows of states and controls over to Newton's arrays and back.

Newton keeps the worlds one after the other in each array, a row of ours has all arrays of one world side by side: the
numbers of world b are `numbers[b · width + i]` there and `rows[b, offset + i]` here.
"""

import warp as wp


@wp.kernel(enable_backward=False)
def spread_rows(
    # in
    rows: wp.array2d[float],
    offset: int,
    width: int,
    # out
    numbers: wp.array[float],
):
    """numbers ← rows, thread (world, column)."""
    b, i = wp.tid()
    numbers[b * width + i] = rows[b, offset + i]


@wp.kernel(enable_backward=False)
def collect_rows(
    # in
    numbers: wp.array[float],
    offset: int,
    width: int,
    # out
    rows: wp.array2d[float],
):
    """rows ← numbers, thread (world, column)."""
    b, i = wp.tid()
    rows[b, offset + i] = numbers[b * width + i]


@wp.kernel(enable_backward=False)
def steer(
    # in
    c: wp.array2d[float],
    index: wp.array[int],
    gain: wp.array[float],
    width: int,
    # out
    numbers: wp.array[float],
):
    """numbers ← gain · c, thread (world, control)."""
    b, k = wp.tid()
    numbers[b * width + index[k]] = gain[k] * c[b, k]


@wp.kernel(enable_backward=False)
def adj_steer(
    # in
    adj_numbers: wp.array[float],
    index: wp.array[int],
    gain: wp.array[float],
    width: int,
    # out
    adj_c: wp.array2d[float],
):
    """adj_c += gain · adj_numbers, thread (world, control): the adjoint of `steer`, exact."""
    b, k = wp.tid()
    adj_c[b, k] = adj_c[b, k] + gain[k] * adj_numbers[b * width + index[k]]


@wp.kernel(enable_backward=False)
def restore_wrenches(
    # in
    body_q_com: wp.array[wp.transform],
    solve_origin: wp.array[wp.vec3],
    # out
    wrenches: wp.array[wp.spatial_vector],
):
    """Undo (f, τ) → −(f, τ + r × f) of each body, r from the solver's origin to the centre of mass."""
    body = wp.tid()
    shifted = wrenches[body]
    f = -wp.spatial_top(shifted)
    r = wp.transform_get_translation(body_q_com[body]) - solve_origin[body]
    wrenches[body] = wp.spatial_vector(f, -wp.spatial_bottom(shifted) - wp.cross(r, f))


@wp.kernel(enable_backward=False)
def compare_rows(
    # in
    y: wp.array2d[float],
    again: wp.array2d[float],
    tolerance: float,
    # out
    apart: wp.array[float],
):
    """Largest |y − again| of a row by the row's largest number, 0 where within the tolerance; thread (world,)."""
    b = wp.tid()
    size, gap = float(0.0), float(0.0)  # noqa: UP018, a literal is a constant for Warp
    for i in range(y.shape[1]):
        u, v = y[b, i], again[b, i]
        if wp.isfinite(u) and wp.isfinite(v):
            size, gap = wp.max(size, wp.max(wp.abs(u), wp.abs(v))), wp.max(gap, wp.abs(u - v))
        elif u != v and not (wp.isnan(u) and wp.isnan(v)):
            gap = wp.inf
    apart[b] = wp.where(gap > tolerance * size, gap / size, 0.0)
