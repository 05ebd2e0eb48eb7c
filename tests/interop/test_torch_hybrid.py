"""Systems with a network in their physics, against torch with `detach` in the same places, in float64."""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout import reference
from tests.rollout.test_beside import Both, Plain
from tests.rollout.test_systems_with_inputs import Wind, wind_step
from warp_phys import CartPole, Combined, Dense, Flow, audit
from warp_phys import Rollout as WarpRollout
from warp_phys.flow import combine, resolve
from warp_phys.interop.torch import Hybrid, Rollout, TorchSystem, Update, diagnose, identify, trajectory
from warp_phys.systems import SystemFunctions

STEPS, BATCH = 9, 11
SYSTEM = CartPole(dt=0.05)
BACKENDS = ["general", "fused"]
FLOWS = ["R", "M", "S", "N", Flow(0.9, 0.7), Flow(np.linspace(0.2, 1.0, 4)[None, None], 0.5), "C"]


class Network(torch.nn.Module):
    """A small network of states and controls."""

    def __init__(self, size, inputs=5, scale=0.3):
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Linear(inputs, 6, dtype=torch.float64)
        self.last = torch.nn.Linear(6, size, dtype=torch.float64)
        self.scale = scale

    def forward(self, x, c):
        return self.scale * self.last(torch.tanh(self.first(torch.cat([x, c], dim=1))))


def _numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _start():
    return torch.from_numpy(SYSTEM.sample(BATCH, dtype=np.float64)).requires_grad_()


def _mass():
    return (0.1 + 0.05 * _numbers(BATCH, seed=8).abs()).requires_grad_()


class Named:
    """Numbers of a cart-pole, tensors among them."""

    def __init__(self, **numbers):
        for name in SYSTEM.parameter_names:
            setattr(self, name, numbers.get(name, getattr(SYSTEM, name)))


def _step(network, gives, mass):
    """The step of a hybrid cart-pole, from the equations."""

    def step(x, c):
        r = network(x, c)
        if gives == "residual":
            return reference.cart_pole_step(Named(pole_mass=mass), x, c) + r
        if gives == "controls":
            return reference.cart_pole_step(Named(pole_mass=mass), x, c + r)
        own = Named(pole_mass=mass + r[:, :1], half_length=SYSTEM.half_length + r[:, 1:])
        return reference.cart_pole_step(own, x, c)

    return step


def _loss(states, controls, memories=None):
    weights = torch.arange(1.0, len(states) + 1, dtype=torch.float64)[:, None, None]
    value = (states.cos() * weights).mean() + controls.square().mean()
    return value if memories is None else value + memories[1:].sin().mean()


def _check(got, right, tolerance=1e-10):
    for a, b in zip(got, right, strict=True):
        assert torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b)


def _by_torch(step, policy, given, leaves, flow):
    """Gradients by one flow, or combined from those of two."""
    resolved = resolve(flow)
    if not isinstance(resolved, Flow):
        parts = [_by_torch(step, policy, given, leaves, part) for part in (resolved.base, resolved.other)]
        return [combine(resolved, pair) for pair in zip(*parts, strict=True)]
    gates = [getattr(gate, "array", gate) for gate in (resolved.physics, resolved.controller, resolved.memory)]
    gates = [torch.tensor(gate).expand(STEPS, 1, 4) if isinstance(gate, np.ndarray) else gate for gate in gates]
    x0, w, h = given
    unrolled = reference.unroll_beside(step, policy, x0, STEPS, w, h, gates)
    return torch.autograd.grad(_loss(*unrolled), leaves)


def _check_flows(hybrid, step, policy, given, leaves, flows, backend, mass):
    """One rollout, whose flow is assigned; combined updates are changes of sums, so they are read from `.grad`."""
    x0, w, h = given
    memory, inputs = (0 if t is None else t.shape[-1] for t in (h, w))
    rollout = Rollout(hybrid, policy, STEPS, "R", backend=backend, memory=memory, inputs=inputs)
    assert rollout.backend == backend and (rollout.why_general is None) == (backend == "fused")
    for flow in flows:
        rollout.flow = flow
        unrolled = rollout(x0, {"pole_mass": mass}, w, h)
        assert [tuple(t.shape) for t in unrolled[:2]] == [(STEPS + 1, BATCH, 4), (STEPS, BATCH, 1)]
        for leaf in leaves:
            leaf.grad = None
        _loss(*unrolled).backward()
        _check([leaf.grad for leaf in leaves], _by_torch(step, policy, given, leaves, flow))


SIZES = {"residual": 4, "controls": 1, ("pole_mass", "half_length"): 2}


@pytest.mark.parametrize(
    ("gives", "backend"), [("residual", "general"), *((gives, "fused") for gives in SIZES)], ids=str
)
def test_flows(gives, backend):
    network, policy, mass = Network(SIZES[gives], scale=0.05), Plain(SYSTEM), _mass()
    given, hybrid = (_start(), None, None), Hybrid(SYSTEM, network, gives)
    leaves = [given[0], mass, *policy.parameters(), *network.parameters()]
    _check_flows(hybrid, _step(network, gives, mass[:, None]), policy, given, leaves, FLOWS, backend, mass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_inputs_and_memory(backend):
    network, policy, mass = Network(1), Both(SYSTEM, 3, 5), _mass()
    given = _start(), _numbers(STEPS, BATCH, 3, seed=1).requires_grad_(), _numbers(BATCH, 5, seed=2).requires_grad_()
    leaves = [*given, mass, *policy.parameters(), *network.parameters()]
    hybrid, flows = Hybrid(SYSTEM, network, "controls"), (Flow(0.9, 0.7, memory=0.8), "C")
    _check_flows(hybrid, _step(network, "controls", mass[:, None]), policy, given, leaves, flows, backend, mass)


def test_masked_updates_of_a_network_alone():
    """A controller that is frozen is none that is trained; the recorded updates are those of autograd."""
    policy, updates = Plain(SYSTEM).requires_grad_(False), []
    for backend in BACKENDS:
        network = Network(4)
        rollout = Rollout(Hybrid(SYSTEM, network), policy, STEPS, "C", backend=backend)
        update = Update(rollout, torch.optim.Adam(network.parameters(), lr=0.01, fused=True), "every", 0.1)
        losses = update.minibatches(torch.stack([_start().detach()] * 4))
        assert update.is_recorded == (backend == "fused") and losses[3] < losses[0]
        updates.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        assert all(p.grad is None for p in policy.parameters())
    _check(updates[:1], updates[1:])


def test_physical_parameters_in_one_call():
    """`value_and_grad` gives what autograd does, to controller, network and physical parameters."""
    network, policy, found = Network(1), Plain(SYSTEM), []
    mass = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    leaves = [mass, *policy.parameters(), *network.parameters()]
    rollout = Rollout(Hybrid(SYSTEM, network, "controls"), policy, STEPS, "R", backend="fused")
    x0 = _start().detach()
    value = rollout.value_and_grad(x0, "every", 0.1, {"pole_mass": mass})
    found.append([p.grad.clone() for p in leaves])
    for p in leaves:
        p.grad = None
    states, controls = rollout(x0, {"pole_mass": mass})
    loss = rollout.system.loss(states, controls, "every", 0.1, {"pole_mass": mass})
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-12)
    _check(found[0], [p.grad for p in leaves])


@dataclass(frozen=True)
class Calm(Wind):
    """Wind whose cost reads none."""

    def functions(self, real):
        return SystemFunctions(super().functions(real).step, _calm_cost(self, real))


@functools.cache
def _calm_cost(system, real):
    State, Parameters = system.types(real).State, system.types(real).Parameters

    @wp.func
    def cost(x: State, p: Parameters):
        return x[0] * x[0]

    return cost


@pytest.mark.parametrize("gives", ["inputs", "residual"])
def test_open_loops_of_a_system_with_inputs(gives):
    """What the network gives are the inputs, forces in the rate of change; or it stands beside given inputs."""
    system, alpha = Calm(), 0.8
    x0, controls = _numbers(BATCH, 2).requires_grad_(), _numbers(STEPS, BATCH, 1).requires_grad_()
    w = None if gives == "inputs" else _numbers(STEPS, 3, seed=3).requires_grad_()
    network = Network(3 if gives == "inputs" else 2, 3)
    states = trajectory(Hybrid(system, network, gives), x0, controls, inputs=w, flow=Flow(alpha))
    x, rows = x0, [x0]
    for n in range(STEPS):
        own = reference.gated(x, alpha)
        r = network(own, controls[n])
        given = r if gives == "inputs" else w[n].expand(BATCH, 3)
        x = wind_step(system, own, controls[n], given) + (0.0 if gives == "inputs" else r)
        rows.append(x)
    leaves = [t for t in (x0, controls, w) if t is not None] + list(network.parameters())
    right = torch.stack(rows)
    _check([states], [right])
    _check(*(torch.autograd.grad(s.sin().sum(), leaves) for s in (states, right)))


def test_open_loops_of_any_length():
    network, mass = Network(4), _mass()
    hybrid, x0 = Hybrid(SYSTEM, network), _start()
    for steps, shared in ((3, False), (5, True)):
        controls = _numbers(steps, 1 if shared else BATCH, 1).requires_grad_()
        states = trajectory(hybrid, x0, controls, {"pole_mass": mass})
        rows, step = [x0], _step(network, "residual", mass[:, None])
        for n in range(steps):
            rows.append(step(rows[-1], controls[n].expand(BATCH, 1)))
        leaves = [x0, controls, mass, *network.parameters()]
        _check(*(torch.autograd.grad(s.sin().sum(), leaves) for s in (states, torch.stack(rows))))
    assert len(hybrid.open_loops) == 1


@pytest.mark.parametrize("gives", SIZES, ids=str)
def test_audit(gives):
    hybrid = Hybrid(SYSTEM, Network(SIZES[gives], scale=0.05), gives)
    report = audit(hybrid, horizons=(1, 3))
    assert report.ok and not report.unclear and len(report.findings) == 10, str(report)
    with torch.no_grad():
        x, c = _numbers(3, 4), _numbers(3, 1)
        right = _step(hybrid.network, gives, torch.full((3, 1), SYSTEM.pole_mass, dtype=x.dtype))(x, c)
    y = wp.zeros((3, 4), dtype=wp.float64, device="cpu")
    hybrid.step(wp.from_torch(x), wp.from_torch(c), y)
    _check([torch.from_numpy(y.numpy())], [right])


def test_rollouts_in_pure_warp():
    """The module's weights are constant there; feedback through it is that of the physics."""
    hybrid, dense = Hybrid(SYSTEM, Network(4)), Dense((4, 8, 1), "tanh", seed=0, dtype=np.float64)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    for p, own in zip(module.parameters(), dense.parameters, strict=True):
        p.data.copy_(wp.to_torch(own, requires_grad=False).reshape(p.shape))
    x0 = _start().detach()
    for flow in ("M", "R"):
        with wp.Tape() as tape:
            states, _ = WarpRollout(hybrid, dense, STEPS, flow)(wp.from_torch(x0))
        seeds = torch.cos(wp.to_torch(states, requires_grad=False)).contiguous()
        tape.backward(grads={states: wp.from_torch(seeds)})
        own, _ = Rollout(hybrid, module, STEPS, flow)(x0)
        right = torch.autograd.grad(own.sin().sum(), list(module.parameters()))
        _check([wp.to_torch(p.grad).reshape(g.shape) for p, g in zip(dense.parameters, right, strict=True)], right)
        tape.zero()


class Rubbing(torch.nn.Module):
    """A force of the cart's velocity alone."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

    def forward(self, x, c):
        return self.layers(x[:, 1:2])


class Friction(torch.nn.Module):
    """The same, as it is."""

    def forward(self, x, c):
        return -0.8 * x[:, 1:2] - torch.tanh(x[:, 1:2] / 0.3)


def _recorded(truth, batch, steps):
    x0 = torch.from_numpy(truth.sample(batch)).double()
    forces = 8.0 * _numbers(steps // 4, batch, 1).repeat_interleave(4, dim=0)
    with torch.no_grad():
        return x0, forces, trajectory(truth, x0, forces)


def test_friction_is_learned_together_with_a_length():
    """To 5 % of its force, from noisy trajectories; the length comes out as well."""
    truth = Hybrid(CartPole(dt=0.05, half_length=0.4), Friction(), "controls")
    x0, forces, states = _recorded(truth, 32, 20)
    noisy = states + 0.01 * _numbers(*states.shape, seed=4)
    module, length = Rubbing(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    hybrid = Hybrid(SYSTEM, module, "controls")
    optimiser = torch.optim.LBFGS([length, *module.parameters()], max_iter=120, line_search_fn="strong_wolfe")

    def misfit():
        optimiser.zero_grad()
        loss = ((trajectory(hybrid, x0, forces, {"half_length": length}) - noisy) / 0.01).square().mean()
        loss.backward()
        return loss

    optimiser.step(misfit)
    x = torch.zeros(31, 4, dtype=torch.float64)
    x[:, 1] = torch.linspace(-2.0, 2.0, 31)  # where most of the velocities are
    right, found = truth.module(x, None), module(x, None).detach()
    assert (found - right).norm() < 0.05 * right.norm()
    assert float(length.detach()) == pytest.approx(0.4, rel=0.01)
    with torch.no_grad():
        module.layers[2].weight *= 1.1  # a force that is a tenth off does not pass
    assert (module(x, None).detach() - right).norm() > 0.05 * right.norm()


def test_identify_with_a_network_that_stays():
    truth = Hybrid(CartPole(dt=0.05, half_length=0.4), Rubbing(), "controls")
    x0, forces, states = _recorded(truth, 8, 12)
    found = identify(Hybrid(SYSTEM, truth.module, "controls"), states, forces, {"half_length": 0.6}, noise=0.01)
    assert found.values["half_length"] == pytest.approx(0.4, rel=1e-6)
    assert found.system.module is truth.module and found.system.half_length == found.values["half_length"]


def test_what_is_refused():
    network = Network(4)
    with pytest.raises(TypeError, match="system must be a warp_phys.System, got TorchSystem"):
        Hybrid(TorchSystem(lambda x, c: x, 2, 1), network)
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got function"):
        Hybrid(SYSTEM, lambda x, c: x)
    for unknown in ("forces", 3, None):
        with pytest.raises(ValueError, match=f"gives must be 'residual', .* among dt, gravity, .*, got {unknown!r}"):
            Hybrid(SYSTEM, network, unknown)
    with pytest.raises(ValueError, match="must not be 'inputs': CartPole declares none"):
        Hybrid(SYSTEM, network, "inputs")
    with pytest.raises(ValueError, match="must not be 'inputs': the cost of Wind reads them"):
        Hybrid(Wind(), network, "inputs")
    with pytest.raises(ValueError, match="distinct names of physical parameters, among dt, gravity"):
        Hybrid(SYSTEM, network, ("gravity", "drag"))
    with pytest.raises(ValueError, match=r"what the module of a Hybrid returns must have shape \(batch, 4\)"):
        Rollout(Hybrid(SYSTEM, Network(3)), Plain(SYSTEM), STEPS)(_start())
    with pytest.raises(ValueError, match=r"must return controls of shape \(batch, 1\), got \(11, 2\)"):
        Rollout(Hybrid(SYSTEM, network), torch.nn.Linear(4, 2).double(), STEPS)(_start())
    hybrid, policy = Hybrid(SYSTEM, network), Plain(SYSTEM)
    for flow in (Flow(limit=0.5), Combined(other=Flow(limit=1.0))):
        with pytest.raises(ValueError, match="a flow with a limit is not for a Hybrid"):
            Rollout(hybrid, policy, STEPS, flow)
    with pytest.raises(ValueError, match="a flow with a limit is not for a Hybrid"):
        trajectory(hybrid, _start(), _numbers(STEPS, BATCH, 1), flow=Flow(limit=1.0))
    with pytest.raises(
        ValueError, match="controller or the module of a Hybrid must have its parameters in one precision"
    ):
        Rollout(Hybrid(SYSTEM, Network(4).float()), policy, STEPS)
    with pytest.raises(TypeError, match="x0 must be torch.float32 on cpu as the module is, got torch.float64"):
        trajectory(Hybrid(SYSTEM, Network(4).float()), _start(), _numbers(STEPS, BATCH, 1))
    with pytest.raises(ValueError, match="a Hybrid is not diagnosed"):
        diagnose(Rollout(hybrid, policy, STEPS), _start().detach())
    with pytest.raises(TypeError, match="Wind has inputs .* unroll the Hybrid by a torch Rollout"):
        audit(Hybrid(Wind(), Network(2, 3)), np.ones((2, 2)))
    x = wp.zeros((2, 4), dtype=wp.float64, device="cpu", requires_grad=True)
    c = wp.zeros((2, 1), dtype=wp.float64, device="cpu")
    with wp.Tape(), pytest.raises(RuntimeError, match="a wp.Tape cannot record the step of a Hybrid"):
        hybrid.step(x, c, wp.zeros_like(x))
    with pytest.raises(TypeError, match="x must hold torch.float64 as the module does, got float32"):
        audit(hybrid, dtype=np.float32)


def test_what_a_hybrid_has_of_its_system():
    hybrid = Hybrid(SYSTEM, torch.nn.Linear(5, 4))
    assert (hybrid.states, hybrid.controls, hybrid.dt) == (SYSTEM.states, SYSTEM.controls, 0.05)
    assert repr(hybrid) == f"Hybrid({SYSTEM}, gives='residual')"
    assert hybrid.with_parameters({"dt": 0.1}).dt == 0.1 and not hasattr(hybrid, "functions")
    trajectory(hybrid, torch.zeros(2, 4), torch.zeros(3, 2, 1))
    other = copy.deepcopy(hybrid)
    assert other.module is not hybrid.module and not other.open_loops


def test_compiled_code():
    network, policy = Network(1), Plain(SYSTEM)
    rollout, x0, found = Rollout(Hybrid(SYSTEM, network, "controls"), policy, STEPS, "M"), _start(), []
    leaves = [x0, *policy.parameters(), *network.parameters()]
    for call in (rollout, torch.compile(lambda x: rollout(x), backend="aot_eager", fullgraph=True)):
        states, controls = call(x0)
        found.append(torch.autograd.grad(_loss(states, controls), leaves))
    _check(found[1], found[0])


@pytest.mark.parametrize(
    ("module", "policy", "message"),
    [
        (
            torch.nn.Sequential(torch.nn.Linear(5, 1), torch.nn.Dropout(0.5)),
            torch.nn.Linear(4, 1),
            "^controller or the module of a Hybrid must give",
        ),
        (
            torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1)),
            torch.nn.Linear(4, 1),
            "^the module of a Hybrid must not normalise",
        ),
        (
            torch.nn.Linear(5, 1),
            torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)),
            "^controller must not normalise",
        ),
        (torch.nn.Linear(3, 1), torch.nn.Linear(4, 1), "^the module of a Hybrid fails at states of shape"),
        (
            torch.nn.Linear(5, 1).double(),
            torch.nn.Linear(4, 1),
            "^controller or the module of a Hybrid must have its parameters in",
        ),
    ],
)
def test_errors_say_which_network_is_at_fault(module, policy, message):
    hybrid = Hybrid(CartPole(), module, "controls")
    with pytest.raises(ValueError, match=message):
        hybrid.loss(Rollout(hybrid, policy, 3, "R", backend="general")(hybrid.sample(4))[0]).backward()
