"""Whole rollouts against numbers that the authors' published implementation gave, in float32 on a CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from warp_phys import SYSTEMS
from warp_phys.interop.torch import Rollout

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.npz"))


# trajectories (absolute), updates (relative to their norm); measured on a CPU
TOLERANCE = {
    "cartpole": (1e-5, 1e-5),  # 1.8e-6, 2.0e-6
    "repulsion": (3e-5, 1e-5),  # 1.2e-5, 3.2e-6
    "quantum": (1e-4, 1e-4),  # 2.3e-5, 1.8e-5: the golden numbers are 128 dense solves in float32
}
BACKENDS = {"cartpole": ["fused", "general"], "repulsion": ["fused", "general"], "quantum": ["general"]}
CASES = [(path, backend) for path in GOLDEN for backend in BACKENDS[path.stem.split("_")[0]]]


class _GridNetwork(torch.nn.Module):
    """The published controller of the quantum system, written once more for this test."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        h = x.view(len(x), -1, 2).transpose(1, 2)
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h))
        return self.layers[-1](h.transpose(1, 2).flatten(1))


def _controller(data):
    layers = []
    for i in range(3):
        weight, bias = torch.tensor(data[f"weight.{i}"]), torch.tensor(data[f"bias.{i}"])
        out, into = weight.shape[:2]
        layer = (
            torch.nn.Linear(into, out) if weight.ndim == 2 else torch.nn.Conv1d(into, out, weight.shape[2], stride=2)
        )
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if isinstance(layers[0], torch.nn.Conv1d):
        return _GridNetwork(layers)
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])


@pytest.mark.parametrize("flow", list("RMSNC"))
@pytest.mark.parametrize(("path", "backend"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_rollout(path, flow, backend, device):
    """All parameters in one vector, for all five flows; the loss to 1e-6."""
    data = np.load(path)
    name = str(data["system"])
    system = SYSTEMS[name](dt=float(data["dt"]), **json.loads(str(data["parameters"])))
    rollout = Rollout(system, _controller(data).to(device), int(data["steps"]), flow, backend=backend)
    of_states, of_updates = TOLERANCE[name]
    states, controls = rollout(data["states"][0])
    loss = rollout.system.loss(states, controls, str(data["when"]), float(data["control_cost"]))
    loss.backward()
    np.testing.assert_allclose(states.detach().cpu(), data["states"], rtol=0, atol=of_states)
    np.testing.assert_allclose(controls.detach().cpu(), data["controls"], rtol=0, atol=3 * of_states)
    assert float(loss.detach()) == pytest.approx(float(data["loss"]), rel=1e-6)
    update = np.concatenate([p.grad.cpu().numpy().ravel() for p in rollout.controller.parameters()])
    names = [f"grad.{flow}.{kind}.{i}" for i in range(3) for kind in ("weight", "bias")]
    expected = np.concatenate([data[name].ravel() for name in names])
    assert np.linalg.norm(update - expected) < of_updates * np.linalg.norm(expected)
