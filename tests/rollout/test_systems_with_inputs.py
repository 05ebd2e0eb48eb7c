"""A system that is given something at every step: what it is, and what is refused."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.systems import System, SystemFunctions


@dataclass(frozen=True)
class Wind(System):
    """A body on a line: x' = v, v' = c − k v + drag (w − v), with a wind and a reference for its position."""

    inputs: ClassVar[tuple[str, ...]] = ("wind [m/s]", "gusts [m/s]", "reference [m]")

    dt: float = 0.1
    drag: float = 0.7

    @property
    def states(self):
        return ("position [m]", "velocity [m/s]")

    @property
    def controls(self):
        return ("force [N]",)

    def functions(self, real):
        return _functions(self, real)

    def sample(self, batch, seed=0, dtype=np.float32):
        return np.random.default_rng(seed).uniform(-1, 1, (batch, 2)).astype(numpy_type(real_type(dtype)))


@functools.cache
def _functions(system, real):
    types = system.types(real)
    State, Control, Parameters, Input = types.State, types.Control, types.Parameters, types.Input

    @wp.func
    def step(x: State, c: Control, w: Input, p: Parameters):
        gust = w[0] + w[1] * wp.sin(x[0])
        v = x[1] + p.dt * (c[0] + p.drag * (gust - x[1]))
        return State(x[0] + p.dt * v, v)

    @wp.func
    def cost(x: State, w: Input, p: Parameters):
        error = x[0] - w[2]
        return error * error + real(0.1) * x[1] * x[1]

    return SystemFunctions(step, cost)


def wind_step(system, x, c, w):
    gust = w[:, 0] + w[:, 1] * x[:, 0].sin()
    v = x[:, 1] + system.dt * (c[:, 0] + system.drag * (gust - x[:, 1]))
    return torch.stack([x[:, 0] + system.dt * v, v], dim=1)


def wind_cost(x, w):
    return (x[:, 0] - w[:, 2]) ** 2 + 0.1 * x[:, 1] ** 2


def test_losses_of_numpy_and_torch_agree():
    system = Wind()
    states, w = np.random.default_rng(0).normal(size=(6, 3, 2)), np.random.default_rng(1).normal(size=(5, 3, 3))
    right = np.mean([wind_cost(torch.tensor(states[n + 1]), torch.tensor(w[n])).mean() for n in range(5)])
    assert float(system.loss(states, when="every", inputs=w)) == pytest.approx(right, rel=1e-12)
    torchs = system.loss(torch.tensor(states), when="every", inputs=torch.tensor(w))
    assert float(torchs) == pytest.approx(right, rel=1e-12)
    first = system.loss(states, when=[0], inputs=w)  # which no step has led to
    assert float(first) == pytest.approx(
        float(wind_cost(torch.tensor(states[0]), torch.tensor(w[0])).mean()), rel=1e-12
    )


def test_what_steps_without_inputs_is_refused():
    x, c = wp.zeros((2, 2), dtype=wp.float32, device="cpu"), wp.zeros((2, 1), dtype=wp.float32, device="cpu")
    with pytest.raises(TypeError, match="has inputs \\(wind"):
        Wind().step(x, c, wp.zeros_like(x))
