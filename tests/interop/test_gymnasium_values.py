"""A learned value of an episode's last state, or of the state where a horizon is cut: against rollouts, in float64."""

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from controllers import MLP
from tests.rollout.reference import relative
from tests.springs import Springs
from warp_phys import CartPole, Flow, agree
from warp_phys.interop.gymnasium.differentiable import DifferentiableVectorEnv
from warp_phys.interop.torch import Rollout

STEPS, BATCH = 12, 3
FLOWS = ("R", "M", "S", Flow(0.9, 0.3), Flow(window=5))
each_mode = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)


def setting(system, mode, steps=STEPS):
    """Environments, a policy, a value of states, initial states."""
    env = DifferentiableVectorEnv(system, BATCH, max_episode_steps=steps, dtype="float64", autoreset_mode=mode)
    nets = [MLP(system, hidden=(10,), seed=seed).double() for seed in range(2)]
    return env, *nets, torch.tensor(system.sample(BATCH, 7, np.float64))


def walk(env, policy, seen, steps):
    """Return the mean reward of a step and environment, the last observations and the last info."""
    total, info = 0.0, {}
    for _ in range(steps):
        seen, rewards, _, _, info = env.step(policy(seen))
        total = total + rewards.sum() / (steps * BATCH)
    return total, seen, info


def pull(loss, policy, keep=False):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()), retain_graph=keep)])


def by_rollout(system, policy, value, x0, flow, steps):
    states, _ = Rollout(system, policy, steps, flow, backend="general")(x0)
    loss = system.loss(states, when="every") + value(states[-1]).square().mean()
    policy.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])


@each_mode
@pytest.mark.parametrize("system", [CartPole(dt=0.05), Springs(hardening=0.0, gain=0.1)], ids=["cartpole", "springs"])
def test_the_value_of_an_episodes_end(system, mode):
    """R, M, S and others of one record, C of two of them: the mode makes no difference to any."""
    env, policy, value, x0 = setting(system, mode)
    total, _, info = walk(env, policy, env.reset(options={"states": x0})[0], STEPS)
    assert info["_final_obs"].all()
    loss, found = value(info["final_obs"]).square().mean() - total, {}
    for flow in FLOWS:
        env.flow = flow
        found[flow] = pull(loss, policy, keep=True)
        expected, update = by_rollout(system, policy, value, x0, flow, STEPS)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0.0)
        assert relative(found[flow], update) < 1e-10, flow
    assert relative(agree(found["M"], found["R"]), by_rollout(system, policy, value, x0, "C", STEPS)[1]) < 1e-9

    env.flow = "M"
    assert relative(pull(-total, policy), found["M"]) > 1e-3  # the value matters


@each_mode
def test_the_value_where_a_horizon_is_cut(mode):
    """Two horizons within an episode, each with the value of its last states, and history forgotten in between."""
    system = CartPole(dt=0.05)
    env, policy, value, x0 = setting(system, mode, steps=100)
    seen, _ = env.reset(options={"states": x0})
    for _ in range(2):
        start = env.states.detach()
        total, _, info = walk(env, policy, seen, STEPS)
        assert "final_obs" not in info
        loss = value(env.states).square().mean() - total
        for flow in ("R", "M", "S"):
            env.flow = flow
            expected = by_rollout(system, policy, value, start, flow, STEPS)[1]
            assert relative(pull(loss, policy, keep=True), expected) < 1e-10, flow
        seen = env.detach()
        assert not env.states.requires_grad
    env.flow = "M"
    gated = value(walk(env, policy, seen, STEPS)[1]).square().mean()
    assert pull(gated, policy).abs().max() == 0.0  # what is observed is no substitute


@each_mode
def test_ends_one_by_one(mode):
    """Only the rows of an episode's end are there, with the gradient of their own actions, in that very step."""
    env, _, _, x0 = setting(CartPole(), mode, steps=4)
    env.reset(options={"states": x0})
    env.step(torch.zeros(BATCH, 1, dtype=torch.float64))
    env.reset(options={"states": x0, "reset_mask": torch.tensor([True, False, True])})
    actions, last = torch.full((BATCH, 1), 0.2, dtype=torch.float64, requires_grad=True), {}
    for n in range(4):
        seen, _, _, truncated, info = env.step(actions)
        if truncated.any():
            torch.testing.assert_close(info["_final_obs"], torch.as_tensor(truncated), rtol=0, atol=0)
            assert (info["final_obs"][~truncated] == 0.0).all()
            (last[n],) = torch.autograd.grad(info["final_obs"].sum(), actions, retain_graph=True)
            same = (env.states == info["final_obs"]).all(dim=1)
            assert (same == (truncated if mode is not AutoresetMode.SAME_STEP else torch.zeros_like(truncated))).all()
            if mode is AutoresetMode.DISABLED:
                seen, _ = env.reset(options={"reset_mask": truncated})
                assert not (seen == info["final_obs"]).all(dim=1).any()
        else:
            assert "final_obs" not in info and "_final_obs" not in info
    assert list(last) == [2, 3]
    assert (last[2][1] != 0.0).all() and (last[2][[0, 2]] == 0.0).all()
    assert (last[3][[0, 2]] != 0.0).all() and (last[3][1] == 0.0).all()


def test_states_begin_with_a_reset_and_belong_to_the_environment():
    env, _, _, x0 = setting(CartPole(), "NEXT_STEP")
    with pytest.raises(ResetNeeded, match="call reset before asking for states"):
        _ = env.states
    leaf = x0.clone().requires_grad_()
    env.reset(options={"states": leaf})
    assert (torch.autograd.grad(env.states.sum(), leaf)[0] == 1.0).all()
    env.states.detach().zero_()
    assert torch.equal(env.states, x0)


def test_the_last_states_of_a_diverged_environment_are_constants():
    system = Springs(size=3, pushes=2, hardening=50.0)
    env = DifferentiableVectorEnv(system, 2, dtype="float64", autoreset_mode="NEXT_STEP")
    env.reset(options={"states": 0.1 * system.sample(2, 0, np.float64)})
    actions = torch.full((2, 2), 0.1, dtype=torch.float64, requires_grad=True)
    env.step(actions)
    before = env.states
    _, _, terminated, _, info = env.step(actions * torch.tensor([[1.0], [1e201]], dtype=torch.float64))
    assert terminated.tolist() == [False, True] == info["_final_obs"].tolist()
    assert torch.equal(info["final_obs"][1], before[1].detach())
    assert torch.autograd.grad(info["final_obs"].sum(), actions, allow_unused=True)[0].abs().max() == 0.0
