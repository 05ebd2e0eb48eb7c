"""The gates of one step in JAX, where adjoints are pulled step by step: what `core.flow_gates` says in kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warp_phys.core.flow_gates import are_single
from warp_phys.systems.extended import row_sizes


def meeting(system: Any, gates: np.ndarray) -> Callable[..., jax.Array]:
    """Return a function of one step's gates, ∂L/∂x_n, (∂S/∂x)ᵀ λ_{n+1} and (∂N/∂x)ᵀ ν_n, None where it is cut, to λ_n.

    Args:
        system: The system of the rows.
        gates: See `phases.all_gates`.
    """
    size, (own, remembering) = system.state_size, row_sizes(system)
    single, width = are_single(gates), 2 * own + 2
    limited = single and bool(np.isfinite(gates.reshape(-1, width)[:, -1]).any())

    def meet(numbers: jax.Array, adj_x: jax.Array, dx: jax.Array, pulled: jax.Array | None) -> jax.Array:
        alpha, beta, limit = numbers[:1], numbers[1:2], numbers[:0]
        if single:
            record = numbers.reshape(-1, width)
            ones = jnp.ones((len(record), size - own), numbers.dtype)
            memory = jnp.repeat(record[:, -2:-1], remembering - own, axis=1)
            alpha = jnp.concatenate([record[:, :own], ones], axis=1)
            beta = jnp.concatenate([record[:, own : 2 * own], memory, ones[:, : size - remembering]], axis=1)
            limit = record[:, -1:]
        physics = _gated(alpha, dx)
        total = adj_x + physics
        if pulled is None:
            return total
        controller = _gated(beta, pulled)
        if limited:
            bounded = _limited(physics[:, :own], controller[:, :own], limit)
            controller = jnp.concatenate([bounded, controller[:, own:]], axis=1)
        return total + controller

    return meet


def _limited(physics: jax.Array, controller: jax.Array, limit: jax.Array) -> jax.Array:
    """Return the controller's feedback on states, of a length of at most `limit` times that of the physics'."""
    (least, below), (_, length) = map(_length, (physics, controller))
    bound = jnp.where(least > 0.0, limit * below, 0.0)
    factor = jnp.where(length > bound, bound / jnp.where(length > 0.0, length, 1.0), 1.0)
    is_cut = ~jnp.isfinite(controller).all(axis=1, keepdims=True) | (limit == 0.0)
    factor = jnp.where(jnp.isinf(limit), 1.0, jnp.where(is_cut, 0.0, factor))
    return _gated(factor, controller)


def _length(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the size of the largest component and the length of each row; squares of large numbers do not overflow."""
    most = jnp.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / jnp.where(most > 0.0, most, 1.0)
    return most, most * jnp.sqrt((scaled * scaled).sum(axis=1, keepdims=True))


def _gated(gate: jax.Array, value: jax.Array) -> jax.Array:
    """Return the product; a gate of zero is a cut: what lies behind it may be infinite."""
    return jnp.where(gate == 0.0, 0.0, gate * value)
