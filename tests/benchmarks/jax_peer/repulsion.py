"""Drivers and evaders in JAX: state (agents, 2, 2, batch), drivers first; positions, then velocities."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case

SOFTENING, FRIGHT, FLOCKING, FLOCK_DISTANCE, SPACING = 0.1, 15.0, 0.2, 0.5, 0.2
DRIVER_FRICTION, EVADER_FRICTION = 1.0, 4.0


def repulsion(case: Case, by_hand: bool) -> tuple[Any, ...]:
    """Return shape, step, emission and cost."""
    drivers, evaders, dt = case.sizes["drivers"], case.sizes["evaders"], np.float32(case.dt)
    forces = hand_written_forces(drivers, evaders) if by_hand else plain_forces(drivers)
    friction = np.array([DRIVER_FRICTION] * drivers + [EVADER_FRICTION] * evaders, np.float32)[:, None, None]

    def step(state: Any, control: Any) -> Any:
        batch = state.shape[-1]
        c = control.T.reshape(drivers, 2, batch)
        x, v = state[:, 0], state[:, 1]
        z = x[:drivers] - jnp.sum(x[drivers:], 0)
        steered = c[:, :1] * z + c[:, 1:] * jnp.stack([-z[:, 1], z[:, 0]], 1)
        a = forces(x) - friction * v + jnp.concatenate([steered, jnp.zeros((evaders, 2, batch), x.dtype)])
        return jnp.stack([x + dt * v, v + dt * a], 1)

    def emit(state: Any, control: Any) -> Any:
        return state[drivers:, 0], control

    def cost(state: Any, emitted: Any) -> Any:
        x, u = emitted
        return jnp.mean(x * x) + case.published.control_cost * jnp.mean(u * u)

    return (drivers + evaders, 2, 2), step, emit, cost


def plain_forces(drivers: int) -> Callable[..., Any]:
    """Forces between all agents, as one writes them, differentiated by JAX; x (agents, 2, batch)."""

    def distance(r: Any, same: bool) -> Any:
        squared = jnp.sum(r * r, -2)
        if same:  # an agent and itself: the root's slope at zero is infinite
            squared = squared + np.eye(r.shape[0], dtype=np.float32)[:, :, None]
        return SOFTENING + jnp.sqrt(squared)

    def forces(x: Any) -> Any:
        dogs, sheep = x[:drivers], x[drivers:]
        r = dogs[:, None] - sheep[None]
        frightened = jnp.sum(-(distance(r, False) ** -2)[:, :, None] * r, 0)
        r = sheep[:, None] - sheep[None]
        d = distance(r, True)
        flocking = jnp.sum(((FLOCK_DISTANCE / d - 1) / d)[:, :, None] * r, 0)
        r = dogs[None] - dogs[:, None]
        spaced = jnp.sum((distance(r, True) ** -2)[:, :, None] * r, 0)
        return jnp.concatenate([SPACING * spaced, FRIGHT * frightened + FLOCKING * flocking])

    return forces


def hand_written_forces(drivers: int, evaders: int) -> Callable[..., Any]:
    """Return the same with every pair once, gathered by matrices, and a derivative written by hand.

    The force along r on the second agent of a pair is (k2 / d² + k1 / d) r; the first feels the opposite, unless it is
    a driver that frightens.
    """
    agents = drivers + evaders
    chase = [(i, j) for i in range(drivers) for j in range(drivers, agents)]
    flock = [(i, j) for i in range(drivers, agents) for j in range(i + 1, agents)]
    space = [(i, j) for i in range(drivers) for j in range(i + 1, drivers)]
    first, second = np.array(chase + flock + space).T
    count, mutual = len(first), len(chase)
    kinds = np.repeat(np.arange(3), [len(chase), len(flock), len(space)])
    k2 = np.array([-FRIGHT, FLOCKING * FLOCK_DISTANCE, -SPACING], np.float32)[kinds][:, None]
    k1 = np.array([0.0, -FLOCKING, 0.0], np.float32)[kinds][:, None]
    gather, spread, back = (np.zeros(shape, np.float32) for shape in ((agents, count), (agents, count), (count, 1, 1)))
    pairs = np.arange(count)
    gather[second, pairs] = 1
    gather[first[mutual:], pairs[mutual:]] = -1
    spread[first, pairs] = 1
    spread[second, pairs] -= 1
    back[mutual:] = -1

    def forward(x: Any) -> Any:
        r = x[first] - x[second]
        length = jnp.sqrt(r[:, 0] * r[:, 0] + r[:, 1] * r[:, 1])
        i = 1 / (np.float32(SOFTENING) + length)
        w = (k2 * i + k1) * i
        return (gather @ (w[:, None] * r).reshape(count, -1)).reshape(x.shape), (r, length, i, w)

    def backward(residuals: Any, g: Any) -> Any:
        r, length, i, w = residuals
        g = g[second] + back * g[first]
        t = -(g[:, 0] * r[:, 0] + g[:, 1] * r[:, 1]) * (2 * k2 * i + k1) * i * i / length
        pulled = w[:, None] * g + t[:, None] * r
        return ((spread @ pulled.reshape(count, -1)).reshape(agents, 2, -1),)

    forces = jax.custom_vjp(lambda x: forward(x)[0])
    forces.defvjp(forward, backward)
    return forces
