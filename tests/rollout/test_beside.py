"""Inputs over time, memory and gates of any shape, against torch with the same gates, in float64."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout import reference
from tests.rollout.test_systems_with_inputs import Wind, wind_cost, wind_step
from warp_phys import CartPole, Combined, Flow, agree
from warp_phys.core.flow_gates import gate_function
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout, TorchSystem, Update, diagnose, jacobians

STEPS, BATCH, MEMORY, INPUTS = 9, 11, 5, 3
SYSTEM = CartPole(poles=1, dt=0.05)
BACKENDS = ["general", "fused"]


class Policy(torch.nn.Module):
    """Any of (x), (x, w), (x, h), (x, w, h); a GRU where it remembers."""

    def __init__(self, system, inputs=0, memory=0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        size = system.state_size + inputs
        self.first = torch.nn.Linear(size, 8, dtype=torch.float64)
        self.cell = torch.nn.GRUCell(8, memory, dtype=torch.float64) if memory else None
        self.last = torch.nn.Linear(memory or 8, system.control_size, dtype=torch.float64)

    def compute(self, x, w=None, h=None):
        y = torch.tanh(self.first(x if w is None else torch.cat([x, w], dim=1)))
        if h is None:
            return 3.0 * self.last(y)
        h = self.cell(y, h)
        return 3.0 * self.last(h), h


class Plain(Policy):
    def forward(self, x):
        return self.compute(x)


class Guided(Policy):
    def forward(self, x, w):
        return self.compute(x, w)


class Remembering(Policy):
    def forward(self, x, h):
        return self.compute(x, h=h)


class Both(Policy):
    def forward(self, x, w, h):
        return self.compute(x, w, h)


def _policy(inputs, memory, system=SYSTEM):
    kind = {(False, False): Plain, (True, False): Guided, (False, True): Remembering, (True, True): Both}
    return kind[inputs > 0, memory > 0](system, inputs, memory)


def _numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _given(inputs, memory, shared=False):
    x0 = torch.from_numpy(SYSTEM.sample(BATCH, dtype=np.float64)).requires_grad_()
    w = _numbers(STEPS, 1 if shared else BATCH, inputs, seed=1).requires_grad_() if inputs else None
    h = _numbers(BATCH, memory, seed=2).requires_grad_() if memory else None
    return x0, w, h


def _loss(states, controls, memories=None):
    value = (states.cos() * torch.arange(1.0, states.shape[0] + 1)[:, None, None]).mean() + controls.square().mean()
    return value if memories is None else value + (memories[1:].sin() * _numbers(*memories[1:].shape, seed=3)).mean()


def _leaves(policy, x0, w, h):
    return [t for t in (x0, w, h) if t is not None] + list(policy.parameters())


def _by_torch(policy, given, flow, step=None):
    arrays = [np.array(getattr(g, "array", g), dtype=np.float64) for g in (flow.physics, flow.controller)]
    gates = [
        torch.from_numpy(np.atleast_1d(a)) if a.ndim else torch.tensor(float(a), dtype=torch.float64) for a in arrays
    ]
    gates = [g[:, None, None] if g.ndim == 1 else g[:, :, None] if g.ndim == 2 else g for g in gates]
    gates = [g.expand(STEPS, *g.shape[1:]) if g.ndim else float(g) for g in gates]
    step = step or (lambda x, c: reference.cart_pole_step(SYSTEM, x, c))
    x0, w, h = given
    unrolled = reference.unroll_beside(step, policy, x0, STEPS, w, h, (*gates, flow.memory), flow.limit)
    return torch.autograd.grad(_loss(*unrolled), _leaves(policy, *given))


def _by_engine(policy, given, flow, backend, **options):
    x0, w, h = given
    memory = 0 if h is None else h.shape[1]
    rollout = Rollout(SYSTEM, policy, STEPS, flow, backend=backend, memory=memory, **options)
    unrolled = rollout(x0, inputs=w, memory=h)
    assert rollout.backend == backend
    assert [tuple(t.shape) for t in unrolled[:2]] == [(STEPS + 1, BATCH, 4), (STEPS, BATCH, 1)]
    return torch.autograd.grad(_loss(*unrolled), _leaves(policy, *given))


def _check(got, right, tolerance=1e-10):
    for a, b in zip(got, right, strict=True):
        assert torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b)


LINEAR = [
    *(Flow(*gates, memory=gamma) for gates in ((1.0, 1.0), (1.0, 0.0), (0.0, 0.0)) for gamma in (0.0, 0.5, 1.0)),
    Flow(0.9, 0.7, memory=0.8),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("inputs", "memory"), [(INPUTS, 0), (0, MEMORY), (INPUTS, MEMORY)])
def test_flows(inputs, memory, backend):
    policy, given = _policy(inputs, memory), _given(inputs, memory)
    for flow in LINEAR:
        _check(_by_engine(policy, given, flow, backend, inputs=inputs), _by_torch(policy, given, flow))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_samples_share_and_need_no_gradient(backend):
    policy, flow = _policy(INPUTS, 0), Flow(0.8, 0.5)
    shared = _given(INPUTS, 0, shared=True)
    _check(_by_engine(policy, shared, flow, backend, inputs=INPUTS), _by_torch(policy, shared, flow))
    x0, w, _ = shared
    rollout = Rollout(SYSTEM, policy, STEPS, flow, backend=backend, inputs=INPUTS)
    two = [rollout(x0, inputs=value.detach()) for value in (w, w[:, 0])]
    assert torch.equal(two[0][0], two[1][0])
    policy.zero_grad()
    _loss(*two[0]).backward()
    right = _by_torch(policy, shared, flow)
    _check([x0.grad, *(p.grad for p in policy.parameters())], [right[0], *right[2:]])


GATES = {
    "per step": lambda: Flow(tuple(np.linspace(0.5, 1.2, STEPS)), tuple(np.linspace(1.0, 0.0, STEPS))),
    "per sample and step": lambda: Flow(_numbers(STEPS, BATCH).abs().numpy(), _numbers(STEPS, BATCH, seed=1).numpy()),
    "per component": lambda: Flow(np.array([[[1.0, 0.3, 0.0, 0.8]]]), np.array([[[0.0, 1.0, 0.5, 0.2]]])),
    "all": lambda: Flow(_numbers(STEPS, BATCH, 4).numpy(), np.float64(0.5)),
    "horizons per sample": lambda: Flow(*(np.arange(STEPS)[:, None] % (2 + np.arange(BATCH)) > 0,) * 2),
    "limit": lambda: Flow(limit=0.3),
    "limit of gated": lambda: Flow(_numbers(STEPS, BATCH).abs().numpy(), 0.9, memory=0.5, limit=1.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("inputs", "memory"), [(0, 0), (INPUTS, MEMORY)])
def test_gates(inputs, memory, gates, backend):
    policy, given, flow = _policy(inputs, memory), _given(inputs, memory), GATES[gates]()
    _check(_by_engine(policy, given, flow, backend, inputs=inputs), _by_torch(policy, given, flow))


def test_limits_end_as_the_flows_they_lie_between():
    policy, given = _policy(0, 0), _given(0, 0)
    for limit, flow in ((0.0, Flow(1.0, 0.0)), (1e300, Flow())):
        got = _by_engine(policy, given, Flow(limit=limit), "fused")
        _check(got, _by_engine(policy, given, flow, "fused"), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_limit_bounds_what_explodes(backend):
    """Feedback that overflows in float32 is no number without a limit, and finite with one."""
    policy = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    finite = {}
    for limit in (None, 0.5):
        rollout = Rollout(SYSTEM, policy, STEPS, Flow(1.0, 1e30, limit=limit), backend=backend)
        rollout(SYSTEM.sample(BATCH))[0][-1].sum().backward()
        finite[limit] = all(p.grad.isfinite().all() for p in policy.parameters())
        policy.zero_grad()
    assert finite == {None: False, 0.5: True}


@pytest.mark.parametrize("flow", ["combined", Combined(Flow(limit=0.3), Flow(), agree)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_combined_flows(flow, backend):
    policy, given = _policy(INPUTS, MEMORY), _given(INPUTS, MEMORY)
    flow = resolve(flow)
    parts = [_by_torch(policy, given, part) for part in (flow.base, flow.other)]
    right = [flow.rule(*pair) for pair in zip(*parts, strict=True)]
    _check(_by_engine(policy, given, flow, backend, inputs=INPUTS), right)


@pytest.mark.parametrize("flow", ["R", "M", "C", Flow(limit=0.5)])
@pytest.mark.parametrize(("inputs", "memory"), [(INPUTS, MEMORY), (0, MEMORY), (INPUTS, 0), (0, 0)])
def test_value_and_grad_and_updates(inputs, memory, flow):
    """The same from a call, its loss and backward; from value_and_grad; and over minibatches of Update."""
    policy, (x0, w, h) = _policy(inputs, memory), _given(inputs, memory)
    x0, w, h = (None if t is None else t.detach() for t in (x0, w, h))
    policies = [copy.deepcopy(policy) for _ in range(4)]
    rollouts = [
        Rollout(SYSTEM, p, STEPS, flow, backend=backend, memory=memory, inputs=inputs)
        for p, backend in zip(policies, ("general", "fused", "general", "fused"), strict=True)
    ]
    unrolled = rollouts[0](x0, inputs=w, memory=h)
    loss = SYSTEM.loss(unrolled[0], unrolled[1], when="every", control_cost=0.1)
    loss.backward()
    for rollout in rollouts[1:]:
        value = rollout.value_and_grad(x0, "every", 0.1, inputs=w, memory=h)
        assert float(value) == pytest.approx(float(loss.detach()), rel=1e-12)
        gradients = [p.grad for p in rollout.controller.parameters()]
        _check(gradients, [p.grad for p in policy.parameters()] if policy.first.weight.grad is not None else
               [p.grad for p in policies[0].parameters()])  # fmt: skip
    many = torch.stack([x0 + 0.01 * i for i in range(3)])
    own = torch.stack([w + 0.1 * i for i in range(3)]) if inputs else None
    remembered = torch.stack([h + 0.1 * i for i in range(3)]) if memory else None
    losses = []
    for rollout in rollouts[:2]:
        optimiser = torch.optim.Adam(rollout.controller.parameters(), lr=1e-2)
        update = Update(rollout, optimiser, when="every", control_cost=0.1, clip="norm", clip_at=0.3)
        losses.append(update.minibatches(many, inputs=own, memory=remembered))
        assert update.is_recorded == (rollout.backend == "fused")
    _check([losses[1], *policies[1].parameters()], [losses[0], *policies[0].parameters()])
    losses = []
    for i in range(3):
        optimiser = torch.optim.Adam(policies[2].parameters(), lr=1e-2) if i == 0 else optimiser
        update = Update(rollouts[2], optimiser, when="every", control_cost=0.1, clip="norm", clip_at=0.3)
        args = (None if own is None else own[i], None if remembered is None else remembered[i])
        losses.append(update(many[i], *args))
    _check([*policies[2].parameters()], [*policies[0].parameters()])


def test_memory_goes_on_from_one_rollout_to_the_next():
    """Two rollouts in a chain are one over both horizons; detached in between they are not."""
    policy, (x0, w, h) = _policy(INPUTS, MEMORY), _given(INPUTS, MEMORY)
    half = 4
    first, second = (Rollout(SYSTEM, policy, n, "R", memory=MEMORY) for n in (half, STEPS - half))
    whole = Rollout(SYSTEM, policy, STEPS, "R", memory=MEMORY)
    states, controls, memories = first(x0, inputs=w[:half], memory=h)
    later = second(states[-1], inputs=w[half:], memory=memories[-1])
    right = whole(x0, inputs=w, memory=h)
    for a, b, c in zip((states, controls, memories), later, right, strict=True):
        skipped = 1 if len(c) == STEPS + 1 else 0
        assert torch.allclose(torch.cat([a, b[skipped:]]), c, rtol=1e-13, atol=1e-13)
    leaves = _leaves(policy, x0, w, h)
    got = torch.autograd.grad(later[0][-1].cos().sum() + later[2][-1].sin().sum(), leaves)
    _check(got, torch.autograd.grad(right[0][-1].cos().sum() + right[2][-1].sin().sum(), leaves))
    states, _, memories = first(x0, inputs=w[:half], memory=h)
    cut = second(states[-1].detach(), inputs=w[half:], memory=memories[-1].detach())
    found = torch.autograd.grad(cut[0][-1].sum(), leaves, allow_unused=True)
    assert found[0] is None and found[2] is None
    assert not found[1][:half].any() and found[1][half:].any()


def test_a_combined_chain_with_a_memory_is_one_rollout():
    policy, (x0, w, h) = _policy(INPUTS, MEMORY), _given(INPUTS, MEMORY)
    half, leaves = 4, list(policy.parameters())
    first, second = (Rollout(SYSTEM, policy, n, "C", memory=MEMORY) for n in (half, STEPS - half))
    states, _, memories = first(x0.detach(), inputs=w[:half].detach(), memory=h.detach())
    later = second(states[-1], inputs=w[half:].detach(), memory=memories[-1])
    later[0][-1].cos().sum().backward()
    got = [p.grad.clone() for p in leaves]
    policy.zero_grad()
    whole = Rollout(SYSTEM, policy, STEPS, "C", memory=MEMORY)
    whole(x0.detach(), inputs=w.detach(), memory=h.detach())[0][-1].cos().sum().backward()
    _check(got, [p.grad for p in leaves])


def test_noise_with_a_learned_deviation():
    """A stochastic policy is a module with noise among its inputs."""

    class Stochastic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Linear(4, 1, dtype=torch.float64)
            self.log_deviation = torch.nn.Parameter(torch.full((1,), -1.0, dtype=torch.float64))

        def forward(self, x, noise):
            return self.mean(x) + self.log_deviation.exp() * noise

    policy, given = Stochastic(), (_given(0, 0)[0], _numbers(STEPS, BATCH, 1).requires_grad_(), None)
    for backend in BACKENDS:
        _check(_by_engine(policy, given, Flow(), backend, inputs=1), _by_torch(policy, given, Flow()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_system_with_inputs(backend):
    """Wind pushes, and the cost reads the reference; the controller sees both, and a clock."""
    system = Wind()
    policy = Guided(system, inputs=4)
    x0 = _numbers(BATCH, 2).requires_grad_()
    w = _numbers(STEPS, BATCH, 4, seed=1).requires_grad_()
    leaves = [x0, w, *policy.parameters()]
    for flow in (Flow(), Flow(1.0, 0.0), Flow(0.5, 0.7)):
        rollout = Rollout(system, policy, STEPS, flow, backend=backend, inputs=4)
        states, controls = rollout(x0, inputs=w)
        assert rollout.backend == backend
        got = torch.autograd.grad(system.loss(states, controls, "every", 0.1, inputs=w), leaves)
        with_gates = (flow.physics, flow.controller, 1.0)
        x = x0
        states, controls = [x0], []
        for n in range(STEPS):
            seen, own = reference._Meeting.apply(x, *with_gates[:2], None)[::-1]
            controls.append(policy(seen, w[n]))
            x = wind_step(system, own, controls[-1], w[n])
            states.append(x)
        cost = torch.stack([wind_cost(states[n + 1], w[n]) for n in range(STEPS)]).mean()
        right = torch.autograd.grad(cost + 0.1 * torch.stack(controls).square().mean(), leaves)
        _check(got, right)
    rollouts = [Rollout(system, copy.deepcopy(policy), STEPS, "C", backend=b, inputs=4) for b in BACKENDS]
    values = [r.value_and_grad(x0.detach(), "every", 0.1, inputs=w.detach()) for r in rollouts]
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-12)
    gradients = [[p.grad for p in r.controller.parameters()] for r in rollouts]
    _check(*gradients)


def test_a_controller_that_does_not_see_the_systems_inputs():
    system, policy = Wind(), Plain(Wind())
    x0, w = _numbers(BATCH, 2), _numbers(STEPS, BATCH, 3, seed=1).requires_grad_()
    states, _ = Rollout(system, policy, STEPS, "R", backend="fused", inputs=3)(x0, inputs=w)
    (got,) = torch.autograd.grad(states.sin().sum(), [w])
    x, rows = x0, [x0]
    for n in range(STEPS):
        x = wind_step(system, x, policy(x), w[n])
        rows.append(x)
    _check([got], torch.autograd.grad(torch.stack(rows).sin().sum(), [w]))


def test_errors():
    x0, w, h = (None if t is None else t.detach() for t in _given(INPUTS, MEMORY))
    both, plain = _policy(INPUTS, MEMORY), _policy(0, 0)
    rollout = Rollout(SYSTEM, both, STEPS, memory=MEMORY)
    cases = [
        (lambda: rollout(x0), "takes inputs"),
        (lambda: rollout(x0, inputs=w[:3]), r"inputs must have shape \(9, batch, E\)"),
        (lambda: rollout(x0, inputs=w[:, :4]), "inputs must have shape"),
        (lambda: rollout(x0, inputs=w.float()), "must hold torch.float64"),
        (lambda: rollout(x0, inputs=w * math.nan), "inputs must be finite"),
        (lambda: rollout(x0, inputs=w, memory=h[:3]), r"memory must have shape \(11, 5\)"),
        (lambda: rollout(x0, inputs=w[:, :, :2], memory=h), "sizes|shape|mat1"),
        (lambda: Rollout(SYSTEM, plain, STEPS)(x0, memory=h), "without one"),
        (lambda: Rollout(SYSTEM, plain, STEPS)(x0, inputs=w), "inputs of 0 numbers"),
        (lambda: Rollout(SYSTEM, plain, STEPS, memory=-1), "memory must be at least 0"),
        (lambda: Rollout(Wind(), plain, STEPS)(x0[:, :2]), "has inputs"),
        (lambda: Wind().loss(torch.zeros(3, 2, 2)), "reads its inputs"),
        (lambda: Flow(np.ones((2, 3, 4, 5))), "physics must be"),
        (lambda: Flow(limit=-1.0), "limit"),
        (lambda: Flow(memory=np.ones((2, 2))), "memory must be"),
        (lambda: Rollout(SYSTEM, plain, STEPS, Flow(np.ones((4, 2)))), "has 4 numbers"),
        (lambda: Rollout(SYSTEM, plain, STEPS, Flow(np.ones((STEPS, 2))))(x0.requires_grad_())[0].sum().backward(),
         "is for 2 samples"),
        (lambda: Rollout(SYSTEM, plain, STEPS, Flow(np.ones((1, 1, 3))))(x0.requires_grad_())[0].sum().backward(),
         "is for 3 components"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()
    wrong = Remembering(SYSTEM, memory=MEMORY)
    wrong.forward = lambda x, h: wrong.compute(x, h=h)[0]
    with pytest.raises(TypeError, match="must return"):
        Rollout(SYSTEM, wrong, STEPS, memory=MEMORY)(x0)


@pytest.mark.parametrize(("inputs", "memory"), [(INPUTS, MEMORY), (INPUTS, 0)])
def test_diagnosis(inputs, memory):
    """Feedback and updates are those of training; what is given has no part in feedback."""
    policy, (x0, w, h) = _policy(inputs, memory), _given(inputs, memory)
    x0, w, h = (None if t is None else t.detach() for t in (x0, w, h))
    given = {"inputs": w} if h is None else {"inputs": w, "memory": h}
    flows = (Flow(1.0, 0.5, memory=0.5), Flow(limit=0.5), Flow(np.array([[[1.0, 0.3, 0.0, 0.8]]])), resolve("C"))
    rollout = Rollout(SYSTEM, policy, STEPS, "R", memory=memory, inputs=inputs)
    found = diagnose(rollout, x0, flows, "every", **given)
    for flow in flows:
        policy.zero_grad()
        own = Rollout(SYSTEM, policy, STEPS, flow, memory=memory, inputs=inputs)
        own.value_and_grad(x0, "every", **given)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters()))
        assert found.layers[-1].norms[flow.name] == pytest.approx(norm, rel=1e-9)
    steps = jacobians(rollout, x0, samples=2, **given)
    assert steps.closed_loop.shape == (STEPS, 2, 4 + memory, 4 + memory)
    states, *_ = rollout(x0, **given)
    moved = x0.clone()
    moved[0, 1] += 1e-6
    change = (rollout(moved, **given)[0] - states)[:, 0] / 1e-6
    product = np.eye(4 + memory)
    for n in range(STEPS):
        product = steps.closed_loop[n, 0] @ product
    assert np.allclose(product[:4, 1], change[-1].detach().numpy(), rtol=1e-4, atol=1e-6)


def test_arguments_that_could_be_mistaken_are_refused():
    class Optional(Both):
        def forward(self, x, w=None, h=None):
            return self.compute(x, w, h)

    with pytest.raises(ValueError, match="no defaults"):
        Rollout(SYSTEM, Optional(SYSTEM, INPUTS, MEMORY), STEPS, memory=MEMORY)
    with pytest.raises(ValueError, match="takes x alone"):
        Rollout(SYSTEM, Plain(SYSTEM), STEPS, memory=MEMORY)


def test_a_first_call_that_does_not_fit_leaves_the_rollout_as_it_was():
    x0, w, _ = (None if t is None else t.detach() for t in _given(INPUTS, 0))
    rollout = Rollout(SYSTEM, _policy(INPUTS, 0), STEPS)
    with pytest.raises(ValueError, match="is known from the first call on"):
        assert rollout.backend
    with pytest.raises(ValueError, match="does not take inputs of 2 numbers"):
        rollout(x0, inputs=w[:, :, :2])
    rollout(x0, inputs=w)


def test_optional_inputs_of_a_system_are_given():
    class Optional(Policy):
        def forward(self, x, w=None):
            assert w is not None
            return self.compute(x, w)

    x0, w = _numbers(BATCH, 2), _numbers(STEPS, BATCH, 3)
    Rollout(Wind(), Optional(Wind(), inputs=3), STEPS)(x0, inputs=w)


def test_compiled_code_asks_for_inputs_too():
    rollout, x0 = Rollout(Wind(), Plain(Wind()), STEPS), _numbers(BATCH, 2)
    rollout(x0, inputs=_numbers(STEPS, BATCH, 3))
    with pytest.raises(Exception, match=r"inputs of 3 numbers a step, got none"):
        torch.compile(lambda x: rollout(x)[0].sum(), backend="eager", fullgraph=True)(x0)


def test_a_physical_parameter_may_be_called_as_a_part_of_rows():
    @dataclass(frozen=True)
    class Named(CartPole):
        memory: float = 0.3

    system, policy = Named(), _policy(0, MEMORY)
    x0 = torch.from_numpy(SYSTEM.sample(BATCH, dtype=np.float64))
    for backend in BACKENDS:
        rollout = Rollout(system, copy.deepcopy(policy), STEPS, "R", backend=backend, memory=MEMORY)
        states, controls, _ = rollout(x0)
        right = float(system.loss(states, controls, "every").detach())
        assert float(rollout.value_and_grad(x0, "every")) == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("feedback", [[math.nan, math.inf], [math.inf, math.nan], [math.nan, 1.0], [math.inf, 1.0]])
def test_feedback_that_is_not_finite_is_cut_where_there_is_a_limit(feedback):
    """In kernels; one row, by hand."""
    row = wp.types.vector(length=2, dtype=wp.float64)
    gated = gate_function(2, 2, 2, wp.float64)

    @wp.kernel(module="unique", enable_backward=False)
    def once(pulled: wp.array2d[wp.float64], gates: wp.array3d[wp.float64], out: wp.array2d[wp.float64]):
        lam = row(wp.float64(1.0), wp.float64(2.0))
        dx = row(wp.float64(3.0), wp.float64(4.0))
        value = gated(lam, dx, row(pulled[0, 0], pulled[0, 1]), gates, 0, 0, 0)
        out[0, 0] = value[0]
        out[0, 1] = value[1]

    arrays = [wp.array(np.array(a), dtype=wp.float64, device="cpu") for a in ([feedback], [[[1.0] * 4 + [1.0, 0.3]]])]
    out = wp.zeros((1, 2), dtype=wp.float64, device="cpu")
    wp.launch(once, 1, arrays, [out], device="cpu")
    assert out.numpy().tolist() == [[4.0, 6.0]]


def test_simulators_that_are_no_systems_share_nothing_between_threads():
    def step(x, c):
        return x + 0.1 * torch.sin(x) + 0.05 * c

    system = TorchSystem(step, state_size=4, control_size=1)
    rollout = Rollout(system, _policy(0, MEMORY), 30, "R", memory=MEMORY)
    starts = [_numbers(BATCH, 4, seed=i) for i in range(2)]
    with torch.no_grad():
        right = [rollout(x0)[0] for x0 in starts]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda i: rollout(starts[i % 2])[0], range(20)))
    for i, states in enumerate(found):
        assert torch.equal(states, right[i % 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code(backend):
    """As one node of torch's graph: the same numbers, and gradients for inputs and memory by a linear flow."""
    policy = _policy(INPUTS, MEMORY)
    rollout = Rollout(SYSTEM, policy, STEPS, "M", memory=MEMORY, inputs=INPUTS, backend=backend)
    x0, w, h = torch.as_tensor(SYSTEM.sample(4, seed=0, dtype="float64")), _numbers(STEPS, INPUTS), _numbers(4, MEMORY)

    def objective(x0, w, h):
        states, controls, memories = rollout(x0, inputs=w, memory=h)
        assert memories.shape == (STEPS + 1, 4, MEMORY)
        return states[1:].square().sum() + 0.1 * controls.square().sum() + memories[-1].sum() * w.sum()

    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for flow in ("R", "M", "C"):
        rollout.flow = flow
        found = []
        for run in (objective, compiled):
            given = [t.clone().requires_grad_(flow != "C") for t in (w, h)]
            policy.zero_grad()
            run(x0, *given).backward()
            found.append([p.grad.clone() for p in (*policy.parameters(), *(given if flow != "C" else ()))])
        for plain, other in zip(*found, strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)
    with pytest.raises(Exception, match="what a rollout is given must have no gradient in compiled code"):
        compiled(x0, w.clone().requires_grad_(), h)
    unknown = Rollout(SYSTEM, policy, STEPS, memory=MEMORY)
    with pytest.raises(Exception, match=r"give Rollout\(…, inputs=E\)"):
        torch.compile(lambda: unknown(x0, inputs=w), fullgraph=True, backend="aot_eager")()
