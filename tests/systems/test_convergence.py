"""The order of convergence of every integrator, on every system that has a choice of them."""

import dataclasses

import numpy as np
import pytest

from tests.problems import open_loop
from warp_phys import CartPole, Hopper, LinearQuadratic, Pendulum, Quadrotor

SYSTEMS = {
    "cart-pole": CartPole(poles=2),
    "pendulum": Pendulum(),
    "quadrotor": Quadrotor(),
    "hopper": Hopper(stiffness=200.0, softness=0.1, slip_speed=1.0),
    "linear": LinearQuadratic(A=((0.0, 1.0), (-2.0, -0.3)), B=((0.1,), (1.0,))),
}
CASES = [(name, integrator) for name in SYSTEMS for integrator in ("semi-implicit", "rk4") if name != "linear"]
CASES += [("cart-pole", "euler"), ("linear", "euler"), ("linear", "rk4")]


@pytest.mark.parametrize(("name", "integrator"), CASES)
def test_order_of_convergence(name, integrator, device):
    system, order = SYSTEMS[name], 4 if integrator == "rk4" else 1
    x0 = system.sample(4, seed=1, dtype=np.float64)
    controls = 0.3 * np.random.default_rng(0).standard_normal((1, 4, system.control_size))

    def end(integrator, steps):
        with_it = dataclasses.replace(system, dt=0.5 / steps, integrator=integrator)
        return open_loop(with_it, x0, np.repeat(controls, steps, 0), device)[-1]

    exact = end("rk4", 4096)
    counts = np.array([64, 128, 256]) if order == 1 else np.array([16, 32, 64])
    errors = [np.abs(end(integrator, n) - exact).max() for n in counts]
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(order, abs=0.25)
