"""A chain of links on a cart: coupled and chaotic, by its mass matrix."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.systems.base import System, SystemFunctions
from warp_phys.systems.cartpole import WIDTH, cart_parts, upright_cost
from warp_phys.systems.drawing import BLUE, Ball, Picture, Rod
from warp_phys.systems.integrators import INTEGRATORS, integrate
from warp_phys.systems.solve import LARGEST, solve


@dataclass(frozen=True)
class Pendulum(System):
    """A cart that carries a chain of N links, each hanging from the end of the one before; a force f pushes the cart.

    A mass m is at the end of each link of length l; n_ij = N + 1 − max(i, j) masses are beyond both links i and j:

        T = ½ (M + N m) x'² + Σ_i n_ii m l cos θ_i x' θ_i' + ½ Σ_ij n_ij m l² cos(θ_i − θ_j) θ_i' θ_j'
        V = Σ_i n_ii m g l cos θ_i

    of which Lagrange's equations make mass matrix · accelerations = forces, solved by Cholesky's factorisation in every
    step. State [x, x', θ1, θ1', …, θN, θN'], D = 2 (N + 1); θ = 0 is upright, θ = π hangs down. Control [f], K = 1.
    Pointwise cost: mean over the links of 1 − cos θ.

    Raises:
        TypeError, ValueError: Fewer than one link or more than 15, a mass, length or time step that is not positive, a
            parameter that is not a finite number, an unknown integrator.

    Source: Lagrangian mechanics, in any textbook.

    >>> Pendulum(links=3).state_size
    8
    """

    positive: ClassVar = ("cart_mass", "link_mass", "length")

    links: int = 2
    """Number N of links, at most 15."""
    dt: float = 0.01
    """Time step [s]."""
    gravity: float = 9.8
    """Gravitational acceleration g [m/s²]."""
    cart_mass: float = 1.0
    """Mass M of the cart [kg]."""
    link_mass: float = 0.1
    """Mass m at the end of a link [kg]."""
    length: float = 0.5
    """Length l of a link [m]."""
    integrator: str = "rk4"
    """Integrator: "rk4", "semi-implicit" Euler (velocities first), or "euler"."""

    def __post_init__(self):
        # the cart is one unknown more
        object.__setattr__(self, "links", check_count("links", self.links, most=LARGEST - 1))
        check_choice("integrator", self.integrator, INTEGRATORS)
        self.check_numbers()

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components with their units."""
        links = (name for i in range(1, self.links + 1) for name in (f"angle {i} [rad]", f"rate {i} [rad/s]"))
        return ("position [m]", "velocity [m/s]", *links)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components with their units."""
        return ("force [N]",)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        step = integrate(_rate(self, real), self.types(real), self.integrator)
        return SystemFunctions(step, upright_cost(self, self.links, real))

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return hanging states: x, x' and θ' uniform in [−1, 1], θ = π + uniform(−π/6, π/6); shape (batch, D)."""
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        states = np.random.default_rng(check_seed(seed)).uniform(-1.0, 1.0, (batch, self.state_size))
        states[:, 2::2] = np.pi + states[:, 2::2] * (np.pi / 6.0)
        return states.astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return cart and chain in metres; the picture follows the cart."""
        return _picture(self, state, control)


@functools.cache
def _rate(system: Pendulum, real: type) -> Any:
    """Return the rate of change of the state; `system` is a structure, its numbers travel in p."""
    types, links, size = system.types(real), system.links, system.links + 1
    State, Control, Parameters = types.State, types.Control, types.Parameters
    Matrix, Vector = wp.types.matrix(shape=(size, size), dtype=real), wp.types.vector(length=size, dtype=real)

    # number 0 of a vector is the cart, number i the link i
    @wp.func
    def sines(x: State):
        out = Vector()
        for i in range(1, wp.static(size)):
            out[i] = wp.sin(x[2 * i])
        return out

    @wp.func
    def cosines(x: State):
        out = Vector()
        for i in range(1, wp.static(size)):
            out[i] = wp.cos(x[2 * i])
        return out

    @wp.func
    def moment_beyond(i: int, j: int, p: Parameters):
        return real(wp.static(size) - wp.max(i, j)) * p.link_mass * p.length

    @wp.func
    def mass_matrix(sine: Vector, cosine: Vector, p: Parameters):
        out = Matrix()
        out[0, 0] = p.cart_mass + real(wp.static(links)) * p.link_mass
        for i in range(1, wp.static(size)):
            beside = moment_beyond(i, i, p) * cosine[i]
            out[0, i] = beside
            out[i, 0] = beside
            for j in range(1, wp.static(size)):
                out[i, j] = moment_beyond(i, j, p) * p.length * (cosine[i] * cosine[j] + sine[i] * sine[j])
        return out

    @wp.func
    def turning_force(i: int, x: State, sine: Vector, cosine: Vector, p: Parameters):
        total = moment_beyond(i, i, p) * p.gravity * sine[i]
        for j in range(1, wp.static(size)):
            swing = (sine[i] * cosine[j] - cosine[i] * sine[j]) * x[2 * j + 1] * x[2 * j + 1]
            total -= moment_beyond(i, j, p) * p.length * swing
        return total

    @wp.func
    def pushing_force(x: State, sine: Vector, f: real, p: Parameters):
        total = f
        for j in range(1, wp.static(size)):
            total += moment_beyond(j, j, p) * sine[j] * x[2 * j + 1] * x[2 * j + 1]
        return total

    @wp.func
    def forces(x: State, sine: Vector, cosine: Vector, f: real, p: Parameters):
        out = Vector()
        out[0] = pushing_force(x, sine, f, p)
        for i in range(1, wp.static(size)):
            out[i] = turning_force(i, x, sine, cosine, p)
        return out

    @wp.func
    def pendulum_rate(x: State, c: Control, p: Parameters):
        sine = sines(x)
        cosine = cosines(x)
        acceleration = solve(mass_matrix(sine, cosine, p), forces(x, sine, cosine, c[0], p))
        out = State()
        for i in range(wp.static(size)):
            out[2 * i] = x[2 * i + 1]
            out[2 * i + 1] = acceleration[i]
        return out

    return pendulum_rate


def _picture(system: Pendulum, state: np.ndarray, control: np.ndarray | None) -> Picture:
    x, angles = float(state[0]), np.asarray(state[2::2], dtype=float)
    reach = 1.15 * system.length * system.links + WIDTH
    across, up = (np.cumsum([0.0, *system.length * part]) for part in (np.sin(angles), np.cos(angles)))
    joints = np.stack([x + across, np.zeros(len(up)), up], axis=1)
    parts = cart_parts(x, control, reach)
    for number, (start, end) in enumerate(zip(joints[:-1], joints[1:], strict=True), 1):
        parts[f"link {number}"] = Rod(start, end, 0.03, BLUE)
        parts[f"joint {number}"] = Ball(end, 0.05, BLUE)
    return Picture(parts, (x - reach, -0.4, -reach), (x + reach, 0.4, reach), labels=("position [m]", ""))
