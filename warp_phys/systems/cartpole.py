"""A cart that carries several poles."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count
from warp_phys.systems.base import MOST_PARTS, System, SystemFunctions
from warp_phys.systems.drawing import INK, PALE, Block, Line, Picture, Rod, Shape
from warp_phys.systems.integrators import INTEGRATORS, integrate

WIDTH, HEIGHT = 0.4, 0.2
"""Of the cart in pictures [m]."""
POLE_GAP = 0.07
"""From one pole to the next in pictures [m]."""
POLE_COLOURS = ("#332288", "#AA4499", "#999933", "#88CCEE", "#661100", "#44AA99")
"""Of Paul Tol's palette; they repeat."""


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

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return cart and poles in metres; the picture follows the cart. Poles have their full length 2 l."""
        return _picture(self, state, control)


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


def cart_parts(x: float, control: np.ndarray | None, reach: float) -> dict[str, Shape]:
    """Return a cart at x, its rail with a mark every metre, and the force on it, whose bar is `reach` at most."""
    push = 0.0 if control is None else float(np.clip(0.05 * control[0], -reach, reach))
    under, gap = -0.5 * HEIGHT, [np.nan] * 3
    middle = round(x)
    marks = [[[i, 0, under - 0.05], [i, 0, under + 0.05], gap] for i in range(middle - 12, middle + 13)]
    return {
        "rail": Line(np.array([[middle - 12.5, 0.0, under], [middle + 12.5, 0.0, under]]), PALE, 2.0),
        "marks": Line(np.array(marks, dtype=float).reshape(-1, 3), PALE, 2.0),
        "force": Rod((x, 0.0, 0.0), (x + push, 0.0, 0.0), 0.03, INK),
        "cart": Block((x, 0.0, 0.0), (WIDTH, WIDTH, HEIGHT), "#404040"),
    }


def _picture(system: CartPole, state: np.ndarray, control: np.ndarray | None) -> Picture:
    x, length = float(state[0]), 2.0 * system.half_length
    reach = 1.15 * length + WIDTH
    parts = cart_parts(x, control, reach)
    # in front of the cart, one before the other, as none touches the others
    for i, angle in enumerate(np.asarray(state[2::2], dtype=float)):
        away = -0.5 * WIDTH - POLE_GAP * (system.poles - i)
        end = (x + length * np.sin(angle), away, length * np.cos(angle))
        parts[f"pole {i + 1}"] = Rod((x, away, 0.0), end, 0.03, POLE_COLOURS[i % len(POLE_COLOURS)])
    high = 1.2 * length
    return Picture(parts, (x - reach, -0.6, -high), (x + reach, 0.4, high), labels=("position [m]", ""))
