"""`step` and `step_vjp` inside a caller's Warp program: its arrays, device, stream, tape, graph, memory and state."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warp as wp

from tests.problems import Problem
from tests.toy import TwoControls
from warp_phys import CartPole
from warp_phys.core.arrays import parameter_numbers

ROOT = Path(__file__).parents[2]
PROBLEMS = [Problem(CartPole(poles=1)), Problem(TwoControls(), kick=0.5)]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem.system).__name__)
on_cuda = pytest.mark.skipif(not wp.get_cuda_devices(), reason="needs a CUDA device")
NAMES = ("x", "c", "adj_y", "y", "adj_x", "adj_c")


def numbers(problem):
    """The arguments x, c, adj_y, and room for y, adj_x, adj_c: float64."""
    x, c = problem.states(), problem.controls()
    adj_y = np.random.default_rng(9).standard_normal(x.shape)
    room = [np.full(a.shape, 7.0) for a in (x, x, c)]
    return dict(zip(NAMES, (x, c, adj_y, *room), strict=True))


def arrays(problem, device):
    return {name: wp.array(value, dtype=wp.float64, device=device) for name, value in numbers(problem).items()}


def both(system, a, parameters=None, adj_parameters=None):
    """One step and its vector-Jacobian product on the arrays of a dictionary."""
    system.step(a["x"], a["c"], a["y"], parameters)
    system.step_vjp(a["x"], a["c"], a["adj_y"], a["adj_x"], a["adj_c"], parameters, adj_parameters)


def expected(problem, device):
    a = arrays(problem, device)
    both(problem.system, a)
    return {name: array.numpy() for name, array in a.items()}


def rows_of_a_larger_array(value, device):
    wide = np.full((2 * len(value) + 1, value.shape[1]), np.nan)
    wide[1::2] = value
    base = wp.array(wide, dtype=wp.float64, device=device)
    return base, base[1::2]


def columns_of_a_larger_array(value, device):
    wide = np.full((len(value), 3 * value.shape[1] + 2), np.nan)
    wide[:, 2::3] = value
    base = wp.array(wide, dtype=wp.float64, device=device)
    return base, base[:, 2::3]


def components_first(value, device):
    base = wp.array(np.ascontiguousarray(value.T), dtype=wp.float64, device=device)
    return base, base.transpose((1, 0))


def one_time_of_a_trajectory(value, device):
    base = wp.array(np.stack([np.full_like(value, np.nan), value]), dtype=wp.float64, device=device)
    return base, base[1]


VIEWS = [rows_of_a_larger_array, columns_of_a_larger_array, components_first, one_time_of_a_trajectory]


@each_problem
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views(problem, view, device):
    """Any strides, read and written; what lies between stays as it was."""
    made = {name: view(value, device) for name, value in numbers(problem).items()}
    before = {name: base.numpy().copy() for name, (base, _) in made.items()}
    both(problem.system, {name: array for name, (_, array) in made.items()})
    for name, right in expected(problem, device).items():
        base, array = made[name]
        np.testing.assert_array_equal(array.numpy(), right)
        untouched = np.isnan(before[name])
        np.testing.assert_array_equal(np.isnan(base.numpy()), untouched)


@each_problem
def test_one_state_for_all_and_in_place(problem, device):
    """A view that repeats a row is read; y may be x where no tape records, adj_x may be adj_y."""
    system, a = problem.system, arrays(problem, device)
    one = a["x"][:1]
    layout = {"shape": a["x"].shape, "strides": (0, 8), "dtype": wp.float64, "device": device}
    system.step(wp.array(ptr=one.ptr, **layout), a["c"], a["y"])
    copies = wp.array(np.repeat(one.numpy(), problem.batch, 0), dtype=wp.float64, device=device)
    again = wp.zeros_like(a["y"])
    system.step(copies, a["c"], again)
    np.testing.assert_array_equal(a["y"].numpy(), again.numpy())

    right, a = expected(problem, device), arrays(problem, device)
    system.step_vjp(a["x"], a["c"], a["adj_y"], a["adj_y"], a["adj_c"])
    system.step(a["x"], a["c"], a["x"])
    np.testing.assert_array_equal(a["adj_y"].numpy(), right["adj_x"])
    np.testing.assert_array_equal(a["x"].numpy(), right["y"])


def test_the_arrays_device_counts(device):
    """Not the current one; and an array from elsewhere is refused."""
    problem = PROBLEMS[0]
    right = expected(problem, device)
    for current in ["cpu", *wp.get_cuda_devices()]:
        with wp.ScopedDevice(current):
            a = arrays(problem, device)
            both(problem.system, a)
            for name in NAMES:
                assert a[name].device == wp.get_device(device)
                np.testing.assert_array_equal(a[name].numpy(), right[name])


@on_cuda
@each_problem
def test_the_callers_stream(problem):
    """Work goes to the current stream of the device alone, in order with the caller's own kernels there."""
    device, system = wp.get_cuda_devices()[0], problem.system
    right = expected(problem, device)

    @wp.kernel(module="unique", enable_backward=False)
    def wait_and_copy(source: wp.array2d[wp.float64], turns: int, target: wp.array2d[wp.float64]):
        i, j = wp.tid()
        total = wp.float64(0.0)
        for n in range(turns):  # long enough for whatever does not wait to be seen
            total += wp.sin(wp.float64(n))
        target[i, j] = source[i, j] + wp.float64(1e-300) * total

    a = arrays(problem, device)
    kept, late = wp.clone(a["x"]), wp.full(a["x"].shape, 3.0, dtype=wp.float64, device=device)
    both(system, {**a, "x": kept})  # everything is loaded now
    wp.launch(wait_and_copy, dim=kept.shape, inputs=[kept, 1], outputs=[late], device=device)
    wp.synchronize_device(device)
    late.fill_(3.0)
    stream = wp.Stream(device)
    wp.synchronize_device(device)
    with wp.ScopedStream(stream, sync_enter=False):
        wp.launch(wait_and_copy, dim=kept.shape, inputs=[kept, 2_000_000], outputs=[late], device=device)
        both(system, {**a, "x": late})
    assert not stream.is_complete  # nobody has waited
    wp.synchronize_stream(stream)
    for name in ("y", "adj_x", "adj_c"):
        np.testing.assert_array_equal(a[name].numpy(), right[name])


@on_cuda
def test_a_first_use_on_another_stream():
    """The system's own parameters are in place for every stream as soon as the first call returns."""
    device, system = wp.get_cuda_devices()[0], CartPole(poles=1, gravity=9.123)
    problem = Problem(system)
    a, other = arrays(problem, device), arrays(problem, device)
    streams = [wp.Stream(device) for _ in range(2)]
    wp.synchronize_device(device)
    for stream, own in zip(streams, (a, other), strict=True):
        with wp.ScopedStream(stream, sync_enter=False):
            both(system, own)
    wp.synchronize_device(device)
    for name in NAMES:
        np.testing.assert_array_equal(a[name].numpy(), other[name].numpy())


@each_problem
def test_the_callers_tape(problem, device):
    """`step` is one launch of it between others; `step_vjp` is none, and a tape that is not recording gets nothing."""
    system, a = problem.system, arrays(problem, device)
    x, c = (wp.array(a[name].numpy(), dtype=wp.float64, device=device, requires_grad=True) for name in ("x", "c"))
    doubled, y = wp.zeros_like(x), wp.zeros_like(x)
    other = wp.Tape()
    with wp.Tape() as tape:
        wp.launch(double, dim=x.shape, inputs=[x], outputs=[doubled], device=device)
        system.step(doubled, c, y)
        launches = len(tape.launches)
        system.step_vjp(a["x"], a["c"], a["adj_y"], a["adj_x"], a["adj_c"])
        assert len(tape.launches) == launches == 2
    system.step(a["x"], a["c"], a["y"])
    assert len(tape.launches) == 2 and not other.launches
    tape.backward(grads={y: a["adj_y"]})
    system.step_vjp(doubled, c, a["adj_y"], a["adj_x"], a["adj_c"])
    np.testing.assert_allclose(x.grad.numpy(), 2.0 * a["adj_x"].numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(c.grad.numpy(), a["adj_c"].numpy(), rtol=1e-12, atol=1e-14)


@wp.kernel(module="unique")
def double(source: wp.array2d[wp.float64], target: wp.array2d[wp.float64]):
    i, j = wp.tid()
    target[i, j] = wp.float64(2.0) * source[i, j]


@each_problem
def test_the_callers_graph(problem, device):
    """Captured once between the caller's kernels; replays read new numbers, parameters too."""
    system, a = problem.system, arrays(problem, device)
    p = system.parameter_array({}, device, np.float64)
    x, raw = wp.zeros_like(a["x"]), a["x"]
    both(system, a, p)  # loads what is captured
    wp.launch(double, dim=x.shape, inputs=[raw], outputs=[x], device=device)
    with wp.ScopedCapture(device=device) as capture:
        wp.launch(double, dim=x.shape, inputs=[raw], outputs=[x], device=device)
        both(system, {**a, "x": x}, p)
    for seed in (4, 5):
        raw.assign(0.5 * problem.states(seed))
        a["c"].assign(problem.controls(seed))
        rows = parameter_numbers(p)
        rows.assign(rows.numpy() * 1.1)
        wp.capture_launch(capture.graph)
        got = {name: a[name].numpy().copy() for name in ("y", "adj_x", "adj_c")}
        both(system, {**a, "x": wp.array(problem.states(seed), dtype=wp.float64, device=device)}, p)
        for name, value in got.items():
            np.testing.assert_array_equal(value, a[name].numpy())


class Counter:
    """Counts calls of the methods that it stands in for."""

    def __init__(self):
        self.calls = []

    def around(self, name, function):
        def counted(*arguments, **keywords):
            self.calls.append(name)
            return function(*arguments, **keywords)

        return counted


ALLOCATORS = ("CpuDefaultAllocator", "CpuPinnedAllocator", "CudaDefaultAllocator", "CudaMempoolAllocator")
WAITS = ("synchronize", "synchronize_device", "synchronize_stream", "synchronize_event")


@pytest.fixture
def watched(monkeypatch):
    """Every way to memory and every way to wait that Warp has, counted: in Python, and in its native library."""
    context, counter = wp._src.context, Counter()
    for name in ALLOCATORS:
        kind = getattr(context, name)
        monkeypatch.setattr(kind, "allocate", counter.around(name, kind.allocate))
    for name in WAITS:
        counted = counter.around(name, getattr(context, name))
        monkeypatch.setattr(context, name, counted)
        monkeypatch.setattr(wp, name, counted)
    core, seen = context.runtime.core, []
    for name in dir(core):
        if "synchronize" in name or (name.startswith("wp_alloc_") and "tracker" not in name):
            with contextlib.suppress(AttributeError):
                monkeypatch.setattr(core, name, counter.around(name, getattr(core, name)))
                seen.append(name)
    assert any("synchronize" in name for name in seen) and any("alloc" in name for name in seen)
    return counter


@each_problem
@pytest.mark.parametrize("taped", [False, True], ids=["", "taped"])
def test_no_allocation_and_no_waiting(problem, taped, device, watched):
    """From the second call on, with and without parameters of the caller's; and the counter does count."""
    system, a = problem.system, arrays(problem, device)
    zeros = dict.fromkeys(system.parameter_names, np.zeros(problem.batch))
    p, adj_p = system.parameter_array({}, device, np.float64), system.parameter_array(zeros, device, np.float64)
    for parameters, adjoints in ((None, None), (p, None), (p, adj_p)):
        both(system, a, parameters, adjoints)
        watched.calls.clear()
        for _ in range(3):
            with wp.Tape() if taped else contextlib.nullcontext():
                both(system, a, parameters, adjoints)
        assert watched.calls == []
    wp.zeros(1, dtype=float, device=device)
    wp.synchronize()
    assert len(watched.calls) >= 2


@each_problem
def test_no_allocation_in_warps_own_books(problem, device):
    """Warp's native tracker, which sees what Python does not; and it does see an allocation."""
    system, a, reports = problem.system, arrays(problem, device), []
    both(system, a)
    with wp.ScopedMemoryTracker("steps", print=False, report_func=reports.append) as tracker:
        tracker.clear()
        for _ in range(10):
            both(system, a)
        tracker.report()
        wp.zeros(1000, dtype=float, device=device)
        tracker.report()
    none, one = (report.partition("Total allocations:")[2].partition("Peak usage:")[0].split() for report in reports)
    assert none == [] and one[:2] == [device, "1"]


def state_of_the_process():
    """What a library could change behind its caller's back."""
    runtime, devices = wp._src.context.runtime, wp.get_devices()
    settings = {name: value for name, value in vars(wp.config).items() if not name.startswith("__")}
    return {
        "config": settings,
        "device": str(wp.get_device()),
        "tape": runtime.tape,
        "streams": [device.stream for device in devices if device.is_cuda],
        "mempool": [wp.is_mempool_enabled(device) for device in devices if device.is_cuda],
        "allocators": [device.get_allocator() for device in devices],
        "module options": wp.get_module_options(),
        "numpy": np.random.get_state()[1].tolist(),
        "numpy errors": np.geterr(),
    }


def step_and_compare(device):
    """Return which settings of the process differ after first and later calls: run it in a process of its own."""
    before = state_of_the_process()
    for problem in PROBLEMS:
        for _ in range(2):
            both(problem.system, arrays(problem, device))
    after = state_of_the_process()
    return [name for name in before if before[name] != after[name]]


def test_no_global_state(device):
    """A process that has called nothing before: kernels are made and loaded, nothing else changes."""
    program = f"""
import warp as wp
import numpy as np
from tests.systems import test_callers_program as module
wp.init()
print("changed:", module.step_and_compare("{device}"))
np.seterr(under="raise")
print("seen:", module.state_of_the_process()["numpy errors"]["under"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "changed: []" in result.stdout and "seen: raise" in result.stdout
