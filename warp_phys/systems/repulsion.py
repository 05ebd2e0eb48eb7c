"""Drivers that steer evaders by frightening them."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.programs.native_physics import lanes_of
from warp_phys.systems.base import MOST_PARTS, System, SystemFunctions
from warp_phys.systems.drawing import ABOVE, INK, PALE, Ball, Cone, Line, Picture, Shape, cross
from warp_phys.systems.integrators import INTEGRATORS, integrate


@dataclass(frozen=True)
class Repulsion(System):
    """Guidance by repulsion in the plane: A drivers (dogs) move as they are told, E evaders (sheep) flee from them.

    With the distance d(r) = e + |r| of a relative position r, regularised by e, and (a, b)^⊥ = (−b, a):

        driver i:  v' = c_radial ρ_i + c_turn ρ_i^⊥ − μ_A v + k_A Σ_{j≠i} d⁻² (p_i − p_j),  ρ_i = p_i − Σ_e p_e
        evader e:  v' = −k_E Σ_i d⁻² (p_i − p_e) − μ_E v + k_F Σ_{k≠e} ((s / d − 1) / d) (p_k − p_e)

    ρ_i takes the SUM of the evaders' positions, as published. State per agent [px, py, vx, vy], drivers first,
    D = 4 (A + E); control per driver [c_radial, c_turn], K = 2 A. Pointwise cost: mean over evaders and coordinates of
    (p_e − target)². Agents that coincide exert no force on each other, and nothing divides by zero.

    Raises:
        TypeError, ValueError: Counts below one or above 1024, a time step, a regularisation or a flock distance that is
            not positive, a negative friction, a parameter that is not a finite number, an unknown integrator.

    Source: Schnell & Thuerey, ICLR 2024, after Escobedo, Ibañez & Zuazua 2016 and Ko & Zuazua 2020.

    >>> Repulsion(drivers=2, evaders=4).state_size
    24
    """

    positive: ClassVar = ("regularisation", "flock_distance")
    not_negative: ClassVar = ("driver_friction", "evader_friction")

    drivers: int = 2
    """Number A of drivers, at most 1024."""
    evaders: int = 4
    """Number E of evaders, at most 1024."""
    dt: float = 4.0 / 60.0
    """Time step [s]."""
    regularisation: float = 0.1
    """Length e that is added to every distance [m]."""
    driver_friction: float = 1.0
    """Friction μ_A of a driver [1/s]."""
    driver_spacing: float = 0.2
    """Repulsion k_A between drivers [m²/s²]."""
    fright: float = 15.0
    """Repulsion k_E of an evader from a driver [m²/s²]."""
    evader_friction: float = 4.0
    """Friction μ_E of an evader [1/s]."""
    flocking: float = 0.2
    """Strength k_F of the force between evaders: as published it attracts near and repels afar [m/s²]."""
    flock_distance: float = 0.5
    """Distance s at which evaders neither attract nor repel each other, regularisation included [m]."""
    target_x: float = 0.0
    """Where the evaders shall be, first coordinate [m]."""
    target_y: float = 0.0
    """Where the evaders shall be, second coordinate [m]."""
    integrator: str = "euler"
    """Integrator: explicit "euler" as published, "semi-implicit" Euler, or "rk4"."""

    def __post_init__(self):
        for name in ("drivers", "evaders"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), most=MOST_PARTS))
        check_choice("integrator", self.integrator, INTEGRATORS)
        self.check_numbers()

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components with their units."""
        agents = [f"driver {i}" for i in range(1, self.drivers + 1)] + [
            f"evader {i}" for i in range(1, self.evaders + 1)
        ]
        return tuple(f"{agent} {name}" for agent in agents for name in ("x [m]", "y [m]", "vx [m/s]", "vy [m/s]"))

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components with their units."""
        names = ("radial [1/s²]", "turn [1/s²]")
        return tuple(f"driver {i} {name}" for i in range(1, self.drivers + 1) for name in names)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        step = integrate(_rate(self, real), self.types(real), self.integrator, block=2)
        if self.integrator != "euler":
            return SystemFunctions(step, _cost(self, real))
        return SystemFunctions(step, _cost(self, real), lanes_of("Repulsion", (self.drivers, self.evaders), real))

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return agents at rest, shape (batch, D): drivers on an annulus, evaders in a flock inside of it.

        Each driver has a radius uniform in [3, 4] and any angle; the flock's centre has a radius in [1, 2]; each evader
        is at the centre plus uniform [−0.5, 0.5]².
        """
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        generator = np.random.default_rng(check_seed(seed))
        states = np.zeros((batch, self.drivers + self.evaders, 4))
        states[:, : self.drivers, :2] = _annulus(generator, 3.0, (batch, self.drivers))
        offsets = generator.uniform(-0.5, 0.5, (batch, self.evaders, 2))
        states[:, self.drivers :, :2] = _annulus(generator, 1.0, (batch, 1)) + offsets
        return states.reshape(batch, -1).astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return the ground in metres, from above; lines show where each driver pushes itself."""
        return _picture(self, state, control)


def _annulus(generator: np.random.Generator, inner: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return points whose radius is uniform in [inner, inner + 1] and whose angle is uniform; shape (…, 2)."""
    radius, angle = generator.uniform(inner, inner + 1.0, shape), generator.uniform(0.0, 2.0 * np.pi, shape)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


@functools.cache
def _rate(system: Repulsion, real: type) -> Any:
    """Return the rate of change of the state; `system` is a structure, its numbers travel in p."""
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters
    Plane = wp.types.vector(length=2, dtype=real)
    first, count = system.drivers, system.drivers + system.evaders

    @wp.func
    def position(x: State, agent: int):
        return Plane(x[4 * agent], x[4 * agent + 1])

    @wp.func
    def velocity(x: State, agent: int):
        return Plane(x[4 * agent + 2], x[4 * agent + 3])

    @wp.func
    def inverse_distance(r: Plane, p: Parameters):
        return real(1.0) / (p.regularisation + wp.length(r))

    @wp.func
    def inverse_square(r: Plane, p: Parameters):
        w = inverse_distance(r, p)
        return w * w * r

    @wp.func
    def flock_force(r: Plane, p: Parameters):
        w = inverse_distance(r, p)
        return (p.flock_distance * w - real(1.0)) * w * r

    @wp.func
    def sum_of_evaders(x: State):
        total = Plane()
        for e in range(wp.static(first), wp.static(count)):
            total += position(x, e)
        return total

    @wp.func
    def spacing(x: State, i: int, p: Parameters):
        total = Plane()
        for j in range(wp.static(first)):
            if j != i:
                total += inverse_square(position(x, i) - position(x, j), p)
        return total

    @wp.func
    def fear(x: State, e: int, p: Parameters):
        total = Plane()
        for i in range(wp.static(first)):
            total += inverse_square(position(x, i) - position(x, e), p)
        return total

    @wp.func
    def flocking(x: State, e: int, p: Parameters):
        total = Plane()
        for k in range(wp.static(first), wp.static(count)):
            if k != e:
                total += flock_force(position(x, k) - position(x, e), p)
        return total

    @wp.func
    def driver_acceleration(x: State, c: Control, i: int, flock: Plane, p: Parameters):
        rho = position(x, i) - flock
        turned = Plane(-rho[1], rho[0])
        drive = c[2 * i] * rho + c[2 * i + 1] * turned
        return drive - p.driver_friction * velocity(x, i) + p.driver_spacing * spacing(x, i, p)

    @wp.func
    def evader_acceleration(x: State, e: int, p: Parameters):
        return p.flocking * flocking(x, e, p) - p.fright * fear(x, e, p) - p.evader_friction * velocity(x, e)

    @wp.func
    def repulsion_rate(x: State, c: Control, p: Parameters):
        flock = sum_of_evaders(x)
        out = State()
        for i in range(wp.static(first)):
            a = driver_acceleration(x, c, i, flock, p)
            out[4 * i] = x[4 * i + 2]
            out[4 * i + 1] = x[4 * i + 3]
            out[4 * i + 2] = a[0]
            out[4 * i + 3] = a[1]
        for e in range(wp.static(first), wp.static(count)):
            b = evader_acceleration(x, e, p)
            out[4 * e] = x[4 * e + 2]
            out[4 * e + 1] = x[4 * e + 3]
            out[4 * e + 2] = b[0]
            out[4 * e + 3] = b[1]
        return out

    return repulsion_rate


@functools.cache
def _cost(system: Repulsion, real: type) -> Any:
    """Return the pointwise cost: mean over evaders and coordinates of (p_e − target)²."""
    types = system.types(real)
    State, Parameters = types.State, types.Parameters
    first, count = system.drivers, system.drivers + system.evaders

    @wp.func
    def squared_distances(x: State, p: Parameters):
        total = real(0.0)
        for e in range(wp.static(first), wp.static(count)):
            dx = x[4 * e] - p.target_x
            dy = x[4 * e + 1] - p.target_y
            total += dx * dx + dy * dy
        return total

    @wp.func
    def repulsion_cost(x: State, p: Parameters):
        return squared_distances(x, p) / real(wp.static(2 * system.evaders))

    return repulsion_cost


def _picture(system: Repulsion, state: np.ndarray, control: np.ndarray | None) -> Picture:
    agents = np.asarray(state, dtype=float).reshape(-1, 4)
    flock = agents[system.drivers :, :2].sum(0)
    parts: dict[str, Shape] = {"target": cross((system.target_x, system.target_y, 0.02), 0.25, ABOVE)}
    for i, (x, y, vx, vy) in enumerate(agents[: system.drivers]):
        push = np.zeros(2)
        if control is not None:
            rho = np.array([x, y]) - flock
            push = control[2 * i] * rho + control[2 * i + 1] * np.array([-rho[1], rho[0]])
            push *= min(1.0, 1.0 / (np.hypot(*push) + 1e-9)) * 0.8
        speed = float(np.hypot(vx, vy))
        ahead = np.array([vx, vy, 0.0]) / speed if speed > 1e-6 else np.array([0.0, 1.0, 0.0])
        at = np.array([x, y, 0.2])
        parts[f"push {i + 1}"] = Line(np.array([[x, y, 0.2], [x + push[0], y + push[1], 0.2]]), INK, 2.0)
        parts[f"driver {i + 1}"] = Cone(at - 0.25 * ahead, at + 0.4 * ahead, 0.2)
    for i, (x, y, _, _) in enumerate(agents[system.drivers :]):
        parts[f"evader {i + 1}"] = Ball((x, y, 0.2), 0.2, PALE)
    reach = max(5.0, 1.1 * float(np.abs(agents[:, :2]).max()))
    ends = (-reach, -reach, 0.0), (reach, reach, 0.5)
    return Picture(parts, *ends, view=ABOVE, labels=("x [m]", "y [m]"))
