"""Random controllers: their update is torch's, or they are refused for a documented reason; nothing else happens."""

import os
import re

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.utils.parametrizations import weight_norm

from tests.contract.by_torch import by_engine, by_torch, start
from warp_phys.errors import NotRepeatable

EXAMPLES = int(os.environ.get("WARP_PHYS_EXAMPLES", "2000"))
STEPS, BATCH = 5, 3

REFUSALS = (
    r"controller must give the same controls for the same states each time",
    r"controller depends on another tensor (at each call|now than in the forward pass)",
    r"controller must not normalise over the batch in training",
    r"controller must not change its input in place",
    r"controller must be differentiable: what it returns has no graph back to its parameters",
)
"""What the engine may say instead of an update; docs/contract.md explains each."""

NN = torch.nn


class ClampGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.limit, ctx.limit), None


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def put_hook(h, function):
    if h.requires_grad:
        h.register_hook(function)
    return h


def squash(_module, grads, _outputs):
    return tuple(None if grad is None else torch.tanh(grad) for grad in grads)


class Block(NN.Module):
    """One word of the grammar, on rows of four numbers; `words` maps its name to what it does."""

    def __init__(self, word, number, built):
        super().__init__()
        self.word, self.number, self.calls, self.made, self.hook = word, number, 0, None, None
        self.is_first = not built
        self.act = (torch.tanh, torch.sin, NN.functional.softplus, NN.functional.silu)[number % 4]
        if word in ("linear", "hooked", "frozen", "shared", "nested", "memo", "module_hook", "normed", "value"):
            self.layer = NN.Linear(4, 4).double()
        if word == "hooked":
            hooks = (lambda g: 0.1 * g, lambda g: g.clamp(-1e-3, 1e-3), lambda g: None, lambda g: g * g)
            self.hook = hooks[number % 4]
        if word == "frozen":
            self.layer.requires_grad_(False)
        earlier = [block.layer for block in built if block.word in ("linear", "shared", "nested")]
        if word == "shared" and earlier:
            self.layer = earlier[number % len(earlier)]
        if word == "module_hook":
            self.layer.register_full_backward_hook(
                lambda _m, grads, _o: tuple(g if g is None else g.tanh() for g in grads)
            )
        if word == "normed":
            self.layer = weight_norm(self.layer)
        if word == "batch_norm":
            self.norm = NN.BatchNorm1d(4, track_running_stats=bool(number % 2)).double()
        self.register_buffer("shift", torch.randn(4).double())
        if word == "loose":
            self.loose = [torch.randn(4).double().requires_grad_()]
        if word == "history":
            self.source = torch.randn(4).double().requires_grad_()
            self.z = torch.tanh(self.source)

    def leaves(self):
        return self.loose if self.word == "loose" else [self.source] if self.word == "history" else []

    def forward(self, h):
        number = self.number
        match self.word:
            case "linear" | "hooked" | "frozen" | "shared" | "module_hook" | "normed":
                return self.act(self.layer(h))
            case "nested":
                return h + 0.5 * self.act(self.layer(self.act(self.layer(h))))
            case "memo":
                if self.made is None:
                    self.made = torch.tanh(self.layer.weight)
                return h @ self.made
            case "activation":
                return self.act(h)
            case "buffer":
                return h * self.shift
            case "loose":
                return h + self.loose[0]
            case "history":
                return h * self.z
            case "clamped":
                return ClampGradient.apply(h, 10.0 ** -(number % 8))
            case "scaled":
                return ScaleGradient.apply(h, (-1.0, 0.5, 0.0, 2.0)[number % 4])
            case "tensor_hook":
                functions = (lambda g: g.clamp(-1e-4, 1e-4), lambda g: 0.3 * g, lambda g: g - g.mean(0), lambda g: None)
                return put_hook(1.0 * h, functions[number % 4])
            case "value":
                # without a hook of h's: whether there is one depends on what flows cut
                inner = 1.0 * h if h.requires_grad else h.detach().requires_grad_()
                return torch.autograd.grad(torch.tanh(self.layer(inner)).sum(), inner, create_graph=True)[0]
            case "detached":
                return h + (torch.round(h) - h).detach() if number % 2 else torch.cat([h[:, :2], h[:, 2:].detach()], 1)
            case "in_place":
                h = 1.0 * h
                h[:, 0] *= 2.0
                return h.mul_(0.5)
            case "input_in_place":
                return h.mul_(0.5) if self.is_first else (1.0 * h).mul_(0.5)  # autograd forbids it elsewhere
            case "coupled":
                return h - h.mean(0) if number % 2 else h + 0.1 * h.flip(0)
            case "batch_norm":
                return self.norm(h)
            case "counter":
                self.calls += 1
                return h + (0.1 * self.shift if number % 3 and self.calls % 5 == number % 5 else 0.0)
            case "running":
                with torch.no_grad():
                    self.shift.mul_(0.9).add_(h.detach().mean(0))
                return h + self.shift.clone() if number % 2 else h
            case "noise":
                return h + 10.0 ** -(number % 12) * torch.randn(4).double()
            case "dropout":
                return NN.functional.dropout(h, 0.5, training=bool(number % 3))
            case "remembered":
                self.made = h if number % 2 else None
                return h
        raise AssertionError(self.word)


WORDS = (
    "linear hooked frozen shared module_hook normed nested memo activation buffer loose history clamped scaled "
    "tensor_hook value detached in_place input_in_place coupled batch_norm counter running noise dropout remembered"
).split()
PLAIN = ["linear", "hooked", "shared", "nested", "activation", "buffer", "frozen", "normed"]


class Controller(NN.Module):
    def __init__(self, words, seed, zero_head):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = NN.ModuleList()
        for word, number in words:
            self.blocks.append(Block(word, number, self.blocks))
        self.head = NN.Linear(4, 1).double()
        if zero_head:
            NN.init.zeros_(self.head.weight)
            NN.init.zeros_(self.head.bias)
        loose = [leaf for block in self.blocks for leaf in block.leaves()]
        self.sources = [*(p for p in self.parameters() if p.requires_grad), *loose]
        self.hooks = {id(p): block.hook for block in self.blocks if block.hook for p in block.layer.parameters()}

    def with_hooks(self):
        for p in self.sources:
            if id(p) in self.hooks:
                p.register_hook(self.hooks[id(p)])
        return self

    def forward(self, x):
        h = x
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def expected_update(spec, seed, zero_head, flow):
    """Return torch's update of a flow, and where it is known: rounding decides whether tiny components agree in sign.

    A controller is made anew for each pass: it may have a state, or a graph that serves once.
    """
    x0 = start(BATCH, seed)
    if flow != "C":
        net = Controller(spec, seed, zero_head).with_hooks()
        found = by_torch(net, net.sources, x0, flow, STEPS)
        return found, [torch.ones_like(f, dtype=torch.bool) for f in found]
    nets = [Controller(spec, seed, zero_head) for _ in range(2)]
    parts = [by_torch(net, net.sources, x0, part, STEPS) for net, part in zip(nets, "MR", strict=True)]
    size = max(float(p.abs().max()) for part in parts for p in part)
    update, known = [], []
    for source, base, other in zip(nets[0].sources, *parts, strict=True):
        combined = torch.where(base.sign() == other.sign(), base, 0.0)
        hook = nets[0].hooks.get(id(source))
        hooked = None if hook is None else hook(combined)
        update.append(combined if hooked is None else hooked)
        known.append((base.abs() > 1e-9 * size) & (other.abs() > 1e-9 * size))
    return update, known


WORD = st.tuples(st.one_of(st.sampled_from(PLAIN), st.sampled_from(WORDS)), st.integers(0, 11))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(WORD, min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.sampled_from("RMSNC"))
def test_torchs_update_or_a_refusal(spec, seed, zero_head, flow):
    torch.set_num_threads(1)  # for four numbers a row others would only be in the way
    net = Controller(spec, seed, zero_head).with_hooks()
    try:
        got = by_engine(net, net.sources, start(BATCH, seed), flow, STEPS)
    except (NotRepeatable, ValueError) as error:
        assert any(re.search(refusal, str(error)) for refusal in REFUSALS), error
        return
    expected, known = expected_update(spec, seed, zero_head, flow)
    size = max(float(e.abs().max()) for e in expected)
    for a, b, mask in zip(got, expected, known, strict=True):
        assert float(torch.where(mask, a - b, 0.0).abs().max()) <= 1e-9 * size + 1e-18, (a, b)
