"""`Rollout.value_and_grad` against `loss.backward()`: the same numbers, and memory that it keeps without harm."""

import numpy as np
import pytest
import torch

from tests.springs import Springs
from tests.toy import TwoControls
from warp_phys import STOPPED, CartPole, Combined, Diverged, Flow, Polynomial, Quantum, Repulsion
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch import rollout as bridge
from warp_phys.systems.losses import chosen_array

NN = torch.nn
STEPS = 12
SYSTEM = Springs(size=5, pushes=2)
SYSTEMS = [
    SYSTEM,
    TwoControls(),
    Polynomial(dt=0.1),
    CartPole(poles=1),
    Quantum(points=3, target=1),
    Repulsion(drivers=1, evaders=1),
]


def network(system=SYSTEM, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return NN.Sequential(NN.Linear(system.state_size, 7), NN.Tanh(), NN.Linear(7, system.control_size)).to(dtype)


def start(batch=5, seed=0, system=SYSTEM):
    return torch.as_tensor(system.sample(batch, seed, np.float64))


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def by_graph(rollout, x0, *loss, **options):
    """Return loss and gradients of autograd, from cleared gradients, by a rollout that has done nothing before."""
    fresh = Rollout(
        rollout.system, rollout.controller, rollout.steps, rollout.flow, on_divergence=rollout.on_divergence
    )
    fresh.observe, fresh.reduce = rollout.observe, rollout.reduce
    rollout.controller.zero_grad()
    value = rollout.system.loss(*fresh(x0), *loss, **options)
    value.backward()
    return value.detach(), gradients(rollout.controller), fresh.report


def check(rollout, x0, *loss, **options):
    """Hold a call against autograd: loss, gradients and report."""
    value, expected, report = by_graph(rollout, x0, *loss, **options)
    got = rollout.value_and_grad(x0, *loss, **options)
    assert got.shape == () and not got.requires_grad
    torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)
    for grad, exact in zip(gradients(rollout.controller), expected, strict=True):
        assert (grad is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12 * float(exact.abs().max()))
    assert rollout.report.flows == report.flows and rollout.report.diverged == report.diverged
    torch.testing.assert_close(rollout.report.updates, report.updates, rtol=1e-10, atol=1e-13)
    assert rollout.report.norm == pytest.approx(report.norm, rel=1e-10)
    return got


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)
def test_every_system(system):
    rollout = Rollout(system, network(system), STEPS, "C")
    for batch, when, control_cost in ((5, "final", 0.0), (8, "every", 0.3), (1, [0, 4, 7], 0.0)):
        check(rollout, start(batch, system=system), when, control_cost=control_cost)


@pytest.mark.parametrize("flow", ["R", "M", "S", "N", "C", "minmod", Flow(0.9, 0.7), Flow(window=5)], ids=str)
def test_every_flow(flow):
    rollout = Rollout(SYSTEM, network(), STEPS, flow)
    check(rollout, start())
    rollout.observe = ("M", "R", Flow(0.5, 0.5))
    check(rollout, start())
    assert rollout.report.cosine == rollout.report.cosine


@pytest.mark.parametrize("observe", [(), ("M", "R")])
def test_a_flow_combined_with_itself(observe):
    rollout = Rollout(SYSTEM, network(), STEPS, Combined(STOPPED, STOPPED, rule=lambda a, b: a + 2.0 * b))
    rollout.observe = observe
    check(rollout, start())


def test_what_changes_between_calls():
    """Flow, horizon, batch, loss, weights, layers: each call is that of a rollout that has done nothing before."""
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    x0 = start()
    check(rollout, x0)
    rollout.flow = "R"
    check(rollout, x0)
    rollout.steps = 20
    check(rollout, x0)
    check(rollout, start(13, seed=1))
    check(rollout, x0, "every", 0.2)
    check(rollout, x0, "every", 0.4)
    with torch.no_grad():
        module[0].weight.mul_(-1.5)
    check(rollout, x0)
    module[0].bias.data = module[0].bias.data + 0.3
    check(rollout, x0)
    module[2].weight = NN.Parameter(2.0 * module[2].weight.detach())
    check(rollout, x0)
    module.load_state_dict({name: 0.7 * value for name, value in module.state_dict().items()}, assign=True)
    check(rollout, x0)
    module[1] = NN.ELU()
    check(rollout, x0)
    module[1].alpha = 0.5  # now the general backend
    check(rollout, x0)
    module[1] = NN.Tanh()
    handle = module[1].register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    check(rollout, x0)
    handle.remove()
    check(rollout, x0)


def test_a_weight_in_another_order():
    """The same address, shape and type, other strides."""
    module = NN.Sequential(NN.Linear(5, 5), NN.Tanh(), NN.Linear(5, 2)).double()
    rollout = Rollout(SYSTEM, module, STEPS, "R")
    check(rollout, start())
    module[0].weight.data = module[0].weight.data.T
    check(rollout, start())


def test_more_kinds_of_calls_than_memory_is_kept_for():
    rollout = Rollout(SYSTEM, network(), STEPS, "C")
    for seed in range(2):
        for batch in range(1, bridge.DIRECT_PASSES + 3):
            check(rollout, start(batch, seed))
    assert len(rollout._direct) == bridge.DIRECT_PASSES


def test_more_chosen_times_than_are_kept():
    """A recorded launch goes on reading the times that it was recorded with."""
    rollout = Rollout(SYSTEM, network(), STEPS, "R")
    expected = float(rollout.value_and_grad(start(), [2, 5]))
    for i in range(200):
        chosen_array((i % 60, i + 100), "cpu")
    assert float(rollout.value_and_grad(start(), [2, 5])) == expected


def test_parameters_that_are_frozen_and_thawed():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    check(rollout, start())
    module[0].requires_grad_(False)
    rollout.value_and_grad(start())
    assert [p.grad is None for p in module.parameters()] == [True, True, False, False]  # nothing old is left there
    check(rollout, start())
    module[0].bias.requires_grad_(True)
    module[2].weight.requires_grad_(False)
    check(rollout, start())
    module.requires_grad_(True)
    check(rollout, start())


def test_nothing_to_train():
    module = network().requires_grad_(False)
    value = Rollout(SYSTEM, module, STEPS, "C").value_and_grad(start())
    general = Rollout(SYSTEM, module, STEPS, "C", backend="general").value_and_grad(start())
    assert float(value) == pytest.approx(float(general), rel=1e-12) and module[0].weight.grad is None


@pytest.mark.parametrize("clear", ["none", "zero", "assign", "clip"])
def test_what_happens_to_gradients_in_between(clear):
    """What they hold is replaced, whatever was done to them."""
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    rollout.value_and_grad(start())
    if clear in ("none", "zero"):
        module.zero_grad(set_to_none=clear == "none")
    elif clear == "assign":
        for p in module.parameters():
            p.grad = torch.full_like(p, 7.0)
    else:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    _, expected, _ = by_graph(rollout, start(seed=1))
    rollout.value_and_grad(start(seed=1))
    rollout.value_and_grad(start(seed=1))  # no sum of both
    for grad, exact in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-13)


def test_autograd_adds_to_what_a_call_left():
    """A later backward pass adds its own update: M and R of the call before are not part of its sums."""
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    _, a, _ = by_graph(rollout, start(seed=0))
    _, b, _ = by_graph(rollout, start(seed=1))
    for _ in range(2):
        rollout.value_and_grad(start(seed=0))
        SYSTEM.loss(*rollout(start(seed=1))).backward()
        for grad, one, other in zip(gradients(module), a, b, strict=True):
            torch.testing.assert_close(grad, one + other, rtol=1e-10, atol=1e-13)


def test_an_earlier_report_stays_what_it_was():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    rollout.value_and_grad(start())
    report, now = rollout.report, rollout.report.updates.clone()
    norm = float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    rollout.value_and_grad(start(seed=1))
    assert report is not rollout.report and torch.equal(report.updates, now)
    assert report.norm == pytest.approx(norm, rel=1e-12)  # read only now


def test_the_optimiser_sees_the_update():
    """A few steps of Adam with clipping, with and without the graph: the same weights."""
    weights = []
    for direct in (True, False):
        module = network()
        rollout, optimiser = Rollout(SYSTEM, module, STEPS, "C"), torch.optim.Adam(module.parameters(), 1e-2)
        for seed in range(5):
            if direct:
                rollout.value_and_grad(start(8, seed), "every", 0.1)
            else:
                optimiser.zero_grad()
                SYSTEM.loss(*rollout(start(8, seed)), "every", 0.1).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            optimiser.step()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


def test_the_same_bits_again():
    module = network(dtype=torch.float32)
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    first = rollout.value_and_grad(start().float()), *gradients(module)
    rollout.value_and_grad(start(seed=1).float())
    again = rollout.value_and_grad(start().float()), *gradients(module)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_reduction_comes_before_the_comparison():
    rollout = Rollout(SYSTEM, network(), STEPS, "C", reduce=lambda sums: sums.add_(sums.flip(1)))
    check(rollout, start())


def test_samples_that_diverge():
    module = network()
    x0 = start(13)
    x0[[2, 9], 1] = 1e3
    with pytest.raises(Diverged) as direct:
        Rollout(SYSTEM, module, STEPS, "C").value_and_grad(x0)
    with pytest.raises(Diverged) as graph:
        Rollout(SYSTEM, module, STEPS, "C")(x0)
    assert list(direct.value.samples) == list(graph.value.samples) == [2, 9]
    assert direct.value.step == graph.value.step
    rollout = Rollout(SYSTEM, module, STEPS, "C", on_divergence="mask")
    check(rollout, x0)
    assert rollout.report.diverged == (2, 9)
    check(rollout, start(13, seed=1))  # nothing of it is left
    assert rollout.report.diverged == ()


def test_a_large_finite_trajectory():
    """The sum of all states overflows where none of them does."""
    x0 = torch.full((5, 1), 1e308, dtype=torch.float64)
    system, module = Polynomial(dt=0.1), network(Polynomial(dt=0.1))
    value = Rollout(system, module, 1, "R").value_and_grad(x0)
    assert torch.isinf(value)  # the square, not a state


def test_initial_states_and_their_errors():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    x0 = start().requires_grad_()
    rollout.value_and_grad(x0)
    general = Rollout(SYSTEM, module, STEPS, "C", backend="general")
    general.value_and_grad(x0)
    assert x0.grad is None
    before = x0.detach().clone()
    rollout.value_and_grad(SYSTEM.sample(5))  # numpy, of another precision
    assert torch.equal(x0.detach(), before)
    loss = rollout.value_and_grad(x0)
    backwards = x0.detach().numpy()[::-1].copy()[::-1]
    for same in (backwards, backwards.astype(">f8"), backwards.astype(np.longdouble), backwards.tolist()):
        assert rollout.value_and_grad(same) == loss
    for wrong, error in (
        (x0[:, :3], ValueError),
        (x0.float(), TypeError),
        (np.nan * x0.detach(), ValueError),
        ([[1.0, 2.0], [3.0]], ValueError),
        (np.zeros((5, SYSTEM.state_size), int), TypeError),
    ):
        with pytest.raises(error, match="x0 must"):
            rollout.value_and_grad(wrong)
    for when in ("first", [STEPS + 1], []):
        with pytest.raises(ValueError, match="when must be"):
            rollout.value_and_grad(x0, when)
    for when in (5, None, [1.7]):
        with pytest.raises(TypeError, match="when must be"):
            rollout.value_and_grad(x0, when)
    with pytest.raises(ValueError, match="control_cost must be a number of at least 0, got nan"):
        rollout.value_and_grad(x0, control_cost=float("nan"))
    module.float()
    with pytest.raises(ValueError, match="controller is now torch.float32"):
        rollout.value_and_grad(start())


def test_no_grad_around_a_call():
    module = network()
    for backend in ("fused", "general"):
        rollout = Rollout(SYSTEM, module, STEPS, "C", backend=backend)
        module.zero_grad()
        with torch.no_grad():
            rollout.value_and_grad(start())
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_weight_of_the_controls_may_have_a_gradient(value):
    system = CartPole(poles=1)
    states, controls = torch.zeros(4, 2, system.state_size), torch.full((3, 2, 1), 2.0)
    weight = torch.tensor(value, requires_grad=True)
    system.loss(states, controls, control_cost=weight).backward()
    assert float(weight.grad) == 4.0
    with pytest.raises(ValueError, match="control_cost needs the controls"):
        system.loss(states, control_cost=weight)


@pytest.mark.parametrize("weight", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_libraries_as_weights_of_the_controls(weight):
    results = []
    for control_cost in (0.5, weight):
        module = network()
        results.append((Rollout(SYSTEM, module, STEPS).value_and_grad(start(), iter([3, 5]), control_cost), module))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0].weight.grad, results[1][1][0].weight.grad)
