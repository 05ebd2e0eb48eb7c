"""A policy's update in JAX as its users write it: plain functions, `lax.scan`, `jit` of `value_and_grad`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.jax_peer.flows import by_flow, combine, plain, to_rows
from tests.benchmarks.jax_peer.networks import Network
from tests.benchmarks.jax_peer.physics import Physics, make_physics
from tests.benchmarks.policies.weights import (
    CELL,
    CHANNELS,
    CONSTANTS,
    HEADS,
    HIDDEN_STATE,
    LIMIT,
    MEMORY,
    make_inputs,
    make_policy_weights,
)  # fmt: skip

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


def gru_cell(w: Weights, x: Any, hidden: Any) -> Any:
    a, b = (jnp.split(part, 3, axis=1) for part in gates(w, x, hidden))
    reset, keep = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
    return (1 - keep) * jnp.tanh(a[2] + reset * b[2]) + keep * hidden


def lstm_cell(w: Weights, x: Any, hidden: Any, memory: Any) -> tuple[Any, Any]:
    enter, forget, new, out = jnp.split(sum(gates(w, x, hidden)), 4, axis=1)
    memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(out) * jnp.tanh(memory), memory


def gru(w: Weights, x: Any) -> Any:
    return layer(w, "last", gru_cell(w, x, jnp.full((len(x), CELL), HIDDEN_STATE, x.dtype)))


def lstm(w: Weights, x: Any) -> Any:
    hidden = jnp.full((len(x), CELL), HIDDEN_STATE, x.dtype)
    return layer(w, "last", lstm_cell(w, x, hidden, hidden)[0])


def reference(w: Weights, x: Any, given: Any, h: Any) -> tuple[Any, Any]:
    return chain(w, jnp.concatenate([x, jnp.broadcast_to(given, (len(x), 1))], axis=1)), h


def noise(w: Weights, x: Any, given: Any, h: Any) -> tuple[Any, Any]:
    return chain(w, x) + jnp.exp(w["log_deviation"]) * given, h


def remembering_gru(w: Weights, x: Any, given: Any, h: Any) -> tuple[Any, Any]:
    h = gru_cell(w, x, h)
    return layer(w, "last", h), h


def remembering_lstm(w: Weights, x: Any, given: Any, h: Any) -> tuple[Any, Any]:
    hidden, memory = lstm_cell(w, x, h[:, :CELL], h[:, CELL:])
    return layer(w, "last", hidden), jnp.concatenate([hidden, memory], axis=1)


BESIDE: dict[str, Callable[[Weights, Any, Any, Any], tuple[Any, Any]]] = {
    "reference": reference,
    "noise": noise,
    "GRU": remembering_gru,
    "LSTM": remembering_lstm,
}
"""Of state, what is given at a step, and memory, to controls and the next memory."""


def beside(policy: str, case: Case, physics: Physics) -> Callable[[Weights, Any, str], Any]:
    """Return the gradient of a policy that is given something or remembers: memory is carried by the scan."""
    function, given = BESIDE[policy], make_inputs(policy, case.steps, case.batch)
    given = np.zeros((case.steps, 1, 1), np.float32) if given is None else given

    def loss(w: Weights, x0: Any, flow: str) -> Any:
        def body(carry: Any, given: Any) -> Any:
            x, h = carry
            rows = to_rows(x).reshape(case.batch, -1)
            c, h = function(w, jax.lax.stop_gradient(rows) if flow == "M" else rows, given, h)
            x = physics.step(x, c)
            return (x, h), physics.emit(x, c)

        h = jnp.zeros((case.batch, MEMORY.get(policy, 0)), jnp.float32)
        (x, _), emitted = jax.lax.scan(body, (x0, h), jnp.asarray(given))
        return physics.cost(x, emitted)

    return by_flow(loss)


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
        physics = make_physics(case)

        def forward(w: Weights, rows: Any) -> tuple[Any]:
            return (FUNCTIONS[policy](w, rows.reshape(len(rows), -1)),)

        nothing: Any = None
        if policy in BESIDE:
            gradient = beside(policy, case, physics)
        else:
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
