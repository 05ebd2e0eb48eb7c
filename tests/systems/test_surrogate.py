"""Steps of one simulator with the adjoints of another, against torch that does the same, in float64."""

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout import reference
from tests.rollout.test_beside import Plain, Remembering
from warp_phys import CartPole, Flow, Surrogate, audit
from warp_phys.flow import combine, resolve
from warp_phys.interop.torch import Rollout, TorchSystem, Update

STEPS, BATCH = 9, 7
SYSTEM = CartPole(dt=0.05, pole_mass=0.3, half_length=0.4)


class Accurate:
    """A cart-pole with friction, in substeps, that has no derivatives and no loss."""

    state_size, control_size = 4, 1

    def step(self, x, c, y):
        values = torch.from_numpy(x.numpy().copy())
        y.assign(accurate_step(values, torch.from_numpy(c.numpy())).numpy())


def accurate_step(x, c):
    fine = CartPole(dt=0.01)
    for _ in range(5):
        x = reference.cart_pole_step(fine, x, c - 0.5 * x[:, 1:2])
    return x


class ByTwo(torch.autograd.Function):
    """The step of one, the derivatives of the other."""

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(x, c)
        return accurate_step(x, c)

    @staticmethod
    def backward(ctx, adj):
        with torch.enable_grad():
            x, c = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            return torch.autograd.grad(reference.cart_pole_step(SYSTEM, x, c), [x, c], adj)


def _start():
    return torch.from_numpy(SYSTEM.sample(BATCH, dtype=np.float64)).requires_grad_()


def _loss(states, controls, *memories):
    return (states.cos() * torch.arange(1.0, len(states) + 1)[:, None, None]).mean() + controls.square().mean()


def _by_torch(policy, x0, h, leaves, flow):
    flow = resolve(flow)
    if not isinstance(flow, Flow):
        parts = [_by_torch(policy, x0, h, leaves, part) for part in (flow.base, flow.other)]
        return [combine(flow, pair) for pair in zip(*parts, strict=True)]
    gates = flow.physics, flow.controller, flow.memory
    return torch.autograd.grad(
        _loss(*reference.unroll_beside(ByTwo.apply, policy, x0, STEPS, None, h, gates, flow.limit)), leaves
    )


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_flows(learned, memory):
    """The adjoints are those of a system, or of a function of torch that might have been learned."""
    policy = Remembering(SYSTEM, 0, memory) if memory else Plain(SYSTEM)
    backward = TorchSystem(lambda x, c: reference.cart_pole_step(SYSTEM, x, c), 4, 1) if learned else SYSTEM
    x0, h = _start(), torch.zeros(BATCH, memory, dtype=torch.float64) if memory else None
    leaves = [x0, *policy.parameters()]
    for flow in ("R", "M", "S", "N", Flow(0.9, 0.7, limit=0.8), "C"):
        for leaf in leaves:
            leaf.grad = None
        rollout = Rollout(Surrogate(Accurate(), backward), policy, STEPS, flow, memory=memory)
        _loss(*rollout(x0, memory=h)).backward()
        assert rollout.backend == "general" and rollout.why_general.startswith("Surrogate is no System")
        for leaf, right in zip(leaves, _by_torch(policy, x0, h, leaves, flow), strict=True):
            assert torch.linalg.norm(leaf.grad - right) <= 1e-10 * torch.linalg.norm(right)


def test_updates_use_the_loss_of_either():
    policy = Plain(SYSTEM)
    update = Update(
        Rollout(Surrogate(Accurate(), SYSTEM), policy, STEPS), torch.optim.Adam(policy.parameters(), lr=0.01), "every"
    )
    losses = [float(update(_start().detach())) for _ in range(4)]
    assert losses[3] < losses[0]


def test_audit_reports_angles_and_judges_nothing():
    close = audit(Surrogate(Accurate(), CartPole(dt=0.05)), horizons=(1, 4))
    far = audit(Surrogate(Accurate(), CartPole(dt=0.05, half_length=5.0, gravity=1.0)), horizons=(1, 4))
    for report in (close, far):
        assert not report.exact and report.ok and not report.failures and not report.unclear
        assert "cosine" in str(report) and "WRONG" not in str(report)
    assert 0.95 < close.cosine(4) < close.cosine(1) < 1.0
    assert far.cosine(4) < 0.9 * close.cosine(4)
    exact = audit(Surrogate(SYSTEM, SYSTEM), horizons=(2,))
    assert exact.cosine(2) == pytest.approx(1.0, abs=1e-9)
    assert all(finding.cosine == pytest.approx(1.0, abs=1e-9) for finding in exact.findings)

    class Turned:
        state_size, control_size = 4, 1

        def step_vjp(self, x, c, adj_y, adj_x, adj_c):
            SYSTEM.step_vjp(x, c, adj_y, adj_x, adj_c)
            adj_c.assign(-adj_c.numpy())

    report = audit(Surrogate(SYSTEM, Turned()), horizons=(1,))
    by_name = {finding.component: finding.cosine for finding in report.findings}
    assert by_name.pop("force [N]") == pytest.approx(-1.0) and min(by_name.values()) == pytest.approx(1.0)


def test_an_exact_simulator_has_cosines_too():
    report = audit(SYSTEM, horizons=(1,))
    assert report.exact and report.cosine(1) == pytest.approx(1.0, abs=1e-9)


def test_what_is_refused():
    with pytest.raises(TypeError, match="forward must have step, Sizes has not"):
        Surrogate(type("Sizes", (), {"state_size": 4, "control_size": 1})(), SYSTEM)
    with pytest.raises(TypeError, match="backward must have step_vjp, Accurate has not"):
        Surrogate(SYSTEM, Accurate())
    with pytest.raises(TypeError, match="forward must be an instance, got the class Accurate"):
        Surrogate(Accurate, SYSTEM)
    with pytest.raises(ValueError, match="must have one state_size, Accurate has 4, CartPole has 6"):
        Surrogate(Accurate(), CartPole(poles=2))
    surrogate = Surrogate(Accurate(), SYSTEM)
    assert surrogate.states == SYSTEM.states and not hasattr(surrogate, "functions")
    x = wp.zeros((2, 4), dtype=wp.float64, device="cpu", requires_grad=True)
    with wp.Tape(), pytest.raises(RuntimeError, match="a wp.Tape cannot record the step of a Surrogate"):
        surrogate.step(x, wp.zeros((2, 1), dtype=wp.float64, device="cpu"), wp.zeros_like(x))
