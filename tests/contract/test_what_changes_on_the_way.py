"""What shows only at later states, in the history of a tensor, behind a mask or in a pass within another one."""

import functools

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests.contract.by_torch import (
    FLOWS,
    STEPS,
    SYSTEM,
    a_loss,
    assert_same,
    by_engine,
    by_torch,
    collect,
    leaves,
    start,
)
from tests.rollout.reference import unroll
from warp_phys.errors import NotRepeatable
from warp_phys.flow import Combined, linear_parts, resolve
from warp_phys.interop.torch import Rollout, Step, Update
from warp_phys.interop.torch.system import TorchSystem

NN = torch.nn
each_flow = pytest.mark.parametrize("flow", FLOWS)


class Net(NN.Module):
    def __init__(self, inputs=4):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = NN.Linear(inputs, 8).double(), NN.Linear(8, 1).double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1e-5, 1e-5)


def mean_square(states, controls):
    return states.square().mean()


# --- histories whose backward pass is not linear ----------------------------------------------------------------------


class Told(Net):
    """A controller that is told a goal."""

    def __init__(self, z=None):
        super().__init__(6)
        self.z = z

    def forward(self, x):
        return super().forward(torch.cat([x, self.z.expand(len(x), -1)], 1))


def clipped_by_hook(z):
    z.register_hook(lambda g: g.clamp(-1e-5, 1e-5))
    return z


def normed_by_hook(z):
    z.register_hook(lambda g: g / (1e-3 + g.norm()))
    return z


@each_flow
@pytest.mark.parametrize("treat", [clipped_by_hook, normed_by_hook, Clamp.apply])
def test_adjoints_go_through_a_history_once(treat, flow):
    """Clipped are the sums over all steps, as in torch, not what each step adds to them."""
    encoder, net, goal = NN.Linear(3, 2).double(), Told(), torch.ones(1, 3).double()

    def told():
        net.z = treat(encoder(goal))
        return net

    tensors = [*leaves(net), *leaves(encoder)]
    assert_same(by_engine(told, tensors, start(), flow), by_torch(told, tensors, start(), flow))


@each_flow
def test_the_history_of_what_a_simulator_depends_on(flow):
    encoder, net, wind = NN.Linear(3, 4).double(), Net(), torch.ones(1, 3).double()
    world = {}

    def step(x, c):
        return x + 0.1 * torch.tanh(x * world["wind"] + c)

    def fresh():
        world["wind"] = clipped_by_hook(encoder(wind))
        return net

    tensors = [*leaves(net), *leaves(encoder)]
    got = by_engine(fresh, tensors, start(), flow, system=TorchSystem(step, 4, 1), loss=mean_square)
    assert_same(got, by_torch(fresh, tensors, start(), flow, step=step, loss=mean_square))


def test_what_hooks_and_retained_gradients_of_a_history_see():
    seen, encoder, goal = [], NN.Linear(3, 2).double(), torch.ones(1, 3).double()

    def told():
        z = encoder(goal)
        z.register_hook(lambda g: seen.append(g.clone()))
        z.retain_grad()
        return Told(z)

    nets = [told(), told()]
    a_loss(*Rollout(SYSTEM, nets[0], STEPS, "R")(start())).backward()
    a_loss(*unroll(Step(SYSTEM), nets[1], start(), resolve("R").gates(STEPS))).backward()
    assert_same([seen[0], nets[0].z.grad], [seen[1], nets[1].z.grad])
    with pytest.raises(ValueError, match="must not retain its gradient with a combined flow"):
        Rollout(SYSTEM, told(), STEPS, "C")(start())


class Mapped(Told):
    def forward(self, x):
        return torch.func.vmap(lambda row: self.b(torch.tanh(self.a(torch.cat([row, self.z[0]])))))(x)


class Remembering(Told):
    """Computes something from what it is told, at the first call."""

    told = None

    def forward(self, x):
        if self.told is not self.z:
            self.told, self.made = self.z, 2.0 * torch.tanh(self.z)
        return self.b(torch.tanh(self.a(torch.cat([x, self.made.expand(len(x), -1)], 1))))


class Straight(Told):
    def forward(self, x):
        return NN.Module.__call__(self.b, torch.tanh(self.a(torch.cat([x, Clamp.apply(self.z).expand(len(x), -1)], 1))))


@each_flow
@pytest.mark.parametrize("kind", [Mapped, Remembering])
def test_ways_to_use_what_has_a_history(kind, flow):
    encoder, goal = NN.Linear(3, 2).double(), torch.ones(1, 3).double()
    net = kind()

    def told():
        net.z = clipped_by_hook(encoder(goal))
        return net

    tensors = [*leaves(net), *leaves(encoder)]
    assert_same(by_engine(told, tensors, start(), flow), by_torch(told, tensors, start(), flow))


@pytest.mark.parametrize("flow", ["R", "C"])
def test_cached_weights_in_compiled_code(flow):
    net = NN.Sequential(weight_norm(NN.Linear(4, 8)), NN.Tanh(), NN.Linear(8, 1)).double()
    torch._dynamo.reset()
    rollout = Rollout(SYSTEM, net, STEPS, flow)
    objective = torch.compile(lambda x0: a_loss(*rollout(x0)), fullgraph=True, backend="aot_eager")
    with parametrize.cached():
        got = collect(lambda: objective(start()), leaves(net))
    assert_same(got, by_torch(net, leaves(net), start(), flow))


def test_a_history_that_goes_straight_into_a_function():
    net = Straight(clipped_by_hook(NN.Linear(3, 2).double()(torch.ones(1, 3).double())))
    with pytest.raises(ValueError, match=r"straight to an autograd\.Function .* tensor\.clone\(\)"):
        Rollout(SYSTEM, net, STEPS, "R")(start())


def test_one_history_behind_two_rollouts():
    encoder, net, goal = NN.Linear(3, 2).double(), Told(), torch.ones(1, 3).double()
    tensors = [*leaves(net), *leaves(encoder)]

    def loss(roll):
        net.z = clipped_by_hook(encoder(goal))
        return a_loss(*roll(start(4, 1))) + a_loss(*roll(start(4, 2)))

    got = collect(lambda: loss(Rollout(SYSTEM, net, STEPS, "R")), tensors)
    gates = resolve("R").gates(STEPS)
    assert_same(got, collect(lambda: loss(lambda x0: unroll(Step(SYSTEM), net, x0, gates)), tensors))


class Careful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if grad.abs().max() > 1e3:
            raise RuntimeError("gradient exploded")
        return grad


@each_flow
def test_a_function_that_refuses_large_numbers(flow):
    class Watched(Net):
        def forward(self, x):
            return Careful.apply(super().forward(x))

    net = Watched()
    assert_same(by_engine(net, leaves(net), start(), flow), by_torch(net, leaves(net), start(), flow))


# --- what shows at later states only ----------------------------------------------------------------------------------


class Scaled(Net):
    """By the largest number of the batch, once that is large."""

    def forward(self, x):
        return super().forward(x / x.abs().max().clamp(min=1.6))


class Alarmed(Net):
    def forward(self, x):
        return super().forward(x) * (2.0 if (x.abs() > 1.6).any() else 1.0)


@each_flow
@pytest.mark.parametrize("kind", [Scaled, Alarmed])
def test_rows_that_are_coupled_later(kind, flow):
    net, x0 = kind(), 0.3 * start(8)
    expected = by_torch(net, leaves(net), x0, flow, 30)
    rollout = Rollout(SYSTEM, net, 30, flow)
    for _ in range(3):
        assert_same(collect(lambda: a_loss(*rollout(x0)), leaves(net)), expected)
    assert rollout._adapter.examination.coupled


class Experts(NN.Module):
    """A world whose models are met one after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.experts = NN.ModuleList(NN.Linear(5, 4).double() for _ in range(4))

    def forward(self, x, c):
        place = (x.detach()[:, 0] * 3).long().clamp(0, 3)
        y = x + torch.tensor([0.1, 0.0, 0.0, 0.0]).double()
        for k, expert in enumerate(self.experts):
            rows = (place == k).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, 0.02 * torch.tanh(expert(torch.cat([x, c], 1)[rows])))
        return y


WORLD = Experts()


@each_flow
@pytest.mark.parametrize(
    "function", [WORLD, WORLD.forward, lambda x, c: WORLD(x, c), functools.partial(lambda w, x, c: w(x, c), WORLD)]
)
def test_models_of_the_world_that_are_met_later(function, flow):
    net, x0 = Net(), torch.full((4, 4), 0.1).double()
    tensors = [*leaves(net), *leaves(WORLD)]
    got = by_engine(net, tensors, x0, flow, 10, system=TorchSystem(function, 4, 1), loss=mean_square)
    unmet = WORLD.experts[3].weight.grad
    assert_same(got, by_torch(net, tensors, x0, flow, 10, step=WORLD, loss=mean_square))
    assert unmet is None and got[-4].any()  # an optimiser leaves what has no gradient alone


def test_a_weight_of_the_world_that_is_met_later_and_cannot_be_found():
    weights = [torch.ones(4).double().requires_grad_() for _ in range(2)]

    def step(x, c):
        return x + 0.1 * weights[int(x[0, 0] > 0.5)] + 0.0 * c

    loss = mean_square(*Rollout(TorchSystem(step, 4, 1), Net(), 10)(torch.zeros(4, 4).double()))
    with pytest.raises(NotRepeatable, match=r"depends on a tensor of shape \(4,\) that it does not depend on at x0"):
        loss.backward()


def test_a_function_behind_a_zero_weight():
    """Zeros say nothing about it, and the weight is another one in a pass that tries nothing out."""

    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.gate = NN.Parameter(torch.zeros(1).double())

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h.detach()) + self.gate * Clamp.apply(h).sum(1, keepdim=True)

    net = Gated()
    rollout = Rollout(SYSTEM, net, STEPS, "R")
    for _ in range(2):
        a_loss(*rollout(start())).backward()
    with torch.no_grad():
        net.gate += 0.5
    got = collect(lambda: a_loss(*rollout(start())), leaves(net))
    assert_same(got, by_torch(net, leaves(net), start(), "R"))


# --- masks ------------------------------------------------------------------------------------------------------------

HEALTHY = [0, 1, 3, 4]


def blow(x, c, mass=1.0):
    """The first component runs away from where it is large."""
    return torch.cat([x[:, :1] + 0.1 * x[:, :1] ** 9, x[:, 1:] + 0.1 * mass * (c - x[:, 1:].sin())], 1)


class Goals(Net):
    def __init__(self):
        super().__init__()
        self.goals = torch.linspace(-1, 1, 10).double().view(5, 2)

    def forward(self, x):
        return super().forward(torch.cat([x, self.goals[: len(x)] if len(x) == 5 else self.goals[HEALTHY]], 1))


class Copied(Net):
    def forward(self, x):
        return super().forward(torch.cat([x, x], 1))


def runaway():
    x0 = torch.linspace(0.0, 0.5, 10).double().view(5, 2)
    x0[2, 0] = 30.0
    return x0


@each_flow
@pytest.mark.parametrize("kind", [Goals, Copied])
@pytest.mark.parametrize("masses", [False, True])
def test_masks_where_samples_differ(kind, masses, flow):
    """In what a controller, or a simulator, knows of each of them."""
    mass, net = torch.linspace(0.5, 2.0, 5).double()[:, None], kind()
    system = TorchSystem(lambda x, c: blow(x, c, mass) if masses else blow(x, c), 2, 1)
    rollout = Rollout(system, net, 8, flow, on_divergence="mask")
    got = collect(lambda: rollout(runaway())[0][:, HEALTHY].square().mean(), leaves(net))
    assert rollout.report.diverged == (2,)
    step = lambda x, c: blow(x, c, mass[HEALTHY] if masses else 1.0)  # noqa: E731
    assert_same(got, by_torch(net, leaves(net), runaway()[HEALTHY], flow, 8, step=step, loss=mean_square))


def test_masks_where_rows_are_coupled():
    class Centred(Copied):
        def forward(self, x):
            h = self.a(x[:, 1:].expand(-1, 4))
            return self.b(torch.tanh(h - h.mean(0)))

    rollout = Rollout(TorchSystem(blow, 2, 1), Centred(), 8, "R", on_divergence="mask")
    with pytest.raises(NotRepeatable, match="samples that diverge cannot be masked"):
        mean_square(*rollout(runaway())).backward()


# --- passes within passes ---------------------------------------------------------------------------------------------


@each_flow
def test_checkpoints_around_rollouts(flow):
    net = Net()
    half = Rollout(SYSTEM, net, 6, flow)

    def loss():
        x = start()
        for _ in range(2):
            x = checkpoint(lambda x: half(x)[0][-1], x, use_reentrant=False)
        return SYSTEM.loss(x.expand(2, -1, -1))

    for _ in range(3):  # passes that try the module out, and others
        got = collect(loss, leaves(net))
        assert_same(got, by_torch(net, leaves(net), start(), flow, loss=lambda states, controls: SYSTEM.loss(states)))


def test_checkpoints_that_cut():
    net = Net()
    half = Rollout(SYSTEM, net, 6, "C")
    x = checkpoint(lambda x: half(x)[0][-1], start().requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        x.square().mean().backward()


def test_a_combined_rollout_within_a_controller():
    inner = Rollout(SYSTEM, Net(), 3, "R")

    class Looking(Net):
        def forward(self, x):
            return super().forward(torch.cat([x, inner(x)[0][-1]], 1))

    net = Looking(8)
    tensors = [*leaves(net), *leaves(inner.controller)]
    assert_same(by_engine(net, tensors, start(), "M"), by_torch(net, tensors, start(), "M"))
    inner.flow = "C"
    with pytest.raises(ValueError, match="a rollout within a controller or a simulator must have a linear flow"):
        a_loss(*Rollout(SYSTEM, net, STEPS, "R")(start())).backward()


# --- what is returned, what is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: c[:, 0], ValueError, r"must return shape \(4, K\), a row per state, got \(4,\)"),
        (lambda c: c[..., None], ValueError, r"got \(4, 1, 1\)"),
        (lambda c: c.sum(), ValueError, r"got \(\)"),
        (lambda c: c[:1], ValueError, r"got \(1, 1\)"),
        (lambda c: c.float(), TypeError, r"must return torch\.float64 as the states hold, got torch\.float32"),
        (lambda c: c.long(), TypeError, r"got torch\.int64"),
    ],
)
def test_what_are_no_controls(change, error, words):
    class Changed(Net):
        def forward(self, x):
            return change(super().forward(x))

    with pytest.raises(error, match=words):
        Rollout(SYSTEM, Changed(), STEPS)(start())


@each_flow
def test_sparse_gradients(flow):
    class Rows(Net):
        def __init__(self):
            super().__init__()
            self.table = NN.Embedding(10, 8, sparse=True).double()

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * self.table((10 * x[:, 0].detach().abs()).long() % 10))

    net, system = Rows(), Step(SYSTEM)
    got = by_engine(net, leaves(net), start(), flow)
    flow = resolve(flow)
    parts = []
    for part in linear_parts(flow):
        loss = lambda: a_loss(*unroll(system, net, start(), part.gates(STEPS)))  # noqa: B023, E731
        parts.append([g.to_dense() for g in collect(loss, leaves(net))])
    expected = [flow.apply(*pair) for pair in zip(*parts, strict=True)] if isinstance(flow, Combined) else parts[0]
    assert_same(got, expected)


def test_complex_numbers():
    weight = torch.ones(4, dtype=torch.complex128).requires_grad_()
    system = TorchSystem(lambda x, c: x + 0.1 * (x * weight).real + 0.1 * c, 4, 1)
    with pytest.raises(ValueError, match="what is trained must be real numbers, got a tensor of torch.complex128"):
        Rollout(system, Net(), STEPS)(start())


def test_updates_of_more_than_the_controller():
    """Clipping counts all that the optimiser moves; an average is kept of the controller's own parameters alone."""
    goal, moved = torch.ones(1, 3).double(), []
    for by_hand in (False, True):
        torch.manual_seed(0)
        encoder, net = NN.Linear(3, 2).double(), Told()
        net.z = encoder(goal)
        tensors = [*leaves(net), *leaves(encoder)]
        rollout, optimiser = Rollout(SYSTEM, net, STEPS, "R"), torch.optim.SGD(tensors, lr=0.1)
        if by_hand:
            SYSTEM.loss(*rollout(start())).backward()
            NN.utils.clip_grad_norm_(tensors, 1e-4)
            optimiser.step()
        else:
            Update(rollout, optimiser, clip="norm", clip_at=1e-4)(start())
        moved.append([t.grad for t in tensors])
    assert_same(*moved, tolerance=0.02)  # torch adds 1e-6 to the norm
    assert float(torch.cat([g.flatten() for g in moved[0]]).norm()) == pytest.approx(1e-4)
    rollout.flow, net.z = "averaged", encoder(goal)
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(ValueError, match="must depend on the controller's own parameters alone for the flow"):
        Update(rollout, optimiser)(start())
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
