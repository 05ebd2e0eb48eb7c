"""Kernels of dense layers, made once per activation and precision."""

import functools
from typing import Any

import warp as wp

from warp_phys.programs.activations import activation

LANES = 64
"""Numbers that a thread of `activate_kernel` takes: a loop long enough to become vector instructions."""


@functools.cache
def _affine(real: type) -> Any:
    @wp.func
    def affine(x: wp.array2d[real], weight: wp.array2d[real], bias: wp.array[real], r: int, o: int):
        total = bias[o]
        for k in range(x.shape[1]):
            total += weight[o, k] * x[r, k]
        return total

    return affine


@functools.cache
def dense_kernel(name: str, real: type) -> wp.Kernel:
    """y = activation(x Wᵀ + b), differentiable on a tape; one thread per output."""
    affine, act = _affine(real), activation(name, real).value

    @wp.kernel(module="unique", enable_backward=True)
    def dense(
        # in
        x: wp.array2d[real],
        weight: wp.array2d[real],
        bias: wp.array[real],
        # out
        y: wp.array2d[real],
    ):
        r, o = wp.tid()
        y[r, o] = act(affine(x, weight, bias, r, o))

    return dense


@functools.cache
def dense_with_slope_kernel(name: str, real: type) -> wp.Kernel:
    """The same, and the slope of the activation; one thread per output."""
    affine, act, act_slope = _affine(real), activation(name, real).value, activation(name, real).slope

    @wp.kernel(module="unique", enable_backward=False)
    def dense_with_slope(
        # in
        x: wp.array2d[real],
        weight: wp.array2d[real],
        bias: wp.array[real],
        # out
        y: wp.array2d[real],
        slope: wp.array2d[real],
    ):
        r, o = wp.tid()
        z = affine(x, weight, bias, r, o)
        y[r, o] = act(z)
        slope[r, o] = act_slope(z)

    return dense_with_slope


@functools.cache
def slope_kernel(real: type) -> wp.Kernel:
    """delta[q] = adj[q] ∘ slope[q / repeat]: back through the activation."""

    @wp.kernel(module="unique", enable_backward=False)
    def through_activation(
        # in
        adj: wp.array2d[real],
        slope: wp.array2d[real],
        repeat: int,
        # out
        delta: wp.array2d[real],
    ):
        q, o = wp.tid()
        delta[q, o] = adj[q, o] * slope[q // repeat, o]

    return through_activation


@functools.cache
def transposed_kernel(real: type) -> wp.Kernel:
    """adj_x = delta W: back through the weights; one thread per input."""

    @wp.kernel(module="unique", enable_backward=False)
    def through_weights(
        # in
        delta: wp.array2d[real],
        weight: wp.array2d[real],
        # out
        adj_x: wp.array2d[real],
    ):
        q, k = wp.tid()
        total = real(0.0)
        for o in range(weight.shape[0]):
            total += delta[q, o] * weight[o, k]
        adj_x[q, k] = total

    return through_weights


@functools.cache
def contract_kernel(real: type) -> wp.Kernel:
    """adj_W += deltaᵀ x and adj_b += Σ delta over the rows; one thread per weight, so the order of sums is fixed."""

    @wp.kernel(module="unique", enable_backward=False)
    def contract_rows(
        # in
        delta: wp.array2d[real],
        x: wp.array2d[real],
        # in and out
        adj_weight: wp.array2d[real],
        adj_bias: wp.array[real],
    ):
        o, k = wp.tid()
        total = real(0.0)
        for r in range(delta.shape[0]):
            total += delta[r, o] * x[r, k]
        adj_weight[o, k] = adj_weight[o, k] + total
        if k == 0:
            total = real(0.0)
            for r in range(delta.shape[0]):
                total += delta[r, o]
            adj_bias[o] = adj_bias[o] + total

    return contract_rows


@functools.cache
def unit_rows_kernel(real: type) -> wp.Kernel:
    """Seeds of a Jacobian: row q is the unit vector q mod size."""

    @wp.kernel(module="unique", enable_backward=False)
    def unit_rows(size: int, seeds: wp.array2d[real]):
        q, o = wp.tid()
        seeds[q, o] = wp.where(q % size == o, real(1.0), real(0.0))

    return unit_rows


@functools.cache
def activate_kernel(name: str, real: type) -> wp.Kernel:
    """z becomes its activation in place, slope the activation's slope."""
    Lanes = wp.types.vector(length=LANES, dtype=real)
    act, act_slope = activation(name, real).value, activation(name, real).slope

    @wp.kernel(module="unique", enable_backward=False)
    def activate_lanes(z: wp.array[Lanes], slope: wp.array[Lanes]):
        i = wp.tid()
        v = z[i]
        s = Lanes()
        for j in range(LANES):
            s[j] = act_slope(v[j])
            v[j] = act(v[j])
        z[i] = v
        slope[i] = s

    return activate_lanes


@functools.cache
def copy_weight_kernel(real: type) -> wp.Kernel:
    """Copy a weight, whatever its strides; `wp.copy` of one that is not contiguous cannot be captured."""

    @wp.kernel(module="unique", enable_backward=False)
    def copy_weight(source: wp.array2d[real], target: wp.array2d[real]):
        o, k = wp.tid()
        target[o, k] = source[o, k]

    return copy_weight


@functools.cache
def copy_bias_kernel(real: type) -> wp.Kernel:
    """Copy a bias likewise."""

    @wp.kernel(module="unique", enable_backward=False)
    def copy_bias(source: wp.array[real], target: wp.array[real]):
        o = wp.tid()
        target[o] = source[o]

    return copy_bias
