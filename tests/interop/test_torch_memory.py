"""Flows with a memory: M compared with a running average of R, by every way in which an update is taken."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.springs import Springs
from warp_phys import STOPPED, Combined, Dense, Diverged, Flow, Polynomial, agree
from warp_phys import Rollout as WarpRollout
from warp_phys.diagnose.landscape import Landscape
from warp_phys.flow import combine, resolve
from warp_phys.interop.torch import Rollout, Update, diagnose
from warp_phys.interop.torch.graph import WholeUpdate
from warp_phys.interop.torch.memory import combine_remembering

NN = torch.nn
STEPS, BATCH = 12, 5
SYSTEM = Springs(size=5, pushes=2)


def network():
    torch.manual_seed(0)
    return NN.Sequential(NN.Linear(SYSTEM.state_size, 19), NN.Tanh(), NN.Linear(19, SYSTEM.control_size)).double()


def make(flow="averaged", graph=False, **options):
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, flow, **options)
    return Update(rollout, torch.optim.Adam(module.parameters(), lr=0.01, fused=True), "every", 0.3, graph=graph)


def start(seed=0):
    return torch.as_tensor(SYSTEM.sample(BATCH, seed, np.float64))


def weights(update):
    return torch.cat([p.detach().flatten() for p in update.rollout.controller.parameters()])


def by_hand(memory, steps, rule=agree, either=False):
    """The same from the updates of M and R alone."""
    module = network()
    optimiser, mean, other_signs, saved = torch.optim.Adam(module.parameters(), lr=0.01), 0.0, 0, 0
    for seed in range(steps):
        found = []
        for flow in ("M", "R"):
            Rollout(SYSTEM, module, STEPS, flow, backend="general").value_and_grad(start(seed), "every", 0.3)
            found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        mean = memory * mean + (1.0 - memory) * found[1] / found[1].norm()
        other_signs += int((mean.sign() != found[1].sign()).sum())
        update, at = rule(found[0], mean), 0
        if either:
            now = rule(found[0], found[1])
            saved += int(((update == 0.0) & (now != 0.0)).sum())
            update = torch.where(update == 0.0, now, update)
        for p in module.parameters():
            p.grad = update[at : at + p.numel()].view(p.shape)
            at += p.numel()
        optimiser.step()
    assert other_signs > 0 and (saved > 0) == either  # else the memory would make no difference
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(("memory", "either"), [(0.5, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(
    "options",
    [{}, {"graph": True}, {"backend": "general"}, {"reduce": lambda updates: None}, {"on_divergence": "mask"}],
    ids=["fused", "graph", "general", "reduced", "masked"],
)
def test_updates(memory, either, options):
    update = make(Combined(memory=memory, either=either), **options)
    for seed in range(6):
        update(start(seed))
    torch.testing.assert_close(weights(update), by_hand(memory, 6, either=either), rtol=1e-9, atol=1e-12)
    grads = torch.cat([p.grad.flatten() for p in update.rollout.controller.parameters()])
    assert update.rollout.report.norm == pytest.approx(float(grads.norm()), rel=1e-12)
    assert update.rollout.flow == Combined(memory=memory, either=either)


def test_a_rule_of_ones_own():
    def half(base, other):
        return 0.5 * agree(base, other)

    update = make(Combined(rule=half, memory=0.8))
    for seed in range(4):
        update(start(seed))
    assert not update.is_recorded
    torch.testing.assert_close(weights(update), by_hand(0.8, 4, half), rtol=1e-9, atol=1e-12)


def test_no_memory_is_the_published_flow():
    assert Combined(memory=0.0) == resolve("C") and Combined(memory=0.9) == resolve("averaged")
    assert resolve("averaged").name == "averaged" and resolve("averaged").letter == ""
    assert Combined(memory=0.25).name == "agree(modified; regular, memory 0.25)"
    assert Combined(memory=0.25, either=True).name == "agree(modified; regular, memory 0.25 or now)"
    assert resolve("either") == Combined(memory=0.9, either=True) and resolve("either").name == "either"


def test_steps_of_several_kinds_share_one_average():
    """Recorded launches and steps that autograd takes; a flow without a memory in between leaves it alone."""
    whole, mixed = make(), make()
    for seed in range(6):
        whole(start(seed))
        if seed == 3:  # an optimiser with a hook is taken step by step
            handle = mixed.optimiser.register_step_pre_hook(lambda *_: None)
        mixed(start(seed))
        assert mixed.is_recorded == (seed < 3 or seed > 4)
        if seed == 4:
            handle.remove()
            mean = mixed._mean().clone()
            for update in (whole, mixed):
                update.rollout.flow = "C"
                update(start(7))
                update.rollout.flow = "averaged"
            assert torch.equal(mixed._mean(), mean)
    torch.testing.assert_close(weights(mixed), weights(whole), rtol=1e-10, atol=1e-13)


def check_continues(update, other):
    for seed in range(3, 6):
        update(start(seed))
        other(start(seed))
    assert torch.equal(weights(update), weights(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda update: pickle.loads(pickle.dumps(update))])
def test_copies(copied):
    update = make()
    for seed in range(3):
        update(start(seed))
    other = copied(update)
    assert other._mean().data_ptr() != update._mean().data_ptr()
    check_continues(update, other)


def test_checkpoints():
    update, other, forgetful = make(), make(), make()
    assert update.state_dict() == {"flow": None, "means": {}}
    for seed in range(3):
        update(start(seed))
    for one in (other, forgetful):
        one(start(9))  # as the one that goes on may have launches that point to another average
        one.rollout.controller.load_state_dict(update.rollout.controller.state_dict())
        one.optimiser.load_state_dict(copy.deepcopy(update.optimiser.state_dict()))
    state = update.state_dict()
    other.load_state_dict(state)
    update(start(3))
    other(start(3))
    assert all((state["means"][name] != mean).any() for name, mean in update.state_dict()["means"].items())  # copies
    check_continues(update, other)
    for seed in range(3, 6):
        forgetful(start(seed))
    assert not torch.equal(weights(update), weights(forgetful))


def test_states_that_do_not_fit():
    update = make()
    for state in ({"means": {}}, None, {1: 2, "flow": None}):
        with pytest.raises(ValueError, match="state must have flow and means"):
            update.load_state_dict(state)
    with pytest.raises(ValueError, match=r"mean of 0.bias of shape \(5,\), but 0.bias has shape \(19,\)"):
        update.load_state_dict({"flow": None, "means": {"0.bias": torch.zeros(5)}})
    with pytest.raises(ValueError, match="but 7.bias is no parameter of the controller"):
        update.load_state_dict({"flow": None, "means": {"7.bias": torch.zeros(5)}})
    with pytest.raises(TypeError, match="mean of 0.bias must be a tensor, got list"):
        update.load_state_dict({"flow": None, "means": {"0.bias": [0.0]}})


def test_a_state_of_another_precision_is_converted():
    """As one of another device is: checkpoints are often read on a CPU."""
    update, other = make(), make()
    update(start(0))
    state = update.state_dict()
    state["means"] = {name: mean.float() for name, mean in state["means"].items()}
    other.load_state_dict(state)
    assert other._mean().dtype == torch.float64
    torch.testing.assert_close(other._mean(), update._mean(), rtol=1e-6, atol=1e-8)


def parts(update):
    return {name: mean.clone() for name, mean in update.state_dict()["means"].items()}


def test_every_parameter_has_its_own_average():
    """That of a parameter that is frozen is kept until it is trained again; one that comes anew begins at zero."""
    update = make()
    controller = update.rollout.controller
    update(start(0))
    first = parts(update)
    controller[0].bias.requires_grad_(False)
    update(start(1))
    second = parts(update)
    assert torch.equal(second["0.bias"], first["0.bias"]) and not torch.equal(second["2.bias"], first["2.bias"])
    assert len(update._mean()) == sum(p.numel() for p in controller.parameters() if p.requires_grad)
    controller[0].bias.requires_grad_(True)
    update(start(2))
    assert update._mean().norm() > 0.1  # 0.1 is the length of one update's share
    assert not torch.equal(parts(update)["0.bias"], first["0.bias"])
    controller.requires_grad_(False)
    for backend in ("fused", "general"):
        update.rollout._backend = backend
        before = parts(update)
        update(start(3))
        assert all(torch.equal(mean, before[name]) for name, mean in parts(update).items())


def test_the_average_is_that_of_one_flow():
    update, other = make(Combined(memory=0.9)), make(Combined(other=STOPPED, memory=0.9))
    update(start(0))
    for one in (update, other):
        one.rollout.flow = Combined(other=STOPPED, memory=0.9)
        one(start(1))
    assert float(update._mean().norm()) == pytest.approx(0.1)
    assert float(make(Combined(other=Flow((1.0,) * STEPS, 0.5), memory=0.9))(start(0))) > 0.0
    update.rollout.flow = Combined(other=STOPPED, memory=0.5)  # another decay of the same average
    update(start(2))
    assert float(update._mean().norm()) > 0.5 * 0.9


def test_a_step_that_diverges_changes_nothing():
    update = make()
    update(start(0))
    mean, before = update._mean().clone(), weights(update)
    for backend in ("fused", "general"):
        update.rollout._backend = backend
        bad = start(1)
        bad[0, 0] = 1e308
        with pytest.raises(Diverged):
            update(bad)
        assert torch.equal(update._mean(), mean) and torch.equal(weights(update), before)


@pytest.mark.parametrize("flow", ["averaged", "either"])
def test_what_a_cuda_graph_holds(flow):
    """The passes before a capture and a trajectory that diverges leave the average as it is."""
    update = make(flow, backend="general")
    update(start(0))
    body = WholeUpdate(update.rollout, update.optimiser, BATCH, "every", 0.3, "none", 1.0, update._mean())
    mean, before = update._mean().clone(), weights(update)
    body.x0.copy_(start(1))
    body.run(step=False)
    assert torch.equal(update._mean(), mean)
    body.x0[0, 0] = 1e308
    body.run(step=True)
    assert torch.equal(update._mean(), mean) and torch.equal(weights(update), before)
    twin = make(flow, backend="general")
    twin(start(0))
    for seed in range(1, 5):
        body.x0.copy_(start(seed))
        body.run(step=True)
        twin(start(seed))
    torch.testing.assert_close(weights(update), weights(twin), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(update._mean(), twin._mean(), rtol=1e-10, atol=1e-13)


def test_an_update_that_is_not_finite_stays_out():
    flow, mean = Combined(memory=0.5), torch.tensor([1.0, -1.0])
    base = torch.tensor([2.0, 3.0])
    for value in (torch.inf, torch.nan):
        update = combine_remembering(flow, base, torch.tensor([value, 1.0]), mean)
        assert torch.equal(update, torch.tensor([2.0, 0.0])) and torch.equal(mean, torch.tensor([1.0, -1.0]))
    either = Combined(memory=0.5, either=True)
    for now, expected in (([-1.0, 1.0], [2.0, 3.0]), ([torch.nan, 1.0], [2.0, 0.0]), ([1.0, -torch.inf], [2.0, 0.0])):
        update = combine_remembering(either, base, torch.tensor(now), torch.tensor([1.0, -1.0]))
        assert torch.equal(update, torch.tensor(expected))
    combine_remembering(flow, base, torch.zeros(2), mean)
    assert torch.equal(mean, torch.tensor([0.5, -0.5]))


def test_either_of_what():
    with pytest.raises(ValueError, match="either=True needs a memory above 0"):
        Combined(either=True)
    with pytest.raises(TypeError, match="either must be True or False, got 1"):
        Combined(memory=0.9, either=1)


@pytest.mark.parametrize("memory", [-0.1, 1.0, 2])
def test_memories_out_of_range(memory):
    with pytest.raises(ValueError, match="memory must be at least 0 and below 1"):
        Combined(memory=memory)


@pytest.mark.parametrize("memory", ["0.9", None, True])
def test_memories_that_are_no_numbers(memory):
    with pytest.raises(TypeError, match="memory must be a finite number"):
        Combined(memory=memory)


def test_whoever_keeps_no_average_says_so():
    module, words = network(), "has a memory, which only warp_phys.interop.torch.Update keeps"
    rollout, flow = Rollout(SYSTEM, module, STEPS, "averaged"), resolve("averaged")
    with torch.no_grad():
        states, _ = rollout(start())  # nothing is asked of the flow
    assert states.shape == (STEPS + 1, BATCH, SYSTEM.state_size)
    refused = [
        lambda: rollout(start()),
        lambda: rollout.value_and_grad(start()),
        lambda: diagnose(Rollout(SYSTEM, module, STEPS), start(), "averaged"),
        lambda: WarpRollout(SYSTEM, Dense((SYSTEM.state_size, SYSTEM.control_size), device="cpu"), 3, "averaged"),
        lambda: Landscape(Polynomial()).evaluate(np.zeros((1, 2)), "averaged"),
        lambda: combine(flow, [start(), start()]),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=words):
            call()
    assert all(p.grad is None for p in module.parameters())


class Watching(NN.Module):
    """A network that notes the flow of its rollout at each call."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        SEEN.append((ROLLOUTS[-1].flow, ROLLOUTS[-1].flow.memory) if ROLLOUTS else None)
        return self.net(x)


SEEN, ROLLOUTS = [], []


def test_the_flow_of_the_rollout_stays_while_an_update_is_found():
    """Whoever looks meanwhile, the controller or another thread, finds the flow that was set."""
    module = Watching()
    rollout = Rollout(SYSTEM, module, STEPS, "averaged", backend="general")
    ROLLOUTS.append(rollout)
    SEEN.clear()
    try:
        Update(rollout, torch.optim.Adam(module.parameters()), "every")(start())
    finally:
        ROLLOUTS.clear()
    flow = resolve("averaged")
    assert SEEN and set(SEEN) == {(flow, flow.memory)}
