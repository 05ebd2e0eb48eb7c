"""Controllers of all kinds: what the engine may look into, what it must leave alone, and what may not change."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.interop.test_torch import STEPS, SYSTEM, flat, network, start, update
from tests.rollout import reference
from warp_phys import Diverged
from warp_phys.engine import phases
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout
from warp_phys.systems import CartPole

LINEAR, TANH = torch.nn.Linear, torch.nn.Tanh


def _tied():
    net = torch.nn.Sequential(LINEAR(6, 8), TANH(), LINEAR(8, 8), TANH(), LINEAR(8, 8), TANH(), LINEAR(8, 1))
    net[4].weight, net[4].bias = net[2].weight, net[2].bias
    return net


def _repeated_activation():
    act = TANH()
    return torch.nn.Sequential(LINEAR(6, 8), act, LINEAR(8, 1), act)


def _repeated_layers():
    act, layer = TANH(), LINEAR(8, 8)
    return torch.nn.Sequential(LINEAR(6, 8), act, layer, act, layer, act, LINEAR(8, 1))


def _transposed():
    net = torch.nn.Sequential(LINEAR(6, 8), TANH(), LINEAR(8, 1))
    net[0].weight = torch.nn.Parameter(net[0].weight.detach().T.contiguous().T)
    return net


def _parametrised():
    net = torch.nn.Sequential(LINEAR(6, 8), TANH(), LINEAR(8, 1))
    torch.nn.utils.parametrizations.weight_norm(net[0])
    return net


def _hooked():
    net = torch.nn.Sequential(LINEAR(6, 8), TANH(), LINEAR(8, 1))
    net[1].register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    return net


def _own_forward():
    net = torch.nn.Sequential(LINEAR(6, 8), TANH(), LINEAR(8, 1))
    net[1].forward = torch.sin
    return net


def _without_bias():
    return torch.nn.Sequential(LINEAR(6, 8, bias=False), TANH(), LINEAR(8, 1))


def _mixed_activations():
    return torch.nn.Sequential(LINEAR(6, 8), TANH(), LINEAR(8, 8), torch.nn.SiLU(), LINEAR(8, 1))


MODULES = [
    _tied, _repeated_activation, _repeated_layers, _transposed, _parametrised, _hooked, _own_forward, _without_bias,
    _mixed_activations,
]  # fmt: skip


@pytest.mark.parametrize("flow", ["R", "M"])
@pytest.mark.parametrize("make", MODULES, ids=lambda make: make.__name__.strip("_"))
def test_module_against_torch(make, flow, device):
    """Whether or not the engine looks into it, a module gives what torch gives with `detach` in the same places."""
    torch.manual_seed(0)
    net = make().double().to(device)
    x0 = start(device, 5)
    states, _ = reference.unroll(lambda x, c: reference.cart_pole_step(SYSTEM, x, c), net, x0, resolve(flow).gates(15))
    expected = reference.gradient(
        reference.cart_pole_loss(states, torch.zeros(1), "final", 0.0), list(net.parameters())
    )
    rollout = Rollout(SYSTEM, net, 15, flow)
    net.zero_grad()
    got, _ = rollout(x0)
    torch.testing.assert_close(got.detach(), states.detach(), rtol=1e-12, atol=1e-12)
    SYSTEM.loss(got).backward()
    assert reference.relative(flat(net), expected) < 1e-10


COMPILED = {
    "compiled": lambda net, x: torch.compile(net, backend="aot_eager"),
    "compiled inside": lambda net, x: torch.nn.Sequential(torch.compile(net, backend="aot_eager"), torch.nn.Identity()),
    "scripted": lambda net, x: torch.jit.script(net),
    "scripted inside": lambda net, x: torch.nn.Sequential(torch.jit.script(net)),
    "traced": torch.jit.trace,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_what_torch_compiles(make, parallel, device, monkeypatch):
    """Modules that torch has compiled, also those whose graph serves for one backward pass only."""
    monkeypatch.setattr(phases, "parallel_in_time", lambda *_: parallel)
    net, x0 = network(device=device), start(device)
    rollout = Rollout(SYSTEM, make(net, x0), 5, "C")
    assert rollout.backend == "general"
    expected = update(Rollout(SYSTEM, torch.nn.Sequential(net, torch.nn.Identity()), 5, "C"), x0)
    for _ in range(2):
        assert reference.relative(update(rollout, x0), expected) < 1e-10


def _freeze(net):
    net[0].weight.requires_grad_(False)


def _assign(net):
    net.load_state_dict({name: value.clone() + 0.1 for name, value in net.state_dict().items()}, assign=True)


def _data(net):
    net[2].weight.data = net[2].weight.data + 0.1


def _replace_layer(net):
    net[2] = torch.nn.Linear(16, 1).double().to(net[0].weight.device)


def _replace_activation(net):
    net[1] = torch.nn.ReLU()


@pytest.mark.parametrize("kind", ["dense", "module"])
@pytest.mark.parametrize("change", [_freeze, _assign, _data, _replace_layer, _replace_activation])
def test_changes_between_forward_and_backward_are_noticed(change, kind, device):
    net = network(device=device)
    module = net if kind == "dense" else torch.nn.Sequential(net, torch.nn.Identity())
    loss = SYSTEM.loss(*Rollout(SYSTEM, module, STEPS)(start(device)))
    change(net)
    with pytest.raises((RuntimeError, ValueError), match="has changed since the forward pass|the same controls"):
        loss.backward()


def test_another_layer_of_a_wrong_size(device):
    for i, layer in ((0, LINEAR(4, 16)), (2, LINEAR(16, 2))):
        net = network(device=device)
        rollout = Rollout(SYSTEM, net, STEPS)
        net[i] = layer.double().to(device)
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            rollout(start(device))


def test_another_layer_over_the_same_memory(device):
    """The values are the old ones, the parameters that are trained are new."""
    net, x0 = network(device=device), start(device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    expected = update(rollout, x0)
    layer = torch.nn.Linear(6, 16)
    layer.weight, layer.bias = (torch.nn.Parameter(p.data) for p in (net[0].weight, net[0].bias))
    net[0] = layer
    assert torch.equal(update(rollout, x0), expected)


def test_a_converted_controller(device):
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS)
    net.float()
    with pytest.raises(ValueError, match="controller is now torch.float32 on"):
        rollout(start(device))


def test_batch_normalisation_in_training(device):
    net = torch.nn.Sequential(LINEAR(6, 8), torch.nn.BatchNorm1d(8), LINEAR(8, 1)).double().to(device)
    rollout = Rollout(SYSTEM, net, 1)
    with pytest.raises(ValueError, match="must not normalise over the batch in training"):
        SYSTEM.loss(*rollout(start(device))).backward()
    net.eval()
    SYSTEM.loss(*rollout(start(device))).backward()
    assert flat(net).isfinite().all()


@pytest.mark.parametrize("activation", [TANH, torch.nn.ReLU, torch.nn.ELU, torch.nn.SiLU, torch.nn.Sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["fused", "general"])
def test_a_weight_that_is_nan_is_not_swallowed(backend, dtype, activation, device):
    net = network(device=device, dtype=dtype)
    net[1] = activation()
    with torch.no_grad():
        net[0].weight[3, 2] = torch.nan
    with pytest.raises(Diverged):
        Rollout(SYSTEM, net, 3, backend=backend)(SYSTEM.sample(4))


def test_other_horizons(device):
    """A curriculum of horizons; a backward pass belongs to the horizon of its forward pass."""
    net, x0 = network(device=device), start(device)
    expected = {steps: update(Rollout(SYSTEM, net, steps, "C"), x0) for steps in (10, 40)}
    rollout = Rollout(SYSTEM, net, 10, "C")
    for steps in (10, 40, 10):
        rollout.steps = steps
        assert torch.equal(update(rollout, x0), expected[steps])
    loss = SYSTEM.loss(*rollout(x0))
    rollout.steps = 40
    net.zero_grad()
    loss.backward()
    assert torch.equal(flat(net), expected[10])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        rollout.steps = 0
    with pytest.raises(AttributeError):
        rollout.controller = net


def test_copies_of_a_used_rollout(device):
    net, x0 = network(device=device), start(device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    expected = update(rollout, x0)
    for twin in (copy.deepcopy(rollout), pickle.loads(pickle.dumps(rollout))):
        assert twin.controller is not net
        assert torch.equal(update(twin, x0), expected)
    system = pickle.loads(pickle.dumps(SYSTEM))
    assert system == SYSTEM and system.structure == SYSTEM.structure


@pytest.mark.parametrize("kind", ["dense", "module"])
def test_autocast_does_not_reach_inside(kind, device):
    net, x0 = network(device=device, dtype=torch.float32), start(device, dtype=np.float32)
    module = net if kind == "dense" else torch.nn.Sequential(net, torch.nn.Identity())
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    expected = update(rollout, x0)
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
        states, controls = rollout(x0)
        module.zero_grad()
        SYSTEM.loss(states, controls).backward()
    assert states.dtype == torch.float32
    assert torch.equal(flat(net), expected)


def test_backward_in_another_order_and_twice(device):
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "R")
    a, b = (SYSTEM.loss(*rollout(start(device, seed=seed))) for seed in (0, 1))
    expected = [update(rollout, start(device, seed=seed)) for seed in (0, 1)]
    net.zero_grad()
    b.backward(retain_graph=True)
    a.backward()
    b.backward()
    assert reference.relative(flat(net), expected[0] + 2 * expected[1]) < 1e-12


def test_a_controller_without_parameters(device):
    class Feedback(torch.nn.Module):
        def forward(self, x):
            return -2.0 * x[:, :1] - x[:, 1:2]

    x0 = start(device, dtype=np.float32).requires_grad_()
    rollout = Rollout(SYSTEM, Feedback(), STEPS, "C", device=device)
    states, controls = rollout(x0)
    SYSTEM.loss(states, controls).backward()
    assert torch.isfinite(x0.grad).all() and x0.grad.any() and np.isnan(rollout.report.norm)


class Wrapped(torch.nn.Module):
    """A network that does something with its input and with its output."""

    def __init__(self, net, before=lambda x: x, after=lambda c: c):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def _wrap_angles(x):
    with torch.no_grad():
        x[:, 2::2].remainder_(2 * torch.pi)
    return x


@pytest.mark.parametrize("before", [_wrap_angles, lambda x: x.mul_(0.5)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_controller_that_changes_its_input(before, grad, device):
    rollout = Rollout(SYSTEM, Wrapped(network(device=device), before=before), STEPS)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="controller must not change its input in place"):
        rollout(start(device))


def test_a_controller_that_returns_more_than_controls(device):
    rollout = Rollout(SYSTEM, Wrapped(network(device=device), after=lambda c: (c, None)), STEPS)
    with pytest.raises(TypeError, match=r"controller must return the controls alone, a torch\.Tensor, got tuple"):
        rollout(start(device))


def test_a_controller_without_a_graph(device):
    """It can be rolled out; it cannot be trained, and says so where nothing else is asked for, as torch does."""
    net, x0 = network(device=device), start(device)
    rollout = Rollout(SYSTEM, Wrapped(net, after=torch.Tensor.detach), STEPS, "C")
    loss = SYSTEM.loss(*rollout(x0))
    with pytest.raises(ValueError, match="controller must be differentiable: what it returns has no graph back to"):
        loss.backward()
    mass = torch.tensor(0.2, dtype=torch.float64, device=device, requires_grad=True)
    SYSTEM.loss(*rollout(x0, {"pole_mass": mass})).backward()
    assert mass.grad.any()
    x0.requires_grad_()
    SYSTEM.loss(*rollout(x0)).backward()
    assert x0.grad.any()


def test_a_controller_with_a_graph_to_its_input_alone(device):
    """Feedback goes through it, and nothing to its weights; with one of them left in, it is trained."""
    net, x0 = network(device=device), start(device).requires_grad_()

    class Frozen(torch.nn.Module):
        def __init__(self, *, bias):
            super().__init__()
            self.net, self.bias = net, bias

        def forward(self, x):
            held = {name: p.detach() for name, p in self.net.named_parameters()}
            if self.bias:
                held["0.bias"] = self.net[0].bias
            return torch.func.functional_call(self.net, held, (x,))

    for flow in ("R", "C"):
        rollout = Rollout(SYSTEM, Frozen(bias=False), STEPS, flow)
        with pytest.raises(ValueError, match="controller must be differentiable: what it returns has no graph back to"):
            rollout.value_and_grad(x0)
        update(Rollout(SYSTEM, net, STEPS, flow), x0)
        whole = net[0].bias.grad.clone()
        net.zero_grad()
        Rollout(SYSTEM, Frozen(bias=True), STEPS, flow).value_and_grad(x0)
        assert reference.relative(net[0].bias.grad, whole) < 1e-10
        assert [p.grad is None for p in net.parameters()] == [True, False, True, True]


def test_a_controller_that_ignores_its_input(device):
    net, x0 = network(device=device), start(device)
    results = []
    for before in (torch.zeros_like, lambda x: 0.0 * x):
        results.append(update(Rollout(SYSTEM, Wrapped(net, before=before), STEPS, "C"), x0))
    assert results[0].any()
    assert reference.relative(results[0], results[1]) < 1e-10


def test_a_controller_that_is_off_at_most_states(device, monkeypatch):
    """There are chunks of the trajectory without a graph, and one with it."""
    net, x0 = network(device=device), start(device, batch=1)

    class Sometimes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            on = (x == x0).all(1, keepdim=True)
            return torch.where(on, self.net(x), 0.0) if on.any() else torch.zeros_like(x[:, :1])

    expected = update(Rollout(SYSTEM, Sometimes(), STEPS, "C"), x0)
    monkeypatch.setattr(phases, "CHUNK_ROWS", 1)
    assert expected.any()
    assert reference.relative(update(Rollout(SYSTEM, Sometimes(), STEPS, "C"), x0), expected) < 1e-10


def test_parameters_of_the_loss_must_fit(device):
    states = Rollout(SYSTEM, network(device=device), 3)(start(device))[0].detach()
    for trajectory in (states, states.cpu().numpy()):
        with pytest.raises(ValueError, match="must be a number or 8 numbers|must have length 1 or 8"):
            CartPole(poles=2).loss(trajectory, parameters={"gravity": [1.0, 2.0, 3.0]})
