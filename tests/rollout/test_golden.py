"""Whole rollouts against numbers that the authors' published implementation gave, in float32 on a CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from warp_phys import CartPole
from warp_phys.interop.torch import Rollout

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.npz"))


def _rollout(data, device, flow, backend):
    system = CartPole(dt=float(data["dt"]), **json.loads(str(data["parameters"])))
    layers = []
    for i in range(3):
        weight, bias = torch.tensor(data[f"weight.{i}"]), torch.tensor(data[f"bias.{i}"])
        layer = torch.nn.Linear(*reversed(weight.shape))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, torch.nn.Tanh()]
    return Rollout(system, torch.nn.Sequential(*layers[:-1]).to(device), int(data["steps"]), flow, backend=backend)


@pytest.mark.parametrize("backend", ["fused", "general"])
@pytest.mark.parametrize("flow", list("RMSNC"))
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_rollout(path, flow, backend, device):
    """Measured on a CPU: trajectories to 1.8e-6, losses to 1.3e-7, updates to 2.0e-6 of their norm."""
    data = np.load(path)
    rollout = _rollout(data, device, flow, backend)
    states, controls = rollout(data["states"][0])
    loss = rollout.system.loss(states, controls, str(data["when"]), float(data["control_cost"]))
    loss.backward()
    np.testing.assert_allclose(states.detach().cpu(), data["states"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(controls.detach().cpu(), data["controls"], rtol=1e-5, atol=1e-5)
    assert float(loss.detach()) == pytest.approx(float(data["loss"]), rel=1e-6)
    update = np.concatenate([p.grad.cpu().numpy().ravel() for p in rollout.controller.parameters()])
    names = [f"grad.{flow}.{kind}.{i}" for i in range(3) for kind in ("weight", "bias")]
    expected = np.concatenate([data[name].ravel() for name in names])
    assert np.linalg.norm(update - expected) < 1e-5 * np.linalg.norm(expected)
