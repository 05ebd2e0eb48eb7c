"""The chain on a cart against its own energy, found from the velocities of its masses."""

import numpy as np
import pytest

from tests.problems import open_loop
from warp_phys import Pendulum


def _energy(system, x):
    """Energy [J] of states (…, D): of each mass, kinetic and height."""
    m, l, angles, rates = system.link_mass, system.length, x[..., 2::2], x[..., 3::2]
    across = x[..., 1:2] + l * np.cumsum(rates * np.cos(angles), -1)
    up = -l * np.cumsum(rates * np.sin(angles), -1)
    height = l * np.cumsum(np.cos(angles), -1)
    cart = 0.5 * system.cart_mass * x[..., 1] ** 2
    return cart + m * (0.5 * across**2 + 0.5 * up**2 + system.gravity * height).sum(-1)


@pytest.mark.parametrize("links", [2, 3])
def test_energy_is_what_the_force_has_done(links, device):
    """Under a constant force f, E − f x stays what it was."""
    x0 = Pendulum(links=links).sample(16, seed=2, dtype=np.float64)
    x0[:, 2::2] -= np.pi / 2.0  # the chain lies, and falls
    drift = []
    for dt in (0.01, 0.005):
        steps, system = round(1.0 / dt), Pendulum(links=links, dt=dt, cart_mass=0.7, link_mass=0.3)
        x = open_loop(system, x0, np.full((steps, 16, 1), 1.7), device)
        held = _energy(system, x) - 1.7 * x[..., 0]
        drift.append(np.abs(held - held[0]).max())
    assert drift[0] < 1e-2 and drift[1] < drift[0] / 10.0  # fourth order: 16


def test_hanging_at_rest_stays(device):
    x0 = np.array([[0.3, 0.0, np.pi, 0.0, np.pi, 0.0]])
    states = open_loop(Pendulum(), x0, np.zeros((100, 1, 1)), device)
    np.testing.assert_allclose(states, np.broadcast_to(x0, states.shape), atol=1e-14)


def test_one_link_is_a_mass_on_a_rod(device):
    """Small swings under a cart that is too heavy to move have the frequency √(g / l)."""
    system = Pendulum(links=1, cart_mass=1e9, dt=0.01)
    states = open_loop(system, np.array([[0.0, 0.0, np.pi + 1e-4, 0.0]]), np.zeros((200, 1, 1)), device)
    time = 0.01 * np.arange(201)
    expected = 1e-4 * np.cos(np.sqrt(system.gravity / system.length) * time)
    np.testing.assert_allclose(states[:, 0, 2] - np.pi, expected, atol=1e-10)


def test_loss_by_hand():
    states = np.zeros((2, 1, 6))
    states[1, 0, [2, 4]] = [1.0, 2.0]
    assert Pendulum().loss(states) == pytest.approx(1.0 - (np.cos(1.0) + np.cos(2.0)) / 2.0, rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"links": 0}, ValueError, "links must be at least 1, got 0"),
        ({"links": 16}, ValueError, "links must be at most 15, got 16"),
        ({"links": 2.5}, TypeError, "links must be an integer, got 2.5"),
        ({"link_mass": -0.1}, ValueError, "link_mass must be positive, got -0.1"),
        ({"length": 0.0}, ValueError, "length must be positive, got 0.0"),
        ({"cart_mass": "heavy"}, TypeError, "cart_mass must be a number, got 'heavy'"),
        ({"integrator": "leapfrog"}, ValueError, "integrator must be one of"),
    ],
)
def test_mistakes(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Pendulum(**arguments)
