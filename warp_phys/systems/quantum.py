"""A particle in a box whose potential is tilted by the control."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.core.rows import scalar_name
from warp_phys.errors import check_count
from warp_phys.programs.native_physics import lanes_of
from warp_phys.systems.base import MOST_PARTS, System, SystemFunctions
from warp_phys.systems.drawing import GREY, INK, PALE, Line, Picture, Shape


@dataclass(frozen=True)
class Quantum(System):
    """A particle in an infinite well of width 2; the control c tilts the well: V_j = c x_j with x_j = j dx.

    Wave function ψ on N inner grid points, dx = 2 / (N + 1), stepped by Crank–Nicolson:

        (1 + i B) ψ_{n+1} = (1 − i B) ψ_n,   B tridiagonal: dt/dx² + (dt/2) c x_j on the diagonal, −dt/(2 dx²) beside it

    One batched tridiagonal solve per step, its adjoint written by hand: the solve with the conjugate transpose. The
    norm of ψ is conserved. State [re ψ_1, im ψ_1, …, re ψ_N, im ψ_N], D = 2 N; control [c], K = 1. Pointwise cost:
    1 − |⟨ψ, φ⟩|² with the eigenstate φ of number `target`; the loss SUMS it over the chosen times.

    Raises:
        TypeError, ValueError: Fewer than two points or more than 1024, a target that the grid has not, a step that is
            not positive.

    Source: Schnell & Thuerey, ICLR 2024, after Holl, Koltun & Thuerey 2020.

    >>> Quantum(points=32, target=3).state_size
    64
    """

    time_average: ClassVar[bool] = False

    points: int = 32
    """Number N of inner grid points, at most 1024."""
    target: int = 3
    """Number of the eigenstate to reach; 1 is the ground state."""
    dt: float = 1.0 / 16.0
    """Time step, in units in which ħ = m = 1."""

    def __post_init__(self):
        object.__setattr__(self, "points", check_count("points", self.points, 2, MOST_PARTS))
        object.__setattr__(self, "target", check_count("target", self.target))
        if self.target > self.points:
            raise ValueError(f"target must be at most points ({self.points}), got {self.target}")
        self.check_numbers()

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components with their units; amplitudes are normalised to Σ |ψ_j|² = 1."""
        return tuple(f"{part} psi {j} [1]" for j in range(1, self.points + 1) for part in ("re", "im"))

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components with their units."""
        return ("tilt [energy / length]",)

    @property
    def positions(self) -> np.ndarray:
        """Grid points x_j, shape (N,), in (0, 2)."""
        return np.arange(1, self.points + 1) * (2.0 / (self.points + 1))

    def eigenstate(self, number: int) -> np.ndarray:
        """Return eigenstate `number` of the untilted well, shape (N,), normalised: sin(π k j / (N + 1)).

        Raises:
            ValueError: The grid has no such eigenstate.
        """
        if check_count("number", number) > self.points:
            raise ValueError(f"number must be at most points ({self.points}), got {number}")
        values = np.sin(np.pi * number * np.arange(1, self.points + 1) / (self.points + 1))
        return values / np.linalg.norm(values)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return SystemFunctions(_step(self, real), _cost(self, real), lanes_of("Quantum", (self.points,), real))

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return random superpositions of eigenstates 1 and 2, shape (batch, D).

        Their amplitudes have independent normal magnitudes and uniform phases, normalised together.
        """
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        generator = np.random.default_rng(check_seed(seed))
        amplitudes = generator.standard_normal((batch, 2)) * np.exp(2j * np.pi * generator.random((batch, 2)))
        amplitudes /= np.linalg.norm(amplitudes, axis=1, keepdims=True)
        psi = amplitudes @ np.stack([self.eigenstate(1), self.eigenstate(2)])
        return np.stack([psi.real, psi.imag], axis=2).reshape(batch, -1).astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return |ψ|² over the position, coloured by the phase; the control tilts the floor, in a scale of its own."""
        return _picture(self, state, control)


class _Algebra(NamedTuple):
    """Warp functions for 1 ± i B: both take (ψ, c, p, sign)."""

    apply: Any
    solve: Any


@functools.cache
def _algebra(system: Quantum, real: type) -> _Algebra:
    """Return the product with 1 + sign i B and its inverse; `system` is a structure, dt travels in p.

    Complex numbers are pairs. The rows of 1 + sign i B are (sign i b, 1 + sign i d_j, sign i b) with b = −dt/(2 dx²)
    and d_j = dt/dx² + (dt/2) c x_j.
    """
    types = system.types(real)
    State, Parameters, size = types.State, types.Parameters, system.points
    Complex = wp.types.vector(length=2, dtype=real)

    @wp.func
    def times(u: Complex, v: Complex):
        return Complex(u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0])

    @wp.func
    def inverse(u: Complex):
        n = u[0] * u[0] + u[1] * u[1]
        return Complex(u[0] / n, -u[1] / n)

    @wp.func
    def diagonal(j: int, c: real, p: Parameters):
        dx = real(2.0) / real(wp.static(size + 1))
        return p.dt / (dx * dx) + real(0.5) * p.dt * c * (real(j + 1) * dx)

    @wp.func
    def beside(p: Parameters):
        dx = real(2.0) / real(wp.static(size + 1))
        return -real(0.5) * p.dt / (dx * dx)

    @wp.func
    def at(psi: State, j: int):
        return Complex(psi[2 * j], psi[2 * j + 1])

    @wp.func
    def apply(psi: State, c: real, p: Parameters, sign: real):
        out = State()
        for j in range(wp.static(size)):
            b = diagonal(j, c, p) * at(psi, j)
            if j > 0:
                b += beside(p) * at(psi, j - 1)
            if j < wp.static(size - 1):
                b += beside(p) * at(psi, j + 1)
            out[2 * j] = psi[2 * j] - sign * b[1]
            out[2 * j + 1] = psi[2 * j + 1] + sign * b[0]
        return out

    @wp.func
    def solve(rhs: State, c: real, p: Parameters, sign: real):
        # elimination without pivoting: every pivot has a real part of at least 1
        off = Complex(real(0.0), sign * beside(p))
        ratio = State()
        psi = State()
        r = Complex()
        y = Complex()
        for j in range(wp.static(size)):
            pivot = Complex(real(1.0), sign * diagonal(j, c, p))
            if j > 0:
                pivot -= times(off, r)
            w = inverse(pivot)
            r = times(off, w)
            y = times(at(rhs, j) - times(off, y), w)
            ratio[2 * j] = r[0]
            ratio[2 * j + 1] = r[1]
            psi[2 * j] = y[0]
            psi[2 * j + 1] = y[1]
        for k in range(1, wp.static(size)):
            j = wp.static(size - 1) - k
            y = at(psi, j) - times(at(ratio, j), at(psi, j + 1))
            psi[2 * j] = y[0]
            psi[2 * j + 1] = y[1]
        return psi

    return _Algebra(apply, solve)


@functools.cache
def _step(system: Quantum, real: type) -> Any:
    """Return the Crank–Nicolson step, ψ' = (1 + iB)⁻¹ (1 − iB) ψ; below it its adjoint."""
    types = system.types(real)
    State, Control, Parameters, size = types.State, types.Control, types.Parameters, system.points
    apply, solve = _algebra(system, real)

    @wp.func
    def crank_nicolson(psi: State, c: Control, p: Parameters):
        return solve(apply(psi, c[0], p, real(-1.0)), c[0], p, real(1.0))

    @wp.func
    def tilted_product(mu: State, total: State):
        # Im Σ_j x_j conj(μ_j) total_j
        out = real(0.0)
        for j in range(wp.static(size)):
            out += real(j + 1) * (mu[2 * j] * total[2 * j + 1] - mu[2 * j + 1] * total[2 * j])
        return out * (real(2.0) / real(wp.static(size + 1)))

    @wp.func_grad(crank_nicolson)
    def adj_crank_nicolson(psi: State, c: Control, p: Parameters, adj_ret: State):
        # exact: B is real and symmetric, so (1 + iB)ᴴ = 1 − iB; μ = (1 − iB)⁻¹ λ, adj ψ = (1 + iB) μ
        mu = solve(adj_ret, c[0], p, real(-1.0))
        wp.adjoint[psi] += apply(mu, c[0], p, real(1.0))
        # (1 + iB) dψ' = −i dB (ψ + ψ'), so ⟨λ, dψ'⟩ = Re ⟨μ, −i dB (ψ + ψ')⟩; dB/dc = (dt/2) x
        total = psi + crank_nicolson(psi, c, p)
        wp.adjoint[c] += Control(real(0.5) * p.dt * tilted_product(mu, total))
        # B is proportional to dt, and −iB s = (1 − iB) s − s
        wp.adjoint[p].dt += wp.dot(mu, apply(total, c[0], p, real(-1.0)) - total) / p.dt

    return crank_nicolson


@functools.cache
def _cost(system: Quantum, real: type) -> Any:
    """Return the pointwise cost 1 − |⟨ψ, φ⟩|²."""
    types = system.types(real)
    State, Parameters, size, number = types.State, types.Parameters, system.points, system.target
    Complex = wp.types.vector(length=2, dtype=real)

    # a table: a sine takes as long as the rest of a point's work
    scalar = scalar_name(real)
    numbers = ", ".join(f"{value!r}" for value in system.eigenstate(number).tolist())

    @wp.func_native(f"static const {scalar} table[] = {{{numbers}}}; return table[j];")
    def eigenfunction(j: int) -> real: ...

    @wp.func
    def overlap(psi: State):
        total = Complex()
        for j in range(wp.static(size)):
            total += eigenfunction(j) * Complex(psi[2 * j], psi[2 * j + 1])
        return total

    @wp.func
    def quantum_cost(psi: State, p: Parameters):
        return real(1.0) - wp.length_sq(overlap(psi))

    return quantum_cost


def _picture(system: Quantum, state: np.ndarray, control: np.ndarray | None) -> Picture:
    x, scale = system.positions, (system.points + 1) / 2.0
    psi = np.asarray(state, dtype=float).reshape(-1, 2) @ np.array([1.0, 1j])
    density, colours = np.abs(psi) ** 2 * scale, phase_colours(np.angle(psi))
    wanted = system.eigenstate(system.target) ** 2 * scale
    tilt = 0.0 if control is None else float(np.clip(0.05 * control[0], -0.4, 0.4))

    def over(heights: np.ndarray) -> np.ndarray:
        ends = np.concatenate([[0.0], x, [2.0]])
        return np.stack([ends, np.zeros_like(ends), np.concatenate([[0.0], heights, [0.0]])], axis=1)

    feet = np.stack([x, np.zeros_like(x), np.zeros_like(x)], axis=1)
    bars = np.stack([feet, over(density)[1:-1], np.full_like(feet, np.nan)], axis=1).reshape(-1, 3)
    parts: dict[str, Shape] = {
        "floor": Line(np.array([[0.0, 0.0, -0.6 - tilt], [2.0, 0.0, -0.6 + tilt]]), GREY, 2.0),
        "walls": Line(np.array([[0, 0, -1], [0, 0, 3], [np.nan] * 3, [2, 0, -1], [2, 0, 3]], dtype=float), PALE, 1.5),
        "phase": Line(bars, np.repeat(colours, 3, axis=0), 7.0),
        "target": Line(over(wanted), PALE, 2.5),
        "density": Line(over(density), INK, 2.5),
    }
    ends = (0.0, -0.3, -1.2), (2.0, 0.3, 3.0)
    return Picture(parts, *ends, labels=("position", "density"), equal=False)


def phase_colours(phase: np.ndarray) -> np.ndarray:
    """Return a colour per angle, shape (N, 3): 0 is red, a third of a turn green, two thirds blue."""
    return 0.5 + 0.45 * np.cos(np.asarray(phase)[..., None] - 2.0 * np.pi / 3.0 * np.arange(3))
