"""Torch functions as simulators: every flow equals that of the engine's own system; mistakes have messages."""

import copy
import pickle

import numpy as np
import pytest
import torch
import warp as wp

import warp_phys
from tests.interop.foreign_rollouts import SYSTEM, all_of_an_update, initial_states, make_network
from tests.rollout import reference
from warp_phys import CartPole, Diverged
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch.system import TorchSystem


def _step(x, c):
    return reference.cart_pole_step(SYSTEM, x, c)


def _cost(x):
    return 1 - x[:, 2::2].cos().mean(1)


@pytest.mark.parametrize("when", ["final", "every"])
@pytest.mark.parametrize("flow", ["R", "M", "S", "C"])
def test_every_flow_equals_that_of_the_engines_system(flow, when, device):
    network, x0 = make_network(device), initial_states(device)
    foreign = TorchSystem(_step, 6, 1, cost=_cost)
    got, expected = (all_of_an_update(system, network, x0, flow, when) for system in (foreign, SYSTEM))
    assert reference.relative(got[0], expected[0]) < 1e-13
    assert float(got[1]) == pytest.approx(float(expected[1]), rel=1e-13)
    assert reference.relative(got[2], expected[2]) < 1e-11
    if flow != "S":
        assert reference.relative(got[3], expected[3]) < 1e-11


def test_a_wrong_step_is_seen():
    """The comparison above is sharp: one per cent less gravity fails it."""
    network, x0 = make_network("cpu"), initial_states("cpu")
    wrong = CartPole(poles=2, gravity=0.99 * SYSTEM.gravity)
    foreign = TorchSystem(lambda x, c: reference.cart_pole_step(wrong, x, c), 6, 1, cost=_cost)
    got, expected = (all_of_an_update(system, network, x0, "M", "final") for system in (foreign, SYSTEM))
    assert reference.relative(got[2], expected[2]) > 1e-3


def test_a_module_is_a_system_and_is_trained_unless_it_is_frozen(device):
    body = torch.nn.Linear(7, 6).double().to(device)

    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x, c):
            return x + 0.1 * torch.tanh(self.body(torch.cat([x, c], dim=1)))

    for frozen in (False, True):
        network = make_network(device)
        body.requires_grad_(not frozen)
        body.zero_grad()
        states, _ = Rollout(TorchSystem(Learned(), 6, 1), network, 5, "C")(initial_states(device))
        states.square().mean().backward()
        assert (body.weight.grad is None) == frozen and network[0].weight.grad.any()


def test_value_and_grad_and_masks(device):
    def fragile(x, c):
        y = _step(x, c)
        return torch.where(x[:, :1] > 0.9, torch.inf, y)

    network, x0 = make_network(device), initial_states(device)
    x0[:, 0] = torch.tensor([0.0, 0.1, 0.95, 0.2, 0.3])
    system = TorchSystem(fragile, 6, 1, cost=_cost)
    with pytest.raises(Diverged, match="step 1"):
        Rollout(system, network, 3)(x0)
    masking = Rollout(system, network, 3, "C", on_divergence="mask")
    masking.value_and_grad(x0)
    assert masking.report.diverged == (2,)
    masked = network[0].weight.grad.clone()
    rollout = Rollout(SYSTEM, network, 3, "C")
    keep = [0, 1, 3, 4]
    rollout.value_and_grad(x0[keep])
    torch.testing.assert_close(masked, 0.8 * network[0].weight.grad, rtol=1e-10, atol=1e-14)


def test_in_a_rollout_of_pure_warp(device):
    """A tape records the rollout as a whole, and refuses a single step."""
    updates = []
    for system in (TorchSystem(_step, 6, 1), SYSTEM):
        dense = warp_phys.Dense((6, 16, 1), dtype=np.float64, device=device)
        x0 = wp.array(SYSTEM.sample(5, dtype=np.float64), device=device)
        with wp.Tape() as tape:
            states, controls = warp_phys.Rollout(system, dense, 20, "C")(x0)
            loss = SYSTEM.loss(states, controls, when="every")
        tape.backward(loss)
        updates.append(np.concatenate([p.grad.numpy().ravel() for p in dense.parameters]))
        tape.zero()
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-10, atol=1e-13)
    x = wp.zeros((2, 6), dtype=wp.float64, device=device, requires_grad=True)
    c = wp.zeros((2, 1), dtype=wp.float64, device=device)
    with wp.Tape(), pytest.raises(RuntimeError, match="cannot record the step of a TorchSystem: use warp_phys.Rollout"):
        TorchSystem(_step, 6, 1).step(x, c, wp.empty_like(x))


def test_copies():
    rollout = Rollout(TorchSystem(_step, 6, 1, _cost), make_network("cpu"), 3)
    for twin in (copy.deepcopy(rollout), pickle.loads(pickle.dumps(rollout))):
        assert torch.equal(twin(initial_states("cpu"))[0], rollout(initial_states("cpu"))[0])


def test_arguments():
    with pytest.raises(TypeError, match="function must be a function, got int"):
        TorchSystem(3, 6, 1)
    with pytest.raises(ValueError, match="state_size must be at least 1, got 0"):
        TorchSystem(_step, 0, 1)
    with pytest.raises(TypeError, match="cost must be a function, got str"):
        TorchSystem(_step, 6, 1, cost="energy")
    with pytest.raises(TypeError, match="made without a cost"):
        TorchSystem(_step, 6, 1).loss(torch.zeros(3, 4, 6))
    with pytest.raises(ValueError, match=r"what cost returns must have shape \(4,\), got \(\)"):
        TorchSystem(_step, 6, 1, cost=lambda x: x.sum()).loss(torch.zeros(3, 4, 6))


def _in_place(x, c):
    return x.add_(1.0)


def _detached(x, c):
    return _step(x.detach(), c.detach())


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x, c: x[:, :3], ValueError, r"what function returns must have shape \(5, 6\), got \(5, 3\)"),
        (lambda x, c: x.float(), TypeError, "must hold torch.float64 as its arguments do, got torch.float32"),
        (lambda x, c: x.numpy(force=True), TypeError, "must return a torch.Tensor, got ndarray"),
        (_in_place, ValueError, "must not change its arguments in place"),
        (_detached, ValueError, "function must be differentiable: what it returns has no graph"),
        (lambda x, c: _step(x, c) + (x[:, :1] * 0).abs().sqrt(), ValueError, "with respect to x is not finite for sam"),
    ],
)
def test_functions_that_do_not_do(function, error, message):
    network, x0 = make_network("cpu"), initial_states("cpu")
    with pytest.raises(error, match=message):
        Rollout(TorchSystem(function, 6, 1), network, 3, "M")(x0)[0].sum().backward()


def test_a_control_that_has_no_effect(device):
    x0 = initial_states(device).requires_grad_()
    Rollout(TorchSystem(lambda x, c: 0.5 * x, 6, 1), make_network(device), 3, "M")(x0)[0][-1].sum().backward()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, 0.125))
