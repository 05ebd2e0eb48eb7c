"""Regression as a rollout: a network that is fitted to targets is a controller of one step."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.errors import check_count
from warp_phys.systems.base import System, SystemFunctions


@dataclass(frozen=True)
class Regression(System):
    """Rows of features, of which a controller makes one number that shall be the input, the target.

    A step puts scale · (c − target) in the place of the first feature, and the cost is its square. So the loss of one
    step is the mean squared error, and an `Update` of a rollout over one step fits a network to a minibatch in a few
    launches. The controller sees the features alone.

    Raises:
        TypeError, ValueError: A feature count below one, a scale that is not a finite number.

    >>> Regression(features=3).state_size
    3
    """

    features: int = 1
    """Numbers in a row."""
    scale: float = 1.0
    """Factor of the error."""

    controls: ClassVar = ("value [1]",)  # type: ignore[assignment]
    inputs: ClassVar = ("target [1]",)

    def __post_init__(self):
        object.__setattr__(self, "features", check_count("features", self.features))
        self.check_numbers()

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(f"feature {i} [1]" for i in range(1, self.features + 1))

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return _functions(self, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return rows of standard normal numbers, shape (batch, features)."""
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        return np.random.default_rng(seed).standard_normal((batch, self.features)).astype(dtype)


@functools.cache
def _functions(system: Regression, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure."""
    types = system.types(real)
    State, Control, Input, Parameters = types.State, types.Control, types.Input, types.Parameters

    @wp.func
    def regression_step(x: State, c: Control, w: Input, p: Parameters):
        out = State(x)
        out[0] = p.scale * (c[0] - w[0])
        return out

    @wp.func
    def regression_cost(x: State, p: Parameters):
        return x[0] * x[0]

    return SystemFunctions(regression_step, regression_cost)
