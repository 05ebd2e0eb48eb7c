"""Whole updates with a row program as the controller against the general backend, in float64."""

import copy

import pytest
import torch

from tests.programs.test_modules import SYSTEM, Module, double, linear, states
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout, Update

NN = torch.nn
STEPS = 12


def policy():
    """A gated cell, a norm, angles, a clamp, weights that come twice, gains."""

    def forward(m, x):
        h = m.first(torch.cat([x, x[:, 2:3].sin(), x[:, 2:3].cos()], 1))
        h = m.norm(m.cell(h, h.tanh())) * m.gain
        return m.last(h + m.middle(h).relu()).clamp(-8.0, 8.0) + m.middle(h)[:, :1]

    parts = {"norm": NN.LayerNorm(6), "cell": NN.GRUCell(6, 6), "gain": NN.Parameter(torch.ones(6))}
    return Module(forward, first=linear(6, 6), middle=linear(6, 6), last=linear(6), **parts)


@pytest.fixture
def pair():
    """The fused rollout and a general one, each with a module of its own."""
    module = double(policy)
    twin = copy.deepcopy(module)
    return Rollout(SYSTEM, module, STEPS, "C", backend="fused"), Rollout(SYSTEM, twin, STEPS, "C", backend="general")


def close(new, old, tolerance=1e-10):
    assert float((new - old).abs().max()) <= tolerance * max(1e-12, float(old.abs().max()))


def same_gradients(pair):
    for (name, p), q in zip(pair[0].controller.named_parameters(), pair[1].controller.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        close(p.grad, q.grad)


@pytest.mark.parametrize("flow", "RMSNC")
def test_value_and_grad(pair, flow):
    for rollout in pair:
        rollout.flow, rollout.observe = flow, ("M", "S")
    for when, batch in (("final", 5), ("every", 9), ((3, 12), 5), ("final", 5)):
        close(*(rollout.value_and_grad(states(batch), when, 0.2) for rollout in pair))
        same_gradients(pair)
        assert pair[0].report.flows == pair[1].report.flows and len(pair[0].report.flows) >= 2
        for new, old in zip(pair[0].report.updates, pair[1].report.updates, strict=True):
            close(new, old)


def test_updates(pair):
    updates = [
        Update(r, torch.optim.Adam(r.controller.parameters(), lr=0.01, weight_decay=0.1), "every", 0.1, clip="norm",
               clip_at=0.5)
        for r in pair
    ]  # fmt: skip
    for i in range(4):
        close(*(update(states(5, i)) for update in updates), 1e-9)
    batches = torch.stack([states(5, seed) for seed in range(6)])
    close(*(update.minibatches(batches) for update in updates), 1e-9)
    assert updates[0].is_recorded
    for p, q in zip(pair[0].controller.parameters(), pair[1].controller.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-8)
    for rollout in pair:
        rollout.controller.gain.requires_grad_(False)
    close(*(update(states(5, 9)) for update in updates), 1e-8)


@pytest.mark.parametrize("flow", "RM")
def test_physical_parameters_with_gradients(pair, flow):
    found = []
    for rollout in pair:
        rollout.flow = flow
        length = torch.linspace(0.4, 0.6, 5, dtype=torch.float64, requires_grad=True)
        mass = torch.tensor(0.12, dtype=torch.float64, requires_grad=True)
        x0 = states(5).requires_grad_()
        rollout.controller.zero_grad()
        trajectory = rollout(x0, parameters={"half_length": length, "pole_mass": mass})
        SYSTEM.loss(*trajectory, when="every", control_cost=0.1).backward()
        found.append((length.grad, mass.grad, x0.grad))
    for new, old in zip(*found, strict=True):
        close(new, old)
    same_gradients(pair)


@pytest.mark.parametrize("flow", "RC")
def test_samples_that_diverge(pair, flow):
    """They stay where they were, and have no say."""
    x0 = states(9)
    x0[3, 3] = x0[7, 3] = 1e200
    for rollout in pair:
        rollout.flow, rollout.on_divergence = flow, "mask"
        SYSTEM.loss(*rollout(x0), when="final").backward()
        assert rollout.report.diverged == (3, 7)
    same_gradients(pair)


def test_a_long_horizon_of_a_large_batch():
    """Chunks of time, blocks of samples; two threads, each with a part of the batch."""
    module, found, threads = double(policy), [], torch.get_num_threads()
    try:
        for backend, count in (("general", 1), ("fused", 1), ("fused", 2)):
            torch.set_num_threads(count)
            own = copy.deepcopy(module)
            rollout = Rollout(CartPole(dt=0.01), own, 65, "M", backend=backend)
            loss = rollout.value_and_grad(states(300), "every", 0.1)
            direct = [p.grad.clone() for p in own.parameters()]
            own.zero_grad()
            SYSTEM.loss(*rollout(states(300)), when="every", control_cost=0.1).backward()
            for p, grad in zip(own.parameters(), direct, strict=True):
                close(p.grad, grad)
            found.append([loss, *direct])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for new, old in zip(other, found[0], strict=True):
            close(new, old, 1e-9)


def test_single_precision():
    """About as near to the general backend in float64 as that in float32 is."""
    module, errors = double(policy), {}
    Rollout(SYSTEM, module, STEPS, "M", backend="general").value_and_grad(states(9), "every", 0.1)
    for backend in ("fused", "general"):
        own = copy.deepcopy(module).float()
        Rollout(SYSTEM, own, STEPS, "M", backend=backend).value_and_grad(states(9).float(), "every", 0.1)
        pairs = zip(own.parameters(), module.parameters(), strict=True)
        errors[backend] = max(float((p.grad - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs)
    assert errors["fused"] <= max(1e-5, 3 * errors["general"])


def test_parameters_without_a_gradient():
    """A critic's head and a spread beside the policy: torch leaves them alone, in weight decay and momentum too."""
    modules, updates = [], []
    for backend in ("fused", "general"):
        module = double(policy)
        module.critic, module.spread = NN.Linear(6, 1).double(), NN.Parameter(torch.ones(1, dtype=torch.float64))
        modules.append(module)
        rollout = Rollout(SYSTEM, module, STEPS, "C", backend=backend)
        rollout.value_and_grad(states(5), "every", 0.1)
        assert module.spread.grad is None and module.critic.weight.grad is None
        SYSTEM.loss(*rollout(states(5)), when="final").backward()
        assert module.spread.grad is None and module.last.weight.grad is not None
        optimiser = torch.optim.AdamW([p for p in module.parameters() if p is not module.critic.bias], 0.01)
        updates.append(Update(rollout, optimiser, "every", 0.1, clip="norm", clip_at=0.5))
    values, version = modules[0].critic(torch.ones(1, 6).double()), modules[0].spread._version
    for i in range(4):
        close(*(update(states(5, i)) for update in updates), 1e-9)
    assert updates[0].is_recorded and modules[0].spread._version == version
    values.sum().backward()  # what a critic has computed before is still good
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        close(p.detach(), q.detach(), 1e-8)
    assert modules[0].spread.item() == 1.0 and modules[0].spread not in updates[0].optimiser.state
