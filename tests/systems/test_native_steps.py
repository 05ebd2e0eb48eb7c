"""Steps of blocks of samples on a CPU against a system's Warp functions, which define it."""

import dataclasses

import numpy as np
import pytest
import warp as wp

from tests.springs import Springs
from warp_phys import CartPole, Quantum, Repulsion
from warp_phys.core.arrays import parameter_numbers
from warp_phys.programs import native_kernels, native_physics
from warp_phys.programs.native_physics import lane_functions
from warp_phys.programs.program import SAMPLES

BATCH = 21  # two blocks and a part of one
FLOWS = 2
SYSTEMS = [
    Quantum(points=2, target=1),
    Quantum(points=3, target=2, dt=0.3),
    Quantum(points=32),
    Quantum(points=200),
    CartPole(poles=1),
    CartPole(poles=3, dt=0.02, gravity=3.7, pole_mass=0.2, total_mass=1.4, half_length=0.3),
    CartPole(poles=2, integrator="rk4"),
    Repulsion(drivers=1, evaders=1),
    Repulsion(drivers=2, evaders=4, target_x=0.5, flocking=0.4, flock_distance=0.7),
    Repulsion(drivers=3, evaders=12),
    Springs(),
]
NAMES = [str(system).replace(" ", "") for system in SYSTEMS]
SOME, SOME_NAMES = [SYSTEMS[i] for i in (1, 5, 8)], ["quantum", "cart-pole", "repulsion"]


def _is_traced(system):
    """Whether its lanes have adjoints of the physical parameters."""
    return None not in lane_functions(system.structure, wp.float64, parameters=True)


def _kernels(system, real):
    """Step, and vector-Jacobian product, of a batch in blocks."""
    structure, samples = system.structure, SAMPLES
    Parameters = structure.types(real).Parameters
    retreat = native_physics.retreat_function(structure, real, _is_traced(system))

    @wp.kernel(module="unique", module_options=native_kernels.module_options())
    def pull_blocks(
        states: wp.array3d[real],
        controls: wp.array3d[real],
        p: wp.array[Parameters],
        adj_x: wp.array3d[real],
        adj_of_block: wp.array3d[real],
        adj_c: wp.array3d[real],
        adj_p: wp.array3d[real],
    ):
        first = wp.static(samples) * wp.tid()
        count = wp.min(wp.static(samples), states.shape[1] - first)
        retreat(states, controls, p, 1, first, count, adj_x, adj_of_block, adj_p)
        for f in range(adj_x.shape[0]):
            for b in range(first, first + count):
                for k in range(controls.shape[2]):
                    adj_c[f, b, k] = adj_of_block[f, b - first, k]

    return native_kernels.steps_kernel(structure, real), pull_blocks


def test_lanes_have_adjoints_of_physical_parameters():
    assert [_is_traced(system) for system in SYSTEMS] == [False] * 4 + [True] * 3 + [False] * 3 + [True]


def _array(values, dtype):
    return wp.array(np.asarray(values, dtype=dtype), device="cpu")


def _problem(system):
    generator = np.random.default_rng(0)
    x = system.sample(BATCH, dtype=np.float64) + 0.1 * generator.standard_normal((BATCH, system.state_size))
    c = 2.0 * generator.standard_normal((BATCH, system.control_size))
    adj = generator.standard_normal((FLOWS, BATCH, system.state_size))
    return x, c, adj, {"dt": np.linspace(0.5, 1.5, BATCH) * system.dt}


def _by_blocks(system, dtype, parameters):
    """Return next states and adjoints; the trajectory has a step before and one after, that must stay as they are."""
    x, c, adj, _ = _problem(system)
    real = wp.float64 if dtype is np.float64 else wp.float32
    states = _array(np.stack([np.full_like(x, 7.0), x, np.full_like(x, 7.0), np.full_like(x, 7.0)]), dtype)
    controls = _array(np.stack([np.full_like(c, 7.0), c, np.full_like(c, 7.0)]), dtype)
    adj_x, adj_c = _array(adj, dtype), wp.zeros((FLOWS, BATCH, system.control_size), dtype=real, device="cpu")
    scratch = wp.zeros((FLOWS, SAMPLES, system.control_size), dtype=real, device="cpu")
    p = system.parameter_array(parameters, device="cpu", dtype=dtype)
    step, pull = _kernels(system, real)
    blocks = -(-BATCH // SAMPLES)
    wp.launch(step, blocks, [states, controls, p, 1, 1], device="cpu")
    adj_p = wp.zeros((FLOWS, BATCH, len(system.parameter_names)), dtype=real, device="cpu")
    wp.launch(pull, blocks, [states, controls, p, adj_x, scratch, adj_c, adj_p], device="cpu")
    found = states.numpy()
    assert (found[[0, 3]] == 7.0).all() and (found[1] == x.astype(dtype)).all()
    return found[2], adj_x.numpy(), adj_c.numpy(), *([adj_p.numpy()] if _is_traced(system) else [])


def _by_functions(system, dtype, parameters):
    x, c, adj, _ = _problem(system)
    x, c, p = _array(x, dtype), _array(c, dtype), system.parameter_array(parameters, device="cpu", dtype=dtype)
    y, adjoints = wp.zeros_like(x), []
    system.step(x, c, y, p)
    for row in adj:
        own = wp.zeros(BATCH, dtype=p.dtype, device="cpu")
        adj_x, adj_c = wp.zeros_like(x), wp.zeros_like(c)
        system.step_vjp(x, c, _array(row, dtype), adj_x, adj_c, p, own)
        adjoints.append([adj_x.numpy(), adj_c.numpy(), *([parameter_numbers(own)] if _is_traced(system) else [])])
    return y.numpy(), *(np.stack(parts) for parts in zip(*adjoints, strict=True))


def _distance(found, exact):
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("system", SYSTEMS, ids=NAMES)
def test_blocks_equal_functions(system):
    """One set of parameters, and a time step per sample. In float32 either way is held against float64."""
    for parameters in ({}, _problem(system)[3]):
        exact = _by_functions(system, np.float64, parameters)
        assert _distance(_by_blocks(system, np.float64, parameters), exact) < 1e-11
        error = _distance(_by_blocks(system, np.float32, parameters), exact)
        usual = _distance(_by_functions(system, np.float32, parameters), exact)
        assert error < 2.0 * usual + 1e-6 and usual < 1e-3


@pytest.mark.parametrize("system", SOME, ids=SOME_NAMES)
def test_every_parameter_counts(system):
    """The numbers of a system reach its blocks in the right order: each one, changed alone, has its effect."""
    for name in system.parameter_names:
        changed = dataclasses.replace(system, **{name: 1.3 * getattr(system, name) + 0.01})
        exact = _by_functions(changed, np.float64, {})
        assert _distance(_by_blocks(changed, np.float64, {}), exact) < 1e-11


@pytest.mark.parametrize("system", SOME, ids=SOME_NAMES)
def test_a_sample_that_is_not_finite_spoils_no_other(system, monkeypatch):
    """Neighbours may change by rounding alone: one large angle changes how the sines of its block are found."""
    clean = _by_blocks(system, np.float32, {})
    x, *others = _problem(system)
    bad = [3, 20]
    good = [b for b in range(BATCH) if b not in bad]
    x[bad] = np.inf
    monkeypatch.setitem(globals(), "_problem", lambda _system: (x, *others))
    spoilt = _by_blocks(system, np.float32, {})
    assert not np.isfinite(spoilt[0][bad]).all()
    assert _distance([a[..., good, :] for a in spoilt], [a[..., good, :] for a in clean]) < 1e-6
