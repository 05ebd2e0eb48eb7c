"""The planar quadrotor: flights with known paths, symmetry, its cost by hand."""

import numpy as np
import pytest

from tests.problems import open_loop
from warp_phys import Quadrotor


def test_hovering_stays_and_falling_is_a_parabola(device):
    """Two flights without drag: zero control at level rest; rotors off, thrown, tumbling."""
    system = Quadrotor(drag=0.0)
    thrown = np.array([0.3, 0.5, 0.4, 1.0, 2.0, 3.0])
    controls = np.zeros((50, 2, 2))
    controls[:, 1] = -0.5 * system.mass * system.gravity
    states = open_loop(system, np.stack([np.zeros(6), thrown]), controls, device)
    np.testing.assert_allclose(states[:, 0], 0.0, atol=1e-14)
    n = np.arange(51)
    time, fallen = system.dt * n, system.gravity * system.dt**2 * n * (n + 1) / 2.0  # of semi-implicit Euler
    expected = thrown + np.stack([time, 2 * time - fallen, 3 * time, 0 * n, -system.gravity * time, 0 * n], axis=1)
    np.testing.assert_allclose(states[:, 1], expected, atol=1e-13)


def test_a_hovering_quadrotor_goes_with_the_wind(device):
    """x'_n = w (1 − (1 − d dt / m)^n), and so upwards."""
    system = Quadrotor(wind_x=2.0, wind_z=-0.5)
    states = open_loop(system, np.zeros((1, 6)), np.zeros((300, 1, 2)), device)
    share = 1.0 - (1.0 - system.drag * system.dt / system.mass) ** np.arange(301)
    np.testing.assert_allclose(states[:, 0, 3:5], share[:, None] * [2.0, -0.5], atol=1e-13)


def test_a_step_by_hand(device):
    """Pitched to the left by a right angle, the thrust pushes to the left; more of it on the right turns it further."""
    system = Quadrotor(dt=0.1, drag=0.2)
    x = np.array([[1.0, 2.0, np.pi / 2.0, 0.5, -0.5, 0.25]])
    y = open_loop(system, x, np.array([[[0.1, 0.3]]]), device)[-1, 0]
    force, spin = 0.4 + 0.5 * 9.81, 0.25 + 0.1 * 0.17 * 0.2 / 0.004
    velocity = np.array([0.5 + 0.1 * (-force - 0.2 * 0.5) / 0.5, -0.5 + 0.1 * (0.2 * 0.5 / 0.5 - 9.81)])
    expected = [1.0 + 0.1 * velocity[0], 2.0 + 0.1 * velocity[1], np.pi / 2.0 + 0.1 * spin, *velocity, spin]
    np.testing.assert_allclose(y, expected, rtol=1e-13)


def test_the_mirror_image_flies_the_mirror_image(device):
    x0 = Quadrotor().sample(4, dtype=np.float64)
    controls = np.random.default_rng(0).standard_normal((30, 4, 2))
    mirror = np.array([-1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    states = open_loop(Quadrotor(wind_x=1.0), x0, controls, device)
    other = open_loop(Quadrotor(wind_x=-1.0), x0 * mirror, controls[..., ::-1], device)
    np.testing.assert_allclose(other, states * mirror, rtol=1e-12, atol=1e-12)


def test_loss_by_hand():
    states = np.zeros((2, 1, 6))
    states[1, 0] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected = 0.5**2 + 3.0**2 + 4.5 + 0.1 * 41.0 + 0.02 * 36.0
    assert Quadrotor(target_x=0.5, target_z=-1.0).loss(states) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"mass": -0.5}, ValueError, "mass must be positive, got -0.5"),
        ({"inertia": 0.0}, ValueError, "inertia must be positive, got 0.0"),
        ({"drag": -1}, ValueError, "drag must be not negative, got -1"),
        ({"wind_x": np.inf}, ValueError, "wind_x must be finite, got inf"),
        ({"dt": 0.0}, ValueError, "dt must be positive, got 0.0"),
        ({"mass": None}, TypeError, "mass must be a number, got None"),
        ({"integrator": "rk2"}, ValueError, "integrator must be one of"),
    ],
)
def test_mistakes(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Quadrotor(**arguments)
