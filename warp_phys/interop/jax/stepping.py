"""One step of a simulator as a JAX function."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from warp_phys.core.arrays import shape_message
from warp_phys.interop.jax import calls
from warp_phys.interop.jax.arrays import check_rows, key_of, real_of, rows_of_parameters
from warp_phys.interop.jax.system import JaxSystem
from warp_phys.rollout import check_sizes
from warp_phys.systems.base import Simulator, System
from warp_phys.systems.extended import ExtendedSimulator


def step(system: Simulator, x: Any, c: Any, parameters: Mapping[str, Any] | None = None) -> jax.Array:
    """Return y = S(x, c), shape (batch, D), differentiable in reverse mode with respect to x, c and p.

    Args:
        system: A `System`, a `JaxSystem`, or anything with `step` and `step_vjp`.
        x: States, shape (batch, D).
        c: Controls, shape (batch, K).
        parameters: Physical parameters by name, a number or one per sample each.

    Raises:
        TypeError, ValueError: Arguments that do not fit.
    """
    check_sizes(system, object())
    if isinstance(system, System) and system.inputs:
        raise TypeError(
            f"{type(system).__name__} has inputs ({', '.join(system.inputs)}): unroll it by rollout(…, inputs=w), or "
            "step rows [state, inputs] of warp_phys.systems.Extended"
        )
    x, c = check_rows("x", x, system), jnp.asarray(c)
    check_function(system, x)
    if c.shape != (len(x), system.control_size):
        raise ValueError(shape_message("c", (len(x), system.control_size), c.shape))
    if c.dtype != x.dtype:
        raise TypeError(f"c must hold {x.dtype} as x does, got {c.dtype}")
    return step_rows(key_of(system), x, c, rows_of_parameters(system, parameters, x))


def check_function(system: Any, x: jax.Array) -> None:
    """Raise if a simulator that is a JAX function is none for states `x`: before a program is made of it."""
    if isinstance(system, JaxSystem):
        system.traced(x, jnp.zeros((len(x), system.control_size), x.dtype))


# compiled, outside a caller's `jit` too: a call into the engine that is not would be compiled anew each time


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def step_rows(system: Any, x: jax.Array, c: jax.Array, rows: jax.Array | None) -> jax.Array:
    """Return S(x, c; p) for physical parameters as rows, None for a foreign system."""
    if isinstance(system, ExtendedSimulator):
        own = step_rows(system.wrapped, x[:, : system.own_size], c[:, : system.own_controls], rows)
        given = jnp.zeros((len(x), system.inputs_given), x.dtype)
        return jnp.concatenate([own, c[:, system.own_controls :], given], axis=1)
    if isinstance(system, JaxSystem):
        return system.traced(x, c)(x, c)
    if not isinstance(system, System):
        return calls.foreign_step_call(system, real_of(x))(x, c, output_dims=x.shape)[0]
    return calls.step_call(system.structure, real_of(x))(x, c, rows, output_dims=x.shape)[0]


@functools.partial(jax.jit, static_argnums=0)
def step_pull(
    system: Any, x: jax.Array, c: jax.Array, rows: Any, adj_y: jax.Array, y: jax.Array | None = None
) -> tuple:
    """Return (∂S/∂x)ᵀ adj_y, (∂S/∂c)ᵀ adj_y and (∂S/∂p)ᵀ adj_y.

    A foreign system that can compare its step with what the forward pass found is handed that, `y`.
    """
    if isinstance(system, ExtendedSimulator):
        size, written = system.own_size, system.written_size
        own_y = None if y is None else y[:, :size]
        dx, dc, _ = step_pull(system.wrapped, x[:, :size], c[:, : system.own_controls], rows, adj_y[:, :size], own_y)
        rest = jnp.zeros((len(x), system.state_size - size), x.dtype)
        return jnp.concatenate([dx, rest], axis=1), jnp.concatenate([dc, adj_y[:, size:written]], axis=1), None
    if isinstance(system, JaxSystem):
        return *jax.vjp(system.traced(x, c), x, c)[1](adj_y), None
    dims = {"adj_x": x.shape, "adj_c": c.shape}
    if not isinstance(system, System):
        compares = y is not None and calls.compares(system)
        inputs = (x, c, adj_y, y) if compares else (x, c, adj_y)
        return *calls.foreign_step_vjp_call(system, real_of(x), compares)(*inputs, output_dims=dims), None
    dims["adj_p"] = rows.shape
    return tuple(calls.step_vjp_call(system.structure, real_of(x))(x, c, rows, adj_y, output_dims=dims))


def _step_forward(system, x, c, rows):
    y = step_rows(system, x, c, rows)
    return y, (x, c, rows, y if calls.compares(system) else None)


def _step_backward(system, residuals, adj_y):
    x, c, rows, y = residuals
    return step_pull(system, x, c, rows, adj_y, y)


step_rows.defvjp(_step_forward, _step_backward)
