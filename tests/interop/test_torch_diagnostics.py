"""Diagnosis of torch rollouts, in float64: held against autograd with `detach`, jacrev, and the updates of training."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch

from tests.interop.test_torch import SYSTEM, network, start
from tests.rollout import reference
from tests.springs import Springs
from tests.toy import TwoControls
from warp_phys import CartPole, Diverged, Flow, Polynomial, Quantum, Repulsion
from warp_phys.diagnose.feedback import retrace
from warp_phys.diagnose.landscape import Landscape
from warp_phys.diagnose.plane import rotation_share
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout, diagnose, jacobians, pointwise_cost, rotation
from warp_phys.systems import System

STEPS = 12
DECAY = Flow(1.0, 0.3, window=5)
FLOWS = ("regular", "modified", "stopped", "controller", DECAY)
STEP = {CartPole: reference.cart_pole_step, TwoControls: reference.two_controls_step}
LOSS = {CartPole: reference.cart_pole_loss, TwoControls: reference.two_controls_loss}


class Wrapped(torch.nn.Module):
    """The same function, but no module that the engine can look into."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


class Foreign:
    """A system's two verbs and nothing else, for one batch size, as a simulator from elsewhere may be."""

    def __init__(self, system, batch):
        self.system, self.batch = system, batch
        self.state_size, self.control_size = system.state_size, system.control_size

    def step(self, x, c, y):
        assert len(x) == self.batch
        self.system.step(x, c, y)

    def step_vjp(self, x, c, adj_y, adj_x, adj_c):
        assert len(x) == self.batch
        self.system.step_vjp(x, c, adj_y, adj_x, adj_c)


def by_autograd(system, net, x0, flow, when, control_cost):
    """Return λ_n, what reaches it on either path, and each step's contribution to the update, by torch."""
    step = functools.partial(STEP[type(system)], system)
    gates = flow.gates(STEPS)
    states, controls, behind = [x0.clone().requires_grad_()], [], []
    for alpha, beta in gates.tolist():
        views = reference.gated(states[-1], alpha), reference.gated(states[-1], beta)
        behind.append([v if v.requires_grad else v.requires_grad_() for v in views])
        controls.append(net(behind[-1][1]))
        states.append(step(behind[-1][0], controls[-1]))
    loss = LOSS[type(system)](torch.stack(states), torch.stack(controls), when, control_cost)
    get = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True)
    paths = [
        [get(loss, views[i])[0] * weight for views, weight in zip(behind, gates[:, i], strict=True)] for i in range(2)
    ]
    shares = []
    for (_, seen), c in zip(behind, controls, strict=True):
        mu = get(loss, c)[0]
        parts = get(net(seen.detach()), list(net.parameters()), mu)
        shares.append(torch.cat([part.flatten() for part in parts]))
    return (
        *(torch.stack(rows).detach().norm(dim=2).numpy() for rows in (get(loss, states), *paths)),
        torch.stack(shares).detach(),
    )


@pytest.mark.parametrize("wrap", [lambda net: net, Wrapped], ids=["dense", "module"])
@pytest.mark.parametrize(
    ("system", "when", "control_cost"),
    [(CartPole(poles=2, dt=0.05), "final", 0.0), (SYSTEM, "every", 0.1), (TwoControls(), "every", 0.2)],
)
def test_adjoints_paths_and_contributions_equal_autograd(system, when, control_cost, wrap, device):
    net = wrap(network(system, device))
    x0 = start(device, 5, 1, system)
    found = diagnose(Rollout(system, net, STEPS), x0, (*FLOWS, "combined"), when, control_cost)
    by_flow = {}
    for i, flow in enumerate(map(resolve, FLOWS)):
        adjoints, physics, controller, shares = by_flow[flow.name] = by_autograd(
            system, net.cpu(), x0.cpu(), flow, when, control_cost
        )
        np.testing.assert_allclose(found.adjoints[i], adjoints, rtol=1e-10, atol=1e-16)
        np.testing.assert_allclose(found.physics[i], physics, rtol=1e-10, atol=1e-16)
        np.testing.assert_allclose(found.controller[i], controller, rtol=1e-10, atol=1e-16)
        np.testing.assert_allclose(found.contributions[i], shares.norm(dim=1).numpy(), rtol=1e-9, atol=1e-16)
        assert found.layers[-1].norms[flow.name] == pytest.approx(float(shares.sum(0).norm()), rel=1e-9)
    # the combination of the sums, step by step
    base, other = by_flow["modified"][3], by_flow["regular"][3]
    kept = base * (base.sum(0).sign() == other.sum(0).sign())
    np.testing.assert_allclose(found.contributions[-1], kept.norm(dim=1).numpy(), rtol=1e-9)
    assert np.isnan(found.physics[-1]).all() and np.isfinite(found.adjoints[-1]).all()


@pytest.mark.parametrize(
    "system",
    [Springs(size=3), Repulsion(drivers=1, evaders=1), Quantum(points=2, target=1), Polynomial(dt=0.1)],
    ids=lambda system: type(system).__name__,
)
@pytest.mark.parametrize("when", ["final", "every"])
def test_adjoints_of_all_systems(system, when, device):
    """λ_n is the gradient of x0 for a rollout that begins at x_n, found by the three phases."""
    steps, net, x0 = 6, Wrapped(network(system, device)), start(device, 3, 1, system)

    def loss(states, controls, first=0):
        times = [n - first for n in ([steps] if when == "final" else range(1, steps + 1)) if n >= first]
        return pointwise_cost(system, states, times, {}).sum() + 0.1 * controls.square().sum()

    rollout = Rollout(system, net, steps)
    found = diagnose(rollout, x0, FLOWS[:4], loss=loss)
    states, _ = rollout(x0)
    for i, flow in enumerate(FLOWS[:4]):
        for n in range(1, steps):
            x = states[n].detach().clone().requires_grad_()
            loss(*Rollout(system, net, steps - n, flow)(x), first=n).backward()
            np.testing.assert_allclose(found.adjoints[i, n], x.grad.norm(dim=1).cpu(), rtol=1e-9, atol=1e-15)
    assert "R's feedback" in str(found)


def test_spectra_equal_eigenvalues_of_jacrev(device):
    net, x0 = network(device=device), start(device, 5, 1)
    rollout = Rollout(SYSTEM, net, STEPS)
    found = diagnose(rollout, x0, "R", samples=3).spectra
    states, controls = (tensor.detach()[:, :3].cpu() for tensor in rollout(x0))
    net = net.cpu()

    def step(x, c):
        return reference.cart_pole_step(SYSTEM, x[None], c[None])[0]

    x, c = states[:-1].flatten(0, 1), controls.flatten(0, 1)
    physics, control = torch.func.vmap(torch.func.jacrev(step, (0, 1)))(x, c)
    closed = torch.func.vmap(torch.func.jacrev(lambda x: step(x, net(x[None])[0])))(x)
    path = control @ torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(x)
    matrices = [m.detach().numpy().reshape(STEPS, 3, 6, 6) for m in (physics, path, closed)]
    expected = [f(m) for m in matrices for f in (_radius, lambda m: np.linalg.norm(m, 2, axis=(2, 3)))]
    for values, truth in zip(found[:6], expected, strict=True):
        np.testing.assert_allclose(values, truth, rtol=1e-7, atol=1e-9)
    for exponent, m in zip(found[6:], matrices[::2], strict=True):
        product = functools.reduce(lambda p, n: n @ p, m)
        np.testing.assert_allclose(exponent, np.log(np.linalg.norm(product, 2, axis=(1, 2))) / STEPS, rtol=1e-9)


def _radius(matrices):
    return np.abs(np.linalg.eigvals(matrices)).max(axis=-1)


def test_jacobians_serve_shorter_horizons(device):
    """A rollout's Jacobians give the adjoints of every shorter one."""
    net, x0 = network(device=device), start(device, 3, 1)
    long, short = Rollout(SYSTEM, net, STEPS), Rollout(SYSTEM, net, 7)
    flows = [resolve(flow) for flow in FLOWS[:4]]
    leaf = long(x0)[0][:8].detach().requires_grad_()
    (seeds,) = torch.autograd.grad(SYSTEM.loss(leaf, when="every"), leaf)
    found = diagnose(short, x0, flows, "every")
    again = retrace(jacobians(long, x0), seeds.cpu().numpy(), None, flows)
    np.testing.assert_allclose(np.linalg.norm(again.adjoints, axis=3), found.adjoints, rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(np.linalg.norm(again.controller, axis=3), found.controller, rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(found.batch, np.sqrt((found.adjoints**2).sum(axis=2)), rtol=1e-12)


def test_layers_are_those_of_the_updates_of_training(device):
    net, x0, steps = network(device=device), start(device), 60
    found = diagnose(Rollout(SYSTEM, net, steps), x0, "combined", "every", 0.1)
    grads = {}
    for flow in ("modified", "regular", "combined"):
        net.zero_grad()
        SYSTEM.loss(*Rollout(SYSTEM, net, steps, flow)(x0), "every", 0.1).backward()
        grads[flow] = {name: p.grad.flatten().clone() for name, p in net.named_parameters()}
        grads[flow]["all"] = torch.cat(list(grads[flow].values()))
    assert [layer.name for layer in found.layers] == [*dict(net.named_parameters()), "all"]
    for layer in found.layers:
        m, r = grads["modified"][layer.name], grads["regular"][layer.name]
        assert layer.size == m.numel()
        assert layer.cosine == pytest.approx(float(m @ r / m.norm() / r.norm()), rel=1e-9)
        assert layer.agreement == pytest.approx(float((m.sign() == r.sign()).double().mean()))
        for flow in grads:
            assert layer.norms[flow] == pytest.approx(float(grads[flow][layer.name].norm()), rel=1e-9)
    assert 0.0 < found.layers[-1].agreement < 1.0


def test_training_is_left_alone(device):
    net, x0 = network(device=device), start(device)
    rollout = Rollout(SYSTEM, net, 20)
    SYSTEM.loss(*rollout(x0)).backward()
    report, grads, weights = rollout.report, [p.grad.clone() for p in net.parameters()], copy.deepcopy(net).parameters()
    diagnose(rollout, x0, probes=3)
    assert rollout.report is report and rollout.flow is resolve("C")
    for p, grad, weight in zip(net.parameters(), grads, weights, strict=True):
        assert torch.equal(p.grad, grad) and torch.equal(p, weight) and p.dtype == torch.float64


def test_both_precisions_agree(device):
    net, x0 = network(device=device), start(device)
    double = diagnose(Rollout(SYSTEM, net, 20), x0, when="every")
    single = diagnose(Rollout(SYSTEM, net.float(), 20), x0.float(), when="every")
    np.testing.assert_allclose(single.adjoints[:3], double.adjoints[:3], rtol=1e-3)
    np.testing.assert_allclose(single.spectra.closed_norm, double.spectra.closed_norm, rtol=1e-3)
    np.testing.assert_allclose(single.growth[:3], double.growth[:3], rtol=1e-4)


def test_parameters_per_sample(device):
    net, x0 = network(device=device), start(device, 4)
    rollout, masses = Rollout(SYSTEM, net, 10), [0.05, 0.1, 0.2, 0.3]
    together = diagnose(rollout, x0, parameters={"pole_mass": masses})
    for b, mass in enumerate(masses):
        alone = diagnose(rollout, x0[b : b + 1], parameters={"pole_mass": mass})
        np.testing.assert_allclose(4 * together.adjoints[:3, :, b], alone.adjoints[:3, :, 0], rtol=1e-10)
        np.testing.assert_allclose(together.spectra.physics_norm[:, b], alone.spectra.physics_norm[:, 0], rtol=1e-10)


def test_a_simulator_from_elsewhere(device):
    net, x0 = network(device=device), start(device, 4)
    system, foreign = SYSTEM, Foreign(SYSTEM, 4)
    loss = functools.partial(system.loss, when="every")
    own, other = (diagnose(Rollout(s, net, 8), x0, loss=loss, samples=2) for s in (system, foreign))
    np.testing.assert_allclose(other.adjoints, own.adjoints, rtol=1e-10)
    np.testing.assert_allclose(other.spectra.closed_norm, own.spectra.closed_norm, rtol=1e-10)
    assert other.spectra.closed_norm.shape == (8, 2) and not isinstance(foreign, System)
    with pytest.raises(ValueError, match="loss must be given, Foreign has none of its own"):
        diagnose(Rollout(foreign, net, 8), x0)


def test_samples_that_diverge_are_left_out(device):
    system = Springs(size=3)
    net, x0 = Wrapped(network(system, device)), 0.1 * start(device, 3, 1, system)
    x0[1] = 400.0
    with pytest.raises(Diverged):
        diagnose(Rollout(system, net, 20), x0)

    def total(states, controls):
        return pointwise_cost(system, states, [20], {}).sum()

    masked = diagnose(Rollout(system, net, 20, on_divergence="mask"), x0, "R", loss=total)
    healthy = diagnose(Rollout(system, net, 20), x0[[0, 2]], "R", loss=total)
    assert masked.adjoints.shape[2] == 2
    np.testing.assert_allclose(masked.adjoints, healthy.adjoints, rtol=1e-12)


def _linear(weight, system):
    net = torch.nn.Linear(system.state_size, 1, dtype=torch.float64)
    with torch.no_grad():
        net.weight.zero_()[0, 0] = weight
        net.bias.zero_()
    return net


@pytest.mark.parametrize(
    ("system", "weight", "of_regular", "of_modified", "kind", "path"),
    [
        (Polynomial(dt=0.1), 4.0, 1.4, 1.0, "explodes", "controller"),
        (Polynomial(dt=0.1), -4.0, 0.6, 1.0, "vanishes", "controller"),
        (Polynomial(dt=0.1), 0.5, 1.05, 1.0, "level", ""),
        (Polynomial(dt=0.1), 1.0, 1.1, 1.0, "grows", "controller"),
        (Polynomial(dt=0.1), -1.0, 0.9, 1.0, "shrinks", "controller"),
        (Springs(1, 1, 0.1, stiffness=-4.0, coupling=0.0, gain=1.0), 0.0, 1.4, 1.4, "explodes", "physics"),
        (Springs(1, 1, 0.1, stiffness=-2.0, coupling=0.0, gain=1.0), 2.0, 1.4, 1.2, "explodes", "both"),
        (Springs(1, 1, 0.1, stiffness=4.0, coupling=0.0, gain=1.0), 0.0, 0.6, 0.6, "vanishes", "physics"),
        (Springs(1, 1, 0.1, stiffness=-4.0, coupling=0.0, gain=1.0), -4.0, 1.0, 1.4, "level", ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, System) else str(value),
)
def test_verdicts_of_linear_loops(system, weight, of_regular, of_modified, kind, path):
    """x_{n+1} = (1 + dt s) x + dt w x: both factors are known."""
    x0 = np.full((2, 1), 1e-12)  # so small that the sine is its argument
    found = diagnose(Rollout(system, _linear(weight, system), 40), x0, samples=1)
    for flow, factor in (("R", of_regular), ("M", of_modified)):
        i = found.index(resolve(flow))
        np.testing.assert_allclose(found.growth[i], factor, rtol=1e-6)
        np.testing.assert_allclose(found.horizon_growth[i], factor**39, rtol=1e-4)
        np.testing.assert_allclose(found.batch_growth[i], factor, rtol=1e-6)
        np.testing.assert_allclose(found.batch[i], np.sqrt(2) * found.adjoints[i, :, 0], rtol=1e-6)
        np.testing.assert_allclose(found.spread[i], max(factor, 1 / factor) ** 39, rtol=1e-4)
        sizes = factor ** np.arange(40.0)
        np.testing.assert_allclose(found.effective_steps[i], sizes.sum() ** 2 / (sizes**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(np.exp(found.spectra.closed_exponent), of_regular, rtol=1e-6)
    np.testing.assert_allclose(found.spectra.physics_radius, of_modified, rtol=1e-6)
    assert (found.why.kind, found.why.path) == (kind, path)
    if kind == "explodes":
        through = "both paths" if path == "both" else f"the {path} path"
        assert "R's feedback explodes, it grows by a factor 1.4 per step" in found.why.text
        assert f"through {through}; worst sample" in found.why.text
    if (kind, of_modified) == ("level", 1.4):
        assert "The physics alone would grow, the controller's path holds it." in found.why.text


def test_overflow_is_an_explosion():
    """In float32 the adjoints of R leave the numbers; the table says so and nothing raises."""
    system = Polynomial()
    net = _linear(-30.0, system).float()
    found = diagnose(Rollout(system, net, 40), np.zeros((3, 1), np.float32))
    i = found.index(resolve("R"))
    assert np.isinf(found.adjoints[i, 0]).all() and np.isfinite(found.adjoints[found.index(resolve("M"))]).all()
    assert (found.why.kind, found.why.path) == ("explodes", "controller")
    assert "R overflows in 3 of 3 samples" in str(found)
    assert found.growth[i] == pytest.approx(29.0, rel=1e-4)


@pytest.mark.parametrize("theta", [(1.0, -0.7), (2.0, -1.5)])
def test_rotation_of_the_two_parameter_example(theta, device):
    """A torch module with the polynomial's two parameters: the exact rotations of all flows."""

    class Controller(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64, device=device))

        def forward(self, x):
            return self.theta[0] * x**2 + self.theta[1] * x

    landscape, flows = Landscape(device=device), ("R", "M", "S", "C", "geometric", "minmod")
    expected = np.abs(rotation_share(landscape.jacobian([theta], flows)))[:, 0]
    x0 = np.array([[landscape.system.start]])
    found = rotation(Rollout(landscape.system, Controller(), 4), x0, flows, probes=5)
    for truth, one in zip(expected, found.values(), strict=True):
        assert one.share == pytest.approx(truth, abs=1e-7) and one.share_error == 0.0


def test_rotation_of_a_network(device):
    """Probes against the whole Jacobian, and R against 0; the same in float32, which is computed in float64."""
    net, x0 = network(device=device, hidden=4), start(device, 4)
    rollout = Rollout(SYSTEM, net, 20)
    flows, size = ("R", "M", "C"), sum(p.numel() for p in net.parameters())
    exact = rotation(rollout, x0, flows, "every", probes=size)
    probed = rotation(rollout, x0, flows, "every", probes=12)
    assert exact["regular"].share < 1e-7 and probed["regular"].share < 1e-7
    for name in ("modified", "combined"):
        assert exact[name].share > 0.02 and exact[name].share_error == 0.0
        assert abs(probed[name].share - exact[name].share) < 3 * probed[name].share_error < 2 * exact[name].share
    single = rotation(Rollout(SYSTEM, net.float(), 20), x0.float(), "M", "every", probes=12)["modified"]
    assert single.share == pytest.approx(probed["modified"].share, rel=1e-3)


def test_errors(device):
    net, x0 = network(device=device), start(device, 3)
    rollout = Rollout(SYSTEM, net, 5)
    with pytest.raises(ValueError, match="flow 'X' is unknown"):
        diagnose(rollout, x0, "X")
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        diagnose(rollout, x0, samples=0)
    with pytest.raises(ValueError, match="loss must be a scalar tensor that depends on the states or the controls"):
        diagnose(rollout, x0, loss=lambda states, controls: states)
    with pytest.raises(ValueError, match="when must be one of 'final', 'every', got 'last'"):
        diagnose(rollout, x0, when="last")
    with pytest.raises(ValueError, match="flow stopped was not diagnosed, there are regular, modified"):
        diagnose(rollout, x0, "R").index(resolve("S"))
    with pytest.raises(ValueError, match="controller must have parameters that require gradients, it has none"):
        rotation(Rollout(SYSTEM, net.requires_grad_(False), 5), x0)
    frozen = diagnose(rollout, x0)
    assert frozen.layers == () and frozen.contributions is None and "R's feedback" in str(frozen)


def test_one_sample_that_overflows_does_not_hide_the_explosion():
    system = Polynomial()
    found = diagnose(Rollout(system, _linear(0.1, system), 5), np.zeros((3, 1)))
    adjoints = np.ones_like(found.adjoints)
    adjoints[found.index(resolve("R")), :5, 0] = np.inf
    why = dataclasses.replace(found, adjoints=adjoints).why
    assert (why.kind, why.path) == ("explodes", "controller") and "R overflows in 1 of 3 samples, M in 0" in why.text
