"""The hand-written Warp program of docs/own_loop.md against torch with `detach` in the same places, in float64."""

import importlib.util

import numpy as np
import pytest
import torch

from tests.docs.pages import ROOT, blocks, code
from tests.rollout.reference import gated, gradient
from warp_phys import Flow, agree
from warp_phys.flow import resolve

PAGE = ROOT / "docs" / "own_loop.md"
DT = 0.05
FLOWS = ["R", "M", "S", "N", Flow(0.9, 0.5)]


def load(text, path):
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return load(code(PAGE), tmp_path_factory.mktemp("page") / "own_loop_page.py")


def torch_update(weights, start, steps, flow):
    """Loss and update, written from the page's equations."""
    w1, b1, w2 = parameters = [torch.tensor(w, requires_grad=True) for w in weights]
    x = torch.tensor(start)
    for _ in range(steps):
        seen, moved = gated(x, flow.controller), gated(x, flow.physics)
        c = torch.tanh(seen @ w1.T + b1) @ w2
        rate = moved[:, 1] + DT * (c - 0.1 * moved[:, 1] - 9.8 * torch.sin(moved[:, 0]))
        x = torch.stack([moved[:, 0] + DT * rate, rate], dim=1)
    loss = (1 + torch.cos(x[:, 0]) + 0.05 * x[:, 1] ** 2).mean()
    return float(loss.detach()), gradient(loss, parameters).numpy()


def test_every_flow_equals_torch(program):
    weights = [w.numpy().copy() for w in program.weights]
    program.tape, program.total, program.states = program.record()
    updates = {}
    for flow in map(resolve, FLOWS):
        loss, expected = torch_update(weights, program.start, program.STEPS, flow)
        updates[flow.letter] = program.update(flow)
        np.testing.assert_allclose(program.total.numpy()[0], loss, rtol=1e-13)
        np.testing.assert_allclose(updates[flow.letter], expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())
    # the flows differ by more than what is tolerated, or the above would prove nothing
    for a, b in (("R", "M"), ("M", "S"), ("S", "N"), ("R", "N")):
        assert np.linalg.norm(updates[a] - updates[b]) > 1e-3 * np.linalg.norm(updates[b])


def test_training_with_c_equals_torch(program):
    """Five steps of the page's training."""
    weights = [w.numpy().copy() for w in program.weights]
    losses = program.swing_up(epochs=5)
    for loss in losses:
        expected, m = torch_update(weights, program.start, program.STEPS, resolve("M"))
        c = agree(m, torch_update(weights, program.start, program.STEPS, resolve("R"))[1])
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
        parts = np.split(0.05 * c / np.linalg.norm(c), np.cumsum([w.size for w in weights])[:-1])
        weights = [w - part.reshape(w.shape) for w, part in zip(weights, parts, strict=True)]
    assert len(set(losses)) == 5


def test_three_lines_are_added(tmp_path):
    """Without the lines that are marked the program is what it was: same loss, same gradient."""
    written = [block[2] for block in blocks(PAGE)]
    lines = "".join(written[:2]).splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip().endswith("# added")]
    assert len(lines) - len(kept) == 3
    programs = [load("".join(text), tmp_path / f"own_loop_{i}.py") for i, text in enumerate((lines, kept))]
    results = []
    for module in programs:
        tape, total, _ = module.record()
        tape.backward(total)
        results.append([total.numpy(), *(w.grad.numpy() for w in module.weights)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
        assert np.abs(a).max() > 0
