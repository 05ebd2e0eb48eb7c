"""The weights that come with the demos: small, and made by a command that still works."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from controllers.actor_critic import make_actor
from controllers.training import train
from demos import cartpole, herd, quadrotor, quantum, train_weights, weather_numbers
from demos.experiments.plan import make_plan
from demos.weights import FOLDER, load_weights, save_weights
from warp_phys import Quadrotor


def test_the_command_trains(tmp_path, capsys):
    line = ["cartpole", "--only", "1-C", "--updates", "60", "--out", str(tmp_path)]
    assert train_weights.main(line) == 0
    said = capsys.readouterr().out
    assert re.search(r"^cartpole 1-C: update 6, loss [\d.]+, \d+ s$", said, re.MULTILINE)
    with np.load(tmp_path / "cartpole.npz") as file:
        first = dict(file)
    assert all(key.startswith("1-C/") for key in first)
    # a fixed seed: once more, the same
    assert train_weights.main(line) == 0
    with np.load(tmp_path / "cartpole.npz") as file:
        for key in file.files:
            np.testing.assert_array_equal(file[key], first[key])
    load_weights("cartpole", "1-C", cartpole.make_controller(1), tmp_path)


def test_training_on_learns():
    (task,) = [task for task in train_weights.tasks() if (task.demo, task.key) == ("cartpole", "1-C")]
    losses = []
    train_weights.make_controller(task, updates=60, tell=lambda done, loss: losses.append(loss))
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_published_runs_are_trained_or_taken(tmp_path):
    (task,) = [task for task in train_weights.tasks() if (task.demo, task.key) == ("cartpole", "2-C")]
    made = train_weights.make_controller(task, epochs=1)
    # a run of demos.paper with the same settings, but for its length
    (run,) = make_plan(tmp_path, {"cartpole": [2]}, ["C"], ["none"], [0], epochs=1)
    train(run.settings)
    taken = train_weights.finished_run(replace(task.training, epochs=1), str(tmp_path))
    for mine, theirs in zip(made.parameters(), taken.parameters(), strict=True):
        np.testing.assert_array_equal(mine.detach(), theirs.detach())
    assert train_weights.finished_run(task.training, str(tmp_path)) is None


def test_every_controller_of_the_command_comes_along():
    makers = {
        "cartpole": lambda key: cartpole.make_controller(int(key[0])),
        "herd": lambda key: herd.Policy(),
        "quadrotor": lambda key: make_actor(Quadrotor(), quadrotor.LEARNING),
        "quantum": lambda key: quantum.make_controller(),
        "weather": lambda key: weather_numbers.make_controller(weather_numbers.SCENARIOS[key]),
    }
    for task in train_weights.tasks():
        controller = load_weights(task.demo, task.key, makers[task.demo](task.key))
        assert all(parameter.isfinite().all() for parameter in controller.parameters())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


def test_another_key_stays(tmp_path):
    for key in "ab":
        save_weights("some", {key: torch.nn.Linear(2, 1)}, tmp_path)
    for key in "ab":
        load_weights("some", key, torch.nn.Linear(2, 1), tmp_path)
    with pytest.raises(ValueError, match=r"no weights 'c' in .*some\.npz"):
        load_weights("some", "c", torch.nn.Linear(2, 1), tmp_path)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "text.npz").write_bytes(b"no archive")
    for name in ("torn", "text"):
        with pytest.raises(ValueError, match=rf"no weights 'a' in .*{name}\.npz"):
            load_weights(name, "a", torch.nn.Linear(2, 1), tmp_path)
    with pytest.raises(ValueError, match=r"no weights 'a' in .*other\.npz"):
        load_weights("other", "a", torch.nn.Linear(2, 1), tmp_path)


def test_one_pole_is_steered_alike_everywhere():
    policy = cartpole.Policy()
    states = torch.tensor([[0.0, 1.0, 0.5, -1.0], [7.0, 1.0, 0.5 - 2.0 * np.pi, -1.0]])
    here, there = policy(states)
    assert here.item() == pytest.approx(there.item(), rel=1e-4)


def test_dogs_are_told_the_same_wherever_the_flock_is():
    """A world that is turned about the target is the same to the network."""
    states = torch.from_numpy(herd.SYSTEM.sample(20, seed=0)).double()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    turned = (states.reshape(20, -1, 2, 2) @ turn.T).reshape(20, -1)
    policy, said = herd.Policy().double(), []
    policy.network.register_forward_hook(lambda module, given, found: said.append(found.detach()))
    policy(states), policy(turned)
    np.testing.assert_allclose(said[1], said[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--epochs", "0"], "epochs must be an integer at least 1, got 0"),
        (["--updates", "-2"], "updates must be an integer at least 1, got -2"),
        (["--runs", "nowhere"], "runs must name a folder with runs of demos.paper, got 'nowhere', which holds none"),
        (["--runs", "."], "runs must name a folder with runs of demos.paper, got '.', which holds none"),
        (["--out", "."], "cartpole.npz is no file of weights"),
    ],
)
def test_mistakes_take_one_line(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cartpole.npz").write_bytes(b"PK\x03\x04 torn")
    monkeypatch.setattr(train_weights, "make_controller", lambda *_: pytest.fail("a training has begun"))
    with pytest.raises(SystemExit) as ended:
        train_weights.main(["cartpole", "--out", str(tmp_path / "new"), *line])
    said, error = capsys.readouterr()
    assert ended.value.code == 2 and message in error and error.count("\n") == 1 and not said


def test_mistakes(capsys):
    with pytest.raises(SystemExit):
        train_weights.main(["cartpole", "--only", "9-C"])
    with pytest.raises(SystemExit):
        train_weights.main(["cartpole", "--only", "1-C", "9-Z"])
    assert "nothing to train; the controllers are cartpole 1-R" in capsys.readouterr().err
