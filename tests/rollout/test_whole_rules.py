"""Rules that see whole vectors: they are given all of an update, or refused."""

import numpy as np
import pytest
import torch
import warp as wp

import warp_phys
from warp_phys import CartPole, Combined, Dense
from warp_phys.interop.torch import Rollout, Update, diagnose

SYSTEM = CartPole(dt=0.05)


def project(base, other):
    """The base without what goes against the other."""
    assert base.ndim == 1
    along = (base * other).sum() / (other * other).sum()
    return torch.where(along < 0.0, base - along * other, base)


FLOW = Combined(rule=project, whole=True)


def _network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)
    return torch.nn.Sequential(*layers).double()


def _flat(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def _updates(network, x0):
    found = []
    for flow in ("M", "R"):
        network.zero_grad()
        Rollout(SYSTEM, network, 20, flow).value_and_grad(x0)
        found.append(_flat(network))
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("backend", ["general", "fused"])
def test_the_rule_sees_the_whole(backend):
    network, x0 = _network(), torch.from_numpy(SYSTEM.sample(9, dtype=np.float64))
    expected = project(*_updates(network, x0))
    rollout = Rollout(SYSTEM, network, 20, FLOW, backend=backend)
    rollout.value_and_grad(x0)
    assert torch.allclose(_flat(network), expected, rtol=1e-10, atol=1e-14)
    network.zero_grad(set_to_none=True)
    SYSTEM.loss(*rollout(x0)).backward()
    assert torch.allclose(_flat(network), expected, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="whole vectors: updates of several"):
        SYSTEM.loss(*rollout(x0)).backward()


def test_updates():
    network, x0 = _network(), torch.from_numpy(SYSTEM.sample(9, dtype=np.float64))
    expected = project(*_updates(network, x0))
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    Update(Rollout(SYSTEM, network, 20, FLOW), torch.optim.SGD(network.parameters(), lr=0.1))(x0)
    after = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert torch.allclose(after, before - 0.1 * expected, rtol=1e-10)


def test_what_would_be_given_parts_is_refused():
    network, x0 = _network(), torch.from_numpy(SYSTEM.sample(3, dtype=np.float64))
    rollout, mass = Rollout(SYSTEM, network, 5, FLOW), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    dense = Dense((4, 5, 1), device="cpu")
    cases = [
        lambda: rollout(x0.clone().requires_grad_()),
        lambda: rollout(x0, parameters={"pole_mass": mass}),
        lambda: rollout.value_and_grad(x0, parameters={"pole_mass": mass}),
        lambda: diagnose(rollout, x0, FLOW),
        lambda: warp_phys.Rollout(SYSTEM, dense, 5, FLOW),
    ]
    for call in cases:
        with pytest.raises(ValueError, match="sees whole vectors"):
            call()
    with pytest.raises(TypeError, match="whole must be True or False"):
        Combined(whole=1)
    assert wp.get_device("cpu").is_cpu


def test_jax_refuses_them():
    jax = pytest.importorskip("jax")
    from warp_phys.interop import jax as bridge

    with pytest.raises(ValueError, match="in JAX it must be elementwise"):
        bridge.rollout(SYSTEM, lambda w, x: x @ w, jax.numpy.ones((4, 1)), SYSTEM.sample(3), 5, FLOW)
