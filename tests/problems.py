"""One list of problems; the same questions are asked of all of them (tests/systems)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.toy import TwoControls
from warp_phys import CartPole


@dataclass(frozen=True)
class Problem:
    """A system, and states and controls at which it is asked."""

    system: Any
    batch: int = 3
    kick: float = 3.0
    """Size of the random controls, in the control's unit."""

    @property
    def name(self) -> str:
        """Name of the test case."""
        return str(self.system).replace(" ", "")

    def states(self, seed: int = 0) -> np.ndarray:
        """Random states around the initial ones, shape (batch, D), float64."""
        x = self.system.sample(self.batch, seed, dtype=np.float64)
        return x + 0.3 * np.random.default_rng(seed + 1).standard_normal(x.shape)

    def controls(self, seed: int = 0) -> np.ndarray:
        """Random controls, shape (batch, K), float64."""
        shape = (self.batch, self.system.control_size)
        return self.kick * np.random.default_rng(seed + 2).standard_normal(shape)


# 17 and 20 poles: Warp no longer unrolls the loops over poles and components
PROBLEMS = [
    Problem(CartPole(poles=1)),
    Problem(CartPole(poles=3, dt=0.02, gravity=3.7, pole_mass=0.2, total_mass=1.4, half_length=0.3)),
    Problem(CartPole(poles=2, integrator="euler")),
    Problem(CartPole(poles=2, integrator="rk4", dt=0.05)),
    Problem(CartPole(poles=7)),
    Problem(CartPole(poles=17)),
    Problem(CartPole(poles=20, integrator="rk4")),
    Problem(TwoControls()),
]
