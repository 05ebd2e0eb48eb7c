"""The short-horizon actor-critic: its update against torch's, its targets against a loop, going on, resuming."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from controllers.actor_critic import (
    ActorCritic,
    Observer,
    Settings,
    begin_anew,
    check_resume,
    learn,
    load_checkpoint,
    main,
    td_lambda,
)
from controllers.checkpoint import save_tensors
from warp_phys import Quadrotor
from warp_phys.flow import Combined, agree, resolve

VERSIONS = Path(__file__).parent / "checkpoints"
SMALL = Settings(
    system="quadrotor",
    randomise=("wind_x:-3:3", "wind_z:-1:1"),
    environments=6,
    horizon=5,
    episode=12,
    hidden=(8,),
    updates=4,
    critic_minibatches=2,
    critic_epochs=2,
    rate=1e-2,
    backend="general",
    state_cost=(0.1, 0, 0, 0, 0, 0.01),
    control_cost=0.01,
)
KINDS = {
    "deterministic": {},
    "remembering": {"memory": 3},
    "stochastic": {"actor": "stochastic", "entropy": 0.05, "memory": 3},
}


def small(**changes):
    return replace(SMALL, **changes)


def quadrotor_step(system, x, c, wind):
    """One step in torch."""
    push = (c[:, 0] + c[:, 1]) / system.mass + system.gravity
    drag = system.drag / system.mass
    rates = (
        -push * x[:, 2].sin() - drag * (x[:, 3] - wind["wind_x"]),
        push * x[:, 2].cos() - drag * (x[:, 4] - wind["wind_z"]) - system.gravity,
        system.arm * (c[:, 1] - c[:, 0]) / system.inertia,
    )
    v = x[:, 3:] + system.dt * torch.stack(rates, dim=1)
    return torch.cat([x[:, :3] + system.dt * v, v], dim=1)


def expected_loss(learner, noise, cut):
    """The actor's loss as the module says it, unrolled in torch; the state is detached before the actor or not."""
    s, x, h = learner.settings, learner.states, learner.memory
    weights = x.new_tensor([1, 1, 0.5, 0.1, 0.1, 0.02]) + x.new_tensor(s.state_cost)
    total = 0.0
    for n in range(s.horizon):
        seen = x.detach() if cut else x
        if s.actor == "stochastic":
            c, h = learner.actor(seen, noise[n], h)
        elif s.memory:
            c, h = learner.actor(seen, h)
        else:
            c = learner.actor(seen)
        x = quadrotor_step(learner.system, x, c, learner.randomised)
        cost = x.square() @ weights + s.control_cost * c.square().mean(dim=1)
        if s.entropy:
            cost = cost + s.entropy * h[:, -1]
        total = total + (1 - s.discount) * s.discount**n * cost
    rows = torch.cat([x, torch.stack(list(learner.randomised.values()), dim=1)], dim=1)
    end = learner.target((rows_observed(learner, rows) - learner.observer.mean) / learner.observer.deviation)
    return (total + s.discount**s.horizon * end[:, 0]).mean()


def rows_observed(learner, rows):
    """Plain columns, then the pitch as sine and cosine."""
    return torch.cat([rows[:, :2], rows[:, 3:], rows[:, 2:3].sin(), rows[:, 2:3].cos()], dim=1)


@pytest.mark.parametrize("flow", ["regular", "modified", "combined", "either"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_that_of_torch(kind, flow):
    """The gradient before clipping and Adam, in float64; after an update, so that the last layer is not zero."""
    learner = ActorCritic(small(precision="float64", clip=0.0, flow=flow, **KINDS[kind]))
    learner.step()
    parameters = list(learner.actor.parameters())
    with torch.no_grad():
        for p in parameters:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    mean = learner.averages.state_dict()["means"]
    state = learner.generator.get_state()
    noise = learner.noise(learner.settings.horizon, learner.settings.environments)
    learner.generator.set_state(state)
    found = {}
    for name, cut in (("regular", False), ("modified", True)):
        loss = expected_loss(learner, noise, cut)
        found[name] = torch.autograd.grad(loss, parameters)
    regular, modified = found["regular"], found["modified"]
    assert max(float((a - b).abs().max()) for a, b in zip(regular, modified, strict=True)) > 1e-4
    if flow == "either":
        length = math.sqrt(sum(float(part.square().sum()) for part in regular))
        names = [name for name, _ in learner.actor.named_parameters()]
        average = [0.9 * mean[n] + 0.1 * part / length for n, part in zip(names, regular, strict=True)]
        rule = Combined(memory=0.9, either=True)
        expected = [rule.apply(m, r, a) for m, r, a in zip(modified, regular, average, strict=True)]
    elif flow == "combined":
        expected = [agree(m, r) for m, r in zip(modified, regular, strict=True)]
    else:
        expected = found[flow]
    learner.step()
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-8, atol=1e-12)


def test_the_entropy_is_that_of_a_squashed_normal_number():
    learner = ActorCritic(small(actor="stochastic", precision="float64", bound=1.0))
    x, w = learner.states, torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, h = learner.actor(x, w, learner.memory)
    normal = torch.distributions.Normal(torch.zeros(2).double(), learner.actor.log_deviation.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(h[:, 0], squashed.log_prob(c).sum(dim=1))


@pytest.mark.parametrize("trace", [0.0, 0.5, 1.0])
def test_targets_are_those_of_a_loop(trace):
    generator = torch.Generator().manual_seed(0)
    costs, values = (torch.randn(7, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    expected, following = [], values[-1]
    for n in reversed(range(7)):
        following = 0.1 * costs[n] + 0.9 * ((1 - trace) * values[n] + trace * following)
        expected.insert(0, following)
    torch.testing.assert_close(td_lambda(costs, values, 0.9, trace), torch.stack(expected))


def test_running_statistics_are_those_of_all_rows():
    rows = torch.randn(3, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 2
    rows[..., 0] = 1.5  # a constant keeps the deviation 1
    observer = Observer(("a [m]", "b [rad]", "c [m]"), ("a", "c", "b")).double()
    for i, part in enumerate(rows):
        observer.take_up(part, 1 / (i + 1))
    seen = observer.raw(rows.flatten(0, 1))
    torch.testing.assert_close(observer.mean, seen.mean(dim=0))
    torch.testing.assert_close(observer.deviation[1:], seen.std(dim=0, correction=0)[1:])
    assert observer.deviation[0] == 1.0
    torch.testing.assert_close(
        seen[:, 2:], torch.cat([rows[..., 1].sin().view(-1, 1), rows[..., 1].cos().view(-1, 1)], 1)
    )


def test_the_critic_is_fitted_to_its_targets():
    learner = ActorCritic(small(critic_epochs=1, critic_minibatches=1, critic_rate=1e-2))
    features, targets = torch.randn(30, learner.observer.size), torch.randn(5, 6)
    with torch.no_grad():
        before = (learner.critic(features)[:, 0] - targets.flatten()).square().mean()
    assert learner.fit_critic(features, targets, []) == pytest.approx(float(before), rel=1e-5)
    for _ in range(50):
        after = learner.fit_critic(features, targets, [])
    assert after < 0.5 * before
    seen = []
    learner.fit.minibatches = lambda rows, inputs: seen.append(inputs) or torch.zeros(1)
    learner.fit_critic(features, torch.arange(6.0).expand(5, 6), [1, 4])
    assert set(seen[0].unique().tolist()) == {0.0, 2.0, 3.0, 5.0}, "environments that diverged are left out"


def test_environments_go_on_or_begin_anew():
    learner = ActorCritic(small(memory=3))
    learner.ages = torch.tensor([0, 3, 6, 7, 8, 11])
    states = {}
    keep = learner.go_on
    learner.go_on = lambda *arguments: (states.update(ends=arguments[0], memory=arguments[1]), keep(*arguments))
    before = {name: value.clone() for name, value in learner.randomised.items()}
    learner.step()
    anew = torch.tensor([False, False, False, True, True, True])
    assert learner.ages.tolist() == [5, 8, 11, 0, 0, 0]
    assert ((learner.states == states["ends"]).all(dim=1) == ~anew).all()
    assert ((learner.memory == states["memory"]).all(dim=1) == ~anew).all() and (learner.memory[anew] == 0).all()
    for name, values in before.items():
        assert ((learner.randomised[name] == values) == ~anew).all()


def test_the_usual_reset():
    system = Quadrotor()
    states = torch.from_numpy(system.sample(5))
    states[1, 0], states[2, 3] = math.nan, 20.0
    ages = torch.tensor([3, 3, 3, 12, 4])
    after, anew = begin_anew(system, 12, (5.0, 5.0, 9.0, 9.0, 9.0, 99.0))(states, ages, 7)
    assert anew.tolist() == [False, True, True, True, False]
    assert torch.equal(after[anew], torch.from_numpy(system.sample(5, seed=7))[anew])
    assert torch.equal(after[~anew], states[~anew])
    begun, _ = begin_anew(system, 1, scatter=(0.0, 0.0, 3.0, 0.0, 0.0, 0.0))(states[:3], ages[:3], 7)
    moved = begun - torch.from_numpy(system.sample(3, seed=7))
    assert (moved[:, [0, 1, 3, 4, 5]] == 0).all()
    assert (moved[:, 2].abs() <= 3.0).all() and len(set(moved[:, 2].tolist())) == 3


def test_fresh_states_are_scattered_in_training_alone():
    plain, scattered = ActorCritic(small()), ActorCritic(small(scatter=(0.0, 0.0, 3.0, 0.0, 0.0, 0.0)))
    assert not torch.equal(plain.states[:, 2], scattered.states[:, 2])
    assert torch.equal(plain.states[:, :2], scattered.states[:, :2])
    starts = [learner.evaluate(episodes=4, steps=1)[0][0] for learner in (plain, scattered)]
    assert torch.equal(*starts)


def test_what_diverges_begins_anew():
    learner = ActorCritic(small(episode=1000))
    learner.ages[:] = 0
    learner.states[2, 5] = 3e38  # a pitch that overflows
    before = learner.states.clone()
    learner.step()
    assert learner.ages[2] == 0 and learner.states.isfinite().all()
    assert (learner.ages != 0).sum() == 5 and not torch.equal(before, learner.states)
    assert all(p.isfinite().all() for p in learner.actor.parameters())
    assert all(p.isfinite().all() for p in learner.critic.parameters())


def test_a_reset_and_a_cost_of_ones_own():
    calls = []

    def reset(states, ages, seed):
        calls.append(ages)
        anew = ~states.isfinite().all(dim=1)
        return torch.where(anew[:, None], torch.zeros_like(states), states), anew

    learner = ActorCritic(small(randomise=()), reset=reset, cost=lambda states, controls, _p: controls.square().sum(-1))
    learner.step()
    assert len(calls) == 2 and torch.equal(learner.ages, calls[1])
    states, costs = learner.evaluate(2, steps=7)
    assert states.shape == (8, 2, 6) and costs.shape == (7, 2)
    learner.reset = lambda states, ages, seed: (states * math.nan, ages < 0)
    with pytest.raises(ValueError, match="reset must return finite states"):
        learner.step()
    with pytest.raises(ValueError, match="cost must return shape"):
        ActorCritic(small(), cost=lambda states, controls, _p: states.mean()).step()


def test_an_evaluation_leaves_no_trace():
    one, other = (ActorCritic(small(actor="stochastic")) for _ in range(2))
    one.step(), other.step()
    one.evaluate(3)
    assert one.step()[:-1] == other.step()[:-1]


@pytest.mark.parametrize("changes", [{"flow": "either"}, KINDS["stochastic"] | {"flow": "C"}])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(changes, tmp_path):
    settings = small(out=str(tmp_path / "run"), **changes)
    asked = iter(range(100))
    stopped = learn(settings, stop=lambda: next(asked) >= 2)
    assert stopped.updates == 2
    resumed, whole = learn(settings, resume=True), learn(small(**changes))
    for mine, its in zip(resumed.actor.state_dict().values(), whole.actor.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(resumed.states, whole.states)
    table = np.genfromtxt(tmp_path / "run" / "record.csv", delimiter=",", names=True)
    assert table["update"].tolist() == [1, 2, 3, 4]
    saved = torch.load(tmp_path / "run" / "actor.pt", weights_only=True)
    assert torch.equal(saved["network.0.weight"], whole.actor.network[0].weight)
    with pytest.raises(FileExistsError, match="already holds a run"):
        learn(settings)
    with pytest.raises(ValueError, match=r"rate was 0.01, is 0.02"):
        learn(replace(settings, rate=0.02), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discount": 1.0}, "discount must be a number above 0 and below 1"),
        ({"trace": 1.5}, "trace must be at most 1, got 1.5"),
        ({"target_rate": 0.0}, "target_rate must be above 0"),
        ({"entropy": 0.1}, "entropy must be 0 for a deterministic actor"),
        ({"actor": "random"}, "actor must be one of deterministic, stochastic"),
        ({"episode": 3}, "episode must be at least horizon"),
        ({"critic_minibatches": 7}, "critic_minibatches must divide environments × horizon"),
        ({"randomise": ("wind:0:1",)}, "randomise must name each physical parameter once"),
        ({"randomise": ("wind_x:0",)}, "randomise must be of the form name:least:most"),
        ({"randomise": ("mass:-1:1",)}, "mass must be positive"),
        ({"observe": ("altitude",)}, "observe must name each component once"),
        ({"limits": (1.0,)}, "limits must have a number for each of x"),
        ({"scatter": (1.0,)}, "scatter must have a number for each of x"),
        ({"state_cost": (-1.0,) * 6}, "state_cost must be a number at least 0"),
        ({"flow": "Q"}, "flow 'Q' is unknown"),
        ({"memory": -1}, "memory must be an integer at least 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_flows_without_a_name():
    learner = ActorCritic(small(), flow=resolve("M"))
    assert learner.flow == resolve("modified") and SMALL.flow == "regular"
    with pytest.raises(TypeError, match="system must be a System"):
        ActorCritic(small(), system=torch.nn.Identity())


def test_the_command_line(tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)
    line = ["--system", "quadrotor", "--out", out, "--hidden", "8", "--environments", "4", "--horizon", "4"]
    line += ["--episode", "8", "--backend", "general", "--schedule", "constant", "--drag", "0.2"]
    assert main([*line, "--updates", "2", "--randomise", "wind_x:-2:2"]) == 0
    assert main(["--out", out, "--resume", "--updates", "3"]) == 0
    assert "Cost of a step over 256 episodes" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["updates"] == 3 and saved["settings"]["parameters"]["drag"] == 0.2
    assert main([*line, "--updates", "2"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    for wrong in (["--flow", "Q"], ["--system", "sofa"], ["--resume", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_nothing_of_another_run_stays(tmp_path):
    settings = small(updates=1, out=str(tmp_path))
    learn(settings)
    old = (tmp_path / "actor.pt").read_bytes()
    learn(replace(settings, seed=7, updates=2), overwrite=True, stop=lambda: True)
    assert not (tmp_path / "actor.pt").exists() and old


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_earlier_versions_go_on(version, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((VERSIONS / f"actor_critic_{version}.pt").read_bytes())
    content = load_checkpoint(tmp_path)
    assert ("version" in content) == (version > 1) and content["updates"] == 2
    (tmp_path / "record.csv").write_text("update\n1\n2\n")
    settings = Settings(**{**content["settings"], "out": str(tmp_path), "updates": 3})
    assert learn(settings, resume=True).updates == 3
    assert load_checkpoint(tmp_path)["version"] == 2
    content = torch.load(VERSIONS / f"actor_critic_{version}.pt", weights_only=True)
    save_tensors(tmp_path / "checkpoint.pt", {**content, "version": 3})
    with pytest.raises(ValueError, match="of version 3, this program reads those up to 2"):
        learn(settings, resume=True)
    save_tensors(tmp_path / "checkpoint.pt", {**content, "actor": {"w": torch.ones(3)}})
    with pytest.raises(ValueError, match="does not fit its own settings: Error"):
        learn(settings, resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "is no file of tensors"),
        (None, "is no checkpoint of an actor-critic"),
        ((VERSIONS / "actor_critic_2.pt").read_bytes()[:-300], "is damaged: it ends too early"),
        ((VERSIONS / "version_3.pt").read_bytes(), "is no checkpoint of an actor-critic"),
    ],
)
def test_other_files_are_not_resumed(tmp_path, content, message, capsys):
    if content is None:
        save_tensors(tmp_path / "checkpoint.pt", {"settings": {}})
    else:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["--resume", "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": 0.9}, "betas must be a sequence"),
        ({"limits": None}, "limits must be a sequence"),
        ({"out": 3}, "out must be text"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"schedule": 1}, "schedule must be one of"),
    ],
)
def test_settings_of_another_kind(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small(**changes)


def test_a_setting_that_came_later_has_its_default():
    settings = small()
    saved = {name: value for name, value in asdict(settings).items() if name != "scatter"}
    check_resume(saved, settings)
    with pytest.raises(ValueError, match="scatter was"):
        check_resume(saved, small(scatter=(0.1, 0.0, 0.0, 0.0, 0.0, 0.0)))
