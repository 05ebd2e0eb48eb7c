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

ARCHITECTURES = [80, 90]
REALS = [wp.float32, wp.float64]

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
    row_kernels.add_rows_kernel,
    row_kernels.sum_rows_kernel,
    row_kernels.gate_rows_kernel,
    landscape_kernels.contract_kernel,
]

# their layers and steps are C++ on a CPU's vectors, and one thread goes through a whole block or batch: on CUDA nothing
# launches them, `block_kernels` and `kernels` do their work there
FOR_A_CPU_ONLY = {"native_kernels", "update_kernels"}


LONG = tuple(f"{name}_kernel-all-float64" for name in ("contract", "pull", "evaluate", "pack"))
"""Programs with all operations take up to half a minute for each architecture: in float64 one must do."""


def _plan(system):
    """Return the network that the published experiments have for a system, or one of that size."""
    if isinstance(system, Quantum):  # in float64 its activations do not fit into the memory of a multiprocessor
        return read_plan(GridCNN(system), system.state_size).plan
    return chain((system.state_size, 100, 100, system.control_size), "tanh")


def _everything(real):
    """Return a program with every operation and every kind of node."""
    return operations._read(torch.float64 if real is wp.float64 else torch.float32)[1].plan


def _all_kernels():
    """Yield a name and a function that makes the kernel, for every kernel of the package."""
    for real in REALS:
        suffix = real.__name__
        for factory in OF_A_PRECISION:
            yield f"{factory.__name__}-{suffix}", lambda f=factory, r=real: f(r)
        for rule in RULES:
            make = functools.partial(row_kernels.combine_kernel, rule, real)
            yield f"combine-{rule.__name__}-{suffix}", functools.partial(make, True)
        yield f"combine-once-{suffix}", functools.partial(make, False)
        for dimensions in range(1, 5):
            yield f"gate-{dimensions}-{suffix}", lambda d=dimensions, r=real: gate_kernels.gate_kernel(d, r)
        for name in ACTIVATIONS:
            yield f"dense-{name}-{suffix}", lambda n=name, r=real: dense_kernels.dense_kernel(n, r)
            yield f"slope-{name}-{suffix}", lambda n=name, r=real: dense_kernels.dense_with_slope_kernel(n, r)
            yield f"lanes-{name}-{suffix}", lambda n=name, r=real: dense_kernels.activate_kernel(n, r)
        yield f"landscape-{suffix}", lambda r=real: landscape_kernels.unroll_kernel(Polynomial().structure, r)
        for system in SYSTEMS:
            if real is wp.float64 and system == SYSTEMS[1]:
                continue  # a minute of compilation that would show nothing new
            label = f"{type(system).__name__}{getattr(system, 'poles', '')}{getattr(system, 'integrator', '')}-{suffix}"
            for factory in OF_A_SYSTEM:
                yield f"{factory.__name__}-{label}", lambda f=factory, s=system, r=real: f(s.structure, r)
            plan = _plan(system)
            for tile in TILES if system == SYSTEMS[0] else TILES[-1:]:
                yield (
                    f"unroll-{tile}-{label}",
                    lambda s=system, n=plan, r=real, t=tile: block_kernels.unroll_kernel(s.structure, n, r, t),
                )
        for factory in OF_A_PROGRAM:
            yield f"{factory.__name__}-all-{suffix}", lambda f=factory, r=real: f(_everything(r), r)


@pytest.mark.parametrize(
    ("name", "make"), list(_all_kernels()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_kernel_compiles_for_cuda(name, make, tmp_path):
    kernel = make()
    architectures = ARCHITECTURES[-1:] if name in LONG else ARCHITECTURES
    wp.compile_aot_module(kernel.module, arch=architectures, module_dir=tmp_path)
    built = sorted(file.name for file in tmp_path.iterdir() if file.suffix in (".ptx", ".cubin"))
    assert len(built) == len(architectures) and all(str(arch) in "".join(built) for arch in architectures)
    assert all((tmp_path / file).stat().st_size > 500 for file in built)


def test_newton_kernels_compile_for_cuda(tmp_path):
    wp.compile_aot_module("warp_phys.interop.newton.kernels", arch=ARCHITECTURES, module_dir=tmp_path)
    built = sorted(file.name for file in tmp_path.iterdir() if file.suffix in (".ptx", ".cubin"))
    assert len(built) == len(ARCHITECTURES)


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
