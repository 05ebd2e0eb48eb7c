"""Inputs over time, memory and gates of any shape in JAX, against plain JAX with the same gates, in float64."""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "warp_phys[jax]"')

from tests.interop import jax_reference as in_jax  # noqa: E402
from tests.rollout.test_systems_with_inputs import Wind  # noqa: E402
from warp_phys import CartPole, Combined, Diverged, Flow, agree  # noqa: E402
from warp_phys.flow import resolve  # noqa: E402
from warp_phys.interop import jax as bridge  # noqa: E402
from warp_phys.interop.jax.system import JaxSystem  # noqa: E402
from warp_phys.systems import Extended  # noqa: E402

jnp = jax.numpy
STEPS, BATCH, MEMORY, INPUTS = 7, 5, 3, 2
SYSTEM, WIND = CartPole(poles=1, dt=0.05), Wind()
STEP = functools.partial(in_jax.cart_pole_step, SYSTEM)
OF_JAX = JaxSystem(STEP, 4, 1)


@pytest.fixture(autouse=True)
def _double(device):
    with in_jax.double(device):
        yield


@pytest.fixture(params=["general", "fused"])
def backend(request, device):
    if request.param == "fused" and device != "cpu":
        pytest.skip("row programs of JAX run on a CPU")
    return request.param


def _compute(params, x, w=None, h=None):
    """A layer, and a gated cell where there is a memory."""
    y = jnp.tanh((x if w is None else jnp.concatenate([x, w], axis=1)) @ params["first"])
    if h is None:
        return 3.0 * y @ params["last"]
    joined = jnp.concatenate([y, h], axis=1)
    z = jax.nn.sigmoid(joined @ params["gate"])
    h = (1.0 - z) * jnp.tanh(joined @ params["cell"]) + z * h
    return 3.0 * h @ params["last"], h


def plain(params, x):
    return _compute(params, x)


def guided(params, x, w):
    return _compute(params, x, w)


def remembering(params, x, h):
    return _compute(params, x, h=h)


def both(params, x, w, h):
    return _compute(params, x, w, h)


@jax.custom_vjp
def _same(c):
    return c


_same.defvjp(lambda c: (c, None), lambda _, adjoint: (adjoint,))


def by_steps(params, x, w, h):
    """The same, with a backward pass of its own: pulled step by step, states and weights at once."""
    c, h = _compute(params, x, w, h)
    return _same(c), h


POLICIES = {(False, False): plain, (True, False): guided, (False, True): remembering, (True, True): both}


def _numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _given(inputs, memory, shared=False, size=4):
    """Return what is differentiated: params, x0, inputs and memory."""
    hidden = 6
    params = {"first": _numbers(size + inputs, hidden, seed=1), "last": _numbers(memory or hidden, 1, seed=2)}
    if memory:
        params |= {name: 0.5 * _numbers(hidden + memory, memory, seed=i) for i, name in ((3, "gate"), (4, "cell"))}
    w = _numbers(STEPS, 1 if shared else BATCH, inputs, seed=5) if inputs else None
    return params, 0.3 * _numbers(BATCH, size, seed=6), w, _numbers(BATCH, memory, seed=7) if memory else None


def _loss(states, controls, memories=None):
    value = (jnp.cos(states) * jnp.arange(1.0, STEPS + 2)[:, None, None]).mean() + jnp.square(controls).mean()
    return value if memories is None else value + (jnp.sin(memories) * _numbers(*memories.shape, seed=8)).mean()


@functools.cache
def _plain(policy, limited=False):
    """Return plain JAX, a compiled function of what is given, gates and a limit."""

    def loss(given, gates, limit):
        params, x0, w, h = given
        without = STEP if w is None else lambda x, c, _w: STEP(x, c)
        return _loss(*in_jax.unroll_beside(without, policy, params, x0, w, h, gates, limit if limited else None))

    return jax.jit(jax.grad(loss))


def _gates(flow):
    """Return α, β and γ of a linear flow, shapes (steps, 1 or batch, 1 or D) and (steps,)."""
    out = []
    for gate in (flow.physics, flow.controller):
        array = np.array(getattr(gate, "array", gate), dtype=float)
        array = array.reshape(*array.shape, *(1,) * (3 - array.ndim))
        out.append(jnp.asarray(np.broadcast_to(array, (STEPS, *array.shape[1:]))))
    return *out, jnp.full(STEPS, flow.memory)


def _expected(policy, given, flow):
    flow = resolve(flow)
    if isinstance(flow, Combined):
        return jax.tree.map(flow.rule, *(_expected(policy, given, part) for part in (flow.base, flow.other)))
    return _plain(policy, flow.limit is not None)(given, _gates(flow), flow.limit)


def _by_engine(policy, given, flow, backend, system=SYSTEM):
    def loss(given):
        params, x0, w, h = given
        beside = {name: value for name, value in (("inputs", w), ("memory", h)) if value is not None}
        unrolled = bridge.rollout(system, policy, params, x0, STEPS, flow, backend=backend, **beside)
        assert [t.shape for t in unrolled] == [(STEPS + 1, BATCH, 4), (STEPS, BATCH, 1)] + (
            [] if h is None else [(STEPS + 1, *h.shape)]
        )
        return _loss(*unrolled)

    return jax.grad(loss)(given)


def _check(got, right, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert a.shape == b.shape
        assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)


DECAY = Flow(0.9, 0.7, memory=0.8)
FLOWS = {
    "fused": [Flow(*gates, memory=gamma) for gates in ((1, 1), (1, 0), (0, 0)) for gamma in (0.0, 0.5, 1.0)] + [DECAY],
    "general": [Flow(memory=0.5), Flow(1.0, 0.0), Flow(1.0, 0.0, memory=0.0), Flow(0.0, 0.0, memory=0.0), DECAY],
}
"""Fewer of them where JAX compiles a program for each."""


def test_flows(backend):
    given = _given(INPUTS, MEMORY)
    for flow in FLOWS[backend]:
        _check(_by_engine(both, given, flow, backend), _expected(both, given, flow))


@pytest.mark.parametrize(("inputs", "memory"), [(INPUTS, 0), (0, MEMORY)])
def test_inputs_or_memory_alone(inputs, memory, backend):
    policy, given = POLICIES[inputs > 0, memory > 0], _given(inputs, memory)
    _check(_by_engine(policy, given, DECAY, backend), _expected(policy, given, DECAY))


@pytest.mark.parametrize(
    ("policy", "system", "flow"), [(by_steps, SYSTEM, DECAY), (both, OF_JAX, DECAY), (by_steps, OF_JAX, Flow(1.0, 0.0))]
)
def test_what_is_pulled_step_by_step(policy, system, flow):
    """A controller with a backward pass of its own; a simulator that is a JAX function."""
    given = _given(INPUTS, MEMORY)
    _check(_by_engine(policy, given, flow, "auto", system), _expected(both, given, flow))
    assert bridge.why_general(system, policy, *given[:3], memory=given[3]) is not None


def test_inputs_that_samples_share_and_need_no_gradient(backend):
    """A gradient of what all samples share is a sum; one that nobody asks for changes nothing."""
    flow, (params, x0, w, _) = Flow(0.8, 0.5), _given(INPUTS, 0, shared=True)
    right = _expected(guided, (params, x0, w, None), flow)
    _check(_by_engine(guided, (params, x0, w, None), flow, backend), right)

    @functools.partial(jax.grad, argnums=(0, 1))
    def without(params, x0, w):
        return _loss(*bridge.rollout(SYSTEM, guided, params, x0, STEPS, flow, backend=backend, inputs=w))

    for value in (w, w[:, 0]):
        _check(without(params, x0, value), right[:2])


SHAPES = {
    "per step": Flow(tuple(np.linspace(0.5, 1.2, STEPS)), tuple(np.linspace(1.0, 0.0, STEPS))),
    "per sample": Flow(np.abs(np.cos(np.arange(35.0).reshape(STEPS, BATCH))), np.array([[[0.0, 1.0, 0.5, 0.2]]])),
    "limit": Flow(limit=0.3),
    "limit of gated": Flow(np.abs(np.cos(np.arange(35.0).reshape(STEPS, BATCH))), 0.9, memory=0.5, limit=1.0),
}


@pytest.mark.parametrize("gates", SHAPES)
def test_gates(gates):
    flow = SHAPES[gates]
    for policy, given in ((plain, _given(0, 0)), (both, _given(INPUTS, MEMORY))):
        _check(_by_engine(policy, given, flow, "auto"), _expected(policy, given, flow))


@pytest.mark.parametrize("policy", [plain, both, by_steps])
def test_gates_of_the_general_backend(policy):
    given, flow = _given(0, 0) if policy is plain else _given(INPUTS, MEMORY), SHAPES["limit of gated"]
    _check(_by_engine(policy, given, flow, "general"), _expected(plain if policy is plain else both, given, flow))


def test_a_limit_bounds_what_explodes():
    """Feedback that overflows is no number without a limit, and finite with one."""
    finite = {}
    for system, backend in ((SYSTEM, "auto"), (OF_JAX, "general")):
        for limit in (None, 0.5):
            flow = Flow(1.0, 1e200, limit=limit)
            found = _by_engine(plain, _given(0, 0), flow, backend, system)
            finite[backend, limit] = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    assert finite == {(b, limit): limit is not None for b in ("auto", "general") for limit in (None, 0.5)}


def test_combined_flows(backend):
    """What a trajectory starts from and is given is compared by itself, number by number; and params likewise."""
    params, *start = given = _given(INPUTS, MEMORY, shared=True)
    flow = Combined(Flow(1.0, 0.0, memory=0.5), Flow(), agree)
    right = _expected(both, given, flow)

    def loss(params, start):
        x0, w, h = start
        return _loss(*bridge.rollout(SYSTEM, both, params, x0, STEPS, flow, backend=backend, inputs=w, memory=h))

    _check(jax.grad(loss)(params, start), right[0])
    _check(jax.grad(loss, 1)(params, start), right[1:])
    for i, name in enumerate(("x0 or memory", "inputs", "x0 or memory")):

        def partial(params, value, i=i):
            return loss(params, [*start[:i], value, *start[i + 1 :]])

        with pytest.raises(ValueError, match=f"{name} and params cannot be differentiated together"):
            jax.grad(partial, (0, 1))(params, start[i])


def test_compiled_and_mapped(backend):
    """Under `jit`, with `vmap` over inputs and memory: what each call gives by itself."""
    params, x0, w, h = _given(INPUTS, MEMORY)

    def loss(w, h):
        return _loss(*bridge.rollout(SYSTEM, both, params, x0, STEPS, "R", backend=backend, inputs=w, memory=h))

    many = jnp.stack([w, 0.5 * w]), jnp.stack([h, -h])
    found = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(*many)
    right = [jax.grad(loss, (0, 1))(*(array[i] for array in many)) for i in range(2)]
    _check(found, jax.tree.map(lambda *parts: jnp.stack(parts), *right))


def test_memory_goes_on_from_one_rollout_to_the_next():
    """Two rollouts in a chain are one over both horizons; stopped in between they are not."""
    (params, x0, w, h), half = _given(INPUTS, MEMORY), 3

    def chain(given, stop):
        params, x0, w, h = given
        first = bridge.rollout(SYSTEM, both, params, x0, half, "R", inputs=w[:half], memory=h)
        x, h = (jax.lax.stop_gradient(part[-1]) if stop else part[-1] for part in (first[0], first[2]))
        later = bridge.rollout(SYSTEM, both, params, x, STEPS - half, "R", inputs=w[half:], memory=h)
        return jnp.cos(later[0][-1]).sum() + jnp.sin(later[2][-1]).sum()

    def whole(given):
        params, x0, w, h = given
        states, _, memories = bridge.rollout(SYSTEM, both, params, x0, STEPS, "R", inputs=w, memory=h)
        return jnp.cos(states[-1]).sum() + jnp.sin(memories[-1]).sum()

    given = params, x0, w, h
    _check(jax.grad(chain)(given, False), jax.grad(whole)(given))
    _, by_x0, by_inputs, by_memory = jax.grad(chain)(given, True)
    assert not by_x0.any() and not by_memory.any() and not by_inputs[:half].any() and by_inputs[half:].any()


# --- a system with inputs of its own


def _wind_step(x, c, w):
    gust = w[:, 0] + w[:, 1] * jnp.sin(x[:, 0])
    v = x[:, 1] + WIND.dt * (c[:, 0] + WIND.drag * (gust - x[:, 1]))
    return jnp.stack([x[:, 0] + WIND.dt * v, v], axis=1)


def _wind_cost(states, w):
    return ((states[1:, :, 0] - w[:, :, 2]) ** 2 + 0.1 * states[1:, :, 1] ** 2).mean()


@pytest.mark.parametrize(("policy", "seen"), [(guided, 4), (plain, 3)])
def test_a_system_with_inputs(policy, seen, backend):
    """Wind pushes, and the cost reads a reference; a controller sees both, and a clock, or nothing of it."""
    params, x0, w, _ = _given(seen, 0, size=2)
    if policy is plain:
        params = _given(0, 0, size=2)[0]

    def by_jax(params, x0, w, gates):
        states, controls, _ = in_jax.unroll_beside(
            _wind_step, guided if policy is guided else lambda p, x, _w: plain(p, x), params, x0, w, None, gates
        )
        return _wind_cost(states, w) + 0.1 * jnp.square(controls).mean()

    def by_engine(params, x0, w, flow):
        states, controls = bridge.rollout(WIND, policy, params, x0, STEPS, flow, backend=backend, inputs=w)
        return WIND.loss(states, controls, "every", 0.1, inputs=w)

    expected = jax.jit(jax.value_and_grad(by_jax, (0, 1, 2)))
    got = jax.value_and_grad(by_engine, (0, 1, 2))(params, x0, w, DECAY)
    _check(got, expected(params, x0, w, _gates(DECAY)))


def test_an_open_loop_with_inputs():
    _, x0, w, _ = _given(3, 0, size=2, shared=True)
    controls = _numbers(STEPS, BATCH, 1, seed=9)
    decay = np.array([[[0.9, 0.4]]])
    beside = jnp.zeros((STEPS, 1, 1)), jnp.zeros(STEPS)  # gates of a controller that reads its controls off

    def by_engine(x0, controls, w, flow):
        states = bridge.trajectory(WIND, x0, controls, flow, inputs=w)
        return bridge.loss(WIND, states, when="every", inputs=w)

    def by_jax(x0, controls, w, alpha):
        def step(x, c, given):
            return _wind_step(x, c, given[:, 1:])

        given = jnp.concatenate([controls, jnp.broadcast_to(w, (STEPS, BATCH, 3))], axis=2)
        states, *_ = in_jax.unroll_beside(step, lambda _, x, u: u[:, :1], None, x0, given, None, (alpha, *beside))
        return _wind_cost(states, w)

    def right(alpha):
        return expected(x0, controls, w, jnp.broadcast_to(jnp.asarray(alpha), (STEPS, 1, 2)))

    expected = jax.jit(jax.grad(by_jax, (0, 1, 2)))
    for flow, alpha in ((Flow(0.7, 0.0), 0.7), (Flow(decay), decay)):
        _check(jax.grad(by_engine, (0, 1, 2))(x0, controls, w, flow), right(alpha))


def test_a_step_of_rows():
    """A single step of a system with inputs is one of rows [x | v | w]; what is given is zero behind it."""
    rows, z, c = Extended(WIND, 0, 3), _numbers(BATCH, 8), _numbers(BATCH, 1, seed=1)
    y = bridge.step(rows, z, c)
    right = jnp.concatenate([_wind_step(z[:, :2], c, z[:, 5:]), z[:, 5:], jnp.zeros((BATCH, 3))], axis=1)
    _check(y, right, 1e-14)
    with pytest.raises(TypeError, match=r"Wind has inputs \(wind"):
        bridge.step(WIND, z[:, :2], c)


# --- what is refused


def test_errors():
    params, x0, w, h = _given(INPUTS, MEMORY)
    unroll = functools.partial(bridge.rollout, SYSTEM, both, params, x0, STEPS)
    of_plain = functools.partial(bridge.rollout, SYSTEM, plain, _given(0, 0)[0], x0, STEPS)
    single = functools.partial(jnp.asarray, dtype=jnp.float32)
    cases = [
        (lambda: unroll(inputs=w), TypeError, r"function of \(params, states, inputs\), both is not"),
        (lambda: unroll(memory=h), TypeError, r"function of \(params, states, memory\), both is not"),
        (lambda: of_plain(inputs=w), TypeError, r"function of \(params, states, inputs\), plain is not"),
        (lambda: of_plain(memory=h), TypeError, r"function of \(params, states, memory\), plain is not"),
        (lambda: unroll(inputs=w[:3], memory=h), ValueError, r"inputs must have shape \(7, 1 or 5, E\), got \(3, 5, 2"),
        (lambda: unroll(inputs=w[:, :4], memory=h), ValueError, "inputs must have shape"),
        (lambda: unroll(inputs=single(w), memory=h), TypeError, "inputs must hold float64 as x0 does, got float32"),
        (lambda: unroll(inputs=w * np.nan, memory=h), ValueError, "inputs must be finite"),
        (lambda: unroll(inputs=w, memory=h[:3]), ValueError, r"memory must have shape \(5, H\), got \(3, 3\)"),
        (lambda: unroll(inputs=w, memory=single(h)), TypeError, "memory must hold float64"),
        (lambda: unroll(inputs=w, memory=h, flow=Flow(np.ones((STEPS, 2)))), ValueError, "is for 2 samples"),
        (lambda: unroll(inputs=w, memory=h, flow=Flow(np.ones((1, 1, 3)))), ValueError, "is for 3 components"),
        (lambda: unroll(inputs=w, memory=h, flow=Flow(memory=(1.0, 0.5))), ValueError, "memory gate has 2 numbers"),
        (lambda: bridge.rollout(WIND, plain, params, x0[:, :2], STEPS), ValueError, r"Wind has inputs \(wind"),
        (lambda: bridge.rollout(WIND, plain, params, x0[:, :2], STEPS, inputs=w), ValueError, "at least 3 .* got 2"),
        (lambda: bridge.trajectory(WIND, x0[:, :2], w[:, :, :1]), ValueError, r"Wind has inputs \(wind"),
        (lambda: bridge.trajectory(SYSTEM, x0, w[:, :, :1], inputs=w), ValueError, "CartPole has 0 inputs a step"),
        (lambda: WIND.loss(jnp.zeros((3, 2, 2))), ValueError, "reads its inputs"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    returns = [
        (lambda params, x, h: x[:, :1], TypeError, r"must return \(c, h'\)"),
        (lambda params, x, h: (x[:, :2], h), ValueError, r"must return c of shape \(5, 1\), got \(5, 2\)"),
        (lambda params, x, h: (x[:, :1], h[:, :2]), ValueError, r"must return h' of shape \(5, 3\)"),
        (lambda params, x, h: (x[:, :1], single(h)), TypeError, "must return h' of float64, got float32"),
    ]
    for controller, kind, message in returns:
        with pytest.raises(kind, match=message):
            bridge.rollout(SYSTEM, controller, params, x0, STEPS, memory=h)
    with pytest.raises(Diverged):
        gale = jnp.full((STEPS, 3), 1.7e308)
        bridge.rollout(WIND, plain, _given(0, 0, size=2)[0], x0[:, :2], STEPS, inputs=gale)


def test_why_general():
    params, x0, w, h = _given(INPUTS, MEMORY)

    def ranked(params, x, w, h):
        return _compute(params, jnp.sort(x, axis=1), w, h)

    assert bridge.why_general(SYSTEM, ranked, params, x0, w, h) == "it uses sort, whose order depends on numbers"
    if jax.default_backend() == "cpu":
        assert bridge.why_general(SYSTEM, both, params, x0, w, h) is None
