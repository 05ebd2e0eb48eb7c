"""The cart-pole against exact behaviour and its own energy."""

import numpy as np
import pytest

from tests.problems import open_loop
from warp_phys import CartPole


def _energy(system, x):
    """Energy [J] of a cart with one uniform pole: kinetic energy with inertia 4/3 m l² about the pivot, and height."""
    m, l, total = system.pole_mass, system.half_length, system.total_mass
    _, v, angle, rate = np.moveaxis(x, -1, 0)
    kinetic = 0.5 * total * v**2 + 0.5 * (4 / 3) * m * l**2 * rate**2 + m * l * v * rate * np.cos(angle)
    return kinetic + m * system.gravity * l * np.cos(angle)


def test_energy_without_force(device):
    x0 = CartPole().sample(4, seed=2, dtype=np.float64)
    drift = {}
    for integrator in ("rk4", "semi-implicit"):
        system = CartPole(dt=0.002, integrator=integrator)
        energy = _energy(system, open_loop(system, x0, np.zeros((2000, 4, 1)), device))
        drift[integrator] = np.abs(energy - energy[0]).max()
    assert drift["rk4"] < 1e-11  # measured 7e-13 J
    assert 1e-6 < drift["semi-implicit"] < 5e-3  # first order; measured 3e-4 J


def test_hanging_at_rest_stays(device):
    x0 = np.array([[0.3, 0.0, np.pi, 0.0, np.pi, 0.0]])
    states = open_loop(CartPole(poles=2), x0, np.zeros((100, 1, 1)), device)
    np.testing.assert_allclose(states, np.broadcast_to(x0, states.shape), atol=1e-14)


def test_poles_do_not_feel_their_order(device):
    system = CartPole(poles=3)
    x0 = system.sample(2, dtype=np.float64)
    swapped = x0[:, [0, 1, 6, 7, 4, 5, 2, 3]]
    controls = np.random.default_rng(0).standard_normal((50, 2, 1))
    a, b = open_loop(system, x0, controls, device), open_loop(system, swapped, controls, device)
    np.testing.assert_allclose(a[:, :, [0, 1, 6, 7, 4, 5, 2, 3]], b, rtol=1e-9, atol=1e-12)


def test_loss_by_hand():
    states = np.zeros((3, 2, 6))
    states[1, :, 2::2] = [[0.1, 0.2], [0.3, 0.4]]
    states[2, :, 2::2] = [[1.0, 2.0], [3.0, 4.0]]
    controls = np.array([[[1.0], [2.0]], [[3.0], [4.0]]])
    system = CartPole(poles=2)
    final = 1 - np.cos([1, 2, 3, 4]).mean()
    assert system.loss(states) == pytest.approx(final, rel=1e-14)
    every = 1 - np.cos([0.1, 0.2, 0.3, 0.4, 1, 2, 3, 4]).mean()
    assert system.loss(states, when="every") == pytest.approx(every, rel=1e-14)
    assert system.loss(states, controls, "every", 0.1) == pytest.approx(every + 0.1 * 7.5, rel=1e-14)
    assert system.loss(states, when=[0, 2]) == pytest.approx((0 + final) / 2, rel=1e-14)


def test_initial_states_are_distributed_as_published():
    x = CartPole(poles=2).sample(20_000, seed=0, dtype=np.float64)
    other = x[:, [0, 1, 3, 5]]
    assert np.abs(other).max() <= 1.0 and np.abs(other.std(0) - 1 / np.sqrt(3)).max() < 0.01
    angles = x[:, [2, 4]] - np.pi
    assert np.abs(angles).max() <= np.pi / 6 and np.abs(angles.std(0) - np.pi / 6 / np.sqrt(3)).max() < 0.01
