"""Random expressions, a dozen of up to twenty operations side by side in one program, against torch.

A property-based test: hypothesis chooses operations, operands and sizes. Compiling takes seconds: programs are few.
"""

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.programs.running import run_program
from warp_phys.interop.torch.program import read_program

EXPRESSIONS, LONGEST, ROWS = 12, 20, 11
F = torch.nn.functional

UNARY = [
    torch.sin, torch.tanh, torch.sigmoid, torch.relu, F.silu, F.elu, F.softplus, F.gelu, torch.atan, torch.abs,
    lambda a: a.clamp(-0.5, 0.8), lambda a: (1 + a * a).rsqrt(), lambda a: 1.5 - a, lambda a: a * 0.7 + 0.1,
    lambda a: a.flip(-1), lambda a: a.roll(1, -1), lambda a: a - a.mean(-1, keepdim=True), lambda a: a.softmax(-1),
    lambda a: torch.cat([a[:, 1:], a[:, :1]], 1), lambda a: a.square().detach() * a,
    lambda a: F.layer_norm(a, a.shape[1:], eps=0.1), lambda a: a.sum(-1, keepdim=True).expand(a.shape) * 0.3,
    lambda a: a.log_softmax(-1), lambda a: a.logsumexp(-1, keepdim=True) - a, lambda a: a.amax(-1, keepdim=True) - a,
    lambda a: a * a.relu().min(-1, keepdim=True)[0], lambda a: F.normalize(a + 0.1), lambda a: a.cumsum(-1) * 0.3,
    lambda a: a.masked_fill((a > 0.9) | ~(a > -0.7), 0.2), lambda a: a[:, list(range(a.shape[1]))[::-1]],
    lambda a: (1 + 0.1 * a.sin()).prod(-1, keepdim=True) * a, lambda a: F.hardswish(a) + F.selu(a),
    lambda a: F.pad(a, (1, 1), value=0.3)[:, :-2], lambda a: torch.cat([torch.ones_like(a[:, :1]), a[:, 1:]], 1),
    lambda a: F.conv1d(a[:, None], torch.tensor([[[0.2, -0.5, 0.3]]], dtype=a.dtype), padding=1)[:, 0],
    lambda a: (a + 3.5) % 2.5 - 1.0,
]  # fmt: skip
BINARY = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (1 + b * b),
    lambda a, b: torch.where(a > b, a, 0.5 * b), lambda a, b: torch.atan2(a, 2 + b * b),
    lambda a, b: ((a[:, :, None] * 0.5) @ b[:, None, :]).mean(1), lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: (0.1 + a * a) ** b.tanh(), lambda a, b: torch.where((a > b) & (b < 1), b, a * 0.5),
    lambda a, b: torch.stack([a, b], 2).var(2), lambda a, b: torch.stack([a, b, a * 2]).norm(dim=0),
]  # fmt: skip
OPERATIONS = len(UNARY) + len(BINARY) + 3

# an operation, two operands by their number from the last one back, an output size
STEP = st.tuples(st.integers(0, OPERATIONS - 1), st.integers(0, 4), st.integers(0, 4), st.integers(1, 21))
EXPRESSION = st.lists(STEP, min_size=1, max_size=LONGEST)
PROGRAMS = st.tuples(st.integers(1, 18), st.lists(EXPRESSION, min_size=EXPRESSIONS, max_size=EXPRESSIONS))


class Random(torch.nn.Module):
    """Expressions of states side by side; layers are made where sizes do not fit, or where one is asked for."""

    def __init__(self, size, expressions):
        super().__init__()
        self.expressions = expressions
        self.layers, self.gains = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        self.last = torch.nn.Linear(size, 1)

    def layer(self, name, inputs, outputs):
        if name not in self.layers:
            self.layers[name] = torch.nn.Linear(inputs, outputs, bias=outputs % 2 == 0)
        return self.layers[name]

    def gain(self, name, size):
        if name not in self.gains:
            self.gains[name] = torch.nn.Parameter(torch.randn(size))
        return self.gains[name]

    def forward(self, x):
        return torch.cat([self.last(x), *(self.expression(i, x) for i in range(len(self.expressions)))], 1)

    def expression(self, i, x):
        known = [x]
        for k, (what, first, second, size) in enumerate(self.expressions[i]):
            a, b = (known[-1 - place % len(known)] for place in (first, second))
            name = f"{i} {k}"
            if what < len(UNARY):
                made = UNARY[what](a)
            elif what < len(UNARY) + len(BINARY):
                if a.shape[1] != b.shape[1]:
                    b = self.layer(name, b.shape[1], a.shape[1])(b)
                made = BINARY[what - len(UNARY)](a, b)
            elif what == OPERATIONS - 1:
                made = self.layer(name, a.shape[1], size)(a).tanh()
            elif what == OPERATIONS - 2:
                made = a * self.gain(name, a.shape[1]) + x[:, :1]
            else:
                made = torch.cat([a, b], 1)[:, -min(size, a.shape[1] + b.shape[1]) :]
            known.append(made)
        return known[-1]


@settings(
    max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(PROGRAMS)
def test_random_expressions(program):
    size, expressions = program
    torch.manual_seed(size)
    module = Random(size, expressions)
    module(torch.zeros(2, size))  # makes its layers
    module.double()
    read = read_program(module, size, module.last.weight)
    x = torch.randn(ROWS, size, dtype=torch.float64, requires_grad=True)
    wanted = module(x)
    seeds, leaves = torch.randn_like(wanted), [x, *module.parameters()]
    expected = torch.autograd.grad(wanted, leaves, seeds, allow_unused=True)
    controls, adj_x, gradients = run_program(read, x.detach(), seeds)
    assert (controls - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    scale = max(float(e.abs().max()) for e in expected if e is not None)
    found = [adj_x, *(gradients.get(id(leaf), torch.zeros_like(leaf)) for leaf in leaves[1:])]
    for got, e in zip(found, expected, strict=True):
        assert (got - (0 if e is None else e)).abs().max() <= 1e-12 * scale
    reached = {id(t) for t, is_reached in zip(read.tensors, read.plan.reached(), strict=True) if is_reached}
    assert reached >= {id(leaf) for leaf, e in zip(leaves[1:], expected[1:], strict=True) if e is not None and e.any()}
