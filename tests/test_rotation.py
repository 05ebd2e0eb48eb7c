"""Rotation by random probes: fields whose Jacobian is known, its standard errors, its limits."""

import numpy as np
import pytest

from warp_phys.diagnose.landscape import Landscape
from warp_phys.diagnose.plane import rotation_share
from warp_phys.diagnose.rotation import draw_probes, estimate, probe

SIZE = 40


def matrix(antisymmetric, seed=0):
    """Return a random matrix whose antisymmetric part has this share of its norm."""
    raw = np.random.default_rng(seed).standard_normal((SIZE, SIZE))
    a, s = (raw - raw.T) / 2, (raw + raw.T) / 2
    return antisymmetric * a / np.linalg.norm(a) + np.sqrt(1 - antisymmetric**2) * s / np.linalg.norm(s)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.6, 1.0])
def test_squares_are_unbiased_and_their_errors_are_right(share):
    """Over many draws the mean is the true value, and the standard errors are the scatter of the draws."""
    q, draws, count = 3.0 * matrix(share), 3000, 8
    found = []
    for seed in range(draws):
        v = draw_probes(SIZE, count, seed)
        found.append(estimate(v, v @ q.T))
    for name, error, truth in (
        ("antisymmetric", "antisymmetric_error", 9.0 * share**2),
        ("total", "total_error", 9.0),
    ):
        values, errors = (np.array([getattr(one, key) for one in found]) for key in (name, error))
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(draws) + 1e-12
        # the jackknife is conservative for products of few probes: a few per cent too large on average
        assert values.std() <= 1.05 * np.sqrt(np.mean(errors**2)) + 1e-12
        assert np.sqrt(np.mean(errors**2)) <= 1.6 * values.std() + 1e-12
    # the share is unbiased in the limit of many probes only; with 8 of them it is near
    assert abs(np.mean([one.share for one in found]) - share) < 0.06


def test_a_wrong_share_would_be_noticed():
    """The interval of two standard errors covers the true share and not one that is off by a third."""
    q, covered, off = matrix(0.6), 0, 0
    for seed in range(200):
        v = draw_probes(SIZE, 32, seed)
        found = estimate(v, v @ q.T)
        covered += abs(found.share - 0.6) < 2 * found.share_error
        off += abs(found.share - 0.8) < 2 * found.share_error
    assert covered > 180 and off < 20


@pytest.mark.parametrize(("share", "exact"), [(0.0, 0.0), (1.0, 1.0)])
def test_pure_fields_are_recognised_with_any_probes(share, exact):
    v = draw_probes(SIZE, 3)
    found = estimate(v, v @ matrix(share).T)
    assert found.share == pytest.approx(exact, abs=1e-7)
    assert found.share_error < 1e-7


def test_enough_probes_form_the_jacobian():
    q = matrix(0.3)
    v = draw_probes(SIZE, SIZE + 5)
    found = estimate(v, v @ q.T)
    assert found.share == pytest.approx(0.3, abs=1e-12) and found.share_error == 0.0
    assert found.total == pytest.approx(1.0) and found.antisymmetric == pytest.approx(0.09) and found.probes == SIZE


def test_a_field_that_is_not_linear():
    """u = ∇φ + turning, by differences; the Jacobian at the point is known."""
    q, theta = matrix(0.5), np.random.default_rng(1).standard_normal(SIZE)
    found = probe(lambda x: np.sin(x) + q @ x, theta, probes=SIZE)
    jacobian = np.diag(np.cos(theta)) + q
    expected = np.linalg.norm(jacobian - jacobian.T) / 2 / np.linalg.norm(jacobian)
    assert found.share == pytest.approx(expected, rel=1e-8)
    sampled = probe(lambda x: np.sin(x) + q @ x, theta, probes=24, seed=2)
    assert abs(sampled.share - expected) < 3 * sampled.share_error < 0.3


def test_exploded_and_vanished_products():
    v = draw_probes(SIZE, 8)
    assert estimate(v, 1e200 * (v @ matrix(0.6).T)).share == pytest.approx(estimate(v, v @ matrix(0.6).T).share)
    assert np.isnan(estimate(v, np.full_like(v, np.inf)).share)
    assert np.isnan(estimate(v, np.zeros_like(v)).share)


def test_the_plane_of_two_parameters(device):
    """The exact rotation of the polynomial's fields: two parameters, so two probes form the Jacobian."""
    landscape, theta = Landscape(device=device), np.array([1.0, -0.7])
    flows = ("R", "M", "S", "C")
    expected = np.abs(rotation_share(landscape.jacobian(theta[None], flows)))[:, 0]
    for flow, truth in zip(flows, expected, strict=True):
        found = probe(lambda x, flow=flow: landscape.evaluate(x[None], flow).updates[0, 0], theta, probes=3)
        assert found.share == pytest.approx(truth, abs=1e-7)
    assert expected[0] < 1e-8 and expected[1] > 0.2


def test_errors():
    with pytest.raises(ValueError, match="probes must be at least 3, got 2"):
        draw_probes(5, 2)
    with pytest.raises(ValueError, match="probes and products must have one shape"):
        estimate(np.zeros((4, 5)), np.zeros((4, 6)))
    with pytest.raises(ValueError, match="step must be a positive number, got 0"):
        probe(lambda x: x, [1.0, 2.0], step=0)
    with pytest.raises(ValueError, match=r"point must have shape \(P,\), got \(1, 2\)"):
        probe(lambda x: x, [[1.0, 2.0]])
