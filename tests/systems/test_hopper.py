"""The disc over a floor: free flight, energy of a bounce, what friction leaves alone, rest at any stiffness."""

import numpy as np
import pytest

from tests.problems import open_loop
from warp_phys import Hopper

NOTHING = {"damping": 0.0, "friction": 0.0}


def test_above_the_floor_it_flies(device):
    system, n = Hopper(), np.arange(41)
    x0 = np.array([[0.2, 5.0, 0.1, 1.0, 2.0, 3.0]])
    states = open_loop(system, x0, np.zeros((40, 1, 2)), device)[:, 0]
    time, fallen = system.dt * n, system.gravity * system.dt**2 * n * (n + 1) / 2.0  # of semi-implicit Euler
    path = np.stack([time, 2 * time - fallen, 3 * time, 0 * n, -system.gravity * time, 0 * n], axis=1)
    np.testing.assert_allclose(states, x0 + path, atol=1e-13)


@pytest.mark.parametrize("stiffness", [200.0, 2000.0, 20000.0])
def test_a_bounce_without_damping_gives_all_energy_back(stiffness, device):
    system = Hopper(stiffness=stiffness, dt=2e-4, integrator="rk4", **NOTHING)
    x0 = np.array([[0.0, 0.4, 0.0, 0.3, 0.0, 2.0]])
    states = open_loop(system, x0, np.zeros((5000, 1, 2)), device)[:, 0]
    flying = states[:, 1] > 0.25
    energy = 0.5 * states[:, 4] ** 2 + system.gravity * states[:, 1]
    assert (np.diff(flying.astype(int)) == 1).any()  # it came back
    assert np.abs(energy[flying] - energy[0]).max() < 1e-5 * energy[0]
    np.testing.assert_allclose(states[:, [3, 5]], states[:1, [3, 5]] + np.zeros((5001, 1)), rtol=1e-13)


def test_damping_takes_energy(device):
    """Each bounce of a damped disc is lower than the one before."""
    system = Hopper(dt=1e-3, stiffness=200.0, friction=0.0)
    heights = open_loop(system, np.array([[0.0, 0.5, 0.0, 0.0, 0.0, 0.0]]), np.zeros((3000, 1, 2)), device)[:, 0, 1]
    tops = heights[1:-1][(heights[1:-1] > heights[:-2]) & (heights[1:-1] >= heights[2:]) & (heights[1:-1] > 0.12)]
    assert len(tops) >= 2 and (np.diff([0.5, *tops]) < -1e-3).all()


def test_what_friction_cannot_change(device):
    """J φ' − r m x' changes by the torque alone; a spinning disc on the floor rolls in the end, and does not slip."""
    system = Hopper(stiffness=200.0)
    x0 = np.array([[0.0, 0.1, 0.0, 0.0, 0.0, 20.0]])
    states = open_loop(system, x0, np.zeros((600, 1, 2)), device)[:, 0]
    held = system.inertia * states[:, 5] - system.radius * system.mass * states[:, 3]
    np.testing.assert_allclose(held, held[0], rtol=1e-12)
    slip = states[:, 3] + system.radius * states[:, 5]
    assert slip[0] == 2.0 and abs(slip[-1]) < 1e-6


def test_rest(device):
    """Pressed in until the floor carries its weight, k s softplus((r − z) / s) = m g, it stays, at any stiffness."""
    for stiffness in (200.0, 2000.0, 20000.0):
        system = Hopper(stiffness=stiffness)
        depth = system.mass * system.gravity / (stiffness * system.softness)
        z = system.radius - system.softness * np.log(np.expm1(depth))
        x0 = np.array([[0.0, z, 0.0, 0.0, 0.0, 0.0]])
        states = open_loop(system, x0, np.zeros((40, 1, 2)), device)
        np.testing.assert_allclose(states, np.broadcast_to(x0, states.shape), atol=1e-12)


def test_loss_by_hand():
    states = np.zeros((2, 1, 6))
    states[1, 0] = [1.5, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert Hopper(target=0.5).loss(states) == pytest.approx(1.0 + 0.1 * 41.0 + 0.001 * 36.0, rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"stiffness": 0.0}, ValueError, "stiffness must be positive, got 0.0"),
        ({"softness": -0.01}, ValueError, "softness must be positive, got -0.01"),
        ({"mass": -1.0}, ValueError, "mass must be positive, got -1.0"),
        ({"friction": -0.8}, ValueError, "friction must be not negative, got -0.8"),
        ({"target": "there"}, TypeError, "target must be a number, got 'there'"),
        ({"integrator": 4}, ValueError, "integrator must be one of"),
    ],
)
def test_mistakes(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Hopper(**arguments)
