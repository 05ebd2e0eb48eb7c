"""The step's vector-Jacobian product against finite differences, and against the tape."""

import numpy as np
import pytest
import warp as wp

from tests.problems import PROBLEMS
from tests.taylor import check_gradient
from warp_phys.core.arrays import parameter_numbers

pytestmark = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def _weights(problem):
    return np.random.default_rng(9).standard_normal((problem.batch, problem.system.state_size))


def _step(system, x, c, device, parameters=None):
    arrays = [wp.array(a, dtype=wp.float64, device=device) for a in (x, c, x)]
    system.step(*arrays, parameters)
    return arrays[2].numpy()


def _vjp(problem, device):
    """Return adj_x, adj_c, adj_p (batch, P) of the weights."""
    system, x, c, l = problem.system, problem.states(), problem.controls(), _weights(problem)
    x, c, l = (wp.array(a, dtype=wp.float64, device=device) for a in (x, c, l))
    adj_x, adj_c = wp.zeros_like(x), wp.zeros_like(c)
    adj_p = system.parameter_array(dict.fromkeys(system.parameter_names, np.zeros(problem.batch)), device, np.float64)
    system.step_vjp(x, c, l, adj_x, adj_c, adj_parameters=adj_p)
    return adj_x.numpy(), adj_c.numpy(), parameter_numbers(adj_p).numpy()


def test_state_adjoint(problem, device):
    x, c, l = problem.states(), problem.controls(), _weights(problem)
    check_gradient(lambda x: np.vdot(l, _step(problem.system, x, c, device)), x, _vjp(problem, device)[0], scale=0.02)


def test_control_adjoint(problem, device):
    x, c, l = problem.states(), problem.controls(), _weights(problem)
    adj_c = _vjp(problem, device)[1]
    # some systems are linear in the control: then the remainder vanishes
    h, d = 1e-3, np.random.default_rng(1).standard_normal(c.shape)
    fd = [np.vdot(l, _step(problem.system, x, c + s * h * d, device)) / (2 * h) for s in (1, -1)]
    np.testing.assert_allclose(fd[0] - fd[1], np.vdot(adj_c, d), rtol=1e-8)


def test_parameter_adjoint(problem, device):
    x, c, l = problem.states(), problem.controls(), _weights(problem)
    adj_p = _vjp(problem, device)[2]
    for i, name in enumerate(problem.system.parameter_names):
        value = getattr(problem.system, name)
        h = 1e-5 * (abs(value) or 1.0)
        fd = np.zeros(problem.batch)
        for sign in (1, -1):
            p = problem.system.parameter_array({name: value + sign * h}, device, np.float64)
            fd += sign * (l * _step(problem.system, x, c, device, p)).sum(1) / (2 * h)
        np.testing.assert_allclose(adj_p[:, i], fd, rtol=1e-6, atol=1e-8, err_msg=name)


def test_tape_gives_the_same(problem, device):
    system = problem.system
    x, c = (
        wp.array(a, dtype=wp.float64, device=device, requires_grad=True) for a in (problem.states(), problem.controls())
    )
    y = wp.zeros_like(x)
    p = system.parameter_array({}, device, np.float64, requires_grad=True)
    with wp.Tape() as tape:
        system.step(x, c, y, p)
    tape.backward(grads={y: wp.array(_weights(problem), dtype=wp.float64, device=device)})
    adj_x, adj_c, adj_p = _vjp(problem, device)
    np.testing.assert_allclose(x.grad.numpy(), adj_x, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(c.grad.numpy(), adj_c, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(parameter_numbers(p).grad.numpy()[0], adj_p.sum(0), rtol=1e-10, atol=1e-13)


def test_loss_adjoint(problem, device):
    system = problem.system
    states = np.stack([problem.states(seed) for seed in range(4)])
    controls = np.stack([problem.controls(seed) for seed in range(3)])

    def loss(states):
        return float(system.loss(states, controls, when="every", control_cost=0.3))

    arrays = [wp.array(a, dtype=wp.float64, device=device, requires_grad=True) for a in (states, controls)]
    with wp.Tape() as tape:
        value = system.loss(*arrays, when="every", control_cost=0.3)
    tape.backward(value)
    np.testing.assert_allclose(value.numpy()[0], loss(states), rtol=1e-12)
    check_gradient(loss, states, arrays[0].grad.numpy())
    np.testing.assert_allclose(arrays[1].grad.numpy(), 0.6 * controls / controls.size, rtol=1e-12)
