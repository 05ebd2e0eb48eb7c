"""A linear system with a quadratic cost: the problem whose best feedback is known."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_finite_array, check_seed
from warp_phys.errors import check_choice, check_count, shown
from warp_phys.systems.base import System, SystemFunctions
from warp_phys.systems.drawing import INK, PALE, Block, Line, Picture, Shape, Text
from warp_phys.systems.integrators import integrate

Rows = Sequence[Sequence[float]]

LARGEST = 128
"""Most rows and columns of a matrix: its numbers stand in the code of the kernels."""


class Riccati(NamedTuple):
    """What is best for a linear-quadratic system, for ever."""

    P: np.ndarray
    """Least cost that is left, xᵀ P x; shape (N, N)."""
    gain: np.ndarray
    """Best feedback c = −gain x; shape (K, N)."""


@dataclass(frozen=True)
class LinearQuadratic(System):
    """A linear system x' = A x + B c, with a cost of its state and of its control.

    The control is held constant over a step and is then part of the state, as what was done last: so the cost of
    controls is one of states, and the loss, which SUMS the pointwise cost xᵀ Q x + c_lastᵀ R c_last over the chosen
    times, is that of the textbooks. State [x_1, …, x_N, c_last_1, …, c_last_K], D = N + K; control [c_1, …, c_K]. All
    quantities are plain numbers without a unit. A, B, Q and R stand in the kernels: other matrices compile others.

    Raises:
        TypeError, ValueError: Matrices that are not finite, that do not fit each other, or that are no costs: Q must be
            symmetric and positive semidefinite, R symmetric and positive definite; a time step that is not positive, an
            unknown integrator.

    Source: the linear-quadratic regulator, in any textbook on optimal control.

    >>> system = LinearQuadratic()
    >>> system.riccati().gain.round(3)
    array([[0.917, 1.636]])
    """

    time_average: ClassVar[bool] = False

    A: Rows = ((0.0, 1.0), (0.0, 0.0))
    """Matrix A, shape (N, N), N at most 128, numbers or an array; as given here, with B, a mass that is pushed."""
    B: Rows = ((0.0,), (1.0,))
    """Matrix B, shape (N, K)."""
    Q: Rows = ((1.0, 0.0), (0.0, 1.0))
    """Cost Q of the state, shape (N, N)."""
    R: Rows = ((1.0,),)
    """Cost R of the control, shape (K, K)."""
    dt: float = 0.1
    """Time step."""
    integrator: str = "rk4"
    """Integrator: "rk4" or explicit "euler"."""

    def __post_init__(self):
        A, B, Q, R = (_matrix(name, getattr(self, name)) for name in "ABQR")
        _check_shape("A", A, "(N, N)", (len(A), len(A)))
        _check_shape("B", B, f"(N, K) with N = {len(A)}, as A has", (len(A), B.shape[1]))
        for name, cost, size, least in (("Q", Q, len(A), "semidefinite"), ("R", R, B.shape[1], "definite")):
            _check_shape(name, cost, f"({size}, {size})", (size, size))
            _check_cost(name, cost, least)
        for name, value in zip("ABQR", (A, B, Q, R), strict=True):
            object.__setattr__(self, name, tuple(map(tuple, value.tolist())))
        check_choice("integrator", self.integrator, ("rk4", "euler"))
        self.check_numbers()

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components."""
        last = (f"last control {k} [1]" for k in range(1, len(self.R) + 1))
        return (*(f"state {i} [1]" for i in range(1, len(self.A) + 1)), *last)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components."""
        return tuple(f"control {k} [1]" for k in range(1, len(self.R) + 1))

    def step_matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a step as matrices, x_{n+1} = F x_n + G c_n; shapes (N, N) and (N, K)."""
        size, order = len(self.A), 4 if self.integrator == "rk4" else 1
        whole = np.zeros((self.state_size, self.state_size))  # of (x, c), with c' = 0
        whole[:size] = self.dt * np.hstack([self.A, self.B])
        total = term = np.eye(self.state_size)
        for k in range(1, order + 1):  # a Runge–Kutta step is a Taylor series, as far as its order
            term = term @ whole / k
            total = total + term
        return total[:size, :size], total[:size, size:]

    def riccati(self) -> Riccati:
        """Return the solution of the discrete algebraic Riccati equation of a step.

            P = Q + Fᵀ P (F − G gain),   gain = (R + Gᵀ P G)⁻¹ Gᵀ P F

        With c = −gain x the costs of all times from 0 on, none of a control before that, add up to x_0ᵀ P x_0.

        Raises:
            ValueError: No feedback makes the system stable, or Q does not see whether it is.

        Source: the structure-preserving doubling algorithm; Chu, Fan, Lin & Wang 2004.
        """
        F, G = self.step_matrices()
        R, identity = np.array(self.R), np.eye(len(F))
        a, g, P = F, G @ np.linalg.solve(R, G.T), np.array(self.Q)
        with np.errstate(all="ignore"):
            for _ in range(64):  # doublings of the horizon
                inverse = np.linalg.inv(identity + g @ P)
                more = a.T @ P @ inverse @ a
                a, g, P = a @ inverse @ a, g + a @ inverse @ g @ a.T, P + more
                if not np.isfinite(P).all() or np.abs(more).max() <= 1e-16 * np.abs(P).max():
                    break
        gain = np.linalg.solve(R + G.T @ P @ G, G.T @ P @ F) if np.isfinite(P).all() else np.zeros_like(G.T)
        if np.abs(np.linalg.eigvals(F - G @ gain)).max() >= 1.0:
            raise ValueError(
                "no feedback of least cost makes x' = A x + B c stable: B must reach, and Q see, what grows"
            )
        return Riccati(0.5 * (P + P.T), gain)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision."""
        return _functions(self, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return states uniform in [−1, 1], no control before them; shape (batch, D)."""
        batch, dtype = check_count("batch", batch), numpy_type(real_type(dtype))
        states = np.zeros((batch, self.state_size))
        states[:, : len(self.A)] = np.random.default_rng(check_seed(seed)).uniform(-1.0, 1.0, (batch, len(self.A)))
        return states.astype(dtype)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return a bar per number: states dark, what was and what will be done light."""
        return _picture(self, state, control)


def _matrix(name: str, value: Any) -> np.ndarray:
    """Return a field as a matrix of finite numbers."""
    out = check_finite_array(name, value)
    if out.ndim != 2 or out.size == 0 or max(out.shape) > LARGEST:
        raise ValueError(f"{name} must be a matrix of 1 to {LARGEST} rows and columns, got shape {out.shape}")
    return out


def _check_shape(name: str, value: np.ndarray, wanted: str, shape: tuple[int, int]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {wanted}, got {value.shape}")


def _check_cost(name: str, value: np.ndarray, least: str) -> None:
    """Raise a ValueError where a matrix is not symmetric, or not positive "definite" or "semidefinite"."""
    if (value != value.T).any():
        raise ValueError(f"{name} must be symmetric, got {shown(value.tolist())}")
    values = np.linalg.eigvalsh(value)
    rounding = 1e-12 * np.abs(values).max()
    if values[0] < -rounding or (least == "definite" and values[0] <= rounding):
        raise ValueError(f"{name} must be positive {least}, got the eigenvalue {values[0]:g}")


@functools.cache
def _functions(system: LinearQuadratic, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure, its time step travels in p, its matrices stand in the code."""
    types, size, count = system.types(real), len(system.A), len(system.R)
    State, Control, Parameters = types.State, types.Control, types.Parameters
    Vector = wp.types.vector(length=size, dtype=real)
    A, B, Q, R = (
        wp.types.matrix(shape=np.shape(value), dtype=real)(*np.ravel(value))
        for value in (system.A, system.B, system.Q, system.R)
    )

    @wp.func
    def change(i: int, x: Vector, c: Control):
        total = real(0.0)
        for j in range(wp.static(size)):
            total += A[i, j] * x[j]
        for k in range(wp.static(count)):
            total += B[i, k] * c[k]
        return total

    @wp.func
    def linear_rate(x: Vector, c: Control, p: Parameters):
        out = Vector()
        for i in range(wp.static(size)):
            out[i] = change(i, x, c)
        return out

    move = integrate(linear_rate, types._replace(State=Vector, state_size=size), system.integrator)

    @wp.func
    def moving_part(x: State):
        out = Vector()
        for i in range(wp.static(size)):
            out[i] = x[i]
        return out

    @wp.func
    def linear_step(x: State, c: Control, p: Parameters):
        y = move(moving_part(x), c, p)
        out = State()
        for i in range(wp.static(size)):
            out[i] = y[i]
        for k in range(wp.static(count)):
            out[wp.static(size) + k] = c[k]
        return out

    @wp.func
    def state_cost(x: State):
        total = real(0.0)
        for i in range(wp.static(size)):
            for j in range(wp.static(size)):
                total += Q[i, j] * x[i] * x[j]
        return total

    @wp.func
    def control_cost(x: State):
        total = real(0.0)
        for i in range(wp.static(count)):
            for j in range(wp.static(count)):
                total += R[i, j] * x[wp.static(size) + i] * x[wp.static(size) + j]
        return total

    @wp.func
    def quadratic_cost(x: State, p: Parameters):
        return state_cost(x) + control_cost(x)

    return SystemFunctions(linear_step, quadratic_cost)


def _picture(system: LinearQuadratic, state: np.ndarray, control: np.ndarray | None) -> Picture:
    size, count = len(system.A), len(system.controls)
    heights = np.array(state, dtype=float)
    if control is not None:
        heights[size:] = control
    reach = max(1.2, 1.2 * float(np.abs(heights).max()))
    parts: dict[str, Shape] = {"zero": Line(np.array([[-0.6, 0.0, 0.0], [size + count - 0.4, 0.0, 0.0]]), PALE, 1.0)}
    for i, height in enumerate(heights):
        name, colour = (f"x{i + 1}", INK) if i < size else (f"c{i - size + 1}", PALE)
        parts[name] = Block((i, 0.0, 0.5 * height), (0.7, 0.7, abs(height)), colour)
        parts[f"name of {name}"] = Text((i, 0.0, -0.93 * reach), name)
    ends = (-0.7, -0.5, -reach), (size + count - 0.3, 0.5, reach)
    return Picture(parts, *ends, labels=("", "value"), equal=False)
