"""Physical parameters' gradients from the fused sweep, against the general backend and finite differences, float64."""

import numpy as np
import pytest
import torch
import warp as wp

from tests.problems import PROBLEMS
from tests.springs import Springs
from tests.toy import TwoControls
from warp_phys import CartPole, Dense, Flow, Quantum
from warp_phys import Rollout as WarpRollout
from warp_phys.core.arrays import parameter_numbers
from warp_phys.engine import phases
from warp_phys.interop.torch import Rollout, Update
from warp_phys.programs import row_buffers

NN = torch.nn
BATCHES = (1, 7, 64)
FLOWS = ("R", "M", "S", "N", "C")
NAMES = [problem.name for problem in PROBLEMS]


class Policy(NN.Module):
    """A row program: a skip, a normalised layer, a bounded control."""

    def __init__(self, system):
        super().__init__()
        self.first, self.norm = NN.Linear(system.state_size, 6), NN.LayerNorm(6)
        self.last = NN.Linear(6, system.control_size)

    def forward(self, x):
        h = torch.tanh(self.first(x.sin()))
        return 2.0 * torch.tanh(self.last(h + self.norm(h)))


def chain(system):
    return NN.Sequential(NN.Linear(system.state_size, 7), NN.Tanh(), NN.Linear(7, system.control_size))


def make(system, build=chain):
    torch.manual_seed(0)
    return build(system).double()


def start(system, batch, seed=0):
    return torch.as_tensor(system.sample(batch, seed, np.float64))


def values(system, batch, per_sample):
    """Return all parameters near the system's own, as tensors that require gradients."""
    spread = torch.linspace(0.9, 1.1, batch, dtype=torch.float64) if per_sample else torch.tensor(1.1).double()
    return {name: (getattr(system, name) * spread + 0.01).requires_grad_() for name in system.parameter_names}


def refuse(*_arguments):
    raise AssertionError("the general backward pass ran")


def run(rollout, x0, parameters, when="every", cost_too=True):
    """Return the parameters' gradients by name, and the update of the controller."""
    leaves = [*rollout.controller.parameters(), *parameters.values()]
    for leaf in leaves:
        leaf.grad = None
    states, controls = rollout(x0, parameters)
    rollout.system.loss(states, controls, when, 0.1, parameters if cost_too else None).backward()
    update = torch.cat([p.grad.flatten() for p in rollout.controller.parameters()])
    return {**{name: value.grad.clone() for name, value in parameters.items()}, "update": update}


def both(system, module, x0, flow, parameters, steps=6, **options):
    """Return what the fused and the general backend find; in the former no part of the latter may run."""
    found = []
    for backend in ("fused", "general"):
        rollout = Rollout(system, module, steps, flow, backend=backend, **options)
        assert rollout.backend == backend and (rollout.why_general is None) == (backend == "fused")
        with pytest.MonkeyPatch.context() as patch:
            if backend == "fused":
                patch.setattr(phases._Pass, "chunk", refuse)
            found.append(run(rollout, x0, parameters))
    return found


def distance(found, exact):
    """Return the largest difference, relative to the largest component of each."""
    assert found.keys() == exact.keys()
    errors = [(found[name] - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-30) for name in exact]
    return float(max(errors))


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_every_system(problem):
    """One set of parameters and one per sample, all flows, batches of several sizes."""
    system, module = problem.system, make(problem.system)
    for batch in BATCHES:
        # a ramp over the numbers: else quantum's overlap with its target is nearly zero, and its gradient rounding
        x0 = start(system, batch) * torch.linspace(0.5, 1.5, system.state_size, dtype=torch.float64)
        for flow in FLOWS:
            for per_sample in (False, True):
                parameters = values(system, batch, per_sample)
                fused, general = both(system, module, x0, flow, parameters)
                error = distance(fused, general)
                if error >= 1e-12:  # quantum's dt: a sum of terms that cancel, which no order gives to 12 digits
                    shaken = x0 * (1.0 + torch.finfo(x0.dtype).eps * torch.randn_like(x0))
                    again = run(Rollout(system, module, 6, flow, backend="general"), shaken, parameters)
                    assert isinstance(system, Quantum) and error < distance(again, general)


@pytest.mark.parametrize("system", [CartPole(poles=1), TwoControls()], ids=["cart-pole", "two controls"])
@pytest.mark.parametrize("flow", [*FLOWS, "minmod", Flow(0.9, 0.7), Flow(window=5)], ids=str)
def test_row_programs(system, flow):
    module = make(system, Policy)
    for batch in BATCHES:
        for per_sample in (False, True):
            parameters = values(system, batch, per_sample)
            assert distance(*both(system, module, start(system, batch), flow, parameters, steps=21)) < 1e-12


@pytest.mark.parametrize("build", [chain, Policy])
@pytest.mark.parametrize("cost_too", [False, True])
@pytest.mark.parametrize("when", ["final", [0, 3, 9]])
def test_finite_differences(build, cost_too, when):
    """With R they are gradients of the loss, whose cost may depend on parameters itself."""
    system, batch, size = TwoControls(), 3, 1e-4
    rollout = Rollout(system, make(system, build), 9, "R", backend="fused")
    x0, parameters = start(system, batch), values(system, batch, True)
    found = run(rollout, x0, parameters, when, cost_too)
    for name, value in parameters.items():
        for b in range(batch):
            losses = []
            for shift in (-2.0, -1.0, 1.0, 2.0):
                moved = {**parameters, name: value.detach().clone()}
                moved[name][b] += shift * size
                with torch.no_grad():
                    own = moved if cost_too else None
                    losses.append(float(system.loss(*rollout(x0, moved), when, 0.1, own)))
            slope = np.dot(losses, (1.0, -8.0, 8.0, -1.0)) / (12.0 * size)
            assert abs(float(found[name][b]) - slope) < 1e-8 * max(1.0, abs(slope))
            wrong = 1.01 * float(found[name][b])
            assert abs(slope) < 1e-5 or abs(wrong - slope) > 1e-8 * max(1.0, abs(slope))
    assert bool(found["target"].any()) == cost_too


@pytest.fixture
def set_threads():
    """Torch's switch for the number of threads, put back where it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [row_buffers.KEPT_BYTES, 0])
@pytest.mark.parametrize("per_sample", [False, True])
def test_threads_and_activations_that_are_computed_again(limit, per_sample, set_threads, monkeypatch):
    """Any number of threads, kept activations or not: each sample has its own sums, so the bits are the same."""
    monkeypatch.setattr(row_buffers, "KEPT_BYTES", limit)
    system, batch, found = Springs(), 101, []
    module, parameters = make(system), values(system, batch, per_sample)
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        rollout = Rollout(system, module, 21, "C", backend="fused")
        found.append(run(rollout, start(system, batch), parameters))
        assert len(rollout._adapter._network.shares(batch)) == threads
    assert all(torch.equal(again[name], found[0][name]) for again in found for name in parameters)
    general = run(Rollout(system, module, 21, "C", backend="general"), start(system, batch), parameters)
    assert distance(found[0], general) < 1e-12


@pytest.mark.parametrize("flow", ["R", "C"])
def test_masked_samples(flow):
    """A sample whose parameter divides by zero has no say, and spoils nobody's gradient."""
    system, batch, bad = CartPole(poles=1), 13, [2, 9]
    module, results = make(system), []
    good = [b for b in range(batch) if b not in bad]
    for backend in ("fused", "general"):
        mass = torch.linspace(0.9, 1.2, batch, dtype=torch.float64)
        mass[bad] = 5e-324
        parameters = {"total_mass": mass.requires_grad_(), "half_length": torch.tensor(0.6).double().requires_grad_()}
        rollout = Rollout(system, module, 12, flow, backend=backend, on_divergence="mask")
        states, controls = rollout(start(system, batch), parameters)
        assert rollout.report.diverged == () and torch.isfinite(states).all()
        module.zero_grad()
        system.loss(states[:, good], controls[:, good], "every", 0.1).backward()
        assert rollout.report.diverged == tuple(bad)
        assert not mass.grad[bad].any() and mass.grad[good].all()
        results.append({name: value.grad for name, value in parameters.items()})
    assert distance(*results) < 1e-12


def test_some_parameters_and_what_they_are_made_of():
    """Those that are named, through a history; the others are the system's own."""
    system, module = CartPole(poles=1), make(CartPole(poles=1))
    results = []
    for backend in ("fused", "general"):
        log_mass = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        rollout = Rollout(system, module, 12, "C", backend=backend)
        states, controls = rollout(start(system, 8), {"pole_mass": log_mass.exp(), "gravity": 9.0})
        system.loss(states, controls, "every").backward()
        results.append({"log_mass": log_mass.grad})
    assert distance(*results) < 1e-12


@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize("rows", [1, 7])
def test_pure_warp(flow, rows):
    """In pure Warp adjoints stand beside the parameters."""
    system, results = TwoControls(), []
    x0 = wp.array(system.sample(7, dtype=np.float64), device="cpu")
    for backend in ("fused", "general"):
        dense = Dense((4, 6, 2), device="cpu", dtype=np.float64, seed=1)
        given = {"gain": np.linspace(0.5, 1.0, rows), "target": np.full(rows, 0.3)}
        parameters = system.parameter_array(given, "cpu", np.float64, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch, wp.Tape() as tape:
            if backend == "fused":
                patch.setattr(phases._Pass, "chunk", refuse)
            loss = system.loss(*WarpRollout(system, dense, 11, flow, backend=backend)(x0, parameters), "every", 0.1)
            tape.backward(loss)
        results.append({"p": torch.as_tensor(parameter_numbers(parameters).grad.numpy().copy())})
    assert results[0]["p"].shape == (rows, 5) and results[0]["p"].any()
    assert distance(*results) < 1e-12


def by_graph(rollout, x0, parameters, leaves):
    """Return loss and gradients of autograd, by a rollout that has done nothing before."""
    fresh = Rollout(rollout.system, rollout.controller, rollout.steps, rollout.flow, backend="general")
    for leaf in leaves:
        leaf.grad = None
    loss = rollout.system.loss(*fresh(x0, parameters), "every", 0.1, parameters)
    loss.backward()
    return loss.detach(), [leaf.grad.clone() for leaf in leaves], fresh.report


@pytest.mark.parametrize("flow", [*FLOWS, "minmod", Flow(0.9, 0.7)], ids=str)
@pytest.mark.parametrize("build", [chain, Policy])
def test_value_and_grad(flow, build, monkeypatch):
    """Recorded launches, also where numbers have changed; the cost's own dependence on parameters included."""
    system, module = TwoControls(), make(TwoControls(), build)
    rollout = Rollout(system, module, 9, flow, backend="fused")
    for batch, per_sample in ((5, False), (5, True), (1, True), (64, True)):
        x0, parameters = start(system, batch), values(system, batch, per_sample)
        del parameters["coupling"]
        parameters["stiffness"] = 1.3
        parameters["gain"] = parameters["gain"].detach()
        trained = [parameters[name] for name in ("dt", "target")]
        leaves = [*module.parameters(), *trained]
        for _ in range(2):
            loss, expected, report = by_graph(rollout, x0, parameters, leaves)
            with monkeypatch.context() as patch:
                patch.setattr(Rollout, "_value_and_grad_by_graph", refuse)
                found = rollout.value_and_grad(x0, "every", 0.1, parameters)
            torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
            for leaf, exact in zip(leaves, expected, strict=True):
                torch.testing.assert_close(leaf.grad, exact, rtol=1e-10, atol=1e-12 * float(exact.abs().max()))
            torch.testing.assert_close(rollout.report.updates, report.updates, rtol=1e-10, atol=1e-13)
            with torch.no_grad():
                trained[0].mul_(0.9)
                trained[1].add_(0.1)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_value_and_grad_beside_autograd(flow):
    """What a later pass of autograd adds is compared with the sums of both; histories take the way of autograd."""
    system, module, x0 = TwoControls(), make(TwoControls()), start(TwoControls(), 5)
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves, found = [*module.parameters(), gain], []
    for direct in (True, False):
        rollout = Rollout(system, module, 9, flow)
        if direct:
            rollout.value_and_grad(x0, parameters={"gain": gain})
        else:
            by_graph_loss = system.loss(*rollout(x0, {"gain": gain}), parameters={"gain": gain})
            for leaf in leaves:
                leaf.grad = None
            by_graph_loss.backward()
        system.loss(*rollout(2.0 * x0, {"gain": gain})).backward()
        found.append({str(i): leaf.grad.clone() for i, leaf in enumerate(leaves)})
    assert distance(*found) < 1e-12
    rollout.value_and_grad(x0, parameters={"gain": gain.exp()})
    through = gain.grad.clone()
    gain.grad = None
    system.loss(*rollout(x0, {"gain": gain.exp()})).backward()
    assert distance({"": through}, {"": gain.grad}) < 1e-12


def test_value_and_grad_of_masked_samples():
    system, module, x0 = CartPole(poles=1), make(CartPole(poles=1)), start(CartPole(poles=1), 13)
    mass = torch.linspace(0.9, 1.2, 13, dtype=torch.float64)
    mass[4] = 5e-324
    rollout = Rollout(system, module, 12, "R", on_divergence="mask")
    rollout.value_and_grad(x0, "every", 0.0, {"total_mass": mass.requires_grad_()})
    assert rollout.report.diverged == (4,) and mass.grad[4] == 0.0 and torch.isfinite(mass.grad).all()


def test_other_parameters_in_the_next_call():
    """Those that are not named any more are the system's own again."""
    system, x0 = TwoControls(), start(TwoControls(), 4)
    rollout = Rollout(system, make(system), 5, "R")
    for parameters in ({"gain": 2.0}, {"stiffness": 0.3}, {}, {"gain": [0.1, 0.2, 0.3, 0.4]}):
        expected = system.loss(*rollout(x0, parameters), parameters=parameters).detach()
        torch.testing.assert_close(rollout.value_and_grad(x0, parameters=parameters), expected, rtol=1e-12, atol=0)


def test_what_does_not_fit_is_said():
    system = TwoControls()
    rollout, x0 = Rollout(system, make(system), 5, "R"), start(system, 4)
    for parameters, message in (
        ({"mass": 1.0}, "parameters mass are unknown"),
        ({"gain": [1.0, 2.0]}, "parameter gain must be a number or 4 numbers"),
        ({"gain": float("nan")}, "parameter gain must be finite"),
        ({"dt": -0.1}, "parameter dt must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout.value_and_grad(x0, parameters=parameters)
    gain = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([*rollout.controller.parameters(), gain])
    rollout.flow = "averaged"
    with pytest.raises(ValueError, match="physical parameters must have no gradient for the flow 'averaged'.*gain"):
        Update(rollout, optimiser, parameters={"gain": gain})(x0)
    with pytest.raises(ValueError, match="optimiser must hold parameters"):
        Update(rollout, torch.optim.Adam([gain]))


@pytest.mark.parametrize("flow", ["R", "C"])
@pytest.mark.parametrize("frozen", [False, True])
def test_updates_of_physical_parameters(flow, frozen):
    """The optimiser moves them as it does by hand; the controller may be frozen."""
    system, x0, found = TwoControls(), start(TwoControls(), 16).unflatten(0, (2, 8)), []
    for by_hand in (False, True):
        module = make(system).requires_grad_(not frozen)
        gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam(
            [{"params": [gain], "lr": 0.05}, *([] if frozen else [{"params": module.parameters()}])]
        )
        rollout = Rollout(system, module, 9, flow, backend="general" if by_hand else "fused")
        update = Update(rollout, optimiser, "every", 0.1, clip="norm", parameters={"gain": gain})
        losses = []
        for _ in range(4):
            if by_hand:
                for minibatch in x0:
                    losses.append(rollout.value_and_grad(minibatch, "every", 0.1, {"gain": gain}))
                    norm = torch.cat(
                        [p.grad.flatten() for p in (*module.parameters(), gain) if p.grad is not None]
                    ).norm()
                    for p in (*module.parameters(), gain):
                        if p.grad is not None and norm > 1.0:
                            p.grad.div_(norm)
                    optimiser.step()
            else:
                losses += list(update.minibatches(x0))
        found.append({"losses": torch.stack(losses), "gain": gain.detach(), "weight": module[0].weight.detach()})
    assert distance(*found) < 1e-9 and abs(float(found[0]["gain"]) - 0.7) > 0.05
