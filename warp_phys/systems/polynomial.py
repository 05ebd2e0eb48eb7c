"""One number that is pushed along a line: the two-parameter example, whose updates can be drawn."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_count
from warp_phys.systems.base import System, SystemFunctions
from warp_phys.systems.drawing import ABOVE, BLUE, PALE, Ball, Line, Picture, Rod, cross
from warp_phys.systems.integrators import integrate

SPREAD = 0.1
"""Largest distance of a sampled state from `start`."""


@dataclass(frozen=True)
class Polynomial(System):
    """A number x that the control moves: S(x, c) = x + dt c, with dt = 1 as published.

    Its controller in the publication is the polynomial N(x) = θ1 x² + θ2 x, unrolled for four steps: then every update
    is a vector field in a plane of two parameters, see `warp_phys.diagnose.landscape`. Any other controller will do as
    well.
    All quantities are plain numbers without a unit. State [x], D = 1; control [c], K = 1. Pointwise cost:
    ½ (x − target)².

    Raises:
        TypeError, ValueError: A parameter that is not a finite number, a step that is not positive.

    Source: Schnell & Thuerey, ICLR 2024, section 3.

    >>> Polynomial().state_size, Polynomial().control_size
    (1, 1)
    """

    dt: float = 1.0
    """Time step [1]; 1 as published, so that a control is what is added."""
    start: float = -0.3
    """Initial state x_0 of a landscape, and centre of the sampled ones [1]; steps do not depend on it."""
    target: float = 2.0
    """Where x shall be [1]."""

    states: ClassVar = ("x [1]",)  # type: ignore[assignment]
    controls: ClassVar = ("change per time [1]",)  # type: ignore[assignment]

    def __post_init__(self):
        self.check_numbers()

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return _functions(self, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return states uniform in [start − 0.1, start + 0.1], shape (batch, 1)."""
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        offsets = np.random.default_rng(check_seed(seed)).uniform(-SPREAD, SPREAD, (batch, 1))
        return (self.start + offsets).astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return a line of numbers; a bar shows where the control leads."""
        return _picture(self, state, control)


@functools.cache
def _functions(system: Polynomial, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure, its numbers travel in p."""
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def polynomial_rate(x: State, c: Control, p: Parameters):
        return State(c[0])

    @wp.func
    def polynomial_cost(x: State, p: Parameters):
        miss = x[0] - p.target
        return real(0.5) * miss * miss

    return SystemFunctions(integrate(polynomial_rate, types, "euler"), polynomial_cost)


def _picture(system: Polynomial, state: np.ndarray, control: np.ndarray | None) -> Picture:
    x = float(state[0])
    led = x if control is None else x + system.dt * float(control[0])
    reach = max(1.25 * max(1.0, abs(system.target), abs(system.start)), 1.1 * abs(x))
    size = 0.05 * reach
    parts = {
        "axis": Line(np.array([[-20.0, 0.0, 0.0], [20.0, 0.0, 0.0]]), PALE, 1.0),
        "target": cross((system.target, 0.0, 0.0), size, ABOVE),
        "push": Rod((x, 0.0, 0.0), (led, 0.0, 0.0), 0.2 * size, BLUE),
        "point": Ball((x, 0.0, 0.0), size),
    }
    return Picture(parts, (-reach, -0.5, -0.4 * reach), (reach, 0.5, 0.4 * reach), labels=("x", ""))
