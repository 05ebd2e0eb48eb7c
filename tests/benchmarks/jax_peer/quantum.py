"""A particle in a tilted box in JAX: state (points, 2, batch), real and imaginary parts.

Crank–Nicolson: φ = 2 A⁻¹ ψ − ψ with A = tridiag(−i h, 1 + i q, −i h), q = r + (dt / 2) u x, r = dt / dx², h = r / 2.
A is complex symmetric, so the adjoint is a solve with its conjugate, and the elimination's factors serve both.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.benchmarks.cases import Case, eigenstate


def quantum(case: Case) -> tuple[Any, ...]:
    """Return shape, step, emission, cost, and the step with its derivative by hand."""
    points, real = case.sizes["points"], np.float32
    dx = 2.0 / (points + 1)
    grid = (np.arange(1, points + 1) * dx).astype(real)
    r, half_dt = real(case.dt / dx / dx), real(0.5 * case.dt)
    target = eigenstate(case.sizes["target"], points).astype(real)
    solve_forward, solve_backward = tridiagonal_solver(real(0.5) * r)
    solve = jax.custom_vjp(lambda q, re, im: solve_forward(q, re, im)[0])
    solve.defvjp(solve_forward, solve_backward)

    def diagonal(control: Any) -> Any:
        return r + half_dt * grid[:, None] * control[:, 0]

    def step(state: Any, control: Any) -> Any:
        re, im = solve(diagonal(control), state[:, 0], state[:, 1])
        return 2 * jnp.stack([re, im], 1) - state

    def step_forward(state: Any, control: Any) -> Any:
        (re, im), residuals = solve_forward(diagonal(control), state[:, 0], state[:, 1])
        return 2 * jnp.stack([re, im], 1) - state, residuals

    def step_backward(residuals: Any, adjoint: Any) -> Any:
        adj_q, re, im = solve_backward(residuals, (2 * adjoint[:, 0], 2 * adjoint[:, 1]))
        adj_control = half_dt * jnp.sum(grid[:, None] * adj_q, 0)[:, None]
        return jnp.stack([re, im], 1) - adjoint, adj_control

    def emit(state: Any, control: Any) -> Any:
        return (jnp.sum(target[:, None, None] * state, 0),)

    def cost(state: Any, emitted: Any) -> Any:
        (overlap,) = emitted
        return jnp.mean(jnp.sum(1 - jnp.sum(overlap * overlap, -2), 0))

    return (points, 2), step, emit, cost, step_forward, step_backward


def tridiagonal_solver(h: Any) -> tuple[Any, Any]:
    """Return A⁻¹ b with its residuals, and its derivative; complex numbers as pairs, points first, batch last."""

    def eliminate(q: Any, b_re: Any, b_im: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            w_re, w_im, y_re, y_im = carry
            q, b_re, b_im = row
            p_re, p_im = 1 + h * h * w_re, q + h * h * w_im
            n = 1 / (p_re * p_re + p_im * p_im)
            w_re, w_im = p_re * n, -p_im * n
            t_re, t_im = b_re - h * y_im, b_im + h * y_re
            carry = w_re, w_im, t_re * w_re - t_im * w_im, t_re * w_im + t_im * w_re
            return carry, carry

        zero = jnp.zeros_like(q[0])
        return lax.scan(body, (zero,) * 4, (q, b_re, b_im))[1]

    def eliminate_again(w_re: Any, w_im: Any, b_re: Any, b_im: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            y_re, y_im = carry
            w_re, w_im, b_re, b_im = row
            t_re, t_im = b_re - h * y_im, b_im + h * y_re
            carry = t_re * w_re - t_im * w_im, t_re * w_im + t_im * w_re
            return carry, carry

        zero = jnp.zeros_like(b_re[0])
        return lax.scan(body, (zero,) * 2, (w_re, w_im, b_re, b_im))[1]

    def substitute(w_re: Any, w_im: Any, y_re: Any, y_im: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            w_re, w_im, y_re, y_im = row
            t_re, t_im = -h * carry[1], h * carry[0]
            carry = y_re + t_re * w_re - t_im * w_im, y_im + t_re * w_im + t_im * w_re
            return carry, carry

        zero = jnp.zeros_like(y_re[0])
        return lax.scan(body, (zero,) * 2, (w_re, w_im, y_re, y_im), reverse=True)[1]

    def forward(q: Any, b_re: Any, b_im: Any) -> Any:
        w_re, w_im, y_re, y_im = eliminate(q, b_re, b_im)
        x_re, x_im = substitute(w_re, w_im, y_re, y_im)
        return (x_re, x_im), (w_re, w_im, x_re, x_im)

    def backward(residuals: Any, adjoint: Any) -> Any:
        w_re, w_im, x_re, x_im = residuals
        y_re, y_im = eliminate_again(w_re, w_im, adjoint[0], -adjoint[1])
        g_re, g_im = substitute(w_re, w_im, y_re, y_im)
        return g_re * x_im + g_im * x_re, g_re, -g_im

    return forward, backward
