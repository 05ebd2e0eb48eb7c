"""A cart that carries several poles."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.systems.base import MOST_PARTS, System, SystemFunctions
from warp_phys.systems.integrators import INTEGRATORS, integrate

WIDTH, HEIGHT = 0.4, 0.2
"""Of the cart in pictures [m]."""


@dataclass(frozen=True)
class CartPole(System):
    """One cart with P poles that do not touch each other, pushed by a force f.

        A_i   = (f + m l sin θ_i θ_i'²) / M
        θ_i'' = (g sin θ_i − cos θ_i A_i) / (l (4/3 − m cos² θ_i / M))
        x''   = (f + m l Σ_i (sin θ_i θ_i'² − θ_i'' cos θ_i)) / M

    State [x, x', θ1, θ1', …, θP, θP'], D = 2 (P + 1); θ = 0 is upright, θ = π hangs down. Control [f], K = 1.
    Pointwise cost: mean over the poles of 1 − cos θ.

    Raises:
        TypeError, ValueError: A pole count below one or above 1024, a mass, length or time step that is not positive, a
            parameter that is not a finite number, an unknown integrator.

    Source: Schnell & Thuerey, ICLR 2024, after Barto, Sutton & Anderson 1983 and Florian 2007.

    >>> CartPole(poles=2).state_size
    6
    """

    positive: ClassVar = ("pole_mass", "total_mass", "half_length")

    poles: int = 1
    """Number P of poles, at most 1024."""
    dt: float = 0.01
    """Time step [s]."""
    gravity: float = 9.8
    """Gravitational acceleration g [m/s²]."""
    pole_mass: float = 0.1
    """Mass m of one pole [kg]."""
    total_mass: float = 1.1
    """Mass M that the force moves [kg]; as published it stays 1.1 for any number of poles."""
    half_length: float = 0.5
    """Half length l of a pole [m]."""
    integrator: str = "semi-implicit"
    """Integrator: "semi-implicit" Euler as published (velocities first), "euler", or "rk4"."""

    def __post_init__(self):
        object.__setattr__(self, "poles", check_count("poles", self.poles, most=MOST_PARTS))
        check_choice("integrator", self.integrator, INTEGRATORS)
        self.check_numbers()

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components with their units."""
        poles = (f"{name} {i} [{unit}]" for i in range(1, self.poles + 1) for name, unit in _POLE_COMPONENTS)
        return ("position [m]", "velocity [m/s]", *poles)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components with their units."""
        return ("force [N]",)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        step = integrate(_rate(self, real), self.types(real), self.integrator)
        return SystemFunctions(step, upright_cost(self, self.poles, real))

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return hanging states: x, x' and θ' uniform in [−1, 1], θ = π + uniform(−π/6, π/6); shape (batch, D)."""
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        states = np.random.default_rng(check_seed(seed)).uniform(-1.0, 1.0, (batch, self.state_size))
        states[:, 2::2] = np.pi + states[:, 2::2] * (np.pi / 6.0)
        return states.astype(dtype)

    def sketch(self, axes: Any) -> Callable[..., Sequence[Any]]:
        """Put cart, poles, rail and force on matplotlib `axes`; return a function (state, control=None) that moves."""
        return _sketch(self, axes)


_POLE_COMPONENTS = (("angle", "rad"), ("rate", "rad/s"))


@functools.cache
def _rate(system: CartPole, real: type) -> Any:
    """Return the rate of change of the state; `system` is a structure, its numbers travel in p."""
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters
    Poles = wp.types.vector(length=system.poles, dtype=real)

    @wp.func
    def sines(x: State):
        out = Poles()
        for i in range(wp.static(system.poles)):
            out[i] = wp.sin(x[2 * i + 2])
        return out

    @wp.func
    def cosines(x: State):
        out = Poles()
        for i in range(wp.static(system.poles)):
            out[i] = wp.cos(x[2 * i + 2])
        return out

    @wp.func
    def pole_acceleration(sine: real, cosine: real, omega: real, f: real, p: Parameters):
        push = (f + p.pole_mass * p.half_length * sine * omega * omega) / p.total_mass
        inertia = p.half_length * (real(4.0) / real(3.0) - p.pole_mass * cosine * cosine / p.total_mass)
        return (p.gravity * sine - cosine * push) / inertia

    @wp.func
    def pole_accelerations(x: State, sine: Poles, cosine: Poles, f: real, p: Parameters):
        out = Poles()
        for i in range(wp.static(system.poles)):
            out[i] = pole_acceleration(sine[i], cosine[i], x[2 * i + 3], f, p)
        return out

    @wp.func
    def reaction(x: State, sine: Poles, cosine: Poles, acceleration: Poles):
        total = real(0.0)
        for i in range(wp.static(system.poles)):
            omega = x[2 * i + 3]
            total += sine[i] * omega * omega - acceleration[i] * cosine[i]
        return total

    @wp.func
    def cart_pole_rate(x: State, c: Control, p: Parameters):
        sine = sines(x)
        cosine = cosines(x)
        acceleration = pole_accelerations(x, sine, cosine, c[0], p)
        out = State()
        out[0] = x[1]
        out[1] = (c[0] + p.pole_mass * p.half_length * reaction(x, sine, cosine, acceleration)) / p.total_mass
        for i in range(wp.static(system.poles)):
            out[2 * i + 2] = x[2 * i + 3]
            out[2 * i + 3] = acceleration[i]
        return out

    return cart_pole_rate


@functools.cache
def upright_cost(system: System, bodies: int, real: type) -> Any:
    """Return the pointwise cost of bodies on a cart: the mean over them of 1 − cos θ; state [x, x', θ1, θ1', …]."""
    types = system.types(real)
    State, Parameters = types.State, types.Parameters

    @wp.func
    def sum_of_cosines(x: State):
        total = real(0.0)
        for i in range(wp.static(bodies)):
            total += wp.cos(x[2 * i + 2])
        return total

    @wp.func
    def cart_pole_cost(x: State, p: Parameters):
        return real(1.0) - sum_of_cosines(x) / real(wp.static(bodies))

    return cart_pole_cost


def sketch_cart(axes: Any, reach: float) -> Callable[..., Sequence[Any]]:
    """Put a cart, its rail and the force on it on `axes`, in metres; return a function (x, control) that moves them.

    The picture shows so much to either side of the cart, and follows it.
    """
    (rail,) = axes.plot([-1e3, 1e3], [-HEIGHT / 2] * 2, color="0.6", linewidth=1, zorder=0)
    ticks = axes.plot(np.arange(-50, 51), np.full(101, -HEIGHT / 2), "|", color="0.6", markersize=6, zorder=0)
    (cart,) = axes.fill([0.0] * 4, [0.0] * 4, color="0.25", zorder=3)
    (force,) = axes.plot([], [], color="0.25", linewidth=1.5, zorder=2)
    axes.set(aspect="equal", yticks=[], xlabel="position [m]")

    def move(x: float, control: np.ndarray | None) -> Sequence[Any]:
        left, right = x - WIDTH / 2, x + WIDTH / 2
        cart.set_xy([(left, -HEIGHT / 2), (right, -HEIGHT / 2), (right, HEIGHT / 2), (left, HEIGHT / 2)])
        push = 0.0 if control is None else float(np.clip(0.05 * control[0], -reach, reach))
        force.set_data([x, x + push], [0.0, 0.0])
        axes.set_xlim(x - reach, x + reach)
        return [cart, force, rail, *ticks]

    return move


def _sketch(system: CartPole, axes: Any) -> Callable[..., Sequence[Any]]:
    """Draw in metres; the picture follows the cart once it leaves the middle. Poles have their full length 2 l."""
    length = 2.0 * system.half_length
    move_cart = sketch_cart(axes, 1.15 * length + WIDTH)
    colours = [f"C{i % 10}" for i in range(system.poles)]
    poles = [axes.plot([], [], color=colour, linewidth=3, solid_capstyle="round", zorder=4)[0] for colour in colours]
    axes.set(ylim=(-1.2 * length, 1.2 * length))

    def move(state: np.ndarray, control: np.ndarray | None = None) -> Sequence[Any]:
        x = float(state[0])
        for pole, angle in zip(poles, state[2::2], strict=True):
            pole.set_data([x, x + length * np.sin(angle)], [0.0, length * np.cos(angle)])
        cart, *others = move_cart(x, control)
        return [cart, *poles, *others]

    return move
