"""A system of the tests' own with as many numbers and controls as one likes: compiles fast, can diverge."""

import functools
from dataclasses import dataclass

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.systems import System, SystemFunctions
from warp_phys.systems.integrators import integrate


@dataclass(frozen=True)
class Springs(System):
    """Numbers in a ring, the first ones pushed: x_i' = −k sin x_i + e x_{i−1} + h x_i³ + g (1 + x_i²) c_i."""

    size: int = 5
    """Numbers of a state."""
    pushes: int = 2
    """Numbers of a control."""
    dt: float = 0.05
    """Time step [s]."""
    stiffness: float = 0.5
    """k [1/s]."""
    coupling: float = 0.6
    """e [1/s]."""
    hardening: float = 0.02
    """h [1/s]: a large state grows beyond all bounds."""
    gain: float = 0.7
    """g [1/s]."""

    @property
    def states(self):
        return tuple(f"x {i} [1]" for i in range(self.size))

    @property
    def controls(self):
        return tuple(f"push {i} [1]" for i in range(self.pushes))

    def functions(self, real):
        return _functions(self, real)

    def sample(self, batch, seed=0, dtype=np.float32):
        return np.random.default_rng(seed).uniform(-1, 1, (batch, self.size)).astype(numpy_type(real_type(dtype)))


@functools.cache
def _functions(system, real):
    types = system.types(real)
    State, Control, Parameters, size, pushes = types.State, types.Control, types.Parameters, system.size, system.pushes

    @wp.func
    def rate(x: State, c: Control, p: Parameters):
        out = State()
        for i in range(wp.static(size)):
            before = x[(i + wp.static(size - 1)) % wp.static(size)]
            out[i] += -p.stiffness * wp.sin(x[i]) + p.coupling * before + p.hardening * x[i] * x[i] * x[i]
        for i in range(wp.static(pushes)):
            out[i] += p.gain * (real(1.0) + x[i] * x[i]) * c[i]
        return out

    @wp.func
    def cost(x: State, p: Parameters):
        total = real(0.0)
        for i in range(wp.static(size)):
            total += (x[i] - real(0.1) * real(i)) * (x[i] - real(0.1) * real(i))
        return total

    return SystemFunctions(integrate(rate, types, "euler"), cost)
