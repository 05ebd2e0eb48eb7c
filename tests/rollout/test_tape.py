"""The adjoint-override layer on a tape, and its agreement with the three phases."""

import subprocess
import sys

import numpy as np
import pytest
import warp as wp

from tests.springs import Springs
from tests.toy import TwoControls
from warp_phys import CartPole, Dense, Diverged, Rollout, gate
from warp_phys.core.arrays import parameter_numbers
from warp_phys.core.gate_kernels import gate_kernel
from warp_phys.flow import resolve

STEPS = 20
SYSTEMS = [CartPole(poles=2, dt=0.04), CartPole(poles=18, dt=0.04), TwoControls()]
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: str(system)[:18])
FLOWS = ["R", "M", "S", "N"]


class GatedTape:
    """An unrolling on a plain tape: two gates per step, the system's step kernel, the controller's layer kernels."""

    def __init__(self, system, controller, x0, when="every", control_cost=0.1):
        self.controller, self.x0 = controller, x0
        real, device = controller.real, controller.device
        self.alpha, self.beta = (wp.ones(1, dtype=real, device=device) for _ in range(2))
        make = {"dtype": real, "device": device, "requires_grad": True}
        self.states = wp.zeros((STEPS + 1, len(x0), system.state_size), **make)
        self.controls = wp.zeros((STEPS, len(x0), system.control_size), **make)
        with wp.Tape() as self.tape:
            wp.copy(self.states[0], x0)
            for n in range(STEPS):
                controller.evaluate(gate(self.states[n], self.beta), self.controls[n])
                system.step(gate(self.states[n], self.alpha), self.controls[n], self.states[n + 1])
            self.loss = system.loss(self.states, self.controls, when, control_cost)

    def run(self, flow):
        """Run the recorded tape backward with the gates of `flow`; return all gradients in one array."""
        self.alpha.fill_(resolve(flow).physics)
        self.beta.fill_(resolve(flow).controller)
        self.tape.zero()
        self.tape.backward(self.loss)
        return collect(self.controller, self.x0)


def collect(controller, x0):
    return np.concatenate([array.grad.numpy().ravel() for array in (*controller.parameters, x0)])


def make(system, device, dtype=np.float64, batch=5):
    controller = Dense((system.state_size, 9, 6, system.control_size), device=device, dtype=dtype, seed=4)
    x0 = wp.array(system.sample(batch, seed=2, dtype=dtype), device=device, requires_grad=True)
    return controller, x0


def phases(system, controller, x0, flow, backend="auto", when="every", control_cost=0.1):
    rollout = Rollout(system, controller, STEPS, flow, backend=backend)
    with wp.Tape() as tape:
        loss = system.loss(*rollout(x0), when, control_cost)
    tape.zero()
    tape.backward(loss)
    result = collect(controller, x0)
    tape.zero()
    return result


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@each_system
@pytest.mark.parametrize("backend", ["fused", "general"])
@pytest.mark.parametrize("flow", FLOWS)
def test_the_two_paths_agree(system, flow, backend, device):
    controller, x0 = make(system, device)
    expected = GatedTape(system, controller, x0).run(flow)
    assert relative(phases(system, controller, x0, flow, backend), expected) < 1e-10


@each_system
def test_one_recorded_tape_gives_every_flow(system, device):
    """And in any order, twice: nothing of one backward pass is left for the next."""
    controller, x0 = make(system, device)
    tape = GatedTape(system, controller, x0)
    first = [tape.run(flow) for flow in FLOWS]
    again = [tape.run(flow) for flow in reversed(FLOWS)][::-1]
    for i, (a, b) in enumerate(zip(first, again, strict=True)):
        np.testing.assert_array_equal(a, b)
        for other in first[:i]:
            assert relative(a, other) > 1e-3


@each_system
def test_combined_on_a_tape(system, device):
    controller, x0 = make(system, device)
    tape = GatedTape(system, controller, x0, "final", 0.0)
    modified, regular = tape.run("M"), tape.run("R")
    least, root = np.minimum(abs(modified), abs(regular)), np.sqrt(abs(modified)) * np.sqrt(abs(regular))
    for flow, size in (("C", abs(modified)), ("geometric", root), ("minmod", least)):
        combined = phases(system, controller, x0, flow, when="final", control_cost=0.0)
        expected = np.where(np.sign(modified) == np.sign(regular), np.sign(modified) * size, 0.0)
        assert relative(combined, expected) < 1e-10


@pytest.mark.parametrize("flow", ["R", "C"])
def test_backward_passes_add_up_until_the_tape_is_zeroed(flow, device):
    """Two tapes' worth on one parameter: C of the sums of M and R, not the sum of two C."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device, batch=6)
    rollout = Rollout(system, controller, 3 * STEPS, flow)
    with wp.Tape() as tape:
        loss = system.loss(*rollout(x0))
    tape.backward(loss)
    once = collect(controller, x0)[: -x0.size]
    tape.backward(loss)
    twice = collect(controller, x0)[: -x0.size]
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-12)
    tape.zero()
    tape.backward(loss)
    np.testing.assert_allclose(collect(controller, x0)[: -x0.size], once, rtol=1e-12)


def test_rollouts_of_one_controller_share_their_sums(device):
    """Two calls on one tape, or two rollouts: C of the sums of M and R."""
    system = SYSTEMS[0]
    controller, _ = make(system, device)
    starts = [wp.array(system.sample(5, seed, np.float64), device=device) for seed in (1, 2)]

    def update(flow, rollouts, starts):
        for array in controller.parameters:
            array.grad.zero_()
        with wp.Tape() as tape:
            losses = [system.loss(*rollout(x0)) for rollout, x0 in zip(rollouts, starts, strict=True)]
        tape.zero()
        tape.backward(grads={loss: wp.ones(1, dtype=wp.float64, device=device) for loss in losses})
        result = np.concatenate([array.grad.numpy().ravel() for array in controller.parameters])
        tape.zero()
        return result

    one = {flow: Rollout(system, controller, 4 * STEPS, flow) for flow in "MRC"}
    base, other = (sum(update(flow, [one[flow]], [x0]) for x0 in starts) for flow in "MR")
    expected = np.where(np.sign(base) == np.sign(other), base, 0.0)
    assert relative(update("C", [one["C"]] * 2, starts), expected) < 1e-10
    twin = Rollout(system, controller, 4 * STEPS, "C")
    assert relative(update("C", [one["C"], twin], starts), expected) < 1e-10
    apart = sum(update("C", [one["C"]], [x0]) for x0 in starts)
    assert relative(apart, expected) > 1e-3  # the order of sums matters here, or this proves nothing


@pytest.mark.parametrize("rows", [1, 5])
def test_physical_parameters_and_a_strided_start(rows, device):
    """Against finite differences of the loss."""
    system = TwoControls()
    controller, x0 = make(system, device)
    wide = wp.zeros((5, 8), dtype=wp.float64, device=device, requires_grad=True)
    wide[:, ::2].assign(x0.numpy())
    stiffness = np.linspace(1.0, 2.0, rows)
    rollout = Rollout(system, controller, STEPS, "R")

    def loss(stiffness):
        p = system.parameter_array({"stiffness": stiffness}, device, np.float64, requires_grad=True)
        with wp.Tape() as tape:
            value = system.loss(*rollout(wide[:, ::2], p), "every")
        return tape, value, p

    tape, value, p = loss(stiffness)
    tape.backward(value)
    gradient = parameter_numbers(p).grad.numpy()[:, system.parameter_names.index("stiffness")]
    for i in range(rows):
        shift = 1e-6 * (np.arange(rows) == i)
        rate = (loss(stiffness + shift)[1].numpy()[0] - loss(stiffness - shift)[1].numpy()[0]) / 2e-6
        np.testing.assert_allclose(gradient[i], rate, rtol=1e-6)
    assert wide.grad.numpy()[:, ::2].any() and not wide.grad.numpy()[:, 1::2].any()


@pytest.mark.parametrize("part", [slice(0, 5), slice(1, 10, 2), slice(3, 4)])
@pytest.mark.parametrize("backend", ["fused", "general"])
def test_a_part_of_the_physical_parameters(part, backend, device):
    """Its adjoint lands where the part lies, nowhere else, and goes with `tape.zero`."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device)
    rollout = Rollout(system, controller, STEPS, "C", backend=backend)
    masses = np.linspace(0.08, 0.12, 10)
    whole, own = (
        system.parameter_array({"pole_mass": values}, device, np.float64, requires_grad=True)
        for values in (masses, masses[part])
    )
    trajectories, tapes = [], []
    for p in (whole[part], own):
        tapes.append(wp.Tape())
        with tapes[-1]:
            trajectories.append(rollout(x0, p))
            loss = system.loss(*trajectories[-1], "every")
        tapes[-1].backward(loss)
    np.testing.assert_array_equal(*(states.numpy() for states, _ in trajectories))
    numbers = parameter_numbers(whole)
    found, expected = numbers.grad.numpy(), np.zeros(numbers.shape)
    expected[part] = parameter_numbers(own).grad.numpy()
    assert expected[part].all(axis=0).any()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(parameter_numbers(whole[part]).numpy(), numbers.numpy()[part])
    tapes[0].zero()
    assert not numbers.grad.numpy().any()


def test_the_flow_changes_between_backward_passes(device):
    """One forward pass, then R, M, S, N, with the weights in place."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device)
    gated = GatedTape(system, controller, x0)
    expected = [gated.run(flow) for flow in FLOWS]
    rollout = Rollout(system, controller, STEPS, "R")
    with wp.Tape() as tape:
        loss = system.loss(*rollout(x0), "every", 0.1)
    for flow, right in zip(FLOWS, expected, strict=True):
        rollout.flow = flow
        tape.zero()
        tape.backward(loss)
        assert relative(collect(controller, x0), right) < 1e-10


def test_a_rollout_between_other_entries(device):
    """The caller's own kernels before and after: feedback passes through all of them."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device)
    raw = wp.array(0.5 * x0.numpy(), device=device, requires_grad=True)

    @wp.kernel(module="unique")
    def double(a: wp.array2d[wp.float64], b: wp.array2d[wp.float64]):
        i, j = wp.tid()
        b[i, j] = wp.float64(2.0) * a[i, j]

    rollout = Rollout(system, controller, STEPS, "R")
    with wp.Tape() as tape:
        start = wp.zeros_like(raw)
        wp.launch(double, dim=raw.shape, inputs=[raw], outputs=[start], device=device)
        loss = system.loss(*rollout(start), "every", 0.1)
    tape.backward(loss)
    expected = GatedTape(system, controller, x0).run("R")[-x0.size :]
    assert relative(raw.grad.numpy().ravel(), 2 * expected) < 1e-10


def test_captured_graph_of_gates(device):
    """Forward and backward captured once, replayed with other weights and other initial states."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device)
    recorded = GatedTape(system, controller, x0)
    expected = {flow: recorded.run(flow) for flow in FLOWS}  # also compiles everything that is captured
    with wp.ScopedCapture(device=device) as capture:
        recorded.tape.zero()
        recorded.tape.backward(recorded.loss)
    for flow in FLOWS:
        recorded.alpha.fill_(resolve(flow).physics)
        recorded.beta.fill_(resolve(flow).controller)
        wp.capture_launch(capture.graph)
        np.testing.assert_array_equal(collect(controller, x0), expected[flow])


@pytest.mark.parametrize("flow", ["R", "C"])
def test_captured_graph_of_a_rollout(flow, device):
    """The whole update as one graph: new initial states and new weights are read at replay."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device, np.float32)
    rollout = Rollout(system, controller, STEPS, flow, on_divergence="ignore")

    def update():
        with wp.Tape() as tape:
            loss = system.loss(*rollout(x0), "every", 0.1)
        tape.zero()
        tape.backward(loss)
        return tape, loss

    update()
    with wp.ScopedCapture(device=device) as capture:
        kept = update()  # its arrays must outlive the graph
    for seed in (5, 6):
        x0.assign(system.sample(len(x0), seed))
        weight = controller.parameters[0]
        weight.assign(weight.numpy() * 1.1)
        wp.capture_launch(capture.graph)
        replayed, loss = collect(controller, x0), float(kept[1].numpy()[0])
        _, again = update()
        assert loss == float(again.numpy()[0])
        np.testing.assert_array_equal(replayed, collect(controller, x0))


@pytest.mark.parametrize(("captured", "replayed"), [("M", "R"), ("R", "M"), ("S", "N"), ("N", "S")])
def test_captured_graph_follows_the_flow(captured, replayed, device):
    """Captured where one gate is closed, replayed where it is open."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device)
    expected = phases(system, controller, x0, replayed)
    rollout = Rollout(system, controller, STEPS, captured, on_divergence="ignore")
    with wp.Tape() as tape:
        loss = system.loss(*rollout(x0), "every", 0.1)
    tape.backward(loss)
    with wp.ScopedCapture(device=device) as capture:
        tape.zero()
        tape.backward(loss)
    rollout.flow = replayed
    wp.capture_launch(capture.graph)
    assert relative(collect(controller, x0), expected) < 1e-12


def test_a_flow_that_becomes_combined(device):
    """Recorded with R, run backward with C: zeroing the tape zeroes the sums, too."""
    system = SYSTEMS[0]
    controller, x0 = make(system, device)
    other = wp.array(system.sample(5, 7, np.float64), device=device)
    rollout = Rollout(system, controller, 4 * STEPS, "C")
    tapes = []
    for flow, begin in (("C", x0), ("R", other), ("R", x0)):
        rollout.flow = flow
        with wp.Tape() as tape:
            loss = system.loss(*rollout(begin))
        tapes.append((tape, loss))
    rollout.flow = "C"
    results = []
    for tape, loss in tapes:
        tape.backward(loss)
        results.append(np.concatenate([p.grad.numpy().ravel() for p in controller.parameters]))
        tape.zero()
    np.testing.assert_array_equal(results[2], results[0])
    assert relative(results[1], results[0]) > 1e-3


@wp.kernel(module="unique")
def wipe(y: wp.array3d[wp.float64]):
    n, i, j = wp.tid()
    y[n, i, j] = wp.float64(0.0)


@pytest.mark.parametrize("spoilt", [False, True])
def test_write_once(spoilt, device):
    """Warp's own check that no array that a tape has read is overwritten, in a process whose kernels it knows."""
    program = f"""
import warp as wp
wp.config.verify_autograd_array_access = True
from tests.rollout.test_tape import SYSTEMS, GatedTape, make, wipe
tape = GatedTape(SYSTEMS[2], *make(SYSTEMS[2], {str(device)!r}))
if {spoilt}:
    with tape.tape:
        wp.launch(wipe, tape.states.shape, outputs=[tape.states], device={str(device)!r})
tape.run("R")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ("read from" in ended.stderr + ended.stdout) == spoilt


@pytest.mark.parametrize("arrays", [2, 3])
@pytest.mark.parametrize("through", ["array", "gate"])
def test_an_overwritten_array_is_reported(through, arrays, device, monkeypatch, capsys):
    """That check sees through a gate; where it has nothing to report, it does not report the gate's own kernel."""

    @wp.kernel(module="unique")
    def square(x: wp.array2d[float], y: wp.array2d[float]):
        i, j = wp.tid()
        y[i, j] = x[i, j] * x[i, j]

    monkeypatch.setattr(wp.config, "verify_autograd_array_access", True)
    for module in (square.module, gate_kernel(2, wp.float32).module):
        module.mark_modified()  # what the check knows of a kernel, it learns when the kernel is built
    states = [wp.ones((2, 3), dtype=float, device=device, requires_grad=True) for _ in range(arrays)]
    with wp.Tape() as tape:
        for n in range(2):
            x = states[n] if through == "array" else gate(states[n], 1.0)
            wp.launch(square, x.shape, inputs=[x], outputs=[states[(n + 1) % arrays]], device=device)
    tape.backward(grads={states[2 % arrays]: wp.ones((2, 3), dtype=float, device=device)})
    messages = capsys.readouterr().err
    assert messages.count("kernel square") == messages.count("read from") == (1 if arrays == 2 else 0)


@pytest.mark.parametrize("dtype", [wp.float32, wp.vec3, wp.mat22, wp.float64, wp.vec3d])
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_gate_on_any_array(dtype, shape, device):
    real = getattr(dtype, "_wp_scalar_type_", dtype)
    x = wp.ones(shape, dtype=dtype, device=device, requires_grad=True)
    weight = wp.array([0.0, 1.0, 2.0, -0.5], dtype=real, device=device)
    with wp.Tape() as tape:
        y = gate(x, weight)
    assert y.ptr == x.ptr and y.shape == x.shape and y.grad.ptr != x.grad.ptr
    adj = np.random.default_rng(0).standard_normal(y.numpy().shape)
    tape.backward(grads={y: wp.array(adj, dtype=dtype, device=device)})
    expected = weight.numpy().reshape(-1, *(1,) * (adj.ndim - 1)) * adj
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-6)
    assert not y.grad.numpy().any()


def test_gate_on_a_strided_view(device):
    base = wp.zeros((4, 6), dtype=float, device=device, requires_grad=True)
    with wp.Tape() as tape:
        y = gate(base[:, ::2], 0.5)
    tape.backward(grads={y: wp.ones(y.shape, dtype=float, device=device)})
    np.testing.assert_array_equal(base.grad.numpy(), np.tile([0.5, 0.0], (4, 3)))


def test_a_closed_gate_stops_infinite_adjoints(device):
    x = wp.ones(2, dtype=float, device=device, requires_grad=True)
    with wp.Tape() as tape:
        y = gate(x, 0.0)
    tape.backward(grads={y: wp.array([np.inf, np.nan], dtype=float, device=device)})
    np.testing.assert_array_equal(x.grad.numpy(), [0.0, 0.0])


def test_gate_errors(device):
    x = wp.ones(3, dtype=float, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="inside a wp.Tape"):
        gate(x, 1.0)
    with wp.Tape():
        with pytest.raises(ValueError, match="requires_grad=True"):
            gate(wp.ones(3, dtype=float, device=device), 1.0)
        with pytest.raises(TypeError, match="x must be a warp array, got ndarray"):
            gate(np.ones(3), 1.0)
        with pytest.raises(TypeError, match="float32 or float64"):
            gate(wp.ones(3, dtype=int, device=device), 1.0)
        with pytest.raises(ValueError, match=r"weight must have shape \(1,\) or \(3,\), one per row of x, got \(2,\)"):
            gate(x, wp.ones(2, dtype=float, device=device))
        with pytest.raises(TypeError, match="weight must hold float32 as x does, got float64"):
            gate(x, wp.ones(1, dtype=wp.float64, device=device))


def test_diverged_in_pure_warp(device):
    system = CartPole(dt=0.01)
    controller, x0 = make(system, device, np.float32)
    controller.parameters[-1].fill_(float("inf"))
    with pytest.raises(Diverged, match="at step 1; 5 sample") as caught:
        Rollout(system, controller, STEPS)(x0)
    assert caught.value.step == 1 and caught.value.samples == (0, 1, 2, 3, 4)


def test_warps_switch_for_backward_passes(device, monkeypatch):
    """Kernels that a tape runs backward are compiled for that, whatever Warp's switch says when they are made."""
    monkeypatch.setattr(wp.config, "enable_backward", False)
    system = Springs(size=3, pushes=1)  # no other test has its kernels
    make = {"dtype": wp.float64, "device": device, "requires_grad": True}
    states, controls = wp.zeros((2, 4, 3), **make), wp.zeros((1, 4, 1), **make)
    states[0].assign(system.sample(4, 0, np.float64))
    with wp.Tape() as tape:
        system.step(states[0], controls[0], states[1])
        loss = system.loss(states, controls, "final", 0.1)
    tape.backward(loss)
    assert np.abs(controls.grad.numpy()).min() > 0.0 and np.abs(states.grad.numpy()[0]).max() > 0.0
