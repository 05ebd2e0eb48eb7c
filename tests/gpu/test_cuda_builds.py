"""Every kernel, forward and adjoint, compiles for CUDA; Warp's compiler needs no GPU and no driver for that."""

import functools
from pathlib import Path

import pytest
import torch
import warp as wp

import warp_phys
from controllers import GridCNN
from tests.programs import test_operations as operations
from tests.toy import TwoControls
from warp_phys import CartPole, Polynomial, Quantum, Repulsion
from warp_phys.core import gate_kernels, kernels
from warp_phys.diagnose import landscape_kernels
from warp_phys.engine import dense_kernels, row_kernels
from warp_phys.interop.newton import kernels as newton_kernels  # noqa: F401, built by its name
from warp_phys.interop.torch.chain import read_plan
from warp_phys.programs import block_kernels, native_kernels
from warp_phys.programs.activations import ACTIVATIONS
from warp_phys.programs.block_plan import TILES
from warp_phys.programs.program import chain
from warp_phys.programs.rules import RULES
from warp_phys.systems import Extended
from warp_phys.systems.hybrid import HybridRows

ARCHITECTURES = {wp.float32: 80, wp.float64: 90}
"""What the kernels of each precision are built for: nothing in them asks for the architecture, so one is enough."""

# 18 poles: loops that Warp does not unroll
SYSTEMS = [
    CartPole(poles=2),
    CartPole(poles=18),
    CartPole(poles=1, integrator="rk4"),
    TwoControls(),
    Repulsion(),
    Quantum(),
    Polynomial(),
]
OF_A_SYSTEM = [
    kernels.step_kernel,
    kernels.step_vjp_kernel,
    kernels.trajectory_kernel,
    kernels.sweep_kernel,
    kernels.cost_kernel,
    kernels.cost_vjp_kernel,
]
OF_A_PROGRAM = [
    block_kernels.pack_kernel,
    block_kernels.evaluate_kernel,
    block_kernels.pull_kernel,
    block_kernels.contract_kernel,
]
OF_A_PRECISION = [
    kernels.mean_kernel,
    kernels.mean_square_kernel,
    dense_kernels.slope_kernel,
    dense_kernels.transposed_kernel,
    dense_kernels.contract_kernel,
    dense_kernels.unit_rows_kernel,
    dense_kernels.copy_weight_kernel,
    dense_kernels.copy_bias_kernel,
    row_kernels.sum_over_time_kernel,
    row_kernels.pull_rows_kernel,
    row_kernels.add_rows_kernel,
    row_kernels.sum_rows_kernel,
    row_kernels.gate_rows_kernel,
    landscape_kernels.contract_kernel,
]

# their layers and steps are C++ on a CPU's vectors, and one thread goes through a whole block or batch: on CUDA nothing
# launches them, `block_kernels` and `kernels` do their work there
FOR_A_CPU_ONLY = {"native_kernels", "update_kernels"}


def _plan(system):
    """Return the network that the published experiments have for a system, or one of that size."""
    if isinstance(system, Quantum):  # in float64 its activations do not fit into the memory of a multiprocessor
        return read_plan(GridCNN(system), system.state_size).plan
    return chain((system.state_size, 100, 100, system.control_size), "tanh")


def _everything(real):
    """Return a program with every operation and every kind of node."""
    return operations.read_all_kinds(torch.float64 if real is wp.float64 else torch.float32).plan


def _all_kernels():
    """Yield a name, an architecture and a function that makes the kernel, for every kernel of the package."""
    for real, architecture in ARCHITECTURES.items():
        for name, make in _kernels_of(real):
            yield f"{name}-{real.__name__}", architecture, make


def _kernels_of(real):
    """Yield a name and a function that makes the kernel, for every kernel of a precision."""
    for factory in OF_A_PRECISION:
        yield factory.__name__, lambda f=factory: f(real)
    for rule in RULES:
        make = functools.partial(row_kernels.combine_kernel, rule, real)
        yield f"combine-{rule.__name__}", functools.partial(make, True)
    yield "combine-once", functools.partial(make, False)
    for dimensions in range(1, 5):
        yield f"gate-{dimensions}", lambda d=dimensions: gate_kernels.gate_kernel(d, real)
    for name in ACTIVATIONS:
        yield f"dense-{name}", lambda n=name: dense_kernels.dense_kernel(n, real)
        yield f"slope-{name}", lambda n=name: dense_kernels.dense_with_slope_kernel(n, real)
        yield f"lanes-{name}", lambda n=name: dense_kernels.activate_kernel(n, real)
    yield "landscape", lambda: landscape_kernels.unroll_kernel(Polynomial().structure, real)
    for system in SYSTEMS:
        if real is wp.float64 and system == SYSTEMS[1]:
            continue  # a minute of compilation that would show nothing new
        label = f"{type(system).__name__}{getattr(system, 'poles', '')}{getattr(system, 'integrator', '')}"
        for factory in OF_A_SYSTEM:
            yield f"{factory.__name__}-{label}", lambda f=factory, s=system: f(s.structure, real)
        plan = _plan(system)
        for tile in TILES if system == SYSTEMS[0] else TILES[-1:]:
            yield (
                f"unroll-{tile}-{label}",
                lambda s=system, n=plan, t=tile: block_kernels.unroll_kernel(s.structure, n, real, t),
            )
    yield "single", lambda: row_kernels.gate_single_kernel(4, 7, 9, real)
    rows = Extended(SYSTEMS[0], 3, 2).structure
    yield "sweep-rows", lambda: kernels.sweep_kernel(rows, real, True)
    yield "step-rows", lambda: kernels.trajectory_kernel(rows, real)
    chained = chain((rows.state_size, 8, rows.control_size), "tanh")
    yield "unroll-rows", lambda: block_kernels.unroll_kernel(rows, chained, real, TILES[-1])
    hybrid = HybridRows(SYSTEMS[0], ("gravity", "half_length")).structure
    yield "sweep-hybrid", lambda: kernels.sweep_kernel(hybrid, real, True)
    for factory in OF_A_PROGRAM:
        yield f"{factory.__name__}-all", lambda f=factory: f(_everything(real), real)


@pytest.mark.parametrize(
    ("name", "architecture", "make"), list(_all_kernels()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_kernel_compiles_for_cuda(name, architecture, make, tmp_path):
    _build(make().module, [architecture], tmp_path)


def _build(module, architectures, folder):
    wp.compile_aot_module(module, arch=architectures, module_dir=folder)
    built = sorted(file.name for file in folder.iterdir() if file.suffix in (".ptx", ".cubin"))
    assert len(built) == len(architectures) and all(str(arch) in "".join(built) for arch in architectures)
    assert all((folder / file).stat().st_size > 500 for file in built)


def test_newton_kernels_compile_for_cuda(tmp_path):
    _build("warp_phys.interop.newton.kernels", list(ARCHITECTURES.values()), tmp_path)


def test_the_list_is_complete():
    """A kernel factory that is missing above fails here, and so does a module of kernels."""
    modules = [block_kernels, dense_kernels, gate_kernels, kernels, landscape_kernels, row_kernels]
    rooms = [path for path in Path(warp_phys.__file__).parent.iterdir() if path.is_dir() and path.name != "interop"]
    names = {path.stem for room in rooms for path in room.glob("*kernels.py")}
    assert {m.__name__.split(".")[-1] for m in modules} == names - FOR_A_CPU_ONLY
    factories = {f"{m.__name__}.{name}" for m in modules for name in vars(m) if name.endswith("_kernel")}
    listed = {f"{f.__module__}.{f.__name__}" for f in (*OF_A_SYSTEM, *OF_A_PRECISION, *OF_A_PROGRAM)}
    one_by_one = {
        "warp_phys.programs.block_kernels.unroll_kernel",
        "warp_phys.core.gate_kernels.gate_kernel",
        "warp_phys.engine.dense_kernels.dense_kernel",
        "warp_phys.engine.dense_kernels.dense_with_slope_kernel",
        "warp_phys.engine.dense_kernels.activate_kernel",
        "warp_phys.engine.row_kernels.combine_kernel",
        "warp_phys.engine.row_kernels.gate_single_kernel",
        "warp_phys.diagnose.landscape_kernels.unroll_kernel",
    }
    assert factories == listed | one_by_one


def test_what_is_for_a_cpu_says_so():
    """Kernels that are left out above cannot be built for CUDA by mistake: their C++ is given for a CPU alone."""
    options = native_kernels.module_options()["extra_build_options"]
    assert "namespace warp_phys" in options.extra_cpu_preamble and not options.extra_cuda_preamble
    plan = chain((4, 5, 1), "tanh")
    for factory in (native_kernels.unroll_kernel, native_kernels.sweep_kernel):
        assert factory(CartPole(poles=1).structure, plan, wp.float32).module.options["extra_build_options"] is options
