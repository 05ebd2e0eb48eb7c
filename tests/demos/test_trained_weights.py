"""The weights that come with the demos: small, and made by a command that still works."""

import numpy as np
import pytest
import torch

from controllers import MLP
from demos import cartpole, train_weights
from demos.weights import FOLDER, load_weights, save_weights, scaled


def test_the_command_trains(tmp_path, capsys):
    line = ["cartpole", "--only", "1-C", "--updates", "60", "--out", str(tmp_path)]
    assert train_weights.main(line) == 0
    said = capsys.readouterr().out
    losses = [float(row.split("mean loss ")[1].split(",")[0]) for row in said.splitlines() if "mean loss" in row]
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    with np.load(tmp_path / "cartpole.npz") as file:
        first = dict(file)
    assert all(key.startswith("1-C/") for key in first)
    # a fixed seed: once more, the same
    assert train_weights.main(line) == 0
    with np.load(tmp_path / "cartpole.npz") as file:
        for key in file.files:
            np.testing.assert_array_equal(file[key], first[key])
    load_weights("cartpole", "1-C", cartpole.make_controller(1), tmp_path)


def test_every_controller_of_the_command_comes_along():
    for task in train_weights.tasks():
        controller = load_weights(task.demo, task.key, task.make())
        assert all(parameter.isfinite().all() for parameter in controller.parameters())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


def test_another_key_stays(tmp_path):
    for key in "ab":
        save_weights("some", {key: torch.nn.Linear(2, 1)}, tmp_path)
    for key in "ab":
        load_weights("some", key, torch.nn.Linear(2, 1), tmp_path)
    with pytest.raises(ValueError, match=r"no weights 'c' in .*some\.npz"):
        load_weights("some", "c", torch.nn.Linear(2, 1), tmp_path)
    with pytest.raises(ValueError, match=r"no weights 'a' in .*other\.npz"):
        load_weights("other", "a", torch.nn.Linear(2, 1), tmp_path)


def test_what_is_not_seen_stays_unseen():
    system = cartpole.CartPole(poles=1)
    chain = scaled(MLP(system, hidden=(8,), seed=0), np.array([0.0, 1.0, 1.0, 1.0]), gain=2.0)
    optimiser = torch.optim.Adam(chain.parameters())
    chain(torch.ones(3, 4)).sum().backward()
    optimiser.step()
    assert (chain[0].weight[:, 0] == 0.0).all() and (chain[0].weight[:, 1:] != 0.0).any()
    here, there = chain(torch.tensor([[0.0, 1.0, 1.0, 1.0], [5.0, 1.0, 1.0, 1.0]]))
    assert here == there


def test_mistakes(capsys):
    with pytest.raises(SystemExit):
        train_weights.main(["cartpole", "--only", "9-C"])
    assert "nothing to train; the controllers are cartpole 1-R" in capsys.readouterr().err
