"""Loss and update by flow: as one writes it in JAX, and two ways to spare what C computes twice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.benchmarks.jax_peer.networks import Network
from tests.benchmarks.jax_peer.physics import Physics

Gradient = Callable[[Any, Any, str], Any]


def make_gradient(variant: str, physics: Physics, network: Network, steps: int) -> Gradient:
    """Return `gradient(weights, initial states, flow)` → loss, update.

    plain: `value_and_grad`, for C twice. shared: for C one forward pass, both backward passes by `vmap` over a gate.
    deferred: a reverse scan by hand, with the weight gradients after it as one product, M's controller wholly outside
    of it, and for C one scan with two adjoints: the three phases of this engine.
    """
    make = {"plain": plain, "shared": shared, "deferred": deferred}[variant]
    return make(physics, network, steps)


def to_rows(states: Any) -> Any:
    """Batch-last states, as the controller reads them: batch first."""
    return jnp.moveaxis(states, -1, 0)


def combine(m: Any, r: Any) -> Any:
    """M where the signs agree, else 0."""
    return jax.tree.map(lambda m, r: jnp.where(jnp.sign(m) == jnp.sign(r), m, 0), m, r)


def unroll(physics: Physics, network: Network, steps: int, weights: Any, x0: Any, seen: Callable[[Any], Any]) -> Any:
    """Return the loss of an unrolling whose controller is shown `seen(state)`."""

    def body(x: Any, _: Any) -> Any:
        u = network.forward(weights, to_rows(seen(x)))[0]
        x = physics.step(x, u)
        return x, physics.emit(x, u)

    return physics.cost(*lax.scan(body, x0, None, length=steps))


def plain(physics: Physics, network: Network, steps: int) -> Gradient:
    """Flows by `stop_gradient`, each with a pass of its own."""

    def loss(weights: Any, x0: Any, flow: str) -> Any:
        seen = lax.stop_gradient if flow == "M" else lambda x: x
        return unroll(physics, network, steps, weights, x0, seen)

    return by_flow(loss)


def by_flow(loss: Callable[[Any, Any, str], Any]) -> Gradient:
    """Loss and update of a loss of (weights, initial states, flow), for C from a pass each for M and R."""

    def gradient(weights: Any, x0: Any, flow: str) -> Any:
        if flow != "C":
            return jax.value_and_grad(loss)(weights, x0, flow)
        value, m = jax.value_and_grad(loss)(weights, x0, "M")
        return value, combine(m, jax.grad(loss)(weights, x0, "R"))

    return gradient


@jax.custom_vjp
def gate(x: Any, weight: Any) -> Any:
    """x; its adjoint is weighted."""
    return x


gate.defvjp(lambda x, weight: (x, weight), lambda weight, adjoint: (weight * adjoint, jnp.zeros_like(weight)))


def shared(physics: Physics, network: Network, steps: int) -> Gradient:
    """One forward pass for both parts of C."""

    def loss(weights: Any, x0: Any, open_: Any) -> Any:
        return unroll(physics, network, steps, weights, x0, lambda x: gate(x, open_))

    def gradient(weights: Any, x0: Any, flow: str) -> Any:
        if flow != "C":
            return plain(physics, network, steps)(weights, x0, flow)
        both = jax.vmap(jax.value_and_grad(loss), in_axes=(None, None, 0))
        value, g = both(weights, x0, jnp.array([0, 1], jnp.float32))
        return value[0], combine([a[0] for a in g], [a[1] for a in g])

    return gradient


def deferred(physics: Physics, network: Network, steps: int) -> Gradient:
    """Three phases: unroll and keep, sweep adjoints back in time, contract them with what was kept."""

    def gradient(weights: Any, x0: Any, flow: str) -> Any:
        def forward(x: Any, _: Any) -> Any:
            u, kept = network.forward(weights, to_rows(x))
            y, residuals = physics.step_forward(x, u)
            return y, (physics.emit(y, u), residuals, kept)

        last, (emitted, residuals, kept) = lax.scan(forward, x0, None, length=steps)
        value, (adj_last, adj_emitted) = jax.value_and_grad(physics.cost, argnums=(0, 1))(last, emitted)
        u_like = jax.eval_shape(lambda x: network.forward(weights, to_rows(x))[0], x0)

        def through_physics(adjoint: Any, g: Any, residuals: Any) -> Any:
            # `emit` is linear
            adj_y, adj_u = jax.linear_transpose(physics.emit, x0, u_like)(g) if g else (0, 0)
            adj_x, adj_c = physics.step_backward(residuals, adjoint + adj_y)
            return adj_x, adj_c + adj_u

        def back_r(adjoint: Any, at: Any) -> Any:
            g, residuals, kept = at
            adj_x, adj_u = through_physics(adjoint, g, residuals)
            d = network.deltas(weights, kept, adj_u)
            rows = network.to_inputs(weights, d).reshape(to_rows(x0).shape)
            return adj_x + jnp.moveaxis(rows, 0, -1), d

        def back_m(adjoint: Any, at: Any) -> Any:
            return through_physics(adjoint, at[0], at[1])

        def back_c(adjoints: Any, at: Any) -> Any:
            (r, d), (m, adj_u) = back_r(adjoints[0], at), back_m(adjoints[1], at)
            return (r, m), (d, adj_u)

        def contract_r(d: Any) -> Any:
            return network.to_weights(weights, kept, d)

        def contract_m(adj_u: Any) -> Any:
            return contract_r(network.deltas(weights, kept, adj_u))

        def sweep(body: Any, start: Any) -> Any:
            return lax.scan(body, start, (adj_emitted, residuals, kept), reverse=True)[1]

        if flow == "R":
            return value, contract_r(sweep(back_r, adj_last))
        if flow == "M":
            return value, contract_m(sweep(back_m, adj_last))
        d, adj_u = sweep(back_c, (adj_last, adj_last))
        return value, combine(contract_m(adj_u), contract_r(d))

    return gradient
