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
    "reference": {**_CHAIN, **_layer("first", 5, WIDTH)},
    "noise": {**_CHAIN, "log_deviation": (1,)},
    "GRU": _cell(3),
    "LSTM": _cell(4),
}
"""Names and shapes, outputs before inputs."""

INPUTS: Mapping[str, bool] = {"reference": True, "noise": False}
"""Policies that are given a number at every step, and whether all samples share it."""
MEMORY: Mapping[str, int] = {"GRU": CELL, "LSTM": 2 * CELL}
"""Policies that remember, and how many numbers."""


def make_inputs(policy: str, steps: int, batch: int) -> np.ndarray | None:
    """Return what a policy is given at every step, shape (steps, 1 or batch, 1), float32; None for nothing."""
    if policy not in INPUTS:
        return None
    shape = (steps, 1 if INPUTS[policy] else batch, 1)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def make_policy_weights(policy: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights, float32, distributed as torch's layers have them; all differ from what they start with there.

    >>> {name: array.shape for name, array in make_policy_weights("plain").items() if name.startswith("first")}
    {'first.weight': (64, 4), 'first.bias': (64,)}
    """
    generator, found = np.random.default_rng(seed), {}
    for name, shape in POLICIES[policy].items():
        limit = 1.0 / np.sqrt(shape[-1])
        shift = 1.0 if "norm.weight" in name else -2.0 if "deviation" in name else 0.0
        found[name] = (generator.uniform(-limit, limit, shape) + shift).astype(np.float32)
    return found
