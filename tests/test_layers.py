"""Activations and dense layers: accuracy, adjoints, and the fused unrolling against the general path."""

import numpy as np
import pytest
import torch
import warp as wp

from tests.toy import TwoControls
from warp_phys import CartPole, Dense
from warp_phys.engine import phases
from warp_phys.programs.activations import ACTIVATIONS, activation

TORCH = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def _evaluate(name, real, x, device):
    """Return value, slope, and the adjoint that a tape finds."""
    value, slope = activation(name, real)

    @wp.kernel(module="unique")
    def act(z: wp.array[real], y: wp.array[real]):
        i = wp.tid()
        y[i] = value(z[i])

    @wp.kernel(module="unique")
    def slopes(z: wp.array[real], y: wp.array[real]):
        i = wp.tid()
        y[i] = slope(z[i])

    z = wp.array(x, dtype=real, device=device, requires_grad=True)
    y, s = wp.zeros_like(z), wp.zeros_like(z)
    with wp.Tape() as tape:
        wp.launch(act, dim=len(x), inputs=[z], outputs=[y], device=device)
    wp.launch(slopes, dim=len(x), inputs=[z], outputs=[s], device=device)
    tape.backward(grads={y: wp.ones(len(x), dtype=real, device=device)})
    return y.numpy(), s.numpy(), z.grad.numpy()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("real", "of_value", "of_slope"), [(wp.float32, 2e-7, 8e-7), (wp.float64, 1e-15, 1e-15)])
def test_activations(name, real, of_value, of_slope, device):
    """Against torch in float64. In float32 measured: values 1.3e-7 (tanh), slopes 5.1e-7 (tanh), 7.2e-7 (silu)."""
    x = np.concatenate([np.linspace(-12, 12, 4001), np.geomspace(1e-8, 80, 500), -np.geomspace(1e-8, 80, 500)])
    x = x.astype(np.float32)
    exact_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    exact = TORCH[name](exact_x)
    exact.sum().backward()
    value, slope, adjoint = _evaluate(name, real, x, device)
    scale = 1 + np.abs(exact.detach().numpy())
    assert (np.abs(value - exact.detach().numpy()) / scale).max() < of_value
    assert np.abs(slope - exact_x.grad.numpy()).max() < of_slope
    np.testing.assert_array_equal(slope, adjoint)


def test_tanh_stays_in_range(device):
    value, _, _ = _evaluate("tanh", wp.float32, np.array([-1e30, -50, 0, 50, 1e30], np.float32), device)
    assert np.abs(value).max() <= 1.0 + 1e-6 and value[2] == 0.0


SHAPES = [(name, (20, 7)) for name in ACTIVATIONS]
SHAPES += [(name, hidden) for name in ("tanh", "elu") for hidden in ((), (5,), (17, 33, 4))]


@pytest.mark.parametrize(("name", "hidden"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.parametrize("system", [CartPole(poles=2, dt=0.02), TwoControls()], ids=["cartpole", "two-controls"])
def test_fused_unrolling_equals_general(system, dtype, tolerance, name, hidden, device):
    """Odd widths, odd batches, any depth."""
    controller = Dense((system.state_size, *hidden, system.control_size), name, device=device, dtype=dtype, seed=1)
    for batch in (1, 6):
        results = []
        for fused in (True, False):
            states = wp.zeros((11, batch, system.state_size), dtype=controller.real, device=device)
            controls = wp.zeros((10, batch, system.control_size), dtype=controller.real, device=device)
            states[0].assign(system.sample(batch, seed=3, dtype=dtype))
            p = system.check_parameters(None, states, batch)
            phases.forward(system, controller, states, controls, p, fused)
            results.append((states.numpy(), controls.numpy()))
        for a, b in zip(*results, strict=True):
            assert np.abs(a - b).max() < tolerance * (1 + np.abs(b).max())


def test_linearisation_against_torch(device):
    controller = Dense((6, 9, 4, 3), device=device, dtype=np.float64, seed=2)
    parameters = [torch.tensor(p.numpy(), requires_grad=True) for p in controller.parameters]

    def network(x):
        for i, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            x = x @ weight.T + bias
            x = torch.tanh(x) if i < 2 else x
        return x

    x, mu = np.random.default_rng(0).standard_normal((2, 5, 6))
    mu = np.stack([mu[:, :3], mu[:, 3:]])
    linear = controller.linearise(wp.array(x, device=device), phases.Workspace())
    jacobian = wp.zeros((5, 3, 6), dtype=wp.float64, device=device)
    linear.jacobian(jacobian)
    exact = torch.autograd.functional.jacobian(lambda x: network(x).sum(0), torch.tensor(x)).permute(1, 0, 2)
    np.testing.assert_allclose(jacobian.numpy(), exact.numpy(), rtol=1e-12, atol=1e-15)
    adj_x = wp.zeros((5, 6), dtype=wp.float64, device=device)
    linear.pull(wp.array(mu[0], device=device), adj_x)
    np.testing.assert_allclose(adj_x.numpy(), np.einsum("nk,nkd->nd", mu[0], exact.numpy()), rtol=1e-12, atol=1e-15)
    gradients = [controller.gradients(phases.Workspace(), "g") for _ in mu]
    linear.contract(wp.array(mu, device=device), gradients)
    for mu_f, gradient in zip(mu, gradients, strict=True):
        expected = torch.autograd.grad(network(torch.tensor(x)), parameters, torch.tensor(mu_f))
        for got, right in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(got.numpy(), right.numpy(), rtol=1e-12, atol=1e-15)


def test_new_parameters_are_glorot():
    controller = Dense((50, 200, 3), device="cpu", dtype=np.float64, seed=0)
    weight, bias = (p.numpy() for p in controller.parameters[:2])
    bound = np.sqrt(6 / 250)
    assert np.abs(weight).max() <= bound and weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not bias.any()
