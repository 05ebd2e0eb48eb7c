"""Systems with a network in their physics, against torch with `detach` in the same places, in float64."""

import numpy as np
import pytest
import torch

from tests.rollout import reference
from tests.rollout.test_beside import Both, Plain
from tests.rollout.test_systems_with_inputs import Wind, wind_step
from warp_phys import CartPole, Flow, Quantum, audit
from warp_phys import Rollout as WarpRollout
from warp_phys.flow import combine, resolve
from warp_phys.interop.torch import Hybrid, Rollout, TorchSystem, Update, diagnose, trajectory

STEPS, BATCH = 9, 11
SYSTEM = CartPole(dt=0.05)
BACKENDS = ["general", "fused"]
FLOWS = ["R", "M", "S", "N", Flow(0.9, 0.7, memory=0.8), "C"]


class Network(torch.nn.Module):
    """A small network of states and controls."""

    def __init__(self, size, inputs=5, scale=0.3):
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Linear(inputs, 6, dtype=torch.float64)
        self.last = torch.nn.Linear(6, size, dtype=torch.float64)
        self.scale = scale

    def forward(self, x, c):
        return self.scale * self.last(torch.tanh(self.first(torch.cat([x, c], dim=1))))


def _numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _start():
    return torch.from_numpy(SYSTEM.sample(BATCH, dtype=np.float64)).requires_grad_()


def _mass():
    return (0.1 + 0.05 * _numbers(BATCH, seed=8).abs()).requires_grad_()


class Named:
    """Numbers of a cart-pole, tensors among them."""

    def __init__(self, **numbers):
        for name in SYSTEM.parameter_names:
            setattr(self, name, numbers.get(name, getattr(SYSTEM, name)))


def _step(network, gives, mass):
    """The step of a hybrid cart-pole, from the equations."""

    def step(x, c):
        r = network(x, c)
        if gives == "residual":
            return reference.cart_pole_step(Named(pole_mass=mass), x, c) + r
        if gives == "controls":
            return reference.cart_pole_step(Named(pole_mass=mass), x, c + r)
        own = Named(pole_mass=mass + r[:, :1], half_length=SYSTEM.half_length + r[:, 1:])
        return reference.cart_pole_step(own, x, c)

    return step


def _loss(states, controls, memories=None):
    weights = torch.arange(1.0, len(states) + 1, dtype=torch.float64)[:, None, None]
    value = (states.cos() * weights).mean() + controls.square().mean()
    return value if memories is None else value + memories[1:].sin().mean()


def _check(got, right, tolerance=1e-10):
    for a, b in zip(got, right, strict=True):
        assert torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b)


def _by_torch(step, policy, given, leaves, flow):
    """Gradients by one flow, or combined from those of two."""
    resolved = resolve(flow)
    if not isinstance(resolved, Flow):
        parts = [_by_torch(step, policy, given, leaves, part) for part in (resolved.base, resolved.other)]
        return [combine(resolved, pair) for pair in zip(*parts, strict=True)]
    gates = (resolved.physics, resolved.controller, resolved.memory)
    x0, w, h = given
    unrolled = reference.unroll_beside(step, policy, x0, STEPS, w, h, gates)
    return torch.autograd.grad(_loss(*unrolled), leaves)


def _by_engine(hybrid, policy, given, leaves, flow, backend, mass):
    x0, w, h = given
    rollout = Rollout(hybrid, policy, STEPS, flow, backend=backend, memory=0 if h is None else h.shape[1])
    unrolled = rollout(x0, {"pole_mass": mass}, w, h)
    assert rollout.backend == backend
    assert (rollout.why_general is None) == (backend == "fused")
    assert [tuple(t.shape) for t in unrolled[:2]] == [(STEPS + 1, BATCH, 4), (STEPS, BATCH, 1)]
    loss = _loss(*unrolled)
    # a combined update hands out the changes of sums, not gradients of a graph
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in leaves]


SIZES = {"residual": 4, "controls": 1, ("pole_mass", "half_length"): 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gives", SIZES, ids=str)
def test_flows(gives, backend):
    network, policy, mass = Network(SIZES[gives], scale=0.05), Plain(SYSTEM), _mass()
    given, hybrid = (_start(), None, None), Hybrid(SYSTEM, network, gives)
    leaves = [given[0], mass, *policy.parameters(), *network.parameters()]
    for flow in FLOWS:
        right = _by_torch(_step(network, gives, mass[:, None]), policy, given, leaves, flow)
        _check(_by_engine(hybrid, policy, given, leaves, flow, backend, mass), right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_inputs_and_memory(backend):
    network, policy, mass = Network(1), Both(SYSTEM, 3, 5), _mass()
    given = _start(), _numbers(STEPS, BATCH, 3, seed=1).requires_grad_(), _numbers(BATCH, 5, seed=2).requires_grad_()
    leaves = [*given, mass, *policy.parameters(), *network.parameters()]
    for flow in (Flow(0.9, 0.7, memory=0.8), "C"):
        right = _by_torch(_step(network, "controls", mass[:, None]), policy, given, leaves, flow)
        hybrid = Hybrid(SYSTEM, network, "controls")
        _check(_by_engine(hybrid, policy, given, leaves, flow, backend, mass), right)
