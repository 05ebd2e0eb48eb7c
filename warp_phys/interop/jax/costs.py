"""The loss of a trajectory as a JAX function."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from warp_phys.core.checks import check_given
from warp_phys.interop.jax import calls
from warp_phys.interop.jax.arrays import as_jax_array, key_of, real_of, rows_of_parameters
from warp_phys.systems.losses import COSTS, When


def loss(
    system: Any,
    states: Any,
    controls: Any = None,
    when: When = "final",
    control_cost: float = 0.0,
    parameters: Mapping[str, Any] | None = None,
    inputs: Any = None,
) -> jax.Array:
    """Return `system.loss` of a trajectory as a JAX scalar, differentiable in reverse mode; see `System.loss`.

    `system.loss(states, …)` is the same for JAX arrays; this one takes numpy arrays for JAX arrays too.

    Raises:
        ValueError, TypeError: As `System.loss` does.
    """
    states = as_jax_array("states", states)
    controls = None if controls is None else as_jax_array("controls", controls)
    check_given(getattr(system, "parameter_names", ()), {} if parameters is None else parameters)
    own: dict[str, Any] = {"parameters": parameters} if parameters else {}
    own |= {} if inputs is None else {"inputs": as_jax_array("inputs", inputs)}
    return system.loss(states, controls, when=when, control_cost=control_cost, **own)


def pointwise_cost(system: Any, states: jax.Array, times: Sequence[int], parameters: Mapping[str, Any]) -> jax.Array:
    """Return the pointwise cost at chosen times, shape (times, batch), differentiable.

    Args:
        system: A `System`.
        states: Shape (steps + 1, batch, D), float32 or float64.
        times: Distinct steps.
        parameters: Physical parameters by name; they may be differentiated too.

    Raises:
        TypeError: States of another precision.
    """
    if states.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"states must hold float32 or float64, got {states.dtype}")
    return _costs(key_of(system), tuple(times), states, rows_of_parameters(system, parameters, states[0]))


COSTS["jax"] = pointwise_cost


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _costs(system: Any, times: tuple[int, ...], states: jax.Array, rows: jax.Array) -> jax.Array:
    call = calls.cost_call(system.structure, real_of(states))
    return call(states, _chosen(times), rows, output_dims=(len(times), states.shape[1]))[0]


def _costs_forward(system, times, states, rows):
    return _costs(system, times, states, rows), (states, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _costs_backward(system, times, residuals, adj_costs):
    states, rows = residuals
    call = calls.cost_vjp_call(system.structure, real_of(states))
    dims = {"adj_states": states.shape, "adj_p": (len(times), *rows.shape)}
    adj_states, adj_p = call(states, _chosen(times), rows, adj_costs, output_dims=dims)
    return adj_states, adj_p.sum(axis=0)


_costs.defvjp(_costs_forward, _costs_backward)


def _chosen(times: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(times, jnp.int32)
