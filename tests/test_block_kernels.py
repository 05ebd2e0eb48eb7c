"""The fused unrolling of CUDA, run on a CPU: one thread a block, and blocks of many threads that wait for one another.

Warp runs the threads of a block on a CPU one by one from barrier to barrier, the first thread first: one that is ahead
reads nan where it should have waited.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warp as wp

import warp_phys
from controllers import MLP, GridCNN
from tests.springs import Springs
from warp_phys import CartPole, Dense, Quantum, Repulsion
from warp_phys.core import kernels
from warp_phys.core.arrays import CACHE_LINE
from warp_phys.engine import phases
from warp_phys.interop.torch import Rollout
from warp_phys.programs import block_plan
from warp_phys.programs.block_network import BlockNetwork
from warp_phys.programs.plan import Layer, Plan, dense_plan

EXACT = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1.0 / (1.0 + np.exp(-z)),
    "elu": lambda z: np.where(z < 0.0, np.exp(np.minimum(z, 0.0)) - 1.0, z),
    "silu": lambda z: z / (1.0 + np.exp(-z)),
}
PLANS = {
    "no hidden layer": dense_plan((5, 2), "identity"),
    "one number": dense_plan((1, 1), "identity"),
    "one hidden layer": dense_plan((5, 7, 3), "relu"),
    "sums in parts": dense_plan((37, 33, 19, 2), "tanh"),
    "more outputs than threads": dense_plan((5, 131, 270, 2), "sigmoid"),
    "windows that overlap": Plan(
        24, 3, (Layer(7, 6, 3, 17, "silu", 3), Layer(2, 51, 51, 1, "elu", 17), Layer(1, 2, 0, 9, "silu", 2))
    ),
    "windows with gaps": Plan(
        24, 24, (Layer(3, 8, 6, 4, "tanh", 2), Layer(2, 4, 8, 20, "sigmoid", 4), Layer(1, 40, 0, 9, "elu", 20))
    ),
    "windows in parts": Plan(24, 24, (Layer(2, 16, 8, 3, "tanh", 4), Layer(1, 6, 0, 2, "identity", 3))),
}
STEPS = 4
GUARD = 64
"""Numbers on either side of an array that must stay what they are."""


class _Guarded:
    """Arrays between nans, which nothing may write, and which would show up in any sum; aligned as Warp's are."""

    def __init__(self, dtype):
        self.dtype, self.real, self.all = dtype, wp.dtype_from_numpy(dtype), []

    def array(self, values):
        values = np.asarray(values, self.dtype)
        whole = np.full(values.size + 3 * GUARD, np.nan, self.dtype)
        whole = whole[-whole.ctypes.data % CACHE_LINE // whole.itemsize :][: values.size + 2 * GUARD]
        whole[GUARD : GUARD + values.size] = values.ravel()
        inner = whole[GUARD : GUARD + values.size].reshape(values.shape)
        self.all.append(whole)
        return wp.array(ptr=inner.ctypes.data, shape=inner.shape, dtype=self.real, device="cpu", copy=False)

    def check(self):
        assert all(np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all() for whole in self.all)


def _weights(plan, generator):
    """Return weights and biases of a size that leaves no activation in its linear range; the first bias is none."""
    arrays = []
    for layer in plan.layers:
        arrays.append(generator.standard_normal((layer.outputs, layer.window)) * 1.5 / layer.window**0.5)
        arrays.append(generator.standard_normal(layer.outputs) * 0.5 if len(arrays) > 1 else None)
    return arrays


def _levels(plan, weights, x):
    """Return what each layer makes of the rows x, in float64."""
    k = np.arange(plan.inputs)
    level, levels = x[:, k % plan.channels * (plan.inputs // plan.channels) + k // plan.channels], []
    for layer, weight, bias in zip(plan.layers, weights[::2], weights[1::2], strict=True):
        k = np.arange(layer.window)
        matrix = weight[:, k % layer.channels * (layer.window // layer.channels) + k // layer.channels]
        windows = [level[:, j * layer.stride : j * layer.stride + layer.window] for j in range(layer.positions)]
        sums = np.stack(windows, axis=1) @ matrix.T + (0.0 if bias is None else bias)
        level = EXACT[layer.activation](sums).reshape(len(x), -1)
        levels.append(level)
    return levels


@pytest.fixture(params=[1, None], ids=["one-thread", "all-threads"])
def threads(request, monkeypatch):
    """One thread a block, or as many as on CUDA."""
    monkeypatch.setattr(wp.config, "enable_cpu_blocks", request.param is None)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 3e-6)])
@pytest.mark.parametrize("name", PLANS)
def test_layers(name, dtype, tolerance, threads):
    """Controls and activations against numpy, states against controls; around every array is nan, and in scratch."""
    plan, generator = PLANS[name], np.random.default_rng(0)
    system, weights = Springs(size=plan.inputs, pushes=plan.outputs), _weights(plan, generator)
    weights = [None if w is None else w.astype(dtype) for w in weights]
    for samples, batch in ((1, 3), (3, 5), (4, 1), (4, 17), (8, 8), (8, 17)):
        guarded = _Guarded(dtype)
        network = BlockNetwork(plan, guarded.real, "cpu")
        network._array = lambda name, length, guarded=guarded: guarded.array(np.full(length, np.nan))
        arrays = [None if w is None else guarded.array(w) for w in weights]
        states = guarded.array(np.full((STEPS + 1, batch, plan.inputs), np.nan))
        states[0].assign(system.sample(batch, seed=batch, dtype=dtype))
        controls = guarded.array(np.full((STEPS, batch, plan.outputs), np.nan))
        starts = block_plan.kept_starts(plan)
        kept = guarded.array(np.full(STEPS * batch * starts[-1], np.nan)) if samples != 3 else None
        p = system.parameter_array({"gain": np.linspace(0.2, 0.9, batch)}, device="cpu", dtype=dtype)
        addresses = [0 if array is None else array.ptr for array in arrays]
        network.unroll(addresses, system, states, controls, p, kept, samples)
        guarded.check()
        rows = states.numpy()[:-1].reshape(STEPS * batch, -1).astype(np.float64)
        exact = _levels(plan, [None if w is None else w.astype(np.float64) for w in weights], rows)
        for i, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True) if kept is not None else ()):
            found = kept.numpy()[STEPS * batch * start : STEPS * batch * stop].reshape(STEPS * batch, -1)
            np.testing.assert_allclose(found, exact[i], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(controls.numpy().reshape(exact[-1].shape), exact[-1], rtol=tolerance, atol=tolerance)
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
    kept = states.grad_fn.kept
    assert (kept is not None) == (fused and name in ("cart-pole", "springs"))
    system.loss(states, controls, "every").backward()
    assert fused == (rollout._adapter._blocks is not None)
    return [a.detach().double() for a in (states, controls, x0.grad, *rollout.report.updates)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_systems(name, dtype, tolerance, threads, monkeypatch):
    """Modules of torch against the general path, and the backward pass with the activations that were kept.

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
    block, plain = Dense((6, 7, 1), parameters=parameters), Dense((6, 7, 1), parameters=parameters)
    block._network, block._blocks = None, BlockNetwork(dense_plan((6, 7, 1), "tanh"), wp.float64, "cpu")
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
        system, Dense((6, 7, 1), parameters=parameters), steps=10, on_divergence="ignore", backend=backend
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
    network = BlockNetwork(dense_plan((10, 100, 100, 1), "tanh"), wp.float32, "cpu")
    network.device = SimpleNamespace(sm_count=108)
    assert [network.samples(batch) for batch in (1, 108, 109, 400, 864, 100_000)] == [1, 1, 2, 4, 8, 8]


def test_memory_of_a_multiprocessor():
    """The networks of the published experiments fit in float32; what does not fit has memory of its own."""
    dense, grid = dense_plan((10, 100, 100, 1), "tanh"), (64, 900, 420, 1)
    layers = Layer(15, 6, 4, 60, "tanh", 2), Layer(7, 180, 120, 60, "tanh", 60), Layer(1, 420, 0, 1, "identity", 60)
    assert grid == (64, *(a.positions * a.outputs for a in layers))
    plan = Plan(64, 64, layers)
    assert block_plan.is_shared(dense, wp.float64) and block_plan.is_shared(plan, wp.float32)
    assert not block_plan.is_shared(plan, wp.float64)
    assert block_plan.thread_count(dense) == 224 and [block_plan.part_count(dense, i) for i in range(3)] == [1, 2, 8]
