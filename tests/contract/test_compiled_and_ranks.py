"""The same in code that torch compiles, and where torch averages over ranks."""

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.contract.by_torch import STEPS, SYSTEM, a_loss, assert_same, by_torch, collect, leaves, start
from tests.contract.test_controllers_that_change import (
    Centred,
    ClippedByFunction,
    Counter,
    Goals,
    Noisy,
    Value,
    _unzeroed,
)
from tests.contract.test_fused_programs import Policy
from tests.contract.test_hooks_and_histories import Conditioned, Own
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch import Rollout


def compiled(rollout):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def objective(x0):
        return a_loss(*rollout(x0))

    return objective


@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize("kind", [ClippedByFunction, Centred, Goals, Value])
def test_compiled_whole_steps(kind, flow):
    net = _unzeroed(kind)
    objective = compiled(Rollout(SYSTEM, net, STEPS, flow))
    assert_same(collect(lambda: objective(start()), leaves(net)), by_torch(net, leaves(net), start(), flow))


def test_compiled_hooks_on_parameters():
    net = Own()
    net.a.weight.register_hook(lambda g: 0.1 * g)
    objective = compiled(Rollout(SYSTEM, net, STEPS, "R"))
    assert_same(collect(lambda: objective(start()), leaves(net)), by_torch(net, leaves(net), start(), "R"))


@pytest.mark.parametrize("kind", [Counter, Noisy])
def test_compiled_controllers_that_change(kind):
    with pytest.raises(NotRepeatable):
        compiled(Rollout(SYSTEM, kind(), STEPS))(start()).backward()


@pytest.mark.parametrize("change", [True, False])
@pytest.mark.parametrize("is_chain", [True, False])
def test_compiled_controllers_of_which_code_was_made(is_chain, change):
    """Row programs and chains of layers that are other ones in the backward pass."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LeakyReLU(0.1), torch.nn.Linear(4, 1)).double()
    policy = net if is_chain else Policy()
    rollout = Rollout(SYSTEM, policy, STEPS, backend="fused")
    loss = compiled(rollout)(start())
    if change:
        net[1].negative_slope, policy.goal = 0.5, -1.0
        with pytest.raises(NotRepeatable, match="controller gives other controls now"):
            loss.backward()
    else:
        assert_same(collect(lambda: loss, leaves(policy)), by_torch(policy, leaves(policy), start(), "C"))


def test_compiled_rollouts_that_are_gone():
    loss = compiled(Rollout(SYSTEM, Centred(), STEPS))(start())
    gc.collect()
    with pytest.raises(RuntimeError, match="the rollout in compiled code is no more"):
        loss.backward()


def test_compiled_tensors_with_a_history():
    net = Conditioned(torch.nn.Linear(3, 2).double()(torch.randn(1, 3).double()))
    with pytest.raises(ValueError, match="in compiled code controller and system must depend on no tensors"):
        compiled(Rollout(SYSTEM, net, STEPS))(start()).backward()


def test_compiled_chains():
    """A start that has a history cannot be told from one that has none, in compiled code."""
    net = Own()
    rollouts = [Rollout(SYSTEM, net, 6, "C") for _ in range(2)]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def objective(x0):
        return a_loss(*rollouts[1](rollouts[0](x0)[0][-1]))

    with pytest.raises(Exception, match="what a rollout is given must have no gradient in compiled code"):
        objective(start()).backward()
    for rollout in rollouts:
        rollout.flow = "R"
    expected = collect(lambda: a_loss(*rollouts[1](rollouts[0](start())[0][-1])), leaves(net))
    assert_same(collect(lambda: objective(start()), leaves(net)), expected)


def _rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x0 = start(8)

    def mean(updates):
        dist.all_reduce(updates)
        updates /= dist.get_world_size()

    def update(module, net, flow, rows, **settings):
        return collect(lambda: a_loss(*Rollout(SYSTEM, module, STEPS, flow, **settings)(rows)), leaves(net))

    own, net = x0[4 * rank : 4 * rank + 4], Own()
    for flow in ("R", "M", "C"):
        wrapped, settings = DistributedDataParallel(net), {}
        if flow == "C":
            for module in (wrapped, torch.nn.Sequential(wrapped, torch.nn.Identity())):
                try:
                    Rollout(SYSTEM, module, STEPS, flow)(own)
                except ValueError as error:
                    results[rank, "refused"] = str(error)
            wrapped, settings = wrapped.module, {"reduce": mean}  # as it says
        got = update(wrapped, net, flow, own, **settings)
        expected = update(net, net, flow, x0)
        results[rank, flow] = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)
        )
    dist.destroy_process_group()


def test_distributed_data_parallel():
    """Its average over ranks is right for linear flows; a combined one is refused, and its advice is right."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (port, results), nprocs=2)
        found = dict(results)
    for rank in range(2):
        assert all(found[rank, flow] < 1e-10 for flow in "RMC")
        assert "controller holds a DistributedDataParallel" in found[rank, "refused"]
        assert "reduce=mean" in found[rank, "refused"]
