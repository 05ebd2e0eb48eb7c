"""`Update` against `value_and_grad`, clipping and torch's optimiser one after the other: the same weights."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.springs import Springs
from warp_phys import CartPole, Combined, Diverged, Flow, Quantum, Repulsion
from warp_phys.flow import geometric
from warp_phys.interop.torch import Rollout, Update
from warp_phys.interop.torch.optimiser import clip_gradients, gradients_of

NN = torch.nn
STEPS = 12
SYSTEM = Springs(size=5, pushes=2)


def network(system=SYSTEM, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return NN.Sequential(NN.Linear(system.state_size, 19), NN.Tanh(), NN.Linear(19, system.control_size)).to(dtype)


def start(batch=5, seed=0, system=SYSTEM, dtype=np.float64):
    return torch.as_tensor(system.sample(batch, seed, dtype))


def adam(module, kind=torch.optim.Adam, **options):
    return kind(module.parameters(), **{"lr": 0.01, **options})


class Twin:
    """A copy of rollout and optimiser that takes the steps one after the other."""

    def __init__(self, update, rule=None):
        rollout, optimiser = update.rollout, update.optimiser
        self.update, self.module = update, copy.deepcopy(rollout.controller)
        self.rollout = Rollout(rollout.system, self.module, rollout.steps, rollout.flow, backend="general")
        self.rollout.on_divergence, self.rollout.observe = rollout.on_divergence, rollout.observe
        own = dict(zip(rollout.controller.parameters(), self.module.parameters(), strict=True))
        groups = [
            {**group, "params": [own[p] for p in group["params"]], "foreach": True, "fused": False}
            for group in optimiser.param_groups
        ]
        self.optimiser = type(optimiser)(groups)
        self.optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        for group in self.optimiser.param_groups:
            group["foreach"], group["fused"] = False, False

    def step(self, x0):
        update = self.update
        self.rollout.steps, self.rollout.flow = update.rollout.steps, update.rollout.flow
        self.optimiser.zero_grad()
        loss = self.rollout.system.loss(*self.rollout(x0), when=update.when, control_cost=update.control_cost)
        loss.backward()
        self.norm = self.rollout.report.norm
        clip_gradients(gradients_of(self.module.parameters()), update.clip, update.clip_at)
        self.optimiser.step()
        return loss.detach()


def check(update, twin, x0, recorded=True, tolerance=1e-9):
    """Take the same step twice: loss, weights, gradients, report and the optimiser's state."""
    loss, expected = update(x0), twin.step(x0)
    assert update.is_recorded == recorded
    assert loss.shape == () and not loss.requires_grad

    def close(own, exact):
        torch.testing.assert_close(own, exact, rtol=tolerance, atol=tolerance * float(exact.detach().abs().max()))

    close(loss, expected)
    pairs = list(zip(update.rollout.controller.parameters(), twin.module.parameters(), strict=True))
    for own, other in pairs:
        close(own, other)
        if not own.requires_grad:
            assert own.grad is None
            continue
        close(own.grad, other.grad)
        state, exact = update.optimiser.state[own], twin.optimiser.state[other]
        assert state.keys() == exact.keys()
        for name in state:
            close(state[name], exact[name])
    assert update.rollout.report.norm == pytest.approx(twin.norm, rel=1e-3 if tolerance > 1e-6 else tolerance)
    return loss


def steps(update, count=5, batch=5, **options):
    """Hold several steps, the first one too, against those of a twin."""
    twin = Twin(update)
    for i in range(count):
        check(update, twin, start(batch, seed=i), **options)
    return twin


@pytest.mark.parametrize("flow", ["R", "M", "S", "C", "geometric", "minmod", Flow(0.9, 0.7)], ids=str)
def test_every_flow(flow):
    module = network()
    steps(Update(Rollout(SYSTEM, module, STEPS, flow), adam(module)))


@pytest.mark.parametrize(
    ("clip", "limit"), [("value", 1e-3), ("norm", 1e-2), ("value", 1e6), ("norm", 1e6), ("none", 1.0)]
)
@pytest.mark.parametrize("flow", ["R", "C"])
def test_clipping(flow, clip, limit):
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, flow), adam(module), "every", 0.3, clip, limit)
    steps(update)
    grad = torch.cat([p.grad.flatten() for p in module.parameters()])
    size = float(grad.abs().max() if clip == "value" else grad.norm())
    assert clip == "none" or (size == pytest.approx(limit) if limit < 1.0 else size < limit)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_one_graph(flow):
    """All launches of an update as a graph of Warp's, with numbers that change, and one more after its capture."""
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, flow), adam(module), "every", 0.3, "norm", 1e-2, graph=True)
    twin = steps(update, 4)
    (end,) = update._ends.values()
    assert end.graph is not None
    twin.optimiser.param_groups[0]["lr"] = update.optimiser.param_groups[0]["lr"] = 0.05
    check(update, twin, start(seed=9))
    update.rollout.steps = 5
    check(update, twin, start(seed=9))
    assert len(update._ends) == 2


def test_a_graph_of_a_trajectory_that_diverges():
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module), graph=True)
    update(start()), update(start())
    with torch.no_grad():
        module[2].weight.mul_(1e308)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(Diverged):
        update(start())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [True, False])
def test_optimisers(kind, fused):
    module = network()
    optimiser = adam(module, kind, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=fused)
    steps(Update(Rollout(SYSTEM, module, STEPS, "C"), optimiser))


@pytest.mark.parametrize("system", [CartPole(poles=2), Repulsion(drivers=1, evaders=2), Quantum(points=4, target=1)])
def test_systems_in_float32(system):
    module = network(system, torch.float32)
    update = Update(Rollout(system, module, STEPS, "M"), adam(module, eps=1e-3), "every", 0.1)
    twin = Twin(update)
    for i in range(4):
        check(update, twin, start(9, i, system, np.float32), tolerance=2e-5)


def test_groups_rates_and_schedulers():
    """Every number of the optimiser is read at every step, and a scheduler does not complain."""
    module = network()
    groups = [{"params": module[0].parameters(), "lr": 0.02}, {"params": module[2].parameters(), "weight_decay": 0.2}]
    optimiser = torch.optim.AdamW(groups, lr=0.01)
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), optimiser)
    twin = steps(update, 2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    for i in range(3):
        for own, other in zip(optimiser.param_groups, twin.optimiser.param_groups, strict=True):
            other["lr"] = own["lr"]
        check(update, twin, start(seed=i))
        scheduler.step()
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.02 / 8)
    optimiser.param_groups[1]["betas"] = twin.optimiser.param_groups[1]["betas"] = (0.5, 0.6)
    for own, other in zip(optimiser.param_groups, twin.optimiser.param_groups, strict=True):
        other["lr"] = own["lr"]
    check(update, twin, start())


def test_what_changes_between_calls():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    update = Update(rollout, adam(module))
    twin = steps(update, 3)
    rollout.flow = "R"
    check(update, twin, start())
    rollout.flow, rollout.steps = "geometric", 7
    check(update, twin, start(3))
    rollout.observe = ("M", "R", "N")
    check(update, twin, start(11))
    assert len(rollout.report.norms) == 3
    with torch.no_grad():
        for own, other in zip(module.parameters(), twin.module.parameters(), strict=True):
            own.mul_(0.9), other.mul_(0.9)
    check(update, twin, start())
    update.optimiser.load_state_dict(copy.deepcopy(update.optimiser.state_dict()))  # other memory
    check(update, twin, start())
    update.optimiser.state[module[0].weight]["exp_avg"].zero_()
    twin.optimiser.state[twin.module[0].weight]["exp_avg"].zero_()
    check(update, twin, start())


def test_steps_of_ones_own_in_between():
    """The sums of M and R that autograd's passes add to must not survive an update."""
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    update = Update(rollout, adam(module))
    twin = steps(update, 3)
    for run in (update.rollout, twin.rollout):
        run.controller.zero_grad()
        SYSTEM.loss(*run(start(seed=7))).backward()
    check(update, twin, start())
    before = [p.grad.clone() for p in module.parameters()]
    SYSTEM.loss(*rollout(start(seed=7))).backward()  # adds to what the update left
    added = [p.grad - b for p, b in zip(module.parameters(), before, strict=True)]
    module.zero_grad()
    SYSTEM.loss(*rollout(start(seed=7))).backward()
    for p, change in zip(module.parameters(), added, strict=True):
        torch.testing.assert_close(p.grad, change, rtol=1e-9, atol=1e-12)


def test_torch_notices_that_weights_have_changed():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    update = Update(rollout, adam(module))
    update(start())
    loss = SYSTEM.loss(*rollout(start()))
    update(start())
    assert update.is_recorded
    with pytest.raises(RuntimeError, match="a parameter of the controller has been modified in place"):
        loss.backward()


def test_reports_are_kept():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    update = Update(rollout, adam(module), clip="value", clip_at=1e-9)
    update(start())
    update(start(seed=1))
    report = rollout.report
    updates, changes = report.updates.clone(), report.changes[0].clone()
    update(start(seed=2))
    assert torch.equal(report.updates, updates) and torch.equal(report.changes[0], changes)
    assert not torch.equal(rollout.report.updates, updates)
    assert rollout.report.norm > 1e-3  # before clipping


@pytest.mark.parametrize(
    "change",
    [
        lambda update, module: setattr(update.rollout, "flow", Combined(rule=lambda m, r: 0.5 * (m + r))),
        lambda update, module: setattr(update.rollout, "reduce", lambda updates: updates.mul_(1.0)),
        lambda update, module: setattr(update, "optimiser", torch.optim.SGD(module.parameters(), lr=0.1)),
        lambda update, module: setattr(update, "optimiser", adam(module, amsgrad=True)),
        lambda update, module: setattr(update, "optimiser", adam(module, maximize=True)),
        lambda update, module: setattr(update, "optimiser", torch.optim.Adam(module[0].parameters())),
        lambda update, module: setattr(update, "optimiser", torch.optim.Adam([*module.parameters(), spare()])),
        lambda update, module: update.optimiser.register_step_post_hook(lambda *_: None),
        lambda update, module: module[1].register_forward_hook(lambda _module, _inputs, output: 0.5 * output),
        lambda update, module: setattr(update.optimiser, "step", update.optimiser.step),
    ],
    ids=["rule", "reduce", "SGD", "amsgrad", "maximize", "some", "more", "hook", "module", "wrapped"],
)
def test_what_is_not_recorded(change):
    """Anything beyond the plain case goes step by step, with the numbers that it would have."""
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    update = Update(rollout, adam(module))
    update(start()), update(start())
    assert update.is_recorded
    change(update, module)
    for _ in range(2):
        twin = copy.deepcopy(module)
        by_hand = Rollout(SYSTEM, twin, STEPS, rollout.flow)
        loss = update(start(seed=3))
        assert not update.is_recorded
        torch.testing.assert_close(loss, by_hand.value_and_grad(start(seed=3)), rtol=1e-10, atol=1e-13)
        for own, other in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-8, atol=1e-12)
        assert any(
            not torch.equal(own, other) for own, other in zip(module.parameters(), twin.parameters(), strict=True)
        )


def spare():
    return NN.Parameter(torch.ones(3, dtype=torch.float64))


def test_frozen_parameters():
    module = network()
    module[0].bias.requires_grad_(False)
    bias = module[0].bias.clone()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module))
    for i in range(3):
        update(start(seed=i))
    assert update.is_recorded and torch.equal(module[0].bias, bias) and module[0].bias.grad is None


@pytest.mark.parametrize("recorded", [False, True])
def test_a_trajectory_that_diverges_changes_nothing(recorded):
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module))
    for _ in range(2 * recorded):
        update(start())
    before, state = copy.deepcopy(module.state_dict()), copy.deepcopy(update.optimiser.state_dict())
    with torch.no_grad():
        module[2].weight.mul_(1e308)
    huge = module[2].weight.clone()
    with pytest.raises(Diverged):
        update(start())
    assert torch.equal(module[2].weight, huge) and torch.equal(module[0].weight, before["0.weight"])
    for key, own in update.optimiser.state_dict()["state"].items():
        kept = state["state"][key] if recorded else {name: torch.zeros_like(own[name]) for name in own}
        assert all(torch.equal(own[name], kept[name]) for name in own)


def test_samples_that_diverge_can_be_masked():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C", on_divergence="mask")
    update = Update(rollout, adam(module))
    twin = steps(update, 2)
    x0 = start()
    x0[1] = 1e308
    check(update, twin, x0, recorded=False)
    assert rollout.report.diverged == (1,)
    check(update, twin, start())


def test_a_batch_in_several_threads():
    threads = torch.get_num_threads()
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module))
    try:
        torch.set_num_threads(2)
        steps(update, 3, batch=80)
    finally:
        torch.set_num_threads(threads)


def test_the_same_bits_every_time():
    def train():
        module = network(dtype=torch.float32)
        update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module), clip="norm")
        losses = [update(start(seed=i, dtype=np.float32)) for i in range(6)]
        return torch.stack(losses), *module.parameters()

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rollout": 3}, TypeError, "rollout must be of type Rollout, got int"),
        ({"optimiser": "adam"}, TypeError, "optimiser must be of type Optimizer, got str"),
        ({"when": "sometimes"}, ValueError, "when"),
        ({"when": [99]}, ValueError, "99"),
        ({"clip": "both"}, ValueError, "clip"),
        ({"clip_at": 0.0}, ValueError, "clip_at must be a positive number, got 0.0"),
        ({"clip_at": float("nan")}, ValueError, "clip_at"),
        ({"clip_at": None}, TypeError, "clip_at must be a positive number, got None"),
        ({"clip_at": True}, TypeError, "clip_at must be a positive number, got True"),
        ({"control_cost": float("nan")}, ValueError, "control_cost must be a number of at least 0, got nan"),
        ({"control_cost": "x"}, TypeError, "control_cost must be a number of at least 0, got 'x'"),
        ({"when": [1.7]}, TypeError, "when must be 'final', 'every' or distinct steps from 0 to 12"),
        ({"when": None}, TypeError, "when must be 'final', 'every' or distinct steps from 0 to 12, got None"),
        (
            {"optimiser": torch.optim.LBFGS(network().parameters())},
            TypeError,
            "optimiser must take a step without a closure, LBFGS needs one",
        ),
        ({"optimiser": adam(network())}, ValueError, "optimiser must hold parameters of the rollout's controller"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    module = network()
    good = {"rollout": Rollout(SYSTEM, module, STEPS, "C"), "optimiser": adam(module)}
    with pytest.raises(error, match=message):
        Update(**{**good, **arguments})


class Verbs:
    """The two verbs of a simulator, and nothing else."""

    def __init__(self, system):
        self.state_size, self.control_size = system.state_size, system.control_size

    def step(self, *_):
        raise AssertionError("nothing shall run")

    step_vjp = step


def test_simulators_without_a_loss():
    module = network()
    rollout = Rollout(Verbs(SYSTEM), module, STEPS, "C")
    for call in (lambda: Update(rollout, adam(module)), lambda: rollout.value_and_grad(start())):
        with pytest.raises(TypeError, match="system must have a loss, Verbs has none"):
            call()


def test_an_optimiser_of_some_parameters_and_of_others():
    module, other = network(), NN.Linear(2, 2)
    parts = torch.optim.SGD([module[0].weight, *other.parameters()], lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    Update(Rollout(SYSTEM, module, STEPS, "C"), parts, clip="norm", clip_at=np.float32(1.0))(start())
    assert [torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)] == [False, True, True, True]


def test_what_is_said_once():
    """Loss and clipping stand in recorded launches."""
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module), [3, 5], 0.5, "norm", 0.1)
    assert (update.when, update.control_cost, update.clip, update.clip_at) == ((3, 5), 0.5, "norm", 0.1)
    for name in ("when", "control_cost", "clip", "clip_at"):
        with pytest.raises(AttributeError):
            setattr(update, name, getattr(update, name))


def test_copies_and_pickles():
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module), "every", 0.1, "norm", 0.5)
    update(start())
    copied, pickled = copy.deepcopy(update), pickle.loads(pickle.dumps(update))
    expected = update(start(seed=1))
    for other in (copied, pickled):
        assert other.rollout.controller is not module
        torch.testing.assert_close(other(start(seed=1)), expected, rtol=1e-13, atol=0.0)
        assert other.is_recorded
        for own, exact in zip(other.rollout.controller.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(own, exact, rtol=1e-13, atol=1e-15)


def test_inference_mode_is_refused():
    module = network()
    rollout = Rollout(SYSTEM, module, STEPS, "C")
    update = Update(rollout, adam(module))
    with torch.inference_mode():
        for call in (update, rollout.value_and_grad):
            with pytest.raises(RuntimeError, match="does not run in torch.inference_mode"):
                call(start())
    with torch.no_grad():
        update(start())
    update(start())
    assert update.is_recorded


def test_an_older_torchs_optimiser():
    """Its groups of parameters do not say whether their weight decay is decoupled."""
    steps_ = []
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        for drop in (False, True):
            module = network()
            update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module, kind, weight_decay=0.5))
            if drop:
                del update.optimiser.param_groups[0]["decoupled_weight_decay"]
            update(start())
            assert update.is_recorded
            steps_.append(module[0].weight.detach().clone())
    assert torch.equal(steps_[0], steps_[1]) and torch.equal(steps_[2], steps_[3])
    assert not torch.equal(steps_[0], steps_[2])


def test_groups_in_another_order_with_a_frozen_one():
    module = network()
    module[0].bias.requires_grad_(False)
    groups = [
        {"params": [module[2].bias, module[0].bias], "lr": 0.03},
        {"params": [module[0].weight, module[2].weight]},
    ]
    steps(Update(Rollout(SYSTEM, module, STEPS, "C"), torch.optim.Adam(groups, lr=0.01)))


def test_a_flow_combined_with_itself():
    module = network()
    steps(
        Update(Rollout(SYSTEM, module, STEPS, Combined(Flow(1.0, 0.0), Flow(1.0, 0.0), rule=geometric)), adam(module))
    )


@pytest.mark.parametrize("clip", ["none", "value", "norm"])
def test_an_update_that_is_not_finite(clip):
    """Finite states, a loss that overflows: what torch's clipping and optimiser make of it."""
    module = network(dtype=torch.float32)
    with torch.no_grad():
        module[2].weight.mul_(10.0)
    by_hand = copy.deepcopy(module)
    update = Update(Rollout(SYSTEM, module, STEPS, "R"), adam(module), "every", 3e38, clip)
    x0, optimiser = start(dtype=np.float32), adam(by_hand)
    update(x0)
    Rollout(SYSTEM, by_hand, STEPS, "R").value_and_grad(x0, "every", 3e38)
    clip_gradients(gradients_of(by_hand.parameters()), clip, 1.0)
    optimiser.step()
    assert update.is_recorded and not update.rollout.report.updates.isfinite().all()
    for own, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)
        torch.testing.assert_close(own.grad, other.grad, equal_nan=True)


def test_states_that_do_not_fit():
    module = network()
    update = Update(Rollout(SYSTEM, module, STEPS, "C"), adam(module))
    with pytest.raises(ValueError, match="x0"):
        update(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="finite"):
        update(np.full((3, 5), np.nan))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 33])
def test_sizes_beside_the_width_of_a_vector(size):
    system = Springs(size=size, pushes=min(size, 2))
    module = NN.Sequential(NN.Linear(size, system.pushes)).double()
    update = Update(Rollout(system, module, 3, "C"), adam(module), "every", 0.7, "norm", 1e-3)
    twin = Twin(update)
    for i in range(4):
        check(update, twin, start(3, i, system))
