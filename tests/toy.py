"""A small system of the tests' own: two controls, a cost that depends on parameters, a loss that sums over time."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.systems import System, SystemFunctions
from warp_phys.systems.drawing import Ball, Picture
from warp_phys.systems.integrators import integrate


@dataclass(frozen=True)
class TwoControls(System):
    """Two coupled oscillators, each pushed by its own control: q'' = −k sin q + e (q_other − q) + g (1 + q²) c."""

    dt: float = 0.1
    """Time step [s]."""
    stiffness: float = 1.5
    """k [1/s²]."""
    coupling: float = 0.4
    """e [1/s²]."""
    gain: float = 0.8
    """g [-]."""
    target: float = 0.7
    """Where the first oscillator shall be [rad]."""

    time_average: ClassVar[bool] = False
    states: ClassVar = ("first [rad]", "second [rad]", "first rate [rad/s]", "second rate [rad/s]")  # type: ignore[assignment]
    controls: ClassVar = ("first push [rad/s²]", "second push [rad/s²]")  # type: ignore[assignment]

    def functions(self, real):
        return _functions(self, real)

    def sample(self, batch, seed=0, dtype=np.float32):
        return np.random.default_rng(seed).uniform(-1, 1, (batch, 4)).astype(numpy_type(real_type(dtype)))

    def picture(self, state, control=None):
        balls = {f"mass {i}": Ball((i, 0.0, state[i]), 0.3) for i in range(2)}
        return Picture(balls, (-1.0, -1.0, -4.0), (2.0, 1.0, 4.0))


@functools.cache
def _functions(system, real):
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def rate(x: State, c: Control, p: Parameters):
        out = State()
        for i in range(2):
            out[i] = x[i + 2]
            pull = p.coupling * (x[1 - i] - x[i])
            out[i + 2] = -p.stiffness * wp.sin(x[i]) + pull + p.gain * (real(1.0) + x[i] * x[i]) * c[i]
        return out

    @wp.func
    def cost(x: State, p: Parameters):
        return (x[0] - p.target) * (x[0] - p.target) + real(0.5) * x[1] * x[1] * x[3]

    return SystemFunctions(integrate(rate, types, "semi-implicit", block=2), cost)
