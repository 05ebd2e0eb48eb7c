"""What is read of a module, and what of it is refused; nothing is compiled."""

import subprocess
import sys

import pytest
import torch

from tests.programs.test_modules import Module, double, linear, parameter
from warp_phys.interop.torch.program import read_program
from warp_phys.programs.reading import Unreadable

SIZE = 4


def read(function):
    """Return the program of a function of a module's parts and of states."""
    parts = {"first": linear(SIZE, SIZE), "last": linear(SIZE), "p": parameter(SIZE), "table": torch.ones(SIZE)}
    return read_program(double(lambda: Module(function, **parts)), SIZE, torch.zeros((), dtype=torch.float64)).plan


def operations(function):
    return [node.operation for node in read(function).nodes]


LENGTHS = {
    "len": lambda x: len(x) < 1000,
    "shape": lambda x: x.shape[0] > 5,
    "shape of what is computed": lambda x: x.sin().shape[0] >= 100,
    "size": lambda x: x.size(0) * SIZE < 5000,
    "size of all": lambda x: x.size()[0] % 2 == 1,
    "numel": lambda x: x.numel() < 5000 and torch.numel(x) // 4 < 900,
    "a product": lambda x: x.view(2, -1, SIZE).shape[1] < 40 if len(x) % 2 == 0 else True,
    "another order": lambda x: 1000 > x.T.shape[-1] + 1,
}


@pytest.mark.parametrize("what", LENGTHS)
def test_a_way_that_depends_on_the_number_of_rows(what):
    with pytest.raises(Unreadable, match="depends on the number of its rows"):
        read(lambda m, x: m.last(x) if LENGTHS[what](x) else m.last(m.first(x)))


def test_computing_with_the_number_of_rows():
    for count in (lambda x: len(x) / 2, lambda x: float(x.shape[0]), lambda x: x.size(0) ** 2):
        with pytest.raises(Unreadable, match="computes with the number of its rows"):
            read(lambda m, x: m.last(x) * count(x))  # noqa: B023, called at once


def test_lengths_that_all_batches_share():
    """Sizes of a row, and comparisons that come out the same for any batch, are no obstacle."""

    def forward(m, x):
        zeros = x.new_zeros(len(x), SIZE)
        assert x.shape == (len(x), SIZE) and zeros.shape == x.shape and len(x) > 1 and 2 * x.shape[0] > len(x)
        return m.last((x + zeros).reshape(len(x), 2, -1).flatten(1) if x.shape[1] == SIZE else x)

    assert operations(forward) == operations(lambda m, x: m.last(x + x.new_zeros(SIZE)))


def sampled(m, x):
    return m.last(x) + torch.rand(1, dtype=x.dtype)


def of_a_parameter(m, x):
    return m.last(x) * m.p.tolist()[0]


def second_result(m, x):
    values, places = m.first(x).max(1, keepdim=True)
    return m.last(x) * values + places


def to_a_buffer(m, x):
    m.table.add_(x[0])
    return m.last(x * m.table)


def to_a_view_of_a_parameter(m, x):
    with torch.no_grad():
        m.p[1:].mul_(0.5)
    return m.last(x * m.p)


def to_its_input(m, x):
    x += 1.0
    return m.last(x)


REFUSED = {
    sampled: "random numbers", of_a_parameter: "tolist", second_result: "second result", to_a_buffer: "it writes to",
    to_a_view_of_a_parameter: "it writes to", to_its_input: "it writes to its input",
}  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
def test_what_is_refused(forward):
    with pytest.raises(Unreadable, match=REFUSED[forward]):
        read(forward)


def test_parameters_by_other_names_are_not_taken_for_constants():
    """Data and detached views follow the parameter, and stop its gradient."""
    for share in (lambda p: p.data, lambda p: p.detach(), lambda p: p.view(2, -1).data.flatten()):
        found = operations(lambda m, x: m.last(x * share(m.p)))  # noqa: B023, called at once
        assert "load" in found and "stop" in found and "constant" not in found


def test_regions_without_gradients():
    """What is computed there is stopped, but not where gradients are switched on again inside."""

    def forward(m, x):
        with torch.no_grad():
            h = m.p * 2
            with torch.enable_grad():
                g = m.p * 3
        return m.last(x * h + x * g)

    program = read(forward)
    stops = [node for node in program.nodes if node.operation == "stop"]
    assert len(stops) == 1
    assert all(reached for reached in program.reached())


def test_writing_in_place_goes_through_views():
    """As without it, whatever shape the views have."""

    def plain(m, x):
        return m.last(torch.cat([x[:, :1] * m.p[:1], 2 * x[:, 1:]], 1))

    def in_place(m, x):
        y = torch.zeros(len(x), 1, SIZE, dtype=x.dtype)
        y.squeeze_(1).T[1:].copy_(x.T[1:])
        y.view(-1, SIZE)[:, 1:].mul_(2)
        y[:, 0] = x[:, 0] * m.p[0]
        return m.last(y)

    def written(program):
        return sorted(node.operation for node in program.nodes)

    assert written(read(in_place)) == written(read(plain))


def test_vmap():
    assert operations(lambda m, x: torch.vmap(lambda row: m.last(row.sin()))(x)) == ["input", "sine", "dense"]


def test_no_compiler_is_imported():
    """Torch's own takes a second to import, its symbolic algebra half a one."""
    code = """
import sys, torch
from warp_phys import CartPole
from warp_phys.interop.torch.program import read_and_check
cell, last = torch.nn.GRUCell(4, 5), torch.nn.Linear(5, 1)
class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.norm, self.last = cell, torch.nn.LayerNorm(5), last
    def forward(self, x):
        return self.last(self.norm(self.cell(x)).clamp(-1, 1) + x[:, 2:3].sin())
from warp_phys.interop.torch import program
program._run = lambda read, found, system: sys.exit(bool({"torch._dynamo", "sympy"} & set(sys.modules)))
read_and_check(Policy(), CartPole(), blocks=False)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
