"""Systems as Gymnasium environments: its checker, its own vectoriser as the reference, seeds, ends, errors."""

import copy
import functools
import importlib
import json
import pickle
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import warp as wp
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from tests.springs import Springs
from warp_phys import SYSTEMS, CartPole, Polynomial, Repulsion
from warp_phys.interop.gymnasium import TASKS, SystemEnv, SystemVectorEnv
from warp_phys.interop.gymnasium.differentiable import DifferentiableVectorEnv

MODES = list(AutoresetMode)
SMALL = {"warp_phys/Quantum-v0": {"points": 4}, "warp_phys/Pendulum-v0": {"links": 1, "integrator": "semi-implicit"}}
"""Fields with which a system compiles fast."""

each_task = pytest.mark.parametrize("name", TASKS)
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


def wild(**settings):
    """Springs that one hard push makes diverge within two steps, in float32."""
    return {"system": Springs(size=3, pushes=2, hardening=50.0), "action_scale": 2.0, **settings}


@each_task
def test_gymnasiums_checker(name):
    """No complaint but that states have no bounds, and they have none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gym.make(name, **SMALL.get(name, {})).unwrapped)
    said = {str(warning.message).split("WARN: ")[-1] for warning in caught}
    assert all("infinity" in text for text in said), said


@each_task
def test_make_and_make_vec(name):
    system, horizon, _ = TASKS[name]
    assert gym.make(name).unwrapped.system == SYSTEMS[system]()
    env = gym.make(name, **SMALL.get(name, {}))
    assert isinstance(env.unwrapped, SystemEnv) and env.spec.max_episode_steps == horizon
    envs = gym.make_vec(name, num_envs=3, **SMALL.get(name, {}))
    assert isinstance(envs, SystemVectorEnv)
    assert envs.single_observation_space == env.observation_space and envs.single_action_space == env.action_space
    assert envs.observation_space.shape == (3, *env.observation_space.shape)
    env.reset(seed=0)
    envs.reset(seed=0)
    for n in range(1, horizon + 1):
        truncated = env.step(np.zeros(env.action_space.shape))[3]
        assert truncated == (n == horizon)
        assert (envs.step(np.zeros(envs.action_space.shape))[3] == (n == horizon)).all()
    json.loads(env.spec.to_json())


def test_fields_of_the_system_are_settings():
    env = gym.make("warp_phys/CartPole-v0", poles=4, dt=0.02, action_scale=5.0).unwrapped
    assert env.system == CartPole(poles=4, dt=0.02) and env.metadata["render_fps"] == 50
    envs = gym.make_vec("warp_phys/CartPole-v0", num_envs=2, poles=4, max_episode_steps=7, autoreset_mode="SAME_STEP")
    assert envs.system.poles == 4 and envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert isinstance(gym.make_vec("warp_phys/CartPole-v0", differentiable=True), DifferentiableVectorEnv)
    assert gym.make("warp_phys.interop.gymnasium:warp_phys/CartPole-v0") is not None


def test_reward_is_minus_the_systems_cost():
    """Its sum over an episode is −steps · loss, control cost included."""
    system, steps = Repulsion(), 12
    env = SystemEnv(system, action_scale=0.5, control_cost=0.3, dtype="float64")
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, system.control_size))
    first, _ = env.reset(seed=1)
    outcomes = [env.step(action) for action in actions]
    states = np.stack([first, *(outcome[0] for outcome in outcomes)])[:, None]
    expected = system.loss(states, 0.5 * actions[:, None], when="every", control_cost=0.3)
    np.testing.assert_allclose(-sum(outcome[1] for outcome in outcomes) / steps, expected, rtol=1e-13)
    costs = [system.loss(states[n : n + 2]) for n in range(steps)]
    np.testing.assert_allclose([outcome[4]["cost"] for outcome in outcomes], costs, rtol=1e-13)


@each_task
def test_the_system_is_what_is_stepped(name, device):
    """An episode is the system's own trajectory under the scaled actions, from one of its own samples."""
    env = gym.make(name, dtype="float64", device=device, **SMALL.get(name, {})).unwrapped
    system, scale = env.system, env.task.action_scale
    first, _ = env.reset(seed=3)
    seed = int(gym.utils.seeding.np_random(3)[0].integers(2**63))
    np.testing.assert_array_equal(first, system.sample(1, seed, dtype=np.float64)[0])
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 1, system.control_size))
    x, y = (wp.array(first[None], dtype=wp.float64, device=device) for _ in range(2))
    for action in actions:
        system.step(x, wp.array(scale * action, dtype=wp.float64, device=device), y)
        np.testing.assert_array_equal(env.step(action[0])[0], y.numpy()[0])
        x, y = y, x


@each_mode
@pytest.mark.parametrize("diverging", [False, True])
def test_one_launch_equals_gymnasiums_vectoriser(mode, diverging):
    """Observations, rewards, flags, infos and masks, bit by bit, through ends at different times."""
    settings = wild() if diverging else {"system": CartPole(poles=2), "action_scale": 10.0, "control_cost": 0.1}
    ours = SystemVectorEnv(**settings, num_envs=4, max_episode_steps=5, autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda: TimeLimit(SystemEnv(**settings), 5)] * 4, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode and ours.action_space == theirs.action_space
    assert data_equivalence(ours.reset(seed=11), theirs.reset(seed=11), exact=True)
    rng, ended = np.random.default_rng(2), np.zeros(4, dtype=bool)
    terminations = truncations = 0
    for n in range(17):
        if n == 2:  # shift two episodes against the others
            options = {"reset_mask": np.array([True, False, True, False])}
            pair = [env.reset(seed=[5, None, 6, 7], options=dict(options)) for env in (ours, theirs)]
            assert data_equivalence(*pair, exact=True)
            ended &= ~options["reset_mask"]
        if mode is AutoresetMode.DISABLED and ended.any():
            pair = [env.reset(options={"reset_mask": ended.copy()}) for env in (ours, theirs)]
            assert data_equivalence(*pair, exact=True)
        actions = rng.uniform(-1, 1, ours.action_space.shape).astype(np.float32)
        if diverging:
            actions[rng.random(4) < 0.2] = 1e20
        got, expected = ours.step(actions), theirs.step(actions)
        for a, b in zip(got[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert data_equivalence(got[4], expected[4], exact=True), (n, got[4], expected[4])
        ended = got[2] | got[3]
        terminations, truncations = terminations + got[2].sum(), truncations + got[3].sum()
    assert truncations > 0 and (terminations > 0) == diverging
    assert ours.np_random_seed == theirs.np_random_seed


def test_seeds():
    """Environment i has the seed s + i; without a seed the generators go on; nobody touches numpy's global one."""
    envs, alone = SystemVectorEnv("cartpole", 3), SystemEnv("cartpole")
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first, _ = envs.reset(seed=7)
    again, _ = envs.reset()
    np.testing.assert_array_equal(first[2], alone.reset(seed=9)[0])
    np.testing.assert_array_equal(again[2], alone.reset()[0])
    assert (first != again).any() and len({row.tobytes() for row in (*first, *again)}) == 6
    np.testing.assert_array_equal(envs.reset(seed=[9, 8, 7])[0][::-1], first)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_divergence_terminates_at_the_last_finite_state():
    env = SystemEnv(**wild(divergence_reward=-77.0))
    first, _ = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(np.full(2, 3e38))
    np.testing.assert_array_equal(observation, first)
    assert (reward, terminated, truncated) == (-77.0, True, False) and np.isfinite(info["cost"])


def test_given_states():
    envs = SystemVectorEnv("polynomial", 3)
    given = np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(envs.reset(options={"states": given})[0], given)
    mask = np.array([False, True, False])
    np.testing.assert_array_equal(envs.reset(options={"states": -given, "reset_mask": mask})[0], [[1], [-2], [3]])
    given[:] = 9.0
    assert (envs.step(np.zeros((3, 1)))[0] == [[1], [-2], [3]]).all()
    assert SystemEnv("polynomial").reset(options={"state": [4.0]})[0] == 4.0


def test_what_is_returned_is_the_callers():
    envs = SystemVectorEnv("cartpole", 2, max_episode_steps=2, autoreset_mode="SameStep")
    kept = [envs.reset(seed=0)[0]]
    for _ in range(5):
        observation, *_, info = envs.step(np.ones((2, 1)))
        kept += [observation, *(info["final_obs"] if "final_obs" in info else ())]
    copies = [array.copy() for array in kept]
    for array in kept:
        array[:] = np.nan
    assert np.isfinite(envs.step(np.ones((2, 1)))[0]).all() and all(np.isfinite(copy).all() for copy in copies)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("make", [gym.make, functools.partial(gym.make_vec, num_envs=3)])
def test_copies_go_on_with_the_same_numbers(make, copied):
    env = make("warp_phys/CartPole-v0", max_episode_steps=4, render_mode="rgb_array")
    copied(env)
    env.reset(seed=0)
    env.step(np.ones(env.action_space.shape, np.float32))
    env.render()
    other, actions = copied(env), np.full((5, *env.action_space.shape), 0.5, np.float32)
    alone = [env.step(action) for action in actions[:2]]
    assert data_equivalence(alone, [other.step(action) for action in actions[:2]], exact=True)
    np.testing.assert_array_equal(env.render(), other.render())
    assert data_equivalence(env.reset(), other.reset(), exact=True)


def test_pictures():
    env = SystemEnv("cartpole", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    for _ in range(10):
        env.step([1.0])
    assert first.shape == (400, 400, 3) and first.dtype == np.uint8 and (env.render() != first).mean() > 1e-3
    envs = SystemVectorEnv("polynomial", 2, render_mode="rgb_array")
    envs.reset(options={"states": [[0.0], [1.0]]})
    pictures = envs.render()
    assert len(pictures) == 2 and (pictures[0] != pictures[1]).any()
    assert SystemVectorEnv("polynomial").render() is None and SystemEnv("polynomial").render() is None


def test_errors():
    with pytest.raises(ValueError, match="system must be one of 'cartpole'.*got 'trapeze'"):
        SystemEnv("trapeze")
    with pytest.raises(TypeError, match="poles: unknown settings; the parameters of CartPole"):
        SystemEnv(CartPole(), poles=3)
    with pytest.raises(ValueError, match="action_scale must be a positive number, got 0.0"):
        SystemEnv(Polynomial(), action_scale=0.0)
    with pytest.raises(ValueError, match="control_cost must be a number of at least 0, got -1.0"):
        SystemVectorEnv(Polynomial(), control_cost=-1.0)
    with pytest.raises(ValueError, match="a key of options must be one of 'state', got 'states'"):
        SystemEnv(Polynomial()).reset(options={"states": [[1.0]]})
    for kind in (SystemVectorEnv, DifferentiableVectorEnv):
        with pytest.raises(ValueError, match="a key of options must be one of 'reset_mask', 'states', got 'state'"):
            kind(Polynomial()).reset(options={"state": [1.0]})
    with pytest.raises(TypeError, match="options must be a mapping, got str"):
        SystemEnv(Polynomial()).reset(options="a")
    with pytest.raises(ValueError, match="render_mode must be one of 'rgb_array', got 'human'"):
        SystemEnv(Polynomial(), render_mode="human")
    with pytest.raises(ValueError, match="autoreset_mode must be one of .*'SAME_STEP'.* got 'same'"):
        SystemVectorEnv(Polynomial(), autoreset_mode="same")
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        SystemVectorEnv(Polynomial(), 0)
    envs = SystemVectorEnv(CartPole(), 3, max_episode_steps=1, autoreset_mode="DISABLED")
    with pytest.raises(ValueError, match=r"seed must be a number or 3 numbers, one per environment, got 2"):
        envs.reset(seed=[1, 2])
    with pytest.raises(ValueError, match=r"options\['reset_mask'\] must have shape \(3,\), got \(2,\)"):
        envs.reset(options={"reset_mask": np.ones(2, dtype=bool)})
    with pytest.raises(TypeError, match=r"options\['reset_mask'\] must hold booleans, got int"):
        envs.reset(options={"reset_mask": [1, 0, 1]})
    with pytest.raises(
        ValueError, match=r"options\['states'\] must have shape \(3, 4\), got \(3, 2\); its columns are"
    ):
        envs.reset(options={"states": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"options\['states'\] must be finite"):
        envs.reset(options={"states": np.full((3, 4), np.nan)})
    envs.reset()
    with pytest.raises(ValueError, match=r"actions must have shape \(3, 1\), got \(3,\); its columns are force \[N\]"):
        envs.step(np.zeros(3))
    envs.step(np.zeros((3, 1)))
    with pytest.raises(gym.error.ResetNeeded, match=r"environments \[0, 1, 2\] have ended, and autoreset is disabled"):
        envs.step(np.zeros((3, 1)))
    with pytest.raises(gym.error.ResetNeeded, match="call reset before the first step"):
        SystemEnv(CartPole()).step([0.0])


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_gymnasiums_own_wrappers(mode):
    """They read the metadata, the masks and the flags: returns of episodes are right where resets are automatic."""
    envs = SystemVectorEnv("polynomial", 2, max_episode_steps=3, autoreset_mode=mode)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.wrappers.vector.ClipAction(envs))
    envs.reset(seed=0)
    total, returns = np.zeros(2), []
    for _ in range(9):
        _, rewards, _, truncations, info = envs.step(np.full((2, 1), 5.0))
        total += rewards
        if truncations.all():
            returns.append((total.copy(), info["episode"]["r"]))
            total[:] = 0.0
            assert (info["episode"]["l"] == 3).all()
    assert len(returns) >= 2
    for mine, recorded in returns:
        np.testing.assert_allclose(recorded, mine, rtol=1e-6)


def test_vectorised_by_gymnasium():
    """`vectorization_mode` works with the fields of a system, too."""
    settings = {"num_envs": 2, "target": 1.5, "max_episode_steps": 2}
    sync, own = (gym.make_vec("warp_phys/Polynomial-v0", vectorization_mode=m, **settings) for m in ("sync", None))
    assert isinstance(sync, SyncVectorEnv) and isinstance(own, SystemVectorEnv)
    assert data_equivalence(sync.reset(seed=3), own.reset(seed=3), exact=True)
    action = np.full((2, 1), 0.5, dtype=np.float32)
    for _ in range(4):
        assert data_equivalence(sync.step(action), own.step(action), exact=True)


def test_without_gymnasium(monkeypatch):
    """The error says what to install."""
    for name in [name for name in sys.modules if name.split(".")[0] == "gymnasium" or "interop.gymnasium" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for name in ("gymnasium", "gymnasium.differentiable"):
        with pytest.raises(ImportError, match=r'pip install "warp_phys\[gymnasium\]"'):
            importlib.import_module(f"warp_phys.interop.{name}")


def test_a_step_before_the_first_reset():
    with pytest.raises(gym.error.ResetNeeded, match="call reset before the first step"):
        SystemVectorEnv("cartpole", 2).step(np.ones((2, 1)))


def test_a_reset_that_fails_changes_nothing():
    env = SystemVectorEnv("cartpole", 2, max_episode_steps=1, autoreset_mode="DISABLED")
    env.reset(seed=0)
    env.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="options"):
        env.reset(options={"states": np.zeros((3, 4)), "reset_mask": np.array([True, True])})
    with pytest.raises(gym.error.ResetNeeded, match="have ended"):
        env.step(np.zeros((2, 1)))


def test_a_render_mode_asks_for_a_drawing():
    for make in (lambda: SystemEnv(Springs(), render_mode="rgb_array"),
                 lambda: SystemVectorEnv(Springs(), 2, render_mode="rgb_array")):  # fmt: skip
        with pytest.raises(ValueError, match="render_mode must be None: Springs has no method picture"):
            make()
