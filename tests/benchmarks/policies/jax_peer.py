"""A policy's update in JAX as its users write it: plain functions, `lax.scan`, `jit` of `value_and_grad`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.jax_peer.flows import combine, plain
from tests.benchmarks.jax_peer.networks import Network
from tests.benchmarks.jax_peer.physics import make_physics
from tests.benchmarks.policies.weights import CELL, CHANNELS, CONSTANTS, HEADS, HIDDEN_STATE, LIMIT, make_policy_weights

Weights = Any


def layer(w: Weights, name: str, x: Any) -> Any:
    """A dense layer."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Any) -> Any:
    """Normalisation of each row, with torch's ε."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def chain(w: Weights, x: Any) -> Any:
    return layer(w, "last", jnp.tanh(layer(w, "second", jnp.tanh(layer(w, "first", x)))))


def layer_norm(w: Weights, x: Any) -> Any:
    h = jnp.tanh(norm(w, "first_norm", layer(w, "first", x)))
    return layer(w, "last", jnp.tanh(norm(w, "second_norm", layer(w, "second", h))))


def residual(w: Weights, x: Any) -> Any:
    h = jnp.tanh(layer(w, "first", x))
    return layer(w, "last", h + jnp.tanh(layer(w, "second", h)))


def angles(w: Weights, x: Any) -> Any:
    angle = x[:, 2]
    return chain(w, jnp.stack([jnp.sin(angle), jnp.cos(angle), x[:, 1], x[:, 3]], axis=1))


def clamped(w: Weights, x: Any) -> Any:
    return jnp.clip(LIMIT * chain(w, x), -LIMIT, LIMIT)


def attention(w: Weights, x: Any) -> Any:
    batch = len(x)
    numbers = jnp.concatenate([x, jnp.broadcast_to(jnp.array(CONSTANTS, x.dtype), (batch, len(CONSTANTS)))], axis=1)
    h = layer(w, "token", numbers[:, :, None]) + w["place"]
    q, k, v = (part.reshape(*part.shape[:2], HEADS, -1) for part in jnp.split(layer(w, "mix", h), 3, axis=2))
    scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.float32(np.sqrt(CHANNELS // HEADS))
    mixed = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores), v).reshape(h.shape)
    return layer(w, "last", (h + layer(w, "out", mixed)).reshape(batch, -1))


def gates(w: Weights, x: Any, hidden: Any) -> tuple[Any, Any]:
    """What goes into the gates of a cell, from its input and from its state."""
    own = hidden @ w["cell.weight_hh"].T + w["cell.bias_hh"]
    return x @ w["cell.weight_ih"].T + w["cell.bias_ih"], own


def gru(w: Weights, x: Any) -> Any:
    hidden = jnp.full((len(x), CELL), HIDDEN_STATE, x.dtype)
    a, b = (jnp.split(part, 3, axis=1) for part in gates(w, x, hidden))
    reset, keep = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
    fresh = jnp.tanh(a[2] + reset * b[2])
    return layer(w, "last", (1 - keep) * fresh + keep * hidden)


def lstm(w: Weights, x: Any) -> Any:
    hidden = jnp.full((len(x), CELL), HIDDEN_STATE, x.dtype)
    enter, forget, new, out = jnp.split(sum(gates(w, x, hidden)), 4, axis=1)
    memory = jax.nn.sigmoid(forget) * hidden + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return layer(w, "last", jax.nn.sigmoid(out) * jnp.tanh(memory))


FUNCTIONS: dict[str, Callable[[Weights, Any], Any]] = {
    "plain": chain,
    "layer norm": layer_norm,
    "residual": residual,
    "angles": angles,
    "clamped": clamped,
    "attention": attention,
    "GRU cell": gru,
    "LSTM cell": lstm,
}
"""By the names of `weights.POLICIES`; rows of states (batch, 4) to controls (batch, 1)."""


class Program:
    """The updates of a case; nothing is trained.

    Args:
        case: What to update.
        policy: A name of `weights.POLICIES`.
        calls: Compiled calls of an update of C: 1, or 2 with the rule after them.
    """

    def __init__(self, case: Case, policy: str, calls: int = 1):
        function, physics = FUNCTIONS[policy], make_physics(case)

        def forward(w: Weights, rows: Any) -> tuple[Any]:
            return (function(w, rows.reshape(len(rows), -1)),)

        nothing: Any = None
        gradient = plain(physics, Network(forward, nothing, nothing, nothing), case.steps)
        self.flow, self.calls = case.flow, calls
        self.compiled, self.combine = jax.jit(gradient, static_argnums=2), jax.jit(combine)
        self.weights = {name: jnp.asarray(array) for name, array in make_policy_weights(policy).items()}
        rows = (batch.reshape(len(batch), *physics.shape) for batch in make_batches(case))
        self.batches = [jnp.asarray(np.moveaxis(batch, 0, -1)) for batch in rows]

    def gradient(self, x0: Any) -> Any:
        """Return loss and update."""
        if self.calls == 1:
            return self.compiled(self.weights, x0, self.flow)
        (loss, m), (_, r) = (self.compiled(self.weights, x0, flow) for flow in "MR")
        return loss, self.combine(m, r)

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch, parameters by name."""
        loss, update = self.gradient(self.batches[0])
        return float(loss), [np.asarray(update[name]) for name in sorted(update)]

    def start(self) -> None:
        """Nothing is trained."""

    def run(self, updates: int) -> None:
        """Do a number of updates, and wait for them."""
        found: Any = None
        for i in range(updates):
            found = self.gradient(self.batches[i % len(self.batches)])
        jax.block_until_ready(found)
