"""One step of every system against numbers that the authors' published implementation gave, in float32."""

import json
from pathlib import Path

import numpy as np
import pytest
import warp as wp

from warp_phys import SYSTEMS

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.npz"))


def test_golden_files_are_there():
    assert {path.stem.split("_")[0] for path in GOLDEN} == {"cartpole", "repulsion", "quantum"} and len(GOLDEN) == 7


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_step(path, device):
    """Measured on a CPU, of the largest component: 2.0e-8 (cart-pole), 7.0e-8 (repulsion), 7.7e-7 (quantum)."""
    data = np.load(path)
    system = SYSTEMS[str(data["system"])](dt=float(data["dt"]), **json.loads(str(data["parameters"])))
    x, c = (wp.array(data[f"one_step.{name}"], device=device) for name in ("state", "control"))
    y = wp.zeros_like(x)
    system.step(x, c, y)
    scale = np.abs(data["one_step.next"]).max(axis=1, keepdims=True)
    assert (np.abs(y.numpy() - data["one_step.next"]) / scale).max() < 1e-6
    if str(data["system"]) != "quantum":
        np.testing.assert_allclose(y.numpy(), data["one_step.next"], rtol=1e-6)  # measured 1.6e-7 and 7.9e-7


@pytest.mark.parametrize("path", [path for path in GOLDEN if "quantum" in path.stem], ids=lambda path: path.stem)
def test_golden_eigenstates(path):
    data = np.load(path)
    system = SYSTEMS["quantum"](**json.loads(str(data["parameters"])))
    for k in range(1, 6):
        np.testing.assert_allclose(system.eigenstate(k), data[f"eigenstate.{k}"], atol=1e-6)
