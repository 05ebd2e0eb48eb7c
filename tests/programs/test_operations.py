"""Every operation of row programs against torch: values, adjoints of the states, gradients of the parameters."""

import functools

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
    "arcsine": lambda x, u, p, q: (0.3 * x.sin() * q).asin() + (0.3 * x.sin() * q).acos() * p,
}  # fmt: skip


class Zoo(torch.nn.Module):
    """All expressions side by side, each with parameters of its own, behind a layer."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(SIZE, 5, dtype=dtype)
        kinks = torch.tensor(KINKS, dtype=dtype)
        own = torch.randn(SIZE, dtype=dtype)
        own[: len(KINKS)] = kinks  # as in the first of the states
        self.p = torch.nn.ParameterList(own.clone() for _ in ZOO)
        self.q = torch.nn.ParameterList(0.5 + torch.rand(SIZE, dtype=dtype) for _ in ZOO)
        self.sizes = []

    def forward(self, x):
        u = 0.3 + x * x
        parts = [self.first(x), *(f(x, u, p, q) for f, p, q in zip(ZOO.values(), self.p, self.q, strict=True))]
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
    zoo = Zoo(dtype)
    return zoo, read_program(zoo, SIZE, next(zoo.parameters()))


@functools.cache
def _compared(dtype):
    """Return by name how far value, adjoint and gradients are from torch's: seeds go to one expression at a time."""
    zoo, read = _read(dtype)
    x, names = _states(dtype), ["a layer", *ZOO]
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
