"""What is computed together, kept, read in place or computed once; and that the numbers stay right."""

import pytest
import torch

from tests.programs.running import relative, run_program
from warp_phys.interop.torch.program import read_program
from warp_phys.programs.layout import layout_of

NN = torch.nn
F = torch.nn.functional
SIZE, WIDTH = 5, 21


class _Policy(NN.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = NN.Linear(SIZE, WIDTH), NN.Linear(WIDTH, WIDTH), NN.Linear(WIDTH, 2)
        self.gain = NN.Parameter(torch.randn(WIDTH))
        self.register_buffer("hidden", torch.randn(SIZE))


class OfNoRow(_Policy):
    """A layer of constants, which another layer, a product and a sum of its numbers take."""

    def forward(self, x):
        constant = F.silu(self.first(0 * x[:, :1] + self.hidden))
        mixed = torch.tanh(self.second(constant) * self.gain) + constant.sum(1, keepdim=True)
        return self.last(torch.tanh(self.first(x)) * mixed + self.second(torch.sin(self.gain) * constant))


class Twice(_Policy):
    """Activations of activations, and a layer whose output goes three ways."""

    def forward(self, x):
        h = F.silu(self.first(x))
        return self.last(torch.tanh(torch.tanh(self.second(h))) + h * torch.sigmoid(h))


class Slices(_Policy):
    """Parts of a layer in place, not in whole vectors, and turned; one number as many; sums over some."""

    def forward(self, x):
        h = torch.tanh(self.first(x))
        tail, turned, some = h[:, 16:], h.flip(1), h[:, 3:12]
        scaled = turned * h[:, 4:5] + (tail * tail).mean(1, keepdim=True) + some.sum(1, keepdim=True)
        return self.last(F.elu(self.second(scaled / (1 + h[:, 7:8] ** 2)))) + some[:, :2] * tail[:, 1:3]


@pytest.mark.parametrize("make", [OfNoRow, Twice, Slices])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_numbers(make, dtype, tolerance):
    module = make().to(dtype)
    x = torch.randn(11, SIZE, dtype=dtype, requires_grad=True)
    read, wanted = read_program(module, SIZE, x), module(x)
    seeds, leaves = torch.randn_like(wanted), [x, *module.parameters()]
    expected = torch.autograd.grad(wanted, leaves, seeds, allow_unused=True)
    controls, adj_x, gradients = run_program(read, x.detach(), seeds)
    assert relative(controls, wanted.detach()) <= tolerance and relative(adj_x, expected[0]) <= tolerance
    for parameter, e in zip(leaves[1:], expected[1:], strict=True):
        if e is None:
            assert id(parameter) not in gradients or not gradients[id(parameter)].any()
        else:
            assert relative(gradients[id(parameter)], e) <= tolerance


def _layout(make):
    module = make()
    return layout_of(read_program(module, SIZE, module.gain).plan)


def test_what_depends_on_no_row_is_computed_once():
    layout = _layout(OfNoRow)
    layers = [sum(layout.program.nodes[i].operation == "dense" for s in stages for i in s.nodes)
              for stages in (layout.static_stages, layout.stages)]  # fmt: skip
    assert layers == [3, 2]


def test_what_stays_in_registers():
    """Of sigmoid(h) only what its adjoint needs is in memory; of the product and the sum nothing."""
    layout = _layout(Twice)
    stored = {layout.program.nodes[i].operation for i in layout.stored if i in layout.at}
    assert "sigmoid" in stored and "multiply" not in stored
    assert [len(stage.nodes) for stage in layout.stages] == [1, 1, 4, 1]
