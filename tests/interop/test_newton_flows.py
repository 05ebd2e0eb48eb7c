"""All flows of a rollout in Newton from one linearisation of each substep, contacts included."""

import numpy as np
import pytest
import torch
import warp as wp

newton = pytest.importorskip("newton")

import warp_phys  # noqa: E402
from demos.newton_tasks import TASKS  # noqa: E402
from tests.interop.newton_models import ant, arrays, ball, double_pole, pull, unroll  # noqa: E402
from warp_phys.engine import phases  # noqa: E402
from warp_phys.engine.layers import Dense  # noqa: E402
from warp_phys.errors import NotRepeatable  # noqa: E402
from warp_phys.interop.newton import NewtonSystem  # noqa: E402
from warp_phys.interop.torch import Rollout  # noqa: E402

WORLDS = 2
SemiImplicit = newton.solvers.SolverSemiImplicit
SCENES = {
    "double pole": (double_pole, {"joints": ("slider_to_cart",), "gain": 20.0, "dt": 0.02, "substeps": 3}),
    "ant": (ant, {"contacts": True, "ground": True, "dt": 0.004, "substeps": 2}),
    "ball": (
        lambda: ball(0.19),
        {
            "contacts": True,
            "ground": True,
            "dt": 0.004,
            "substeps": 2,
            "solver": SemiImplicit,
            "joints": ("ball_free_joint",),
        },
    ),
}
each_scene = pytest.mark.parametrize("scene", SCENES)


@pytest.fixture(scope="module")
def make():
    """Systems, made once per scene and device."""
    made = {}

    def system(scene, device):
        if (scene, device) not in made:
            builder, options = SCENES[scene]
            made[scene, device] = NewtonSystem.from_builder(builder(), WORLDS, device=device, **options)
        return made[scene, device]

    return system


def start(system, seed=0):
    """States that move, apart from world to world; an ant's feet are in the ground."""
    x0 = system.initial_states()
    rates = slice(15, None) if system.state_size == 29 else slice(None)
    x0[:, rates] += np.random.default_rng(seed).uniform(-0.5, 0.5, x0[:, rates].shape)
    return x0.astype(np.float32)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@each_scene
def test_several_flows_at_once(make, device, scene):
    """To the bit what one after the other gives, with the states between the substeps or without."""
    system, generator = make(scene, device), np.random.default_rng(1)
    x, c, y = arrays(start(system), np.full((WORLDS, system.control_size), 0.3), start(system), device=device)
    inner = wp.zeros((system.substeps - 1, *x.shape), dtype=wp.float32, device=device)
    system.step(x, c, y, inner=inner)
    adj_y = generator.standard_normal((3, *x.shape))
    expected = []
    for one in adj_y:
        adj, adj_x, adj_c = arrays(one, np.zeros(x.shape), np.zeros(c.shape), device=device)
        system.step_vjp(x, c, adj, adj_x, adj_c)
        expected.append((adj_x.numpy(), adj_c.numpy()))
    for options in ({}, {"inner": inner}, {"inner": inner, "y": y}):
        adj, adj_x, adj_c = arrays(adj_y, np.zeros(adj_y.shape), np.zeros((3, *c.shape)), device=device)
        system.step_vjp(x, c, adj, adj_x, adj_c, **options)
        for f, (of_x, of_c) in enumerate(expected):
            np.testing.assert_array_equal(adj_x.numpy()[f], of_x)
            np.testing.assert_array_equal(adj_c.numpy()[f], of_c)
    inner.fill_(0.1)  # not those of the forward pass
    with pytest.raises(NotRepeatable):
        system.step_vjp(x, c, adj, adj_x, adj_c, y=y, inner=inner)


def test_wrong_shapes(make, device):
    system = make("double pole", device)
    x, c, y = arrays(start(system), np.zeros((WORLDS, 1)), start(system), device=device)
    inner, adj = wp.zeros((1, *x.shape), device=device), wp.zeros((2, *x.shape), device=device)
    with pytest.raises(ValueError, match=r"inner must have shape \(2, 2, 6\), got \(1, 2, 6\)"):
        system.step(x, c, y, inner=inner)
    with pytest.raises(ValueError, match=r"adj_x must have shape \(2, 2, 6\), got \(2, 6\)"):
        system.step_vjp(x, c, adj, wp.zeros_like(x), wp.zeros_like(c))


def test_inertia_by_bodies(make, device):
    """States and adjoints of Newton's own dense products, which a solver made by the caller keeps."""
    system = make("ant", device)
    own = newton.solvers.SolverFeatherstone(system.model)
    other = NewtonSystem(system.model, own, contacts=True, dt=system.dt, substeps=system.substeps)
    x0, generator = start(system), np.random.default_rng(2)
    controls = generator.standard_normal((2, WORLDS, system.control_size)).astype(np.float32)
    weights = generator.standard_normal(x0.shape)
    results = []
    for each in (system, other):
        states = unroll(each, x0, controls)
        results.append((states[-1].numpy(), *pull(each, states, controls, weights)))
    for found, expected in zip(*results, strict=True):
        assert 0.0 < relative(found, expected) < 1e-4  # not the same way
    assert not own.use_tile_gemm and system.solver.use_tile_gemm


def updates_of(system, flow, steps, **options):
    """The update of a small network by one flow, and the network."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(system.state_size, 8), torch.nn.Tanh(), torch.nn.Linear(8, system.control_size)
    network = torch.nn.Sequential(*layers).to(str(system.device))
    states, _ = Rollout(system, network, steps, flow=flow, **options)(start(system))
    (states[1:] ** 2).mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()]).cpu().numpy(), network


class Step(torch.autograd.Function):
    """A step for autograd, each adjoint asked for alone and computed anew."""

    @staticmethod
    def forward(ctx, system, x, c):
        ctx.system = system
        ctx.save_for_backward(x, c)
        y = torch.empty_like(x)
        system.step(wp.from_torch(x.detach().contiguous()), wp.from_torch(c.detach().contiguous()), wp.from_torch(y))
        return y

    @staticmethod
    def backward(ctx, adj_y):
        x, c = (t.detach().contiguous() for t in ctx.saved_tensors)
        out = torch.empty_like(x), torch.empty_like(c)
        ctx.system.step_vjp(*(wp.from_torch(t) for t in (x, c, adj_y.contiguous(), *out)))
        return None, *out


def test_flows_with_contacts_against_detach(make, device):
    """R, M and C of an ant on its feet: one linearisation for both of C's flows, wrenches restored once."""
    system, steps = make("ant", device), 6
    expected = {}
    for flow, cut in (("regular", False), ("modified", True)):
        _, network = updates_of(system, flow, 1)
        network.zero_grad()
        x, loss = torch.tensor(start(system), device=str(device)), 0.0
        for _ in range(steps):
            x = Step.apply(system, x, network(x.detach() if cut else x))
            loss = loss + (x**2).mean() / steps
        loss.backward()
        expected[flow] = torch.cat([p.grad.flatten() for p in network.parameters()]).cpu().numpy()
        assert relative(updates_of(system, flow, steps)[0], expected[flow]) < 1e-4
    m, r = expected["modified"], expected["regular"]
    agreed = np.where(np.sign(m) == np.sign(r), m, 0.0)
    sure = np.minimum(np.abs(m), np.abs(r)) > 1e-4 * np.abs(m).max()  # else a sign may be rounding
    np.testing.assert_allclose(
        updates_of(system, "combined", steps)[0][sure], agreed[sure], rtol=1e-3, atol=1e-5 * np.abs(m).max()
    )
    assert relative(m, r) > 1e-4


def test_gradient_of_a_hopper_in_contact(device):
    """R over 20 steps of 8 substeps, with the foot on the ground, against differences along the gradient."""
    task = TASKS["hopper"]
    if device != "cpu":
        pytest.skip("the demo computes on a CPU")
    system = task.build(WORLDS)
    torch.manual_seed(0)
    network = torch.nn.Linear(system.state_size, system.control_size)
    with torch.no_grad():
        network.weight *= 0.1
    x0 = task.start(system, np.random.default_rng(0))
    rollout = Rollout(system, network, 20, flow="R")

    def loss():
        states, controls = rollout(x0)
        return task.cost(states.double(), controls.double())

    loss().backward()
    weight, gradient = network.weight.detach().clone(), network.weight.grad.clone()
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            network.weight.copy_(weight + sign * 1e-3 * gradient / gradient.norm())
            values.append(float(loss()))
    slope = (values[0] - values[1]) / 2e-3
    assert slope == pytest.approx(float(gradient.norm()), rel=0.01)


def test_two_ways_through_the_controller(make, device, monkeypatch):
    """Its Jacobians at all steps, or its pull at each: the same numbers, and so without what is kept."""
    system = make("double pole", device)
    found = []
    for parallel in (True, False):
        monkeypatch.setattr(phases, "parallel_in_time", lambda *_, parallel=parallel: parallel)
        found.append(updates_of(system, "C", 5)[0])
    monkeypatch.setattr(system, "_keep", False)
    assert system.inner_states == 0
    found.append(updates_of(system, "C", 5)[0])
    for other in found[1:]:
        assert relative(other, found[0]) < 1e-5


def test_a_captured_update(make, device):
    """Forward and backward pass as one graph, replayed with other initial states: the update of the torch rollout."""
    system, steps = make("double pole", device), 4
    expected, network = updates_of(system, "regular", steps)
    weights = arrays(*(p.detach().cpu().numpy() for p in network.parameters()), device=device)
    for weight in weights:
        weight.requires_grad = True
    sizes = system.state_size, 8, system.control_size
    rollout = warp_phys.Rollout(system, Dense(sizes, parameters=weights), steps, "regular", on_divergence="ignore")
    x0 = wp.zeros((WORLDS, system.state_size), dtype=wp.float32, device=device)

    def update():
        with wp.Tape() as tape:
            states, _ = rollout(x0)
        wp.copy(states.grad[1:], states[1:])  # of half the sum of squares
        tape.backward()
        return tape, states

    update()
    for weight in weights:
        weight.grad.zero_()
    with wp.ScopedCapture(device) as capture:
        kept = update()
    x0.assign(start(system))
    for weight in weights:
        weight.grad.zero_()
    wp.capture_launch(capture.graph)
    scale = 2.0 / (steps * WORLDS * system.state_size)
    found = scale * np.concatenate([weight.grad.numpy().ravel() for weight in weights])
    assert relative(found, expected) < 1e-5
    del kept
