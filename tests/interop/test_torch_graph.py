"""What a CUDA graph holds of an update, run on a CPU: the numbers of `Update`; nothing that waits for the device."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interop.test_torch_update import Twin, network, start
from tests.springs import Springs
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout, Update
from warp_phys.interop.torch.controller import TorchController
from warp_phys.interop.torch.graph import WholeUpdate, key_of
from warp_phys.interop.torch.optimiser import check_capturable, options_of

SYSTEM = Springs(size=5, pushes=2)
STEPS = 9
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique")
"""Operations whose result a host must see."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in WAITS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


class Wavy(torch.nn.Module):
    """A module that the engine's layers do not express."""

    def __init__(self):
        super().__init__()
        self.inner = network()
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return torch.sin(self.inner(x))


def adam(module, **options):
    return torch.optim.Adam(module.parameters(), lr=0.01, fused=True, **options)


def whole(module, flow, when="final", control_cost=0.0, clip="none", clip_at=1.0, system=SYSTEM, batch=5):
    """Return an update that has taken its first step, and what a graph would capture of the next ones."""
    rollout = Rollout(system, module, STEPS, flow, backend="general")
    rollout.observe = ("M", "R")
    update = Update(rollout, adam(module), when, control_cost, clip, clip_at)
    update(start(batch, system=system))
    body = WholeUpdate(rollout, update.optimiser, batch, when, control_cost, clip, clip_at, update._mean())
    return update, body


def check_steps(update, body):
    """Hold three steps of what a graph would capture against those of a twin."""
    twin, module = Twin(update), body.rollout.controller
    for i in range(3):
        body.x0.copy_(start(seed=i))
        expected = twin.step(start(seed=i))
        with NoWaiting():
            body.run(step=True)
        torch.testing.assert_close(body.loss, expected, rtol=1e-11, atol=1e-13)
        assert float(body.diverged) == 0.0
        for own, other in zip(module.parameters(), twin.module.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
        assert body.report().norm == pytest.approx(twin.norm, rel=1e-9)


@pytest.mark.parametrize("make", [network, Wavy])
@pytest.mark.parametrize("flow", ["R", "M", "C", "geometric"])
@pytest.mark.parametrize("clip", [("none", 1.0), ("value", 1e-3), ("norm", 1e-2)])
def test_steps(make, flow, clip):
    check_steps(*whole(make(), flow, "every", 0.2, *clip))


def bent():
    return torch.nn.Sequential(*network(), torch.nn.Softsign())


@pytest.mark.parametrize("make", [network, bent])
@pytest.mark.parametrize("flow", ["R", "C"])
def test_steps_of_a_program(make, flow, monkeypatch):
    """As on CUDA, by kernels of its own."""
    monkeypatch.setattr(TorchController, "_on_cpu", lambda adapter: False)
    monkeypatch.setattr(TorchController, "at_once", property(lambda adapter: True, lambda adapter, value: None), False)
    update, body = whole(make(), flow, "every", 0.2)
    adapter = body.rollout._adapter
    monkeypatch.setattr(body.rollout, "_backend", "fused")
    assert body.rollout.backend == "fused"
    check_steps(update, body)
    assert adapter._blocks is not None and len(adapter._blocks._constants) == 2
    assert any(adapter._blocks is item for held in body._held if isinstance(held, list) for item in held)


def test_gradients_have_versions_of_their_own():
    """Sums of passes that come after, without a clearing in between: each parameter's gradient changes by itself."""
    module = network()
    update, body = whole(module, "C")
    body.x0.copy_(start())
    body.run(step=True)
    written = torch.cat([p.grad.flatten() for p in module.parameters()])
    batches, totals = [start(seed=s) for s in (1, 2)], []
    for flow in ("M", "R"):
        twin = copy.deepcopy(module)
        twin.zero_grad()
        sum(SYSTEM.loss(*Rollout(SYSTEM, twin, STEPS, flow)(x0)) for x0 in batches).backward()
        totals.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    for x0 in batches:
        SYSTEM.loss(*update.rollout(x0)).backward()
    expected = written + torch.where(totals[0].sign() == totals[1].sign(), totals[0], 0.0)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in module.parameters()]), expected)


def test_a_warm_up_takes_no_step():
    module = network()
    update, body = whole(module, "C")
    before = copy.deepcopy((module.state_dict(), update.optimiser.state_dict()["state"]))
    body.run(step=False)
    after = (module.state_dict(), update.optimiser.state_dict()["state"])
    assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())
    assert all(torch.equal(own[name], before[1][key][name]) for key, own in after[1].items() for name in own)


def test_a_trajectory_that_diverges_takes_no_step():
    module = network()
    update, body = whole(module, "C")
    body.x0.copy_(start())
    body.x0[2] = 1e308
    weight = module[0].weight.clone()
    count = update.optimiser.state[module[0].weight]["step"].clone()
    body.run(step=True)
    assert float(body.diverged) == 1.0
    assert torch.equal(module[0].weight, weight)
    assert torch.equal(update.optimiser.state[module[0].weight]["step"], count)
    body.x0.copy_(start())
    body.run(step=True)
    assert float(body.diverged) == 0.0 and not torch.equal(module[0].weight, weight)
    assert torch.isfinite(module[0].weight).all()
    assert torch.equal(update.optimiser.state[module[0].weight]["step"], count + 1.0)


def test_cart_poles_in_the_mean_over_time():
    """A system of the engine with parameters of its own."""
    system = CartPole(poles=2)
    module = network(system)
    update, body = whole(module, "C", [3, 9], 0.1, system=system)
    twin = Twin(update)
    body.x0.copy_(start(system=system))
    expected = twin.step(start(system=system))
    body.run(step=True)
    torch.testing.assert_close(body.loss, expected, rtol=1e-11, atol=1e-13)
    for own, other in zip(module.parameters(), twin.module.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-11)


def test_what_a_capture_depends_on():
    module = network()
    rollout, optimiser = Rollout(SYSTEM, module, STEPS, "C"), adam(module)
    keys = [(key_of(rollout, 5), options_of(optimiser))]

    def check_new():
        key = key_of(rollout, 5), options_of(optimiser)
        assert key not in keys and hash(key) is not None
        keys.append(key)

    assert (key_of(rollout, 5), options_of(optimiser)) in keys and key_of(rollout, 6) != keys[0][0]
    rollout.flow = "R"
    check_new()
    rollout.steps = 8
    check_new()
    rollout.observe = ("M",)
    check_new()
    module.eval()
    check_new()
    module[0].weight.data = module[0].weight.data.clone()
    check_new()
    optimiser.param_groups[0]["lr"] = 0.5
    check_new()
    optimiser.param_groups[0]["lr"] = torch.tensor(0.25)
    check_new()
    optimiser.param_groups[0]["lr"].mul_(0.5)  # a capture would take in the number
    check_new()


def test_a_capture_depends_on_what_lies_deep_in_a_module():
    module = Wavy()
    module.register_buffer("scale", torch.ones(1))
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    keys = [key_of(rollout, 5)]

    def check_new():
        assert key_of(rollout, 5) not in keys
        keys.append(key_of(rollout, 5))

    module.scale = torch.ones(1)
    check_new()
    module.inner[1] = torch.nn.ELU()
    check_new()
    module.inner[1].alpha = 0.5
    check_new()
    module.gain = 2.0
    check_new()
    module.gains = (1.0, (2, "two"))
    check_new()
    module.note = [1.0]  # may change in place, so it is not looked at
    assert key_of(rollout, 5) in keys
    handle = module.inner[0].register_forward_hook(lambda *_: None)
    assert key_of(rollout, 5) is None
    handle.remove()
    assert key_of(rollout, 5) in keys


def test_a_parameter_that_is_frozen_stays():
    module = network()
    update, _ = whole(module, "C")
    module[0].weight.requires_grad_(False)
    weight = module[0].weight.clone()
    assert module[0].weight.grad is not None
    body = WholeUpdate(update.rollout, update.optimiser, 5, "final", 0.0, "none", 1.0)
    body.x0.copy_(start())
    body.run(step=True)
    assert torch.equal(module[0].weight, weight) and module[0].weight.grad is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.Adam(p, capturable=True, fused=False),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_optimisers_that_no_graph_can_hold(make):
    with pytest.raises(ValueError, match="fused=True and capturable=True"):
        check_capturable(make([torch.nn.Parameter(torch.zeros(2))]))


def test_an_optimiser_for_a_graph():
    check_capturable(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True, capturable=True))
