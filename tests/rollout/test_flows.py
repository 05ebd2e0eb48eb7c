"""Every flow against torch with `detach` in the same places, in float64, for several systems, losses and paths."""

import math

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout import reference
from tests.taylor import check_gradient
from tests.toy import TwoControls
from warp_phys import COMBINED, CartPole, Combined, Dense, Flow, agree, geometric, minmod
from warp_phys.engine import row_kernels
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout
from warp_phys.rollout import Rollout as WarpRollout

STEPS = 12

CASES = [
    (CartPole(poles=1, dt=0.05), "final", 0.0),
    (CartPole(poles=2, dt=0.05), "every", 0.1),
    (CartPole(poles=4, dt=0.05, half_length=0.4), "every", 0.0),
    (CartPole(poles=18, dt=0.05), "final", 0.01),
    (TwoControls(), "final", 0.0),
    (TwoControls(), "every", 0.2),
]
FLOWS = [
    "regular",
    "modified",
    "stopped",
    "controller",
    Flow(0.9, 0.9),
    Flow(1.0, 0.3, window=5),
    Flow(tuple(np.linspace(0.5, 1.2, STEPS)), tuple(np.linspace(1.0, 0.0, STEPS))),
]


def _network(system, kind="dense", hidden=(7, 5)):
    generator = torch.Generator().manual_seed(3)
    sizes = (system.state_size, *hidden, system.control_size)
    layers = []
    for n, m in zip(sizes[:-1], sizes[1:], strict=True):
        linear = torch.nn.Linear(n, m, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(1.5 * torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(n))
            linear.bias.copy_(0.1 * torch.randn(m, generator=generator, dtype=torch.float64))
        layers += [linear, torch.nn.Tanh()]
    network = torch.nn.Sequential(*layers[:-1])
    return network if kind == "dense" else _Wrapped(network)


class _Wrapped(torch.nn.Module):
    """The same function, but no module that the engine can look into."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def _reference(system):
    if isinstance(system, CartPole):
        return reference.cart_pole_step, reference.cart_pole_loss
    return reference.two_controls_step, reference.two_controls_loss


def _by_torch(system, network, x0, gates, when, control_cost):
    """Return loss and gradients (parameters, x0) of the reference."""
    step, loss = _reference(system)
    x0 = x0.clone().requires_grad_()
    states, controls = reference.unroll(lambda x, c: step(system, x, c), network, x0, gates)
    value = loss(states, controls, when, control_cost)
    parameters = list(network.parameters())
    return value.detach(), reference.gradient(value, [*parameters, x0]).split(
        [sum(map(torch.numel, parameters)), x0.numel()]
    )


def _by_engine(rollout, x0, when, control_cost):
    x0 = x0.clone().requires_grad_()
    states, controls = rollout(x0)
    value = rollout.system.loss(states, controls, when, control_cost)
    rollout.controller.zero_grad()
    value.backward()
    return value.detach(), (torch.cat([p.grad.flatten() for p in rollout.controller.parameters()]), x0.grad.flatten())


def _start(system, device):
    return torch.as_tensor(system.sample(5, seed=1, dtype=np.float64), device=device)


@pytest.mark.parametrize("kind", ["dense", "module"])
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: resolve(flow).name)
@pytest.mark.parametrize(("system", "when", "control_cost"), CASES, ids=lambda value: str(value).replace(" ", "")[:20])
def test_flow_equals_torch_with_detach(system, when, control_cost, flow, kind, device):
    network = _network(system, kind).to(device)
    rollout = Rollout(system, network, STEPS, flow)
    x0 = _start(system, device)
    value, (update, adj_x0) = _by_engine(rollout, x0, when, control_cost)
    expected, (right_update, right_x0) = _by_torch(system, network, x0, resolve(flow).gates(STEPS), when, control_cost)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert reference.relative(update, right_update) < 1e-10
    if float(right_x0.norm()):
        assert reference.relative(adj_x0, right_x0) < 1e-10
    else:
        assert float(adj_x0.norm()) == 0.0


def test_the_flows_differ(device):
    """Else the test above would prove nothing."""
    system = CASES[1][0]
    network, x0 = _network(system).to(device), _start(system, device)
    updates = [_by_engine(Rollout(system, network, STEPS, flow), x0, "every", 0.1)[1][0] for flow in FLOWS]
    for i, a in enumerate(updates):
        for b in updates[:i]:
            assert reference.relative(a, b) > 1e-3


@pytest.mark.parametrize(("system", "when", "control_cost"), CASES, ids=lambda value: str(value).replace(" ", "")[:20])
def test_combined_is_the_sign_agreement_of_modified_and_regular(system, when, control_cost, device):
    network, x0 = _network(system).to(device), _start(system, device)
    flows = ["modified", "regular", "combined"]
    base, other, combined = (
        _by_engine(Rollout(system, network, 5 * STEPS, flow), x0, when, control_cost)[1][0] for flow in flows
    )
    torch.testing.assert_close(combined, torch.where(base.sign() == other.sign(), base, 0.0), rtol=1e-12, atol=1e-300)
    assert (combined != 0.0).any()
    if (system, when) == (CASES[1][0], "every"):
        assert (combined == 0.0).any()  # else nothing is combined


def test_a_rule_of_ones_own(device):
    system = CASES[1][0]
    network, x0 = _network(system).to(device), _start(system, device)

    def mean(base, other):
        return (base + other) / 2

    base, other, mixed = (
        _by_engine(Rollout(system, network, STEPS, flow), x0, "every", 0.0)[1][0]
        for flow in ("stopped", "controller", Combined(Flow(0.0, 0.0), Flow(0.0, 1.0), rule=mean))
    )
    torch.testing.assert_close(mixed, (base + other) / 2, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("system", "when", "control_cost"), CASES, ids=lambda value: str(value).replace(" ", "")[:20])
def test_regular_flow_is_the_gradient(system, when, control_cost, device):
    """R by the Taylor test, in the parameters of the controller."""
    network, x0 = _network(system).to(device), _start(system, device)
    rollout = Rollout(system, network, STEPS, "regular")
    gradient = _by_engine(rollout, x0, when, control_cost)[1][0].cpu().numpy()
    start = torch.nn.utils.parameters_to_vector(network.parameters()).detach().cpu().numpy()

    def loss(theta):
        torch.nn.utils.vector_to_parameters(torch.as_tensor(theta, device=device), network.parameters())
        with torch.no_grad():
            return float(system.loss(*rollout(x0), when, control_cost))

    check_gradient(loss, start, gradient, scale=0.005)


@pytest.mark.parametrize("backend", ["fused", "general"])
def test_physical_parameters_of_any_stride(backend, device):
    system = CartPole(poles=2)
    every = system.parameter_array({"pole_mass": np.linspace(0.05, 0.5, 10)}, device, np.float64)
    alone = system.parameter_array({"pole_mass": np.linspace(0.05, 0.5, 10)[::2]}, device, np.float64)
    dense = Dense((6, 8, 1), device=device, dtype=np.float64)
    x0 = wp.array(system.sample(5, seed=0, dtype=np.float64), device=device)
    rollout = WarpRollout(system, dense, 10, "R", backend=backend)
    states = [rollout(x0, parameters)[0].numpy() for parameters in (every[::2], alone)]
    np.testing.assert_allclose(*states, rtol=1e-13)


def test_one_step_horizon(device):
    """With one step no feedback travels through time: all flows give the same update."""
    system = CASES[1][0]
    network, x0 = _network(system).to(device), _start(system, device)
    updates = [_by_engine(Rollout(system, network, 1, flow), x0, "final", 0.0)[1][0] for flow in "RMSNC"]
    for update in updates[1:]:
        torch.testing.assert_close(update, updates[0], rtol=1e-12, atol=0.0)


def test_named_flows():
    assert resolve("C") is COMBINED and resolve("combined") is COMBINED
    assert [resolve(letter).letter for letter in "RMSNC"] == list("RMSNC")
    assert [resolve(letter).name for letter in "RMSNC"] == ["regular", "modified", "stopped", "controller", "combined"]
    base = np.array([1.0, -2.0, 3.0, 0.0, -1.0, 2.0])
    other = np.array([2.0, 1.0, 5.0, 1.0, -3.0, 0.0])
    expected = np.array([1.0, 0.0, 3.0, 0.0, -1.0, 0.0])
    np.testing.assert_array_equal(agree(base, other), expected)
    np.testing.assert_array_equal(agree(torch.tensor(base), torch.tensor(other)).numpy(), expected)


@pytest.mark.parametrize("rule", [agree, geometric, minmod])
def test_rules(rule):
    """Zero where the signs differ, the sign of both elsewhere; between the two in size, without overflow."""
    generator = np.random.default_rng(0)
    base, other = (generator.standard_normal(1000) * 10.0 ** generator.uniform(-30, 30, 1000) for _ in range(2))
    result = rule(base, other)
    same = np.sign(base) == np.sign(other)
    assert 400 < same.sum() < 600 and not result[~same].any()
    np.testing.assert_array_equal(np.sign(result[same]), np.sign(base[same]))
    low, high = np.sort(np.abs([base, other]), axis=0)
    sizes = {"agree": np.abs(base), "geometric": np.sqrt(low) * np.sqrt(high), "minmod": low}[rule.__name__]
    np.testing.assert_allclose(np.abs(result[same]), sizes[same], rtol=1e-12)
    np.testing.assert_allclose(rule(torch.tensor(base), torch.tensor(other)).numpy(), result, rtol=1e-12)
    in_float32 = rule(torch.tensor(base).float(), torch.tensor(other).float())
    assert in_float32.dtype == torch.float32
    np.testing.assert_allclose(in_float32.numpy(), result, rtol=1e-5)
    assert np.isnan(rule(np.array([np.nan, 1.0]), np.array([1.0, np.nan]))).all()
    with pytest.raises(ValueError, match="must have one shape"):
        rule(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("name", ["geometric", "minmod"])
def test_other_rules_by_name(name, device):
    system = CASES[1][0]
    network, x0 = _network(system).to(device), _start(system, device)
    base, other, got = (
        _by_engine(Rollout(system, network, 5 * STEPS, flow), x0, "every", 0.1)[1][0] for flow in ("M", "R", name)
    )
    torch.testing.assert_close(got, resolve(name).rule(base, other), rtol=1e-12, atol=1e-300)
    assert (got != base).any() and resolve(name).name == name and resolve(name).letter == ""


@pytest.mark.parametrize("rule", [agree, geometric, minmod])
def test_the_kernel_of_a_rule(rule, device):
    """What one pass adds, and what passes add whose sums count."""
    generator = np.random.default_rng(0)
    new, sums = generator.normal(size=(2, 2, 3, 40))
    new[:, 0, :5], sums[:, 0, 3:8] = 0.0, 0.0
    arrays = [wp.array(a, dtype=wp.float64, device=device) for a in (*new, *sums, np.ones((3, 40)))]
    wp.launch(row_kernels.combine_kernel(rule, wp.float64, True), dim=(3, 40), inputs=arrays, device=device)
    change = rule(*(sums + new)) - rule(*sums)
    np.testing.assert_allclose(arrays[4].numpy(), 1.0 + change, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(np.stack([a.numpy() for a in arrays[2:4]]), sums + new, rtol=1e-15)
    assert (change != 0.0).any() and (rule(*sums) == 0.0).any()


@pytest.mark.parametrize("rule", [agree, geometric, minmod])
def test_a_nan_stays_a_nan(rule, device):
    """In numpy, in torch, and in the kernel of the pure-Warp path: an exploded R must not look like a quiet C."""
    nan, inf = np.nan, np.inf
    base = np.array([[1.0, nan, nan, 2.0, -inf, inf, 3.0]])
    other = np.array([[nan, 1.0, nan, inf, -1.0, -inf, -inf]])
    fourth, fifth = {agree: (2.0, -inf), geometric: (inf, -inf), minmod: (2.0, -1.0)}[rule]
    expected = np.array([[nan, nan, nan, fourth, fifth, nan, 0.0]])
    with np.errstate(invalid="ignore"):  # numpy warns of inf − inf
        np.testing.assert_array_equal(rule(base, other), expected)
    np.testing.assert_array_equal(rule(torch.tensor(base), torch.tensor(other)).numpy(), expected)
    arrays = [wp.array(a, dtype=wp.float64, device=device) for a in (base, other)]
    zeros = [wp.zeros((1, 7), dtype=wp.float64, device=device) for _ in range(3)]
    kernel = row_kernels.combine_kernel(rule, wp.float64, False)
    wp.launch(kernel, dim=(1, 7), inputs=[*arrays, *zeros], device=device)
    np.testing.assert_array_equal(zeros[2].numpy(), expected)
