"""Quantum control: the norm, exact phases, the solve against dense algebra, the sizes."""

import numpy as np
import pytest
import warp as wp

from warp_phys import Quantum


def _complex(states):
    return states[..., ::2] + 1j * states[..., 1::2]


def _run(system, x0, controls, device, real=wp.float64):
    controls = wp.array(controls, dtype=real, device=device)
    states = wp.zeros((len(controls) + 1, *x0.shape), dtype=real, device=device)
    states[0].assign(x0)
    system.trajectory(states, controls)
    return states.numpy()


def _hamiltonian(system, c):
    """The matrix B of the docstring, dense."""
    dx = 2 / (system.points + 1)
    beside = np.full(system.points - 1, -system.dt / (2 * dx**2))
    diagonal = system.dt / dx**2 + system.dt / 2 * c * system.positions
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


@pytest.mark.parametrize("points", [2, 3, 32, 257, 1024])
def test_step_against_dense_algebra(points, device):
    system = Quantum(points=points, target=1)
    rng = np.random.default_rng(0)
    x0, c = rng.standard_normal((2, 2 * points)) / np.sqrt(points), np.array([[3.0], [-40.0]])
    got = _complex(_run(system, x0, c[None], device)[1])
    for b in range(2):
        i_b = 1j * _hamiltonian(system, c[b, 0])
        one = np.eye(points)
        expected = np.linalg.solve(one + i_b, (one - i_b) @ _complex(x0[b]))
        np.testing.assert_allclose(got[b], expected, atol=1e-12)


@pytest.mark.parametrize("points", [2, 129, 1024])
def test_adjoint_against_dense_algebra(points, device):
    """The vector-Jacobian product in ψ, c and dt."""
    system = Quantum(points=points, target=1, dt=0.02)
    rng = np.random.default_rng(0)
    x, weights, c = *rng.standard_normal((2, 1, 2 * points)) / np.sqrt(points), np.array([[7.0]])
    arrays = [wp.array(a, dtype=wp.float64, device=device) for a in (x, c, weights)]
    adj_x, adj_c = wp.zeros_like(arrays[0]), wp.zeros_like(arrays[1])
    adj_p = system.parameter_array({"dt": np.zeros(1)}, device, np.float64)
    system.step_vjp(*arrays, adj_x, adj_c, adj_parameters=adj_p)
    one, i_b = np.eye(points), 1j * _hamiltonian(system, 7.0)
    mu = np.linalg.solve((one + i_b).conj().T, _complex(weights[0]))
    np.testing.assert_allclose(_complex(adj_x.numpy()[0]), (one - i_b).conj().T @ mu, atol=1e-11)

    def weighted(c, dt):
        moved = system.with_parameters({"dt": dt})
        return (weights * _run(moved, x, [[[c]]], device)[1]).sum()

    rates = [(weighted(7.0 + h, 0.02) - weighted(7.0 - h, 0.02)) / (2 * h) for h in (1e-4,)]
    rates += [(weighted(7.0, 0.02 + h) - weighted(7.0, 0.02 - h)) / (2 * h) for h in (1e-7,)]
    assert adj_c.numpy()[0, 0] == pytest.approx(rates[0], rel=1e-6, abs=1e-9)
    assert adj_p.numpy()[0][0] == pytest.approx(rates[1], rel=1e-5)


@pytest.mark.parametrize(("real", "tolerance"), [(wp.float32, 1e-3), (wp.float64, 1e-11)])
def test_norm_over_ten_thousand_steps(real, tolerance, device):
    """Measured: 2.0e-5 in float32, 6.5e-14 in float64."""
    system = Quantum()
    x0 = system.sample(4, dtype=np.float64)
    controls = 20 * np.random.default_rng(0).standard_normal((10_000, 4, 1))
    states = _run(system, x0, controls, device, real).astype(np.float64)
    assert np.abs((states[::100] ** 2).sum(2) - 1).max() < tolerance


def test_eigenstates_turn_their_phase_only(device):
    """Eigenvalue 2 dt/dx² sin²(π k / (2 (N + 1))) of B; a step multiplies by (1 − iE) / (1 + iE)."""
    system = Quantum(points=20, target=1)
    dx = 2 / 21
    for k in (1, 2, 7):
        x0 = np.zeros((1, 40))
        x0[0, ::2] = system.eigenstate(k)
        energy = system.dt / dx**2 * (1 - np.cos(np.pi * k / 21))
        got = _complex(_run(system, x0, np.zeros((5, 1, 1)), device)[-1, 0])
        np.testing.assert_allclose(got, ((1 - 1j * energy) / (1 + 1j * energy)) ** 5 * system.eigenstate(k), atol=1e-12)


def test_cost_is_one_minus_the_overlap():
    system = Quantum(points=16, target=2)
    phase = np.exp(0.7j)
    for weight in (0.0, 0.6, 1.0):
        psi = phase * (weight * system.eigenstate(2) + np.sqrt(1 - weight**2) * system.eigenstate(1))
        states = np.zeros((4, 3, 32))
        states[1:, :, ::2], states[1:, :, 1::2] = psi.real, psi.imag
        assert system.loss(states) == pytest.approx(1 - weight**2, abs=1e-14)
        assert system.loss(states, when="every") == pytest.approx(3 * (1 - weight**2), abs=1e-14)


def test_initial_states():
    system = Quantum(points=8, target=1)
    psi = _complex(system.sample(5000, dtype=np.float64))
    np.testing.assert_allclose((np.abs(psi) ** 2).sum(1), 1, rtol=1e-12)
    parts = np.stack([psi @ system.eigenstate(k) for k in (1, 2)], axis=1)
    np.testing.assert_allclose((np.abs(parts) ** 2).sum(1), 1, rtol=1e-12)
    assert (np.abs(parts[:, 0]) ** 2).mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs((parts / np.abs(parts)).mean(0)).max() < 0.05


def test_errors():
    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        Quantum(points=1)
    with pytest.raises(ValueError, match=r"target must be at most points \(4\), got 5"):
        Quantum(points=4, target=5)
    with pytest.raises(ValueError, match=r"number must be at most points \(4\), got 6"):
        Quantum(points=4, target=1).eigenstate(6)
