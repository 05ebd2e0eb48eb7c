"""The audit is silent where adjoints are right, and names what is wrong where they are not."""

import numpy as np
import pytest
import warp as wp

from tests.toy import TwoControls
from warp_phys import (
    CartPole,
    Hopper,
    Pendulum,
    Polynomial,
    Quadrotor,
    Quantum,
    Repulsion,
    audit,
)

SYSTEMS = [
    CartPole(poles=2),
    Repulsion(drivers=1, evaders=2),
    Quantum(points=8),
    Polynomial(),
    Pendulum(),
    Quadrotor(),
    Hopper(),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)
def test_our_systems_are_clean(system, dtype, device):
    report = audit(system, dtype=dtype, device=device, seed=3)
    assert report.ok and not report.failures, str(report)
    assert len(report.findings) == 3 * (system.state_size + system.control_size)
    assert min(finding.judged for finding in report.findings) > 0.95  # silence means something
    assert max(finding.error for finding in report.findings) < (1e-2 if dtype is np.float32 else 1e-6)


class Planted:
    """A simulator whose adjoint of some components is wrong by a factor, from the second step on if `late`."""

    def __init__(self, system, states=(), controls=(), factor=1.01, late=False):
        self.system, self.wrong, self.factor, self.late = system, (list(states), list(controls)), factor, late
        self.state_size, self.control_size = system.state_size, system.control_size
        self.sample, self.steps = system.sample, 0

    def step(self, x, c, y):
        self.steps += 1
        self.system.step(x, c, y)

    def step_vjp(self, x, c, adj_y, adj_x, adj_c):
        self.system.step_vjp(x, c, adj_y, adj_x, adj_c)
        for adjoint, columns in zip((adj_x, adj_c), self.wrong, strict=True):
            values = adjoint.numpy().copy()
            values[:, columns] *= self.factor
            adjoint.assign(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wrong_adjoint_is_named(dtype):
    toy = TwoControls()
    report = audit(Planted(toy, states=[1], controls=[0]), dtype=dtype, horizons=(1,))
    assert not report.ok
    assert report.components("state") == ("1",) and report.components("control") == ("0",)
    assert all(finding.error > 0.005 for finding in report.failures)
    named = Planted(toy, states=[1])
    named.states, named.controls = toy.states, toy.controls
    report = audit(named, dtype=dtype, horizons=(1,))
    assert report.components("state") == ("second [rad]",) and report.components("control") == ()
    assert set(report.failures[0].through) <= set(toy.states)
    assert (
        "state second [rad]" in str(report)
        and "WRONG through" in str(report)
        and "5 of 6 adjoints agree" in str(report)
    )


@pytest.mark.parametrize("factor", [np.nan, 0.0, -1.0])
def test_gross_faults_are_named(factor):
    report = audit(Planted(TwoControls(), controls=[1], factor=factor), horizons=(1, 2))
    assert report.components("control") == ("1",)
    assert [finding.horizon for finding in report.failures if finding.kind == "control"] == [1, 2]


def test_a_jump_is_unclear_and_not_wrong():
    """Differences across a jump say nothing about an adjoint; the audit says so."""

    class Jump(Planted):
        def step(self, x, c, y):
            super().step(x, c, y)
            values = y.numpy().copy()
            values[:, 2] += np.sign(x.numpy()[:, 1])
            y.assign(values)

    states = np.random.default_rng(0).uniform(0.2, 1.0, (3, 4))
    states[:, 1] = 1e-9
    report = audit(Jump(TwoControls()), states, horizons=(1,))
    assert report.ok and [finding.component for finding in report.unclear] == ["1"]
    assert report.unclear[0].judged < 1.0 and "1 are unclear" in str(report)


def test_memory_between_steps_shows_only_over_several():
    """A simulator that linearises at the last state it has seen."""

    class Stale(Planted):
        def step(self, x, c, y):
            super().step(x, c, y)
            self.last = wp.clone(x)

        def step_vjp(self, x, c, adj_y, adj_x, adj_c):
            super().step_vjp(self.last, c, adj_y, adj_x, adj_c)

    stale = Stale(TwoControls())
    assert {finding.horizon for finding in audit(stale).failures} == {2, 8}


def test_what_is_not_finite_is_explained():
    system = CartPole(dt=1e30)
    with pytest.raises(
        ValueError, match=r"step gives .* for .* of sample 0 at step \d, with the states and controls as"
    ):
        audit(system)

    class Fragile(Planted):
        def step(self, x, c, y):
            super().step(x, c, y)
            if (x.numpy()[:, 2] > 0.05).any():
                y.fill_(np.inf)

    with pytest.raises(ValueError, match=r"step gives inf for .* at step 1, 2 shifted by 0\.01"):
        audit(Fragile(CartPole()), states=np.full((2, 4), 0.045))


def test_arguments_are_checked():
    system = CartPole()
    for arguments, message in (
        ({"states": np.zeros((3, 5))}, r"states must have shape \(samples, 4\), got \(3, 5\)"),
        ({"controls": np.zeros((3, 3, 1))}, r"controls must have shape \(8, 3, 1\), got \(3, 3, 1\)"),
        ({"states": np.full((3, 4), np.nan)}, r"states must be finite, entry \(0, 0\) is not"),
        ({"horizons": ()}, "horizons must have at least one"),
        ({"horizons": (0,)}, "horizons must be at least 1, got 0"),
        ({"differences": (0.1, 0.05, 0.02)}, "differences must be four or more"),
        ({"samples": 0}, "samples must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(system, **arguments)
    nameless = Planted(system)
    del nameless.sample
    with pytest.raises(ValueError, match="states must be given: Planted has no method sample"):
        audit(nameless)


def test_given_states_and_controls():
    system = CartPole()
    x, c = system.sample(2, seed=1, dtype=np.float64), np.full((4, 2, 1), 30.0)
    assert audit(system, x, c, horizons=(4,), tolerance=1e-8).ok
