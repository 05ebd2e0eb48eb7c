"""What only a GPU can show: agreement with the CPU, torch's streams, graphs of both. Skipped where there is none."""

import pytest
import torch
import warp as wp

from tests.rollout.reference import relative
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout

CUDA = [device.alias for device in wp.get_cuda_devices()]
pytestmark = pytest.mark.skipif(
    not CUDA or not torch.cuda.is_available(), reason="needs a CUDA device that both Warp and torch see"
)


def _network(dtype, device):
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(6, 100),
        torch.nn.Tanh(),
        torch.nn.Linear(100, 100),
        torch.nn.Tanh(),
        torch.nn.Linear(100, 1),
    ]
    return torch.nn.Sequential(*layers).to(device, dtype)


def _update(dtype, device, flow="C", backend="auto", seed=0):
    system, net = CartPole(poles=2), _network(dtype, device)
    rollout = Rollout(system, net, 100, flow, backend=backend)
    states, controls = rollout(torch.as_tensor(system.sample(16, seed)).to(device, dtype))
    system.loss(states, controls).backward()
    return states.detach().cpu(), torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()


@pytest.mark.parametrize("backend", ["general", "fused"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("flow", ["R", "M", "C"])
def test_cuda_equals_cpu(flow, dtype, tolerance, backend):
    cpu, cuda = (_update(dtype, device, flow, backend) for device in ("cpu", "cuda"))
    assert relative(cuda[0], cpu[0]) < tolerance
    if flow != "C" or dtype == torch.float64:  # in float32 a component near zero may change sides
        assert relative(cuda[1], cpu[1]) < 10 * tolerance


def test_torchs_current_stream_is_used():
    """Without any synchronisation by hand, on a stream that is not the default one."""
    expected = _update(torch.float64, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for seed in range(3):
            _update(torch.float64, "cuda", seed=seed)
        got = _update(torch.float64, "cuda")
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-10, atol=1e-14)


def test_no_transfer_of_the_trajectory():
    system, net = CartPole(poles=2), _network(torch.float32, "cuda")
    states, controls = Rollout(system, net, 10)(torch.as_tensor(system.sample(4), device="cuda"))
    assert states.is_cuda and controls.is_cuda and system.loss(states, controls).is_cuda
