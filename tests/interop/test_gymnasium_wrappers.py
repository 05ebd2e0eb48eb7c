"""Gymnasium's wrappers around our environments: right, or refused before a gradient is lost."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import wrappers as single
from gymnasium.wrappers import vector

from controllers import MLP
from tests.rollout.reference import relative
from warp_phys.interop.gymnasium import SystemEnv, SystemVectorEnv
from warp_phys.interop.gymnasium.attached import Attached
from warp_phys.interop.gymnasium.differentiable import DifferentiableVectorEnv

BATCH, LIMIT = 3, 5
REFUSED = "would cut the gradient of this environment's observations and rewards: compute with torch instead"


def make(mode="NEXT_STEP", **settings):
    settings = {"max_episode_steps": LIMIT, "dtype": "float64", "dt": 0.05, "autoreset_mode": mode} | settings
    return DifferentiableVectorEnv("cartpole", BATCH, action_scale=20.0, **settings)


def play(env, act=lambda c: c, see=lambda x: x, pay=lambda r: r, steps=2 * LIMIT + 1):
    """Return the sum of rewards, a policy's update and the infos; the functions are what a wrapper should do."""
    policy = MLP(env.unwrapped.system, hidden=(8,), seed=0).double()
    seen, total, infos = env.reset(seed=3)[0], 0.0, []
    for _ in range(steps):
        seen, rewards, *_, info = env.step(act(policy(see(seen))))
        total = total + pay(rewards).sum()
        infos.append(info)
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()]), infos


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_statistics_are_those_of_the_numpy_environments(mode):
    """Returns and lengths of `RecordEpisodeStatistics`; the update is what it was without."""
    env = vector.RecordEpisodeStatistics(make(mode))
    total, update, infos = play(env)
    bare = play(make(mode))
    assert torch.equal(total, bare[0]) and torch.equal(update, bare[1])

    policy = MLP(env.unwrapped.system, hidden=(8,), seed=0).double()
    settings = {"max_episode_steps": LIMIT, "dtype": "float64", "dt": 0.05, "autoreset_mode": mode}
    theirs = vector.RecordEpisodeStatistics(SystemVectorEnv("cartpole", BATCH, action_scale=20.0, **settings))
    seen, _ = theirs.reset(seed=3)
    for info in infos:
        seen, *_, wanted = theirs.step(policy(torch.as_tensor(seen)).detach().numpy())
        assert ("episode" in info) == ("episode" in wanted)
        if "episode" in wanted:
            np.testing.assert_allclose(info["episode"]["r"], wanted["episode"]["r"], rtol=1e-12)
            np.testing.assert_array_equal(info["episode"]["l"], wanted["episode"]["l"])
            np.testing.assert_array_equal(info["_episode"], wanted["_episode"])
    assert list(env.length_queue) == list(theirs.length_queue) != []
    np.testing.assert_allclose(env.return_queue, theirs.return_queue, rtol=1e-12)


def test_statistics_with_masked_resets(device):
    env = vector.RecordEpisodeStatistics(make("DISABLED", device=device))
    actions = torch.full((BATCH, 1), 0.1, dtype=torch.float64, device=str(device), requires_grad=True)
    env.reset(seed=0)
    for n in range(2 * LIMIT):
        *_, truncated, info = env.step(actions)
        assert ("episode" in info) == (n % LIMIT == LIMIT - 1)
        if truncated.any():
            env.reset(options={"reset_mask": np.asarray(truncated)})
    assert list(env.length_queue) == [LIMIT] * 2 * BATCH


def test_wrappers_that_compute_with_torch():
    """Transformations in torch: what one gets by writing them into the loop."""

    def clip(rewards):
        return rewards.clamp(-1.0, 1.0) / 3.0

    cases = [
        (lambda env: vector.TransformReward(env, clip), {"pay": clip}),
        (lambda env: vector.TransformAction(env, torch.tanh), {"act": torch.tanh}),
        (lambda env: vector.TransformObservation(env, lambda x: 2.0 * x), {"see": lambda x: 2.0 * x}),
    ]
    plain = play(make())
    for wrapper, same in cases:
        total, update, _ = play(wrapper(make()))
        expected = play(make(), **same)
        torch.testing.assert_close(total, expected[0], rtol=1e-14, atol=0.0)
        assert relative(update, expected[1]) < 1e-13 and relative(update, plain[1]) > 1e-3


def test_wrappers_that_compute_with_numpy_are_refused():
    """No update comes out of any; the ones that hand numpy what is ours say why."""
    for wrapper in (lambda env: vector.ClipReward(env, -1.0, 1.0), vector.NormalizeReward):
        with pytest.raises(TypeError, match=REFUSED):
            play(wrapper(make()))
    for wrapper in (
        vector.NormalizeObservation,
        vector.FlattenObservation,
        lambda env: vector.ReshapeObservation(env, (2, 2)),
        lambda env: vector.DtypeObservation(env, np.float64),
    ):
        with pytest.raises(TypeError, match=REFUSED):  # the first observation has no history, the next ones have
            play(wrapper(make()), see=lambda x: torch.as_tensor(x, dtype=torch.float64).reshape(BATCH, 4))
    for wrapper in (lambda env: vector.RescaleAction(env, -2.0, 2.0), vector.ClipAction):
        with pytest.raises(RuntimeError, match="requires grad"):  # what it hands to numpy is the policy's
            play(wrapper(make()))
        with pytest.raises(TypeError, match="actions must be a torch tensor, got ndarray.*scale actions by action_sc"):
            play(wrapper(make()), act=lambda c: c.detach().numpy())
    with pytest.raises(AssertionError):
        play(vector.DictInfoToList(make()))


def test_a_wrapper_of_single_environments_takes_no_vector():
    with pytest.raises(TypeError, match=r"Expected env to be a `gymnasium\.Env`"):
        single.TimeLimit(make(), 3)


@pytest.mark.parametrize(
    "wrapper",
    [
        single.RecordEpisodeStatistics,
        single.NormalizeReward,
        single.NormalizeObservation,
        single.ClipAction,
        lambda env: single.ClipReward(env, -1.0, 1.0),
        lambda env: single.RescaleAction(env, np.float32(-2.0), np.float32(2.0)),
        lambda env: single.TimeLimit(env, LIMIT),
    ],
)
def test_single_environments_fit_all_wrappers(wrapper):
    env = single.RecordEpisodeStatistics(single.TimeLimit(wrapper(SystemEnv("cartpole")), LIMIT), stats_key="all")
    env.reset(seed=0)
    for n in range(LIMIT):
        seen, reward, _, truncated, info = env.step(env.action_space.sample())
        assert seen in env.observation_space and np.isfinite(reward) and truncated == (n == LIMIT - 1)
    assert info["all"]["l"] == LIMIT


def test_make_vec_and_statistics_of_the_registered_names():
    env = gymnasium.make_vec("warp_phys/CartPole-v0", num_envs=2, differentiable=True, max_episode_steps=2)
    env = vector.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    actions = torch.zeros(2, 1, requires_grad=True)
    total = sum(env.step(actions)[1].sum() for _ in range(2))
    np.testing.assert_allclose(sum(env.return_queue), total.item(), rtol=1e-6)
    total.backward()
    assert actions.grad.abs().min() > 0.0


def attached(*values):
    return (torch.tensor(values, requires_grad=True) * 1.0).as_subclass(Attached)


def test_what_numpy_may_do_with_a_tensor_that_has_a_history():
    x, sums = attached(1.0, 2.0, 3.0), np.zeros(3)
    sums += x
    sums[np.array([True, False, True])] += x[np.array([True, False, True])]
    np.testing.assert_array_equal(sums, [2.0, 2.0, 6.0])
    for result in (np.float32(2.0) * x, x / np.sqrt(np.float64(4.0)), np.float64(1.0) + x, 1.0 - x):
        assert isinstance(result, torch.Tensor) and result.requires_grad
        torch.autograd.grad(result.sum(), x, retain_graph=True)
    for cut in (
        lambda: np.asarray(x),
        lambda: np.clip(x, -1.0, 1.0),
        lambda: np.mean(x, axis=0),
        lambda: np.stack([x, x]),
        lambda: np.where(sums > 0.0, x, 0.0),
        lambda: sums + x,
        lambda: x * sums,
        lambda: np.exp(x, where=sums > 0.0),
        lambda: sums.__setitem__(slice(None), x),
        lambda: np.from_dlpack(x),
        lambda: list(map(np.asarray, x)),
    ):
        with pytest.raises(TypeError, match=REFUSED):
            cut()


def test_without_a_history_numpy_gets_arrays():
    x = torch.tensor([1.0, 2.0]).as_subclass(Attached)
    flags = torch.tensor([True, False]).as_subclass(Attached)
    for found, expected in (
        (np.mean(x, axis=0), 1.5),
        (np.asarray(x), [1.0, 2.0]),
        (np.concatenate([x, x]), [1.0, 2.0, 1.0, 2.0]),
        (np.zeros(2) + x, [1.0, 2.0]),
        (np.logical_or(flags, ~flags), [True, True]),
        (np.sum(flags), 1),
        (np.ones(2) * (1 - flags), [0.0, 1.0]),
        (np.from_dlpack(x), [1.0, 2.0]),
    ):
        assert isinstance(found, (np.ndarray, np.generic))
        np.testing.assert_array_equal(found, expected)


def test_torch_makes_plain_tensors_of_it():
    x, net = attached([1.0, 2.0]), torch.nn.Linear(2, 1)
    for y in (net(x), x + 1.0, torch.cat([x, x]), x.detach(), torch.compile(net, backend="eager", fullgraph=True)(x)):
        assert type(y) is torch.Tensor
    assert isinstance(x[0], Attached) and isinstance(next(iter(x)), Attached)
