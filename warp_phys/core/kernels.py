"""The kernels of a system, made from its Warp functions once per structure and precision.

A `structure` is a system without its numbers (`System.structure`): what a user sweeps travels in the
parameter struct and never shapes a kernel. Rows are samples; sample b uses row b mod length of the parameters.
"""

import functools
from typing import Any

import warp as wp

from warp_phys.core.flow_gates import gate_function
from warp_phys.core.rows import RowFunctions, row_functions


def state_row(structure: Any, real: type) -> RowFunctions:
    """Return the functions for rows of states, of which a step writes what is not given from outside."""
    return row_functions(structure.state_size, real, structure.written_size)


@functools.cache
def step_kernel(structure: Any, real: type) -> wp.Kernel:
    """One step, differentiable on a tape: y = S(x, c), rows of one thread each."""
    step, Parameters = structure.functions(real).step, structure.types(real).Parameters
    x_row, c_row = state_row(structure, real), row_functions(structure.control_size, real)
    load_x, load_c, store_x = x_row.load, c_row.load, x_row.store

    @wp.kernel(module="unique", enable_backward=True)
    def step_rows(
        # in
        x: wp.array2d[real],
        c: wp.array2d[real],
        p: wp.array[Parameters],
        # out
        y: wp.array2d[real],
    ):
        b = wp.tid()
        store_x(y, b, step(load_x(x, b), load_c(c, b), p[b % p.shape[0]]))

    return step_rows


@functools.cache
def trajectory_kernel(structure: Any, real: type) -> wp.Kernel:
    """All steps under given controls: states[n + 1] = S(states[n], controls[n]); one thread per sample."""
    step, Parameters = structure.functions(real).step, structure.types(real).Parameters
    x_row, c_row = state_row(structure, real), row_functions(structure.control_size, real)
    load_x, load_c, store_x = x_row.load_at, c_row.load_at, x_row.store_at

    @wp.kernel(module="unique", enable_backward=False)
    def trajectory_rows(
        # in
        controls: wp.array3d[real],
        p: wp.array[Parameters],
        # in and out: row 0 is read, the others are written
        states: wp.array3d[real],
    ):
        b = wp.tid()
        x = load_x(states, 0, b)
        for n in range(controls.shape[0]):
            x = step(x, load_c(controls, n, b), p[b % p.shape[0]])
            store_x(states, n + 1, b, x)
            if wp.static(structure.written_size < structure.state_size):
                x = load_x(states, n + 1, b)

    return trajectory_rows


@functools.cache
def weighted_step_function(structure: Any, real: type) -> Any:
    """⟨adj_y, S(x, c)⟩, whose gradient is the step's vector-Jacobian product."""
    types, step = structure.types(real), structure.functions(real).step
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def weighted_step(x: State, c: Control, p: Parameters, adj_y: State):
        return wp.dot(step(x, c, p), adj_y)

    return weighted_step


@functools.cache
def step_vjp_kernel(structure: Any, real: type) -> wp.Kernel:
    """The vector-Jacobian products of one step: (∂S/∂x)ᵀ adj_y, (∂S/∂c)ᵀ adj_y and, if asked, (∂S/∂p)ᵀ adj_y."""
    Parameters, weighted_step = structure.types(real).Parameters, weighted_step_function(structure, real)
    x_row, c_row = row_functions(structure.state_size, real), row_functions(structure.control_size, real)
    load_x, load_c, store_x, store_c = x_row.load, c_row.load, x_row.store, c_row.store

    @wp.kernel(module="unique", enable_backward=False)
    def step_vjp_rows(
        # in
        x: wp.array2d[real],
        c: wp.array2d[real],
        p: wp.array[Parameters],
        adj_y: wp.array2d[real],
        # out; adj_p of length 0 is not written
        adj_x: wp.array2d[real],
        adj_c: wp.array2d[real],
        adj_p: wp.array[Parameters],
    ):
        b = wp.tid()
        dx, dc, dp, _dy = wp.grad(weighted_step)(load_x(x, b), load_c(c, b), p[b % p.shape[0]], load_x(adj_y, b))
        store_x(adj_x, b, dx)
        store_c(adj_c, b, dc)
        if adj_p.shape[0] > 0:
            adj_p[b] = dp

    return step_vjp_rows


@functools.cache
def sweep_kernel(structure: Any, real: type, single: bool = False) -> wp.Kernel:
    """The sequential part of the backward pass, steps n = last − 1 … first, one thread per (flow, sample).

        μ_n = ∂L/∂c_n + (∂S/∂c)ᵀ λ_{n+1}
        λ_n = ∂L/∂x_n + α_n (∂S/∂x)ᵀ λ_{n+1} + β_n J_nᵀ μ_n,   J_n = ∂N/∂x at x_n

    A gate of zero is a cut, not a product: what lies behind it may be infinite. `gates` has α and β for each flow and
    step, or, with gates of `single` components, what `flow_gates` takes.
    """
    types, weighted_step = structure.types(real), weighted_step_function(structure, real)
    State, Control, Parameters = types.State, types.Control, types.Parameters
    x_row, c_row = row_functions(structure.state_size, real), row_functions(structure.control_size, real)
    load_x, load_c, store_x, store_c = x_row.load_at, c_row.load_at, x_row.store_at, c_row.store_at
    gated = gate_function(structure.own_size, structure.remembering_size, structure.state_size, real)
    written = structure.written_size

    @wp.func
    def store_given(adj_inputs: wp.array4d[real], f: int, n: int, b: int, lam: State):
        for i in range(wp.static(structure.state_size - written)):
            adj_inputs[f, n, b, i] = lam[wp.static(written) + i]

    @wp.func
    def pull_through_controller(jacobian: wp.array4d[real], n: int, b: int, mu: Control):
        out = State()
        for i in range(wp.static(structure.state_size)):
            total = real(0.0)
            for k in range(wp.static(structure.control_size)):
                total += jacobian[n, b, k, i] * mu[k]
            out[i] = total
        return out

    @wp.kernel(module="unique", enable_backward=False)
    def sweep_steps(
        # in; the arrays below start at time step `first`, but for the gates
        states: wp.array3d[real],
        controls: wp.array3d[real],
        p: wp.array[Parameters],
        jacobian: wp.array4d[real],
        loss_states: wp.array3d[real],
        loss_controls: wp.array3d[real],
        gates: wp.array3d[real],
        first: int,
        steps: int,
        # in and out
        adj_x: wp.array3d[real],
        # out; adj_p and adj_inputs of length 0 are not written
        adj_controls: wp.array4d[real],
        adj_p: wp.array3d[Parameters],
        adj_inputs: wp.array4d[real],
    ):
        f, b = wp.tid()
        own = p[b % p.shape[0]]
        lam = load_x(adj_x, f, b)
        for back in range(steps):
            n = steps - 1 - back
            dx, dc, dp, _dy = wp.grad(weighted_step)(load_x(states, n, b), load_c(controls, n, b), own, lam)
            if adj_p.shape[0] > 0:
                adj_p[f, n, b] = dp
            mu = dc + load_c(loss_controls, n, b)
            store_c(adj_controls[f], n, b, mu)
            lam = load_x(loss_states, n, b)
            if wp.static(single):
                pulled = State()
                if jacobian.shape[0] > 0:
                    pulled = pull_through_controller(jacobian, n, b, mu)
                lam = gated(lam, dx, pulled, gates, f, first + n, b)
                if adj_inputs.shape[0] > 0:
                    store_given(adj_inputs, f, n, b, lam)
            else:
                alpha = gates[f, first + n, 0]
                beta = gates[f, first + n, 1]
                if alpha != real(0.0):
                    lam += alpha * dx
                if beta != real(0.0) and jacobian.shape[0] > 0:
                    lam += beta * pull_through_controller(jacobian, n, b, mu)
        store_x(adj_x, f, b, lam)

    return sweep_steps


@functools.cache
def cost_kernel(structure: Any, real: type) -> wp.Kernel:
    """Pointwise cost at chosen times: costs[i, b] = cost(states[times[i], b]); differentiable on a tape."""
    cost, Parameters = structure.functions(real).cost, structure.types(real).Parameters
    load_x = row_functions(structure.state_size, real).load_at

    @wp.kernel(module="unique", enable_backward=True)
    def cost_rows(
        # in
        states: wp.array3d[real],
        times: wp.array[int],
        p: wp.array[Parameters],
        # out
        costs: wp.array2d[real],
    ):
        i, b = wp.tid()
        costs[i, b] = cost(load_x(states, times[i], b), p[b % p.shape[0]])

    return cost_rows


@functools.cache
def weighted_cost_function(structure: Any, real: type) -> Any:
    """adj_cost cost(x), whose gradient is the cost's vector-Jacobian product."""
    types, cost = structure.types(real), structure.functions(real).cost
    State, Parameters = types.State, types.Parameters

    @wp.func
    def weighted_cost(x: State, p: Parameters, adj_cost: real):
        return cost(x, p) * adj_cost

    return weighted_cost


@functools.cache
def cost_vjp_kernel(structure: Any, real: type) -> wp.Kernel:
    """Adjoint of `cost_kernel`: writes adj_states at the chosen times only, and adj_p if asked."""
    Parameters, weighted_cost = structure.types(real).Parameters, weighted_cost_function(structure, real)
    x_row = row_functions(structure.state_size, real)
    load_x, store_x = x_row.load_at, x_row.store_at

    @wp.kernel(module="unique", enable_backward=False)
    def cost_vjp_rows(
        # in
        states: wp.array3d[real],
        times: wp.array[int],
        p: wp.array[Parameters],
        adj_costs: wp.array2d[real],
        # out; adj_p of length 0 is not written
        adj_states: wp.array3d[real],
        adj_p: wp.array2d[Parameters],
    ):
        i, b = wp.tid()
        dx, dp, _da = wp.grad(weighted_cost)(load_x(states, times[i], b), p[b % p.shape[0]], adj_costs[i, b])
        store_x(adj_states, times[i], b, dx)
        if adj_p.shape[0] > 0:
            adj_p[i, b] = dp

    return cost_vjp_rows


@functools.cache
def mean_kernel(real: type) -> wp.Kernel:
    """total[0] += weight Σ values, differentiable on a tape."""

    @wp.kernel(module="unique", enable_backward=True)
    def add_weighted(values: wp.array2d[real], weight: real, total: wp.array[real]):
        i, j = wp.tid()
        wp.atomic_add(total, 0, weight * values[i, j])

    return add_weighted


@functools.cache
def mean_square_kernel(real: type) -> wp.Kernel:
    """total[0] += weight Σ values², differentiable on a tape."""

    @wp.kernel(module="unique", enable_backward=True)
    def add_weighted_squares(values: wp.array3d[real], weight: real, total: wp.array[real]):
        i, j, k = wp.tid()
        wp.atomic_add(total, 0, weight * values[i, j, k] * values[i, j, k])

    return add_weighted_squares
