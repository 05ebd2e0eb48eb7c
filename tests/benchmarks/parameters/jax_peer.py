"""An update with two physical parameters in JAX as its users write it: `lax.scan`, `jit` of `value_and_grad`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.jax_peer.flows import combine, unroll
from tests.benchmarks.jax_peer.networks import Network
from tests.benchmarks.jax_peer.physics import Physics, cartpole
from tests.benchmarks.policies.jax_peer import chain
from tests.benchmarks.policies.weights import make_policy_weights


class Program:
    """The updates of a case, all at the same weights and parameters.

    Args:
        case: What to update.
        per_sample: Whether each sample has parameters of its own.
        calls: Compiled calls of an update of C: 1, or 2 with the rule after them.
    """

    def __init__(self, case: Case, per_sample: bool, calls: int = 1):
        nothing: Any = None
        network = Network(lambda w, rows: (chain(w, rows.reshape(len(rows), -1)),), nothing, nothing, nothing)

        def loss(leaves: Any, x0: Any, flow: str) -> Any:
            weights, mass, length = leaves
            physics = Physics(*cartpole(case, mass, length), nothing, nothing)
            seen = jax.lax.stop_gradient if flow == "M" else lambda x: x
            return unroll(physics, network, case.steps, weights, x0, seen)

        def gradient(leaves: Any, x0: Any, flow: str) -> Any:
            if flow != "C":
                return jax.value_and_grad(loss)(leaves, x0, flow)
            value, m = jax.value_and_grad(loss)(leaves, x0, "M")
            return value, combine(m, jax.grad(loss)(leaves, x0, "R"))

        self.flow, self.calls = case.flow, calls
        self.compiled, self.combine = jax.jit(gradient, static_argnums=2), jax.jit(combine)
        shape = (case.batch,) if per_sample else ()
        weights = {name: jnp.asarray(array) for name, array in make_policy_weights("plain").items()}
        self.leaves = weights, jnp.full(shape, 0.1, jnp.float32), jnp.full(shape, 0.5, jnp.float32)
        rows = (batch.reshape(len(batch), case.sizes["poles"] + 1, 2) for batch in make_batches(case))
        self.batches = [jnp.asarray(np.moveaxis(batch, 0, -1)) for batch in rows]

    def update(self, x0: Any) -> Any:
        """Return loss and update."""
        if self.calls == 1:
            return self.compiled(self.leaves, x0, self.flow)
        (loss, m), (_, r) = (self.compiled(self.leaves, x0, flow) for flow in "MR")
        return loss, self.combine(m, r)

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch: weights by name, then parameters."""
        loss, (weights, *parameters) = self.update(self.batches[0])
        return float(loss), [np.asarray(a) for a in (*(weights[name] for name in sorted(weights)), *parameters)]

    def start(self) -> None:
        """Nothing is trained."""

    def run(self, updates: int) -> None:
        """Do a number of updates, and wait for them."""
        found: Any = None
        for i in range(updates):
            found = self.update(self.batches[i % len(self.batches)])
        jax.block_until_ready(found)
