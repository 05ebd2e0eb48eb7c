"""Every operation of row programs against torch: values, adjoints of the states, gradients of the parameters."""

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from tests.programs.running import relative, run_program
from warp_phys.interop.torch.program import read_program
from warp_phys.programs.operations import OPERATIONS

SIZE = 19
"""Numbers of a state: more than a padded vector, and no multiple of one."""

KINKS = (-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
WORSE = {"hardsigmoid": 5e-8}
"""Of what torch itself computes with a sixth in float32."""

# Of the states x, and of positive numbers u, parameters p and q (positive) of the same size; where the states are at
# kinks, so is p, in another order and in the same one.
ZOO = {
    "add": lambda x, u, p, q: x + p,
    "add a multiple": lambda x, u, p, q: torch.add(x, p, alpha=3),
    "add a number": lambda x, u, p, q: 2 + x,
    "subtract": lambda x, u, p, q: x - p,
    "subtract a number": lambda x, u, p, q: x - 0.3,
    "subtract from a number": lambda x, u, p, q: 1 - x,
    "subtract a multiple": lambda x, u, p, q: torch.sub(x, p, alpha=0.5),
    "multiply": lambda x, u, p, q: x * p,
    "divide": lambda x, u, p, q: x / q,
    "divide by a number": lambda x, u, p, q: x / 3,
    "divide a number": lambda x, u, p, q: 3 / u,
    "negate": lambda x, u, p, q: -x * p,
    "square": lambda x, u, p, q: x**2 + p.square(),
    "cube": lambda x, u, p, q: x**3,
    "power": lambda x, u, p, q: (u * q) ** 1.7,
    "root": lambda x, u, p, q: (u * q).sqrt() + u**0.5,
    "reciprocal root": lambda x, u, p, q: (u * q).rsqrt() + u**-0.5,
    "reciprocal": lambda x, u, p, q: (u + q).reciprocal() + u**-1,
    "sine": lambda x, u, p, q: (x * p).sin(),
    "cosine": lambda x, u, p, q: (x * p).cos(),
    "tangent": lambda x, u, p, q: (0.2 * x).tan(),
    "arctangent": lambda x, u, p, q: (x * p).atan(),
    "exponential": lambda x, u, p, q: (x + p).exp(),
    "logarithm": lambda x, u, p, q: (u * q).log(),
    "error function": lambda x, u, p, q: (x + p).erf(),
    "tanh": lambda x, u, p, q: (x + p).tanh(),
    "sigmoid": lambda x, u, p, q: (x + p).sigmoid(),
    "relu": lambda x, u, p, q: x.relu() + (x - p).relu(),
    "silu": lambda x, u, p, q: F.silu(x + p),
    "elu": lambda x, u, p, q: F.elu(x) + F.elu(x * p, 0.7),
    "leaky relu": lambda x, u, p, q: F.leaky_relu(x, 0.1) + F.leaky_relu(x - p),
    "softplus": lambda x, u, p, q: F.softplus(x + p) + F.softplus(x, 2.0, 3.0),
    "absolute": lambda x, u, p, q: x.abs() + (x - p).abs(),
    "sign": lambda x, u, p, q: x.sign() * p,
    "clamp": lambda x, u, p, q: x.clamp(-0.5, 1.0) * p,
    "clamp from below": lambda x, u, p, q: x.clamp(min=0.5) * p,
    "clamp from above": lambda x, u, p, q: x.clamp(max=0.5) * p,
    "clamp, crossed": lambda x, u, p, q: x.clamp(1.0, 0.5) + p,
    "clamp by tensors": lambda x, u, p, q: x.clamp(p, p + 1),
    "clamp from below by a tensor": lambda x, u, p, q: x.clamp(min=p),
    "clamp from above by a tensor": lambda x, u, p, q: x.clamp(max=p),
    "hardtanh": lambda x, u, p, q: F.hardtanh(x, -0.5, 1.0) * p,
    "maximum": lambda x, u, p, q: torch.maximum(x, p),
    "minimum": lambda x, u, p, q: torch.minimum(x, p),
    "stop": lambda x, u, p, q: x * (p * x).detach(),
    "greater": lambda x, u, p, q: torch.where(x > p, 2 * x, p) + torch.where(x > 0.5, x, 0.0),
    "less": lambda x, u, p, q: torch.where(x < p, 2 * x, p) + torch.where(x < 0.5, 1.0, x),
    "greater or equal": lambda x, u, p, q: torch.where(x >= p, 2 * x, p),
    "less or equal": lambda x, u, p, q: torch.where(x <= p, 2 * x, p),
    "equal": lambda x, u, p, q: torch.where(x == p, 2 * x, p),
    "gelu": lambda x, u, p, q: F.gelu(x + p),
    "gelu by tanh": lambda x, u, p, q: F.gelu(0.5 * (x + p), approximate="tanh"),
    "mish": lambda x, u, p, q: F.mish(x + p),
    "softsign": lambda x, u, p, q: F.softsign(x + p),
    "hyperbolic": lambda x, u, p, q: (0.5 * x).sinh() + (0.5 * x * p).cosh(),
    "exponentials": lambda x, u, p, q: (x * 0.1).expm1() + (u * q).log1p(),
    "angle": lambda x, u, p, q: torch.atan2(x + 0.3, q) + torch.atan2(q, x + 0.3),
    "angle, all round": lambda x, u, p, q: torch.atan2(x - 0.07, x.flip(1) * p - 0.21),
    "normalised": lambda x, u, p, q: F.layer_norm(x * p, (SIZE,), q, p, 1e-3),
    "normalised by its size": lambda x, u, p, q: F.rms_norm(x * p, (SIZE,), q, 1e-3) + F.rms_norm(x, (SIZE,)),
    "softmax": lambda x, u, p, q: (x * p).softmax(1) + (x + 1000).softmax(1),
    "mean": lambda x, u, p, q: (x * p).mean(1, keepdim=True) + x[:, :18].unflatten(1, (2, 9)).mean(1).sum(1)[:, None],
    "sum": lambda x, u, p, q: (x * p)[:, :18].unflatten(1, (3, 6)).sum(1) - x[:, :18].unflatten(1, (6, 3)).sum(dim=2),
    "product of rows": lambda x, u, p, q: ((x * p)[:, :12].view(-1, 3, 4) @ x[:, 4:16].reshape(-1, 4, 3)).flatten(1),
    "hardsigmoid": lambda x, u, p, q: F.hardsigmoid(x) * p,
    "hardswish": lambda x, u, p, q: F.hardswish(x) * p + F.hardswish(x * q),
    "to the power of": lambda x, u, p, q: (u * q) ** (0.3 * x.sin() * p) + u**q + (x * p) ** 0 + torch.exp2(0.3 * x),
    "to the power of, from zero": lambda x, u, p, q: x.relu() ** torch.where(p > 0, 1 + p, 0 * p),
    "areas": lambda x, u, p, q: (x * p).asinh() + (1.1 + u * q).acosh() + (0.4 * x.sin() * q).atanh(),
    "remainder": lambda x, u, p, q: (x + 10 * p) % 3.1 + (3 * x * p) % (q - 1.7) + torch.fmod(3 * x * p, q),
    "rounded": lambda x, u, p, q: x.floor() * p + (3 * x).ceil() * p + (3 * x).round() * x + (3 * x).trunc() * p,
    "both": lambda x, u, p, q: torch.where((x > p) & (x < 1.0), 2 * x, p),
    "either": lambda x, u, p, q: torch.where((x > 1.0) | torch.logical_not(x > p), 2 * x, p),
    "lengths": lambda x, u, p, q: (x * p).norm(dim=1, keepdim=True) + (x.relu() * 0).norm(dim=1, keepdim=True) * q,
    "arcsine": lambda x, u, p, q: (0.3 * x.sin() * q).asin() + (0.3 * x.sin() * q).acos() * p,
}  # fmt: skip

COMPOSED = {
    "elu, scaled": lambda x, u, p, q: F.selu(x) + F.celu(x * p, 1.5) + F.celu(x),
    "one sided": lambda x, u, p, q: F.relu6(x + p) + F.threshold(x, 0.5, 0.2) * p + F.prelu(x, q[:1]),
    "shrunk": lambda x, u, p, q: F.softshrink(x, 0.5) * p + F.hardshrink(x, 0.5) + F.tanhshrink(x * p),
    "log sigmoid": lambda x, u, p, q: F.logsigmoid(x + p) + F.softmin(x * p, 1),
    "gated": lambda x, u, p, q: F.glu(torch.cat([x * p, x + q], 1), 1),
    "log of softmax": lambda x, u, p, q: (x * p).log_softmax(1) + (x + 1000).log_softmax(1),
    "log of a sum of exponentials": lambda x, u, p, q: (
        (x * p).logsumexp(1, True) + (x + p).logsumexp(1)[:, None] + 0 * x
    ),
    "a number to the power of": lambda x, u, p, q: 1.5 ** (x + p) + p**2.0,
    "other logarithms": lambda x, u, p, q: (u * q).log2() + (u + q).log10(),
    "an angle between -π and π": lambda x, u, p, q: (9 * x * p + torch.pi) % (2 * torch.pi) - torch.pi,
    "a rounded quotient": lambda x, u, p, q: (
        torch.div(3 * x, q, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc") * p
    ),
    "one alone": lambda x, u, p, q: torch.where(torch.logical_xor(x > 0.5, x > p) ^ (x != 1.0), 2 * x, p),
    "true numbers": lambda x, u, p, q: (x > p).to(x.dtype) * p + x.bool().to(x.dtype) * x,
    "any and all": lambda x, u, p, q: torch.where((x > p + 1.5).any(1, True) & (x < 9.0).all(1, True), x, 2 * x * p),
    "masked": lambda x, u, p, q: (x * p).masked_fill(x > 0.5, 0.3).masked_fill(torch.arange(SIZE) < 4, 2.0),
    "the largest, evenly": lambda x, u, p, q: x.clamp(-0.5, 0.5).amax(1, True) * p + (x * p).amax(1, keepdim=True),
    "the smallest, evenly": lambda x, u, p, q: x.clamp(-0.5, 0.5).amin(1, True) * p + (x * p).amin(1, keepdim=True),
    "the first largest": lambda x, u, p, q: (
        (x.clamp(-0.5, 0.5) * q[0]).max(1, True)[0] + (x * p).max(1)[0][:, None] + p
    ),
    "the first smallest": lambda x, u, p, q: (x.clamp(-0.5, 0.5) * q[0]).min(1, True)[0] + (x * p).min(1)[0][:, None],
    "product of all": lambda x, u, p, q: (0.8 + 0.1 * x * p).prod(1, True) + q,
    "variance": lambda x, u, p, q: (
        (x * p).var(1, keepdim=True) + x[:, :18].unflatten(1, (2, 9)).var(2, correction=0).sum(1, keepdim=True)
    ),
    "deviation": lambda x, u, p, q: (x * p).std(1, keepdim=True) + (0 * x + 1).std(1, keepdim=True) * q,
    "other norms": lambda x, u, p, q: (x * p).norm(1, 1, True) + x.clamp(-0.5, 0.5).norm(float("inf"), 1, True) * p,
    "unit vectors": lambda x, u, p, q: F.normalize(x * p, dim=1) + F.normalize(0 * x * q, dim=1),
    "cumulated": lambda x, u, p, q: (x * p).cumsum(1) + x.cumsum(1) * q,
    "between": lambda x, u, p, q: torch.lerp(x, p, 0.3) + torch.lerp(p, x, q) + torch.addcmul(x, p, x, value=0.5),
    "a quotient on top": lambda x, u, p, q: torch.addcdiv(p, x, q, value=0.3),
    "constants in between": lambda x, u, p, q: torch.cat([torch.ones_like(x[:, :2]), x * p, x.new_zeros(len(x), 3)], 1),
    "parameters in between": lambda x, u, p, q: torch.cat([p[:3].expand(len(x), 3), x, (q * p).expand(len(x), -1)], 1),
    "by place": lambda x, u, p, q: x[:, [0, 3, 3]] * p[[1, 2, 5]] + x.index_select(1, torch.tensor([4, 2, 0])),
    "by a mask": lambda x, u, p, q: (
        (x * p)[:, [k % 3 == 1 for k in range(SIZE)]] + x.gather(1, torch.ones(len(x), 6).long())
    ),
    "embedded": lambda x, u, p, q: F.embedding(torch.tensor([2, 0]), p[:18].view(3, 6)).flatten() * x[:, :12],
    "written to": lambda x, u, p, q: _written(x, p),
    "padded": lambda x, u, p, q: (
        F.pad(x * p, (2, 1), value=0.5)[:, :SIZE] + F.pad((x * p)[:, None], (1, 3), "circular")[:, 0, :SIZE]
    ),
    "padded by what is there": lambda x, u, p, q: (
        F.pad((x * p)[:, None], (1, 3), "reflect")[:, 0] + F.pad(x[:, None], (2, 2), "replicate")[:, 0]
    ),
    "moved": lambda x, u, p, q: (
        (x * p).roll(3, 1).flip(1).repeat(1, 2)[:, 5:] + torch.stack([x, p.expand_as(x)], 2).flatten(1)[:, 5:]
    ),
    "normalised in groups": lambda x, u, p, q: (
        F.group_norm((x * p)[:, :18].view(-1, 6, 3), 2, q[:6], p[:6], 1e-3).flatten(1)
    ),
    "normalised as seen": lambda x, u, p, q: F.batch_norm(x, p.detach(), q.detach(), q, p, False, 0.1, 1e-3),
    "sums of products": lambda x, u, p, q: (
        torch.einsum("bij,bkj->bik", (x * p)[:, :12].view(-1, 4, 3), x[:, :6].view(-1, 2, 3)).flatten(1)
    ),
    "products with parameters": lambda x, u, p, q: (
        torch.einsum("bi,ij->bj", x[:, :6], (p * q)[:12].view(6, 2)) + F.linear(x[:, :3], q[:6].view(2, 3), p[:2].exp())
    ),
    "products of each": lambda x, u, p, q: (
        torch.baddbmm(
            x[:, :4].view(-1, 2, 2), x[:, :6].view(-1, 2, 3), (x * p)[:, :6].view(-1, 3, 2), beta=0.5, alpha=2
        ).flatten(1)
    ),
    "products of vectors": lambda x, u, p, q: (x * p) @ q[:, None] + (x @ (p * q))[:, None] + p.dot(q),
    "attention": lambda x, u, p, q: _attention(x, p),
    "convolved": lambda x, u, p, q: F.conv1d((x * p)[:, None], q[:6].view(2, 1, 3), p[:2], 2, 1).flatten(1),
    "convolved in groups": lambda x, u, p, q: (
        F.conv1d(x[:, :18].view(-1, 2, 9), p[:12].view(4, 1, 3), None, 1, 2, 2, 2).flatten(1)
    ),
    "convolved over a plane": lambda x, u, p, q: (
        F.conv2d(x[:, :16].view(-1, 1, 4, 4), p[:18].view(2, 1, 3, 3), q[:2], padding=(1, 0)).flatten(1)
    ),
    "pooled": lambda x, u, p, q: (
        F.max_pool1d(x.clamp(-0.5, 0.5)[:, None], 3, 2, 1)[:, 0] * p[:10]
        + F.avg_pool1d((x * p)[:, None], 3, 2, 1)[:, 0]
    ),
}  # fmt: skip
"""What is made of these, in float64 alone: code takes time to compile."""

SHAPED = ["cumulated", "attention", "products with parameters", "products of each", "convolved", "convolved in groups",
          "convolved over a plane", "pooled"]  # fmt: skip
"""Those of them that have layers on windows, and products and sums of other shapes."""


def _written(x, p):
    y = x * p
    y[:, 0] = 1.0
    y[:, 1:4] += x[:, 2:5]
    y[:, [5, 7]] = p[:2] * x[:, :2]
    z = torch.zeros_like(y)
    z[:, ::2] = y[:, ::2]
    z[:, 1].copy_(y[:, 0] * 2)
    z.clamp_(max=0.5).mul_(y)
    return z


def _attention(x, p):
    q, k, v = ((x * p)[:, i : i + 12].view(-1, 3, 4) for i in (0, 3, 7))
    full, mask = F.scaled_dot_product_attention, torch.tensor([[0.0, -1.0, 0.3]] * 3, dtype=x.dtype)
    y = full(q, k, v, mask) + full(q, k, v, mask > -0.5) + full(q, k, v, is_causal=True) + full(q, k, v, scale=0.3)
    return y.flatten(1)


class Zoo(torch.nn.Module):
    """Expressions side by side, behind a layer; each with parameters of its own, or all with the same ones."""

    def __init__(self, dtype, zoo, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(SIZE, 5, dtype=dtype)
        self.zoo = zoo
        kinks = torch.tensor(KINKS, dtype=dtype)
        own = torch.randn(SIZE, dtype=dtype)
        own[: len(KINKS)] = kinks  # as in the first of the states
        sets = 1 if shared else len(self.zoo)
        self.p = torch.nn.ParameterList(own.clone() for _ in range(sets))
        self.q = torch.nn.ParameterList(0.5 + torch.rand(SIZE, dtype=dtype) for _ in range(sets))
        self.sizes = []

    def forward(self, x):
        u = 0.3 + x * x
        sets = itertools.cycle(zip(self.p, self.q, strict=True))
        parts = [self.first(x), *(f(x, u, *next(sets)) for f in self.zoo.values())]
        self.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)


def _states(dtype):
    """States at the kinks of the parameters and at others, then random ones."""
    x = torch.randn(13, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))
    kinks = torch.tensor(KINKS, dtype=dtype)
    for row in range(4):
        x[row, : len(KINKS)] = kinks.roll(row)
    return x


@functools.cache
def _read(dtype):
    zoo = Zoo(dtype, ZOO | COMPOSED if dtype == torch.float64 else ZOO)
    return zoo, read_program(zoo, SIZE, zoo.first.weight)


@functools.cache
def read_all_kinds(dtype):
    """Return a program with every operation and every kind of node; it has few tensors, which compiles sooner."""
    if dtype == torch.float64:
        zoo = Zoo(dtype, ZOO | {name: COMPOSED[name] for name in SHAPED}, shared=True)
        return read_program(zoo, SIZE, zoo.first.weight)
    read = read_all_kinds(torch.float64)
    copies = {id(t): t.detach().to(dtype) for t in read.tensors if t is not None}
    return read._replace(tensors=tuple(copies.get(id(t)) for t in read.tensors))


@functools.cache
def _compared(dtype):
    """Return by name how far value, adjoint and gradients are from torch's: seeds go to one expression at a time."""
    zoo, read = _read(dtype)
    x, names = _states(dtype), ["a layer", *zoo.zoo]
    own = x.clone().requires_grad_()
    expected = zoo(own)
    every, wide = x.repeat(len(names), 1), torch.zeros(len(names) * len(x), expected.shape[1], dtype=dtype)
    generator, start = torch.Generator().manual_seed(2), 0
    for i, size in enumerate(zoo.sizes):
        block = torch.randn(len(x), size, dtype=dtype, generator=generator)
        wide[i * len(x) : (i + 1) * len(x), start : start + size] = block
        start += size
    controls, adj_x, gradients = run_program(read, every, wide)
    parts = expected.split(zoo.sizes, 1)
    found, start = {}, 0
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        rows = slice(i * len(x), (i + 1) * len(x))
        seed = wide[rows, start : start + part.shape[1]]
        leaves = [own, *([zoo.first.weight, zoo.first.bias] if i == 0 else [zoo.p[i - 1], zoo.q[i - 1]])]
        wanted = torch.autograd.grad(part, leaves, seed, retain_graph=True, allow_unused=True)
        errors = {"value": relative(controls[rows, start : start + part.shape[1]], part.detach())}
        for leaf, what, label in zip(leaves, wanted, ("adjoint", "first", "second"), strict=True):
            got = adj_x[rows] if leaf is own else gradients.get(id(leaf), torch.zeros_like(leaf))
            what = torch.zeros_like(leaf) if what is None else what
            errors[label] = float(got.abs().max()) if not what.any() else relative(got, what)
        found[name] = errors
        start += part.shape[1]
    return found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
def test_every_operation(dtype):
    wrong = {
        name: errors
        for name, errors in _compared(dtype).items()
        if not all(error <= max(TOLERANCES[dtype], WORSE.get(name, 0.0)) for error in errors.values())
    }
    assert not wrong


def test_the_zoo_has_every_operation():
    used = {node.operation for node in _read(torch.float64)[1].plan.nodes}
    assert set(OPERATIONS) <= used
    assert {"dense", "load", "constant", "gather", "sum", "largest", "product"} <= used


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
def test_areas_of_large_numbers(dtype):
    """Their squares may be infinite."""

    class Areas(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(2, 1, dtype=dtype)

        def forward(self, x):
            return torch.cat([self.last(x), x.asinh(), (1.1 + x.abs()).acosh()], 1)

    module, x = Areas(), torch.tensor([[0.3, -1e12], [3e18, 5e9], [1e37, -1e37]], dtype=dtype)
    found, wanted = (
        run_program(read_program(module, 2, module.last.weight), x, torch.ones(3, 5, dtype=dtype))[0],
        module(x),
    )
    assert ((found - wanted)[:, 1:].abs() <= TOLERANCES[dtype] * wanted[:, 1:].abs()).all()
