"""The demo on Newton's models learns, reports and draws."""

import re

import numpy as np
import pytest

pytest.importorskip("newton")

from demos.newton_control import Settings, main
from demos.newton_tasks import TASKS


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "snake"], "task must be one of 'cartpole', 'ant', got 'snake'"),
        (["--flows", "X"], "flow"),
        (["--updates", "0"], "updates must be at least 1, got 0"),
        (["--rate", "0"], "rate must be positive, got 0.0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--save", "x.png"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_defaults_are_valid():
    assert Settings().flows == "RMSC"
