"""A drone with two rotors in a vertical plane."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.systems.base import System, SystemFunctions
from warp_phys.systems.drawing import BLUE, Cone, Picture, Rod, Shape, cross
from warp_phys.systems.integrators import INTEGRATORS, integrate


@dataclass(frozen=True)
class Quadrotor(System):
    """A planar quadrotor: two rotors push along the body's own axis, and turn it by their difference.

        F   = T_left + T_right + m g
        x'' = (−F sin φ − d (x' − w_x)) / m
        z'' = (F cos φ − d (z' − w_z)) / m − g
        φ'' = a (T_right − T_left) / J

    State [x, z, φ, x', z', φ'], D = 6; z points up, φ = 0 is level. Control [T_left, T_right], K = 2: thrusts over
    hovering, so that zero hovers; they have no bounds. Pointwise cost, with the target (t_x, t_z):
    (x − t_x)² + (z − t_z)² + φ²/2 + 0.1 (x'² + z'²) + 0.02 φ'².

    Raises:
        TypeError, ValueError: A mass, an arm, an inertia or a time step that is not positive, a negative drag, a
            parameter that is not a finite number, an unknown integrator.

    Source: the textbook model of a planar quadrotor, with linear drag against a constant wind.

    >>> Quadrotor().state_size, Quadrotor().control_size
    (6, 2)
    """

    positive: ClassVar = ("mass", "arm", "inertia")
    not_negative: ClassVar = ("drag",)

    dt: float = 0.02
    """Time step [s]."""
    mass: float = 0.5
    """Mass m [kg]."""
    arm: float = 0.17
    """Distance a of a rotor from the middle [m]."""
    inertia: float = 0.004
    """Moment of inertia J [kg m²]."""
    gravity: float = 9.81
    """Gravitational acceleration g [m/s²]."""
    drag: float = 0.1
    """Linear drag d [kg/s]."""
    wind_x: float = 0.0
    """Speed w_x of the wind, to the right [m/s]."""
    wind_z: float = 0.0
    """Speed w_z of the wind, upwards [m/s]."""
    target_x: float = 0.0
    """Where the quadrotor shall be, t_x [m]."""
    target_z: float = 0.0
    """Where the quadrotor shall be, t_z [m]."""
    integrator: str = "semi-implicit"
    """Integrator: "semi-implicit" Euler (velocities first), "euler", or "rk4"."""

    states: ClassVar = (  # type: ignore[assignment]
        "x [m]", "z [m]", "pitch [rad]", "x velocity [m/s]", "z velocity [m/s]", "pitch rate [rad/s]",
    )  # fmt: skip
    controls: ClassVar = ("left thrust [N]", "right thrust [N]")  # type: ignore[assignment]

    def __post_init__(self):
        check_choice("integrator", self.integrator, INTEGRATORS)
        self.check_numbers()

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return _functions(self, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return states around level rest at the origin, shape (batch, 6).

        Position uniform in ±1, pitch in ±0.5, velocities and pitch rate in ±0.5.
        """
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        reach = np.array([1.0, 1.0, 0.5, 0.5, 0.5, 0.5])
        return (np.random.default_rng(check_seed(seed)).uniform(-1.0, 1.0, (batch, 6)) * reach).astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return the quadrotor in metres; bars show each rotor's thrust."""
        return _picture(self, state, control)


@functools.cache
def _functions(system: Quadrotor, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure, its numbers travel in p."""
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def quadrotor_rate(x: State, c: Control, p: Parameters):
        push = (c[0] + c[1]) / p.mass + p.gravity
        drag = p.drag / p.mass
        return State(
            x[3],
            x[4],
            x[5],
            -push * wp.sin(x[2]) - drag * (x[3] - p.wind_x),
            push * wp.cos(x[2]) - drag * (x[4] - p.wind_z) - p.gravity,
            p.arm * (c[1] - c[0]) / p.inertia,
        )

    step = integrate(quadrotor_rate, types, system.integrator, block=3)
    return SystemFunctions(step, cost_function(State, Parameters, real))


@functools.cache
def cost_function(State: type, Parameters: type, real: type) -> Any:
    """Return the cost of a state that begins as a quadrotor's."""

    @wp.func
    def quadrotor_cost(x: State, p: Parameters):
        dx = x[0] - p.target_x
        dz = x[1] - p.target_z
        position = dx * dx + dz * dz + real(0.5) * x[2] * x[2]
        return position + real(0.1) * (x[3] * x[3] + x[4] * x[4]) + real(0.02) * x[5] * x[5]

    return quadrotor_cost


def _picture(system: Quadrotor, state: np.ndarray, control: np.ndarray | None) -> Picture:
    x, z, pitch = (float(number) for number in state[:3])
    centre = np.array([x, 0.0, z])
    along, up = np.array([np.cos(pitch), 0.0, np.sin(pitch)]), np.array([-np.sin(pitch), 0.0, np.cos(pitch)])
    hover = 0.5 * system.mass * system.gravity
    pushes = hover + (np.zeros(2) if control is None else np.asarray(control, dtype=float))
    parts: dict[str, Shape] = {
        "target": cross((system.target_x, 0.0, system.target_z), 0.1),
        "body": Rod(centre - system.arm * along, centre + system.arm * along, 0.05),
    }
    for number, (side, push) in enumerate(zip((-1.0, 1.0), pushes, strict=True), 1):
        rotor = centre + side * system.arm * along
        parts[f"thrust {number}"] = Cone(rotor, rotor + np.clip(0.1 * push, -1.0, 1.0) * up, 0.06, BLUE)
    reach = max(1.5, 1.2 * max(abs(x), abs(z), abs(system.target_x), abs(system.target_z)))
    return Picture(parts, (-reach, -0.5, -reach), (reach, 0.5, reach), labels=("x [m]", "z [m]"))
