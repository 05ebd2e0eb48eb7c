"""Sums before comparisons: over backward passes, over calls, over rollouts, over ranks."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.interop.test_torch import STEPS, SYSTEM, flat, network, start, update
from tests.rollout.reference import relative
from warp_phys import STOPPED, Combined, Diverged
from warp_phys.interop.torch import Rollout


def sums(net, batches, weight=1.0):
    """Return M and R summed over batches, and their combination: what C must be."""
    base, other = (sum(weight * update(Rollout(SYSTEM, net, STEPS, flow), x0) for x0 in batches) for flow in "MR")
    return torch.where(base.sign() == other.sign(), base, 0.0)


def test_several_backward_passes_before_one_step(device):
    net = network(device=device)
    batches = [start(device, seed=s) for s in range(3)]
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    together = update(rollout, *batches)
    assert relative(together, sums(net, batches)) < 1e-12
    apart = sum(update(rollout, x0) for x0 in batches)
    assert relative(apart, together) > 1e-3  # the order of sums matters here, or this proves nothing


def _by_a_checkpoint(rollout, x0):
    return checkpoint(rollout, x0, use_reentrant=False)


def _by_copies_that_are_saved(rollout, x0):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        return rollout(x0)


@pytest.mark.parametrize("call", [_by_a_checkpoint, _by_copies_that_are_saved])
@pytest.mark.parametrize("backend", ["fused", "general"])
def test_hooks_on_saved_tensors(call, backend, device):
    """What autograd hands back of a parameter is another tensor then; a change in between is noticed all the same."""
    net = network(device=device)
    batches = [start(device, seed=s) for s in range(2)]
    rollout = Rollout(SYSTEM, net, STEPS, "C", backend=backend)
    expected = sums(net, batches)
    net.zero_grad()
    losses = [SYSTEM.loss(*call(rollout, x0)) for x0 in batches]
    for loss in losses:
        loss.backward()
    assert relative(flat(net), expected) < 1e-12
    loss = SYSTEM.loss(*call(rollout, batches[0]))
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


@pytest.mark.parametrize("backend", ["fused", "general"])
def test_a_pass_after_value_and_grad_adds_to_its_sums(backend, device):
    net = network(device=device)
    batches = [start(device, seed=s) for s in range(3)]
    rollout = Rollout(SYSTEM, net, STEPS, "C", backend=backend)
    for _ in range(2):
        rollout.value_and_grad(batches[0])
        for x0 in batches[1:]:
            SYSTEM.loss(*rollout(x0)).backward()
        assert relative(flat(net), sums(net, batches)) < 1e-12
    rollout.value_and_grad(batches[0])
    for p in net.parameters():
        p.grad.mul_(0.5)
    halved = flat(net)
    SYSTEM.loss(*rollout(batches[1])).backward()
    assert relative(flat(net), halved + sums(net, batches[1:2])) < 1e-12  # a changed gradient is the user's


def test_a_pass_after_one_that_diverged(device):
    """What value_and_grad wrote before stays, and what comes now is added to it."""
    net = network(device=device)
    a, b = (start(device, seed=s) for s in range(2))
    bad = a.clone()
    bad[0, 3] = 1e200  # a rate whose square overflows
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    rollout.value_and_grad(a)
    before = flat(net)
    with pytest.raises(Diverged):
        rollout.value_and_grad(bad)
    assert torch.equal(flat(net), before)
    SYSTEM.loss(*rollout(b)).backward()
    assert relative(flat(net), before + sums(net, [b])) < 1e-12


def test_micro_batches_equal_the_batch(device):
    net = network(device=device)
    x0 = start(device, batch=12)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    whole = update(rollout, x0)
    assert relative(update(rollout, *x0.split(4), scale=1 / 3), whole) < 1e-10


def test_two_calls_in_one_loss(device):
    net = network(device=device)
    batches = [start(device, seed=s) for s in range(2)]
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    net.zero_grad()
    sum(SYSTEM.loss(*rollout(x0)) for x0 in batches).backward()
    assert relative(flat(net), sums(net, batches)) < 1e-12


def test_two_rollouts_of_one_controller(device):
    net = network(device=device)
    batches = [start(device, seed=s) for s in range(2)]
    rollouts = [Rollout(SYSTEM, net, STEPS, "C") for _ in batches]
    outputs = [rollout(x0) for rollout, x0 in zip(rollouts, batches, strict=True)]
    net.zero_grad()
    for states, controls in outputs:
        SYSTEM.loss(states, controls).backward()
    assert relative(flat(net), sums(net, batches)) < 1e-12


@pytest.mark.parametrize("to_none", [True, False])
def test_clearing_gradients_starts_a_new_sum(to_none, device):
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    a, b = start(device, seed=0), start(device, seed=1)
    expected = update(rollout, b)
    update(rollout, a)
    net.zero_grad(set_to_none=to_none)
    SYSTEM.loss(*rollout(b)).backward()
    assert torch.equal(flat(net), expected)


def test_clearing_gradients_when_another_loss_comes_first(device):
    """The sums of the last update must not leak into this one."""
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    a, b = start(device, seed=0), start(device, seed=1)
    expected = update(rollout, b) + 2 * torch.cat([p.detach().flatten() for p in net.parameters()])
    update(rollout, a)
    net.zero_grad()
    sum(p.square().sum() for p in net.parameters()).backward()
    SYSTEM.loss(*rollout(b)).backward()
    assert relative(flat(net), expected) < 1e-12


def test_another_loss_between_two_passes(device):
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    batches = [start(device, seed=s) for s in range(2)]
    expected = sums(net, batches) + 2 * torch.cat([p.detach().flatten() for p in net.parameters()])
    net.zero_grad()
    SYSTEM.loss(*rollout(batches[0])).backward()
    sum(p.square().sum() for p in net.parameters()).backward()
    SYSTEM.loss(*rollout(batches[1])).backward()
    assert relative(flat(net), expected) < 1e-12


def test_autograd_grad_leaves_no_trace(device):
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    a, b = start(device, seed=0), start(device, seed=1)
    expected = [update(rollout, x0) for x0 in (a, b)]
    net.zero_grad()
    grads = torch.autograd.grad(SYSTEM.loss(*rollout(a)), list(net.parameters()))
    assert torch.equal(torch.cat([g.flatten() for g in grads]), expected[0])
    assert all(p.grad is None for p in net.parameters())
    SYSTEM.loss(*rollout(b)).backward()
    assert torch.equal(flat(net), expected[1])


def test_the_reduction_comes_before_the_comparison(device):
    """Two ranks played by one process: the second's flows are added before the signs are compared."""
    net = network(device=device)
    a, b = start(device, seed=0), start(device, seed=1)
    flows = []
    for x0 in (a, b):
        update(Rollout(SYSTEM, net, STEPS, "C", reduce=lambda sums: flows.append(sums.clone())), x0)
    together = update(Rollout(SYSTEM, net, STEPS, "C", reduce=lambda sums: sums.add_(flows[1])), a)
    assert flows[0].shape == (2, together.numel())
    assert relative(together, sums(net, [a, b])) < 1e-12


@pytest.mark.parametrize("observe", [(), ("modified", "regular")])
def test_a_flow_combined_with_itself(observe, device):
    """A rule that gets the same flow twice; observed flows must not slip in."""
    net, x0 = network(device=device), start(device)
    expected = update(Rollout(SYSTEM, net, STEPS, "S"), x0)
    rollout = Rollout(SYSTEM, net, STEPS, Combined(STOPPED, STOPPED, rule=lambda a, b: a + b))
    rollout.observe = observe
    assert relative(update(rollout, x0), 2 * expected) < 1e-12
