"""The plane of two parameters: updates against torch with `detach`, rotation, minima; in float64."""

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout import reference
from tests.systems.test_polynomial import Quadratic
from tests.taylor import check_gradient, slope
from warp_phys import Combined, Flow, Polynomial, agree, minmod
from warp_phys.diagnose import plane
from warp_phys.diagnose.landscape import Landscape
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout

FLOWS = [
    "regular",
    "modified",
    "stopped",
    "controller",
    Flow(0.9, 0.9),
    Flow(1.0, 0.7, window=2),
    Flow((0.5, 1.0, 1.2, 0.3), (1.0, 0.4, 0.0, 2.0)),
]


def _theta(count=300, reach=4.0, seed=0):
    return np.random.default_rng(seed).uniform(-reach, reach, (count, 2))


def _by_torch(flow, theta, start=-0.3, steps=4, target=2.0):
    """Return losses (B,) and updates (B, 2) by autograd, every row of θ with an unrolling of its own."""
    theta = torch.tensor(theta, requires_grad=True)
    x0 = torch.as_tensor(start, dtype=torch.float64).expand(len(theta))
    states, _ = reference.unroll(
        lambda x, c: x + c, lambda x: theta[:, 0] * x**2 + theta[:, 1] * x, x0, resolve(flow).gates(steps)
    )
    loss = 0.5 * (states[-1] - target) ** 2
    (update,) = torch.autograd.grad(loss.sum(), theta)
    return loss.detach().numpy(), update.numpy()


def _relative(update, expected):
    return (np.linalg.norm(update - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


def test_updates_equal_torch_with_detach(device):
    theta = _theta()
    found = Landscape(device=device).evaluate(theta, FLOWS)
    for update, flow in zip(found.updates, FLOWS, strict=True):
        loss, expected = _by_torch(flow, theta)
        np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
        assert _relative(update, expected) < 1e-10, flow
    for i in range(len(FLOWS)):  # else this would prove nothing
        for j in range(i):
            assert _relative(found.updates[i], found.updates[j]) > 1e-3


def test_combined_is_the_sign_agreement(device):
    theta, landscape = _theta(), Landscape(device=device)
    modified, regular, combined = landscape.evaluate(theta, ["M", "R", "C"]).updates
    np.testing.assert_array_equal(combined, agree(modified, regular))
    zeros = (combined == 0.0).sum(axis=1)
    assert {0, 1, 2} == set(zeros)  # all three cases are met
    other = Combined(Flow(0.0, 0.0), Flow(0.0, 1.0), rule=minmod)
    stopped, controller, mixed = landscape.evaluate(theta, ["S", "N", other]).updates
    np.testing.assert_array_equal(mixed, minmod(stopped, controller))


@pytest.mark.parametrize("flow", ["R", "M", "S", "C"])
def test_a_rollout_gives_the_same(flow, device):
    """One θ at a time through the torch bridge."""
    system, theta = Polynomial(), _theta(6, reach=2.0)
    found = Landscape(system, device=device).evaluate(theta, flow)
    for i, point in enumerate(theta):
        controller = Quadratic(point).to(device)
        states, controls = Rollout(system, controller, 4, flow)(np.array([[system.start]]))
        loss = system.loss(states, controls)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(found.loss[i], rel=1e-12)
        np.testing.assert_allclose(controller.theta.grad.cpu().numpy(), found.updates[0, i], rtol=1e-11, atol=0.0)


def test_regular_is_the_gradient_and_modified_is_not(device):
    landscape, theta = Landscape(device=device), _theta(20, reach=0.8)
    regular, modified = landscape.evaluate(theta, ["R", "M"]).updates

    def loss(theta):
        return landscape.evaluate(theta, ()).loss.sum()

    check_gradient(loss, theta, regular, scale=0.01)
    assert slope(loss, theta, modified, 0.01 * modified) < 1.2


def test_one_pass_for_all_points(device, monkeypatch):
    """However many points and flows there are, no kernel is launched twice."""
    launched, launch = [], wp.launch

    def counting(kernel, *arguments, **options):
        launched.append(kernel.key)
        return launch(kernel, *arguments, **options)

    landscape = Landscape(device=device)
    theta = _theta(5000)
    everything = landscape.evaluate(theta)
    monkeypatch.setattr(wp, "launch", counting)
    landscape.evaluate(theta)
    assert len(launched) == len(set(launched)) == 5
    monkeypatch.undo()
    some = landscape.evaluate(theta[4990:])
    np.testing.assert_array_equal(some.updates, everything.updates[:, 4990:])
    np.testing.assert_array_equal(some.end, everything.end[4990:])


def test_each_point_may_have_its_own_system(device):
    theta, starts, targets = _theta(5), np.linspace(-1.0, 1.0, 5), np.linspace(0.5, 3.0, 5)
    landscape = Landscape(steps=3, device=device)
    found = landscape.evaluate(theta, "R", {"start": starts, "target": targets})
    loss, expected = _by_torch("R", theta, torch.tensor(starts), 3, torch.tensor(targets))
    np.testing.assert_allclose(found.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(found.updates[0], expected, rtol=1e-9, atol=1e-12)
    moved = Landscape(Polynomial(start=float(starts[1]), target=float(targets[1])), 3, device=device)
    np.testing.assert_array_equal(moved.evaluate(theta[1:2], "R").updates[0], found.updates[0, 1:2])


def test_float32(device):
    theta = _theta(100, reach=1.5).astype(np.float32)
    single, double = (Landscape(dtype=dtype, device=device).evaluate(theta) for dtype in (np.float32, np.float64))
    assert single.loss.dtype == single.updates.dtype == np.float32
    np.testing.assert_allclose(single.loss, double.loss, rtol=1e-5)
    for i in range(3):  # a component of C near zero may change sides
        np.testing.assert_allclose(single.updates[i], double.updates[i], rtol=1e-4, atol=1e-5)


def test_numbers_beyond_all_bounds(device):
    """Where x_T overflows nothing looks like a finite update, and no warning is given."""
    found = Landscape(steps=16, device=device).evaluate([[4.0, 4.0], [0.1, -0.1]])
    assert not np.isfinite(found.updates[:, 0]).any() and np.isfinite(found.updates[:, 1]).all()


def test_rotation_of_the_updates(device):
    landscape, theta = Landscape(device=device), _theta()
    jacobians = landscape.jacobian(theta, ["R", "M", "S"])
    share = np.abs(plane.rotation_share(jacobians))
    assert share[0].max() < 1e-7  # measured 6e-9
    assert np.median(share[1]) > 0.3 and np.median(share[2]) > 0.3


def test_jacobian_of_the_combined_update(device):
    """Where both components are kept it is that of M; where C jumps there is none."""
    landscape, theta = Landscape(dtype=np.float32, device=device), _theta()
    of_combined, of_modified = landscape.jacobian(theta, ["C", "M"])
    kept = Landscape(device=device).evaluate(theta, "C").updates[0] != 0.0
    smooth = np.isfinite(of_combined).all(axis=(-2, -1))
    assert smooth.mean() > 0.95
    np.testing.assert_array_equal(of_combined[smooth & kept.all(1)], of_modified[smooth & kept.all(1)])
    assert (kept.sum(1) == 0).any()
    np.testing.assert_array_equal(of_combined[smooth & ~kept.any(1)], 0.0)
    wide = landscape.jacobian(theta, "C", step=0.2)[0]
    assert 0.2 < np.isnan(wide).any(axis=(-2, -1)).mean() < 0.9


def test_jacobian_at_the_minima(device):
    """With L = e²/2, M = e g and R = e h, the Jacobians are g hᵀ and h hᵀ where e = 0."""
    landscape = Landscape(device=device)
    theta = landscape.minima(cells=60)[:, 0]
    x = np.full(len(theta), -0.3)
    features, rates = [], []
    for _ in range(4):
        features.append(np.stack([x**2, x], axis=-1))
        rates.append(1.0 + 2.0 * theta[:, 0] * x + theta[:, 1])
        x = x + theta[:, 0] * x**2 + theta[:, 1] * x
    g = sum(features)
    h = sum(f * np.prod(rates[n + 1 :], axis=0)[..., None] for n, f in enumerate(features))
    jacobians = landscape.jacobian(theta, ["M", "R"])
    for got, left in zip(jacobians, (g, h), strict=True):
        expected = left[:, :, None] * h[:, None, :]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    assert ((g * h).sum(1) < 0).any() and ((g * h).sum(1) > 0).any()


def test_minima_lie_on_the_curve(device):
    landscape = Landscape(dtype=np.float32, device=device)
    segments = landscape.minima(cells=100)
    end = Landscape(device=device).evaluate(segments.reshape(-1, 2), ()).end
    np.testing.assert_allclose(end, 2.0, rtol=0.0, atol=1e-12)  # measured 7e-14
    assert len(segments) > 100


def test_no_minimum_is_missed(device):
    """On lines of constant θ1 x_4 is a polynomial in θ2 of degree 8, whose roots numpy finds."""
    segments = Landscape(device=device).minima(cells=400)
    counts = set()
    for theta1 in np.linspace(-3.97, 3.97, 80):
        x = np.polynomial.Polynomial([-0.3])
        for _ in range(4):
            x = x + theta1 * x**2 + np.polynomial.Polynomial([0.0, 1.0]) * x
        roots = (x - 2.0).roots()
        roots = np.sort(roots[np.abs(roots.imag) < 1e-9].real)
        roots = roots[np.abs(roots) < 4.0]
        first, last = segments[:, 0], segments[:, 1]
        crossing = (first[:, 0] < theta1) != (last[:, 0] < theta1)
        first, last = first[crossing], last[crossing]
        weight = (theta1 - first[:, 0]) / (last[:, 0] - first[:, 0])
        found = np.sort(first[:, 1] + weight * (last[:, 1] - first[:, 1]))
        assert len(found) == len(roots), theta1
        np.testing.assert_allclose(found, roots, atol=5e-3)
        counts.add(len(roots))
    assert {0, 1, 2} <= counts


def test_modified_leads_away_from_some_minima(device):
    """As the sign of the Jacobian's trace says; R comes back from the same places, C comes back or stands still."""
    landscape = Landscape(device=device)
    minima = landscape.minima(cells=80)[:, 0]
    trace, of_regular = np.trace(landscape.jacobian(minima, ["M", "R"]), axis1=2, axis2=3)
    # elsewhere the steps would have to be shorter
    gentle = (np.abs(minima) < 3.5).all(axis=1) & (np.abs(trace) > 0.5) & (of_regular < 500.0)
    repelling, attracting = minima[gentle & (trace < 0.0)], minima[gentle & (trace > 0.0)]
    assert len(repelling) >= 5 and len(attracting) >= 5

    def ratio(points, flow):
        theta = points + 1e-6
        first = landscape.evaluate(theta, ()).loss
        for _ in range(100):
            theta = theta - 1e-3 * landscape.evaluate(theta, flow).updates[0]
        return landscape.evaluate(theta, ()).loss / first

    assert (ratio(repelling, "M") > 1.0).all() and (ratio(attracting, "M") < 1.0).all()
    assert (ratio(repelling, "R") < 1.0).all()
    of_combined = ratio(repelling, "C")
    still = of_combined == 1.0
    assert still.any() and not still.all() and (of_combined[~still] < 1.0).all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Landscape(system="polynomial"), TypeError, "system must be a Polynomial, got 'polynomial'"),
        (lambda: Landscape(steps=0), ValueError, "steps must be at least 1, got 0"),
        (lambda: Landscape(dtype="float16"), TypeError, "dtype must be float32 or float64, got 'float16'"),
        (lambda: Landscape().evaluate([[1.0, 2.0, 3.0]]), ValueError, r"theta must have shape \(count, 2\)"),
        (lambda: Landscape().evaluate([[1.0, np.inf]]), ValueError, r"theta must be finite, rows \[0\] are not"),
        (lambda: Landscape().evaluate([[1.0, 2.0]], "RM"), ValueError, "flow 'RM' is unknown"),
        (
            lambda: Landscape(steps=3).evaluate([[1.0, 2.0]], Flow((1.0, 0.0), 1.0)),
            ValueError,
            "the flow's physics gate has 2 numbers, the rollout has 3 steps",
        ),
        (
            lambda: Landscape().evaluate([[1.0, 2.0]] * 4, "R", {"start": [0.1, 0.2]}),
            ValueError,
            r"parameters must have length 1 or 4 \(the batch\), got 2",
        ),
        (lambda: Landscape().evaluate([[1.0, 2.0]], "R", {"goal": 1.0}), ValueError, "parameters goal are unknown"),
        (lambda: Landscape().jacobian([[1.0, 2.0]], step=-1.0), ValueError, "step must be a positive number, got -1.0"),
        (lambda: Landscape().minima(bounds=(0.0, 0.0)), ValueError, "bounds must be finite and ascend"),
    ],
)
def test_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
