"""Simulators that are not the same in both passes are refused, at the time step where it shows."""

import numpy as np
import pytest
import torch
import warp as wp

from tests.contract.by_torch import FLOWS, STEPS, SYSTEM, assert_same, by_engine, by_torch, collect, leaves, start
from warp_phys import CartPole
from warp_phys import Rollout as WarpRollout
from warp_phys.engine.layers import Dense
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch import Rollout, Step
from warp_phys.interop.torch.system import TorchSystem

NN = torch.nn


def network(inputs=4, outputs=1):
    torch.manual_seed(0)
    return NN.Sequential(NN.Linear(inputs, 8), NN.Tanh(), NN.Linear(8, outputs)).double()


class World(NN.Module):
    """A learned model of the step."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.body = NN.Sequential(NN.Linear(5, 16), NN.Tanh(), NN.Dropout(dropout), NN.Linear(16, 4)).double()

    def forward(self, x, c):
        return x + 0.1 * self.body(torch.cat([x, c], 1))


def mean_square(states, controls):
    return states.square().mean()


@pytest.mark.parametrize("flow", ["R", "C"])
def test_a_world_model_with_dropout(flow):
    world, net = World(0.5), network()
    with pytest.raises(NotRepeatable, match=f"in time step {STEPS - 1} the step of function gives other states now"):
        by_engine(net, leaves(net), start(), flow, system=TorchSystem(world, 4, 1), loss=mean_square)
    world.eval()
    got = by_engine(net, leaves(net), start(), flow, system=TorchSystem(world, 4, 1), loss=mean_square)
    assert_same(got, by_torch(net, leaves(net), start(), flow, step=world, loss=mean_square))


@pytest.mark.parametrize("flow", FLOWS)
def test_a_world_model_is_trained_along(flow):
    world, net = World(), network()
    tensors = [*leaves(net), *leaves(world)]
    got = by_engine(net, tensors, start(), flow, system=TorchSystem(world, 4, 1), loss=mean_square)
    assert_same(got, by_torch(net, tensors, start(), flow, step=world, loss=mean_square))


@pytest.mark.parametrize("flow", ["M", "C"])
def test_a_world_model_that_shares_a_layer_with_its_controller(flow):
    world = World()

    class Sharing(NN.Module):
        def __init__(self):
            super().__init__()
            self.layer = world.body[0]

        def forward(self, x):
            return torch.tanh(self.layer(torch.cat([x, x[:, :1]], 1)))[:, :1]

    net = Sharing()
    tensors = [*leaves(net), *leaves(world.body[3])]
    got = by_engine(net, tensors, start(), flow, system=TorchSystem(world, 4, 1), loss=mean_square)
    assert_same(got, by_torch(net, tensors, start(), flow, step=world, loss=mean_square))


def test_a_hamiltonian_system():
    """Autograd inside the step."""
    torch.manual_seed(2)
    energy = NN.Sequential(NN.Linear(4, 8), NN.Tanh(), NN.Linear(8, 1)).double()

    def step(x, c):
        x = x if x.requires_grad else x.detach().requires_grad_()
        slope = torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]
        return x + 0.1 * torch.cat([slope[:, 2:], -slope[:, :2] + c], 1)

    def strict(x, c):
        slope = torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]
        return x + 0.1 * torch.cat([slope[:, 2:], -slope[:, :2] + c], 1)

    net = network()
    got = by_engine(net, leaves(net), start(), "M", system=TorchSystem(strict, 4, 1), loss=mean_square)
    assert_same(got, by_torch(net, leaves(net), start(), "M", step=step, loss=mean_square))


def test_a_number_that_changes_before_the_backward_pass():
    scene, net = {"gravity": 1.0}, network(2)

    def pendulum(x, c):
        rate = x[:, 1:] + 0.1 * (c - scene["gravity"] * x[:, :1].sin())
        return torch.cat([x[:, :1] + 0.1 * rate, rate], 1)

    rollout, x0 = Rollout(TorchSystem(pendulum, 2, 1), net, STEPS, "R"), torch.rand(8, 2).double()
    losses = []
    for gravity in (1.0, 5.0):
        scene["gravity"] = gravity
        losses.append(mean_square(*rollout(x0)))
    with pytest.raises(NotRepeatable, match="Until the backward pass is done"):
        sum(losses).backward()
    for gravity in (1.0, 5.0):  # one backward pass each is right
        scene["gravity"] = gravity
        mean_square(*rollout(x0)).backward()


def test_weights_of_the_world_that_an_optimiser_moves():
    world, net = World(), network()
    optimiser = torch.optim.SGD(world.parameters(), lr=0.1)
    loss = mean_square(*Rollout(TorchSystem(world, 4, 1), net, STEPS, "M")(start()))
    world(start(), torch.zeros(4, 1).double()).square().sum().backward()
    optimiser.step()
    with pytest.raises((NotRepeatable, RuntimeError), match="modified in place|other states now"):
        loss.backward()


class Plain:
    """A simulator with no more than the two verbs, around a system whose numbers may be changed."""

    state_size, control_size = 4, 1

    def __init__(self, noise=0.0):
        self.inner, self.noise, self.calls = SYSTEM, noise, 0

    def step(self, x, c, y):
        self.calls += 1
        self.inner.step(x, c, y)
        y.numpy()[...] += self.noise * self.calls

    def step_vjp(self, x, c, adj_y, adj_x, adj_c):
        self.inner.step_vjp(x, c, adj_y, adj_x, adj_c)


@pytest.mark.parametrize("passes", [0, 2, 6])
def test_any_simulator(passes):
    """It is asked for some steps in every pass, though not for all."""
    plain, net = Plain(), network()
    rollout = Rollout(plain, net, STEPS, "C")
    loss = lambda: SYSTEM.loss(*rollout(start()))  # noqa: E731
    for _ in range(passes):
        loss().backward()
    value = loss()
    plain.inner = CartPole(poles=1, dt=0.05, gravity=5.0)
    with pytest.raises(NotRepeatable, match=r"in time step \d+ the step of Plain gives other states"):
        value.backward()
    noisy = Rollout(Plain(noise=1e-3), net, STEPS, "C")
    with pytest.raises(NotRepeatable):
        SYSTEM.loss(*noisy(start())).backward()


def test_its_update_is_that_of_the_system():
    net = network()
    got = by_engine(net, leaves(net), start(), "C", system=Plain())
    assert_same(got, by_engine(net, leaves(net), start(), "C"))


# --- pure Warp -------------------------------------------------------------------------------------------------------


def dense(device="cpu"):
    return Dense((4, 8, 1), seed=0, dtype=np.float64, device=device)


def record(rollout, x0, parameters=None):
    tape = wp.Tape()
    with tape:
        states, controls = rollout(x0, parameters)
        loss = SYSTEM.loss(states, controls, when="every")
    return tape, loss


def begin(requires_grad=False):
    return wp.array(SYSTEM.sample(4, dtype=np.float64), dtype=wp.float64, device="cpu", requires_grad=requires_grad)


@pytest.mark.parametrize("backend", ["fused", "general"])
def test_warp_weights_that_change(backend):
    controller = dense()
    tape, loss = record(WarpRollout(SYSTEM, controller, STEPS, "C", backend=backend), begin())
    controller.parameters[2].assign(2.0 * controller.parameters[2].numpy())
    with pytest.raises(RuntimeError, match="parameter 2 of the controller has been modified since the forward pass"):
        tape.backward(loss)


def test_warp_physical_parameters_that_change():
    parameters = SYSTEM.parameter_array({"pole_mass": [0.1, 0.2, 0.3, 0.4]}, device="cpu", dtype=np.float64)
    tape, loss = record(WarpRollout(SYSTEM, dense(), STEPS, "R"), begin(), parameters)
    parameters.assign(SYSTEM.parameter_array({"pole_mass": 0.5}, device="cpu", dtype=np.float64).numpy().repeat(4))
    with pytest.raises(RuntimeError, match="a physical parameter has been modified since the forward pass"):
        tape.backward(loss)


def test_warp_simulators_that_change():
    plain = Plain()
    tape, loss = record(WarpRollout(plain, dense(), STEPS, "R"), begin())
    plain.inner = CartPole(poles=1, dt=0.05, gravity=5.0)
    with pytest.raises(NotRepeatable, match=r"in time step \d+ the step of Plain"):
        tape.backward(loss)


def test_warp_optimisers_between_two_tapes():
    """Weights that change after the backward pass are what training is."""
    controller, rollout = dense(), None
    for _ in range(3):
        rollout = rollout or WarpRollout(SYSTEM, controller, STEPS, "C")
        tape, loss = record(rollout, begin())
        tape.backward(loss)
        for p in controller.parameters:
            p.assign(p.numpy() - 0.01 * p.grad.numpy())
        tape.zero()


@pytest.mark.parametrize("copied", [False, True])
def test_warp_chains(copied):
    """Linear flows of two rollouts are those of one; a combined flow is refused, before and after recording."""
    controller, x0 = dense(), begin()
    half, whole = WarpRollout(SYSTEM, controller, 6, "R"), WarpRollout(SYSTEM, controller, 12, "R")

    def chain():
        tape = wp.Tape()
        with tape:
            x = half(x0)[0][6]
            if copied:
                own = wp.empty_like(x, requires_grad=True)
                wp.copy(own, x)
                x = own
            loss = SYSTEM.loss(*half(x))
        return tape, loss

    def updates(tape, loss):
        tape.backward(loss)
        found = [p.grad.numpy().copy() for p in controller.parameters]
        tape.zero()
        return found

    def at_once():
        tape = wp.Tape()
        with tape:
            loss = SYSTEM.loss(*whole(x0))
        return tape, loss

    for flow in "RM":
        half.flow = whole.flow = flow
        for got, expected in zip(updates(*chain()), updates(*at_once()), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    tape, loss = chain()
    half.flow = "C"
    with pytest.raises(RuntimeError, match="x0 must not be the result of something on the tape"):
        tape.backward(loss)
    with pytest.raises(ValueError, match="x0 must not be the result of something on the tape"):
        chain()


def test_warp_one_start_for_two_rollouts():
    """A start with an adjoint that two rollouts of one tape share has no history."""
    x0, rollout = begin(requires_grad=True), WarpRollout(SYSTEM, dense(), STEPS, "C")
    tape = wp.Tape()
    with tape:
        losses = [SYSTEM.loss(*rollout(x0)) for _ in range(2)]
    tape.backward(grads={loss: wp.ones(1, dtype=wp.float64, device="cpu") for loss in losses})
    assert x0.grad.numpy().any()


def test_the_step_is_a_torch_function_too():
    """The reference of these tests: R of the engine's unrolling is torch's own through `Step`."""
    net = network()
    assert_same(by_engine(net, leaves(net), start(), "R"), by_torch(net, leaves(net), start(), "R", step=Step(SYSTEM)))
    assert collect(lambda: SYSTEM.loss(*Rollout(SYSTEM, net, 3)(start())), leaves(net))[0].any()
