"""Jacobians, rotation and zero curves of functions of which all is known."""

import numpy as np
import pytest

from warp_phys.diagnose import plane


def _points(count=50, reach=3.0, seed=0):
    return np.random.default_rng(seed).uniform(-reach, reach, (count, 2))


def _curved(points):
    """u = (x² y + sin y, x³), whose Jacobian is known."""
    x, y = points.T
    return np.stack([x**2 * y + np.sin(y), x**3], axis=-1)


def test_jacobian_of_a_known_field():
    x, y = (points := _points()).T
    expected = np.stack([np.stack([2 * x * y, x**2 + np.cos(y)], -1), np.stack([3 * x**2, 0 * x], -1)], -2)
    np.testing.assert_allclose(plane.jacobian(_curved, points), expected, rtol=0.0, atol=1e-8)


def test_jacobian_asks_once():
    """All points and all differences go into one call, and further dimensions of the field are kept."""
    calls = []

    def three_fields(points):
        calls.append(points.shape)
        return np.stack([_curved(points), -_curved(points), points])

    points = _points()
    jacobians = plane.jacobian(three_fields, points)
    assert calls == [(200, 2)] and jacobians.shape == (3, 50, 2, 2)
    np.testing.assert_allclose(jacobians[2], np.broadcast_to(np.eye(2), (50, 2, 2)), atol=1e-9)
    np.testing.assert_array_equal(jacobians[0], -jacobians[1])


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.1, np.pi / 2])
def test_rotation_of_a_turned_gradient(angle):
    """u = Q θ with Q the rotation by an angle: antisymmetric part −sin φ, and so is its share of the whole."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    jacobians = plane.jacobian(lambda points: points @ turn.T, _points())
    np.testing.assert_allclose(plane.rotation(jacobians), -np.sin(angle), atol=1e-9)
    np.testing.assert_allclose(plane.rotation_share(jacobians), -np.sin(angle), atol=1e-9)


def test_rotation_share_does_not_know_sizes():
    jacobians = np.random.default_rng(0).standard_normal((20, 2, 2))
    share = plane.rotation_share(jacobians)
    assert np.abs(share).max() <= 1.0 and np.abs(share).min() > 0.0
    for size in (1e-250, 1e250):
        np.testing.assert_allclose(plane.rotation_share(size * jacobians), share, rtol=1e-12)
    antisymmetric = 0.5 * (jacobians - np.swapaxes(jacobians, -1, -2))
    expected = np.linalg.norm(antisymmetric, axis=(-2, -1)) / np.linalg.norm(jacobians, axis=(-2, -1))
    np.testing.assert_allclose(np.abs(share), expected, rtol=1e-12)
    assert plane.rotation_share(np.zeros((2, 2))) == 0.0


def test_a_jump_has_no_jacobian():
    """A field whose first component is cut to 0 for y < 0.5."""

    def field(points):
        return np.stack([np.where(points[:, 1] < 0.5, 0.0, 2.0), points[:, 0]], axis=-1)

    points = [[1.0, 0.5 - 2e-3], [1.0, 0.5 - 5e-4], [1.0, 0.5 + 5e-4], [1.0, 0.5 + 2e-3]]
    jacobians = plane.jacobian(field, points, step=1e-3, cut=True)
    assert np.isnan(jacobians[1:3]).all()
    np.testing.assert_allclose(jacobians[[0, 3]], [[[0.0, 0.0], [1.0, 0.0]]] * 2, atol=1e-9)
    assert plane.jacobian(field, points, step=1e-3)[1, 0, 1] == pytest.approx(1000.0)


def test_zeros_lie_on_the_curve():
    segments = plane.zero_curves(lambda p: (p**2).sum(1) - 2.03, bounds=(-2.0, 3.0), cells=100)
    np.testing.assert_allclose(np.hypot(*segments.reshape(-1, 2).T), np.sqrt(2.03), rtol=1e-15)
    lengths = np.hypot(*(segments[:, 1] - segments[:, 0]).T)
    assert lengths.max() <= np.sqrt(2.0) * 0.05
    assert lengths.sum() == pytest.approx(2 * np.pi * np.sqrt(2.03), rel=1e-3)
    # a closed curve: every point ends two segments
    _, counts = np.unique(segments.reshape(-1, 2), axis=0, return_counts=True)
    assert (counts == 2).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_two_branches_in_one_square_stay_apart(sign):
    """The hyperbola x y = ±1e-3 crosses all four edges of the square in the middle."""
    segments = plane.zero_curves(lambda p: p[:, 0] * p[:, 1] - sign * 1e-3, bounds=(-1.05, 1.05), cells=21)
    middle = (np.abs(segments) <= 0.05 + 1e-12).all(axis=(1, 2))
    assert middle.sum() == 2
    np.testing.assert_array_equal(np.sign(segments[:, 0]), np.sign(segments[:, 1]))


def test_a_function_without_zeros():
    assert plane.zero_curves(lambda p: 1.0 + (p**2).sum(1), cells=5).shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: plane.jacobian(_curved, [1.0, 2.0]), ValueError, r"points must have shape \(count, 2\) .* got \(2,\)"),
        (lambda: plane.jacobian(_curved, np.zeros((0, 2))), ValueError, "with at least one point"),
        (lambda: plane.jacobian(_curved, [[1.0, np.nan]]), ValueError, r"points must be finite, rows \[0\] are not"),
        (lambda: plane.jacobian(_curved, "here"), TypeError, "points must be numbers of shape"),
        (lambda: plane.jacobian(_curved, [[1.0, 2.0]], step=0.0), ValueError, "step must be a positive number"),
        (lambda: plane.zero_curves(_curved, bounds=(1.0, -1.0)), ValueError, "bounds must be finite and ascend"),
        (lambda: plane.zero_curves(_curved, bounds=3.0), TypeError, "bounds must be two numbers, got 3.0"),
        (lambda: plane.zero_curves(_curved, cells=0), ValueError, "cells must be at least 1, got 0"),
    ],
)
def test_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
