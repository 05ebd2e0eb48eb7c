"""Controllers that do not repeat themselves are refused; those that seem odd and do are not."""

import numpy as np
import pytest
import torch

from tests.contract.by_torch import FLOWS, STEPS, SYSTEM, a_loss, assert_same, by_engine, by_torch, leaves, start
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch import Rollout, Update, diagnose

NN = torch.nn


class Module(NN.Module):
    """A controller with two layers, in double precision, the last one zero as is usual at the start."""

    def __init__(self, zero=True):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = NN.Linear(4, 8).double(), NN.Linear(8, 1).double()
        if zero:
            NN.init.zeros_(self.b.weight)
            NN.init.zeros_(self.b.bias)
        self.memory, self.calls = None, 0

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Counter(Module):
    def __init__(self):
        super().__init__()
        self.plan = NN.Parameter(torch.zeros(STEPS, 1).double())

    def forward(self, x):
        self.calls += 1
        return self.plan[self.calls % STEPS].expand(len(x), 1)


class Hidden(Module):
    def forward(self, x):
        before = 0.0 if self.memory is None or len(self.memory) != len(x) else self.memory
        self.memory = torch.tanh(self.a(x) + before).detach()
        return self.b(self.memory)


class HiddenInABuffer(Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("h", torch.zeros(8).double())

    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            self.h.mul_(0.9).add_(h.mean(0))
        return self.b(h + self.h.clone())


class HiddenInAList(Module):
    past: list = []  # noqa: RUF012, the fault that it is

    def forward(self, x):
        self.past.append(float(x.detach().mean()))
        return self.b(torch.tanh(self.a(x) + len(self.past)))


class Late(Module):
    """Changes after some calls, not from one to the next."""

    def forward(self, x):
        self.calls += 1
        return self.b(torch.tanh(self.a(x) + (1.0 if self.calls > STEPS // 2 + 4 else 0.0)))


class Noisy(Module):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + 0.1 * torch.randn(8).double()))


class SlightlyNoisy(Module):
    """Controls of a millionth, and noise of a hundredth of that: nothing beside 1."""

    def forward(self, x):
        return 1e-6 * (torch.tanh(self.a(x)).sum(1, keepdim=True) + 0.01 * torch.randn(len(x), 1).double())


class Dropping(Module):
    def forward(self, x):
        return self.b(NN.functional.dropout(torch.tanh(self.a(x))))


class Clock(Module):
    """Reads something global."""

    now = [0.0]  # noqa: RUF012

    def forward(self, x):
        self.now[0] += 1.0
        return self.b(torch.tanh(self.a(x)) * self.now[0])


class Alternating(Module):
    """Another parameter at every second call."""

    def forward(self, x):
        self.calls += 1
        c = self.a(x)[:, :1] if self.calls % 2 else self.b(torch.tanh(self.a(x.flip(1))))
        return c - c.detach()


CHANGING = [
    Counter, Hidden, HiddenInABuffer, HiddenInAList, Late, Noisy, SlightlyNoisy, Dropping, Clock, Alternating,
]  # fmt: skip


@pytest.mark.parametrize("flow", ["R", "M"])
@pytest.mark.parametrize("kind", CHANGING)
def test_it_is_noticed_at_the_first_pass(kind, flow):
    with pytest.raises(NotRepeatable, match=r"(?s)same (controls|states).*controller\.eval\(\)"):
        a_loss(*Rollout(SYSTEM, kind(), STEPS, flow)(start())).backward()


@pytest.mark.parametrize("kind", CHANGING)
def test_it_is_noticed_in_updates(kind):
    net = kind()
    update = Update(Rollout(SYSTEM, net, STEPS, "C"), torch.optim.SGD(net.parameters(), lr=0.1), when="every")
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(NotRepeatable):
        update(start())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


class Logging(Module):
    """Counts and keeps what it has given, which changes nothing."""

    def forward(self, x):
        self.calls += 1
        self.memory = super().forward(x)
        return self.memory


class Cached(Module):
    """Keeps a result for the very same argument."""

    def forward(self, x):
        if self.memory is None or self.memory[0] is not x:
            self.memory = x, super().forward(x)
        return self.memory[1]


class Difference(Module):
    """A small difference of large numbers: rounding depends on the number of rows."""

    def __init__(self):
        super().__init__(zero=False)
        self.wide = NN.Linear(4, 1).double()

    def forward(self, x):
        big = 1e9 * self.wide(x)
        return (big + self.b(torch.tanh(self.a(x)))) - big


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("make", [Logging, Cached])
def test_what_changes_nothing_is_not_refused(make, flow):
    net = make()
    assert_same(by_engine(net, leaves(net), start(), flow), by_torch(net, leaves(net), start(), flow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_not_taken_for_a_change(dtype):
    net = Difference().to(dtype)
    for batch in (1, 7, 300):
        x0 = torch.as_tensor(SYSTEM.sample(batch), dtype=dtype)
        SYSTEM.loss(*Rollout(SYSTEM, net, STEPS, "R")(x0)).backward()


def test_a_change_between_forward_and_backward():
    """Of a goal, of a buffer, of the mode: also where the controls are zero before and after."""

    class Goal(Module):
        def __init__(self):
            super().__init__()
            self.goal = 0.0
            self.register_buffer("offset", torch.zeros(8).double())

        def forward(self, x):
            return self.b(NN.functional.dropout(torch.tanh(self.a(x) + self.goal + self.offset), training=False))

    def move(net):
        net.goal = 1.0

    def shift(net):
        net.offset += 1.0

    def replace(net):
        net.offset = net.offset + 1.0

    for change in (move, shift, replace):
        net = Goal()
        loss = a_loss(*Rollout(SYSTEM, net, STEPS, "C")(start()))
        change(net)
        with pytest.raises(NotRepeatable, match="same derivatives"):
            loss.backward()
        a_loss(*Rollout(SYSTEM, net, STEPS, "C")(start())).backward()


def test_always():
    """A change that nothing but trying can show, at a pass in which "auto" does not try."""
    offset = [0.0]

    class Closure(Module):
        def forward(self, x):
            offset[0] += offset[0]
            return self.b(torch.tanh(self.a(x) + offset[0]))

    for check, error in (("auto", None), ("always", NotRepeatable)):
        offset[0], net = 0.0, Closure()
        rollout = Rollout(SYSTEM, net, STEPS, "R", check=check)
        for _ in range(2):
            a_loss(*rollout(start())).backward()
        offset[0] = 1e-3
        if error is None:
            a_loss(*rollout(start())).backward()  # zero controls, before and after
        else:
            with pytest.raises(error):
                a_loss(*rollout(start())).backward()
    with pytest.raises(ValueError, match="check must be one of 'auto', 'always', got 'never'"):
        Rollout(SYSTEM, net, STEPS, check="never")


# --- backward passes that are not linear, rows that are coupled -----------------------------------------------------


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1e-4, 1e-4)


class ClippedByFunction(Module):
    def forward(self, x):
        return Clip.apply(self.b(torch.tanh(self.a(x))))


class ClippedByHook(Module):
    def forward(self, x):
        c = self.b(torch.tanh(self.a(x)))
        if c.requires_grad:
            c.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
        return c


class NormedInside(Module):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda g: g / (1e-3 + g.norm()))
        return self.b(h)


class OneSided(Module):
    """Lets adjoints above zero through alone, as guided backpropagation does: homogeneous, but not linear."""

    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(min=0.0))
        return self.b(torch.tanh(h))


class BackwardHook(Module):
    def __init__(self):
        super().__init__()
        self.a.register_full_backward_hook(lambda _m, grads, _out: tuple(g if g is None else g.sign() for g in grads))


class Centred(Module):
    """Statistics of the batch."""

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.tanh((h - h.mean(0)) / (h.var(0) + 1e-3).sqrt()))


class Neighbours(Module):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + self.a(x.roll(1, 0))))


class Pairs(Module):
    def forward(self, x):
        pairs = x.view(-1, 2, 4)
        return self.b(torch.tanh(self.a((pairs + 0.5 * pairs.flip(1)).view(-1, 4))))


class CentredBackward(Module):
    """Rows that are coupled in the backward pass alone."""

    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g - g.mean(0))
        return self.b(torch.tanh(h))


class Goals(Module):
    """A goal for each sample."""

    def __init__(self):
        super().__init__(zero=False)
        generator = torch.Generator().manual_seed(1)
        self.goals = torch.randn(4, 4, generator=generator).double()

    def forward(self, x):
        return super().forward(x - self.goals)


class Table(Module):
    """A trained row for each sample, by its number."""

    def __init__(self):
        super().__init__(zero=False)
        self.rows = NN.Parameter(torch.randn(64, 4).double())

    def forward(self, x):
        return super().forward(x + self.rows[: len(x)])


class Value(Module):
    """Descends along a value: autograd inside forward."""

    def forward(self, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = self.b(torch.tanh(self.a(x))).sum()
        return -torch.autograd.grad(value, x, create_graph=True)[0][:, 1:2]


class StrictValue(Module):
    def forward(self, x):
        return -torch.autograd.grad(self.b(torch.tanh(self.a(x))).sum(), x, create_graph=True)[0][:, 1:2]


WHOLE = [
    ClippedByFunction, ClippedByHook, NormedInside, OneSided, BackwardHook, Centred, Neighbours, Pairs, CentredBackward,
    Goals, Table,
]  # fmt: skip


def _unzeroed(kind):
    net = kind()
    with torch.no_grad():
        torch.manual_seed(1)
        for p in (net.b.weight, net.b.bias):
            p.copy_(torch.randn(p.shape))
    return net


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", [*WHOLE, Value, StrictValue])
def test_it_is_differentiated_as_torch_does(kind, flow):
    net = _unzeroed(kind)
    like = _unzeroed(Value if kind is StrictValue else kind)  # where flows cut, torch has no graph for the strict one
    expected = by_torch(like, leaves(like), start(), flow)
    rollout = Rollout(SYSTEM, net, STEPS, flow)
    for _ in range(3):  # the first pass, one more that tries, one that does not
        net.zero_grad()
        a_loss(*rollout(start())).backward()
        got = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves(net)]
        assert_same(got, expected)
    assert rollout._adapter.examination.whole == (kind in WHOLE)


@pytest.mark.parametrize("kind", [Goals, StrictValue, ClippedByHook])
def test_evaluation_without_gradients(kind):
    net = _unzeroed(kind)
    rollout = Rollout(SYSTEM, net, STEPS)
    expected = rollout(start())[0].detach()
    for context in (torch.no_grad, torch.inference_mode):
        fresh = Rollout(SYSTEM, net, STEPS)
        with context():
            assert torch.equal(fresh(start())[0], expected)


def test_hooks_see_true_adjoints():
    """What a hook writes down is what it writes down in torch, in the order of the steps."""
    seen = []

    class Watched(Module):
        def forward(self, x):
            c = self.b(torch.tanh(self.a(x)))
            if c.requires_grad:
                c.register_hook(lambda g: seen.append(g.clone()))
            return c

    net = _unzeroed(Watched)
    by_torch(net, leaves(net), start(), "R")
    expected = list(seen)
    rollout = Rollout(SYSTEM, net, STEPS, "R")
    loss = a_loss(*rollout(start()))
    seen.clear()
    loss.backward()
    assert_same(seen, expected)


class Straight(Module):
    """A straight-through estimator: not the derivative, but linear."""

    def forward(self, x):
        c = super().forward(x)
        return c + (c.round() - c).detach()


@pytest.mark.parametrize("kind", [Module, Straight, Logging])
def test_what_needs_no_whole_steps_takes_none(kind):
    net = _unzeroed(kind)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    a_loss(*rollout(start())).backward()
    assert not rollout._adapter.examination.whole


def test_a_diagnosis_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="for a diagnosis the rows of a controller must be differentiable apart"):
        diagnose(Rollout(SYSTEM, Centred(), STEPS), SYSTEM.sample(4, dtype=np.float64))


# --- layers without parameters yet ----------------------------------------------------------------------------------


def test_lazy_layers():
    net = NN.Sequential(NN.LazyLinear(8), NN.Tanh(), NN.LazyLinear(1))
    with pytest.raises(ValueError, match=r"controller has lazy layers, .* \(0\.weight, 0\.bias, .*\): call it once"):
        Rollout(SYSTEM, net, 5)
    net(torch.zeros(2, 4))
    Rollout(SYSTEM, net, 5)
