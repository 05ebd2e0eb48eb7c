"""An update in JAX: loss, update by flow and Adam in one compiled call, or several updates in one call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.benchmarks.cases import EPSILON, RATE, Case, make_batches, make_weights
from tests.benchmarks.jax_peer.flows import make_gradient
from tests.benchmarks.jax_peer.networks import make_network
from tests.benchmarks.jax_peer.physics import make_physics


class Program:
    """The updates of a case.

    Args:
        case: What to update.
        variant: "plain", "shared" or "deferred", see `flows.make_gradient`.
        inner: Updates of one compiled call.
        by_hand: Whether repulsion's forces have a hand-written derivative.
    """

    def __init__(self, case: Case, variant: str = "plain", inner: int = 1, by_hand: bool = False):
        physics, self.inner = make_physics(case, by_hand), inner
        self.flow = case.flow
        self.gradient = make_gradient(variant, physics, make_network(case), case.steps)
        rows = [batch.reshape(len(batch), *physics.shape) for batch in make_batches(case)]
        self.first = jnp.asarray(np.moveaxis(rows[0], 0, -1))
        batches = [np.moveaxis(batch, 0, -1) for batch in rows]
        if inner > 1:
            starts = range(0, len(batches), inner)
            batches = [np.stack([batches[(i + j) % len(batches)] for j in range(inner)]) for i in starts]
        self.batches = [jnp.asarray(batch) for batch in batches]
        self.weights = [jnp.asarray(array) for array in make_weights(case)]
        self.call = jax.jit(self._many if inner > 1 else self._one, donate_argnums=0)

    def _one(self, training: Any, x0: Any) -> Any:
        weights, moments, count = training
        loss, update = self.gradient(weights, x0, self.flow)
        weights, moments = adam(weights, moments, update, count + 1)
        return (weights, moments, count + 1), loss

    def _many(self, training: Any, x0: Any) -> Any:
        return lax.scan(self._one, training, x0)

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch at the initial weights."""
        loss, update = jax.jit(self.gradient, static_argnums=2)(self.weights, self.first, self.flow)
        return float(loss), [np.asarray(array) for array in update]

    def start(self) -> None:
        """Go back to the initial weights."""
        moments = [(jnp.zeros_like(w), jnp.zeros_like(w)) for w in self.weights]
        self.training = jax.block_until_ready(
            ([jnp.copy(w) for w in self.weights], moments, jnp.zeros((), jnp.float32))
        )

    def run(self, updates: int) -> None:
        """Do a number of updates, a multiple of `inner`, and wait for them."""
        for i in range(updates // self.inner):
            self.training, _ = self.call(self.training, self.batches[i % len(self.batches)])
        jax.block_until_ready(self.training)


def adam(weights: Any, moments: Any, update: Any, count: Any) -> tuple[list[Any], list[Any]]:
    """One step of Adam with the usual decays."""
    first, second = 0.9, 0.999
    new_weights, new_moments = [], []
    for w, (m, v), g in zip(weights, moments, update, strict=True):
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
        move = (m / (1 - first**count)) / (jnp.sqrt(v / (1 - second**count)) + EPSILON)
        new_weights.append(w - RATE * move)
        new_moments.append((m, v))
    return new_weights, new_moments
