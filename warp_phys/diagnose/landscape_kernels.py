"""Kernels of the landscape: the controller N(x; θ) = θ1 x² + θ2 x with a θ of its own for every sample.

Only what the controller adds stands here, an unrolling and a contraction; cost and sweep are the engine's own kernels.
"""

import functools
from typing import Any, NamedTuple

import warp as wp

from warp_phys.core.rows import row_functions


class ControlFunctions(NamedTuple):
    """Warp functions of the controller in one precision."""

    control: Any
    """`control(x, theta)` returns N(x; θ) = θ1 x² + θ2 x."""
    adj_control_x: Any
    """`adj_control_x(x, theta)` returns ∂N/∂x, exact."""
    adj_control_theta: Any
    """`adj_control_theta(x)` returns ∂N/∂θ, exact: N is linear in θ."""


@functools.cache
def control_functions(real: type) -> ControlFunctions:
    """Return the controller and its derivatives."""
    Theta = row_functions(2, real).vector

    @wp.func
    def control(x: real, theta: Theta):
        return theta[0] * x * x + theta[1] * x

    @wp.func
    def adj_control_x(x: real, theta: Theta):
        return real(2.0) * theta[0] * x + theta[1]

    @wp.func
    def adj_control_theta(x: real):
        return Theta(x * x, x)

    return ControlFunctions(control, adj_control_x, adj_control_theta)


@functools.cache
def unroll_kernel(structure: Any, real: type) -> wp.Kernel:
    """Unroll from p.start and linearise: states, controls and J_n = ∂N/∂x at x_n, one thread per sample."""
    types, step = structure.types(real), structure.functions(real).step
    State, Control, Parameters = types.State, types.Control, types.Parameters
    load_theta, functions = row_functions(2, real).load, control_functions(real)
    control, adj_control_x = functions.control, functions.adj_control_x

    @wp.kernel(module="unique", enable_backward=False)
    def unroll_samples(
        # in
        theta: wp.array2d[real],
        p: wp.array[Parameters],
        # out
        states: wp.array3d[real],
        controls: wp.array3d[real],
        jacobian: wp.array4d[real],
    ):
        b = wp.tid()
        own_theta = load_theta(theta, b)
        own = p[b % p.shape[0]]
        x = State(own.start)
        states[0, b, 0] = x[0]
        for n in range(controls.shape[0]):
            c = control(x[0], own_theta)
            controls[n, b, 0] = c
            jacobian[n, b, 0, 0] = adj_control_x(x[0], own_theta)
            x = step(x, Control(c), own)
            states[n + 1, b, 0] = x[0]

    return unroll_samples


@functools.cache
def contract_kernel(real: type) -> wp.Kernel:
    """updates[f, b] = Σ_n (∂N/∂θ at x_n)ᵀ μ[f, n, b], one thread per (flow, sample)."""
    theta_row, adj_control_theta = row_functions(2, real), control_functions(real).adj_control_theta
    Theta, store_theta = theta_row.vector, theta_row.store_at

    @wp.kernel(module="unique", enable_backward=False)
    def contract_samples(
        # in
        states: wp.array3d[real],
        mu: wp.array4d[real],
        # out
        updates: wp.array3d[real],
    ):
        f, b = wp.tid()
        total = Theta()
        for n in range(mu.shape[1]):
            total += mu[f, n, b, 0] * adj_control_theta(states[n, b, 0])
        store_theta(updates, f, b, total)

    return contract_samples
