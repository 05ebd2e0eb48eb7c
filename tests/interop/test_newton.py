"""Newton's physics with our flows: gradients, graphs, rows, errors."""

import numpy as np
import pytest
import torch
import warp as wp

newton = pytest.importorskip("newton")

from tests.interop.newton_models import SharedSolver, ant, arrays, ball, cartpole, double_pole, pull, unroll  # noqa: E402
from warp_phys import CartPole, audit  # noqa: E402
from warp_phys.interop.newton import NewtonSystem  # noqa: E402
from warp_phys.interop.torch import Rollout  # noqa: E402

WORLDS, DT = 16, 0.02
Featherstone, SemiImplicit = newton.solvers.SolverFeatherstone, newton.solvers.SolverSemiImplicit


@pytest.fixture(scope="module")
def make():
    """Systems, made once per set of options."""
    made = {}

    def system(device, builder=double_pole, worlds=WORLDS, **options):
        key = (device, builder, worlds, *sorted(options.items()))
        if key not in made:
            given = {"dt": DT, "joints": ("slider_to_cart",)} if builder is double_pole else {"dt": DT}
            made[key] = NewtonSystem.from_builder(builder(), worlds, device=device, **(given | options))
        return made[key]

    return system


def problem(system, steps, seed=0, spread=0.5):
    """States, controls and weights of the last state."""
    generator = np.random.default_rng(seed)
    x0 = system.sample(system.worlds, seed, spread=spread)
    controls = generator.standard_normal((steps, system.worlds, system.control_size)).astype(np.float32)
    return x0, controls, generator.standard_normal(x0.shape)


def slopes(system, x0, controls, weights, h):
    """Central differences of ⟨weights, x_T⟩ by every component of x_0, extrapolated from h and h / 2."""

    def value(x):
        return (weights * unroll(system, x, controls)[-1].numpy().astype(np.float64)).sum(axis=1)

    out = np.empty(x0.shape)
    for j in range(x0.shape[1]):
        e = np.zeros_like(x0)
        e[:, j] = h
        coarse, fine = ((value(x0 + k * e) - value(x0 - k * e)) / (2.0 * k * h) for k in (1.0, 0.5))
        out[:, j] = (4.0 * fine - coarse) / 3.0
    return out


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_gradient_of_many_steps(make, device, steps, substeps):
    system = make(device, substeps=substeps)
    x0, controls, weights = problem(system, steps)
    found, adj_c = pull(system, unroll(system, x0, controls), controls, weights)
    h = 0.01 if steps == 50 else 0.1  # fifty steps of a double pole bend too much for more
    assert relative(found, slopes(system, x0, controls, weights, h)) < 3e-4

    direction = np.random.default_rng(5).standard_normal(controls.shape).astype(np.float32)
    f = [
        (weights * unroll(system, x0, controls + s * np.float32(h) * direction)[-1].numpy()).sum(axis=1)
        for s in (1, -1)
    ]
    assert relative((adj_c * direction).sum((0, 2)), (f[0] - f[1]) / (2 * h)) < 1e-2


def test_a_shared_solver_fails_where_ours_is_right(make, device):
    """The mistake that recomputing avoids is one that the test above sees."""
    system = make(device)
    naive = SharedSolver(make(device, graph=False))
    for steps, low, high in ((1, 0.0, 3e-4), (2, 1e-3, np.inf), (10, 0.02, np.inf)):
        x0, controls, weights = problem(system, steps)
        found, _ = pull(naive, unroll(naive, x0, controls), controls, weights)
        assert low <= relative(found, slopes(system, x0, controls, weights, 0.1)) < high


def test_parity_with_warps_own_tape(make, device):
    """Fifty steps on one tape, with a solver for each step: there Newton's own way is right."""
    system = make(device)
    x0, controls, weights = problem(system, 50)
    found, adj_c = pull(system, unroll(system, x0, controls), controls, weights)
    model, work = system.model, system._work
    states = [model.state(requires_grad=True) for _ in range(51)]
    inputs = [model.control(requires_grad=True) for _ in range(50)]
    work._spread(*arrays(x0, device=device), states[0])
    for n, c in enumerate(controls):
        numbers = np.zeros((WORLDS, 3), dtype=np.float32)
        numbers[:, :1] = c
        inputs[n].joint_f.assign(numbers.ravel())
    solvers = [Featherstone(model) for _ in range(50)]
    with wp.Tape() as tape:
        for n in range(50):
            solvers[n].step(states[n], states[n + 1], inputs[n], None, DT)
    work._spread(*arrays(weights, device=device), states[50], adjoint=True)
    tape.backward()
    expected = wp.zeros_like(work.y)
    work._collect(states[0], expected, adjoint=True)
    assert relative(found, expected.numpy()) < 1e-5
    for n in (0, 25, 49):
        assert relative(adj_c[n, :, 0], inputs[n].joint_f.grad.numpy()[::3]) < 1e-5
    tape.zero()


def test_parity_with_our_own_cartpole(make, device):
    """The same cart-pole in Newton and in float64 here: states and gradients of fifty steps."""
    ours = CartPole(poles=1, dt=DT)
    system = make(device, cartpole, joints=("slide",))
    assert system.states == ("slide [m]", "hinge [rad]", "slide rate [m/s]", "hinge rate [rad/s]")
    x0, controls, weights = problem(system, 50)
    states = unroll(system, x0, controls)
    found, adj_c = pull(system, states, controls, weights)

    order = [0, 2, 1, 3]  # (position, velocity, angle, rate) there
    exact = [wp.array(x0[:, order].astype(np.float64), device=device)]
    inputs = [wp.array(c.astype(np.float64), device=device) for c in controls]
    for c in inputs:
        exact.append(wp.empty_like(exact[0]))
        ours.step(exact[-2], c, exact[-1])
    lam, out = wp.array(weights[:, order], device=device), wp.empty_like(exact[0])
    mu = [wp.empty_like(c) for c in inputs]
    for n in reversed(range(50)):
        ours.step_vjp(exact[n], inputs[n], lam, out, mu[n])
        lam, out = out, lam
    assert relative(states[-1].numpy()[:, order], exact[-1].numpy()) < 1e-4
    assert relative(found[:, order], lam.numpy()) < 1e-3
    assert relative(adj_c, np.stack([m.numpy() for m in mu])) < 1e-3


def test_graphs_give_the_same_bits(make, device):
    graph, eager = make(device, substeps=3), make(device, substeps=3, graph=False)
    x0, controls, weights = problem(graph, 4)
    results = []
    for system in (graph, eager, graph):
        states = unroll(system, x0, controls)
        results.append([states[-1].numpy(), *pull(system, states, controls, weights)])
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            np.testing.assert_array_equal(a, b)


def test_all_worlds_are_samples(make, device):
    """A sample's numbers depend on its own row alone, and the arrays may have any strides."""
    system = make(device)
    x0, controls, weights = problem(system, 1)
    y, (adj_x, adj_c) = (
        unroll(system, x0, controls)[-1].numpy(),
        pull(system, arrays(x0, device=device), controls, weights),
    )
    turned = [np.ascontiguousarray(a[::-1]) for a in (x0, weights)]
    wide = wp.zeros((WORLDS, 2 * x0.shape[1]), dtype=wp.float32, device=device)[:, ::2]
    wide.assign(turned[0])
    out = wp.zeros_like(wide)
    system.step(wide, *arrays(controls[0, ::-1], device=device), out)
    np.testing.assert_array_equal(out.numpy()[::-1], y)
    again = pull(system, [wide], np.ascontiguousarray(controls[:, ::-1]), turned[1])
    np.testing.assert_array_equal(again[0][::-1], adj_x)
    np.testing.assert_array_equal(again[1][:, ::-1], adj_c)


def test_a_callers_tape_and_graph(make, device):
    system = make(device)
    x0, controls, weights = problem(system, 3)
    expected, _ = pull(system, unroll(system, x0, controls), controls, weights)
    start, seed = arrays(x0, weights, device=device)
    start.requires_grad = True
    inputs = arrays(*controls, device=device)
    states = [start] + [wp.zeros_like(start, requires_grad=True) for _ in controls]
    with wp.Tape() as tape:
        for n, c in enumerate(inputs):
            system.step(states[n], c, states[n + 1])
    tape.backward(grads={states[-1]: seed})
    np.testing.assert_array_equal(start.grad.numpy(), expected)

    final = states[-1].numpy()
    with wp.ScopedCapture(device) as capture:
        for n, c in enumerate(inputs):
            system.step(states[n], c, states[n + 1])
    states[-1].zero_()
    wp.capture_launch(capture.graph)
    np.testing.assert_array_equal(states[-1].numpy(), final)


def torch_rollout(system, flow, steps):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(system.state_size, 8), torch.nn.Tanh(), torch.nn.Linear(8, system.control_size)
    ).to(str(system.device))
    return net, Rollout(system, net, steps, flow=flow)


def test_flows_against_detach(make, device):
    """R, M, S and C of a torch network, against autograd through our verbs with `detach` in the same places."""
    system, steps = make(device, gain=20.0), 20
    x0, _, _ = problem(system, 1)
    updates = {}
    for flow in ("regular", "modified", "stopped", "combined"):
        net, rollout = torch_rollout(system, flow, steps)
        states, _ = rollout(x0)
        (states[1:] ** 2).mean().backward()
        updates[flow] = torch.cat([p.grad.flatten() for p in net.parameters()])

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, c):
            ctx.save_for_backward(x, c)
            y = torch.empty_like(x)
            system.step(*(wp.from_torch(t.detach().contiguous()) for t in (x, c)), wp.from_torch(y))
            return y

        @staticmethod
        def backward(ctx, adj_y):
            x, c = (t.detach().contiguous() for t in ctx.saved_tensors)
            out = torch.empty_like(x), torch.empty_like(c)
            system.step_vjp(*(wp.from_torch(t) for t in (x, c, adj_y.contiguous(), *out)))
            return out

    for flow, physics, controller in (("regular", 1, 1), ("modified", 1, 0), ("stopped", 0, 0)):
        net, _ = torch_rollout(system, flow, steps)
        x, loss = torch.tensor(x0, device=str(device)), 0.0
        for _ in range(steps):
            c = net(x if controller else x.detach())
            x = Step.apply(x if physics else x.detach(), c)
            loss = loss + (x**2).mean() / steps
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert relative(updates[flow].cpu().numpy(), expected.cpu().numpy()) < 1e-4
    agreed = torch.where(updates["modified"].sign() == updates["regular"].sign(), updates["modified"], 0.0)
    assert torch.allclose(updates["combined"], agreed, rtol=1e-4, atol=1e-6 * agreed.abs().max())
    assert 0 < (agreed == 0).sum() < len(agreed)


def test_more_samples_than_a_chunk(make, device):
    """A backward pass never asks for a part of the worlds."""
    system = make(device, cartpole, 2050, joints=("slide",))
    net, rollout = torch_rollout(system, "modified", 1)
    states, _ = rollout(system.sample(2050))
    states[1].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def driven():
    world = cartpole()
    for array, value in ((world.joint_target_ke, 30.0), (world.joint_target_kd, 4.0)):
        array[0] = value
    return world


@pytest.mark.parametrize("control", ["joint_target_q", "joint_target_qd"])
def test_targets(make, device, control):
    """The target of a drive: a spring or a damper between it and the joint."""
    system = make(device, driven, control=control, joints=("slide",), gain=2.0)
    assert system.controls == ("target of slide [m]" if control.endswith("_q") else "target of slide rate [m/s]",)
    x0, controls, weights = problem(system, 2)
    found, adj_c = pull(system, unroll(system, x0, controls), controls, weights)
    assert relative(found, slopes(system, x0, controls, weights, 0.1)) < 3e-4
    h = np.float32(0.25)
    f = [(weights * unroll(system, x0, controls + s * h)[-1].numpy()).sum(axis=1) for s in (1, -1)]
    assert relative(adj_c.sum((0, 2)), (f[0] - f[1]) / (2 * h)) < 1e-3


def test_targets_that_are_not_steered(make, device):
    """They are numbers of the model: written in place, they count from the next step on, in either verb."""
    system = make(device, driven, joints=("hinge",))
    x0, controls, weights = problem(system, 2)
    before = unroll(system, x0, controls)[-1].numpy()
    system.model.joint_target_q.assign(np.tile(np.float32([0.5, 0.0]), system.worlds))
    states = unroll(system, x0, controls)
    other = NewtonSystem(system.model, joints=("hinge",), dt=system.dt)
    assert np.array_equal(states[-1].numpy(), unroll(other, x0, controls)[-1].numpy())
    assert np.abs(states[-1].numpy() - before).max() > 1e-3
    assert relative(pull(system, states, controls, weights)[0], slopes(system, x0, controls, weights, 0.1)) < 3e-4


def test_audit_finds_the_shared_solver(make, device):
    assert audit(make(device, substeps=3)).ok
    report = audit(SharedSolver(make(device, graph=False)))
    assert not report.ok
    assert {finding.horizon for finding in report.failures} == {2, 8}
    assert "cart_to_pole1 [rad]" in report.components("state")
    assert "WRONG through" in str(report)


def test_maximal_coordinates_and_contacts(make, device):
    """A ball that bounces on the ground, with SolverSemiImplicit: positions and speeds have right gradients."""
    options = {"solver": SemiImplicit, "dt": 0.01, "substeps": 4, "contacts": True, "ground": True}
    system = make(device, ball, 4, joints=("ball_free_joint",), **options)
    assert system.state_size == 13 and system.controls[2] == "ball_free_joint z force [N]"
    x0 = system.initial_states()
    x0[:, 2] = np.linspace(0.21, 0.27, 4)
    x0[:, 9] = -2.0
    controls = np.zeros((20, 4, 6), dtype=np.float32)
    heights = [x.numpy()[:, 2] for x in unroll(system, x0, controls)]
    assert (
        np.min(heights) > 0.0
        and np.argmin(heights, axis=0).max() < 20
        and np.all(heights[-1] > np.min(heights, axis=0))
    )
    weights = np.zeros(x0.shape)
    weights[:, [2, 9]] = 1.0, 0.3
    found, _ = pull(system, unroll(system, x0, controls), controls, weights)
    expected = slopes(system, x0, controls, weights, 2e-4)  # less than a substep goes
    np.testing.assert_allclose(found[:, [2, 9]], expected[:, [2, 9]], rtol=0.01)


def test_particles(make, device):
    """A mass on a spring, in coordinates of particles."""

    def spring():
        world = newton.ModelBuilder(gravity=(0.0, 0.0, 0.0))
        for x, mass in ((0.0, 0.0), (1.0, 1.0)):
            world.add_particle(wp.vec3(x, 0.0, 0.0), wp.vec3(), mass)
        world.add_spring(0, 1, ke=10.0, kd=0.1, control=0.0)
        body = world.add_link(mass=1.0, inertia=wp.mat33(np.eye(3)))
        world.add_articulation([world.add_joint_prismatic(-1, body, axis=(1.0, 0.0, 0.0), label="idle")])
        return world

    system = make(device, spring, 2, solver=Featherstone)
    assert system.states[:3] == ("idle [m]", "idle rate [m/s]", "particle 0 x [m]")
    x0 = system.initial_states()
    x0[:, 5] = 1.2, 1.4
    y = unroll(system, x0, np.zeros((1, 2, 1), dtype=np.float32))[-1].numpy()
    speed = -10.0 * (x0[:, 5] - 1.0) * DT
    np.testing.assert_allclose(y[:, 11], speed, rtol=1e-4)
    weights = np.zeros(x0.shape)
    weights[:, 5] = 1.0
    found, _ = pull(system, arrays(x0, device=device), np.zeros((1, 2, 1), dtype=np.float32), weights)
    np.testing.assert_allclose(found[:, 5], 1.0 - 10.0 * DT**2, rtol=1e-4)
    np.testing.assert_allclose(found[:, 11], DT * (1.0 - 0.1 * DT), rtol=2e-3)


def test_contacts_of_limbs(make, device, monkeypatch):
    """Feet on the ground push legs and body through lever arms, whose derivatives Newton's own tape has wrong."""
    options = {"dt": 0.002, "contacts": True, "ground": True}
    system = make(device, ant, 1, **options)
    assert (system.state_size, system.control_size) == (29, 8)
    x = system.initial_states()
    x[:, 15:18] = 0.3, 0.2, -0.5  # with a speed: at rest damping and friction have kinks
    settings = {"horizons": (1,), "kick": 0.3, "differences": 0.03 / 4.0 ** np.arange(6)}
    # Newton places contacts by unit quaternions: the length of one is no direction that a body can move in
    assert set(audit(system, x, **settings).components("state")) <= {"root qw [-]"}
    monkeypatch.setattr("warp_phys.interop.newton.substeps.OVERWRITES", "\0")
    report = audit(NewtonSystem.from_builder(ant(), 1, device=device, graph=False, **options), x, **settings)
    assert {f"hip_{i} [rad]" for i in (1, 2, 3, 4)} <= set(report.components("state"))
