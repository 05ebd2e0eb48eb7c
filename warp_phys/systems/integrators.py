"""From a rate of change to a step: explicit Euler, semi-implicit Euler, Runge–Kutta of order four.

The step length is the field `dt` of the parameter struct. Every component of the next state is written once: where a
vector component is overwritten, Warp's adjoint goes on counting the value that is gone.
"""

from typing import Any

import warp as wp

from warp_phys.errors import check_choice

INTEGRATORS = ("euler", "semi-implicit", "rk4")
"""The integrators by name."""


def integrate(rate: Any, types: Any, integrator: str, block: int = 1) -> Any:
    """Return the Warp function `step(x, c, p)` of the system x' = rate(x, c, p).

    Args:
        rate: Warp function (State, Control, Parameters) → State.
        types: The system's State, Control, Parameters and real type (`SystemTypes`).
        integrator: One of `INTEGRATORS`; the control is held constant over the step.
        block: For "semi-implicit", the layout of the state: `block` positions, then their velocities, and so on.

    Raises:
        ValueError: The integrator is unknown, or the states do not fit "semi-implicit".
    """
    check_choice("integrator", integrator, INTEGRATORS)
    if integrator == "semi-implicit" and types.state_size % (2 * block):
        raise ValueError(
            f"semi-implicit needs states in turn of {block} positions and {block} velocities, got {types.state_size}; "
            "use euler or rk4, or write the step"
        )
    if integrator == "euler":
        return _euler(rate, types)
    if integrator == "rk4":
        return _rk4(rate, types)
    return _semi_implicit(rate, types, block)


def _euler(rate, types):
    """x_{n+1} = x_n + dt f(x_n, c_n). First order."""
    State, Control, Parameters = types.State, types.Control, types.Parameters

    @wp.func
    def euler_step(x: State, c: Control, p: Parameters):
        return x + p.dt * rate(x, c, p)

    return euler_step


def _semi_implicit(rate, types, block):
    """Velocities first, positions with the new ones: v' = v + dt a(q, v), q' = q + dt v'. First order, symplectic."""
    State, Control, Parameters = types.State, types.Control, types.Parameters
    size = types.state_size

    @wp.func
    def semi_implicit_step(x: State, c: Control, p: Parameters):
        r = rate(x, c, p)
        y = State()
        for i in range(wp.static(size // 2)):
            q = 2 * wp.static(block) * (i // wp.static(block)) + i % wp.static(block)
            v = q + wp.static(block)
            y[q] = x[q] + p.dt * (x[v] + p.dt * r[v])
            y[v] = x[v] + p.dt * r[v]
        return y

    return semi_implicit_step


def _rk4(rate, types):
    """The classical Runge–Kutta method. Fourth order."""
    State, Control, Parameters, real = types.State, types.Control, types.Parameters, types.real

    @wp.func
    def rk4_step(x: State, c: Control, p: Parameters):
        h = p.dt
        half = h * real(0.5)
        k1 = rate(x, c, p)
        k2 = rate(x + half * k1, c, p)
        k3 = rate(x + half * k2, c, p)
        k4 = rate(x + h * k3, c, p)
        return x + (h / real(6.0)) * (k1 + real(2.0) * k2 + real(2.0) * k3 + k4)

    return rk4_step
