"""Layers on a CPU: activations over the whole range of numbers, and no number written or read beside its place."""

import functools

import numpy as np
import pytest
import torch
import warp as wp

from tests.springs import Springs
from warp_phys.engine.phases import Seeds, Trajectory
from warp_phys.flow import agree, geometric, minmod
from warp_phys.programs import native_kernels, update_kernels
from warp_phys.programs.network import Network, Sweeps, address_array, run
from warp_phys.programs.operations import FUSED
from warp_phys.programs.program import PAD, Builder, Dense

EXACT = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": torch.nn.functional.elu,
    "silu": torch.nn.functional.silu,
}
# in float32, measured: the error of a value in units in the last place of the exact one for 1e-35 <= |z| <= 80 (the
# intermediate results of tanh underflow below), and the error of a slope
BOUNDS = {
    "identity": (0.0, 0.0),
    "relu": (0.0, 0.0),
    "tanh": (6.0, 8e-7),  # 4.5 and 5.1e-7; 5.1 and 6.1e-7 on a CPU that cannot multiply and add in one
    "sigmoid": (3.0, 1.2e-7),  # 2.2 and 8.9e-8
    "elu": (2.0, 6e-8),  # 1.4 and 5.0e-8
    "silu": (4.0, 1.2e-6),  # 2.7 and 9.8e-7
}


@functools.cache
def _kernel(real):
    """All activations as layers use them: whole vectors at a time, slopes by the value where that tells them."""
    scalar = "double" if real is wp.float64 else "float"
    code = "".join(
        f"""{{
            typedef warp_phys::{FUSED.get(name, name)} activation;
            for (int i = 0; i < z.shape[0]; i += warp_phys::Vector<{scalar}>::lanes) {{
                warp_phys::vector<{scalar}> slope, y = activation::value(warp_phys::load(z.data + i), slope);
                if constexpr (activation::of_value) slope = activation::slope(y);
                warp_phys::store(value.data + {row} * z.shape[0] + i, y);
                warp_phys::store(slopes.data + {row} * z.shape[0] + i, slope);
            }}
        }}"""
        for row, name in enumerate(EXACT)
    )

    @wp.func_native(code)
    def apply(z: wp.array[real], value: wp.array2d[real], slopes: wp.array2d[real]): ...

    @wp.kernel(module="unique", module_options=native_kernels.module_options())
    def activate(z: wp.array[real], value: wp.array2d[real], slopes: wp.array2d[real]):
        apply(z, value, slopes)

    return activate


def _apply(name, z, dtype):
    """Return the activation of z, and its slope there."""
    real = wp.float64 if dtype is np.float64 else wp.float32
    padded = np.zeros(-(-len(z) // PAD) * PAD, dtype)
    padded[: len(z)] = z
    value, slope = (wp.zeros((len(EXACT), len(padded)), dtype=real, device="cpu") for _ in range(2))
    wp.launch(_kernel(real), 1, [wp.array(padded, device="cpu")], [value, slope], device="cpu")
    row = list(EXACT).index(name)
    return value.numpy()[row, : len(z)], slope.numpy()[row, : len(z)]


def _exact(name, z):
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    y = EXACT[name](x)
    y.sum().backward()
    return y.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("name", EXACT)
def test_activations_in_float32(name):
    small = np.geomspace(1e-35, 80, 40001)
    z = np.concatenate([np.linspace(-80, 80, 160001), small, -small]).astype(np.float32)
    (value, slope), (exact, exact_slope) = _apply(name, z, np.float32), _exact(name, z)
    place = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    errors = float((np.abs(value - exact) / place).max()), float(np.abs(slope - exact_slope).max())
    assert errors[0] <= BOUNDS[name][0] and errors[1] <= BOUNDS[name][1]


@pytest.mark.parametrize("name", EXACT)
def test_activations_in_float64(name):
    small = np.geomspace(1e-300, 700, 4001)
    z = np.concatenate([np.linspace(-40, 40, 16001), small, -small])
    (value, slope), (exact, exact_slope) = _apply(name, z, np.float64), _exact(name, z)
    np.testing.assert_allclose(value, exact, rtol=1e-14, atol=2e-16)  # elu: e^z − 1, as everywhere in the engine
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-14, atol=4e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_activations_at_the_ends_of_the_range(name, dtype):
    """Zeros with their sign, denormals, infinities, nan, and numbers whose exponential is none."""
    z = np.array([0.0, -0.0, 1e-40, -1e-40, 1e38, -1e38, np.inf, -np.inf, np.nan], dtype)
    (value, slope), (exact, exact_slope) = _apply(name, z, dtype), _exact(name, z)
    assert np.isnan(value[-1])  # whatever the slope: the trajectory is refused
    finite = slice(0, 6)
    np.testing.assert_allclose(value[finite], exact[finite], rtol=1e-4 if dtype is np.float32 else 1e-14, atol=1e-18)
    np.testing.assert_allclose(slope[finite], exact_slope[finite], rtol=1e-6, atol=5e-7)
    np.testing.assert_array_equal(np.signbit(value[:2]), np.signbit(exact[:2]))
    assert value[6] == pytest.approx(exact[6], rel=5e-7)
    limit = 0.0 if name == "silu" else exact[7]  # torch says nan there: −inf times 0
    assert value[7] == pytest.approx(limit, abs=5e-7)


GUARD = 64
"""Numbers on either side of an array that must stay what they are."""

# inputs, the channels of their order, layers: positions, window, stride, outputs, activation, channels
CHAINS = {
    "few outputs": (5, 5, [(1, 5, 5, 3, "silu", 5), (1, 3, 3, 2, "tanh", 3)]),
    "several panels": (5, 5, [(1, 5, 5, 131, "sigmoid", 5), (1, 131, 131, 17, "silu", 131), (1, 17, 17, 2, "elu", 17)]),
    "windows that overlap": (24, 3, [(7, 6, 3, 17, "silu", 3), (2, 51, 51, 1, "elu", 17), (1, 2, 2, 9, "identity", 2)]),
    "windows with gaps": (24, 24, [(3, 8, 6, 4, "tanh", 2), (2, 4, 8, 20, "sigmoid", 4), (1, 40, 40, 9, "silu", 20)]),
}


class _Guarded:
    """Arrays between numbers that nothing may read or write: nan, which would show up in any sum."""

    def __init__(self, dtype):
        self.dtype, self.whole = dtype, []

    def array(self, values):
        values = np.asarray(values, self.dtype)
        whole = np.full(values.size + 2 * GUARD, np.nan, self.dtype)
        whole[GUARD:-GUARD] = values.ravel()
        self.whole.append(whole)
        inner = whole[GUARD:-GUARD].reshape(values.shape)
        real = wp.float64 if self.dtype is np.float64 else wp.float32
        return wp.array(ptr=inner.ctypes.data, shape=inner.shape, dtype=real, device="cpu", copy=False)

    def check(self):
        for whole in self.whole:
            assert np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all()
            assert np.isfinite(whole[GUARD:-GUARD]).all()


@pytest.mark.parametrize(("kept", "threads"), [(True, 1), (False, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("name", CHAINS)
def test_nothing_beside_the_arrays(name, kept, threads):
    """Every buffer has just the length that it is said to need; around it is nan, and stays."""
    inputs, channels, layers = CHAINS[name]
    builder, dtype, flows, steps = Builder(inputs), np.float64, 2, 11
    x, shapes = builder.gather([(0, k % channels * (inputs // channels) + k // channels) for k in range(inputs)]), []
    for positions, window, stride, outputs, activation, order in layers:
        slots = builder.slot(outputs * window), builder.slot(outputs)
        dense = Dense(positions, window, stride, outputs, *slots, False, order, activation)
        x = builder.add("dense", (x,), positions * outputs, tuple(dense))
        shapes += [(outputs, window), (outputs,)]
    program = builder.finish(x)
    system, batch = Springs(size=inputs, pushes=program.outputs), 13 if threads == 1 else 69
    guarded, network, generator = _Guarded(dtype), Network(program, wp.float64), np.random.default_rng(0)
    weights = [guarded.array(0.3 * generator.standard_normal(shape)) for shape in shapes]
    network.threads = threads
    assert len(network.shares(batch)) == threads
    network._packed = guarded.array(np.zeros(network.layout.packed[-1]))
    network._transposed = guarded.array(np.zeros(max(1, network.layout.transposed[-1])))
    states = guarded.array(np.zeros((steps + 1, batch, inputs)))
    states[0].assign(system.sample(batch, dtype=dtype))
    controls = guarded.array(np.zeros((steps, batch, program.outputs)))
    p = system.parameter_array(device="cpu", dtype=dtype)
    rows = guarded.array(np.zeros(network.row_count(controls, kept)))
    network.pack_launch(address_array([[array.ptr for array in weights]])).launch()
    run(network.unroll_launches(system, states, controls, p, rows, kept))
    again = rows if kept else guarded.array(np.zeros(network.scratch_count(controls)))
    seeds = Seeds(guarded.array(np.ones(states.shape)), guarded.array(np.ones(controls.shape)))
    adj_x, gates = guarded.array(np.ones((flows, batch, inputs))), guarded.array(np.ones((flows, steps, 2)))
    workspace = _Guards(guarded)
    gradients = network.gradients(flows, batch, workspace)
    adj_p = guarded.array(np.ones((flows, batch, len(system.parameter_names)))) if kept else None
    sweeps = Sweeps(system, Trajectory(states, controls, p), seeds, gates, adj_x, adj_p)
    run(network.sweep_launches(sweeps, again, kept, gradients, workspace))
    targets = [[guarded.array(np.zeros(array.shape)) for array in weights] for _ in range(flows)]
    for launch in network.unpack_launches(gradients, address_array([[a.ptr for a in row] for row in targets])):
        launch.launch()
    guarded.check()
    assert all(array.numpy().any() for row in targets for array in row)


class _Guards:
    """A workspace of guarded arrays."""

    def __init__(self, guarded):
        self.guarded = guarded

    def array(self, name, shape, dtype, device):
        return self.guarded.array(np.zeros(shape)) if dtype is wp.float64 else wp.zeros(shape, dtype, device)


@pytest.mark.parametrize("real", [wp.float32, wp.float64])
@pytest.mark.parametrize("rule", [agree, geometric, minmod])
def test_rules_of_agreement(rule, real):
    dtype = np.float32 if real is wp.float32 else np.float64
    least, most = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    special = np.array([0.0, -0.0, 1.0, -1.0, 2.5, -0.3, least, -least, most, -most, np.inf, -np.inf, np.nan], dtype)
    base, other = (grid.ravel() for grid in np.meshgrid(special, special))
    out = np.full(len(base) + 1, 7.0, dtype)
    addresses = wp.array([base.ctypes.data, other.ctypes.data, out.ctypes.data], dtype=wp.uint64, device="cpu")
    states, costs, loss, grad = (wp.zeros(shape, real, "cpu") for shape in ((1, 1, 1), (1, 1), 1, len(base)))
    nobody = wp.zeros((0, update_kernels.TENSOR), wp.uint64, "cpu"), wp.zeros(1, int, "cpu")  # no tensor to train
    groups, status = wp.zeros((0, update_kernels.GROUP), wp.float64, "cpu"), wp.zeros(1, int, "cpu")
    inputs = [states, states, 1, costs, 1.0, 0.0, addresses, 0.0, update_kernels.CLIPPING["none"], 1.0, *nobody, groups]
    wp.launch(update_kernels.finish_kernel(rule, False, False, real), 1, inputs, [status, loss, grad], device="cpu")
    assert status.numpy()[0] == 1
    with np.errstate(all="ignore"):
        expected = rule(base, other)
    np.testing.assert_allclose(out[:-1], expected, rtol=np.finfo(dtype).eps, atol=0.0)
    np.testing.assert_array_equal(grad.numpy(), out[:-1])
    assert out[-1] == 7.0


@pytest.mark.parametrize("either", [False, True])
@pytest.mark.parametrize("real", [wp.float32, wp.float64])
def test_a_rule_of_an_average(real, either):
    """Scaled to length 1 before it is averaged, however small or large; one that is not finite changes nothing."""
    dtype = np.float32 if real is wp.float32 else np.float64
    base, mean, out = np.array([1.0, -2.0, 3.0], dtype), np.zeros(3, dtype), np.zeros(3, dtype)
    states, costs, loss, grad = (wp.zeros(shape, real, "cpu") for shape in ((1, 1, 1), (1, 1), 1, 3))
    nobody = wp.zeros((0, update_kernels.TENSOR), wp.uint64, "cpu"), wp.zeros(1, int, "cpu")
    groups, status = wp.zeros((0, update_kernels.GROUP), wp.float64, "cpu"), wp.zeros(1, int, "cpu")
    expected, scales = np.zeros(3), (1.0, 1e-30, 0.0, np.nan, np.inf, 1e30)
    for i, scale in enumerate(scales):
        direction = np.array([3.0, 4.0, 0.0]) if i % 2 else np.array([0.0, -3.0, 4.0])
        with np.errstate(invalid="ignore"):
            other = (scale * direction).astype(dtype)
        if np.isfinite(scale):
            expected = 0.75 * expected + (0.25 * direction / 5.0 if scale else 0.0)
        addresses = [array.ctypes.data for array in (base, other, out, mean)]
        addresses = wp.array(addresses, dtype=wp.uint64, device="cpu")
        inputs = [states, states, 1, costs, 1.0, 0.0, addresses, 0.75, 0, 1.0, *nobody, groups]
        kernel = update_kernels.finish_kernel(agree, True, either, real)
        wp.launch(kernel, 1, inputs, [status, loss, grad], device="cpu")
        np.testing.assert_allclose(mean, expected, rtol=4 * np.finfo(dtype).eps, atol=0.0)
        agrees = np.sign(mean) == np.sign(base)
        if either and np.isfinite(scale):
            agrees |= np.sign(other) == np.sign(base)
        np.testing.assert_array_equal(out, np.where(agrees, base, 0.0))
