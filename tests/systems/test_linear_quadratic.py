"""The linear-quadratic problem against the solution of its Riccati equation."""

import numpy as np
import pytest
import torch

from tests.problems import LINEAR
from warp_phys import LinearQuadratic, audit
from warp_phys.interop.torch import Rollout

STEPS = 400
ALL = range(STEPS + 1)
"""All times: the state at which a trajectory starts has its cost too."""


def _feedback(system, gain):
    """Return c = −gain x as a controller whose weights of the last control are zero, and stay so."""
    layer = torch.nn.Linear(system.state_size, system.control_size, bias=False).double()
    seen = (torch.arange(system.state_size) < gain.shape[1]).double()
    with torch.no_grad():
        layer.weight.copy_(torch.nn.functional.pad(-torch.as_tensor(gain), (0, len(seen) - gain.shape[1])))
    layer.weight.register_hook(lambda gradient: gradient * seen)
    return layer


def test_the_loss_of_the_best_feedback():
    """It is x_0ᵀ P x_0, and the trajectory is that of the closed loop."""
    system, x0 = LINEAR, LINEAR.sample(5, dtype=np.float64)
    P, gain = system.riccati()
    states, controls = (a.detach() for a in Rollout(system, _feedback(system, gain), STEPS)(x0))
    assert float(system.loss(states, when=ALL)) == pytest.approx(
        np.einsum("bi,ij,bj->b", x0[:, :3], P, x0[:, :3]).mean(), rel=1e-12
    )
    np.testing.assert_array_equal(states[1:, :, 3:], controls)
    F, G = system.step_matrices()
    np.testing.assert_allclose(states[7, :, :3], x0[:, :3] @ np.linalg.matrix_power(F - G @ gain, 7).T, atol=1e-13)


@pytest.mark.parametrize(("system", "flow"), [(LINEAR, "regular"), (LinearQuadratic(), "modified")])
def test_at_the_best_feedback_updates_vanish(system, flow):
    """No control of the best feedback can be bettered, at any time: μ = 0, and then M has the adjoints of R.

    But where the system itself runs away, M's adjoints run away backward in time with the rounding of the last ones.
    """
    x0, gain = system.sample(5, dtype=np.float64), system.riccati().gain

    def update_and_loss(gain):
        controller = _feedback(system, gain)
        loss = system.loss(Rollout(system, controller, STEPS, flow)(x0)[0], when=ALL)
        loss.backward()
        return controller.weight.grad.abs().max(), loss.detach()

    best, others = update_and_loss(gain), [update_and_loss(gain + shift) for shift in (-0.01, 0.01)]
    assert best[0] < 1e-10 * best[1]
    assert all(update > 1e-3 * loss and loss > best[1] for update, loss in others)


def test_training_finds_it():
    """Of the mass that is pushed, to what 10 s tell of a horizon without end."""
    system = LinearQuadratic()
    controller = _feedback(system, np.array([[0.5, 1.0]]))
    rollout = Rollout(system, controller, 100)
    optimiser = torch.optim.Adam(controller.parameters(), lr=0.1, betas=(0.8, 0.95))
    for n in range(100):
        optimiser.param_groups[0]["lr"] = 0.1 * 0.95**n
        optimiser.zero_grad()
        loss = system.loss(rollout(np.eye(3)[:2])[0], when="every")
        loss.backward()
        optimiser.step()
    P, gain = system.riccati()
    assert float(loss.detach()) == pytest.approx(np.trace(P - system.Q) / 2.0, rel=1e-6)
    np.testing.assert_allclose(-controller.weight.detach()[:, :2], gain, atol=2e-3)


def test_a_number_by_hand():
    """x⁺ = x + c with unit costs: p = 1 + p − p²/(1 + p), the golden ratio."""
    P, gain = LinearQuadratic(A=((0.0,),), B=((1.0,),), Q=((1.0,),), R=((1.0,),), dt=1.0).riccati()
    golden = (1.0 + np.sqrt(5.0)) / 2.0
    assert P[0, 0] == pytest.approx(golden, rel=1e-14) and gain[0, 0] == pytest.approx(golden - 1.0, rel=1e-14)


def test_a_short_step_gives_the_continuous_solution():
    """Of the mass that is pushed: P dt → ((√3, 1), (1, √3)), gain → (1, √3), with the first power of dt."""
    root = np.sqrt(3.0)
    errors = []
    for dt in (1e-2, 1e-3):
        P, gain = LinearQuadratic(dt=dt).riccati()
        errors.append([np.abs(P * dt - [[root, 1.0], [1.0, root]]).max(), np.abs(gain - [[1.0, root]]).max()])
    np.testing.assert_allclose(errors[1], np.divide(errors[0], 10.0), rtol=0.05)


def test_the_equation_is_solved():
    for integrator in ("rk4", "euler"):
        system = LinearQuadratic(LINEAR.A, LINEAR.B, LINEAR.Q, LINEAR.R, integrator=integrator)
        (P, gain), (F, G) = system.riccati(), system.step_matrices()
        np.testing.assert_allclose(P, system.Q + F.T @ P @ (F - G @ gain), rtol=1e-11)
        np.testing.assert_allclose((system.R + G.T @ P @ G) @ gain, G.T @ P @ F, rtol=1e-11)
        assert (np.linalg.eigvalsh(P) > 0.0).all()


def test_the_audit_is_silent():
    """Of the last controls, on which nothing depends, there is nothing to judge."""
    report = audit(LINEAR, seed=3)
    assert report.ok and all(finding.judged > 0.95 for finding in report.findings if "last" not in finding.component)


def test_arrays_and_rows_are_the_same_system():
    arrays = LinearQuadratic(*(np.array(getattr(LINEAR, name)) for name in "ABQR"))
    assert arrays == LINEAR and hash(arrays) == hash(LINEAR) and arrays.structure == LINEAR.structure
    other = LinearQuadratic(2.0 * np.array(LINEAR.A), LINEAR.B, LINEAR.Q, LINEAR.R)
    assert other != LINEAR and other.structure != LINEAR.structure


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"A": ((0.0, 1.0),)}, ValueError, r"A must have shape \(N, N\), got \(1, 2\)"),
        ({"A": (0.0, 1.0)}, ValueError, r"A must be a matrix of 1 to 128 rows and columns, got shape \(2,\)"),
        ({"A": ((0.0, 1.0), (0.0,))}, ValueError, "A must be an array, rows of one length, got"),
        ({"A": "fast"}, TypeError, "A must hold real numbers, got <U4"),
        ({"A": ((0.0, np.nan), (0.0, 0.0))}, ValueError, "A must be finite"),
        ({"B": ((1.0,),)}, ValueError, r"B must have shape \(N, K\) with N = 2, as A has, got \(1, 1\)"),
        ({"Q": ((1.0,),)}, ValueError, r"Q must have shape \(2, 2\), got \(1, 1\)"),
        ({"Q": ((1.0, 0.5), (0.0, 1.0))}, ValueError, "Q must be symmetric"),
        ({"Q": ((1.0, 0.0), (0.0, -1.0))}, ValueError, "Q must be positive semidefinite, got the eigenvalue -1"),
        ({"R": ((0.0,),)}, ValueError, "R must be positive definite, got the eigenvalue 0"),
        ({"R": ((1.0, 0.0), (0.0, 1.0))}, ValueError, r"R must have shape \(1, 1\), got \(2, 2\)"),
        ({"dt": -0.1}, ValueError, "dt must be positive, got -0.1"),
        ({"integrator": "semi-implicit"}, ValueError, "integrator must be one of"),
    ],
)
def test_mistakes(arguments, kind, message):
    with pytest.raises(kind, match=message):
        LinearQuadratic(**arguments)


@pytest.mark.parametrize("unreached", [{"B": ((1.0,), (0.0,))}, {"Q": ((1.0, 0.0), (0.0, 0.0))}])
def test_no_feedback_of_least_cost(unreached):
    """What grows is not reached by the controls, or costs nothing."""
    system = LinearQuadratic(**{"A": ((0.0, 0.0), (0.0, 0.5)), "B": ((1.0,), (1.0,)), **unreached})
    with pytest.raises(ValueError, match="no feedback of least cost makes"):
        system.riccati()
