"""What tests/gpu/run.sh asks of a device: all systems, all flows, both precisions, a batch of a million.

Skipped without a device; WARP_PHYS_GPU_DRY=1 runs the same on a CPU, small.
"""

import os

import numpy as np
import pytest
import torch
import warp as wp

from tests.problems import PROBLEMS
from tests.rollout.reference import relative
from warp_phys import CartPole
from warp_phys.flow import NAMED, memory_in, resolve
from warp_phys.interop.torch import Rollout, Update

DRY = os.environ.get("WARP_PHYS_GPU_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
pytestmark = pytest.mark.skipif(
    not DRY and not (torch.cuda.is_available() and wp.get_cuda_devices()),
    reason="needs a CUDA device that both Warp and torch see",
)
SYSTEMS = {type(problem.system).__name__: problem.system for problem in PROBLEMS if not problem.system.inputs}
LARGE = 10_000 if DRY else 1_000_000


def gradient(system, dtype, device, flow, steps=5, batch=4):
    """The last states and the update of a small network."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(system.state_size, 8), torch.nn.Tanh(), torch.nn.Linear(8, system.control_size)
    net = torch.nn.Sequential(*layers).double().to(device, dtype)
    x0 = torch.as_tensor(system.sample(batch, seed=0, dtype=np.float64)).to(device, dtype)
    rollout = Rollout(system, net, steps, flow, backend="general")
    has_memory = memory_in(resolve(flow))
    states, controls = Rollout(system, net, steps, "R", backend="general")(x0) if has_memory else rollout(x0)
    if has_memory:  # not by autograd
        Update(rollout, torch.optim.SGD(net.parameters(), lr=0.0), control_cost=0.1)(x0)
    else:
        system.loss(states, controls, control_cost=0.1).backward()
    return states[-1].detach().cpu().double(), torch.cat([p.grad.flatten() for p in net.parameters()]).cpu().double()


@pytest.mark.parametrize("name", list(SYSTEMS)[:2] if DRY else list(SYSTEMS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_every_system(name, dtype, tolerance):
    found = gradient(SYSTEMS[name], dtype, DEVICE, "R")
    for got, expected in zip(found, gradient(SYSTEMS[name], torch.float64, "cpu", "R"), strict=True):
        assert relative(got, expected) < tolerance


@pytest.mark.parametrize("flow", NAMED)
def test_every_flow(flow):
    found = gradient(CartPole(), torch.float64, DEVICE, flow)
    for got, expected in zip(found, gradient(CartPole(), torch.float64, "cpu", flow), strict=True):
        assert relative(got, expected) < 1e-9


@pytest.mark.parametrize("flow", ["R", "C"])
def test_a_large_batch(flow):
    """Rows that are all alike give the update of one row, whatever their number, and the loss falls."""
    system = CartPole()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(DEVICE)
    rollout = Rollout(system, net, 10, flow)
    x0 = torch.as_tensor(system.sample(1, seed=0)).to(DEVICE)
    rollout.value_and_grad(x0)
    one = torch.cat([p.grad.flatten() for p in net.parameters()]).clone()
    large = x0.expand(LARGE, -1).contiguous()
    rollout.value_and_grad(large)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert relative(found.cpu().double(), one.cpu().double()) < 1e-3
    update = Update(rollout, torch.optim.Adam(net.parameters(), lr=1e-3))
    losses = [float(update(large)) for _ in range(3)]
    assert losses[2] < losses[0]
