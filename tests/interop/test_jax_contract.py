"""What a rollout in JAX asks of a controller and of a simulator: the right update, or a refusal that says why."""

import functools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import warp as wp

jax = pytest.importorskip("jax", reason='needs JAX: pip install "warp_phys[jax]"')

from tests.interop import jax_reference as in_jax  # noqa: E402
from warp_phys import CartPole, Combined, Flow, agree  # noqa: E402
from warp_phys.errors import NotRepeatable  # noqa: E402
from warp_phys.flow import geometric, linear_parts, resolve  # noqa: E402
from warp_phys.interop import jax as bridge  # noqa: E402
from warp_phys.interop.jax import trace as jax_trace  # noqa: E402
from warp_phys.interop.jax import unrolling  # noqa: E402
from warp_phys.interop.jax.system import JaxSystem  # noqa: E402
from warp_phys.interop.torch import Rollout  # noqa: E402

jnp = jax.numpy
SYSTEM, STEPS, BATCH = CartPole(poles=1, dt=0.02), 12, 6
STEP = functools.partial(in_jax.cart_pole_step, SYSTEM)
OF_JAX = JaxSystem(STEP, 4, 1)


class Foreign:
    """The engine's system behind the two verbs of a simulator alone; compares steps as `difference` says."""

    state_size, control_size = 4, 1

    def __init__(self):
        self.difference = 0.0

    def step(self, x, c, y):
        SYSTEM.step(x, c, y)

    def step_vjp(self, x, c, adj_y, adj_x, adj_c, y=None):
        again = wp.empty_like(y)
        SYSTEM.step(x, c, again)
        if np.abs(again.numpy() + self.difference - y.numpy()).max() > 1e-12:
            raise NotRepeatable("the step is another one")
        SYSTEM.step_vjp(x, c, adj_y, adj_x, adj_c)


FOREIGN = Foreign()
WINDOW = Flow(0.9, 0.5, window=5)
SIMULATORS = {"System": SYSTEM, "JaxSystem": OF_JAX, "foreign": FOREIGN}


AS_USERS_HAVE_IT = {
    "test_a_controller_that_has_changed_between_two_calls_is_traced_anew",
    "test_a_change_between_forward_and_backward_pass_changes_nothing",
    "test_nothing_is_compiled_again",
    "test_what_a_controller_closes_over_has_its_derivative",
    "test_two_combined_rollouts_in_a_row_are_refused",
    "test_named_axes",
    "test_x0_alone_and_params_alone",
}
"""Tests of what concerns fused controllers, too; the others ask the general backend, which compiles sooner."""


@pytest.fixture(autouse=True)
def _double(device, monkeypatch, request):
    if request.node.originalname not in AS_USERS_HAVE_IT:
        monkeypatch.setattr(unrolling, "_fused", lambda system, program: "here it is not")
    with in_jax.double(device):
        yield


def _start(batch=BATCH):
    return jnp.asarray(SYSTEM.sample(batch, 0, dtype=np.float64)) * 3.0


def _params():
    generator = np.random.default_rng(1)
    shapes = {"in": (4, 8), "out": (8, 1), "own": (4, 4)}
    return {name: jnp.asarray(generator.standard_normal(shape)) for name, shape in shapes.items()}


def _network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def _loss(states, controls):
    return (1 - jnp.cos(states[1:, :, 2])).mean() + 0.1 * (controls * controls).mean()


def _by_jax(controller, params, flow, x0=None, steps=STEPS):
    """Return JAX's own unrolling's update, with `stop_gradient` where the flow stops feedback."""
    x0, flow = _start() if x0 is None else x0, resolve(flow)
    update = jax.jit(jax.grad(lambda p, gates: _loss(*in_jax.unroll(STEP, controller, p, x0, gates))))
    parts = [update(params, jnp.asarray(part.gates(steps))) for part in linear_parts(flow)]
    return parts[0] if len(parts) == 1 else jax.tree.map(flow.rule, *parts)


def _by_engine(controller, params, flow, system=SYSTEM, x0=None):
    x0 = _start() if x0 is None else x0
    return jax.jit(jax.grad(lambda p: _loss(*bridge.rollout(system, controller, p, x0, STEPS, flow))))(params)


def _program(controller, batch=BATCH):
    return jax_trace.trace("controller", controller, _params(), _start(batch)).program


# Controllers whose backward pass is the user's own


@jax.custom_vjp
def _clipped(x):
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, adjoint: (jnp.clip(adjoint, -1e-3, 1e-3),))


@jax.custom_vjp
def _normalised(x):
    return 1.0 * x


_normalised.defvjp(lambda x: (x, None), lambda _, adjoint: (adjoint / jnp.sqrt(1e-8 + (adjoint**2).sum()),))


@jax.custom_gradient
def _cubed(x):
    return x, lambda adjoint: 1e4 * adjoint**3


def _clip_output(params, x):
    return _clipped(_network(params, x))


def _clip_input(params, x):
    return _network(params, _clipped(x))


def _clip_weights(params, x):
    return _network({**params, "in": _normalised(params["in"])}, x)


def _cube_inside(params, x):
    hidden, _ = jax.lax.scan(lambda h, _: (_cubed(jnp.tanh(h)), None), x @ params["in"], None, length=2)
    return jax.jit(lambda h: h @ params["out"])(hidden)


@jax.checkpoint
def _clip_recomputed(params, x):
    return jax.lax.cond(x.sum() > -1e9, lambda x: _clipped(_network(params, x)), lambda x: x[:, :1], x)


OWN_RULES = [_clip_output, _clip_input, _clip_weights, _cube_inside, _clip_recomputed]


@pytest.mark.parametrize(
    ("controller", "flow"),
    [(controller, flow) for controller in OWN_RULES for flow in "RC"]
    + [(_clip_weights, flow) for flow in ("M", "S", "N", WINDOW)],
)
def test_a_backward_pass_of_ones_own_sees_adjoints(controller, flow):
    assert _program(controller).has_own_rules
    got, right = _by_engine(controller, _params(), flow), _by_jax(controller, _params(), flow)
    assert in_jax.relative(got, right) < 1e-11


@pytest.mark.parametrize("how", SIMULATORS)
def test_such_a_controller_with_every_kind_of_simulator(how):
    got = _by_engine(_clip_output, _params(), "C", SIMULATORS[how])
    assert in_jax.relative(got, _by_jax(_clip_output, _params(), "C")) < 1e-11


def test_the_rules_matter_here():
    plain = _by_jax(_network, _params(), "R")
    for controller in (_clip_output, _clip_input, _clip_weights):
        assert in_jax.relative(_by_jax(controller, _params(), "R"), plain) > 1e-2


# Controllers that couple rows


def _batch_norm(params, x):
    h = x @ params["in"]
    return jnp.tanh((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)) @ params["out"]


def _centred(params, x):
    c = _network(params, x)
    return c - c.mean(0)


def _attention(params, x):
    return jax.nn.softmax(x @ params["own"] @ x.T, axis=1) @ _network(params, x)


def _neighbours(params, x):
    return _network(params, x + 0.5 * jnp.roll(x, 1, axis=0))


def _pairs(params, x):
    """Rows 0 and 1, 2 and 3, … are two agents of one scene."""
    scenes = x.reshape(-1, 2, 4)
    return _network(params, (scenes + 0.5 * scenes[:, ::-1]).reshape(-1, 4))


def _gated_by_the_batch(params, x):
    return _network(params, x) * params["out"][0] * jnp.maximum(x, 0.0).max()


COUPLED = [_batch_norm, _centred, _attention, _neighbours, _pairs, _gated_by_the_batch]


@pytest.mark.parametrize(
    ("controller", "flow"),
    [(controller, "C") for controller in COUPLED] + [(_batch_norm, flow) for flow in ("R", "M", "N", WINDOW)],
)
def test_rows_that_see_each_other(controller, flow):
    assert _program(controller).couples_rows
    got, right = _by_engine(controller, _params(), flow), _by_jax(controller, _params(), flow)
    assert in_jax.relative(got, right) < 1e-11


@pytest.mark.parametrize("how", SIMULATORS)
def test_coupled_rows_with_every_kind_of_simulator(how):
    got = _by_engine(_batch_norm, _params(), "R", SIMULATORS[how])
    assert in_jax.relative(got, _by_jax(_batch_norm, _params(), "R")) < 1e-11


@pytest.mark.parametrize("batch", [2, 3, 5, 64, 300])
def test_one_row_that_sees_another_is_found(batch):
    def controller(params, x):
        return _network(params, x).at[batch - 2].add(1e-6 * x[batch - 1, :1])

    assert _program(controller, batch).couples_rows
    assert not _program(_network, batch).couples_rows


def test_a_coupling_that_starts_from_zero_is_found():
    """A weight that is zero now, and couples rows once it has learnt."""
    params = {**_params(), "mix": jnp.zeros(())}

    def controller(params, x):
        return _network(params, x) + params["mix"] * x.mean(0)[:1]

    assert in_jax.relative(_by_engine(controller, params, "R"), _by_jax(controller, params, "R")) < 1e-11
    other = {**params, "mix": jnp.asarray(0.7)}
    assert in_jax.relative(_by_engine(controller, other, "R"), _by_jax(controller, other, "R")) < 1e-11


def _scaled(params, x):
    return _network(params, x) * jnp.sqrt(params["own"][0, 0] ** 2) * jnp.log(jnp.abs(x[:, :1]) + 1.0)


def _per_sample_goal(params, x):
    goals = jnp.arange(BATCH, dtype=x.dtype)[:, None]
    return _network(params, x - goals)


def _batch_statistics_stopped(params, x):
    return _network(params, x - jax.lax.stop_gradient(x.mean(0)))


def _layer_norm(params, x):
    return _network(params, (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-3))


def _with_relu(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]  # a custom_jvp: linear by construction


@pytest.mark.parametrize(
    "controller", [_network, _scaled, _per_sample_goal, _batch_statistics_stopped, _layer_norm, _with_relu]
)
def test_what_stays_fast_is_right_as_well(controller):
    program = _program(controller)
    assert not program.has_own_rules and not program.couples_rows
    got, right = _by_engine(controller, _params(), "C"), _by_jax(controller, _params(), "C")
    assert in_jax.relative(got, right) < 1e-11


def test_what_is_never_finite_is_pulled_step_by_step():
    assert _program(lambda params, x: jnp.sqrt(-1.0 - x[:, :1] ** 2)).couples_rows


@pytest.mark.parametrize("controller", [_clip_output, _batch_norm, _clip_weights])
def test_physical_parameters_step_by_step(controller):
    x0, masses = _start(), jnp.linspace(0.1, 0.2, BATCH)

    def by_engine(gravity, masses, params):
        parameters = {"gravity": gravity, "pole_mass": masses}
        return _loss(*bridge.rollout(SYSTEM, controller, params, x0, STEPS, "R", parameters))

    def by_jax(gravity, masses, params):
        class Other:
            pass

        other = Other()
        vars(other).update({name: getattr(SYSTEM, name) for name in SYSTEM.parameter_names})
        other.gravity, other.pole_mass = gravity, masses[:, None]
        step = functools.partial(in_jax.cart_pole_step, other)
        return _loss(*in_jax.unroll(step, controller, params, x0, jnp.ones((STEPS, 2))))

    for argument in range(3):
        got, right = (jax.jit(jax.grad(f, argument))(9.8, masses, _params()) for f in (by_engine, by_jax))
        assert in_jax.relative(got, right) < 1e-11


def test_integers_among_the_params_step_by_step():
    params = {**_params(), "column": jnp.asarray(2)}

    def controller(params, x):
        return _clipped(_network(params, x) + jnp.take(x, params["column"], axis=1)[:, None])

    def update(rollout):
        return jax.grad(lambda p: _loss(*rollout(p)), allow_int=True)(params)

    got = update(lambda p: bridge.rollout(SYSTEM, controller, p, _start(), STEPS, "R"))
    right = update(lambda p: in_jax.unroll(STEP, controller, p, _start(), jnp.ones((STEPS, 2))))
    assert got["column"].dtype == jax.dtypes.float0
    assert in_jax.relative([got["in"], got["out"]], [right["in"], right["out"]]) < 1e-11


def test_a_population_step_by_step():
    population = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), _params())
    x0 = _start()

    def update(params):
        return jax.grad(lambda p: _loss(*bridge.rollout(SYSTEM, _batch_norm, p, x0, STEPS, "C")))(params)

    together = jax.jit(jax.vmap(update))(population)
    for i in range(2):
        alone = _by_jax(_batch_norm, jax.tree.map(lambda p, i=i: p[i], population), "C")
        assert in_jax.relative(jax.tree.map(lambda p, i=i: p[i], together), alone) < 1e-11


# Controllers that change


def _of_numpy(params, x):
    return _network(params, x + np.random.standard_normal(4))


class Counting:
    def __init__(self):
        self.count = 0

    def __call__(self, params, x):
        self.count += 1
        return _network(params, x) / self.count


class Growing:
    def __init__(self):
        self.gains = [1.0]

    def __call__(self, params, x):
        self.gains.append(0.5 * self.gains[-1])
        return _network(params, x) * jnp.asarray(self.gains).sum()


class FirstCall:
    """Another function in its first call than ever after."""

    warm = False

    def __call__(self, params, x):
        self.warm, cold = True, not self.warm
        return _network(params, x) if cold else jnp.sin(_network(params, x))


def _of_a_callback(params, x):
    noise = jax.pure_callback(lambda: np.random.standard_normal(4), jax.ShapeDtypeStruct((4,), x.dtype))
    return _network(params, x + noise)


@pytest.mark.parametrize("make", [lambda: _of_numpy, Counting, Growing, FirstCall, lambda: _of_a_callback])
@pytest.mark.parametrize("compiled", [True, False])
def test_what_changes_from_call_to_call_is_refused(make, compiled):
    controller = make()

    def value(params):
        return _loss(*bridge.rollout(SYSTEM, controller, params, _start(), STEPS, "R"))

    function = jax.jit(jax.grad(value)) if compiled else value
    with pytest.raises(NotRepeatable, match="controller .* (another function|other numbers)"):
        function(_params())


class Remembering:
    def __init__(self):
        self.hidden = jnp.zeros((BATCH, 1))

    def __call__(self, params, x):
        self.hidden = jnp.tanh(_network(params, x) + self.hidden)
        return self.hidden


class Collecting:
    def __init__(self):
        self.seen = []

    def __call__(self, params, x):
        self.seen.append(x)
        return _network(params, sum(self.seen))


class Caching:
    """Computes a part of its weights once, and keeps what JAX has traced."""

    kept = None

    def __call__(self, params, x):
        self.kept = params["in"] * 2.0 if self.kept is None else self.kept
        return jnp.tanh(x @ self.kept) @ params["out"]


@pytest.mark.parametrize("make", [Remembering, Collecting, Caching])
@pytest.mark.parametrize("compiled", [True, False])
def test_memory_kept_in_python_is_refused(make, compiled):
    controller = make()

    def value(params):
        return _loss(*bridge.rollout(SYSTEM, controller, params, _start(), STEPS, "R"))

    function = jax.jit(jax.grad(value)) if compiled else value
    for _ in range(2):  # what was kept the first time does not pass the second time
        with pytest.raises(NotRepeatable, match=f"controller {make.__name__} uses a value that an earlier call"):
            function(_params())


def test_a_controller_that_has_changed_between_two_calls_is_traced_anew():
    settings = {"gain": 1.0}

    def controller(params, x):
        return settings["gain"] * _network(params, x)

    def update(flow):
        return jax.grad(lambda p: _loss(*bridge.rollout(SYSTEM, controller, p, _start(), STEPS, flow)))(_params())

    before = update("R")
    settings["gain"] = 0.3
    after = update("R")
    assert in_jax.relative(after, before) > 1e-2
    assert in_jax.relative(after, _by_jax(lambda p, x: 0.3 * _network(p, x), _params(), "R")) < 1e-11


def test_a_backward_pass_of_ones_own_that_has_changed_is_traced_anew():
    settings = {"limit": 1e-3}

    @jax.custom_vjp
    def clipped(x):
        return x

    def pull(_, adjoint):
        return (jnp.clip(adjoint, -settings["limit"], settings["limit"]),)

    clipped.defvjp(lambda x: (x, None), pull)

    def controller(params, x):
        return clipped(_network(params, x))

    for limit in (1e-3, 2e-3, 1e-3):
        settings["limit"] = limit
        got = jax.grad(lambda p: _loss(*bridge.rollout(SYSTEM, controller, p, _start(), STEPS, "R")))(_params())
        assert in_jax.relative(got, _by_jax(lambda p, x: clipped(_network(p, x)), _params(), "R")) < 1e-11


def test_a_backward_pass_that_draws_random_numbers_is_refused():
    @jax.custom_vjp
    def noisy(x):
        return x

    noisy.defvjp(lambda x: (x, None), lambda _, adjoint: (adjoint * np.random.standard_normal(),))
    with pytest.raises(NotRepeatable, match="controller .* another function"):
        bridge.rollout(SYSTEM, lambda p, x: noisy(_network(p, x)), _params(), _start(), STEPS)


def test_a_change_between_forward_and_backward_pass_changes_nothing():
    settings = {"gain": 1.0}

    def controller(params, x):
        return settings["gain"] * _network(params, x)

    _, pull = jax.vjp(lambda p: _loss(*bridge.rollout(SYSTEM, controller, p, _start(), STEPS, "R")), _params())
    settings["gain"] = 0.3
    assert in_jax.relative(pull(1.0)[0], _by_jax(_network, _params(), "R")) < 1e-11


def test_nothing_is_compiled_again():
    calls = []

    def controller(params, x):
        calls.append(1)
        return _network(params, x)

    for _ in range(3):
        jax.grad(lambda p: _loss(*bridge.rollout(SYSTEM, controller, p, _start(), STEPS, "R")))(_params())
    first = jax_trace.trace("controller", controller, _params(), _start()).program
    assert jax_trace.trace("controller", controller, _params(), _start()).program is first
    assert len(calls) == 3 + 1 + 2  # one look per call, and a second one at the very first
    sizes = unrolling._forward._cache_size()
    jax.grad(lambda p: _loss(*bridge.rollout(SYSTEM, controller, p, _start(), STEPS, "R")))(_params())
    assert unrolling._forward._cache_size() == sizes


@pytest.mark.parametrize("flow", ["R", "M", "C"])
@pytest.mark.parametrize("compile_it", ["not", "inside", "outside"])
def test_what_a_controller_closes_over_has_its_derivative(flow, compile_it):
    """The weights are traced by `grad`, and reach the controller by no argument."""

    def value(params):
        return _loss(*bridge.rollout(SYSTEM, lambda _, x: _network(params, x), (), _start(), STEPS, flow))

    function = {
        "not": jax.grad(value),
        "inside": jax.grad(jax.jit(value)),
        "outside": jax.jit(jax.grad(value)),
    }[compile_it]
    got, right = function(_params()), _by_jax(_network, _params(), flow)
    assert in_jax.relative([got["in"], got["out"]], [right["in"], right["out"]]) < 1e-11


def test_a_goal_that_jit_traces():
    goal = jnp.asarray([0.5, 0.0, 0.1, 0.0])

    @jax.jit
    def update(params, goal):
        return jax.grad(
            lambda p: _loss(*bridge.rollout(SYSTEM, lambda p, x: _network(p, x - goal), p, _start(), STEPS, "C"))
        )(params)

    right = _by_jax(lambda p, x: _network(p, x - goal), _params(), "C")
    assert in_jax.relative(update(_params(), goal), right) < 1e-11


def test_grad_and_vmap_inside_a_controller():
    def value(params, row):
        return jnp.tanh(row @ params["in"]) @ params["out"][:, 0]

    def controller(params, x):
        return jax.vmap(jax.grad(value, 1), (None, 0))(params, x)[:, 2:3]

    assert not _program(controller).couples_rows
    assert in_jax.relative(_by_engine(controller, _params(), "C"), _by_jax(controller, _params(), "C")) < 1e-11


# Combined flows of parts


def _two_in_a_row(params, flow, stop=False):
    states, _ = bridge.rollout(SYSTEM, _network, params, _start(), STEPS, flow)
    middle = jax.lax.stop_gradient(states[-1]) if stop else states[-1]
    return _loss(*bridge.rollout(SYSTEM, _network, params, middle, STEPS, flow))


@pytest.mark.parametrize(
    "flow", ["C", "geometric", Combined(Flow(0.9, 0.0), Flow(0.9, 0.9))], ids=["C", "geometric", "decays"]
)
@pytest.mark.parametrize("compiled", [True, False])
def test_two_combined_rollouts_in_a_row_are_refused(flow, compiled):
    function = jax.grad(functools.partial(_two_in_a_row, flow=flow))
    with pytest.raises(ValueError, match=r"x0 and params cannot be differentiated together .*stop_gradient\(x0\)"):
        (jax.jit(function) if compiled else function)(_params())


def test_an_encoder_with_a_combined_rollout_is_refused():
    def value(params):
        return _loss(*bridge.rollout(SYSTEM, _network, params, _start() @ params["own"], STEPS))

    with pytest.raises(ValueError, match="x0 and params cannot be differentiated together"):
        jax.grad(value)(_params())


def test_a_loop_of_combined_rollouts_is_refused():
    def value(params):
        def advance(x, _):
            states, _ = bridge.rollout(SYSTEM, _network, params, x, 3)
            return states[-1], states[-1]

        return (jax.lax.scan(advance, _start(), None, length=3)[1] ** 2).sum()

    with pytest.raises(ValueError, match="x0 and params cannot be differentiated together"):
        jax.grad(value)(_params())


@pytest.mark.parametrize("rule", [agree, geometric])
def test_the_ways_out_that_the_message_names(rule):
    def whole(params, flow):
        return _loss(*(part[-STEPS - 1 :] for part in _joined(params, flow)))

    def _joined(params, flow):
        states, controls = bridge.rollout(SYSTEM, _network, params, _start(), 2 * STEPS, flow)
        return states, controls[-STEPS:]

    modified, regular = (jax.grad(_two_in_a_row)(_params(), flow) for flow in "MR")
    got = jax.tree.map(rule, modified, regular)
    assert in_jax.relative(got, jax.grad(whole)(_params(), Combined(rule=rule))) < 1e-9
    stopped = jax.grad(_two_in_a_row)(_params(), Combined(rule=rule), stop=True)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(stopped))


def test_x0_alone_and_params_alone():
    def value(params, x0):
        return _loss(*bridge.rollout(SYSTEM, _network, params, x0, STEPS, "C"))

    for argument in (0, 1):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(value, argument)(_params(), _start())))
    with pytest.raises(ValueError, match="x0 and params"):
        jax.grad(value, (0, 1))(_params(), _start())


def test_an_open_loop_has_nothing_to_combine():
    pushes = 0.1 * jnp.ones((STEPS, BATCH, 1))
    for flow in ("combined", "averaged", Combined(Flow(window=3), Flow())):
        with pytest.raises(ValueError, match="an open loop has the physics alone, give 'regular' or a Flow"):
            bridge.trajectory(SYSTEM, _start(), pushes, flow)


def test_named_axes():
    """A part of a batch per place: refused by name; with the linear flows as the message says it is right."""

    def update(params, x0, flow):
        return jax.grad(lambda p: _loss(*bridge.rollout(SYSTEM, _network, p, x0, STEPS, flow)))(params)

    def mapped(function):
        return jax.jit(jax.vmap(function, (None, 0), axis_name="batch"))

    halves = _start().reshape(2, 3, 4)
    with pytest.raises(ValueError, match=r"rollout is mapped over the named axis batch, .*pmean .* to agree"):
        mapped(lambda p, x: jax.lax.pmean(update(p, x, "C"), "batch"))(_params(), halves)

    def combined(params, x0):
        return jax.tree.map(agree, *(jax.lax.pmean(update(params, x0, flow), "batch") for flow in "MR"))

    got = jax.tree.map(lambda leaf: leaf[0], mapped(combined)(_params(), halves))
    assert in_jax.relative(got, _by_engine(_network, _params(), "C")) < 1e-11
    run = mapped(lambda p, x: bridge.rollout(SYSTEM, _network, p, x, STEPS)[0])(_params(), halves)
    assert run.shape == (2, STEPS + 1, 3, 4)  # without derivatives there is nothing to combine


def test_devices():
    program = """
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        from warp_phys import CartPole, agree
        from warp_phys.interop.jax import rollout
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_platforms", "cpu")
        system, weights = CartPole(poles=1), jnp.asarray([[0.1], [0.2], [3.0], [0.4]])
        x0 = jnp.asarray(system.sample(4, dtype=np.float64))
        policy = lambda p, x: jnp.tanh(x @ p)
        def update(p, x, flow):
            return jax.grad(lambda p: (rollout(system, policy, p, x, 20, flow)[0] ** 2).mean())(p)
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
        def spread(function, **how):
            return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), **how))
        for function in (
            spread(lambda p, x: jax.lax.pmean(update(p, x, "C"), "batch"), check_vma=False),
            lambda p, x: jax.grad(lambda p: spread(
                lambda p, x: jax.lax.pmean((rollout(system, policy, p, x, 20)[0] ** 2).mean(), "batch"), check_vma=False
            )(p, x))(p),
            lambda p, x: jax.pmap(
                lambda x: jax.lax.pmean(update(p, x, "C"), "d"), axis_name="d"
            )(x.reshape(2, 2, 4)),
        ):
            try:
                function(weights, x0)
            except ValueError as error:
                assert "is mapped over the named axis" in str(error), error
            else:
                raise SystemExit("not refused")
        def right(p, x):
            return agree(*(jax.lax.pmean(update(p, x, flow), "batch") for flow in "MR"))
        np.testing.assert_allclose(spread(right, check_vma=False)(weights, x0), update(weights, x0, "C"), rtol=1e-10)
        print("done")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip().endswith("done"), result.stdout + result.stderr


# Simulators that change


def test_a_simulator_of_jax_is_one_in_both_passes():
    settings = {"gain": 1.0}
    system = JaxSystem(lambda x, c: STEP(x, settings["gain"] * c), 4, 1)
    _, pull = jax.vjp(lambda p: _loss(*bridge.rollout(system, _network, p, _start(), STEPS, "R")), _params())
    settings["gain"] = 3.0
    assert in_jax.relative(pull(1.0)[0], _by_jax(_network, _params(), "R")) < 1e-11


class CountingStep:
    def __init__(self):
        self.count = 0

    def __call__(self, x, c):
        self.count += 1
        return STEP(x, c / self.count)


def _noisy_step(x, c):
    return STEP(x, c) + np.random.standard_normal(4)


class RememberingStep:
    last = 0.0

    def __call__(self, x, c):
        self.last, before = c, self.last
        return STEP(x, c + before)


@pytest.mark.parametrize("function", [CountingStep(), _noisy_step, RememberingStep()])
def test_a_step_that_changes_from_call_to_call_is_refused(function):
    with pytest.raises(NotRepeatable, match="function .* (is another function|uses a value)"):
        bridge.rollout(JaxSystem(function, 4, 1), _network, _params(), _start(), STEPS)
    with pytest.raises(NotRepeatable, match="function .* (is another function|uses a value)"):
        Rollout(JaxSystem(function, 4, 1), torch.nn.Linear(4, 1).double(), 3)(torch.as_tensor(np.array(_start())))


def test_a_step_that_closes_over_what_is_differentiated():
    def value(gain):
        system = JaxSystem(lambda x, c: STEP(x, gain * c), 4, 1)
        return _loss(*bridge.rollout(system, _network, _params(), _start(), STEPS, "R"))

    with pytest.raises(TypeError, match="function closes over a value that is being differentiated"):
        jax.grad(value)(1.0)
    assert jnp.isfinite(jax.jit(value)(1.0))


class OutsideWorld:
    """A step whose gravity lives outside JAX, with a vector-Jacobian product of its own."""

    def __init__(self):
        self.gravity = 9.8
        kind = jax.ShapeDtypeStruct

        @jax.custom_vjp
        def step(x, c):
            return jax.pure_callback(self._numbers, kind(x.shape, x.dtype), x, c)

        step.defvjp(lambda x, c: (step(x, c), (x, c)), lambda at, adjoint: jax.vjp(STEP, *at)[1](adjoint))
        self.system = JaxSystem(step, 4, 1)

    def _numbers(self, x, c):
        x, c = np.asarray(x), np.asarray(c)
        return np.stack([x[:, 0] + 0.02 * x[:, 1], x[:, 1] + 0.02 * c[:, 0], x[:, 2], x[:, 3] - self.gravity], axis=1)


def _arrays(system, y=None):
    x, c = (wp.array(np.array(array)) for array in (_start(), jnp.ones((BATCH, 1))))
    found = wp.empty_like(x)
    system.step(x, c, found)
    return x, c, wp.ones_like(x), wp.empty_like(x), wp.empty_like(c), found


@pytest.mark.parametrize("change", [1e-9, 1e-3, np.nan, np.inf])
def test_a_step_that_is_another_one_in_the_backward_pass(change):
    world = OutsideWorld()
    *arrays, y = _arrays(world.system)
    world.system.step_vjp(*arrays, y=y)
    world.system.step_vjp(*arrays)
    world.gravity += change
    with pytest.raises(NotRepeatable, match=r"step of function gives other states .* in samples 0, 1, 2, 3, 4, 5\."):
        world.system.step_vjp(*arrays, y=y)
    world.system.step_vjp(*arrays)  # nothing to compare with


def test_rounding_is_no_difference():
    """What another program rounds is asked of the forward pass's own program, which gives the very same numbers."""
    *arrays, y = _arrays(OF_JAX)
    numbers = y.numpy()
    OF_JAX.step_vjp(*arrays, y=wp.array(numbers * (1 + 1e-15)))
    with pytest.raises(NotRepeatable, match=r"in samples 1\."):
        OF_JAX.step_vjp(*arrays, y=wp.array(numbers + 1e-12 * (np.arange(BATCH) == 1)[:, None]))
    never = JaxSystem(lambda x, c: STEP(x, c).at[0, 0].set(jnp.nan), 4, 1)
    *arrays, y = _arrays(never)
    never.step_vjp(*arrays, y=y)  # not a number, both times


def test_a_foreign_step_that_is_another_one():
    system = Foreign()

    def update(params):
        return jax.grad(lambda p: _loss(*bridge.rollout(system, _network, p, _start(), STEPS, "R")))(params)

    def by_steps(params):
        x = _start()
        for _ in range(3):
            x = bridge.step(system, x, _network(params, x))
        return (x**2).sum()

    assert in_jax.relative(update(_params()), _by_jax(_network, _params(), "R")) < 1e-11
    jax.grad(by_steps)(_params())
    system.difference = 1e-6
    for function in (update, jax.jit(update), jax.grad(by_steps)):
        with pytest.raises(Exception, match="NotRepeatable: the step is another one"):
            jax.block_until_ready(function(_params()))


# Errors


class Module:
    def apply(self, params, x):
        return _network(params, x)


class CallableModule(Module):
    def __call__(self, x):
        raise AssertionError("unbound")


def _on_an_axis(params, x):
    return jax.lax.pmean(_network(params, x), "batch")


def _by_branch(params, x):
    return _network(params, x) if x[0, 0] > 0 else x[:, :1]


def _by_numpy(params, x):
    return np.tanh(np.asarray(x)) @ params["own"][:, :1]


@pytest.mark.parametrize(
    ("controller", "params", "error", "message"),
    [
        (Module(), {}, TypeError, "function of .params, states., got Module: hand its apply"),
        (CallableModule(), {}, TypeError, r"of \(params, states\), CallableModule is not .*: hand its apply"),
        (lambda x: x[:, :1], {}, TypeError, r"controller must be a function of \(params, states\), .*<lambda> is not"),
        (_on_an_axis, None, ValueError, "controller uses a named axis .*Found an unbound axis name: batch"),
        (_by_branch, None, TypeError, "controller must be traceable by JAX, which says: Attempted boolean conversion"),
        (_by_numpy, None, TypeError, "controller must be traceable by JAX, which says: The numpy.ndarray conversion"),
        (
            _network,
            {"in": "weights"},
            TypeError,
            "params must be a pytree of numbers and arrays, got a leaf of type str",
        ),
        (_network, {"in": jnp.tanh}, TypeError, "params must be a pytree of numbers and arrays, got a leaf of type"),
    ],
)
def test_errors_of_one_sentence(controller, params, error, message):
    with pytest.raises(error, match=message):
        bridge.rollout(SYSTEM, controller, _params() if params is None else params, _start(), STEPS)
