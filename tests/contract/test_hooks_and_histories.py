"""Hooks on parameters, tensors with a history, modules that keep what they have computed: as in torch."""

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tests.contract.by_torch import (
    FLOWS,
    STEPS,
    SYSTEM,
    a_loss,
    assert_same,
    by_engine,
    by_torch,
    collect,
    leaves,
    start,
)
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout, Update

each_flow = pytest.mark.parametrize("flow", FLOWS)


class Own(torch.nn.Module):
    """A module that the engine does not look into."""

    def __init__(self, inputs=4, hidden=8):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(inputs, hidden), torch.nn.Linear(hidden, 1)
        self.double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def chain():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def shared():
    net = Own(4, 4)
    net.b = torch.nn.Sequential(net.a, torch.nn.Linear(4, 1).double())
    return net


# --- hooks on parameters ---------------------------------------------------------------------------------------------


@each_flow
@pytest.mark.parametrize("make", [Own, chain, shared])
@pytest.mark.parametrize("backend", ["auto", "general"])
def test_a_hook_on_a_parameter_is_called_once(make, flow, backend):
    net, calls = make(), []
    tensors = leaves(net)
    tensors[0].register_hook(lambda g: 0.1 * g)
    tensors[0].register_hook(lambda g: calls.append(g.clone()) or g.clamp(-1e-4, 1e-4))
    tensors[-1].register_hook(lambda g: g * g)
    expected = by_torch(net, tensors, start(), flow)
    if flow == "C":  # torch has no C: its hooks come after the combination
        plain = make()
        expected = by_torch(plain, leaves(plain), start(), flow)
        expected[0], expected[-1] = (0.1 * expected[0]).clamp(-1e-4, 1e-4), expected[-1] * expected[-1]
    calls.clear()
    assert_same(by_engine(net, tensors, start(), flow, backend=backend), expected)
    assert len(calls) == 1


def test_many_chunks_and_passes_call_a_hook_once_each():
    net, calls = Own(), []
    handle = net.a.weight.register_hook(lambda g: calls.append(1))
    rollout, x0 = Rollout(SYSTEM, net, 9, "C"), start(1000)  # chunks of two steps
    for _ in range(3):
        a_loss(*rollout(x0)).backward()
    assert len(calls) == 3
    handle.remove()
    a_loss(*rollout(x0)).backward()
    assert len(calls) == 3


def test_hooks_in_updates():
    """In a training too: value_and_grad, and Update with its optimiser."""
    nets = [Own(), Own()]
    nets[0].a.weight.register_hook(torch.zeros_like)
    nets[1].a.weight.requires_grad_(False)
    for net in nets:
        update = Update(Rollout(SYSTEM, net, STEPS, "C"), torch.optim.SGD(leaves(net), lr=0.1))
        for _ in range(3):
            update(start())
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# --- tensors with a history ------------------------------------------------------------------------------------------


class Conditioned(torch.nn.Module):
    """A controller that is told a goal, as an attribute."""

    def __init__(self, z=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.z = torch.nn.Linear(6, 1).double(), z

    def forward(self, x):
        return torch.tanh(self.layer(torch.cat([x, self.z.expand(len(x), -1)], 1)))


@each_flow
def test_an_encoder_whose_output_is_an_attribute(flow):
    encoder, net, goal = torch.nn.Linear(3, 2).double(), Conditioned(), torch.randn(1, 3).double()

    def conditioned():
        net.z = torch.tanh(encoder(goal))
        return net

    tensors = [*leaves(net), *leaves(encoder)]
    assert_same(by_engine(conditioned, tensors, start(), flow), by_torch(conditioned, tensors, start(), flow))


@each_flow
def test_weights_that_are_no_parameters(flow):
    """In a list, in a closure, or made by another network: leaves of autograd's graph as good as parameters."""
    torch.manual_seed(0)
    loose = [torch.randn(4, 4).double().requires_grad_(), torch.randn(4, 1).double().requires_grad_()]
    hyper, seed = torch.nn.Linear(2, 4).double(), torch.randn(2).double()

    class Loose(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.bias = loose[:1], hyper(seed)
            self.register_buffer("scale", torch.ones(()).double())  # tells the precision

        def forward(self, x):
            return self.scale * torch.tanh(x @ self.weights[0] + self.bias) @ loose[1]

    tensors = [*loose, *leaves(hyper)]
    assert_same(by_engine(Loose, tensors, start(), flow), by_torch(Loose, tensors, start(), flow))


def test_a_functional_call():
    """Parameters that are replaced for the call alone: another thing in the backward pass, which says so."""
    net, scale = chain(), torch.ones((), dtype=torch.float64, requires_grad=True)

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("zero", torch.zeros(()).double())

        def forward(self, x):
            replaced = {name: p.detach() * scale for name, p in net.named_parameters()}
            return torch.func.functional_call(net, replaced, (x,))

    assert_same(by_engine(Called, [scale], start(), "C"), by_torch(Called, [scale], start(), "C"))
    rollout = Rollout(SYSTEM, net, STEPS)
    replaced = {name: p.detach() * scale for name, p in net.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(net, replaced):
        loss = a_loss(*rollout(start()))
    with pytest.raises(RuntimeError, match="has changed since the forward pass"):
        loss.backward()


def test_value_and_grad_replaces_what_it_finds():
    encoder, net, goal = torch.nn.Linear(3, 2).double(), Conditioned(), torch.randn(1, 3).double()
    rollout, found = Rollout(SYSTEM, net, STEPS, "C"), []
    for _ in range(2):
        net.z = encoder(goal)
        rollout.value_and_grad(start())
        found.append(encoder.weight.grad.clone())
    assert found[0].any() and torch.equal(*found)


def test_frozen_parameters_and_a_loose_weight():
    """Without a parameter to train there is still something to differentiate by."""
    net = Conditioned(torch.zeros(1, 2).double().requires_grad_()).requires_grad_(False)
    assert_same(by_engine(net, [net.z], start(), "C"), by_torch(net, [net.z], start(), "C"))


# --- what is computed once -------------------------------------------------------------------------------------------


@each_flow
def test_cached_parametrisations(flow):
    net = torch.nn.Sequential(weight_norm(torch.nn.Linear(4, 8)), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    tensors = leaves(net)
    expected = by_torch(net, tensors, start(), flow)
    with parametrize.cached():
        assert_same(by_engine(net, tensors, start(), flow), expected)
    with parametrize.cached():
        loss = a_loss(*Rollout(SYSTEM, net, STEPS, flow)(start()))
    assert_same(collect(lambda: loss, tensors), expected)  # the cache is gone before the backward pass


@each_flow
def test_a_module_that_remembers_a_weight(flow):
    class Memoised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.raw, self.made = torch.nn.Parameter(torch.randn(4, 1).double()), None

        def forward(self, x):
            if self.made is None:
                self.made = torch.nn.functional.softplus(self.raw)
            return -x @ self.made

    net = Memoised()

    def fresh():
        net.made = None
        return net

    assert_same(by_engine(fresh, [net.raw], start(), flow), by_torch(fresh, [net.raw], start(), flow))


def test_a_memory_filled_without_a_graph_trains_as_little_as_in_torch():
    net = torch.nn.Sequential(weight_norm(torch.nn.Linear(4, 8)), torch.nn.Linear(8, 1)).double()
    with parametrize.cached():
        with torch.no_grad():
            net(start())
        a_loss(*Rollout(SYSTEM, net, STEPS, "R")(start())).backward()
    assert net[0].parametrizations.weight.original1.grad is None and net[1].weight.grad.any()


# --- C of a whole ----------------------------------------------------------------------------------------------------


@each_flow
@pytest.mark.parametrize("make", [Own, chain])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 8, 1)])
def test_rollouts_in_a_chain(make, flow, lengths):
    net = make()
    whole, x0 = by_engine(net, leaves(net), start(), flow, steps=12), start()

    def loss():
        x, total = x0, 0.0
        for steps in lengths:
            states, controls = Rollout(SYSTEM, net, steps, flow)(x)
            x = states[-1]
            total = total + steps * SYSTEM.loss(states, controls, when="every") + 0.01 * controls.square().sum() / 4
        return total / 12

    assert_same(collect(loss, leaves(net)), whole, 1e-9)


@each_flow
def test_x0_from_an_encoder(flow):
    """The encoder's update is combined as the controller's is: where its parameters are."""
    net, encoder, picture = Own(), torch.nn.Linear(3, 4).double(), torch.randn(4, 3).double()
    tensors = [*leaves(net), *leaves(encoder)]

    def begin():
        return encoder(picture)

    assert_same(by_engine(net, tensors, begin, flow), by_torch(net, tensors, begin, flow))


@each_flow
def test_physical_parameters_with_a_history(flow):
    """One number for all, made from another, beside one per sample."""
    net, system = Own(), SYSTEM
    log_mass = torch.tensor(np.log(0.1), dtype=torch.float64, requires_grad=True)
    lengths = torch.linspace(0.3, 0.7, 4, dtype=torch.float64).requires_grad_()
    tensors = [*leaves(net), log_mass, lengths]
    rollout = Rollout(system, net, STEPS, flow)

    def loss():
        return a_loss(*rollout(start(), parameters={"pole_mass": log_mass.exp(), "half_length": lengths}))

    def step(x, c):
        from warp_phys.interop.torch import Step

        return Step(system)(x, c, {"pole_mass": log_mass.exp(), "half_length": lengths})

    assert_same(collect(loss, tensors), by_torch(net, tensors, start(), flow, step=step))


def test_a_chain_of_different_controllers():
    """The first one's update comes from the second one's rollout alone; both are combined in the end."""
    first, second = Own(), chain()
    tensors = [*leaves(first), *leaves(second)]

    def run(flow):
        x = Rollout(SYSTEM, first, 5, flow)(start())[0][-1]
        return a_loss(*Rollout(SYSTEM, second, 7, flow)(x))

    parts = [collect(lambda: run(flow), tensors) for flow in ("M", "R")]  # noqa: B023
    expected = [torch.where(m.sign() == r.sign(), m, 0.0) for m, r in zip(*parts, strict=True)]
    assert_same(collect(lambda: run("C"), tensors), expected)


def test_accumulated_chains():
    """Two backward passes through chains, then one comparison."""
    net, halves = Own(), (start(4, 1), start(4, 2))

    def run(flow, half):
        x = Rollout(SYSTEM, net, 6, flow)(half)[0][-1]
        return SYSTEM.loss(Rollout(SYSTEM, net, 6, flow)(x)[0])

    parts = [collect(lambda: sum(run(flow, half) for half in halves), leaves(net)) for flow in "MR"]  # noqa: B023
    expected = [torch.where(m.sign() == r.sign(), m, 0.0) for m, r in zip(*parts, strict=True)]
    net.zero_grad()
    for half in halves:
        run("C", half).backward()
    assert_same([p.grad for p in net.parameters()], expected)


def test_what_has_no_gradient_of_its_own():
    net, encoder = Own(), torch.nn.Linear(3, 4).double()
    x0 = encoder(torch.randn(4, 3).double())
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    loss = a_loss(*rollout(x0))
    x0.retain_grad()
    with pytest.raises(ValueError, match="x0 must not retain its gradient with a combined flow"):
        loss.backward()
    with pytest.raises(ValueError, match="x0 must not retain its gradient with a combined flow"):
        rollout(x0)
    rollout.flow = "R"
    loss = a_loss(*rollout(x0))
    rollout.flow = "C"
    with pytest.raises(RuntimeError, match="has become a combined one since the forward pass"):
        loss.backward()


@pytest.mark.parametrize("poles", [1, 2])
def test_a_leaf_as_x0_has_its_own_combination(poles):
    system, net = CartPole(poles=poles, dt=0.05), Own(2 * poles + 2)
    x0 = torch.as_tensor(system.sample(4, dtype="float64")).requires_grad_()

    def loss(flow):
        return system.loss(Rollout(system, net, STEPS, flow)(x0)[0])

    base, other = (collect(lambda: loss(flow), [x0])[0] for flow in "MR")  # noqa: B023
    expected = torch.where(base.sign() == other.sign(), base, 0.0)
    assert_same(collect(lambda: loss("C"), [x0]), [expected])
