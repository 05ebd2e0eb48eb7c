"""The systems in JAX. States are batch-last inside the loop over time: neighbouring lanes hold neighbouring samples.

`step(state, control)`: state (…, batch), control (batch, K). `emit` gives what the loss needs of each time besides the
last state; it is linear. `cost(last state, emitted)` is the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case
from tests.benchmarks.jax_peer.quantum import quantum
from tests.benchmarks.jax_peer.repulsion import repulsion


class Physics(NamedTuple):
    """A system, and the step with what its derivative needs."""

    shape: tuple[int, ...]
    """Shape of one state."""
    step: Callable[..., Any]
    emit: Callable[..., Any]
    cost: Callable[..., Any]
    step_forward: Callable[..., Any]
    """(state, control) → next state, residuals."""
    step_backward: Callable[..., Any]
    """(residuals, adjoint of the next state) → adjoints of state and control."""


def make_physics(case: Case, by_hand: bool = False) -> Physics:
    """Return the system of a case; `by_hand` takes a hand-written derivative where there is a choice."""
    if case.system == "quantum":
        return Physics(*quantum(case))
    shape, step, emit, cost = repulsion(case, by_hand) if case.system == "repulsion" else cartpole(case)

    def step_forward(state: Any, control: Any) -> Any:
        return step(state, control), (state, control)

    def step_backward(residuals: Any, adjoint: Any) -> Any:
        # the step is computed again: cheaper than to keep its residuals
        return jax.vjp(step, *residuals)[1](adjoint)

    return Physics(shape, step, emit, cost, step_forward, step_backward)


def cartpole(case: Case, m: Any = 0.1, l: Any = 0.5) -> tuple[Any, ...]:
    """A cart with poles of mass m and half length l: state (poles + 1, 2, batch), the cart first."""
    g, M = 9.8, 1.1
    ml, dt = m * l, np.float32(case.dt)

    def step(state: Any, control: Any) -> Any:
        f, angle, rate = control[:, 0], state[1:, 0], state[1:, 1]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        q = sin * rate * rate
        bend = (g * sin - cos * ((f + ml * q) / M)) / (l * (4.0 / 3.0 - (m / M) * cos * cos))
        push = (f + ml * jnp.sum(q - bend * cos, 0)) / M
        rate = rate + dt * bend
        angle = angle + dt * rate
        speed = state[0, 1] + dt * push
        place = state[0, 0] + dt * speed
        return jnp.concatenate([jnp.stack([place, speed])[None], jnp.stack([angle, rate], 1)])

    def emit(state: Any, control: Any) -> Any:
        return ()

    def cost(state: Any, emitted: Any) -> Any:
        return 1 - jnp.mean(jnp.cos(state[1:, 0]))

    return (case.sizes["poles"] + 1, 2), step, emit, cost
