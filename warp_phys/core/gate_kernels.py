"""Kernels of the adjoint gate, one per number of dimensions and precision."""

import functools

import warp as wp


@functools.cache
def gate_kernel(dimensions: int, real: type) -> wp.Kernel:
    """adj_x += weight adj_y; done = 0. A weight of zero is a cut, not a product: what it stops may be infinite.

    `done` is adj_y again: an argument is read or written, as Warp's `verify_autograd_array_access` has it.
    """
    return (_gate_1, _gate_2, _gate_3, _gate_4)[dimensions - 1](real)


def _weigh(real):
    @wp.func
    def weigh(weight: wp.array[real], row: int, adj: real):
        w = weight[row % weight.shape[0]]
        return wp.where(w == real(0.0), real(0.0), w * adj)

    return weigh


def _gate_1(real):
    weigh = _weigh(real)

    @wp.kernel(module="unique", enable_backward=False)
    def gate_1d(weight: wp.array[real], adj_y: wp.array[real], adj_x: wp.array[real], done: wp.array[real]):
        i = wp.tid()
        adj_x[i] = adj_x[i] + weigh(weight, i, adj_y[i])
        done[i] = real(0.0)

    return gate_1d


def _gate_2(real):
    weigh = _weigh(real)

    @wp.kernel(module="unique", enable_backward=False)
    def gate_2d(weight: wp.array[real], adj_y: wp.array2d[real], adj_x: wp.array2d[real], done: wp.array2d[real]):
        i, j = wp.tid()
        adj_x[i, j] = adj_x[i, j] + weigh(weight, i, adj_y[i, j])
        done[i, j] = real(0.0)

    return gate_2d


def _gate_3(real):
    weigh = _weigh(real)

    @wp.kernel(module="unique", enable_backward=False)
    def gate_3d(weight: wp.array[real], adj_y: wp.array3d[real], adj_x: wp.array3d[real], done: wp.array3d[real]):
        i, j, k = wp.tid()
        adj_x[i, j, k] = adj_x[i, j, k] + weigh(weight, i, adj_y[i, j, k])
        done[i, j, k] = real(0.0)

    return gate_3d


def _gate_4(real):
    weigh = _weigh(real)

    @wp.kernel(module="unique", enable_backward=False)
    def gate_4d(weight: wp.array[real], adj_y: wp.array4d[real], adj_x: wp.array4d[real], done: wp.array4d[real]):
        i, j, k, m = wp.tid()
        adj_x[i, j, k, m] = adj_x[i, j, k, m] + weigh(weight, i, adj_y[i, j, k, m])
        done[i, j, k, m] = real(0.0)

    return gate_4d
