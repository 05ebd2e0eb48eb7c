"""The demo on Newton's models learns, reports and draws."""

import re

import numpy as np
import pytest
import torch
import warp as wp

pytest.importorskip("newton")

from demos.newton_control import Settings, main
from demos.newton_tasks import TASKS, segments


def test_a_short_training(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    assert main(["--flows", "RC", "--updates", "6", "--worlds", "4", "--steps", "20", "--save", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    losses = re.findall(r"^([RC]) \w+ +test loss ([\d.]+) → ([\d.]+)", text, re.MULTILINE)
    assert [letter for letter, _, _ in losses] == ["R", "C"]
    assert len({start for _, start, _ in losses}) == 1  # the same weights and test states
    assert all(float(end) < float(start) for _, start, end in losses)


def test_the_ant_stands():
    system = TASKS["ant"].build(2)
    states = TASKS["ant"].start(system, np.random.default_rng(0))
    assert states.shape == (2, 29) and system.control_size == 8 and system.substeps == 4
    assert np.abs(states[0] - states[1]).max() > 0.01


def test_the_hopper_stands():
    """On its springs alone it is still upright after a second."""
    task = TASKS["hopper"]
    system = task.build(2)
    x = wp.array(task.start(system, np.random.default_rng(0)), dtype=wp.float32, device="cpu")
    y, c = wp.empty_like(x), wp.zeros((2, 3), dtype=wp.float32, device="cpu")
    for _ in range(50):
        system.step(x, c, y)
        x, y = y, x
    assert np.abs(x.numpy()[:, 1] + 0.13).max() < 0.03 and np.abs(x.numpy()[:, 2]).max() < 0.1
    assert task.observe(torch.zeros(2, system.state_size)).shape == (2, 11)
    capsules = segments(system, x.numpy())
    assert capsules.shape == (4, 5) and np.abs(capsules[3, [1, 3]] - 0.05).max() < 0.02  # the foot lies on the ground


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "snake"], "task must be one of 'cartpole', 'ant', 'hopper', got 'snake'"),
        (["--flows", "X"], "flow"),
        (["--updates", "0"], "updates must be at least 1, got 0"),
        (["--rate", "0"], "rate must be positive, got 0.0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--save", "x.xyz"], "save must end in .png, .pdf, .svg, got 'x.xyz'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--save", "x.png", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_divergence_takes_one_line(tmp_path, capsys):
    line = "--flows R --updates 3 --worlds 2 --steps 5 --rate 1e30 --save".split()
    with pytest.raises(SystemExit) as stop:
        main([*line, str(tmp_path / "x.png")])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "error: the training with R diverged: the trajectory leaves the finite numbers at step" in error
    assert not list(tmp_path.iterdir())


def test_defaults_are_valid():
    assert Settings().flows == "RMSC"
