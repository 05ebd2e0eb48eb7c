"""Optimisers of many small problems at once: θ of shape (B, 2), a row each, in numpy.

For the plane of two parameters (`warp_phys.landscape`); networks are trained by the optimisers of their framework.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Step = Callable[[np.ndarray], np.ndarray]


class Optimiser(Protocol):
    """A rule that makes steps from updates."""

    def begin(self) -> Step:
        """Return a function that takes the updates of one iteration and returns what is added to θ, both (B, 2)."""


@dataclass(frozen=True)
class Descent:
    """Plain descent: θ − rate · update.

    >>> Descent(rate=0.1).begin()(np.array([[1.0, -2.0]]))
    array([[-0.1,  0.2]])
    """

    rate: float = 0.01
    """Step size."""

    def __post_init__(self):
        _check_between("rate", self.rate, 0.0, np.inf)

    def begin(self) -> Step:
        """Return a function from updates to what is added to θ."""
        return lambda updates: -self.rate * updates


@dataclass(frozen=True)
class Adam:
    """Adam: running means m of the update and v of its square, θ − rate · m̂ / (√v̂ + ε), component by component.

    Source: Kingma & Ba, ICLR 2015.

    >>> Adam(rate=0.1).begin()(np.array([[3.0, -2.0]])).round(6)
    array([[-0.1,  0.1]])
    """

    rate: float = 0.05
    """Step size: no first step is longer, along either axis."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the two means."""
    epsilon: float = 1e-7
    """Term that keeps the division finite."""

    def __post_init__(self):
        _check_between("rate", self.rate, 0.0, np.inf)
        _check_between("epsilon", self.epsilon, 0.0, np.inf)
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            _check_between("betas", beta, 0.0, 1.0)

    def begin(self) -> Step:
        """Return a function from updates to what is added to θ; it remembers the means."""
        means, count = [0.0, 0.0], 0

        def step(updates: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            for i, (beta, value) in enumerate(zip(self.betas, (updates, updates * updates), strict=True)):
                means[i] = beta * means[i] + (1.0 - beta) * value
            m, v = (mean / (1.0 - beta**count) for mean, beta in zip(means, self.betas, strict=True))
            return -self.rate * m / (np.sqrt(v) + self.epsilon)

        return step


def _check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise a TypeError or ValueError unless `value` is a number strictly between two others."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low < value < high:
        expected = f"between {low:g} and {high:g}" if np.isfinite(high) else "positive and finite"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
