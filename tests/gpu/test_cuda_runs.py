"""What only a GPU can show: agreement with the CPU, torch's streams, graphs of both. Skipped where there is none."""

import pytest
import torch
import warp as wp

from controllers import GridCNN
from tests.programs import test_modules as modules
from tests.programs.test_blocks import POLICIES
from tests.rollout.reference import relative
from warp_phys import CartPole, Diverged, Quantum
from warp_phys.interop.torch import Hybrid, Rollout, Update

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


@pytest.mark.parametrize("batch", [5, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", POLICIES)
def test_programs(name, dtype, tolerance, batch):
    """Row programs by their own kernels, there and back, against the general backend of a CPU in float64."""
    found = []
    for device, backend, own in (("cpu", "general", torch.float64), ("cuda", "fused", dtype)):
        module = modules.double(POLICIES[name]).to(device, own)
        rollout = Rollout(modules.SYSTEM, module, 20, "R", backend=backend)
        x0 = modules.states(batch).to(device, own).requires_grad_()
        states, controls = rollout(x0)
        modules.SYSTEM.loss(states, controls, "every").backward()
        assert (rollout._adapter._blocks is not None) == (device == "cuda")
        update = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        found.append([tensor.detach().cpu().double() for tensor in (states, controls, x0.grad, update)])
    assert all(relative(b, a) < tolerance for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["general", "fused"])
def test_a_network_in_the_physics(backend):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(n, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for n in (7, 6)]
        module, policy = (part.to(device, torch.float64) for part in layers)
        hybrid = Hybrid(CartPole(poles=2), module, "controls")
        states, _ = Rollout(hybrid, policy, 20, "M", backend=backend)(
            torch.as_tensor(hybrid.sample(9)).to(device, torch.float64)
        )
        hybrid.loss(states, when="every").backward()
        grads = [p.grad.flatten() for part in (policy, module) for p in part.parameters()]
        found.append(torch.cat([states.detach().flatten(), *grads]).cpu())
    assert relative(found[1], found[0]) < 1e-9


def test_a_program_waits_to_be_asked_for():
    """ "auto" is general on CUDA."""
    rollout = Rollout(modules.SYSTEM, modules.double(POLICIES["everything"]).cuda(), 20)
    for _ in range(5):
        modules.SYSTEM.loss(*rollout(modules.states(5).cuda())).backward()
    assert rollout.backend == "general" and "cuda" in rollout.why_general


@pytest.mark.parametrize("batch", [5, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_convolutions_with_the_physics(batch, dtype, tolerance):
    """In float32 activations stand in the memory of a multiprocessor, in float64 they do not fit there."""
    system, found = Quantum(), []
    for device, backend in (("cpu", "general"), ("cuda", "fused")):
        net = GridCNN(system, seed=0).to(device, dtype)
        rollout = Rollout(system, net, 60, "R", backend=backend)
        states, controls = rollout(torch.as_tensor(system.sample(batch, 0)).to(device, dtype))
        system.loss(states, controls).backward()
        assert (rollout._adapter._blocks is not None) == (device == "cuda")
        update = torch.cat([p.grad.flatten() for p in net.parameters()])
        found.append([tensor.detach().cpu() for tensor in (states, controls, update)])
    assert all(relative(b, a) < tolerance for a, b in zip(*found, strict=True))


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


@pytest.mark.parametrize("backend", ["general", "fused"])
@pytest.mark.parametrize("flow", ["R", "C", "averaged", "either"])
def test_an_update_as_one_graph(flow, backend):
    """Graphs give the weights of updates step by step, also after a learning rate, a batch, a flow has changed."""
    system, nets = CartPole(poles=2), [_network(torch.float64, "cuda") for _ in range(2)]
    updates = [
        Update(
            Rollout(system, net, 50, flow, backend=backend),
            torch.optim.Adam(net.parameters(), lr=1e-3, fused=True, capturable=True),
            "every", 1e-3, "norm", 0.1, graph=graph,
        )
        for net, graph in zip(nets, (True, False), strict=True)
    ]  # fmt: skip

    def check(batch, seed):
        x0 = torch.as_tensor(system.sample(batch, seed), device="cuda").double()
        losses = [update(x0) for update in updates]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
        for own, other in zip(*(net.parameters() for net in nets), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-10)

    for seed in range(4):
        check(16, seed)
    assert updates[0].is_recorded and not updates[1].is_recorded

    def check_again(batch):
        for seed in range(3):  # step by step, captured, replayed
            check(batch, seed)
        assert updates[0].is_recorded

    check_again(5)
    for update in updates:
        update.optimiser.param_groups[0]["lr"] = 1e-2
    check_again(16)
    for update in updates:
        update.rollout.flow = "M"
    check_again(16)
    x0 = torch.full((16, 6), 1e300, dtype=torch.float64, device="cuda")
    before = [parameter.clone() for parameter in nets[0].parameters()]
    with pytest.raises(Diverged):
        updates[0](x0)
    assert all(torch.equal(a, b) for a, b in zip(before, nets[0].parameters(), strict=True))


def test_no_transfer_of_the_trajectory():
    system, net = CartPole(poles=2), _network(torch.float32, "cuda")
    states, controls = Rollout(system, net, 10)(torch.as_tensor(system.sample(4), device="cuda"))
    assert states.is_cuda and controls.is_cuda and system.loss(states, controls).is_cuda
