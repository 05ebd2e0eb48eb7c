"""Chains of layers by the kernels of CUDA, run on a CPU: one thread a block, and many that wait for one another.

tests/programs/test_blocks.py has other programs.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warp as wp

import warp_phys
from controllers import MLP, GridCNN
from tests.programs.running import Guarded
from tests.springs import Springs
from warp_phys import CartPole, Quantum, Repulsion
from warp_phys.core import kernels
from warp_phys.engine import phases
from warp_phys.interop.torch import Rollout
from warp_phys.programs.block_network import BlockNetwork
from warp_phys.programs.block_plan import is_shared, layer_parts, thread_count
from warp_phys.programs.program import Builder, Dense, chain

EXACT = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1.0 / (1.0 + np.exp(-z)),
    "elu": lambda z: np.where(z < 0.0, np.exp(np.minimum(z, 0.0)) - 1.0, z),
    "silu": lambda z: z / (1.0 + np.exp(-z)),
}


def layers(inputs, channels, *numbers):
    """Return a chain of layers on a grid; of each layer positions, window, stride, outputs, activation, channels."""
    build = Builder(inputs)
    x = build.gather([(0, k % channels * (inputs // channels) + k // channels) for k in range(inputs)])
    for positions, window, stride, outputs, activation, order in numbers:
        slots = build.slot(outputs * window), build.slot(outputs)
        dense = Dense(positions, window, stride, outputs, *slots, False, order, activation)
        x = build.add("dense", (x,), positions * outputs, tuple(dense))
    return build.finish(x)


CHAINS = {
    "no hidden layer": chain((5, 2), "identity"),
    "one number": chain((1, 1), "identity"),
    "one hidden layer": chain((5, 7, 3), "relu"),
    "sums in parts": chain((37, 33, 19, 2), "tanh"),
    "more outputs than threads": chain((5, 131, 270, 2), "sigmoid"),
    "windows that overlap": layers(24, 3, (7, 6, 3, 17, "silu", 3), (2, 51, 51, 1, "elu", 17), (1, 2, 2, 9, "silu", 2)),
    "windows with gaps": layers(
        24, 24, (3, 8, 6, 4, "tanh", 2), (2, 4, 8, 20, "sigmoid", 4), (1, 40, 40, 9, "elu", 20)
    ),
    "windows in parts": layers(24, 24, (2, 16, 8, 3, "tanh", 4), (1, 6, 6, 2, "identity", 3)),
}
STEPS = 4


def _weights(program, generator):
    """Return weights and biases of a size that leaves no activation in its linear range; the first bias is none."""
    arrays = []
    for dense in (Dense(*program.nodes[i].numbers) for i in program.readers):
        arrays.append(generator.standard_normal((dense.outputs, dense.window)) * 1.5 / dense.window**0.5)
        arrays.append(generator.standard_normal(dense.outputs) * 0.5 if len(arrays) > 1 else None)
    return arrays


def _outputs(program, weights, x):
    """Return what the layers make of the rows x, in float64."""
    level, left = x, iter(weights)
    for node in program.nodes[1:]:
        if node.operation == "gather":
            level = level[:, [k for _, k in node.numbers]]
            continue
        layer, weight, bias = Dense(*node.numbers), next(left), next(left)
        k = np.arange(layer.window)
        matrix = weight[:, k % layer.channels * (layer.window // layer.channels) + k // layer.channels]
        windows = [level[:, j * layer.stride : j * layer.stride + layer.window] for j in range(layer.positions)]
        sums = np.stack(windows, axis=1) @ matrix.T + (0.0 if bias is None else bias)
        level = EXACT[layer.activation](sums).reshape(len(x), -1)
    return level


@pytest.fixture(params=[1, None], ids=["one-thread", "all-threads"])
def threads(request, monkeypatch):
    """One thread a block, or as many as on CUDA."""
    monkeypatch.setattr(wp.config, "enable_cpu_blocks", request.param is None)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 3e-6)])
@pytest.mark.parametrize("name", CHAINS)
def test_layers(name, dtype, tolerance, threads):
    """Controls against numpy, states against controls; around every array is nan, and in scratch."""
    program, generator = CHAINS[name], np.random.default_rng(0)
    system, weights = Springs(size=program.inputs, pushes=program.outputs), _weights(program, generator)
    weights = [None if w is None else w.astype(dtype) for w in weights]
    for samples, batch in ((1, 3), (3, 5), (4, 1), (4, 17), (8, 8), (8, 17)):
        guarded = Guarded(dtype)
        network = BlockNetwork(program, guarded.real, "cpu")
        network._array = lambda name, length, guarded=guarded: guarded.values(np.full(length, np.nan))
        arrays = [None if w is None else guarded.values(w) for w in weights]
        states = guarded.values(np.full((STEPS + 1, batch, program.inputs), np.nan))
        states[0].assign(system.sample(batch, seed=batch, dtype=dtype))
        controls = guarded.values(np.full((STEPS, batch, program.outputs), np.nan))
        p = system.parameter_array({"gain": np.linspace(0.2, 0.9, batch)}, device="cpu", dtype=dtype)
        addresses = [0 if array is None else array.ptr for array in arrays]
        network.unroll(addresses, system, states, controls, p, samples)
        guarded.check()
        rows = states.numpy()[:-1].reshape(STEPS * batch, -1).astype(np.float64)
        exact = _outputs(program, [None if w is None else w.astype(np.float64) for w in weights], rows)
        np.testing.assert_allclose(controls.numpy().reshape(exact.shape), exact, rtol=tolerance, atol=tolerance)
        again = wp.clone(states)
        wp.launch(kernels.trajectory_kernel(system.structure, states.dtype), batch, [controls, p, again], device="cpu")
        np.testing.assert_allclose(states.numpy(), again.numpy(), rtol=tolerance, atol=tolerance)


SYSTEMS = {
    "cart-pole": (CartPole(poles=2, dt=0.02), lambda s: MLP(s, (20, 33), "tanh", seed=0)),
    "repulsion": (Repulsion(), lambda s: MLP(s, (21,), "silu", seed=0)),
    "springs": (Springs(size=5, pushes=2), lambda s: MLP(s, (9,), "elu", seed=0)),
    "quantum": (Quantum(), lambda s: GridCNN(s, channels=11, seed=0)),
}


def _update(name, dtype, batch, fused, monkeypatch):
    """Return states, controls, λ_0 and updates of a rollout, in float64."""
    system, make = SYSTEMS[name]
    rollout = Rollout(system, make(system).to(dtype), 11, "C", backend="fused" if fused else "general")
    rollout.observe = ("R", "M")
    monkeypatch.setattr(rollout._adapter, "_on_cpu", lambda: False)  # what a CUDA device does otherwise
    x0 = torch.as_tensor(system.sample(batch, seed=batch, dtype=np.float64)).to(dtype).requires_grad_()
    states, controls = rollout(x0)
    system.loss(states, controls, "every").backward()
    assert fused == (rollout._adapter._blocks is not None)
    return [a.detach().double() for a in (states, controls, x0.grad, *rollout.report.updates)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_systems(name, dtype, tolerance, threads, monkeypatch):
    """Modules of torch against the general path, by the kernels of their programs there and back.

    In float32 both are held against the general path in float64, as in tests/interop/test_fused.py; the adjoints of
    Crank–Nicolson steps lose two digits there (measured: 1.4e-4 on either path).
    """
    of_adjoints = 50 * tolerance if name == "quantum" and dtype == torch.float32 else tolerance
    for batch in (5, 17):
        exact = _update(name, torch.float64, batch, False, monkeypatch)
        for fused in (True, False):
            found = _update(name, dtype, batch, fused, monkeypatch)
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
            assert max(errors[:2]) < tolerance and max(errors[2:]) < of_adjoints


def test_dense_layers_of_warps(threads):
    """`Dense` as it unrolls on CUDA, with parameters that are not contiguous and change."""
    system, generator = CartPole(poles=2, dt=0.02), np.random.default_rng(0)
    whole = wp.array(generator.standard_normal((14, 12)), dtype=wp.float64, device="cpu")
    bias, last = (wp.array(generator.standard_normal(shape), device="cpu") for shape in (7, (1, 7)))
    parameters = [whole[::2, ::2], bias, last, bias[:1]]
    assert not parameters[0].is_contiguous
    block, plain = (warp_phys.Dense((6, 7, 1), parameters=parameters) for _ in range(2))
    block._network, block._blocks = None, BlockNetwork(chain((6, 7, 1), "tanh"), wp.float64, "cpu")
    assert block.fits(system) and not block.sweeps(system) and plain.sweeps(system)
    for factor in (1.0, -0.5):
        whole.assign(factor * whole.numpy())
        found = []
        for controller, fused in ((block, True), (plain, True), (plain, False)):
            states, controls = (wp.zeros((n, 5, m), wp.float64, device="cpu") for n, m in ((11, 6), (10, 1)))
            states[0].assign(system.sample(5, dtype=np.float64))
            p = system.check_parameters(None, states, 5)
            phases.forward(system, controller, states, controls, p, fused)
            found.append((states.numpy(), controls.numpy()))
        for a, b, exact in zip(*found, strict=True):
            np.testing.assert_allclose(a, exact, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(b, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["fused", "general"])
def test_a_graph_of_dense_layers_that_are_not_contiguous(backend):
    """A captured rollout follows their numbers."""
    system, generator = CartPole(poles=2, dt=0.02), np.random.default_rng(0)
    whole = wp.array(generator.standard_normal((14, 12)), dtype=wp.float64, device="cpu")
    biases, last = (wp.array(generator.standard_normal(shape), device="cpu") for shape in (14, (1, 7)))
    parameters = [whole[::2, ::2], biases[::2], last, biases[:1]]
    assert not parameters[0].is_contiguous and not parameters[1].is_contiguous
    rollout = warp_phys.Rollout(
        system, warp_phys.Dense((6, 7, 1), parameters=parameters), steps=10, on_divergence="ignore", backend=backend
    )
    x0 = wp.array(system.sample(5, dtype=np.float64), device="cpu")
    rollout(x0)
    with wp.ScopedCapture(device="cpu") as capture:
        states, _ = rollout(x0)
    for factor in (1.0, -0.5):
        whole.assign(factor * whole.numpy())
        biases.assign(factor * biases.numpy())
        wp.capture_launch(capture.graph)
        found = states.numpy().copy()
        np.testing.assert_allclose(found, rollout(x0)[0].numpy(), rtol=1e-12, atol=1e-14)
        assert found[-1].std() > 0.1


def test_blocks_for_a_batch():
    """One sample a block while there is a multiprocessor for each, then more; never more than a block has room for."""
    network = BlockNetwork(chain((10, 100, 100, 1), "tanh"), wp.float32, "cpu")
    network.device = SimpleNamespace(sm_count=108)
    assert [network.samples(batch) for batch in (1, 108, 109, 400, 864, 100_000)] == [1, 1, 2, 4, 8, 8]


def test_memory_of_a_multiprocessor():
    """The networks of the published experiments fit in float32; what does not fit has memory of its own."""
    dense = chain((10, 100, 100, 1), "tanh")
    convolutions = layers(
        64, 64, (15, 6, 4, 60, "tanh", 2), (7, 180, 120, 60, "tanh", 60), (1, 420, 420, 1, "identity", 60)
    )
    assert [node.size for node in convolutions.nodes] == [64, 900, 420, 1]
    assert is_shared(dense, wp.float64, 8) and is_shared(convolutions, wp.float32, 8)
    assert not is_shared(convolutions, wp.float64, 8)
    assert thread_count(dense) == 224 and [layer_parts(dense, i) for i in (1, 2, 3)] == [(1, 8), (2, 2), (8, 1)]
