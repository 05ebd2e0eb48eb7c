"""Whole passes in one kernel against the general path: the same numbers, whatever the layers, the flow, the sizes.

Differences are relative to the largest component. In float32 both paths are held against the general one in float64.
"""

import threading

import numpy as np
import pytest
import torch
import warp as wp

from tests.springs import Springs
from warp_phys import MODIFIED, REGULAR, CartPole, Dense, Flow, Polynomial, Quantum
from warp_phys import Rollout as WarpRollout
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch.grid import FromGrid, ToGrid
from warp_phys.programs import row_buffers

NN = torch.nn
STEPS = 21  # more than the 8 time steps of a chunk of 8 samples, and no multiple of them
BATCHES = (1, 5, 8, 13)
SMALL = Springs(size=5, pushes=2)
GRID = Springs(size=24, pushes=9)


def _widths():
    """Less than a register, then several panels, and no multiple of a register."""
    return NN.Sequential(NN.Linear(5, 7), NN.Tanh(), NN.Linear(7, 260), NN.ELU(), NN.Linear(260, 2))


def _few_outputs_throughout():
    """No bias, a layer that comes twice, one that is frozen, an activation at the output."""
    shared, first = NN.Linear(7, 7), NN.Linear(5, 7, bias=False)
    first.weight.requires_grad_(False)
    return NN.Sequential(first, NN.Tanh(), shared, NN.SiLU(), shared, NN.ELU(), NN.Linear(7, 2), NN.SiLU())


def _linear():
    return NN.Sequential(NN.Linear(1, 1))


def _nine_controls():
    return NN.Sequential(NN.Linear(24, 9), NN.Sigmoid())


def _channels_last():
    """Kernels 3 and 5, strides 2 and 1, down to one position."""
    layers = [ToGrid(2), NN.Conv1d(2, 5, 3, stride=2), NN.Tanh(), NN.Conv1d(5, 3, 5), NN.ELU(), FromGrid()]
    return NN.Sequential(*layers, NN.Linear(3, 9))


def _channels_first():
    """Kernels 4 and 1, strides 3 and 2: points that no window reads, at the end and between the windows."""
    layers = [NN.Unflatten(1, (2, 12)), NN.Conv1d(2, 4, 4, stride=3), NN.Sigmoid(), NN.Conv1d(4, 20, 1, stride=2)]
    return NN.Sequential(*layers, NN.ReLU(), NN.Flatten(), NN.Linear(40, 9))


def _many_channels():
    """Kernels 2 and 3, strides 1 and 3: outputs of a window beyond one panel, and a slope that is kept."""
    layers = [NN.Unflatten(1, (3, 8)), NN.Conv1d(3, 17, 2), NN.SiLU(), NN.Conv1d(17, 6, 3, stride=3), NN.SiLU()]
    return NN.Sequential(*layers, FromGrid(), NN.Linear(12, 9))


CASES = {
    "widths": (SMALL, _widths),
    "few outputs": (SMALL, _few_outputs_throughout),
    "linear": (Polynomial(dt=0.1), _linear),
    "nine controls": (GRID, _nine_controls),
    "channels last": (GRID, _channels_last),
    "channels first": (GRID, _channels_first),
    "many channels": (GRID, _many_channels),
}
PER_STEP = Flow(tuple(np.linspace(0.0, 1.0, STEPS)), tuple(np.cos(np.arange(STEPS))))
OBSERVED = ("M", "R", "S", "N", Flow(0.9, 0.8), Flow(window=4), Flow(0.5, 1.0, window=9))


def make(case, dtype=torch.float64):
    """Return system and controller of a case, with weights that are not small."""
    system, build = CASES[case]
    torch.manual_seed(0)
    module = build().to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    return system, module


def run(system, module, batch, backend, flow="C", when="every", observe=OBSERVED, steps=STEPS, **options):
    """Return what a forward and a backward pass leave, by name, in float64."""
    rollout = Rollout(system, module, steps, flow, backend=backend, **options)
    rollout.observe = observe
    x0 = torch.as_tensor(system.sample(batch, seed=batch, dtype=np.float64)).to(rollout.dtype).requires_grad_()
    module.zero_grad()
    states, controls = rollout(x0)
    system.loss(states, controls, when, control_cost=0.1).backward()
    found = {"states": states, "controls": controls, "lambda": x0.grad}
    found |= {flow.name: row for flow, row in zip(rollout.report.flows, rollout.report.updates, strict=True)}
    found["update"] = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
    return {name: value.detach().double().clone() for name, value in found.items()}


def distance(found, exact):
    """Return the largest difference, relative to the largest component, over all that was found."""
    assert found.keys() == exact.keys()
    return max(float((found[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact)


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("case", CASES)
def test_float64(case):
    system, module = make(case)
    for batch, when in zip(BATCHES, ("every", "final", [0, 3, STEPS], "every"), strict=True):
        results = [run(system, module, batch, backend, when=when) for backend in ("fused", "general")]
        assert len(results[0]) == 11 and distance(*results) < 1e-10


@pytest.mark.parametrize("flow", ["R", "M", PER_STEP])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_plain_flows_and_short_horizons(flow, steps):
    if isinstance(flow, Flow):
        flow = Flow(flow.physics[:steps], flow.controller[:steps])
    for batch in (1, 13):
        runs = [
            run(*make("few outputs"), batch, backend, flow, observe=(), steps=steps) for backend in ("fused", "general")
        ]
        assert distance(*runs) < 1e-10


@pytest.mark.parametrize("case", ["widths", "few outputs", "channels first"])
def test_float32(case):
    """Measured: up to 1e-6 on either path."""
    exact = run(*make(case), 13, "general")
    for backend in ("fused", "general"):
        assert distance(run(*make(case, torch.float32), 13, backend), exact) < 1e-5


def test_another_layer_that_reads_less():
    """One that leaves out numbers of a row, after one that did not: their adjoints are zero, whatever was there."""
    system, build = GRID, lambda kernel: NN.Conv1d(2, 3, kernel, stride=12)
    torch.manual_seed(0)
    module = NN.Sequential(ToGrid(2), build(12), NN.Tanh(), FromGrid(), NN.Linear(3, 9)).double()
    rollouts = [Rollout(system, module, STEPS, "R", backend=backend) for backend in ("fused", "general")]
    for kernel in (12, 6):
        module[1], results = build(kernel).double(), []
        for rollout in rollouts:
            x0 = torch.as_tensor(system.sample(8, dtype=np.float64)).requires_grad_()
            system.loss(*rollout(x0), "every").backward()
            results.append({"lambda": x0.grad})
        assert distance(*results) < 1e-10


def test_the_same_bits_again():
    for case, dtype in (("few outputs", torch.float64), ("widths", torch.float32)):
        system, module = make(case, dtype)
        first, again = (run(system, module, 13, "fused") for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("case", ["few outputs", "many channels"])
def test_activations_that_are_computed_again(case, monkeypatch):
    """The same bits: a backward pass goes through the same chunks either way."""
    kept = run(*make(case), 13, "fused")
    monkeypatch.setattr(row_buffers, "KEPT_BYTES", 0)
    again = run(*make(case), 13, "fused")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_two_forward_passes_before_one_backward():
    """Each backward pass finds the activations of its own forward pass, in any order and twice."""
    system, module = make("few outputs")
    x = [torch.as_tensor(system.sample(8, seed, np.float64)) for seed in range(3)]
    rollout = Rollout(system, module, STEPS, "R")

    def alone(x0):
        module.zero_grad()
        system.loss(*Rollout(system, module, STEPS, "R")(x0)).backward()
        return gradient(module)

    a, b, c = (alone(x0) for x0 in x)
    module.zero_grad()
    losses = [system.loss(*rollout(x0)) for x0 in x[:2]]
    losses[1].backward(retain_graph=True)
    losses[0].backward(retain_graph=True)
    torch.testing.assert_close(gradient(module), a + b, rtol=1e-12, atol=1e-14)
    losses[0].backward(retain_graph=True)  # the buffer waits, untouched
    torch.testing.assert_close(gradient(module), 2 * a + b, rtol=1e-12, atol=1e-14)
    third = system.loss(*rollout(x[2]))  # takes a buffer that waited
    losses[0].backward()
    losses[1].backward()
    third.backward()
    torch.testing.assert_close(gradient(module), 3 * a + 2 * b + c, rtol=1e-12, atol=1e-14)


def test_a_frozen_weight_that_changes_before_the_backward_pass_is_noticed():
    system, module = make("few outputs")
    loss = system.loss(*Rollout(system, module, STEPS, "R")(system.sample(3)))
    with torch.no_grad():
        module[0].weight.mul_(2.0)
    assert not module[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="a parameter of the controller has been modified in place"):
        loss.backward()


@pytest.mark.parametrize("wanted", [False, True])
def test_physical_parameters_per_sample(wanted):
    system, module = make("few outputs")
    x0 = torch.as_tensor(system.sample(13, dtype=np.float64))
    results = []
    for backend in ("fused", "general"):
        gain = torch.linspace(0.3, 1.1, 13, dtype=torch.float64, requires_grad=wanted)
        module.zero_grad()
        states, controls = Rollout(system, module, STEPS, "R", backend=backend)(x0, {"gain": gain})
        system.loss(states, controls, "every").backward()
        results.append({"states": states.detach(), "update": gradient(module)})
        if wanted:
            results[-1]["gain"] = gain.grad
    assert distance(*results) < 1e-10
    assert distance({"states": run(system, module, 13, "fused")["states"]}, {"states": results[0]["states"]}) > 1e-3


def test_samples_that_diverge():
    system, module = make("few outputs")
    x0 = torch.as_tensor(system.sample(13, dtype=np.float64))
    x0[[2, 9], 1] = 1e3
    results = []
    for backend in ("fused", "general"):
        rollout = Rollout(system, module, STEPS, "C", backend=backend, on_divergence="mask")
        module.zero_grad()
        states, controls = rollout(x0)
        system.loss(states[:, [i for i in range(13) if i not in (2, 9)]], None, "every").backward()
        assert rollout.report.diverged == (2, 9)
        results.append({"states": states.detach(), "controls": controls.detach(), "update": gradient(module)})
    assert distance(*results) < 1e-10


def test_one_controller_in_two_threads():
    """Two rollouts of one controller, and one rollout in two threads: each pass has memory of its own."""
    system, module = make("few outputs")
    shared = Rollout(system, module, STEPS, "C")
    expected, found = {}, {}

    def work(rollout, seed, results):
        parameters = [p for p in module.parameters() if p.requires_grad]
        for repeat in range(6):
            x0 = torch.as_tensor(system.sample(13, seed + 10 * repeat, np.float64))
            parts = torch.autograd.grad(system.loss(*rollout(x0), "every"), parameters)
            results[seed, repeat] = torch.cat([part.flatten() for part in parts])

    for seed in range(4):
        work(Rollout(system, module, STEPS, "C"), seed, expected)
    rollouts = [shared, shared, *(Rollout(system, module, STEPS, "C") for _ in range(2))]
    threads = [threading.Thread(target=work, args=(rollout, i, found)) for i, rollout in enumerate(rollouts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def set_threads():
    """Torch's switch for the number of threads, put back where it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [row_buffers.KEPT_BYTES, 0])
def test_a_batch_that_several_threads_share(limit, set_threads, monkeypatch):
    """Blocks that do not divide evenly: the same numbers but for the order of sums, and the same bits again."""
    monkeypatch.setattr(row_buffers, "KEPT_BYTES", limit)
    system, module = make("few outputs")
    results, updates = {}, {}
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        results.setdefault(threads, []).append(run(system, module, 101, "fused"))
        rollout = Rollout(system, module, STEPS, "C")
        rollout.value_and_grad(torch.as_tensor(system.sample(101, dtype=np.float64)), "every", 0.1)
        assert len(rollout._adapter._network.shares(101)) == threads
        updates.setdefault(threads, []).append({"update": gradient(module)})
    for found in (results, updates):
        assert distance(found[2][0], found[1][0]) < 1e-12 and distance(found[3][0], found[1][0]) < 1e-12
        assert all(torch.equal(found[2][0][name], found[2][1][name]) for name in found[2][0])


def test_memory_of_horizons_that_change():
    """Buffers of many lengths do not pile up."""
    system, module = make("few outputs")
    rollout = Rollout(system, module, STEPS, "R")
    limit = 200_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_buffers, "KEPT_BYTES", limit)
        for steps in range(10, 60, 3):
            rollout.steps = steps
            system.loss(*rollout(system.sample(5))).backward()
            inner = rollout._adapter._network
            assert sum(rows.array.capacity for rows in inner._buffers._idle) <= limit


@pytest.mark.parametrize("way", ["backward", "value_and_grad"])
def test_memory_of_a_long_horizon(way):
    """Beyond `KEPT_BYTES` activations are not kept: what stays allocated is little more than the trajectory."""
    _, module = make("few outputs", torch.float32)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    system = Springs(size=5, pushes=2, coupling=0.1, hardening=0.0)  # comes to rest
    steps, batch = 1500, 300
    trajectory = 4 * batch * (steps * 7 + 5)
    row = Rollout(system, module, 1)._adapter.network()[0].layout.row
    assert 4 * steps * batch * row > row_buffers.KEPT_BYTES + 1.5 * trajectory + 64 * 2**20  # or this proves nothing
    rollout = Rollout(system, module, steps, "C")
    x0 = system.sample(batch)
    if way == "backward":
        system.loss(*rollout(x0)).backward()
        workspaces, held = rollout._workspaces, []
    else:
        rollout.value_and_grad(x0)
        (direct,) = rollout._direct.values()
        held = [value for value in vars(direct).values() if isinstance(value, torch.Tensor)]
        held += [item for item in direct._held if isinstance(item, wp.array)]
        workspaces = [item for item in direct._held if hasattr(item, "_arrays")]
    inner = rollout._adapter._network
    buffers = [rows.array for waiting in (*inner._buffers._scratch.values(), inner._buffers._idle) for rows in waiting]
    buffers += [array for workspace in workspaces for array in workspace._arrays.values()]
    buffers += [inner._packed, inner._transposed]
    pieces = {array.ptr: array.capacity for array in buffers}
    for item in held:
        address = item.data_ptr() if isinstance(item, torch.Tensor) else item.ptr
        pieces[address] = item.untyped_storage().nbytes() if isinstance(item, torch.Tensor) else item.capacity
    own = sum(pieces.values()) - (trajectory if way == "value_and_grad" else 0)
    assert 0 < own < 1.5 * trajectory + 64 * 2**20


@pytest.mark.parametrize("flow", ["R", "C"])
def test_pure_warp_on_a_tape_and_in_a_graph(flow):
    """`Dense` inside the fused kernels: as the general backend gives, recorded or replayed with other weights."""
    results = {}
    for backend in ("fused", "general"):
        dense = Dense((5, 7, 7, 2), "elu", device="cpu", dtype=np.float64, seed=3)
        rollout = WarpRollout(SMALL, dense, STEPS, flow, on_divergence="ignore", backend=backend)
        x0 = wp.array(SMALL.sample(13, dtype=np.float64), device="cpu", requires_grad=True)
        tape = wp.Tape()

        def play(x0=x0, rollout=rollout, tape=tape):
            with tape:
                states, controls = rollout(x0)
                loss = SMALL.loss(states, controls, "every", control_cost=0.1)
            tape.backward(loss)
            return states, loss

        def numbers(states, loss, dense=dense, x0=x0):
            parts = {"states": states, "loss": loss, "lambda": x0.grad}
            parts |= {f"gradient {i}": p.grad for i, p in enumerate(dense.parameters)}
            return {name: torch.as_tensor(array.numpy().copy()) for name, array in parts.items()}

        recorded = numbers(*play())
        tape.reset()
        for array in (x0, *dense.parameters):
            array.grad.zero_()
        if backend == "general":
            for parameter in dense.parameters:
                parameter.assign(0.5 * parameter.numpy())
            results[backend] = recorded, numbers(*play())
            continue
        with wp.ScopedCapture(device="cpu") as capture:
            outputs = play()
        for parameter in dense.parameters:
            parameter.assign(0.5 * parameter.numpy())
        for _ in range(3):  # a graph leaves what one pass leaves, however often it runs
            for array in (x0, *dense.parameters):
                array.grad.zero_()
            tape.zero()
            wp.capture_launch(capture.graph)
        results[backend] = recorded, numbers(*outputs)
    for fused, general in zip(results["fused"], results["general"], strict=True):
        assert distance(fused, general) < 1e-10
    assert distance(*results["general"]) > 1e-3


def test_quantum_and_a_convolution():
    """The system whose steps are written for blocks of samples, with its own tail of samples."""
    system = Quantum(points=3, target=1)
    layers = [ToGrid(2), NN.Conv1d(2, 3, 2), NN.Tanh(), FromGrid(), NN.Linear(6, 1)]
    torch.manual_seed(0)
    module = NN.Sequential(*layers).double()
    for batch in (1, 8, 13):
        results = [run(system, module, batch, backend) for backend in ("fused", "general")]
        assert distance(*results) < 1e-10


def test_cart_pole():
    """The system with a step of many branches; also R and M are not the same here, or the flows prove nothing."""
    system = CartPole(poles=1)
    torch.manual_seed(0)
    module = NN.Sequential(NN.Linear(4, 7), NN.Tanh(), NN.Linear(7, 1)).double()
    results = [run(system, module, 5, backend) for backend in ("fused", "general")]
    assert distance(*results) < 1e-10
    flows = results[0]
    assert distance({"": flows[MODIFIED.name]}, {"": flows[REGULAR.name]}) > 1e-2
