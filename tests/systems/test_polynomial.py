"""The polynomial example as a system: its step, its loss, its states."""

import numpy as np
import pytest
import torch
import warp as wp

from warp_phys import Polynomial
from warp_phys.interop.torch import Rollout


class Quadratic(torch.nn.Module):
    """N(x) = θ1 x² + θ2 x."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.as_tensor(theta, dtype=torch.float64))

    def forward(self, x):
        return self.theta[0] * x**2 + self.theta[1] * x


def test_a_control_is_what_is_added(device):
    x, c = (wp.array([[1.0], [-2.0]], dtype=wp.float64, device=device), wp.full((2, 1), 0.25, wp.float64, device))
    y = wp.zeros_like(x)
    Polynomial().step(x, c, y)
    np.testing.assert_array_equal(y.numpy(), [[1.25], [-1.75]])
    Polynomial(dt=0.5).step(x, c, y)
    np.testing.assert_array_equal(y.numpy(), [[1.125], [-1.875]])


def test_the_published_unrolling_by_hand(device):
    """θ = (2, −1): x ↦ 2 x², from −0.3."""
    system = Polynomial()
    states, controls = Rollout(system, Quadratic([2.0, -1.0]).to(device), 4)(np.array([[system.start]]))
    x = states.detach().cpu().numpy().ravel()
    np.testing.assert_allclose(x, [-0.3, 0.18, 0.0648, 0.00839808, 1.410554953728e-4], rtol=1e-13)
    assert float(system.loss(states, controls).detach()) == pytest.approx(0.5 * (1.410554953728e-4 - 2.0) ** 2)


def test_states_lie_around_the_start():
    x = Polynomial(start=1.5).sample(10_000, dtype=np.float64)
    assert x.shape == (10_000, 1) and np.abs(x - 1.5).max() <= 0.1
    assert x.mean() == pytest.approx(1.5, abs=3e-3) and x.std() == pytest.approx(0.1 / np.sqrt(3.0), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"dt": 0.0}, ValueError, "dt must be positive, got 0.0"),
        ({"target": float("nan")}, ValueError, "target must be finite, got nan"),
        ({"start": "left"}, TypeError, "start must be a number, got 'left'"),
    ],
)
def test_mistakes(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Polynomial(**arguments)
