"""A library that is missing is told before anything is done."""

import importlib
import sys

import pytest

from controllers import Training, train
from controllers.commandline import main
from controllers.record import plot_record
from warp_phys.interop.gymnasium import SystemEnv


def test_environments_ask(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    environment = SystemEnv("cartpole", render_mode="rgb_array")
    environment.reset(seed=0)
    with pytest.raises(ImportError, match=r'matplotlib is not installed: pip install "warp_phys\[plots\]"'):
        environment.render()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "warp_phys.interop.gymnasium.differentiable", raising=False)
    with pytest.raises(ImportError, match=r'torch is not installed: pip install "warp_phys\[torch\]"'):
        importlib.import_module("warp_phys.interop.gymnasium.differentiable")


def test_a_training_asks_for_what_its_end_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = r'matplotlib is not installed: pip install "warp_phys\[plots\]"'
    with pytest.raises(ImportError, match=wanted):
        train(Training(out=str(tmp_path / "run")))
    with pytest.raises(ImportError, match=wanted):
        plot_record(tmp_path / "curves.png", [])
    assert main(["--out", str(tmp_path / "run")]) == 2
    assert 'error: matplotlib is not installed: pip install "warp_phys[plots]"\n' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    settings = Training(epochs=1, train_states=8, test_states=8, steps=4, hidden=(4,), out="")
    assert train(settings).finished
