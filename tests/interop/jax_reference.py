"""The cart-pole and its flows in JAX, unrolled by JAX itself, with `stop_gradient` where a flow stops feedback."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
import warp as wp


@contextlib.contextmanager
def double(device):
    """Compute in float64 on the JAX device that a Warp device is, or skip the test."""
    try:
        place = wp.device_to_jax(device)
    except RuntimeError:
        pytest.skip(f"JAX has no device {device}")
    with jax.enable_x64(True), jax.default_device(place):
        yield


def cart_pole_step(system, x, c):
    """One semi-implicit Euler step, batched over rows; written from the equations, not from the engine."""
    g, m, total, l, dt = system.gravity, system.pole_mass, system.total_mass, system.half_length, system.dt
    angle, rate, force = x[:, 2::2], x[:, 3::2], c
    push = (force + m * l * jnp.sin(angle) * rate**2) / total
    turn = (g * jnp.sin(angle) - jnp.cos(angle) * push) / (l * (4 / 3 - m * jnp.cos(angle) ** 2 / total))
    swing = (jnp.sin(angle) * rate**2 - turn * jnp.cos(angle)).sum(1, keepdims=True)
    speed = x[:, 1:2] + dt * (force + m * l * swing) / total
    rate = rate + dt * turn
    poles = jnp.stack([angle + dt * rate, rate], axis=2).reshape(len(x), -1)
    return jnp.concatenate([x[:, :1] + dt * speed, speed, poles], axis=1)


def gated(x, weight):
    """The identity forward; backward its adjoint is multiplied by `weight`."""
    return weight * x + jax.lax.stop_gradient((1 - weight) * x)


def unroll(step, controller, params, x0, gates):
    """Return states and controls of an unrolling whose feedback passes the gates, shape (steps, 2)."""

    def advance(x, gate):
        c = controller(params, gated(x, gate[1]))
        y = step(gated(x, gate[0]), c)
        return y, (y, c)

    _, (states, controls) = jax.lax.scan(advance, x0, gates)
    return jnp.concatenate([x0[None], states]), controls


@jax.custom_vjp
def _meeting(x, alpha, beta, limit):
    """The row that the physics is given, and that of the controller; backward both meet at the gates."""
    return x, x


def _meet(kept, adjoints):
    alpha, beta, limit = kept
    physics, controller = alpha * adjoints[0], beta * adjoints[1]
    lengths = [jnp.sqrt((part * part).sum(1, keepdims=True)) for part in (physics, controller)]
    shorter = jnp.where(lengths[1] > limit * lengths[0], limit * lengths[0] / lengths[1], 1.0)
    return physics + shorter * controller, *map(jnp.zeros_like, kept)


_meeting.defvjp(lambda x, *gates: (_meeting(x, *gates), gates), _meet)


def unroll_beside(step, controller, params, x0, inputs, memory, gates, limit=None):
    """Return states, controls and memories of an unrolling with inputs (T, 1 or B, E) and a memory (B, H), or None.

    The gates are α and β, shape (T, B or 1, D or 1), and γ, shape (T,); what is limited meets in a rule of its own.
    """

    def advance(carry, at):
        (x, h), (alpha, beta, gamma, w) = carry, at
        own, seen = (gated(x, alpha), gated(x, beta)) if limit is None else _meeting(x, alpha, beta, limit)
        more = [] if w is None else [jnp.broadcast_to(w, (len(x), w.shape[1]))]
        out = controller(params, seen, *more, *([] if h is None else [gated(h, gamma)]))
        c, h = (out, None) if h is None else out
        y = step(own, c) if w is None else step(own, c, more[0])
        return (y, h), (y, c, h)

    _, (states, controls, memories) = jax.lax.scan(advance, (x0, memory), (*gates, inputs))
    states = jnp.concatenate([x0[None], states])
    return states, controls, None if memory is None else jnp.concatenate([memory[None], memories])


def cart_pole_loss(states, controls, when, control_cost):
    """1 − mean cos θ over samples, poles and times, plus the control cost."""
    chosen = states[-1:] if when == "final" else states[1:]
    return 1 - jnp.cos(chosen[:, :, 2::2]).mean() + control_cost * (controls * controls).mean()


def relative(a, b):
    """Return ‖a − b‖ / ‖b‖ of two pytrees."""
    a, b = (jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
