"""The mass matrix H = Jᵀ M J of SolverFeatherstone, body by body: M is block diagonal, and most of J is zero.

Newton's own kernel takes both for dense matrices, in its tile mode not; that seam is used here. The numbers are the
same but for rounding.
"""

from typing import Any

import newton
import warp as wp


@wp.func
def motion(J: wp.array3d[float], n: int, b: int, i: int) -> wp.spatial_vector:
    """Return what degree of freedom i does to body b of articulation n."""
    r = 6 * b
    return wp.spatial_vector(J[n, r, i], J[n, r + 1, i], J[n, r + 2, i], J[n, r + 3, i], J[n, r + 4, i], J[n, r + 5, i])


@wp.func
def block(M: wp.array3d[float], n: int, b: int) -> wp.spatial_matrix:
    """Return the spatial inertia of body b of articulation n."""
    I = wp.spatial_matrix()
    for k in range(6):
        for l in range(6):
            I[k, l] = M[n, 6 * b + k, 6 * b + l]
    return I


@wp.func
def add_up_inertia(J: wp.array3d[float], M: wp.array3d[float], n: int, lane: int, lanes: int, H: wp.array3d[float]):
    """H[n] ← Jᵀ M J, every `lanes`-th column; M symmetric."""
    bodies, dofs = J.shape[1] // 6, J.shape[2]
    for j in range(lane, dofs, lanes):
        for i in range(j + 1):
            H[n, i, j] = 0.0
        for b in range(bodies):
            s = motion(J, n, b, j)
            if wp.max(wp.abs(s)) > 0.0:
                p = block(M, n, b) * s
                for i in range(j + 1):
                    H[n, i, j] = H[n, i, j] + wp.dot(motion(J, n, b, i), p)
        for i in range(j):
            H[n, j, i] = H[n, i, j]


@wp.func_grad(add_up_inertia)
def adj_add_up_inertia(J: wp.array3d[float], M: wp.array3d[float], n: int, lane: int, lanes: int, H: wp.array3d[float]):
    """adj_J += M J (G + Gᵀ), adj_M += ½ J (G + Gᵀ) Jᵀ with G = adj_H, every `lanes`-th body.

    Exact where M is a function with symmetric values. A degree of freedom that does not move a body has no adjoint
    there: its zeros stay zeros.
    """
    bodies, dofs = J.shape[1] // 6, J.shape[2]
    for b in range(lane, bodies, lanes):
        I = block(M, n, b)
        adj_I = wp.spatial_matrix()
        for j in range(dofs):
            s = motion(J, n, b, j)
            if wp.max(wp.abs(s)) > 0.0:
                a = wp.spatial_vector()
                for i in range(dofs):
                    a += (wp.adjoint[H][n, i, j] + wp.adjoint[H][n, j, i]) * motion(J, n, b, i)
                adj_s = I * a
                for k in range(6):
                    wp.adjoint[J][n, 6 * b + k, j] += adj_s[k]
                adj_I += 0.5 * wp.outer(a, s)
        for k in range(6):
            for l in range(6):
                wp.adjoint[M][n, 6 * b + k, 6 * b + l] += adj_I[k, l]


@wp.kernel
def form_inertia(
    # in
    J: wp.array3d[float],
    M: wp.array3d[float],
    # out
    H: wp.array3d[float],
):
    """H ← Jᵀ M J, thread (articulation, lane)."""
    n, lane = wp.tid()
    add_up_inertia(J, M, n, lane, wp.block_dim(), H)


def make_featherstone(model: newton.Model) -> newton.solvers.SolverFeatherstone:
    """Return a SolverFeatherstone that forms its mass matrices by `form_inertia`."""
    solver: Any = newton.solvers.SolverFeatherstone(model, use_tile_gemm=True, fuse_cholesky=False)
    if model.joint_count:
        solver._tile_kernels_by_size = dict.fromkeys(solver._tile_kernels_by_size, form_inertia)
    return solver
