"""Inputs, memory and gates in pure Warp: the same numbers as the torch bridge with the same weights."""

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout.test_systems_with_inputs import Wind
from warp_phys import CartPole, Dense, Flow, Rollout
from warp_phys.interop import torch as bridge

STEPS, BATCH = 7, 10


class OfRows(torch.nn.Module):
    """The layers of a `Dense` on [x | h | w], as a torch module."""

    def __init__(self, dense, controls, memory):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.from_numpy(p.numpy().copy()) for p in dense.parameters)
        self.controls, self.memory = controls, memory

    def compute(self, *parts):
        y = torch.cat(parts, dim=1)
        for i in range(0, len(self.weights), 2):
            y = y @ self.weights[i].T + self.weights[i + 1]
            y = torch.tanh(y) if i < len(self.weights) - 2 else y
        return (y[:, : self.controls], y[:, self.controls :]) if self.memory else y


class WithBoth(OfRows):
    def forward(self, x, w, h):
        return self.compute(x, h, w)


class WithInputs(OfRows):
    def forward(self, x, w):
        return self.compute(x, w)


class Alone(OfRows):
    def forward(self, x):
        return self.compute(x)


FLOWS = ["R", "M", "S", "C", Flow(0.7, 0.5, memory=0.3), Flow(np.linspace(0, 1, STEPS * BATCH).reshape(STEPS, BATCH))]


@pytest.mark.parametrize("backend", ["general", "fused"])
@pytest.mark.parametrize(("memory", "inputs", "shared"), [(3, 2, False), (3, 2, True), (0, 2, False), (0, 0, False)])
def test_as_the_torch_bridge(memory, inputs, shared, backend):
    system = CartPole(dt=0.05)
    dense = Dense((4 + memory + inputs, 6, 1 + memory), device="cpu", dtype=np.float64, seed=1)
    kind = WithBoth if memory else WithInputs if inputs else Alone
    random = np.random.default_rng(0)
    x0, h0 = system.sample(BATCH, dtype=np.float64), random.normal(size=(BATCH, memory))
    w = random.normal(size=(STEPS, 1 if shared else BATCH, inputs))
    for flow in FLOWS:
        rollout = Rollout(system, dense, STEPS, flow, backend=backend, memory=memory, inputs=inputs)
        given = [wp.array(a, dtype=wp.float64, device="cpu", requires_grad=True) for a in (x0, w, h0)]
        tape = wp.Tape()
        with tape:
            unrolled = rollout(given[0], inputs=given[1] if inputs else None, memory=given[2] if memory else None)
            loss = system.loss(unrolled[0], unrolled[1], "every", 0.1)
        tape.backward(loss)
        module = kind(dense, 1, memory)
        other = bridge.Rollout(system, module, STEPS, flow, backend="general", memory=memory, inputs=inputs)
        tensors = [torch.from_numpy(a).requires_grad_() for a in (x0, w, h0)]
        states, controls, *_ = other(
            tensors[0], inputs=tensors[1] if inputs else None, memory=tensors[2] if memory else None
        )
        system.loss(states, controls, "every", 0.1).backward()
        pairs = list(zip(dense.parameters, module.weights, strict=True))
        pairs += [(a, b) for a, b in zip(given, tensors, strict=True) if a.size and b.grad is not None]
        assert len(pairs) == 4 + 1 + (inputs > 0) + (memory > 0)
        for own, right in pairs:
            scale = np.abs(right.grad.numpy()).max()
            assert np.abs(own.grad.numpy() - right.grad.numpy()).max() <= 1e-11 * scale
        tape.zero()


@pytest.mark.parametrize("backend", ["general", "fused"])
def test_a_system_whose_cost_reads_inputs(backend):
    """Its controller sees the inputs of the step before too: rows are [x | v | w]."""
    system, random = Wind(), np.random.default_rng(0)
    dense = Dense((2 + 3 + 3, 5, 1), device="cpu", dtype=np.float64, seed=1)
    rollout = Rollout(system, dense, STEPS, "R", backend=backend, inputs=3)
    x0, w = random.normal(size=(BATCH, 2)), random.normal(size=(STEPS, 1, 3))

    def value(w):
        given = [wp.array(a, dtype=wp.float64, device="cpu", requires_grad=True) for a in (x0, w)]
        tape = wp.Tape()
        with tape:
            states, _ = rollout(given[0], inputs=given[1])
        seed = np.cos(np.arange(states.numpy().size)).reshape(states.shape)
        tape.backward(grads={states: wp.array(seed, dtype=wp.float64, device="cpu")})
        return float((states.numpy() * seed).sum()), given[1].grad.numpy()

    _, gradient = value(w)
    direction, h = random.normal(size=w.shape), 1e-6
    change = (value(w + h * direction)[0] - value(w - h * direction)[0]) / (2 * h)
    assert change == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


def test_errors():
    dense = Dense((4 + 2, 5, 1), device="cpu")
    x0 = wp.zeros((3, 4), dtype=wp.float32, device="cpu")
    rollout = Rollout(CartPole(), dense, STEPS, inputs=2)
    cases = [
        (lambda: rollout(x0), "inputs of 2 numbers"),
        (lambda: rollout(x0, inputs=wp.zeros((STEPS, 2, 2), dtype=wp.float32, device="cpu")), "inputs must have shape"),
        (lambda: rollout(x0, inputs=wp.zeros((STEPS, 3, 1), dtype=wp.float32, device="cpu")), "inputs must have shape"),
        (lambda: Rollout(CartPole(), dense, STEPS, inputs=3), "state_size 6"),
        (lambda: Rollout(Wind(), dense, STEPS, inputs=2), "inputs must be at least 3"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_flows_that_take_turns_have_their_own_gates():
    """Gates of samples, of components and limits, one after the other, of one batch and of another."""
    system, flows = CartPole(dt=0.05), [
        Flow(np.linspace(0, 1, STEPS * BATCH).reshape(STEPS, BATCH)), Flow(limit=0.3),
        Flow(np.array([[[0.5, 1.0, 0.2, 0.0]]])), Flow(np.linspace(1, 0, STEPS * BATCH).reshape(STEPS, BATCH)),
    ]  # fmt: skip
    dense = Dense((4, 6, 1), device="cpu", dtype=np.float64, seed=1)
    changing = Rollout(system, dense, STEPS, flows[0], backend="fused")

    def anew(flow):
        return Rollout(system, dense, STEPS, flow, backend="fused")

    def gradient(rollout, x0):
        tape = wp.Tape()
        with tape:
            loss = system.loss(*rollout(wp.array(x0, dtype=wp.float64, device="cpu")))
        tape.backward(loss)
        found = dense.parameters[0].grad.numpy().copy()
        tape.zero()
        return found

    x0 = system.sample(BATCH, dtype=np.float64)
    for flow in flows:
        changing.flow = flow
        assert np.array_equal(gradient(changing, x0), gradient(anew(flow), x0))
    changing.flow = flows[1]
    gradient(changing, x0[:3])
    changing.flow = flows[0]
    assert np.array_equal(gradient(changing, x0), gradient(anew(flows[0]), x0))
