"""A disc over a floor, whose contact goes from soft to stiff."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.systems.base import System, SystemFunctions
from warp_phys.systems.drawing import BLUE, INK, PALE, Line, Picture, Rod, cross
from warp_phys.systems.integrators import INTEGRATORS, integrate


@dataclass(frozen=True)
class Hopper(System):
    """A disc that falls, bounces and rolls on a floor at z = 0: smooth contact, whose stiffness k is a parameter.

    The floor pushes back with N and, where the lowest point of the disc slips, pulls with the friction G:

        N   = k s softplus((r − z) / s) (1 − d tanh z')
        G   = −μ N tanh((x' + r φ') / v)
        x'' = G / m
        z'' = (lift + N) / m − g
        φ'' = (torque + r G) / J

    So the disc moves sideways by rolling alone, and only while it touches the floor. The same task goes from soft
    (k = 200) to stiff (20 000, with a smaller dt: √(m / k) is the time of a bounce), and the Jacobians of a step with
    it. State [x, z, φ, x', z', φ'], D = 6; control [lift, torque], K = 2. Pointwise cost:
    (x − target)² + 0.1 (x'² + z'²) + 0.001 φ'²: to roll to a place, and to be at rest there.

    Raises:
        TypeError, ValueError: A mass, size, stiffness or time step that is not positive, a negative damping or
            friction, a parameter that is not a finite number, an unknown integrator.

    Source: a penalty contact with regularised Coulomb friction, as in any textbook on contact.

    >>> Hopper(stiffness=200.0).state_size
    6
    """

    positive: ClassVar = ("stiffness", "softness", "slip_speed", "mass", "radius", "inertia")
    not_negative: ClassVar = ("damping", "friction")

    dt: float = 0.005
    """Time step [s]."""
    stiffness: float = 2000.0
    """Stiffness k of the contact [N/m]."""
    softness: float = 0.01
    """Length s over which the contact sets in [m]."""
    damping: float = 0.3
    """Damping d: by this share a fast impact is harder than rest, and a fast rebound softer [1]."""
    friction: float = 0.8
    """Coefficient of friction μ [1]."""
    slip_speed: float = 0.1
    """Speed v of slip at which friction sets in [m/s]."""
    mass: float = 1.0
    """Mass m [kg]."""
    radius: float = 0.1
    """Radius r [m]."""
    inertia: float = 0.004
    """Moment of inertia J [kg m²]."""
    gravity: float = 9.81
    """Gravitational acceleration g [m/s²]."""
    target: float = 0.5
    """Where the disc shall be, first coordinate [m]."""
    integrator: str = "semi-implicit"
    """Integrator: "semi-implicit" Euler (velocities first), "euler", or "rk4"."""

    states: ClassVar = (  # type: ignore[assignment]
        "x [m]", "z [m]", "angle [rad]", "x velocity [m/s]", "z velocity [m/s]", "spin [rad/s]",
    )  # fmt: skip
    controls: ClassVar = ("lift [N]", "torque [N m]")  # type: ignore[assignment]

    def __post_init__(self):
        check_choice("integrator", self.integrator, INTEGRATORS)
        self.check_numbers()

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return _functions(self, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return discs near the origin, on the floor or up to 0.2 m above it, shape (batch, 6).

        x uniform in ±0.2, z in [r, r + 0.2], the angle in ±π, velocities in ±0.5, spin in ±5.
        """
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        states = np.random.default_rng(check_seed(seed)).uniform(-1.0, 1.0, (batch, 6)) * [
            0.2,
            0.1,
            np.pi,
            0.5,
            0.5,
            5.0,
        ]
        states[:, 1] += self.radius + 0.1
        return states.astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return the disc in metres; a spoke shows its angle, a bar its lift."""
        return _picture(self, state, control)


@functools.cache
def _functions(system: Hopper, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure, its numbers travel in p."""
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def softplus(a: real):
        # of either sign without overflow, and with the slope 1/2 at zero
        rest = wp.exp(wp.where(a > real(0.0), -a, a))
        return wp.where(a > real(0.0), a, real(0.0)) + wp.log(real(1.0) + rest)

    @wp.func
    def hopper_rate(x: State, c: Control, p: Parameters):
        depth = p.softness * softplus((p.radius - x[1]) / p.softness)
        normal = p.stiffness * depth * (real(1.0) - p.damping * wp.tanh(x[4]))
        grip = -p.friction * normal * wp.tanh((x[3] + p.radius * x[5]) / p.slip_speed)
        return State(
            x[3],
            x[4],
            x[5],
            grip / p.mass,
            (c[0] + normal) / p.mass - p.gravity,
            (c[1] + p.radius * grip) / p.inertia,
        )

    @wp.func
    def hopper_cost(x: State, p: Parameters):
        miss = x[0] - p.target
        return miss * miss + real(0.1) * (x[3] * x[3] + x[4] * x[4]) + real(0.001) * x[5] * x[5]

    return SystemFunctions(integrate(hopper_rate, types, system.integrator, block=3), hopper_cost)


def _picture(system: Hopper, state: np.ndarray, control: np.ndarray | None) -> Picture:
    x, z, angle = (float(number) for number in state[:3])
    r, deep = system.radius, 0.15 * system.radius
    push = 0.0 if control is None else float(np.clip(0.02 * control[0], -0.5, 0.5))
    reach = max(1.0, 1.2 * abs(system.target), 1.2 * abs(x), z)
    spoke = (x + r * np.cos(angle), -2.0 * deep, z + r * np.sin(angle))
    parts = {
        "floor": Line(np.array([[-20.0, 0.0, 0.0], [20.0, 0.0, 0.0]]), PALE, 1.0),
        "target": cross((system.target, 0.0, 0.0), 0.06),
        "lift": Rod((x, 0.0, z), (x, 0.0, z + push), 0.03, BLUE),
        "disc": Line(
            np.array([[x + r * np.cos(a), 0.0, z + r * np.sin(a)] for a in np.linspace(0.0, 2.0 * np.pi, 49)]), INK, 3.0
        ),
        "spoke": Rod((x, 0.0, z), spoke, deep),
    }
    return Picture(parts, (-reach, -0.5, -0.3 * reach), (reach, 0.5, 1.2 * reach), labels=("x [m]", "z [m]"))
