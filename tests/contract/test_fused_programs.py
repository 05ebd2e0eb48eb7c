"""Row programs keep the promise too: what changes on the way is noticed, and passes in any order add up."""

import numpy as np
import pytest
import torch

from tests.contract.by_torch import STEPS, SYSTEM, a_loss, assert_same, by_torch, leaves, start
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch import Rollout, Update
from warp_phys.interop.torch import rollout as rollouts

outside = {"gain": 1.0}


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(5, 8).double(), torch.nn.Linear(8, 1).double()
        self.goal = 0.5
        self.register_buffer("scale", torch.ones(8).double())

    def forward(self, x):
        h = torch.cat([x[:, :2], x[:, 2:3].sin(), x[:, 2:3].cos(), x[:, 3:] - self.goal], 1)
        return outside["gain"] * self.b(torch.tanh(self.a(h)) * self.scale)


def fused(net, flow="C", **settings):
    rollout = Rollout(SYSTEM, net, STEPS, flow, backend="fused", **settings)
    assert rollout.backend == "fused" and rollout.why_general is None
    return rollout


@pytest.mark.parametrize("flow", ["R", "M", "S", "C"])
def test_changes_between_calls(flow):
    """Attributes, globals, buffers and weights: the numbers are those of the module as it is."""
    net = Policy()
    rollout = fused(net, flow)

    def goal():
        net.goal = -1.0

    def gain():
        outside["gain"] = 2.0

    def buffer():
        net.scale.mul_(0.5)

    def weights():
        net.a.weight.data.mul_(0.9)

    try:
        for change in (lambda: None, goal, gain, buffer, weights):
            change()
            net.zero_grad()
            a_loss(*rollout(start())).backward()
            got = [p.grad for p in leaves(net)]
            assert rollout.backend == "fused"
            assert_same([g.clone() for g in got], by_torch(net, leaves(net), start(), flow))
    finally:
        outside["gain"] = 1.0


def test_changes_between_forward_and_backward():
    net = Policy()
    loss = a_loss(*fused(net)(start()))
    net.goal = 1.0
    with pytest.raises(RuntimeError, match="the controller has changed since the forward pass"):
        loss.backward()


def test_numbers_are_those_of_the_module_under_autocast():
    """A rollout computes in its own precision, and so does what looks at the module meanwhile."""
    net = Policy().float()
    rollout, x0 = fused(net, check="always"), start().float()
    a_loss(*rollout(x0)).backward()
    plain = [p.grad.clone() for p in leaves(net)]
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        states, controls = rollout(x0)
    a_loss(states, controls).backward()
    assert_same([p.grad for p in leaves(net)], plain, 1e-6)


def test_each_state_of_a_module_has_its_own_reason():
    net = Policy()
    rollout = Rollout(SYSTEM, net, STEPS)
    for _ in range(5):
        a_loss(*rollout(start())).backward()
    for _ in range(2):
        assert rollout.backend == "fused" and rollout.why_general is None
        handle = net.a.register_forward_hook(lambda part, inputs, output: 2 * output)
        rollout(start())
        assert rollout.backend == "general" and "hooks" in rollout.why_general
        handle.remove()
        rollout(start())


def test_passes_in_any_order_add_up():
    net, halves = Policy(), (start(4, 1), start(4, 2))
    rollout = fused(net)
    losses = [a_loss(*rollout(half)) for half in halves]
    for loss in reversed(losses):
        loss.backward()
    got = [p.grad.clone() for p in leaves(net)]
    net.zero_grad()
    (2.0 * a_loss(*rollout(torch.cat(halves)))).backward()
    assert_same(got, [p.grad for p in leaves(net)], 1e-9)


def test_what_cannot_be_seen_is_tried_out(monkeypatch):
    class Hidden(Policy):
        def forward(self, x):
            import os

            return super().forward(x) * float(os.environ.get("A_GAIN", "1"))

    rollout = fused(Hidden(), check="always")
    a_loss(*rollout(start())).backward()
    monkeypatch.setenv("A_GAIN", "2")
    with pytest.raises(NotRepeatable, match="other controls now than the pass that ran what was read of it"):
        rollout(start())
    with pytest.raises(NotRepeatable, match="other controls now"):
        rollout.value_and_grad(start())


@pytest.mark.parametrize("recorded", [True, False])
def test_programs_are_tried_out_where_nothing_else_calls_the_module(recorded, monkeypatch):
    """At the first, second, fourth … pass of each size of a batch, before any weight has moved."""

    class Hidden(Policy):
        def forward(self, x):
            return super().forward(x) * float(factors[0])

    net, factors = Hidden(), np.ones(20_000)  # of which the entries are not looked at
    rollout = fused(net)
    update = Update(rollout, torch.optim.Adam(net.parameters(), 1e-3))
    run = update if recorded else rollout.value_and_grad
    looked_at, own = [], rollouts.check_repeated_controls
    monkeypatch.setattr(rollouts, "check_repeated_controls", lambda *given: (looked_at.append(n), own(*given)))
    for n in range(1, 9):  # noqa: B007, what is looked at is written by the function above
        run(start(4))
    assert looked_at == [1, 2, 4, 8] and update.is_recorded == recorded
    before = [p.detach().clone() for p in net.parameters()]
    factors[0] = 2.0
    with pytest.raises(NotRepeatable, match="other controls now"):
        run(start(5))
    assert all(map(torch.equal, before, net.parameters()))


def test_it_becomes_fused_with_use():
    net = Policy()
    rollout, updates = Rollout(SYSTEM, net, STEPS, "C"), []
    for _ in range(5):
        net.zero_grad()
        a_loss(*rollout(start())).backward()
        updates.append([p.grad.clone() for p in leaves(net)])
    assert rollout.backend == "fused"
    for update in updates[1:]:
        assert_same(update, updates[0])
