"""The comparison: its tasks, its methods on a small one, what is said of them beforehand, and PPO's environments."""

import math
import sys

import numpy as np
import pytest
import torch

from demos import study as command
from demos.experiments.comparison import forecasts, methods
from demos.experiments.comparison import study as comparison
from demos.experiments.comparison.forecasts import Forecast, foretold
from demos.experiments.comparison.tasks import TASKS, LeaningChain, impact_of
from demos.experiments.comparison.windy import WindyQuadrotor
from demos.experiments.study import Outcome, Point, Trial, draw, load, perform, summarise
from warp_phys import Flow, Hopper, Quadrotor

HOPPER = TASKS["hopper-2000"]._replace(steps=12, window=4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few episodes, and no kernels of their own for a network."""
    monkeypatch.setattr(methods, "BACKEND", "general")
    monkeypatch.setattr(methods, "BATCH", 4)
    monkeypatch.setattr(comparison, "EPISODES", 4)
    monkeypatch.setitem(TASKS, "hopper-2000", HOPPER)


def parameters(learner):
    """All weights of a learner's actor, as one vector."""
    actor = getattr(learner, "actor", None) or learner.learner.actor
    return torch.cat([p.detach().flatten() for p in actor.parameters()])


@pytest.mark.parametrize("name", ["regular", "either", "combined-limit", "windows-combined"])
def test_methods_train(name):
    learner = methods.METHODS[name].make(HOPPER, True, 0)
    before = parameters(learner)
    learner.step()
    assert learner.env_steps == 4 * (4 if name.startswith("windows") else 12)
    change = parameters(learner) - before
    assert change.isfinite().all() and change.abs().max() > 0
    loss, share = comparison.examine(HOPPER, learner)
    assert math.isfinite(loss) and 0.0 <= share <= 1.0


def test_to_be_examined_leaves_no_trace():
    learner, twin = (methods.METHODS["windows-combined"].make(HOPPER, True, 0) for _ in range(2))
    for step in range(2):
        learner.step()
        twin.step()
        if step == 0:
            comparison.examine(HOPPER, learner)
    assert torch.equal(parameters(learner), parameters(twin))


def test_the_same_seed_gives_the_same_weights():
    learners = [methods.METHODS["combined"].make(HOPPER, False, seed) for seed in (1, 1, 2)]
    for learner in learners:
        learner.step()
    first, same, other = map(parameters, learners)
    assert torch.equal(first, same) and not torch.equal(first, other)


def at_a_third(states):
    """Whether there is an impact: at another step for each sample."""
    steps, samples = torch.arange(states.shape[0])[:, None], torch.arange(states.shape[1])
    return (steps + samples) % 3 == 0


GATE = (~at_a_third(torch.zeros(HOPPER.steps, 4, 6))).numpy()


@pytest.mark.parametrize(
    ("impact", "flow"),
    [
        (lambda states: torch.full(states.shape[:2], False), "R"),
        (lambda states: torch.full(states.shape[:2], True), "S"),
        (at_a_third, Flow(GATE, GATE)),
    ],
    ids=["nowhere", "everywhere", "at a third"],
)
def test_feedback_is_cut_where_the_impact_is(impact, flow):
    """Nowhere: the gradient. At every step: no feedback at all."""
    task = HOPPER._replace(impact=impact)
    cut = methods.CutAtImpact(task, "R", False, 0)
    plain = methods.Episodes(task, flow, False, 0)
    for learner in (cut, plain):
        with torch.no_grad():  # weights that act, so that flows differ
            learner.actor.network[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    starts = [learner.initial_states() for learner in (cut, plain)]
    assert torch.equal(*starts)
    for learner in (cut, plain):
        learner.seeds = np.random.SeedSequence(5)
        learner.step()
    for a, b in zip(cut.actor.parameters(), plain.actor.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_landing_is_an_impact_and_rest_is_none():
    hopper = Hopper(stiffness=20000.0, dt=0.0025)
    still = torch.tensor([0.0, hopper.radius, 0.0, 0.0, 0.0, 0.0]).expand(2, 1, 6).clone()
    still[0, 0, 1] += 0.1
    assert impact_of(hopper)(still).tolist() == [[False], [True]]
    height = hopper.radius + hopper.softness * -math.log(math.expm1(9.81 / (20000.0 * hopper.softness)))
    still[1, 0, 1] = height  # where the floor carries the weight
    assert not impact_of(hopper)(still).any()


def test_wind_in_the_state_is_wind():
    windy, wind = WindyQuadrotor(), (3.0, -2.0)
    states = windy.sample(5, seed=1, dtype=np.float64)
    assert (np.abs(states[:, 6:]) <= [8.0, 4.0]).all() and np.abs(states[:, 6]).max() > 1.0
    states[:, 6:] = wind
    controls = np.random.default_rng(0).normal(size=(5, 2))
    import warp as wp

    def step(system, x):
        x, c = (wp.array(rows, dtype=wp.float64, device="cpu") for rows in (x, controls))
        y = wp.empty_like(x)
        system.step(x, c, y)
        return y.numpy()

    calm = step(Quadrotor(wind_x=wind[0], wind_z=wind[1]), states[:, :6])
    np.testing.assert_allclose(step(windy, states), np.concatenate([calm, states[:, 6:]], axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="integrator must be"):
        WindyQuadrotor(integrator="rk4")


def test_the_chain_leans():
    angles = LeaningChain().sample(64, seed=0)[:, 2::2]
    assert 0.3 < np.abs(angles).max() < 0.4001 and abs(angles.mean()) < 0.1


def test_tasks_have_whole_windows_and_methods_flows_for_them():
    for task in TASKS.values():
        assert task.steps % task.window == 0
        task.settings(0)
        methods.decaying(task).check(task.steps)


class Clock:
    """Processor time that passes with every look at it."""

    def __init__(self):
        self.now = 0.0

    def process_time(self):
        self.now += 0.3
        return self.now


def test_a_run_has_a_test_after_every_second_and_at_round_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "time", Clock())
    monkeypatch.setattr(comparison, "compile_for", lambda *_: None)
    monkeypatch.setattr(comparison, "MILESTONES", (90, 200, 10**6))
    trial = comparison.make_trial("hopper-2000", "regular", 2, 0)
    assert perform(trial, tmp_path, lambda: False)
    outcome = load(trial, tmp_path)
    # every update takes 0.3 s and 48 steps
    assert [(p.env_steps, p.between) for p in outcome.points] == [(90, 1), (192, 0), (200, 1), (336, 0)]
    assert len(outcome.losses) == 2 and outcome.at_steps(200) == outcome.points[2].test_loss
    assert math.isnan(outcome.at_steps(10**6)) and math.isnan(outcome.at_steps(10))
    text = summarise(comparison.STUDY, [outcome])
    assert f"second below {HOPPER.reached:g}" in text and "| steps [k] |" in text
    assert len(draw(comparison.STUDY, [outcome]).axes) == 2


def outcome(panel, line, seed, loss):
    """A run that has ended at a loss."""
    return Outcome(Trial(panel, line, seed, 1, None), (Point(loss, 0.5, 1.0, 1000.0),))


def test_verdicts_are_held_against_winners(monkeypatch, tmp_path):
    said = {0: Forecast("grows", "controller", 20.0, 1.0), 1: Forecast("level", "", 1.0, 1.0)}
    calls = []
    monkeypatch.setattr(forecasts, "forecast", lambda task, seed: calls.append(seed) or said[seed])
    losses = {"regular": 1.0, "combined": 0.5}
    runs = [outcome("chain", line, seed, losses[line]) for seed in (0, 1) for line in losses]
    text = foretold([*runs, outcome("chain", "ppo", 0, 0.1), outcome("chain", "combined", 7, 0.1)], tmp_path)
    assert "| chain | 0 | grows controller | 20 | 1 | gated | PPO | gated |" in text
    assert "| chain | 1 | level | 1 | 1 | plain | C | gated |" in text
    assert text.endswith("right in 1 of 2.\n")
    assert foretold(runs, tmp_path).endswith("right in 1 of 2.\n") and calls == [0, 1]


def test_a_forecast_is_a_verdict(monkeypatch):
    monkeypatch.setattr(forecasts, "PILOT", 1)
    found = forecasts.forecast("hopper-2000", 0)
    assert found.kind in ("explodes", "grows", "level", "shrinks", "vanishes") and found.regular > 0


def test_a_library_that_is_missing_is_told_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    find = command.require.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "stable_baselines3" else find(name, *more)
    )
    arguments = ["compare", "--panel", "hopper-2000", "--method", "regular", "ppo", "--out", str(tmp_path)]
    assert command.main(arguments) == 2
    assert 'pip install "warp_phys[reinforcement]"' in capsys.readouterr().err
    assert not list(tmp_path.rglob("seed-*.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--epochs", "5"], "epochs must be left out: the runs of compare are so many seconds"),
        (["memory", "--seconds", "5"], "seconds must be left out"),
        (["compare", "--method", "sgd"], "method must be one of regular, modified"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_ppo_sees_what_an_actor_sees_and_is_told_how_episodes_end():
    pytest.importorskip("stable_baselines3", reason='needs pip install "warp_phys[reinforcement]"')
    from demos.experiments.comparison.ppo import Environments, Proximal

    envs = Environments(HOPPER, 3, seed=0)
    first = envs.reset()
    assert first.shape == (3, 7)  # sine and cosine of the angle
    for step in range(1, HOPPER.steps + 1):
        seen, rewards, ended, infos = envs.step(np.zeros((3, 2), np.float32))
        assert (rewards < 0).all() and ended.all() == ended.any() == (step == HOPPER.steps)
    assert all(info["TimeLimit.truncated"] for info in infos)
    last = np.stack([info["terminal_observation"] for info in infos])
    assert np.abs(last - seen).max() > 0.1 and not np.allclose(seen, first)  # other episodes have begun
    task = HOPPER._replace(limits=(1e-9, 100.0, 100.0, 100.0, 100.0, 100.0))
    assert Environments(task, 2, seed=0).reset() is not None
    learner = Proximal(HOPPER, 0)
    learner.step()
    assert learner.env_steps == 64 * HOPPER.window
    assert all(map(math.isfinite, comparison.examine(HOPPER, learner)))
