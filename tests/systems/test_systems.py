"""What holds for every system: sizes, names, sampling, drawing, the open-loop trajectory, per-sample parameters."""

import dataclasses

import matplotlib
import numpy as np
import pytest
import warp as wp

from tests.problems import PROBLEMS
from warp_phys import SYSTEMS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def test_every_system_has_a_problem():
    assert set(SYSTEMS.values()) <= {type(problem.system) for problem in PROBLEMS}


@each_problem
def test_names_carry_units(problem):
    system = problem.system
    assert len(set(system.states)) == system.state_size
    for name in (*system.states, *system.controls):
        assert name.endswith("]") and "[" in name
    for field in dataclasses.fields(system):
        assert hasattr(system, field.name)


@each_problem
def test_sampling(problem):
    a, b = problem.system.sample(64, seed=3), problem.system.sample(64, seed=3, dtype=np.float64)
    assert a.dtype == np.float32 and b.dtype == np.float64 and a.shape == (64, problem.system.state_size)
    np.testing.assert_array_equal(a, b.astype(np.float32))
    assert (problem.system.sample(64, seed=4) != a).any()


@each_problem
def test_trajectory_is_repeated_steps(problem, device):
    system = problem.system
    controls = wp.array(np.stack([problem.controls(seed) for seed in range(5)]), dtype=wp.float64, device=device)
    states = wp.zeros((6, problem.batch, system.state_size), dtype=wp.float64, device=device)
    states[0].assign(problem.states())
    system.trajectory(states, controls)
    for n in range(5):
        y = wp.zeros_like(states[0])
        system.step(states[n], controls[n], y)
        np.testing.assert_allclose(states[n + 1].numpy(), y.numpy(), rtol=1e-13)


@each_problem
def test_each_sample_has_its_own_parameters(problem, device):
    system, name = problem.system, problem.system.parameter_names[-1]
    values = (getattr(system, name) or 1.0) * np.array([1.0, 1.3, 0.6])
    x, c = (wp.array(a, dtype=wp.float64, device=device) for a in (problem.states(), problem.controls()))
    together = wp.zeros_like(x)
    system.step(x, c, together, system.parameter_array({name: values}, device, np.float64))
    for b, value in enumerate(values):
        alone = wp.zeros_like(x)
        system.with_parameters({name: float(value)}).step(x, c, alone)
        np.testing.assert_array_equal(together.numpy()[b], alone.numpy()[b])


@each_problem
def test_strided_views(problem, device):
    system = problem.system
    x, c = problem.states().astype(np.float32), problem.controls().astype(np.float32)
    plain = [wp.array(a, dtype=wp.float32, device=device) for a in (x, c, x)]
    system.step(*plain)
    wide = [wp.array(np.repeat(np.repeat(a, 2, 0), 3, 1), dtype=wp.float32, device=device) for a in (x, c, x)]
    system.step(*(a[::2, ::3] for a in wide))
    np.testing.assert_array_equal(wide[2].numpy()[::2, ::3], plain[2].numpy())
    np.testing.assert_array_equal(wide[2].numpy()[1::2], np.repeat(x, 3, 1))


@each_problem
def test_drawing_moves(problem):
    figure, axes = plt.subplots()
    move = problem.system.sketch(axes)
    pictures = []
    for seed in (0, 5):
        assert move(problem.states(seed)[0], problem.controls(seed)[0])
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba()).copy())
    plt.close(figure)
    assert (pictures[0] != pictures[1]).mean() > 1e-3


def test_the_kernels_do_not_depend_on_numbers():
    a, b = (SYSTEMS["cartpole"](poles=2, dt=dt).structure for dt in (0.01, 0.02))
    assert a == b and hash(a) == hash(b)
    assert a != SYSTEMS["cartpole"](poles=3).structure
