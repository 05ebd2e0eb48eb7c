"""Controllers as files: what they compute, what they say of their numbers, what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from small_training import GIVEN, small

from controllers import MLP, export, load_controller, train
from controllers.checkpoint import save_tensors
from warp_phys import CartPole

SYSTEM = CartPole(poles=1)


class Normalised(torch.nn.Module):
    """A controller that brings states to one scale, and remembers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("mean", torch.tensor([0.5, -1.0, 2.0, 0.1]))
        self.register_buffer("scale", torch.tensor([2.0, 0.1, 1.0, 5.0]))
        self.cell, self.last = torch.nn.Linear(4 + 2 + 3, 3), torch.nn.Linear(3, 1)

    def forward(self, x, w, h):
        h = torch.tanh(self.cell(torch.cat([(x - self.mean) / self.scale, w, h], dim=1)))
        return self.last(h), h


def run(path, *inputs):
    """What a file computes, and its description of states and controls."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "warp_phys[export]"')
        session = onnxruntime.InferenceSession(str(path))
        names = [entry.name for entry in session.get_inputs()]
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        told = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
        return found, told, (names, [entry.name for entry in session.get_outputs()])
    files = {"interface.json": ""}
    results = torch.export.load(path, extra_files=files).module()(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    return [r.detach().numpy() for r in results], json.loads(files["interface.json"]), None


@pytest.mark.parametrize("name", ["controller.onnx", "controller.pt2"])
def test_a_file_computes_what_the_module_does(tmp_path, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript", reason='needs pip install "warp_phys[export]"')
    controller = MLP(SYSTEM, hidden=(8,), seed=0).train()
    export(controller, tmp_path / name, SYSTEM)
    assert controller.training
    x = torch.as_tensor(SYSTEM.sample(5, seed=0))
    (found,), told, names = run(tmp_path / name, x)
    np.testing.assert_allclose(found, controller(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert told == {"state": list(SYSTEM.states), "control": list(SYSTEM.controls)}
    assert names in (None, (["state"], ["control"]))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["controller.onnx", "controller.pt2"])
def test_normalisation_inputs_and_memory_are_in_it(tmp_path, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript", reason='needs pip install "warp_phys[export]"')
    controller = Normalised()
    export(controller, tmp_path / name, SYSTEM, inputs=2, memory=3)
    given = torch.as_tensor(SYSTEM.sample(2, seed=0)), torch.ones(2, 2), torch.zeros(2, 3)
    found, _, names = run(tmp_path / name, *given)
    for ours, theirs in zip(found, controller(*given), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert names in (None, (["state", "input", "memory"], ["control", "next_memory"]))


class Counting(torch.nn.Module):
    """Never the same twice."""

    calls = 0.0

    def forward(self, x):
        self.calls += 1.0
        return x[:, :1] + self.calls


class Constant(torch.nn.Module):
    def forward(self, x):
        return x[:1, :1]


@pytest.mark.parametrize(
    ("controller", "name", "kind", "message"),
    [
        (MLP(SYSTEM, seed=0), "c.pt", ValueError, "path must end in .onnx or .pt2, got"),
        (MLP(SYSTEM, seed=0), 5, TypeError, "path must be text or a path, got 5"),
        (np.tanh, "c.pt2", TypeError, "controller must be a torch.nn.Module, got ufunc"),
        (Constant(), "c.pt2", ValueError, r"control of shapes \[\(3, 1\)\] for 3 states, got \[\(1, 1\)\]"),
        (Counting(), "c.pt2", ValueError, "c.pt2 would compute something else than the controller, by"),
    ],
)
def test_refusals(tmp_path, controller, name, kind, message):
    with pytest.raises(kind, match=message):
        export(controller, tmp_path / name if isinstance(name, str) else name, SYSTEM)
    assert not any(tmp_path.iterdir())


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'onnx is not installed: pip install "warp_phys\[export\]"'):
        export(MLP(SYSTEM, seed=0), tmp_path / "c.onnx", SYSTEM)


def test_the_controller_of_a_training(tmp_path):
    """With inputs and a memory; a file of another network is refused."""
    settings = small(out=str(tmp_path / "run"), epochs=1, **GIVEN)
    trained = train(settings)
    controller, found = load_controller(tmp_path / "run")
    assert found == settings
    for mine, its in zip(controller.state_dict().values(), trained.controller.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    save_tensors(tmp_path / "run" / "controller.pt", MLP(SYSTEM, seed=0).state_dict())
    with pytest.raises(ValueError, match="controller.pt is not of the network that run.toml describes"):
        load_controller(tmp_path / "run")
