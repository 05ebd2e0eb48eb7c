"""The demo in which an RL library learns on an environment of ours."""

import re
import sys

import pytest

from demos import reinforcement


def test_a_few_steps(capsys):
    """Far too few to learn anything; the environment goes through the library and back."""
    pytest.importorskip("stable_baselines3", reason="the demo's RL library is not installed")
    flags = ["--environment", "warp_phys/Polynomial-v0", "--steps", "64", "--environments", "4"]
    assert reinforcement.main(flags) == 0
    number = r"(-?[\d.]+) ± ([\d.]+)"
    found = re.search(rf"before +{number}\nafter +{number} +\(64 steps", capsys.readouterr().out)
    returns = [float(value) for value in found.groups()]
    assert returns[0] < 0 and returns[2] < 0 and returns[0] != returns[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--environment", "CartPole-v1"], "environment must be one of warp_phys/CartPole-v0, .*, got 'CartPole-v1'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_mistakes(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        reinforcement.main(flags)
    assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_without_the_library(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit) as caught:
        reinforcement.main([])
    assert caught.value.code == 2 and "pip install stable-baselines3" in capsys.readouterr().err
