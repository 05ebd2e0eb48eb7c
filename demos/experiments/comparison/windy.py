"""A planar quadrotor in wind that differs from episode to episode and that no controller sees."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice
from warp_phys.systems import Quadrotor
from warp_phys.systems.base import SystemFunctions
from warp_phys.systems.quadrotor import cost_function


@dataclass(frozen=True)
class WindyQuadrotor(Quadrotor):
    """A `Quadrotor` whose state has the wind as well: so each episode has its own, wherever episodes are made.

    State [x, z, φ, x', z', φ', w_x, w_z], D = 8, with w' = 0; control, parameters and cost of `Quadrotor`, whose own
    wind is added; semi-implicit Euler only.

    >>> WindyQuadrotor().state_size
    8
    """

    states: ClassVar = (*Quadrotor.states, "wind x [m/s]", "wind z [m/s]")  # type: ignore[assignment]

    def __post_init__(self):
        check_choice("integrator", self.integrator, ("semi-implicit",))
        super().__post_init__()

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return _functions(self, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return states of `Quadrotor`, in wind of up to 8 m/s to the sides and 4 m/s up and down, shape (batch, 8)."""
        states = super().sample(batch, seed, np.float64)
        wind = np.random.default_rng((check_seed(seed), 1)).uniform(-1.0, 1.0, (len(states), 2)) * [8.0, 4.0]
        return np.concatenate([states, wind], axis=1).astype(numpy_type(real_type(dtype)))


@functools.cache
def _functions(system: WindyQuadrotor, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure, its numbers travel in p."""
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def windy_step(x: State, c: Control, p: Parameters):
        push = (c[0] + c[1]) / p.mass + p.gravity
        drag = p.drag / p.mass
        vx = x[3] + p.dt * (-push * wp.sin(x[2]) - drag * (x[3] - x[6] - p.wind_x))
        vz = x[4] + p.dt * (push * wp.cos(x[2]) - drag * (x[4] - x[7] - p.wind_z) - p.gravity)
        turn = x[5] + p.dt * p.arm * (c[1] - c[0]) / p.inertia
        return State(x[0] + p.dt * vx, x[1] + p.dt * vz, x[2] + p.dt * turn, vx, vz, turn, x[6], x[7])

    return SystemFunctions(windy_step, cost_function(State, Parameters, real))
