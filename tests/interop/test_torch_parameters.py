"""Parameters of a controller that are more than numbers to train: with hooks, or not used."""

import pytest
import torch

from tests.interop.test_torch import STEPS, SYSTEM, flat, network, start, update
from warp_phys import Combined
from warp_phys.interop.torch import Rollout, Update
from warp_phys.interop.torch.graph import key_of

each_backend = pytest.mark.parametrize("backend", ["fused", "general"])


class Policy(torch.nn.Module):
    """A network beside a parameter that its controls do not depend on."""

    def __init__(self, net):
        super().__init__()
        self.net, self.log_std = net, torch.nn.Parameter(torch.ones_like(net[0].bias))

    def forward(self, x):
        return self.net(x)


def with_a_parameter_of_its_own(net):
    net.log_std = torch.nn.Parameter(torch.ones_like(net[0].bias))
    return net


def with_a_parameter_in_a_layer(net):
    net[0].log_std = torch.nn.Parameter(torch.ones_like(net[0].bias))
    return net


@each_backend
@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize("sums_first", [False, True])
def test_a_mask_of_gradients(flow, sums_first, backend, device):
    """A hook on a parameter, wherever a pass could do without autograd, and though it comes late."""
    net, x0 = network(device=device), start(device)
    whole = update(Rollout(SYSTEM, net, STEPS, flow), x0)
    rollout = Rollout(SYSTEM, net, STEPS, flow, backend=backend)
    if sums_first:
        update(rollout, x0)
    rollout.value_and_grad(x0)
    calls = []
    net[0].weight.register_hook(lambda gradient: calls.append(1) or 0.0 * gradient)
    masked = net[0].weight.numel()
    assert whole[:masked].any()
    for run in (lambda: update(rollout, x0), lambda: rollout.value_and_grad(x0)):
        calls.clear()
        run()
        assert not flat(net)[:masked].any() and len(calls) == 1
        torch.testing.assert_close(flat(net)[masked:], whole[masked:])
    before = [p.detach().clone() for p in net.parameters()]
    step = Update(rollout, torch.optim.Adam(net.parameters(), lr=0.1))
    step(x0)
    assert not step.is_recorded and key_of(rollout, len(x0)) is None
    moved = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]


@each_backend
def test_a_hook_after_the_gradient(backend, device):
    """An optimiser's step within the backward pass, say."""
    net, x0 = network(device=device), start(device)
    rollout, seen = Rollout(SYSTEM, net, STEPS, "C", backend=backend), []
    handle = net[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    rollout.value_and_grad(x0)
    assert len(seen) == 1 and torch.equal(seen[0], net[2].weight.grad)
    handle.remove()
    rollout.value_and_grad(x0)
    assert len(seen) == 1


@each_backend
def test_a_flow_with_a_memory_refuses_hooks(backend, device):
    net, x0 = network(device=device), start(device)
    net[2].bias.register_hook(torch.zeros_like)
    rollout = Rollout(SYSTEM, net, STEPS, Combined(memory=0.9), backend=backend)
    step = Update(rollout, torch.optim.Adam(net.parameters()))
    before = flat_weights(net)
    with pytest.raises(ValueError, match=r"parameters must have no hooks for the flow 'averaged', .* 2\.bias have"):
        step(x0)
    assert torch.equal(flat_weights(net), before)


@pytest.mark.parametrize("backend", ["auto", "general"])
@pytest.mark.parametrize("make", [Policy, with_a_parameter_of_its_own, with_a_parameter_in_a_layer])
@pytest.mark.parametrize("flow", ["R", "C", Combined(memory=0.9)])
def test_a_parameter_that_is_not_used(make, flow, backend, device):
    """It has no gradient, as in torch, so that no weight decay moves it; the others move as without it."""
    x0, nets = start(device), [network(device=device), make(network(device=device))]
    steps = []
    for net in nets:
        optimiser = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.5)
        steps.append(Update(Rollout(SYSTEM, net, STEPS, flow, backend=backend), optimiser))
        for _ in range(3):
            steps[-1](x0)
    plain, other = nets
    (unused,) = (p for name, p in other.named_parameters() if name.endswith("log_std"))
    assert unused.grad is None and (unused == 1.0).all()
    used = [p for p in other.parameters() if p is not unused]
    for p, q in zip(plain.parameters(), used, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)
    if isinstance(flow, str):
        SYSTEM.loss(*steps[-1].rollout(x0)).backward()
        assert unused.grad is None and used[0].grad.any()


def test_a_parameter_that_is_not_used_in_compiled_code(device):
    """An operator has a tensor for each: zeros."""
    policy, x0 = Policy(network(device=device)), start(device)
    rollout = Rollout(SYSTEM, policy, STEPS, "C")
    torch.compile(lambda x: SYSTEM.loss(*rollout(x)), backend="aot_eager")(x0).backward()
    assert not policy.log_std.grad.any()
    torch.testing.assert_close(flat(policy.net), update(Rollout(SYSTEM, policy.net, STEPS, "C"), x0))


def flat_weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])
