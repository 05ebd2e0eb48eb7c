"""Guidance by repulsion: symmetry, forces by hand, agents that coincide."""

import numpy as np
import pytest
import warp as wp

from warp_phys import Repulsion


def _step(system, x, c, device):
    x, c = (wp.array(a, dtype=wp.float64, device=device) for a in (x, c))
    y = wp.zeros_like(x)
    system.step(x, c, y)
    return y.numpy()


def _vjp(system, x, c, weights, device):
    x, c, weights = (wp.array(a, dtype=wp.float64, device=device) for a in (x, c, weights))
    adj_x, adj_c = wp.zeros_like(x), wp.zeros_like(c)
    system.step_vjp(x, c, weights, adj_x, adj_c)
    return adj_x.numpy(), adj_c.numpy()


def test_two_agents_by_hand(device):
    """One driver at (2, 0), one evader at the origin moving up, control (0.5, 0.25)."""
    system = Repulsion(drivers=1, evaders=1, dt=0.1)
    y = _step(system, [[2.0, 0, 0, 0, 0, 0, 0, 1.0]], [[0.5, 0.25]], device)[0]
    fear = 15.0 / 2.1**2 * 2.0
    expected = [2, 0, 0.1 * 0.5 * 2, 0.1 * 0.25 * 2, 0, 0.1, -0.1 * fear, 1 - 0.1 * 4]
    np.testing.assert_allclose(y, expected, rtol=1e-14)


def test_the_flock_keeps_its_distance(device):
    """Two evaders at |r| + e = s leave each other alone; as published, nearer they attract and further they repel."""
    system = Repulsion(drivers=1, evaders=2, fright=0.0, dt=0.1)
    pulls = []
    for gap in (0.4, 0.2, 0.8):
        x = np.zeros((1, 12))
        x[0, 8] = gap
        pulls.append(_step(system, x, [[0.0, 0.0]], device)[0, [6, 10]])
    np.testing.assert_allclose(pulls[0], 0, atol=1e-15)
    assert pulls[1][0] > 0 > pulls[1][1] and pulls[2][0] < 0 < pulls[2][1]


@pytest.mark.parametrize("system", [Repulsion(drivers=2, evaders=3), Repulsion(drivers=18, evaders=17)], ids=str)
def test_agents_that_coincide(system, device):
    """All at one place: finite forward and backward, no force between them, and the right limit of the adjoint."""
    x = np.tile([0.3, -0.2, 0.0, 0.0], system.drivers + system.evaders)[None]
    c = np.zeros((1, system.control_size))
    np.testing.assert_allclose(_step(system, x, c, device), x, atol=1e-15)
    weights = np.random.default_rng(0).standard_normal(x.shape)
    adj_x, adj_c = _vjp(system, x, c, weights, device)
    assert np.isfinite(adj_x).all() and np.isfinite(adj_c).all()
    # the forces are once, not twice differentiable there: central differences converge slowly
    h, d = 1e-5, np.random.default_rng(1).standard_normal(x.shape)
    rate = (weights * (_step(system, x + h * d, c, device) - _step(system, x - h * d, c, device))).sum() / (2 * h)
    assert (adj_x * d).sum() == pytest.approx(rate, rel=5e-3)


def test_turning_the_plane(device):
    """A turned world does the same, turned."""
    system = Repulsion(drivers=3, evaders=4)
    x, c = system.sample(5, dtype=np.float64), np.random.default_rng(0).standard_normal((5, 6))
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = _step(system, (x.reshape(5, -1, 2) @ turn.T).reshape(5, -1), c, device)
    np.testing.assert_allclose(
        turned.reshape(5, -1, 2), _step(system, x, c, device).reshape(5, -1, 2) @ turn.T, atol=1e-12
    )


def test_initial_states_are_distributed_as_published():
    x = Repulsion(drivers=2, evaders=4).sample(20_000, dtype=np.float64).reshape(-1, 6, 4)
    assert not x[:, :, 2:].any()
    radius = np.linalg.norm(x[:, :2, :2], axis=2)
    assert radius.min() >= 3 and radius.max() <= 4 and radius.mean() == pytest.approx(3.5, abs=0.01)
    spread = x[:, 2:, :2] - x[:, 2:, :2].mean(1, keepdims=True)
    assert np.abs(spread).max() < 1 and np.linalg.norm(x[:, 2:, :2].mean(1), axis=1).mean() == pytest.approx(
        1.5, abs=0.03
    )


def test_loss_by_hand():
    system = Repulsion(drivers=1, evaders=2, target_x=1.0)
    states, controls = np.zeros((2, 1, 12)), np.full((1, 1, 2), 3.0)
    states[1, 0, [4, 5, 8, 9]] = [2.0, 3.0, 4.0, 5.0]
    expected = (1 + 9 + 9 + 25) / 4
    assert system.loss(states) == pytest.approx(expected)
    assert system.loss(states, controls, "every", 0.5) == pytest.approx(expected + 4.5)
