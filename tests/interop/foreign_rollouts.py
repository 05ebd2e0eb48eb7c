"""What tests of foreign functions as simulators share: a small network, initial states, everything of an update."""

import numpy as np
import torch

from warp_phys import CartPole
from warp_phys.interop.torch import Rollout

SYSTEM, STEPS = CartPole(poles=2), 55


def make_network(device):
    """A network for two poles, float64."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    return torch.nn.Sequential(*layers).double().to(device)


def initial_states(device, batch=5):
    """Initial states, shape (batch, 6)."""
    return torch.as_tensor(SYSTEM.sample(batch, dtype=np.float64), device=device)


def all_of_an_update(system, module, x0, flow, when):
    """Return states, loss, update of the network and adjoint of x0."""
    module.zero_grad()
    x0 = x0.clone().requires_grad_()
    states, controls = Rollout(system, module, STEPS, flow)(x0)
    loss = system.loss(states, controls, when=when, control_cost=0.1)
    loss.backward()
    return states.detach(), loss.detach(), torch.cat([p.grad.flatten() for p in module.parameters()]), x0.grad
