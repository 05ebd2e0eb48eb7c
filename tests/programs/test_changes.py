"""What changes between two calls of a rollout whose module is a row program: the general backend's numbers, always."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.programs.test_modules import STEPS, SYSTEM, Module, differences, double, gradients_of, linear, states
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch import Rollout

NN = torch.nn
GAIN, SETTINGS, TABLE, SHARED = 1.0, SimpleNamespace(gain=1.0), np.ones(1000), np.zeros(1)


class Slots:
    """An object without a dictionary."""

    __slots__ = "gain"


class Empty:
    """An object that gets attributes later."""


ANOTHER = 0.5


def ACT(x):
    return x + 0.1


act = ACT


def helper(x):
    return x * SETTINGS.gain


class Policy(NN.Module):
    """Reads everything that a forward can read, with dropout, a running normalisation and a branch on an attribute."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        size = SYSTEM.state_size
        self.first, self.norm, self.last = NN.Linear(size, 6), NN.LayerNorm(6), NN.Linear(6, 1)
        self.drop = NN.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(size))
        self.gain, self.options, self.act = 1.0, {"shift": [0.0]}, torch.tanh
        self.table, self.plain, self.slots = np.ones(3), torch.zeros(()), Slots()
        self.slots.gain, self.taken, self.empty = 1.0, torch.from_numpy(SHARED), Empty()
        self.unused = torch.ones(2, dtype=torch.complex64).conj()

    @property
    def factor(self):
        return self.gain * TABLE[0]

    def inside(self, h):
        return self.norm(self.act(h)) * self.scale * GAIN

    def forward(self, x):
        h = self.drop(helper(self.inside(self.first(x - self.mean)))) + self.options["shift"][0] + self.plain
        factor = self.factor * float(self.table[0]) * self.slots.gain
        return self.last(h) * factor + self.taken[0] + getattr(self.empty, "more", 0.0)


@pytest.fixture(scope="module")
def fused():
    module = double(Policy)
    rollout = Rollout(SYSTEM, module, STEPS, backend="auto")
    for _ in range(4):
        assert not differences(module, rollout, states(5), "R")
    assert rollout.backend == "fused"
    return rollout


def same(rollout, flow="M", backend="fused"):
    assert rollout.backend == backend
    assert not differences(rollout.controller, rollout, states(5), flow)


def before_and_after(rollout):
    """Return the controls, to see that a change is one."""
    with torch.no_grad():
        return rollout(states(5))[1]


def test_weights_in_every_way(fused):
    module = fused.controller
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    old = copy.deepcopy(module.state_dict())
    for change in (
        optimiser.step,
        lambda: module.load_state_dict(old),
        lambda: module.last.weight.data.mul_(1.5),
        lambda: setattr(module.norm.bias, "data", torch.full((6,), 0.3, dtype=torch.float64)),
        lambda: torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(module.parameters()) * 0.9, module.parameters()
        ),
    ):
        first = before_and_after(fused)
        same(fused)
        change()
        assert not torch.equal(before_and_after(fused), first)
        same(fused, "C")


def test_buffers_without_a_new_reading(fused):
    reads, module = fused._adapter._reads, fused.controller
    for i in range(18):
        first = before_and_after(fused)
        module.mean.lerp_(torch.full_like(module.mean, float(i + 1)), 0.1)
        assert not torch.equal(before_and_after(fused), first)
        same(fused)
    assert fused._adapter._reads <= reads + 1


def test_value_and_grad_with_a_buffer(fused):
    """The memory of such passes is kept; what a parameter that is not read gets is nothing."""
    for _ in range(2):
        fused.controller.mean.add_(0.05)
        wanted = gradients_of(Rollout(SYSTEM, fused.controller, STEPS, "M", backend="general"), "M", states(5))
        fused.flow = "M"
        fused.value_and_grad(states(5), "every", 0.3)
        for name, p in fused.controller.named_parameters():
            if wanted[name] is None:
                assert p.grad is None, name
            else:
                torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)


def set_global(name, value):
    globals()[name] = value


CHANGES = {
    "an attribute": lambda m: setattr(m, "gain", m.gain + 0.5),
    "an attribute in a list in a mapping": lambda m: m.options["shift"].__setitem__(0, 0.4),
    "a function": lambda m: setattr(m, "act", torch.sigmoid),
    "a global that a method reads": lambda m: set_global("GAIN", GAIN + 0.25),
    "an object that a helper reads": lambda m: setattr(SETTINGS, "gain", SETTINGS.gain + 0.25),
    "an attribute of the class": lambda m: setattr(type(m), "scale", type(m).scale + 0.5),
    "an array that a property reads": lambda m: TABLE.__setitem__(0, TABLE[0] + 0.5),
    "an array of its own": lambda m: m.table.__setitem__(0, m.table[0] + 0.5),
    "a tensor that is no buffer": lambda m: m.plain.add_(0.3),
    "an attribute that was not there": lambda m: setattr(m.empty, "more", 0.5),
    "an object with slots": lambda m: setattr(m.slots, "gain", m.slots.gain + 0.5),
    "a tensor's memory, not by the tensor": lambda m: SHARED.__setitem__(0, SHARED[0] + 0.5),
    "an epsilon": lambda m: setattr(m.norm, "eps", 0.5),
    "a layer": lambda m: setattr(m, "last", double(lambda: NN.Linear(6, 1))),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_forward_reads(fused, what):
    fused._adapter._reads = 0  # each of these changes alone
    same(fused)
    controls = fused.controller(states(5))
    CHANGES[what](fused.controller)
    assert not torch.equal(fused.controller(states(5)), controls), "nothing has changed"
    assert not differences(fused.controller, fused, states(5), "M")


def test_another_forward_of_the_class(fused, monkeypatch):
    fused._adapter._reads = 0
    same(fused)
    monkeypatch.setattr(Policy, "forward", lambda m, x: m.last(m.first(x)) * m.factor)
    same(fused)


def test_functions_one_after_the_other(fused):
    """One that takes the place in memory of one before is not taken for it."""
    module = fused.controller
    fused._adapter._reads = 0
    for i in range(4):
        module.act = None
        module.act = eval(f"lambda h: torch.tanh(h) + {i}")
        assert not differences(module, fused, states(5), "M")
    module.act = torch.tanh


def test_what_requires_gradients(fused):
    module = fused.controller
    fused._adapter._reads = 0
    for part in (module.first.weight, module.norm.bias, module.last.weight):
        part.requires_grad_(False)
        same(fused)
    for p in module.parameters():
        p.requires_grad_(True)
    same(fused, "C")


def test_training_and_evaluation(fused):
    module = fused.controller
    fused._adapter._reads = 0
    same(fused)
    for _ in range(3):
        module.train()
        try:
            with pytest.raises(NotRepeatable):
                SYSTEM.loss(*fused(states(5))).backward()
        finally:
            module.eval()
        same(fused)


def test_hooks_that_come_and_go(fused):
    module = fused.controller
    handle = module.norm.register_forward_hook(lambda part, inputs, output: 3 * output)
    same(fused, backend="general")
    assert fused.why_general
    handle.remove()
    same(fused)
    seen = []
    handle = module.last.weight.register_hook(lambda grad: seen.append(1) or 2 * grad)
    same(fused)
    assert seen
    handle.remove()
    same(fused)


def test_copies(fused):
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            twin.controller.last.weight.mul_(-1.0)
        for _ in range(4):
            assert not differences(twin.controller, twin, states(5), "M")
        assert twin.backend == "fused"
        assert not torch.equal(before_and_after(twin), before_and_after(fused))
        same(fused)


def test_a_module_that_counts_its_calls():
    def forward(m, x):
        m.calls += 1
        return m.last(m.first(x).sin())

    module = double(lambda: Module(forward, first=linear(4, 5), last=linear(5)))
    module.calls = 0
    rollout = Rollout(SYSTEM, module, STEPS)
    for _ in range(6):
        assert not differences(module, rollout, states(5), "R")
    assert rollout.backend == "general" and rollout.why_general


def test_what_another_helper_reads():
    """A function that takes the place of one reads other globals."""

    class Helped(NN.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = NN.Linear(SYSTEM.state_size, 4), NN.Linear(4, 1)

        def forward(self, x):
            return self.last(act(self.first(x)).tanh())

    module = double(Helped)
    rollout = Rollout(SYSTEM, module, STEPS, backend="fused")
    same(rollout)
    set_global("act", lambda x: x * ANOTHER)
    try:
        same(rollout)
        set_global("ANOTHER", 1.5)
        same(rollout)
    finally:
        set_global("act", ACT)


def test_strides_of_weights():
    class Square(NN.Module):
        def __init__(self):
            super().__init__()
            size = SYSTEM.state_size
            self.first, self.last = NN.Linear(size, size), NN.Linear(size, 1)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)) + x)

    module = double(Square)
    rollout = Rollout(SYSTEM, module, STEPS, backend="auto")
    for _ in range(4):
        same(rollout, backend=rollout.backend)
    assert rollout.backend == "fused"
    module.first.weight.data = module.first.weight.data.t()
    same(rollout, backend="general")
    assert "not contiguous" in rollout.why_general


def test_a_chain_that_is_none():
    """What was kept for a program is not found under the key of a chain."""

    class Scaled(NN.Module):
        gain = 1.0

        def forward(self, x):
            return self.gain * torch.tanh(x)

    module = double(lambda: NN.Sequential(NN.Linear(SYSTEM.state_size, 8), Scaled(), NN.Linear(8, 1)))
    rollout = Rollout(SYSTEM, module, STEPS, "M", backend="fused")
    for phase, gain in enumerate((1.0, 1.0, 1.0, 4.0, 4.0)):
        module[1].gain = gain
        module[0].bias.requires_grad_(phase % 2 == 1)
        wanted = gradients_of(Rollout(SYSTEM, module, STEPS, "M", backend="general"), "M", states(5))
        for _ in range(3):
            rollout.value_and_grad(states(5), "every", 0.3)
            for name, p in module.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)
