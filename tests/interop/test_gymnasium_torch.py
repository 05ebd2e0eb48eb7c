"""Environments that torch differentiates: against rollouts, in float64, over 50 steps and more."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from controllers import MLP
from tests.rollout.reference import relative
from tests.springs import Springs
from warp_phys import CartPole, Flow, Polynomial, Repulsion, agree
from warp_phys.interop.gymnasium import SystemVectorEnv
from warp_phys.interop.gymnasium.differentiable import DifferentiableVectorEnv
from warp_phys.interop.torch import Rollout

STEPS, BATCH = 60, 4
SYSTEMS = [CartPole(poles=1), Repulsion(drivers=1, evaders=1), Springs(hardening=0.0, gain=0.1)]
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)


def policy_for(system, seed=0):
    return MLP(system, hidden=(12, 12), seed=seed).double()


def make(system, steps=STEPS, **settings):
    settings = {"num_envs": BATCH, "max_episode_steps": steps, "dtype": "float64"} | settings
    return DifferentiableVectorEnv(system, **settings)


def play(env, policy, steps, states=None):
    """Return the rewards of `steps` steps, shape (steps, num_envs)."""
    observation, _ = env.reset(seed=1, options={} if states is None else {"states": states})
    rewards = []
    for _ in range(steps):
        observation, reward, *_ = env.step(policy(observation))
        rewards.append(reward)
    return torch.stack(rewards)


def flat(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def by_rollout(system, policy, x0, flow, control_cost):
    policy.zero_grad()
    states, controls = Rollout(system, policy, STEPS, flow, backend="general")(x0)
    loss = system.loss(states, controls, when="every", control_cost=control_cost)
    loss.backward()
    return loss.detach(), flat(policy)


@each_system
def test_gradients_are_those_of_a_rollout(system):
    """R in one episode of 60 steps; then M, S, N and a truncated one from the same record; then C from M and R."""
    policy, env = policy_for(system), make(system, control_cost=0.2)
    x0 = torch.tensor(system.sample(BATCH, 3, np.float64))
    loss = -play(env, policy, STEPS, x0).sum() / (STEPS * BATCH)
    updates = {}
    for flow in ("R", "M", "S", "N", Flow(0.9, 0.5), Flow(window=7)):
        policy.zero_grad()
        env.flow = flow
        loss.backward(retain_graph=True)
        value, updates[flow] = by_rollout(system, policy, x0, flow, 0.2)[0], flat(policy)
        expected = by_rollout(system, policy, x0, flow, 0.2)[1]
        torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=0)
        assert relative(updates[flow], expected) < 1e-10, flow
    assert relative(updates["M"], updates["R"]) > 1e-3 and relative(updates["S"], updates["R"]) > 1e-3
    combined = by_rollout(system, policy, x0, "C", 0.2)[1]
    assert relative(agree(updates["M"], updates["R"]), combined) < 1e-9


def test_gradient_of_the_initial_states():
    system = SYSTEMS[0]
    policy, env = policy_for(system), make(system)
    x0 = torch.tensor(system.sample(BATCH, 3, np.float64), requires_grad=True)
    play(env, policy, STEPS, x0).sum().backward()
    again = x0.detach().clone().requires_grad_()
    states, _ = Rollout(system, policy, STEPS, "R", backend="general")(again)
    (-STEPS * BATCH * system.loss(states, when="every")).backward()
    assert relative(x0.grad, again.grad) < 1e-10


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_numbers_are_those_of_the_numpy_environments(mode, device):
    """Also through ends at different times; infos have tensors where numpy has arrays."""
    settings = {"num_envs": 3, "max_episode_steps": 4, "autoreset_mode": mode, "dtype": "float64", "control_cost": 0.1}
    system = Springs(size=3, pushes=2, hardening=50.0)
    ours, theirs = DifferentiableVectorEnv(system, **settings, device=device), SystemVectorEnv(system, **settings)
    np.testing.assert_array_equal(ours.reset(seed=5)[0].cpu(), theirs.reset(seed=5)[0])
    rng, ended = np.random.default_rng(0), np.zeros(3, dtype=bool)
    for n in range(14):
        if mode is AutoresetMode.DISABLED and ended.any():
            mask = {"reset_mask": ended}
            np.testing.assert_array_equal(ours.reset(options=mask)[0].cpu(), theirs.reset(options=mask)[0])
        actions = rng.uniform(-1, 1, (3, 2))
        if n in (1, 6):
            actions[1] = 1e200
        got, expected = ours.step(torch.tensor(actions, device=device)), theirs.step(actions)
        for a, b in zip(got[:4], expected[:4], strict=True):
            np.testing.assert_allclose(a.cpu().numpy(), b, rtol=1e-13)
        last = {"final_obs", "_final_obs"}  # numpy has them where Gymnasium has them, torch in every mode
        assert got[4].keys() - last == expected[4].keys() - last
        assert ("final_obs" in got[4]) == (expected[2] | expected[3]).any()
        for key, mask in expected[4].items():
            if key.startswith("_"):
                np.testing.assert_array_equal(got[4][key].cpu().numpy(), mask)
        if "final_obs" in expected[4]:
            for row, wanted in zip(got[4]["final_obs"], expected[4]["final_obs"], strict=True):
                np.testing.assert_allclose(row.cpu().numpy(), 0.0 if wanted is None else wanted, rtol=1e-13)
            costs = [infos[4]["final_info"]["cost"] for infos in (got, expected)]
            np.testing.assert_allclose(costs[0].cpu(), costs[1], rtol=1e-13)
        ended = expected[2] | expected[3]


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
def test_a_reset_detaches(mode):
    """What follows an episode's end depends on no action before it, all at once or one by one."""
    env = make(Polynomial(), steps=3, num_envs=2, autoreset_mode=mode)
    env.reset(seed=0)
    env.step(torch.zeros(2, 1, dtype=torch.float64))
    env.reset(options={"reset_mask": np.array([True, False])})  # now environment 1 ends before environment 0
    actions, rewards = [], []
    for _ in range(8):
        actions.append(torch.zeros(2, 1, dtype=torch.float64, requires_grad=True))
        rewards.append(env.step(actions[-1])[1])
    reach = torch.zeros(8, 8, 2)
    for n, reward in enumerate(rewards):
        if reward.requires_grad:
            given = torch.autograd.grad(
                reward.sum(), actions, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            reach[n] = torch.stack([g[:, 0] for g in given]) != 0.0
    period = 3 if mode == "SAME_STEP" else 4
    for i, done in enumerate((0, 1)):  # steps of the running episode at the start of the record
        for n in range(8):
            place = (n + done) % period
            for k in range(8):
                same = k <= n and (k + done) // period == (n + done) // period and place < 3
                assert bool(reach[n, k, i]) == same, (i, n, k)


def test_detach_forgets():
    system = SYSTEMS[0]
    policy, env = policy_for(system), make(system)
    observation, _ = env.reset(seed=1)
    first = policy(observation)
    env.step(first)
    _, reward, *_ = env.step(policy(env.detach()))
    assert torch.autograd.grad(reward.sum(), first, allow_unused=True) == (None,)


def test_a_diverged_environment_leaves_no_trace():
    """Its reward is a constant; the others' gradients are what they were, and no nan appears."""
    system = Springs(size=3, pushes=2, hardening=50.0)

    def gradients(push):
        env = make(system, divergence_reward=-5.0)
        env.reset(options={"states": 0.1 * system.sample(BATCH, 0, np.float64)})
        weights = torch.full((BATCH, 2), 0.1, dtype=torch.float64, requires_grad=True)
        kick = torch.zeros(BATCH, 2, dtype=torch.float64)
        kick[2] = push
        rewards = torch.stack([env.step(weights + kick * (n == 1))[1] for n in range(3)])
        (gradient,) = torch.autograd.grad(rewards[:2].sum(), weights)
        return gradient, rewards.detach()

    (calm, _), (wild, rewards) = gradients(0.0), gradients(1e200)
    assert rewards[1, 2] == -5.0 and torch.isfinite(wild).all()
    others = [0, 1, 3]
    torch.testing.assert_close(wild[others], calm[others], rtol=1e-14, atol=0)
    assert (wild[2] != calm[2]).any() and (wild[2] != 0).all()  # the reward of its first step is left


def test_errors():
    env = make(CartPole(), num_envs=2)
    with pytest.raises(ValueError, match="flow 'combined' is made from two: .*'modified' and with 'regular'"):
        env.flow = "combined"
    with pytest.raises(ValueError, match="combine the two updates with its rule, minmod"):
        env.flow = "minmod"
    with pytest.raises(ValueError, match="a flow with a window needs max_episode_steps"):
        make(CartPole(), steps=None, flow=Flow(window=3))
    env.reset()
    with pytest.raises(TypeError, match="actions must be a torch tensor, got ndarray: numpy has no gradients"):
        env.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 1\), got \(2,\)"):
        env.step(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="actions must hold torch.float64 as the states do, got torch.float32"):
        env.step(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"options\['states'\] must have shape \(2, 4\), got \(2, 3\)"):
        env.reset(options={"states": np.zeros((2, 3))})
    action = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(env.step(action)[1].sum(), action, create_graph=True)


def test_the_last_observation_has_a_gate_of_its_own():
    """What is seen at an episode's end is weighted as if the episode went on."""

    def gradient(limit):
        env = DifferentiableVectorEnv(
            "cartpole", 2, max_episode_steps=limit, dtype="float64", flow=Flow(window=2), autoreset_mode="DISABLED"
        )
        seen, _ = env.reset(seed=0)
        actions = torch.full((2, 1), 0.3, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            seen, *_ = env.step(actions)
        return torch.autograd.grad(seen.sum(), actions)[0]

    assert gradient(4).abs().min() > 0.0
    torch.testing.assert_close(gradient(3), gradient(4), rtol=0.0, atol=0.0)
