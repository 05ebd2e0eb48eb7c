"""One list of problems; the same questions are asked of all of them (tests/systems)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import warp as wp

from tests.toy import TwoControls
from warp_phys import CartPole, Hopper, LinearQuadratic, Pendulum, Polynomial, Quadrotor, Quantum, Repulsion


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


LINEAR = LinearQuadratic(
    A=((0.1, 1.0, 0.0), (0.0, 0.2, 1.0), (0.3, 0.0, -0.4)),
    B=((0.0, 0.3), (1.0, 0.0), (0.0, 0.7)),
    Q=((2.0, 0.1, 0.0), (0.1, 1.0, 0.0), (0.0, 0.0, 0.5)),
    R=((0.6, 0.1), (0.1, 0.4)),
)
"""Three states of which one runs away, two controls."""

# 17 and 20 poles, 20 evaders, 40 points: Warp no longer unrolls the loops over them
PROBLEMS = [
    Problem(CartPole(poles=1)),
    Problem(CartPole(poles=3, dt=0.02, gravity=3.7, pole_mass=0.2, total_mass=1.4, half_length=0.3)),
    Problem(CartPole(poles=2, integrator="euler")),
    Problem(CartPole(poles=2, integrator="rk4", dt=0.05)),
    Problem(CartPole(poles=7)),
    Problem(CartPole(poles=17)),
    Problem(CartPole(poles=20, integrator="rk4")),
    Problem(TwoControls()),
    Problem(Repulsion(drivers=1, evaders=1), kick=0.5),
    Problem(Repulsion(drivers=2, evaders=4, target_x=0.5, flocking=0.4, flock_distance=0.7), kick=0.5),
    Problem(Repulsion(drivers=18, evaders=20, integrator="rk4"), kick=0.5),
    Problem(Quantum(points=2, target=1)),
    Problem(Quantum(points=5, target=3, dt=0.02)),
    Problem(Quantum(points=40, target=4)),
    Problem(Polynomial()),
    Problem(Polynomial(dt=0.3, start=0.5, target=-1.0)),
    Problem(Pendulum(integrator="semi-implicit")),
    Problem(Quadrotor(wind_x=0.5, wind_z=-0.3, target_x=0.2, target_z=0.4)),
    Problem(Hopper(stiffness=200.0, softness=0.1, slip_speed=1.0)),
    Problem(LINEAR),
]


def open_loop(system: Any, x0: np.ndarray, controls: np.ndarray, device: Any) -> np.ndarray:
    """Return the states of a trajectory under given controls (steps, batch, K) in float64, (steps + 1, batch, D)."""
    states = wp.zeros((len(controls) + 1, *x0.shape), dtype=wp.float64, device=device)
    states[0].assign(x0)
    system.trajectory(states, wp.array(controls, dtype=wp.float64, device=device))
    return states.numpy()
