"""The engine as custom operators of torch: gradients, compiled code, torch.func."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.rollout import reference
from warp_phys import CartPole, Diverged
from warp_phys.interop.torch import Rollout, Step
from warp_phys.interop.torch.system import TorchSystem

SYSTEM = CartPole(poles=2)
MASSES = [0.1, 0.2, 0.3, 0.15]


def _start(device, batch=4):
    return torch.as_tensor(SYSTEM.sample(batch, dtype=np.float64), device=device)


def _controls(device, batch=4):
    return torch.linspace(-2, 2, batch, dtype=torch.float64, device=device)[:, None]


def _network(device):
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    return torch.nn.Sequential(*layers).double().to(device)


@pytest.mark.parametrize("values", [MASSES, 0.2], ids=["per sample", "one for all"])
def test_the_step_by_finite_differences(values, device):
    step = Step(SYSTEM)
    x, c = _start(device).requires_grad_(), _controls(device).requires_grad_()
    mass = torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c, m: step(x, c, {"pole_mass": m}), (x, c, mass))
    with torch.no_grad():
        torch.testing.assert_close(step(x, c), reference.cart_pole_step(SYSTEM, x, c), rtol=1e-13, atol=1e-13)


def test_torchs_own_checks_of_an_operator(device):
    step, x, c = Step(SYSTEM), _start(device).requires_grad_(), _controls(device)
    torch.library.opcheck(torch.ops.warp_phys.step.default, (x, c, None, step._name))
    rows = torch.rand(1, len(SYSTEM.parameter_names), dtype=torch.float64, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.warp_phys.step.default, (x, c, rows, step._name))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(backend, device):
    """No graph break, the same numbers; another system is another step."""
    first, second = Step(SYSTEM), Step(CartPole(poles=2, gravity=3.0))
    inputs = _start(device).requires_grad_(), _controls(device).requires_grad_()
    gravity = torch.tensor(9.0, dtype=torch.float64, device=device, requires_grad=True)

    def function(step, x, c, gravity):
        for _ in range(2):
            x = step(x.sin(), c, {"half_length": gravity / 20})
        return x.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for step in (first, second, first):
        got, expected = (
            torch.autograd.grad(f(step, *inputs, gravity), (*inputs, gravity)) for f in (compiled, function)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_rollouts(backend, device):
    """Rollout and loss without a graph break; passes add up, M and R apart, as they do without compilation."""
    network, x0 = _network(device), _start(device)
    rollout = Rollout(SYSTEM, network, 20, "C")

    def function(x0):
        states, controls = rollout(1.0 * x0)
        return SYSTEM.loss(states, controls, when="every", control_cost=0.1) + states[-1].square().mean()

    torch._dynamo.reset()
    compiled, gradients = torch.compile(function, backend=backend, fullgraph=True), []
    for f in (compiled, function):
        network.zero_grad()
        for start in (x0, x0 + 0.3):
            f(start).backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    rollout.flow = "M"
    start = x0.clone().requires_grad_()
    compiled_m, expected = (torch.autograd.grad(f(start), (start, network[0].weight)) for f in (compiled, function))
    torch.testing.assert_close(compiled_m, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(compiled(x0.cpu().numpy()), function(x0))
    with pytest.raises(Diverged):
        compiled(1e200 * x0)


def test_compiled_physical_parameters(device):
    network, x0 = _network(device), _start(device)
    rollout = Rollout(SYSTEM, network, 5, "R")
    masses = torch.tensor(MASSES, dtype=torch.float64, device=device, requires_grad=True)

    def function(x0, masses):
        return SYSTEM.loss(rollout(x0, {"pole_mass": masses})[0], parameters={"gravity": masses})

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = (torch.autograd.grad(f(x0, masses), masses)[0] for f in (compiled, function))
    assert got.any()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-16)


def test_vmap_and_gradients_of_torch_func(device):
    step, x, c = Step(SYSTEM), _start(device), _controls(device)
    many = torch.stack([x, x + 0.1, x - 0.1])
    masses = torch.tensor([MASSES, MASSES[::-1], MASSES], dtype=torch.float64, device=device)

    def energy(x, m):
        return step(x, c, {"pole_mass": m}).square().sum()

    assert torch.equal(torch.func.vmap(step, (0, None))(many, c), torch.stack([step(x, c) for x in many]))
    got = torch.func.vmap(torch.func.grad(energy, (0, 1)))(many, masses)
    for i in range(3):
        own = many[i].clone().requires_grad_(), masses[i].clone().requires_grad_()
        expected = torch.autograd.grad(energy(*own), own)
        torch.testing.assert_close((got[0][i], got[1][i]), expected, rtol=1e-12, atol=1e-14)
    jacobian = torch.func.jacrev(lambda x: step(x, c))(x)
    right = torch.autograd.functional.jacobian(lambda x: reference.cart_pole_step(SYSTEM, x, c), x)
    torch.testing.assert_close(jacobian, right, rtol=1e-11, atol=1e-13)


def test_what_is_not_there_says_so(device):
    step, x, c = Step(SYSTEM), _start(device), _controls(device)
    rollout = Rollout(SYSTEM, _network(device), 3)
    with pytest.raises(RuntimeError, match="a step has no forward-mode derivative"):
        torch.func.jvp(lambda x: step(x, c), (x,), (x,))
    with pytest.raises(RuntimeError, match="a rollout does not run inside torch.func"):
        torch.func.vmap(lambda x: rollout(x)[0])(x[None])
    with pytest.raises(RuntimeError, match="a loss does not run inside torch.func"):
        torch.func.grad(lambda x: SYSTEM.loss(x))(torch.stack([x, x]))
    with pytest.raises(RuntimeError, match="a step can be differentiated once"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: step(x, c).square().sum())(x).sum())(x)
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(step(x, c).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a step can be differentiated once"):
        first.sum().backward()


def test_arguments_of_a_step(device):
    step, x, c = Step(SYSTEM), _start(device), _controls(device)
    with pytest.raises(TypeError, match="system must have step"):
        Step("cart")
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got ndarray"):
        step(np.zeros((4, 6)), c)
    with pytest.raises(ValueError, match=r"c must have shape \(4, 1\), got \(3, 1\)"):
        step(x, c[:3])
    with pytest.raises(TypeError, match="c must hold torch.float64 as x does, got torch.float32"):
        step(x, c.float())
    with pytest.raises(TypeError, match="x must hold torch.float32 or torch.float64, got torch.float16"):
        step(x.half(), c)


def test_copies_of_a_step(device):
    x, c = _start(device), _controls(device)
    foreign = TorchSystem(lambda x, c: 2 * x + c, 6, 1)
    assert torch.equal(Step(copy.deepcopy(Step(foreign).system))(x, c), 2 * x + c)
    for twin in (copy.deepcopy(Step(SYSTEM)), pickle.loads(pickle.dumps(Step(SYSTEM)))):
        assert torch.equal(twin(x, c), Step(SYSTEM)(x, c))


class Cosine(torch.nn.Module):
    """A controller that the engine does not know by hand: its derivative is autograd's."""

    def __init__(self, sizes, frozen=False):
        super().__init__()
        self.inner = torch.nn.Linear(*sizes, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64), requires_grad=not frozen)

    def forward(self, x):
        return self.scale * self.inner(x) * x[:, :1].cos()


@pytest.mark.parametrize("flow", ["regular", "combined"])
def test_compiled_rollout_of_any_module(flow):
    torch.manual_seed(0)
    system = CartPole(poles=1)
    module = Cosine((4, 1))
    rollout = Rollout(system, module, 4, flow)
    x0 = torch.as_tensor(system.sample(3, 0, np.float64))
    found = []
    for call in (rollout, torch.compile(rollout.__call__, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        call(x0)[0].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0.0)


def test_compiled_rollout_notices_a_frozen_parameter_that_changes():
    module = Cosine((4, 1), frozen=True)
    rollout = Rollout(CartPole(poles=1), module, 4, "regular")
    x0 = torch.as_tensor(rollout.system.sample(3, 0, np.float64))
    value = torch.compile(lambda x: rollout(x)[0].square().sum(), backend="aot_eager")(x0)
    with torch.no_grad():
        module.scale.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_step_of_a_torch_function():
    function = TorchSystem(lambda x, c: x + 0.1 * torch.tanh(c), 2, 2)
    step = Step(function)
    x, c = (torch.rand(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(step, (x, c))
    with torch.inference_mode():
        torch.testing.assert_close(step(x, c), x + 0.1 * torch.tanh(c))


def test_a_simulator_with_slots():
    class Slotted:
        __slots__ = ()
        state_size, control_size = 2, 1

        def step(self, x, c, y): ...

        def step_vjp(self, x, c, adj_y, adj_x, adj_c): ...

    with pytest.raises(TypeError, match="Slotted has slots"):
        Step(Slotted())
