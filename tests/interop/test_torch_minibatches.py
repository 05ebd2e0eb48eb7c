"""`Update.minibatches`: several steps in one call do what as many calls do, bit by bit."""

import copy
import itertools

import numpy as np
import pytest
import torch

from tests.springs import Springs
from warp_phys import Diverged
from warp_phys.interop.torch import Rollout, Update

NN = torch.nn
STEPS, BATCH, COUNT = 12, 5, 6
SYSTEM = Springs(size=5, pushes=2)


def make(flow="C", kind=torch.optim.Adam, on_divergence="raise", backend="auto", **options):
    torch.manual_seed(0)
    module = NN.Sequential(NN.Linear(SYSTEM.state_size, 19), NN.Tanh(), NN.Linear(19, SYSTEM.control_size)).double()
    rollout = Rollout(SYSTEM, module, STEPS, flow, on_divergence=on_divergence, backend=backend)
    return Update(rollout, kind(module.parameters(), lr=0.01), "every", 0.3, **options)


def states(count=COUNT):
    return torch.stack([torch.as_tensor(SYSTEM.sample(BATCH, seed, np.float64)) for seed in range(count)])


def nan_in(minibatch, row):
    x0 = states()
    x0[minibatch, row, 0] = np.nan
    return x0


def everything(update):
    """Weights, gradients, the optimiser's state."""
    module = update.rollout.controller
    memory = [tensor for state in update.optimiser.state.values() for tensor in state.values()]
    return [*module.parameters(), *(p.grad for p in module.parameters()), *memory]


def assert_same(one, other):
    for own, expected in zip(everything(one), everything(other), strict=True):
        assert torch.equal(own, expected)
    assert torch.equal(one.rollout.report.updates, other.rollout.report.updates)
    assert one.rollout.report.norm == other.rollout.report.norm > 0.0


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"flow": "R"}, True),
        ({"flow": "C", "clip": "norm", "clip_at": 0.01}, True),
        ({"backend": "general"}, False),
        ({"kind": torch.optim.SGD}, False),
    ],
)
def test_the_same_as_call_by_call(options, recorded, graph):
    together, apart = make(**options, graph=graph), make(**options, graph=graph)
    x0 = states()
    for part in (x0[:1], x0[1:4], x0[4:]):
        losses = together.minibatches(part)
        assert losses.shape == (len(part),) and not losses.requires_grad and together.is_recorded == recorded
        expected = torch.stack([apart(x) for x in part])
        assert torch.equal(losses, expected)
        assert_same(together, apart)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("steps", [0, 1, 3, COUNT])
def test_stopping(steps, kind):
    """`stop` is asked once before every step, whichever way the steps are taken."""
    asked = itertools.count()
    stopped, whole = make(kind=kind), make(kind=kind)
    losses = stopped.minibatches(states(), lambda: next(asked) >= steps)
    assert len(losses) == steps and next(asked) == min(steps + 1, COUNT)
    if steps:
        assert torch.equal(losses, whole.minibatches(states()[:steps]))
        assert_same(stopped, whole)


def test_masked_samples_in_between():
    together, apart = make(on_divergence="mask"), make(on_divergence="mask")
    x0 = states()
    x0[2, 1] = 1e308
    losses = together.minibatches(x0)
    assert together.is_recorded
    torch.testing.assert_close(losses, torch.stack([apart(x) for x in x0]), rtol=0.0, atol=0.0)
    assert_same(together, apart)


def test_a_divergence_leaves_the_steps_before():
    together, apart = make(), make()
    x0 = states()
    x0[2, 1] = 1e308
    version = next(together.rollout.controller.parameters())._version
    with pytest.raises(Diverged):
        together.minibatches(x0)
    for x in x0[:2]:
        apart(x)
    for own, expected in zip(everything(together), everything(apart), strict=True):
        assert torch.equal(own, expected)
    assert together.rollout.report.norm == apart.rollout.report.norm > 0.0
    assert next(together.rollout.controller.parameters())._version > version


def test_a_stop_that_uses_the_rollout():
    """Its pass takes the memory that the steps have been using."""
    together, apart = make(), make()
    rollout, other = together.rollout, states()[0] * 2.0

    def stop():
        assert torch.is_grad_enabled()
        rollout.value_and_grad(other, together.when, together.control_cost)
        return False

    losses = together.minibatches(states(), stop)
    assert torch.equal(losses, torch.stack([apart(x) for x in states()]))
    assert_same(together, apart)


def test_a_divergence_after_such_a_stop():
    """What the step before has left is still what the report tells."""
    together, apart = make(), make()
    x0 = states()
    x0[2, 1] = 1e308

    def stop():
        together.rollout.value_and_grad(states()[5], together.when, together.control_cost)
        return False

    with pytest.raises(Diverged):
        together.minibatches(x0, stop)
    for x in x0[:2]:
        apart(x)
    assert together.rollout.report.norm == apart.rollout.report.norm > 0.0


@pytest.mark.parametrize("call", [lambda update, x: update(x[0]), lambda update, x: update.minibatches(x)])
def test_torch_is_told_of_steps_alone(call):
    """A call that changes no weight leaves graphs of autograd valid."""
    update, x0 = make(), states()
    weights = next(update.rollout.controller.parameters())
    before = weights._version
    assert len(update.minibatches(x0, lambda: True)) == 0 and weights._version == before
    x0[0] = 1e308
    output = update.rollout.controller(states()[1])
    with pytest.raises(Diverged):
        call(update, x0)
    output.sum().backward()
    assert weights._version == before and not hasattr(update.optimiser, "_opt_called")


def test_reports_are_kept():
    update = make()
    update.minibatches(states())
    report, numbers = update.rollout.report, update.rollout.report.updates.clone()
    update.minibatches(states() * 2.0)
    assert torch.equal(report.updates, numbers) and not torch.equal(update.rollout.report.updates, numbers)


def test_numpy_and_other_layouts():
    one, other, third = make(), make(), make()
    x0 = states()
    strided = x0.repeat_interleave(2, dim=2)[:, :, ::2]
    assert not strided.is_contiguous()
    losses = one.minibatches(x0)
    assert torch.equal(losses, other.minibatches(x0.numpy())) and torch.equal(losses, third.minibatches(strided))
    assert_same(one, other)


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        (torch.zeros(BATCH, 5), ValueError, r"x0 must have shape \(minibatches, batch, 5\), got \(5, 5\)"),
        (torch.zeros(0, BATCH, 5), ValueError, r"got \(0, 5, 5\)"),
        (torch.zeros(3, BATCH, 9).double(), ValueError, r"batch, 5\), got \(3, 5, 9\)"),
        (torch.zeros(3, 0, 5).double(), ValueError, r"got \(3, 0, 5\)"),
        (torch.zeros(3, BATCH, 5), TypeError, "float64"),
        ("text", TypeError, "x0 must be"),
        (nan_in(3, 2), ValueError, "x0 must be finite, minibatch 3 is not, in row 2"),
    ],
)
def test_states_that_do_not_fit(x0, error, message):
    update = make()
    before = copy.deepcopy(update.rollout.controller.state_dict())
    with pytest.raises(error, match=message):
        update.minibatches(x0)
    assert all(torch.equal(value, before[name]) for name, value in update.rollout.controller.state_dict().items())
