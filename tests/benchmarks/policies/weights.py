"""The weights of each policy, by the names of torch's modules; only numpy is used, for every contestant reads them."""

from collections.abc import Mapping

import numpy as np

WIDTH, CHANNELS, HEADS, TOKENS, CELL = 64, 16, 2, 6, 32
HIDDEN_STATE = 0.1
"""Numbers of the constant hidden state that a cell without a memory is given."""
LIMIT = 5.0
"""Largest control of the policy that is clamped."""
CONSTANTS = (1.0, -1.0)
"""What the tokens of attention are made of besides the four numbers of the state."""

Shapes = Mapping[str, tuple[int, ...]]


def _layer(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str) -> Shapes:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def _cell(gates: int) -> Shapes:
    wide = gates * CELL
    shapes = {"weight_ih": (wide, 4), "weight_hh": (wide, CELL), "bias_ih": (wide,), "bias_hh": (wide,)}
    return {**{f"cell.{name}": shape for name, shape in shapes.items()}, **_layer("last", CELL, 1)}


_CHAIN = {**_layer("first", 4, WIDTH), **_layer("second", WIDTH, WIDTH), **_layer("last", WIDTH, 1)}

POLICIES: Mapping[str, Shapes] = {
    "plain": _CHAIN,
    "layer norm": {**_CHAIN, **_norm("first_norm"), **_norm("second_norm")},
    "residual": _CHAIN,
    "angles": _CHAIN,
    "clamped": _CHAIN,
    "attention": {
        **_layer("token", 1, CHANNELS),
        "place": (TOKENS, CHANNELS),
        **_layer("mix", CHANNELS, 3 * CHANNELS),
        **_layer("out", CHANNELS, CHANNELS),
        **_layer("last", TOKENS * CHANNELS, 1),
    },
    "GRU cell": _cell(3),
    "LSTM cell": _cell(4),
}
"""Names and shapes, outputs before inputs."""


def make_policy_weights(policy: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights, float32, distributed as torch's layers have them; all differ from what they start with there.

    >>> {name: array.shape for name, array in make_policy_weights("plain").items() if name.startswith("first")}
    {'first.weight': (64, 4), 'first.bias': (64,)}
    """
    generator, found = np.random.default_rng(seed), {}
    for name, shape in POLICIES[policy].items():
        limit = 1.0 / np.sqrt(shape[-1])
        found[name] = (generator.uniform(-limit, limit, shape) + ("norm.weight" in name)).astype(np.float32)
    return found
