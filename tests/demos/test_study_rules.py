"""The balanced sweep and the other rules, held against the engine's flows in the same places."""

import numpy as np
import pytest
import torch

from controllers.settings import Training
from controllers.training import Loop
from demos.experiments.rules import RULES, RuleLoop, balance, make_trial
from warp_phys import COMBINED, MODIFIED, REGULAR, Flow
from warp_phys.interop.torch import Step

SMALL = {"train_states": 8, "test_states": 8, "hidden": (6,), "precision": "float64", "out": "", "epochs": 2}


def loop_of(rule=RULES["combined"], **changes):
    """A training of a cart with two poles over few steps."""
    own = {"parameters": {"poles": 2, "dt": 0.05}, "steps": 12, "when": "every", "control_cost": 0.1}
    loop = RuleLoop(Training(**own | SMALL | changes), rule)
    with torch.no_grad():
        loop.parameters[-2].mul_(20.0)  # a controller whose feedback is strong
    return loop


@pytest.fixture(scope="module")
def loop():
    """One for all tests that do not train."""
    return loop_of()


def gradient(loop):
    """The gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in loop.parameters])


@pytest.mark.parametrize(
    ("flow", "mix"), [(REGULAR, torch.add), (MODIFIED, lambda physics, _: physics)], ids=["R", "M"]
)
def test_sweep_is_the_engines(loop, flow, mix):
    loss = loop.walk(loop.train_states, mix)
    walked = gradient(loop).clone()
    loop.rollout.flow = flow
    expected = loop.rollout.value_and_grad(loop.train_states, "every", 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(walked, gradient(loop), rtol=1e-10, atol=1e-12)


def test_balance_keeps_the_norm_of_the_physics():
    generator = torch.Generator().manual_seed(0)
    physics, controller = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    physics[1], controller[2] = 0.0, -physics[2]
    balanced, total = balance(physics, controller), physics + controller
    rows = [0, 3, 4]
    torch.testing.assert_close(balanced.norm(dim=1)[rows], physics.norm(dim=1)[rows])
    torch.testing.assert_close(torch.cosine_similarity(balanced, total)[rows], torch.ones(3, dtype=torch.float64))
    assert not balanced[1].any() and not balanced[2].any()


def test_balanced_sweep_is_that_of_torch(loop):
    """The same by autograd, with a function whose backward pass mixes the two ways back at every step."""
    x0 = loop.train_states

    class Split(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone(), x.clone()

        @staticmethod
        def backward(ctx, physics, controller):
            return balance(physics, controller)

    step, x, states, controls = Step(loop.system), x0, [x0], []
    for _ in range(12):
        for_physics, for_controller = Split.apply(x) if x.requires_grad else (x, x)
        controls.append(loop.controller(for_controller))
        x = step(for_physics, controls[-1])
        states.append(x)
    loss = loop.system.loss(torch.stack(states), torch.stack(controls), when="every", control_cost=0.1)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, loop.parameters)])
    loop.walk(x0)
    torch.testing.assert_close(gradient(loop), expected, rtol=1e-9, atol=1e-12)


def test_m_may_agree_with_either():
    loop = loop_of(RULES["either-limit-1"])
    loop.agree_with_any(loop.train_states)
    updates = {}
    for flow in (MODIFIED, REGULAR, Flow(limit=1.0)):
        other = loop_of()
        other.rollout.flow = flow
        other.rollout.value_and_grad(other.train_states, "every", 0.1)
        updates[flow] = gradient(other).numpy()
    m, r, limited = updates.values()
    agrees = (np.sign(m) == np.sign(r)) | (np.sign(m) == np.sign(limited))
    assert agrees.sum() > (np.sign(m) == np.sign(r)).sum()
    np.testing.assert_allclose(gradient(loop).numpy(), np.where(agrees, m, 0.0), rtol=1e-10, atol=1e-14)


def test_published_rule_is_the_published_training():
    losses, settings = [], loop_of().settings
    for loop in (Loop(settings), RuleLoop(settings, RULES["combined"])):
        loop.run(lambda: False, None, None)
        losses.append([record.test_loss for record in loop.records])
    assert losses[0] == losses[1]


def test_balanced_epochs_come_first():
    loop = RuleLoop(loop_of().settings, RULES["balanced"]._replace(balanced=1))
    walks = []
    loop.walk = lambda states: walks.append(len(loop.records)) or RuleLoop.walk(loop, states)
    loop.run(lambda: False, None, None)
    assert walks == [0] and loop.rollout.flow == COMBINED
    assert len(loop.records) == 2 and loop.records[-1].test_loss < loop.records[0].test_loss


def test_trials_are_those_of_the_plan():
    trial = make_trial("cartpole", 4, True, 7, "limit-1", 3)
    assert trial.name == "cartpole-shuffled/limit-1/seed-3" and trial.epochs == 7
