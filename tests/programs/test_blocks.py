"""The code of row programs for CUDA, run on a CPU, against the code for a CPU: one thread a block, and many that wait.

Warp runs the threads of a block on a CPU one by one from barrier to barrier, the first thread first: one that is ahead
reads nan where it should have waited.
"""

import functools

import numpy as np
import pytest
import torch
import warp as wp

from tests.programs import test_modules as modules
from tests.programs import test_operations as operations
from tests.programs.running import relative, run_in_blocks, run_program
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch.controller import TorchController
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.program import read_program
from warp_phys.programs import block_code, block_kernels
from warp_phys.programs.block_network import BlockNetwork
from warp_phys.programs.network import Network
from warp_phys.programs.operations import OPERATIONS
from warp_phys.programs.program import Builder, Dense

NN = torch.nn
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}


class Everything(NN.Module):
    """Sine and cosine of an angle, a norm, residuals, a layer that comes twice, a clamp; a cell with a gate."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.shared = NN.Linear(5, 37), NN.LayerNorm(37), NN.Linear(37, 37)
        self.cell, self.last = NN.GRUCell(5, 37), NN.Linear(37, 1)

    def forward(self, x):
        x = torch.cat([x[:, :2], x[:, 2:3].sin(), x[:, 2:3].cos(), x[:, 3:]], 1)
        h = self.norm(self.first(x)).tanh()
        for _ in range(2):
            h = h + self.shared(h).sigmoid()
        return (0.1 * self.last(self.cell(x, h))).clamp(-0.26, 0.4)


POLICIES = {
    "everything": Everything,
    "norms and activations": modules.norms_and_activations,
    "recurrent cells": modules.recurrent_cells,
    "attention": modules.attention,
    "layout": modules.layout,
    "choices": modules.choices,
    "shared and frozen": modules.shared_and_frozen,
}


@pytest.fixture(params=[1, None], ids=["one-thread", "all-threads"])
def threads(request, monkeypatch):
    """One thread a block, or as many as on CUDA."""
    monkeypatch.setattr(wp.config, "enable_cpu_blocks", request.param is None)
    return request.param


@functools.cache
def _read(name, dtype):
    module = modules.double(POLICIES[name]).to(dtype)
    return module, read_program(module, modules.SIZE, next(module.parameters()))


def _check(read, x, dtype):
    seeds = torch.randn(len(x), read.plan.outputs, dtype=dtype, generator=torch.Generator().manual_seed(0))
    new, old = run_in_blocks(read, x, seeds), run_program(read, x, seeds)
    scale = max(float(gradient.abs().max()) for gradient in old[2].values())
    assert scale > 0.0 and old[1].any()
    errors = [relative(new[0], old[0]), relative(new[1], old[1])]
    errors += [float((new[2][name] - old[2][name]).abs().max()) / scale for name in old[2]]
    assert max(errors) < TOLERANCES[dtype], errors


@pytest.mark.parametrize(("name", "dtype"), [("everything", torch.float64), *((n, torch.float32) for n in POLICIES)])
def test_policies(name, dtype, monkeypatch):
    monkeypatch.setattr(wp.config, "enable_cpu_blocks", True)
    _, read = _read(name, dtype)
    for batch in (2, 8, 19):
        _check(read, modules.states(batch).to(dtype), dtype)


@pytest.mark.parametrize(("dtype", "threads"), [(torch.float64, None), (torch.float32, 1)], indirect=["threads"])
def test_every_operation(dtype, threads):
    """Elementwise operations at kinks too, and all kinds of nodes."""
    read = operations.read_all_kinds(dtype)
    own = {"input", "derivative of"}  # what torch's modules do not have
    assert {node.operation for node in read.plan.nodes} - own == set(block_code.KINDS) - own
    _check(read, operations._states(dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("samples", [1, 3, 4, 8])
def test_unrollings(dtype, samples, threads):
    """States and controls of 6 steps with the physics, for all sizes of blocks."""
    system, (_, read) = CartPole(dt=0.02), _read("everything", dtype)
    addresses, real = [0 if t is None else t.data_ptr() for t in read.tensors], wp.dtype_from_torch(dtype)
    network, blocks = Network(read.plan, real), BlockNetwork(read.plan, real, "cpu")
    network.pack(addresses)
    for batch in (1, 9, 16):
        found = []
        for in_blocks in (True, False):
            states, controls = torch.zeros(7, batch, 4, dtype=dtype), torch.zeros(6, batch, 1, dtype=dtype)
            states[0] = torch.as_tensor(system.sample(batch, seed=batch))
            arrays = [as_array(states), as_array(controls)]
            p = system.check_parameters(None, arrays[0], batch)
            if in_blocks:
                blocks.unroll(addresses, system, *arrays, p, samples=samples)
            else:
                network.unroll(system, *arrays, p, keep=False)
            found.append((states, controls))
        assert all(relative(a, b) < TOLERANCES[dtype] for a, b in zip(*found, strict=True))


def test_numbers_that_are_read_many_times(monkeypatch):
    """One gain for 100 numbers: the threads of a block must not all add to its gradient."""
    monkeypatch.setattr(wp.config, "enable_cpu_blocks", True)
    first, last = modules.linear(modules.SIZE, 100), modules.linear(100)
    function = lambda m, x: m.last(torch.tanh(m.first(x)) * m.gain)  # noqa: E731
    module = modules.Module(function, first=first, last=last, gain=modules.parameter(1)).double()
    read = read_program(module, modules.SIZE, next(module.parameters()))
    load = next(i for i, node in enumerate(read.plan.nodes) if node.operation == "load")
    assert read.plan.nodes[load].numbers[1] == (0,) * 100
    _check(read, modules.states(19), torch.float64)
    code = "\n".join(block_code.contract_lines(read.plan, "double", 8, "memory"))
    assert f"which{load}[] = {{0}};" in code  # a thread for each number of the tensor, whatever reads it


def _one_of_each():
    """Return a program in which threads need what threads behind them have written, and its number of slots."""
    build = Builder(24)
    weights = [build.slot(24 * 24), build.slot(24), build.slot(24 * 2)]
    dense = Dense(1, 24, 24, 24, weights[0], weights[1], flipped=False, channels=24, activation="tanh")
    x = build.add("sine", (0,), 24)
    x = build.gather([(x, 23 - k) for k in range(24)])
    y = build.add("dense", (x,), 24, tuple(dense))
    y = build.add("multiply", (y, x), 24)
    groups = build.add("sum", (y,), 4, (6,))
    groups = build.gather([(groups, 3 - k // 6) for k in range(24)])
    y = build.add("add", (y, groups), 24)
    z = build.add("product", (y, x), 36, (1, 6, 4, 6))
    z = build.gather([(z, 35 - k) for k in range(24)])
    last = Dense(1, 24, 24, 2, weights[2], -1, flipped=False, channels=24)
    return build.finish(build.add("dense", (z,), 2, tuple(last)))


class _Read:
    """A program and tensors for it."""

    def __init__(self, program):
        generator = torch.Generator().manual_seed(1)
        self.plan = program
        slots = [torch.randn(n, generator=generator).double() / 5 for n in program.slots]
        self.tensors = tuple(None if slot < 0 else slots[slot] for slot in program.read)


def _without(lines, number):
    """Return C++ without one of its barriers."""
    places = [k for k, line in enumerate(lines) if line == "barrier();"]
    return [line for k, line in enumerate(lines) if k != places[number]]


def _error(read):
    """Return how far what blocks give is from the code for a CPU; infinite if something is no number."""
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(2)).double()
    seeds = torch.randn(9, 2, generator=torch.Generator().manual_seed(3)).double()
    try:
        new = run_in_blocks(read, x, seeds)
    except AssertionError:
        return float("inf")
    old = run_program(read, x, seeds)
    pairs = [(new[0], old[0]), (new[1], old[1]), *((new[2][name], old[2][name]) for name in old[2])]
    errors = [relative(a, b) for a, b in pairs]
    return float("inf") if np.isnan(errors).any() else max(errors)


def test_a_barrier_that_is_missing_is_noticed(monkeypatch):
    """Each but the last ones, behind which kernels go on with the numbers that a thread has itself."""
    monkeypatch.setattr(wp.config, "enable_cpu_blocks", True)
    read = _Read(_one_of_each())
    assert _error(read) < 1e-12
    for name in ("evaluate", "pull"):
        lines_of, make = getattr(block_code, f"{name}_lines"), getattr(block_kernels, f"{name}_kernel").__wrapped__
        memory = ("",) if name == "evaluate" else ()
        count = lines_of(read.plan, "double", 8, *memory).count("barrier();")
        assert count > 3
        for number in range(count - 1):
            with monkeypatch.context() as patch:
                patch.setattr(block_code, f"{name}_lines", lambda *a, n=number, f=lines_of: _without(f(*a), n))
                patch.setattr(block_kernels, f"{name}_kernel", make)
                assert _error(read) > 1e-3, (name, number)


ROLLED = ["everything", "recurrent cells", "attention", "shared and frozen"]


@pytest.mark.parametrize("name", ROLLED)
def test_rollouts(name, monkeypatch):
    """Modules of torch, there and back as on CUDA, against the general backend; "auto" waits to be asked there."""
    monkeypatch.setattr(TorchController, "_on_cpu", lambda adapter: False)
    module = modules.double(POLICIES[name])
    fused = Rollout(modules.SYSTEM, module, modules.STEPS, backend="fused")
    for batch, flow in ((5, "R"), (17, "C"), (1, "M")):
        assert not modules.differences(module, fused, modules.states(batch), flow)
    assert fused.backend == "fused" and fused._adapter._blocks is not None and fused._adapter._network is None
    module.requires_grad_(False)
    assert not modules.differences(module, fused, modules.states(5), "R")
    assert Rollout(modules.SYSTEM, module, modules.STEPS).backend == "general"


def test_what_blocks_compute_wrongly_is_refused(monkeypatch):
    """The check of what was read runs the kernels of CUDA."""
    monkeypatch.setattr(TorchController, "_on_cpu", lambda adapter: False)
    module, sine = modules.double(Everything), OPERATIONS["sine"]
    monkeypatch.setitem(block_code.OPERATIONS, "sine", sine._replace(adjoints=("d * cosine(a) * 1.01",)))
    for name in ("pack", "evaluate", "pull", "contract", "unroll"):
        make = getattr(block_kernels, f"{name}_kernel").__wrapped__
        monkeypatch.setattr(block_kernels, f"{name}_kernel", make)
    with pytest.raises(ValueError, match="other numbers"):
        Rollout(modules.SYSTEM, module, modules.STEPS, backend="fused")
