"""Rollouts in JAX: every flow equals JAX's own unrolling with `stop_gradient` in the same places, in float64."""

import functools
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "warp_phys[jax]"')

from tests.interop import jax_reference as in_jax  # noqa: E402
from tests.rollout import reference as in_torch  # noqa: E402
from tests.toy import TwoControls  # noqa: E402
from warp_phys import COMBINED, MODIFIED, REGULAR, CartPole, Combined, Diverged, Flow, Polynomial, agree  # noqa: E402
from warp_phys.flow import linear_parts, resolve  # noqa: E402
from warp_phys.interop import jax as bridge  # noqa: E402
from warp_phys.interop.jax.system import JaxSystem  # noqa: E402
from warp_phys.interop.torch.system import TorchSystem  # noqa: E402

jnp = jax.numpy
SYSTEM, STEPS, COST = CartPole(poles=2), 55, 0.1
FUSED = bridge.MLP((6, 16, 1))
STEP = functools.partial(in_jax.cart_pole_step, SYSTEM)
OF_JAX = JaxSystem(STEP, 6, 1)


def general(params, x):
    """The same network, but no object that the engine knows."""
    return FUSED(params, x)


@pytest.fixture(autouse=True)
def _double(device):
    with in_jax.double(device):
        yield


def _start(batch=5, seed=0):
    return jnp.asarray(SYSTEM.sample(batch, seed, dtype=np.float64))


def _params():
    generator = np.random.default_rng(1)
    return [(1.5 * w, jnp.asarray(0.1 * generator.standard_normal(len(b)))) for w, b in FUSED.init(0, np.float64)]


@functools.cache
def _reference():
    """Return a compiled function (params, x0, gates, every) to loss and gradients."""

    def loss(params, x0, gates, every):
        states, controls = in_jax.unroll(STEP, general, params, x0, gates)
        by_time = (1 - jnp.cos(states[1:, :, 2::2])).mean((1, 2))
        return jnp.where(every, by_time.mean(), by_time[-1]) + COST * (controls * controls).mean()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def _expected(flow, when):
    flow = resolve(flow)
    gates = [jnp.asarray(part.gates(STEPS)) for part in linear_parts(flow)]
    results = [_reference()(_params(), _start(), gate, when == "every") for gate in gates]
    if len(results) == 1:
        return results[0]
    return results[0][0], jax.tree.map(flow.rule, results[0][1], results[1][1])


def _loss(system, controller, flow, when):
    backend = "fused" if controller is FUSED else "general"

    def loss(params, x0):
        states, controls = bridge.rollout(system, controller, params, x0, STEPS, flow, backend=backend)
        return SYSTEM.loss(states, controls, when=when, control_cost=COST)

    return loss


WINDOW = Flow(0.9, 0.3, window=7)


@pytest.mark.parametrize(
    ("how", "flow", "when"),
    [
        ("fused", "R", "every"),
        ("fused", "M", "final"),
        ("fused", "S", "every"),
        ("fused", "C", "final"),
        ("fused", WINDOW, "final"),
        ("general", "C", "every"),
        ("general", WINDOW, "every"),
        ("JaxSystem", "C", "final"),
        ("JaxSystem", WINDOW, "final"),
    ],
    ids=str,
)
def test_flow_equals_jax_with_stop_gradient(how, flow, when):
    system = OF_JAX if how == "JaxSystem" else SYSTEM
    function = _loss(system, FUSED if how == "fused" else general, flow, when)
    if isinstance(resolve(flow), Combined):  # one at a time, see test_jax_contract.py
        value, update = jax.jit(jax.value_and_grad(function))(_params(), _start())
        adj_x0 = jax.jit(jax.grad(function, 1))(_params(), _start())
    else:
        value, (update, adj_x0) = jax.jit(jax.value_and_grad(function, (0, 1)))(_params(), _start())
    expected, (right_update, right_x0) = _expected(flow, when)
    assert float(value) == pytest.approx(float(expected), rel=1e-13)
    assert in_jax.relative(update, right_update) < 1e-11
    if np.any(right_x0):
        assert in_jax.relative(adj_x0, right_x0) < 1e-11
    else:
        assert not np.any(adj_x0)


def test_the_comparison_is_sharp():
    modified, regular = (_expected(flow, "final")[1][0] for flow in "MR")
    assert in_jax.relative(modified, regular) > 1e-2


def test_without_jit_and_the_same_twice():
    function = jax.grad(_loss(SYSTEM, FUSED, "C", "final"))
    compiled = jax.jit(function)(_params(), _start())
    for got in (function(_params(), _start()), function(_params(), _start())):
        assert in_jax.relative(got, compiled) < 1e-15


def test_the_trajectory_is_that_of_the_reference():
    states, controls = bridge.rollout(SYSTEM, FUSED, _params(), _start(), STEPS)
    expected = jax.jit(lambda: in_jax.unroll(STEP, general, _params(), _start(), jnp.ones((STEPS, 2))))()
    assert in_jax.relative((states, controls), expected) < 1e-13


def test_physical_parameters():
    """One number for all, and one per sample, against JAX."""
    x0, masses = _start(3), jnp.asarray([0.1, 0.12, 0.14])

    def by_engine(gravity, masses):
        parameters = {"gravity": gravity, "pole_mass": masses}
        states, controls = bridge.rollout(SYSTEM, FUSED, _params(), x0, 20, "R", parameters)
        return SYSTEM.loss(states, controls, "every", COST)

    def by_jax(gravity, masses):
        class Other:
            pass

        other = Other()
        vars(other).update({name: getattr(SYSTEM, name) for name in SYSTEM.parameter_names})
        other.gravity, other.pole_mass = gravity, masses[:, None]
        step = functools.partial(in_jax.cart_pole_step, other)
        trajectory = in_jax.unroll(step, general, _params(), x0, jnp.ones((20, 2)))
        return in_jax.cart_pole_loss(*trajectory, "every", COST)

    got, expected = (jax.jit(jax.grad(f, (0, 1)))(9.8, masses) for f in (by_engine, by_jax))
    assert in_jax.relative(got, expected) < 1e-11


def test_a_number_for_all_samples_is_summed_before_the_comparison():
    """C of the sums over the batch of M and R, not the sum of what each sample's comparison leaves."""
    x0, strong = _start(8), jax.tree.map(lambda array: 4.0 * array, _params())

    def loss(mass, flow):
        states, _ = bridge.rollout(SYSTEM, FUSED, strong, x0, STEPS, flow, {"pole_mass": mass})
        return SYSTEM.loss(states, when="every")

    flows = Combined()
    base, other, combined, alone = (jax.grad(loss)(0.1, flow) for flow in ("modified", "regular", flows, flows.base))
    assert float(base) == float(alone) and abs(float(base)) > 1e-6
    np.testing.assert_allclose(combined, agree(np.asarray(base), np.asarray(other)), rtol=1e-10)
    per_sample = jax.grad(loss)(jnp.full(8, 0.1), flows).sum()
    assert abs(float(per_sample - combined)) > 1e-6 * abs(float(base))  # so the order matters here


def test_open_loop():
    """With given controls: the adjoints of x0, controls and a mass, by autodiff, and truncated by a window."""
    x0, controls = _start(), jnp.asarray(np.random.default_rng(0).standard_normal((STEPS, 5, 1)))

    def by_engine(x0, controls, gravity, flow):
        return SYSTEM.loss(bridge.trajectory(SYSTEM, x0, controls, flow, {"gravity": gravity}), when="every")

    def by_jax(x0, controls, gravity, gates):
        system = CartPole(poles=2)
        object.__setattr__(system, "gravity", gravity)

        def advance(x, at):
            y = in_jax.cart_pole_step(system, in_jax.gated(x, at[1]), at[0])
            return y, y

        states = jax.lax.scan(advance, x0, (controls, gates))[1]
        return 1 - jnp.cos(states[:, :, 2::2]).mean()

    right = jax.jit(jax.grad(by_jax, (0, 1, 2)))
    for flow in (REGULAR, Flow(window=10)):
        got = jax.jit(jax.grad(functools.partial(by_engine, flow=flow), (0, 1, 2)))(x0, controls, 9.8)
        assert in_jax.relative(got, right(x0, controls, 9.8, jnp.asarray(flow.gates(STEPS)[:, 0]))) < 1e-11


def test_one_step_and_vmap():
    x, c = _start(), jnp.asarray(np.random.default_rng(0).standard_normal((5, 1)))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)))
    got = jax.vjp(lambda x, c: bridge.step(SYSTEM, x, c), x, c)
    right = jax.jit(lambda x: (STEP(x, c), jax.vjp(STEP, x, c)[1](weights)))
    y, adjoints = right(x)
    assert in_jax.relative(got[0], y) < 1e-14
    assert in_jax.relative(got[1](weights), adjoints) < 1e-13
    many = jnp.stack([x, x + 0.1, x - 0.1])
    own = {"gravity": jnp.arange(5.0)}
    one = jax.jit(lambda x: bridge.step(SYSTEM, x, c, own))
    by_vmap = jax.jit(jax.vmap(one))(many)
    assert in_jax.relative(by_vmap, jnp.stack([one(x) for x in many])) == 0.0
    pull = jax.jit(jax.vmap(jax.grad(lambda x: (weights * bridge.step(SYSTEM, x, c)).sum())))
    assert in_jax.relative(pull(many), jnp.stack([right(x)[1][0] for x in many])) < 1e-13


def test_a_population_of_controllers():
    """`vmap` over weights: each has its own combined update."""
    params, x0 = _params(), _start()
    population = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)

    @jax.jit
    def update(params):
        return jax.grad(lambda p: SYSTEM.loss(bridge.rollout(SYSTEM, FUSED, p, x0, 10, "C")[0]))(params)

    together = jax.jit(jax.vmap(update))(population)
    for i in range(2):
        alone = update(jax.tree.map(lambda p, i=i: p[i], population))
        assert in_jax.relative(jax.tree.map(lambda p, i=i: p[i], together), alone) < 1e-13


def test_a_torch_function_inside_jax():
    """Any simulator with the two verbs: here torch steps inside a program of JAX."""
    foreign = TorchSystem(lambda x, c: in_torch.cart_pole_step(SYSTEM, x, c), 6, 1)
    updates = []
    for system in (foreign, SYSTEM):

        def loss(params, system=system):
            return SYSTEM.loss(bridge.rollout(system, general, params, _start(), 12, "C")[0], when="every")

        updates.append(jax.jit(jax.grad(loss))(_params()))
    assert in_jax.relative(*updates) < 1e-12


def test_several_controls_and_a_loss_that_sums():
    """All of it for another system, in terms of finite differences of the loss."""
    system = TwoControls()
    x0, weights = jnp.asarray(system.sample(3, dtype=np.float64)), jnp.asarray([[0.3, -0.2], [0.1, 0.4]])

    @jax.jit
    def loss(w, target):
        states, controls = bridge.rollout(system, _feedback, w, x0, 8, "R")
        return system.loss(states, controls, "every", 0.2, {"target": target})

    grad_w, grad_target = jax.jit(jax.grad(loss, (0, 1)))(weights, 0.7)
    h = 1e-6
    slope = (loss(weights.at[0, 1].add(h), 0.7) - loss(weights.at[0, 1].add(-h), 0.7)) / (2 * h)
    assert float(grad_w[0, 1]) == pytest.approx(float(slope), rel=1e-7)
    slope = (loss(weights, 0.7 + h) - loss(weights, 0.7 - h)) / (2 * h)
    assert float(grad_target) == pytest.approx(float(slope), rel=1e-7)


def _feedback(w, x):
    return jnp.tanh(x[:, :2] @ w + x[:, 2:])


def test_sums_before_the_combination():
    """Two halves of a batch by M and by R apart, summed, then compared, are the update of the whole batch."""
    params, x0 = _params(), _start(6)

    @functools.partial(jax.jit, static_argnums=1)
    def update(x0, flow):
        return jax.grad(lambda p: SYSTEM.loss(bridge.rollout(SYSTEM, FUSED, p, x0, 10, flow)[0]))(params)

    halves = [jax.tree.map(lambda a, b: (a + b) / 2, update(x0[:3], f), update(x0[3:], f)) for f in (MODIFIED, REGULAR)]
    assert in_jax.relative(jax.tree.map(agree, *halves), update(x0, COMBINED)) < 1e-13


def test_params_that_are_not_numbers_of_a_gradient():
    """Integers among the params have no derivative, and do no harm; another rule combines as well."""
    params = {"gain": jnp.asarray(0.7), "column": jnp.asarray(2)}

    def controller(params, x):
        return params["gain"] * jnp.take(x, params["column"], axis=1)[:, None]

    flow = Combined(rule=lambda base, other: 0.25 * base + 0.75 * other)

    def update(flow):
        def loss(params):
            return SYSTEM.loss(bridge.rollout(SYSTEM, controller, params, _start(), 10, flow)[0])

        return jax.jit(jax.grad(loss, allow_int=True))(params)["gain"]

    assert float(update(flow)) == pytest.approx(float(0.25 * update("M") + 0.75 * update("R")), rel=1e-12)


def test_losses_of_jax_arrays():
    states = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 1)))
    system = Polynomial()
    expected = float(system.loss(np.asarray(states), when="every"))
    assert float(system.loss(states, when="every")) == pytest.approx(expected, rel=1e-14)
    assert float(bridge.loss(system, np.asarray(states), when="every")) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(TypeError, match="states must hold float32 or float64, got int32"):
        system.loss(states.astype("int32"))


def test_float32():
    with jax.enable_x64(False):
        params = FUSED.init(0)
        states, controls = bridge.rollout(SYSTEM, general, params, SYSTEM.sample(4), 5)
        assert states.dtype == controls.dtype == jnp.float32
        with pytest.raises(TypeError, match="x0 holds float64, which JAX is not set to use"):
            bridge.rollout(SYSTEM, FUSED, params, SYSTEM.sample(4, dtype=np.float64), 5)


def test_divergence():
    def explosive(params, x):
        return jnp.where(x[:, :1] > 0.9, jnp.inf, 0.0)

    x0 = _start(3).at[:, 0].set(jnp.asarray([0.0, 0.95, 0.0]))
    with pytest.raises(Diverged, match="step 1"):
        bridge.rollout(SYSTEM, explosive, (), x0, 3)
    states, _ = jax.jit(lambda x0: bridge.rollout(SYSTEM, explosive, (), x0, 3))(x0)
    with pytest.raises(Diverged, match="step 1"):
        bridge.check_finite(states)


def _rollout(**changes):
    arguments = {"system": SYSTEM, "controller": general, "params": _params(), "x0": _start(), "steps": 3}
    return bridge.rollout(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x0": np.zeros((5, 4))}, ValueError, r"x0 must have shape \(batch, 6\), got \(5, 4\); its columns are pos"),
        ({"x0": np.zeros((5, 6), int)}, TypeError, "x0 must hold float32 or float64, got int64"),
        ({"x0": np.full((5, 6), np.nan)}, ValueError, r"x0 must be finite, rows \[0, 1, 2, 3, 4\] are not"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"flow": "backwards"}, ValueError, "flow 'backwards' is unknown"),
        ({"flow": Flow(physics=[1.0, 0.5])}, ValueError, "the flow's physics gate has 2 numbers, the rollout has 3"),
        ({"controller": "mlp"}, TypeError, "controller must be a function of .params, states., got str"),
        ({"controller": lambda p, x: x[:, 0]}, ValueError, r"controller returns must have shape \(5, 1\), got \(5,\)"),
        ({"controller": lambda p, x: x[:, :1] > 0}, TypeError, "controller must return float64 as x0 holds, got bool"),
        ({"controller": lambda p, x: (x, x)}, TypeError, "controller must return an array, got tuple"),
        ({"controller": bridge.MLP((4, 8, 1))}, ValueError, "controller has state_size 4"),
        (
            {"params": [(1.0, 2.0)], "controller": FUSED},
            ValueError,
            r"params must have shapes \[\(\(16, 6\), \(16,\)\)",
        ),
        ({"parameters": {"weight": 1.0}}, ValueError, "parameters weight are unknown; there are"),
        ({"parameters": {"gravity": [1.0, 2.0]}}, ValueError, "gravity must be a number or 5 numbers, one per sample"),
        ({"parameters": {"gravity": np.inf}}, ValueError, "parameter gravity must be finite, got inf"),
        ({"parameters": {"gravity": np.ones((5, 1))}}, ValueError, "one per sample, got shape .5, 1."),
        ({"parameters": {"gravity": None}}, TypeError, "parameter gravity must be a number or one number per sample"),
        ({"parameters": {"dt": -0.01}}, ValueError, "parameter dt must be positive, got -0.01"),
        ({"parameters": {"dt": jnp.zeros(5)}}, ValueError, "parameter dt must be positive, got"),
        ({"system": CartPole}, TypeError, "system must be an instance, got the class CartPole"),
        ({"system": OF_JAX, "parameters": {"gravity": 9.0}}, ValueError, "gravity are unknown; there are none"),
        ({"system": "cart"}, TypeError, "system must have step"),
    ],
    ids=lambda value: "",
)
def test_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        _rollout(**changes)


def test_other_arguments():
    states, controls = jnp.ones((4, 5, 6)), jnp.ones((3, 5, 1))
    foreign = JaxSystem(STEP, 6, 1, cost=lambda x: x[:, 0])
    for cost, error in ((np.nan, ValueError), (-1.0, ValueError), ("x", TypeError)):
        for loss in (SYSTEM.loss, functools.partial(bridge.loss, SYSTEM), foreign.loss):
            with pytest.raises(error, match="control_cost must be a number of at least 0, got"):
                loss(states, controls, control_cost=cost)
    with pytest.raises(TypeError, match="system must be an instance, got the class CartPole"):
        bridge.trajectory(CartPole, _start(), controls)
    with pytest.raises(TypeError, match="system must be a warp_phys.System, got JaxSystem: scan over step instead"):
        bridge.trajectory(OF_JAX, _start(), jnp.zeros((3, 5, 1)))
    with pytest.raises(ValueError, match=r"controls must have shape \(steps, 5, 1\), got \(3, 4, 1\)"):
        bridge.trajectory(SYSTEM, _start(), jnp.zeros((3, 4, 1)))
    with pytest.raises(ValueError, match=r"c must have shape \(5, 1\), got \(5, 2\)"):
        bridge.step(SYSTEM, _start(), jnp.zeros((5, 2)))
    with pytest.raises(TypeError, match="c must hold float64 as x does, got float32"):
        bridge.step(SYSTEM, _start(), jnp.zeros((5, 1), "float32"))
    with pytest.raises(ValueError, match="sizes must be"):
        bridge.MLP((6,))
    with pytest.raises(ValueError, match="activation must be"):
        bridge.MLP((6, 1), activation="cube")


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match="forward-mode|jvp"):
        jax.jvp(lambda x: bridge.step(SYSTEM, x, jnp.zeros((5, 1))), (_start(),), (_start(),))


def test_torch_is_not_needed():
    program = "import sys, warp_phys.interop.jax; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")
