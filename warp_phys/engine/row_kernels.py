"""Kernels on rows that the backward pass needs besides those of systems and layers, one per precision."""

import functools
from typing import Any

import warp as wp

from warp_phys.core.flow_gates import gate_function
from warp_phys.core.rows import row_functions
from warp_phys.programs.rules import combined_body


@functools.cache
def sum_over_time_kernel(real: type) -> wp.Kernel:
    """total[f, b, i] += Σ_n values[f, n, b, i]."""

    @wp.kernel(module="unique", enable_backward=False)
    def sum_over_time(values: wp.array4d[real], total: wp.array3d[real]):
        f, b, i = wp.tid()
        value = real(0.0)
        for n in range(values.shape[1]):
            value += values[f, n, b, i]
        total[f, b, i] = total[f, b, i] + value

    return sum_over_time


@functools.cache
def add_rows_kernel(real: type) -> wp.Kernel:
    """total += values."""

    @wp.kernel(module="unique", enable_backward=False)
    def add_rows(values: wp.array2d[real], total: wp.array2d[real]):
        i, j = wp.tid()
        total[i, j] = total[i, j] + values[i, j]

    return add_rows


@functools.cache
def sum_rows_kernel(real: type) -> wp.Kernel:
    """out = a + b."""

    @wp.kernel(module="unique", enable_backward=False)
    def sum_rows(a: wp.array2d[real], b: wp.array2d[real], out: wp.array2d[real]):
        i, j = wp.tid()
        out[i, j] = a[i, j] + b[i, j]

    return sum_rows


@functools.cache
def pull_rows_kernel(real: type) -> wp.Kernel:
    """pulled = Jᵀ μ for the flows' μ of one step, J (batch, K, D)."""

    @wp.kernel(module="unique", enable_backward=False)
    def pull_rows(
        # in
        jacobian: wp.array3d[real],
        mu: wp.array3d[real],
        # out
        pulled: wp.array3d[real],
    ):
        f, b, i = wp.tid()
        total = real(0.0)
        for k in range(mu.shape[2]):
            total += jacobian[b, k, i] * mu[f, b, k]
        pulled[f, b, i] = total

    return pull_rows


@functools.cache
def gate_rows_kernel(real: type) -> wp.Kernel:
    """λ_n = ∂L/∂x_n + α (∂S/∂x)ᵀ λ_{n+1} + β (∂N/∂x)ᵀ μ_n; a gate of zero is a cut."""

    @wp.kernel(module="unique", enable_backward=False)
    def gate_rows(
        # in
        dx: wp.array3d[real],
        pulled: wp.array3d[real],
        loss_states: wp.array2d[real],
        gates: wp.array3d[real],
        n: int,
        # out
        lam: wp.array3d[real],
    ):
        f, b, i = wp.tid()
        value = loss_states[b, i]
        if gates[f, n, 0] != real(0.0):
            value += gates[f, n, 0] * dx[f, b, i]
        if gates[f, n, 1] != real(0.0):
            value += gates[f, n, 1] * pulled[f, b, i]
        lam[f, b, i] = value

    return gate_rows


@functools.cache
def gate_single_kernel(own: int, remembering: int, size: int, real: type) -> wp.Kernel:
    """The same with gates of single components, one thread per flow and sample, see `flow_gates`.

    What is given from outside, the last numbers of a row, has its adjoints written to `adj_inputs`, unless that is
    empty.
    """
    row, gated = row_functions(size, real), gate_function(own, remembering, size, real)
    load, load_at, store_at = row.load, row.load_at, row.store_at

    @wp.kernel(module="unique", enable_backward=False)
    def gate_single(
        # in
        dx: wp.array3d[real],
        pulled: wp.array3d[real],
        loss_states: wp.array2d[real],
        gates: wp.array3d[real],
        n: int,
        # out
        lam: wp.array3d[real],
        adj_inputs: wp.array3d[real],
    ):
        f, b = wp.tid()
        value = gated(load(loss_states, b), load_at(dx, f, b), load_at(pulled, f, b), gates, f, n, b)
        store_at(lam, f, b, value)
        if adj_inputs.shape[0] > 0:
            given = adj_inputs.shape[2]
            for i in range(given):
                adj_inputs[f, b, i] = lam[f, b, wp.static(size) - given + i]

    return gate_single


@functools.cache
def combine_kernel(rule: Any, real: type, summing: bool) -> wp.Kernel:
    """grad += C(sums + new) − C(sums); sums += new. C combines by one of `programs.rules.RULES`."""

    @wp.func_native(combined_body(rule))
    def combined(m: real, r: real) -> real: ...

    @wp.kernel(module="unique", enable_backward=False)
    def combine_update(
        # in
        new_base: wp.array2d[real],
        new_other: wp.array2d[real],
        # in and out
        sum_base: wp.array2d[real],
        sum_other: wp.array2d[real],
        grad: wp.array2d[real],
    ):
        i, j = wp.tid()
        base = sum_base[i, j] + new_base[i, j]
        other = sum_other[i, j] + new_other[i, j]
        before = combined(sum_base[i, j], sum_other[i, j])
        grad[i, j] = grad[i, j] + (combined(base, other) - before)
        if wp.static(summing):
            sum_base[i, j] = base
            sum_other[i, j] = other

    return combine_update
