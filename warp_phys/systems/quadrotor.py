"""A drone with two rotors in a vertical plane."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.systems.base import System, SystemFunctions
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

    def sketch(self, axes: Any) -> Callable[..., Sequence[Any]]:
        """Put body, thrusts and target on matplotlib `axes`; return a function (state, control=None) that moves."""
        return _sketch(self, axes)


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

    @wp.func
    def quadrotor_cost(x: State, p: Parameters):
        dx = x[0] - p.target_x
        dz = x[1] - p.target_z
        position = dx * dx + dz * dz + real(0.5) * x[2] * x[2]
        return position + real(0.1) * (x[3] * x[3] + x[4] * x[4]) + real(0.02) * x[5] * x[5]

    return SystemFunctions(integrate(quadrotor_rate, types, system.integrator, block=3), quadrotor_cost)


def _sketch(system: Quadrotor, axes: Any) -> Callable[..., Sequence[Any]]:
    """Draw in metres; the picture grows where the quadrotor runs out of it. Lines show each rotor's thrust."""
    axes.plot(system.target_x, system.target_z, "x", color="0.4", markersize=10, markeredgewidth=2, zorder=1)
    (body,) = axes.plot([], [], color="0.15", linewidth=4, solid_capstyle="round", zorder=4)
    thrusts = [axes.plot([], [], color="C0", linewidth=2, zorder=3)[0] for _ in range(2)]
    axes.set(aspect="equal", xlabel="x [m]", ylabel="z [m]")
    hover = 0.5 * system.mass * system.gravity

    def move(state: np.ndarray, control: np.ndarray | None = None) -> Sequence[Any]:
        centre, pitch = np.asarray(state[:2], dtype=float), float(state[2])
        along, up = np.array([np.cos(pitch), np.sin(pitch)]), np.array([-np.sin(pitch), np.cos(pitch)])
        rotors = [centre - system.arm * along, centre + system.arm * along]
        body.set_data(*np.stack(rotors).T)
        pushes = hover + np.zeros(2) if control is None else hover + np.asarray(control, dtype=float)
        for line, rotor, push in zip(thrusts, rotors, pushes, strict=True):
            line.set_data(*np.stack([rotor, rotor + np.clip(0.1 * push, -1.0, 1.0) * up]).T)
        reach = max(1.5, 1.2 * float(np.abs(centre).max()), 1.2 * abs(system.target_x), 1.2 * abs(system.target_z))
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        return [body, *thrusts]

    return move
