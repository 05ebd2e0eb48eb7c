"""Planned controls, and a controller that plans at every step."""

import sys

import numpy as np
import pytest
import torch

from tests.rollout.test_systems_with_inputs import Wind
from warp_phys import CartPole, Diverged, LinearQuadratic, Polynomial
from warp_phys.interop.torch import RecedingHorizon, plan, trajectory

CART = CartPole(dt=0.02)
HANGING = np.array([[0.0, 0.0, np.pi, 0.0]])


def adam(leaves):
    return torch.optim.Adam(leaves, lr=0.1)


def upright(states, controls):
    """Upright, in the middle, at rest."""
    x, v, angle, rate = states.unbind(-1)
    end = (1.0 - angle.cos() + 0.1 * (v.square() + rate.square()))[-1]
    along = (1.0 - angle.cos() + 0.05 * x.square() + 0.01 * rate.square()).mean(0)
    return along + end + 1e-3 * controls.square().mean(dim=(0, 2))


def finite_horizon(system, x0, steps):
    """Return the best controls of a linear-quadratic system, by Riccati's recursion, (steps, batch, K)."""
    F, G = system.step_matrices()
    Q, R = np.array(system.Q), np.array(system.R)
    P, gains = Q, []
    for _ in range(steps):
        gains.append(np.linalg.solve(R + G.T @ P @ G, G.T @ P @ F))
        P = Q + F.T @ P @ (F - G @ gains[-1])
    x, controls = x0[:, : len(F)], []
    for gain in reversed(gains):
        controls.append(-x @ gain.T)
        x = x @ F.T + controls[-1] @ G.T
    return np.stack(controls)


@pytest.mark.parametrize(
    "optimiser, iterations, error",
    [
        ("L-BFGS", 200, 1e-6),
        ("L-BFGS-B", 200, 1e-6),
        (lambda leaves: torch.optim.Adam(leaves, 0.05), 800, 1e-3),
        (lambda leaves: torch.optim.LBFGS(leaves, line_search_fn="strong_wolfe"), 20, 1e-5),
    ],
)
def test_finds_what_riccati_finds(optimiser, iterations, error):
    system = LinearQuadratic()
    x0 = system.sample(5, dtype=np.float64)
    found = plan(system, x0, 30, optimiser=optimiser, iterations=iterations, tolerance=1e-8)
    right = finite_horizon(system, x0, 30)
    assert np.abs(found.controls.numpy() - right).max() < error * np.abs(right).max()
    assert found.converged.all() == isinstance(optimiser, str)
    assert torch.equal(found.states, trajectory(system, torch.from_numpy(x0), found.controls))


@pytest.mark.parametrize("optimiser", ["L-BFGS", "L-BFGS-B", adam])
def test_bounds(optimiser):
    """The least of a box is where the gradient points out of it, or vanishes."""
    system = LinearQuadratic()
    x0, low, high = system.sample(4, seed=1, dtype=np.float64), -0.3, 0.2
    found = plan(system, x0, 20, bounds=(low, high), optimiser=optimiser, iterations=300, tolerance=1e-9)
    leaf = found.controls.clone().requires_grad_()
    states = trajectory(system, torch.from_numpy(x0), leaf)
    (gradient,) = torch.autograd.grad(4.0 * system.loss(states, leaf, "every"), [leaf])
    at_low, at_high = leaf.detach() == low, leaf.detach() == high
    assert at_low.any() and at_high.any() and (leaf >= low).all() and (leaf <= high).all()
    assert (gradient[at_low] > 0.0).all() and (gradient[at_high] < 0.0).all()
    inside = gradient[~at_low & ~at_high].abs().max()
    assert inside < (1e-7 if isinstance(optimiser, str) else 1e-2)


def test_swings_up_from_hanging():
    found = plan(CART, HANGING, 100, cost=upright, bounds=(-20.0, 20.0))
    assert found.controls.abs().max() <= 20.0 and found.evaluations <= 301
    assert found.states[-1, 0, 2].cos() > 0.99 and found.states[-1, 0, 3].abs() < 1.0
    assert found.loss[0] < 0.7 * plan(CART, HANGING, 100, cost=upright, bounds=(-20.0, 20.0), iterations=1).loss[0]


def test_problems_do_not_meddle():
    x0 = CART.sample(3, dtype=np.float64)
    weights = torch.tensor([1.0, 50.0, 0.1], dtype=torch.float64)
    cost = lambda states, controls: weights[: states.shape[1]] * upright(states, controls)  # noqa: E731
    together = plan(CART, x0, 30, cost=cost, iterations=40)
    alone = plan(CART, x0[:1], 30, cost=cost, iterations=40)
    assert together.controls[:, :1] == pytest.approx(alone.controls.numpy(), rel=1e-6, abs=1e-8)
    assert together.loss[0] == pytest.approx(alone.loss[0].item(), rel=1e-9)


def test_own_loss_and_warm_start():
    x0 = CART.sample(2, dtype=np.float64)
    found = plan(CART, x0, 12, when=[6, 12], control_cost=0.1, iterations=5)
    for b in range(2):
        loss = CART.loss(found.states[:, b : b + 1], found.controls[:, b : b + 1], [6, 12], 0.1)
        assert found.loss[b] == pytest.approx(loss.item(), rel=1e-12)
    again = plan(CART, x0, 12, when=[6, 12], control_cost=0.1, iterations=1, controls=found.controls)
    assert (again.loss <= found.loss).all()


def test_follows_a_reference():
    """Of the system's own, through its inputs."""
    system, steps = Wind(), 40
    reference = 0.5 * torch.sin(torch.linspace(0.0, 3.0, steps, dtype=torch.float64))
    inputs = torch.stack([torch.ones(steps), torch.zeros(steps), reference], dim=1)
    found = plan(system, np.zeros((2, 2)), steps, inputs=inputs)
    assert (found.states[10:, :, 0] - reference[9:, None]).abs().max() < 0.1
    assert found.loss[0] == pytest.approx(system.loss(found.states, None, "every", inputs=inputs).item(), rel=1e-9)


def test_receding_horizon_holds_a_pole_under_disturbance():
    """The model is wrong by a fifth, the force is disturbed, and something hits the pole."""
    real, generator = CartPole(dt=0.02, pole_mass=0.12, half_length=0.6), torch.Generator().manual_seed(0)
    controller = RecedingHorizon(CART, 40, iterations=8, cost=upright, bounds=(-20.0, 20.0))
    x, cosines = torch.from_numpy(HANGING), []
    for n in range(180):
        force = controller(x) + torch.randn(1, 1, dtype=torch.float64, generator=generator)
        x = trajectory(real, x, force[None])[1]
        x[:, 3] += 1.0 if n == 120 else 0.0
        cosines.append(x[0, 2].cos().item())
    assert min(cosines[90:120]) > 0.98, "it stands"
    assert min(cosines[120:]) > 0.9, "the kick does not throw it"


def test_a_plan_begins_with_the_one_before():
    controller = RecedingHorizon(CART, 20, iterations=1, first_iterations=30, cost=upright)
    first = controller(HANGING)
    assert torch.equal(first, controller.latest.controls[0]) and controller.latest.evaluations <= 31
    before, state = controller.latest, controller.latest.states[1]
    controller(state)
    begun = torch.cat([before.controls[1:], before.controls[-1:]])
    assert controller.latest.loss[0] <= upright(trajectory(CART, state, begun), begun)[0]
    assert controller.latest.evaluations == 2
    other = controller(state, cost=lambda states, controls: controls.square().mean(dim=(0, 2)), iterations=50)
    assert other.abs().max() < 1e-2, "another cost in this call"
    controller.reset()
    assert torch.equal(controller(HANGING), first)
    assert controller(np.repeat(HANGING, 3, axis=0)).shape == (3, 1), "another batch makes a first plan"


@pytest.mark.parametrize("optimiser", ["L-BFGS", "L-BFGS-B"])
def test_a_line_search_turns_back_from_what_is_not_finite(optimiser):
    def cost(states, controls):
        if controls[0].abs().max() > 1.0:
            raise Diverged(1, (controls[0].abs().amax(dim=1) > 1.0).nonzero()[:, 0].tolist())
        return (states[-1, :, 0] - 1.0).square() * torch.tensor([1.0, 100.0], dtype=torch.float64)

    found = plan(Polynomial(), np.array([[0.2], [0.5]]), 1, cost=cost, optimiser=optimiser, tolerance=1e-9)
    assert found.states[-1, :, 0].numpy() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(Diverged):
        plan(Polynomial(), np.zeros((2, 1)), 1, cost=cost, controls=np.full((1, 1, 1), 2.0), optimiser=optimiser)


def test_points_beyond_the_bounds_are_no_plan():
    """An optimiser of torch's may look at several within a step."""
    found = plan(CART, HANGING, 20, bounds=(-1.0, 1.0), optimiser=torch.optim.LBFGS, iterations=3)
    assert found.controls.abs().max() <= 1.0


def test_a_control_that_was_handed_out_is_the_callers():
    horizon = RecedingHorizon(CART, 10, cost=upright, first_iterations=3, iterations=2)
    control = horizon(HANGING)
    before = horizon.latest.controls.clone()
    control.fill_(7.0)
    assert torch.equal(horizon.latest.controls, before)


def test_errors(monkeypatch):
    cases = [
        (lambda: plan(object(), HANGING, 5), "must be a warp_phys.System"),
        (lambda: plan(CART, HANGING[0], 5), "x0 must have shape"),
        (lambda: plan(CART, HANGING + np.inf, 5), "x0 must be finite"),
        (lambda: plan(CART, HANGING, 0), "steps must be"),
        (lambda: plan(CART, HANGING, 5, cost=1.0), "cost must be a function"),
        (lambda: plan(CART, HANGING, 5, cost=upright, when="final"), "belong to the system's own loss"),
        (lambda: plan(CART, HANGING, 5, cost=lambda x, c: c.mean()), "cost must return a loss for each problem"),
        (lambda: plan(CART, HANGING, 5, controls=np.zeros((4, 1, 1))), "controls must have shape"),
        (lambda: plan(CART, HANGING, 5, bounds=(1.0, -1.0)), "bounds must be smaller and larger"),
        (lambda: plan(CART, HANGING, 5, bounds=3.0), "bounds must be least and largest"),
        (lambda: plan(CART, HANGING, 5, bounds=([1.0, 2.0], 3.0)), "bounds must have shape"),
        (lambda: plan(CART, HANGING, 5, optimiser="Adam"), "optimiser must be one of"),
        (lambda: plan(CART, HANGING, 5, optimiser=lambda leaves: leaves), "optimiser must make a torch.optim"),
        (lambda: plan(CART, HANGING, 5, tolerance=-1.0), "tolerance must be"),
        (lambda: plan(CART, HANGING, 5, parameters={"mass": 1.0}), "mass"),
        (lambda: plan(CART, HANGING, 5, inputs=torch.zeros(5, 1)), "has no inputs"),
        (lambda: RecedingHorizon(CART, 5, controls=None), "plan takes no controls here"),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'scipy is not installed: pip install "warp_phys\[scipy\]"'):
        plan(CART, HANGING, 5, optimiser="L-BFGS-B")
    assert plan(CART, HANGING, 5, iterations=1).controls.shape == (5, 1, 1)
