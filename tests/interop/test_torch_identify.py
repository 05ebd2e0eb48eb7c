"""Physical parameters from recorded trajectories."""

import sys

import numpy as np
import pytest
import scipy.optimize
import torch

from tests.rollout.test_systems_with_inputs import Wind
from warp_phys import CartPole, Pendulum
from warp_phys.interop.torch import identify, trajectory
from warp_phys.interop.torch.identify import _Problem, _record

CART = CartPole(dt=0.02)
BOUNDS = {"pole_mass": (0.01, 1.0), "half_length": (0.05, 5.0)}


def recorded(system, batch, steps, noise, seed=0, force=10.0):
    """Return measured states and the controls, float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.from_numpy(system.sample(batch, seed=seed, dtype=np.float64))
    controls = force * torch.randn(steps, batch, 1, dtype=torch.float64, generator=generator)
    states = trajectory(system, x0, controls)
    return states + noise * torch.randn(states.shape, dtype=torch.float64, generator=generator), controls


@pytest.mark.parametrize("mass, length", [(3.0, 1 / 3), (1 / 3, 3.0), (3.0, 3.0)])
def test_recovers_to_a_percent_from_a_factor_of_three_away(mass, length):
    states, controls = recorded(CART, 64, 50, 0.01)
    start = {"pole_mass": mass * CART.pole_mass, "half_length": length * CART.half_length}
    found = identify(CART, states, controls, start, BOUNDS)
    assert found.converged
    for name, value in found.values.items():
        assert value == pytest.approx(getattr(CART, name), rel=0.01)
        low, high = found.intervals(0.999)[name]
        assert low < getattr(CART, name) < high
    assert found.noise == pytest.approx(0.01, rel=0.05)
    assert found.system == CART.with_parameters(found.values)
    assert found.residuals.std() == pytest.approx(0.01, rel=0.05)


def test_sensitivities_against_differences():
    system = Pendulum(links=2)
    states, controls = recorded(system, 3, 7, 0.0)
    names, p = ("length", "link_mass"), np.array([0.4, 0.2])
    record = _record(system, states, controls, None)
    problem = _Problem(system, names, record, 3, np.zeros(2), np.ones(2))
    starts = problem.measured[0].clone()
    along = problem.sensitivities(p, problem.simulate(p, starts))
    size, h = system.state_size, 1e-6
    for i in range(size + 2):
        ends = []
        for sign in (1.0, -1.0):
            q, s = p.copy(), starts.clone()
            if i < size:
                s[..., i] += sign * h
            else:
                q[i - size] += sign * h
            ends.append(problem.simulate(q, s))
        differences = (ends[0] - ends[1]) / (2.0 * h)
        assert torch.linalg.norm(along[..., i] - differences) < 1e-7 * (1.0 + torch.linalg.norm(differences))


@pytest.mark.parametrize("shooting", [None, 5, 1])
def test_against_a_dense_least_squares(shooting):
    """Values and covariance are those of all unknowns in one dense problem of scipy's; 13 steps leave a short end."""
    noise = np.array([0.01, 0.02, 0.03, 0.04])
    states, controls = recorded(CART, 2, 13, torch.from_numpy(noise))
    start = {"half_length": 0.7, "pole_mass": 0.2}

    def residuals(z):
        values = {"half_length": z[0], "pole_mass": z[1]}
        simulated = trajectory(CART, torch.from_numpy(z[2:].reshape(2, 4).copy()), controls, values)
        return ((simulated - states).numpy() / noise).ravel()

    first = np.concatenate([[0.7, 0.2], states[0].numpy().ravel()])
    right = scipy.optimize.least_squares(residuals, first, jac="3-point", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    covariance = np.linalg.inv(right.jac.T @ right.jac)[:2, :2]
    found = identify(CART, states, controls, start, shooting=shooting, noise=noise)
    assert found.converged and found.gaps.shape == ({None: 0, 5: 2, 1: 12}[shooting], 2, 4)
    deviations = np.sqrt(np.diag(covariance))
    # gaps of a thousandth of the noise are left: with them values differ by as little
    assert np.abs(np.array(list(found.values.values())) - right.x[:2]).max() < 1e-3 * deviations.min()
    assert found.covariance == pytest.approx(covariance, rel=1e-3)
    assert np.abs(found.gaps).max(initial=0.0) < 1e-3 * noise.max()
    assert (found.states - states.numpy()).ravel() == pytest.approx(residuals(right.x) * np.tile(noise, 28), abs=1e-4)


def test_deviations_are_as_the_errors():
    """Errors in units of their deviation have the deviation 1."""
    errors = []
    for seed in range(24):
        states, controls = recorded(CART, 8, 20, 0.01, seed=seed)
        found = identify(CART, states, controls, {"pole_mass": 0.12, "half_length": 0.55}, BOUNDS)
        errors += [(found.values[name] - getattr(CART, name)) / found.deviations[name] for name in found.values]
    assert len(errors) == 48 and 0.75 < np.std(errors) < 1.25 and abs(np.mean(errors)) < 0.4


def test_chaos_needs_multiple_shooting():
    """500 steps of a double pendulum on a cart, which make some ten thousand of a small difference."""
    system, generator = Pendulum(links=2), torch.Generator().manual_seed(0)
    x0 = torch.from_numpy(system.sample(2, dtype=np.float64))
    x0[:, 2::2] = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    x0[:, 3::2] *= 3.0
    controls = 2.0 * torch.randn(500, 2, 1, dtype=torch.float64, generator=generator)
    states = trajectory(system, x0, controls)
    states += 0.01 * torch.randn(states.shape, dtype=torch.float64, generator=generator)
    start, bounds = {"link_mass": 0.2, "length": 1.0}, {"link_mass": (0.01, 1.0), "length": (0.05, 5.0)}
    found = identify(system, states, controls, start, bounds, shooting=25, noise=0.01)
    assert found.converged and found.residuals.std() == pytest.approx(0.01, rel=0.05)
    for name, (low, high) in found.intervals(0.999).items():
        assert low < getattr(system, name) < high and high - low < 0.01 * getattr(system, name)
    single = identify(system, states, controls, start, bounds, noise=0.01, iterations=30)
    assert single.residuals.std() > 1.0


def test_values_stay_within_bounds():
    states, controls = recorded(CART, 4, 20, 0.01)
    found = identify(CART, states, controls, {"half_length": 0.7, "pole_mass": 0.1}, {"half_length": (0.6, 1.0)})
    assert found.values["half_length"] == 0.6 and found.converged
    exact = identify(CART, *recorded(CART, 4, 20, 0.0), {"dt": 0.01}, noise=1.0)
    assert exact.values["dt"] == pytest.approx(0.02, rel=1e-9)


def test_what_the_records_do_not_determine():
    """Without forces, the masses matter by their ratio alone."""
    states, controls = recorded(CART, 4, 20, 0.01, force=0.0)
    found = identify(CART, states, controls, {"pole_mass": 0.1, "total_mass": 1.0}, noise=0.01)
    assert all(np.isinf(list(found.deviations.values())))


def test_inputs():
    system, generator = Wind(), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    controls, inputs = draw(30, 5, 1), draw(30, 3)
    states = trajectory(system, draw(5, 2), controls, {"drag": 0.4}, inputs=inputs)
    found = identify(system, states, controls, {"drag": 0.7}, noise=0.01, inputs=inputs, shooting=7)
    assert found.values["drag"] == pytest.approx(0.4, rel=1e-7)


def test_picture_and_table():
    pytest.importorskip("matplotlib")
    states, controls = recorded(CART, 2, 10, 0.01)
    found = identify(CART, states, controls, {"half_length": 0.6}, noise=0.01)
    axes = found.picture(1).axes
    assert [panel.get_ylabel() for panel in axes] == list(CART.states)
    measured, simulated = axes[2].lines
    assert (measured.get_ydata() == states[:, 1, 2].numpy()).all()
    assert (simulated.get_ydata() == found.states[:, 1, 2]).all()
    assert simulated.get_xdata()[-1] == pytest.approx(0.2)
    assert str(found).startswith("half_length  0.")
    with pytest.raises(ValueError, match="sample must be from 0 to 1"):
        found.picture(2)


def test_errors(monkeypatch):
    states, controls = recorded(CART, 2, 10, 0.01)
    start = {"half_length": 0.6}
    cases = [
        (lambda: identify(object(), states, controls, start), "must be a warp_phys.System"),
        (lambda: identify(CART, states[:, :, :3], controls, start), "states must have shape"),
        (lambda: identify(CART, states, controls[1:], start), "controls must have shape"),
        (lambda: identify(CART, states / 0.0, controls, start), "states must be finite"),
        (lambda: identify(CART, "states", controls, start), "states must be an array"),
        (lambda: identify(CART, states, controls, {"length": 0.6}), "parameters length are unknown"),
        (lambda: identify(CART, states, controls, {}), "parameters must name what is sought"),
        (lambda: identify(CART, states, controls, {"half_length": "long"}), "half_length must be a"),
        (lambda: identify(CART, states, controls, start, {"pole_mass": (0, 1)}), "bounds of pole_mass are given"),
        (lambda: identify(CART, states, controls, start, {"half_length": (1, 2)}), "must start between its bounds"),
        (lambda: identify(CART, states, controls, start, {"half_length": (2, 1)}), "a smaller and a larger"),
        (lambda: identify(CART, states, controls, start, {"half_length": 1.0}), "must be two numbers"),
        (lambda: identify(CART, states, controls, start, noise=0.0), "noise must be positive"),
        (lambda: identify(CART, states, controls, start, noise=[1.0, 2.0]), "noise must have shape"),
        (lambda: identify(CART, states, controls, start, shooting=0), "shooting must be"),
        (lambda: identify(CART, states, controls, start, inputs=controls), "has no inputs"),
        (lambda: identify(Wind(), states[:, :, :2], controls, {"drag": 1.0}), "has inputs"),
        (lambda: identify(CART, states[:2, :1], controls[:1, :1], {**start, "pole_mass": 0.1, "gravity": 9.8,
                          "total_mass": 1.0}), "more numbers than are sought"),
        (lambda: identify(CART, states, controls, start, noise=1.0).intervals(1.0), "level must be below 1"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'scipy is not installed: pip install "warp_phys\[scipy\]"'):
        identify(CART, states, controls, start)
