"""The controllers in JAX, with the parts of their backward pass apart, as a backward pass in three phases needs them.

Weights are a flat list [W1, b1, W2, b2, W3, b3]. `forward(weights, states)` gives controls and what is kept;
`deltas(weights, kept, adjoint of the controls)` the adjoints of all layers' sums; from those, `to_inputs` the adjoint
of the states and `to_weights` the gradient. In the first two and the last the arrays may have leading time axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from tests.benchmarks.cases import Case


class Network(NamedTuple):
    """The parts of a controller."""

    forward: Callable[..., Any]
    deltas: Callable[..., Any]
    to_inputs: Callable[..., Any]
    to_weights: Callable[..., Any]


def make_network(case: Case) -> Network:
    """Return the controller of a case."""
    return convolutions(case.sizes["points"], case.published.width) if case.system == "quantum" else dense()


def flat(a: Any) -> Any:
    """All axes but the last one in one."""
    return a.reshape(-1, a.shape[-1])


def dense() -> Network:
    """Three dense layers with tanh between them."""

    def forward(w: Any, states: Any) -> Any:
        h0 = states.reshape(states.shape[0], -1)
        h1 = jnp.tanh(h0 @ w[0] + w[1])
        h2 = jnp.tanh(h1 @ w[2] + w[3])
        return h2 @ w[4] + w[5], (h0, h1, h2)

    def deltas(w: Any, kept: Any, adjoint: Any) -> Any:
        _, h1, h2 = kept
        d2 = (adjoint @ w[4].T) * (1 - h2 * h2)
        return (d2 @ w[2].T) * (1 - h1 * h1), d2, adjoint

    def to_inputs(w: Any, d: Any) -> Any:
        return d[0] @ w[0].T

    def to_weights(w: Any, kept: Any, d: Any) -> Any:
        found = []
        for h, g in zip(kept, d, strict=True):
            found += [flat(h).T @ flat(g), jnp.sum(flat(g), 0)]
        return found

    return Network(forward, deltas, to_inputs, to_weights)


def convolutions(points: int, width: int) -> Network:
    """Two convolutions of kernel 3 and stride 2, as matrix products over windows, and a dense layer."""

    def windows(a: Any) -> Any:
        n = (a.shape[-2] - 3) // 2 + 1
        parts = a[..., 0 : 2 * n : 2, :], a[..., 1 : 2 * n : 2, :], a[..., 2 : 2 * n + 1 : 2, :]
        return jnp.concatenate(parts, -1)

    def spread(g: Any, length: int) -> Any:
        # the adjoint of `windows`
        n, k = g.shape[-2], g.shape[-1] // 3
        first, second, third = g[..., :k], g[..., k : 2 * k], g[..., 2 * k :]
        pad = [(0, 0)] * (g.ndim - 2)
        even = jnp.pad(first, [*pad, (0, 1), (0, 0)]) + jnp.pad(third, [*pad, (1, 0), (0, 0)])
        odd = jnp.pad(second, [*pad, (0, 1), (0, 0)])
        joined = jnp.stack([even, odd], -2).reshape((*g.shape[:-2], 2 * n + 2, k))
        # a last point that no window reaches has no adjoint
        return jnp.pad(joined, [*pad, (0, max(0, length - 2 * n - 2)), (0, 0)])[..., :length, :]

    def forward(w: Any, states: Any) -> Any:
        h0 = windows(states)
        h1 = jnp.tanh(h0 @ w[0].reshape(6, width) + w[1])
        h2 = jnp.tanh(windows(h1) @ w[2].reshape(3 * width, width) + w[3])
        return h2.reshape(states.shape[0], -1) @ w[4] + w[5], (h0, h1, h2)

    def deltas(w: Any, kept: Any, adjoint: Any) -> Any:
        _, h1, h2 = kept
        d2 = (adjoint[..., :, None] * w[4].reshape(h2.shape[-2], width)) * (1 - h2 * h2)
        back = spread(d2 @ w[2].reshape(3 * width, width).T, h1.shape[-2])
        return back * (1 - h1 * h1), d2, adjoint

    def to_inputs(w: Any, d: Any) -> Any:
        return spread(d[0] @ w[0].reshape(6, width).T, points)

    def to_weights(w: Any, kept: Any, d: Any) -> Any:
        h0, h1, h2 = kept
        d1, d2, d3 = map(flat, d)
        rows = h2.reshape(-1, h2.shape[-2] * width)
        weights = flat(h0).T @ d1, flat(windows(h1)).T @ d2, rows.T @ d3
        biases = d1, d2, d3
        found = []
        for like, weight, bias in zip(w[::2], weights, biases, strict=True):
            found += [weight.reshape(like.shape), jnp.sum(bias, 0)]
        return found

    return Network(forward, deltas, to_inputs, to_weights)
