"""JAX policies read as row programs: their flows against the general backend and against JAX's own unrolling."""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "warp_phys[jax]"')

from tests.interop import jax_reference as in_jax  # noqa: E402
from warp_phys import CartPole, Flow  # noqa: E402
from warp_phys.flow import linear_parts, resolve  # noqa: E402
from warp_phys.interop import jax as bridge  # noqa: E402
from warp_phys.interop.jax import program as jax_program  # noqa: E402

jnp = jax.numpy
SYSTEM, STEPS, BATCH = CartPole(poles=2), 12, 5
STEP = functools.partial(in_jax.cart_pole_step, SYSTEM)


@pytest.fixture(autouse=True)
def _double(device):
    if device != "cpu":
        pytest.skip("row programs of JAX run on a CPU")
    with in_jax.double(device):
        yield


def _start(batch=BATCH):
    return jnp.asarray(SYSTEM.sample(batch, 3, dtype=np.float64))


def _params(**shapes):
    generator = np.random.default_rng(1)
    return {name: np.asarray(0.4 * generator.standard_normal(shape)) for name, shape in shapes.items()}


def _parts(params, x):
    """Sine and cosine of the angles, a part of the rates; a clamped output."""
    features = jnp.concatenate([jnp.sin(x[:, 2::2]), jnp.cos(x[:, 2::2]), 0.3 * x[:, [1, 3]]], axis=1)
    features = features.at[:, 1].set(features[:, 1] ** 2).at[:, 0].set(1.0)
    h = jnp.tanh(features @ params["w"] + params["b"])
    return jnp.clip(params["limit"] * jnp.arctan2(h @ params["v"], 1.0 + params["limit"] ** 2), -0.4, 0.5)


def _residual(params, x):
    """Layer norm, residual blocks of stacked weights in a scan, other activations."""

    def block(h, layer):
        weight, scale = layer
        mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        y = (h - mean) * jax.lax.rsqrt(variance + 1e-5) * scale
        return h + jax.nn.silu(y @ weight), None

    h, _ = jax.lax.scan(block, jax.nn.elu(x @ params["in"]), (params["blocks"], params["scales"]))
    h = jax.nn.gelu(h[:, :4], approximate=False) + jax.nn.gelu(h[:, 4:])
    return jax.nn.softplus(h @ params["out"]) - jnp.log1p(jnp.square(x[:, :1]))


def _attention(params, x):
    """Attention with two heads over the parts of the state, each a token; weight normalisation."""
    tokens = x.reshape(len(x), 3, 2) @ params["embed"] + params["places"]
    qkv = params["qkv"] / jnp.linalg.norm(params["qkv"], axis=0)
    q, k, v = jnp.split((tokens @ qkv).reshape(len(x), 3, 2, 12), 3, axis=-1)
    mask = jnp.tril(jnp.ones((3, 3), bool))
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    heads = jnp.einsum("bqhd,hde->bqe", mixed, params["heads"])
    return heads.mean(1) @ params["out"]


def _gru(params, x):
    """A GRU cell that starts from a state of its own each time; a head that chooses by softmax."""
    h = jnp.zeros((len(x), 8), x.dtype) + params["h0"]
    (r, z, n), (r0, z0, n0) = (jnp.split(a, 3, axis=-1) for a in (x @ params["wi"] + params["b"], h @ params["wh"]))
    z, n = jax.nn.sigmoid(z + z0), jnp.tanh(n + jax.nn.sigmoid(r + r0) * n0)
    h = (1 - z) * n + z * h
    weights = jnp.exp(jax.nn.log_softmax(h @ params["head"]))
    return (weights @ params["levels"])[:, None] + 0.1 * jax.scipy.special.logsumexp(h, axis=1, keepdims=True)


@jax.custom_jvp
def _soft(x, width):
    return x * width


@_soft.defjvp
def _soft_jvp(primals, tangents):
    (x, width), (dx, dwidth) = primals, tangents
    return x * width, jnp.where(x > 0.0, jnp.full_like(x, 3.0), 1.0) * width * dx + 2.0 * x * dwidth


def _kinks(params, x):
    """Feedback without a layer: kinks, comparisons, extremes and their ties, rules of one's own, what is stopped."""
    y = x * params["gains"]
    tied = jnp.stack([y[:, 0], y[:, 0], y[:, 1]], axis=1)  # the larger one twice
    c = jnp.abs(y[:, 2]) + jax.nn.relu(y[:, 3]) + jax.nn.relu6(5.0 * y[:, 4]) + jnp.max(tied, axis=1) - y.min(1)
    c = c + jnp.where((y[:, 0] > 0.1) | ~(y[:, 1] < y[:, 2]), y[:, 5], -(y[:, 5] ** 3)) + jnp.maximum(y[:, 0], y[:, 0])
    low, high = np.array([-0.2, 0.3], y.dtype)
    c = c + jax.lax.clamp(low, y[:, 1], high) + _soft(y[:, 4], params["width"]) * jax.lax.stop_gradient(jnp.cos(c))
    return (0.1 * jnp.sign(y[:, 0]) + c + jnp.power(1.0 + y[:, 2] ** 2, 0.7) + jnp.expm1(0.1 * y[:, 3]))[:, None]


POLICIES = {
    _parts: _params(w=(6, 16), b=16, v=(16, 1), limit=()),
    _residual: _params(**{"in": (6, 8), "blocks": (3, 8, 8), "scales": (3, 8), "out": (4, 1)}),
    _attention: _params(embed=(2, 4), places=(3, 4), qkv=(4, 24), heads=(2, 4, 4), out=(4, 1)),
    _gru: _params(h0=8, wi=(6, 24), wh=(8, 24), b=24, head=(8, 3), levels=3),
    _kinks: _params(gains=6, width=()),
}
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)


def _loss(states, controls):
    return in_jax.cart_pole_loss(states, controls, "every", 0.1)


def _by_engine(policy, flow, backend, arguments=(0, 1), dtype="float64"):
    """Return the gradients with respect to params and x0, or to one of them, and the trajectory."""

    def loss(params, x0):
        states, controls = bridge.rollout(SYSTEM, policy, params, x0, STEPS, flow, backend=backend)
        return _loss(states, controls), (states, controls)

    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (POLICIES[policy], _start()))
    return jax.jit(jax.grad(loss, arguments, has_aux=True))(*given)


@functools.cache
def _gradients(policy):
    def loss(params, x0, gates):
        states, controls = in_jax.unroll(STEP, policy, params, x0, gates)
        return _loss(states, controls), (states, controls)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def _by_jax(policy, flow):
    gates = [jnp.asarray(part.gates(STEPS)) for part in linear_parts(resolve(flow))]
    parts, ways = zip(*(_gradients(policy)(POLICIES[policy], _start(), of_part) for of_part in gates), strict=True)
    return parts[0] if len(parts) == 1 else jax.tree.map(resolve(flow).rule, *parts), ways[0]


@every_policy
def test_a_policy_is_fused(policy):
    assert bridge.why_general(SYSTEM, policy, POLICIES[policy], _start()) is None
    for flow in ("R", "M", Flow(0.9, 0.3)):  # x0 is what the gates act on
        (got, ways), (expected, expected_ways) = _by_engine(policy, flow, "fused"), _by_jax(policy, flow)
        assert in_jax.relative(ways, expected_ways) < 1e-12
        assert all(in_jax.relative(*pair) < 1e-10 for pair in zip(got, expected, strict=True))
    for flow, backend in (("S", "fused"), ("C", "fused"), ("C", "general")):
        assert in_jax.relative(_by_engine(policy, flow, backend, 0)[0], _by_jax(policy, flow)[0][0]) < 1e-10
    regular, modified = _by_jax(policy, "R")[0], _by_jax(policy, "M")[0]
    assert in_jax.relative(regular[0], modified[0]) > 1e-4  # else the flows would say nothing


@pytest.mark.parametrize("policy", [_parts, _residual, _gru], ids=lambda policy: policy.__name__)
def test_single_precision(policy):
    """In float32: each leaf of the gradients against JAX in float64."""
    (got, ways), (expected, expected_ways) = _by_engine(policy, "R", "fused", dtype="float32"), _by_jax(policy, "R")
    assert in_jax.relative(ways, expected_ways) < 1e-5
    leaves = zip(*map(jax.tree.leaves, (got, expected)), strict=True)
    errors = [in_jax.relative(*pair) for pair in leaves]
    assert got[1].dtype == "float32" and max(errors) < 1e-4, errors


@pytest.mark.parametrize("flow", ["R", "M", "C"])
def test_physical_parameters_of_a_policy(flow):
    """One for all and one for each sample, from the fused sweep, against the general backend."""

    def loss(params, physical, backend):
        ways = bridge.rollout(SYSTEM, _parts, params, _start(), STEPS, flow, physical, backend=backend)
        return _loss(*ways)

    physical = {"gravity": jnp.asarray(9.5), "pole_mass": jnp.linspace(0.08, 0.14, BATCH)}
    got, expected = (
        jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(POLICIES[_parts], physical, backend)
        for backend in ("fused", "general")
    )
    assert all(np.abs(np.asarray(leaf)).max() > 1e-6 for leaf in jax.tree.leaves(got[1]))
    assert in_jax.relative(got[0], expected[0]) < 1e-10 and in_jax.relative(got[1], expected[1]) < 1e-10


def test_groups_that_share_a_part_of_the_weights():
    def policy(params, x):
        tokens = x.reshape(len(x), 3, 2)
        shared = jnp.broadcast_to(params["w"][:, :4], (3, 2, 4))
        return jnp.einsum("bgk,gko->bgo", tokens, shared).reshape(len(x), -1) @ params["v"]

    params = _params(w=(2, 6), v=(12, 1))

    def loss(params, backend):
        return _loss(*bridge.rollout(SYSTEM, policy, params, _start(), STEPS, "R", backend=backend))

    assert bridge.why_general(SYSTEM, policy, params, _start()) is None
    assert in_jax.relative(*(jax.grad(loss)(params, backend) for backend in ("fused", "general"))) < 1e-10


def _plain(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def test_derivatives_at_kinks_are_those_of_jax():
    states = jnp.zeros((BATCH, 6)).at[:, 5].set(0.5)
    params = {"gains": jnp.ones(6), "width": jnp.asarray(0.5)}

    def loss(params, x0, backend):
        return bridge.rollout(SYSTEM, _kinks, params, x0, 1, "R", backend=backend)[1].sum()

    got = jax.grad(loss, (0, 1))(params, states, "fused")
    assert in_jax.relative(got, jax.grad(loss, (0, 1))(params, states, "general")) < 1e-14
    pull = jax.vjp(_kinks, params, states)[1]
    assert in_jax.relative(got, pull(jnp.ones((BATCH, 1)))) < 1e-14


def test_what_jax_does_around_a_rollout():
    """A population, a goal that is closed over, weights of another function, float32: all of a fused rollout."""
    params = _params(w=(6, 16), b=16, v=(16, 1))

    def update(backend):
        def loss(params, goal, flow):
            def controller(params, x):
                return _plain(params, x - goal)

            weights = params | {"w": params["w"] / jnp.linalg.norm(params["w"]), "b": params["b"][::-1]}
            return SYSTEM.loss(bridge.rollout(SYSTEM, controller, weights, _start(), STEPS, flow, backend=backend)[0])

        return lambda params, flow: jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(
            params, 0.1 * jnp.arange(6.0), flow
        )

    population = jax.tree.map(lambda leaf: jnp.stack([leaf, -0.5 * leaf, leaf**2]), params)
    for flow in "RM":
        assert in_jax.relative(update("fused")(params, flow), update("general")(params, flow)) < 1e-10
    got, expected = (jax.vmap(lambda p: update(way)(p, "C"))(population) for way in ("fused", "general"))  # noqa: B023
    assert in_jax.relative(got, expected) < 1e-10
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), params)
    ways = (
        bridge.rollout(SYSTEM, _plain, single, _start().astype("float32"), 5, backend=b)[0]
        for b in ("fused", "general")
    )
    assert in_jax.relative(*ways) < 1e-6


@jax.custom_vjp
def _clipped(c):
    return c


_clipped.defvjp(lambda c: (c, None), lambda _, adjoint: (jnp.clip(adjoint, -1e-3, 1e-3),))


def _by_callback(x):
    return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


REFUSED = {
    "depend on each other": lambda p, x: _plain(p, x - x[:1]),
    "over the batch": lambda p, x: _plain(p, x) + x.sum() * 0.1,
    "custom_vjp": lambda p, x: _clipped(_plain(p, x)),
    "another order": lambda p, x: _plain(p, x)[::-1],
    "numbers of their own": lambda p, x: _plain(p, x) + jnp.arange(len(x) * 1.0)[:, None],
    "uses argmax, whose derivative": lambda p, x: _plain(p, x) + x.argmax(1, keepdims=True),
    "uses sort": lambda p, x: _plain(p, jnp.sort(x, axis=1)),
    "uses cond": lambda p, x: jax.lax.cond(p["b"][0] > 0, lambda x: x, lambda x: 2 * x, _plain(p, x)),
    "uses while": lambda p, x: (
        jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1]), (x[0, 0], x))[1] @ p["v"]
    ),
    "uses round, which is no operation": lambda p, x: jnp.round(_plain(p, x)),
    "calls back to Python": lambda p, x: _by_callback(_plain(p, x)),
    "float32": lambda p, x: _plain(p, x.astype("float32")).astype("float64"),
    "does not depend on the states": lambda p, x: jnp.ones((len(x), 1)) * p["b"][0],
    "scan over more": lambda p, x: jax.lax.scan(lambda c, _: (c + _plain(p, x), None), _plain(p, x), None, length=70)[
        0
    ],
    "wider than 256": lambda p, x: x @ jnp.ones((6, 300)) @ jnp.ones((300, 1)),
    "too many numbers": lambda p, x: _plain(p, x) + (x[:, :1] * jnp.ones(9000)).sum(1, keepdims=True) * p["b"].sum(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_row_program_is_said(reason):
    params = _params(w=(6, 16), b=16, v=(16, 1))
    if reason in ("uses while",):
        params["v"] = _params(v=(6, 1))["v"]
    assert reason in bridge.why_general(SYSTEM, REFUSED[reason], params, _start())
    with pytest.raises(ValueError, match="backend 'fused' cannot run this controller"):
        bridge.rollout(SYSTEM, REFUSED[reason], params, _start(), 2, backend="fused")
    states, _ = bridge.rollout(SYSTEM, REFUSED[reason], params, _start(), 2)
    assert np.isfinite(states).all()


def test_one_row_and_batches_that_equal_other_sizes():
    for batch in (1, 6, 16):
        params = _params(w=(6, 16), b=16, v=(16, 1))
        ways = (bridge.rollout(SYSTEM, _plain, params, _start(batch), 5, backend=b)[0] for b in ("fused", "general"))
        assert in_jax.relative(*ways) < 1e-12


def test_the_name_of_a_backend():
    with pytest.raises(ValueError, match="backend"):
        bridge.rollout(SYSTEM, _plain, _params(w=(6, 16), b=16, v=(16, 1)), _start(), 2, backend="fast")


def test_a_program_is_held_against_the_function(monkeypatch):
    params = _params(w=(6, 16), b=16, v=(16, 1))
    monkeypatch.setitem(jax_program.RULES, "sin", jax_program.RULES["tan"])
    reason = bridge.why_general(SYSTEM, lambda p, x: jnp.sin(_plain(p, x)), params, _start())
    assert reason == "what was read of it gives other numbers than it gives itself"


@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e-9), ("float32", 1e-3)])
def test_each_leaf_is_held_against_its_own_size(dtype, size, monkeypatch):
    """A derivative that is 1 % off in a leaf that is small beside the others; one that is zero but for rounding."""

    def policy(params, x):
        keys = x[:, :4].reshape(-1, 2, 2) @ params["keys"] + params["shift"]  # shifts all scores alike
        mixed = (jax.nn.softmax(keys.sum(2), axis=1) * x[:, :2]).sum(1, keepdims=True)
        return _plain(params, x) + mixed + size * jnp.sin(params["little"] * x[:, 1:2])

    def wrong(reader, equation, a):
        value = sine(reader, equation, a)
        return reader.elementwise("derivative of", [value, reader.elementwise("scale", [value], 1.01)])

    params = _params(w=(6, 16), b=16, v=(16, 1), keys=(2, 2), shift=2, little=1)
    params, sine = jax.tree.map(lambda leaf: leaf.astype(dtype), params), jax_program.RULES["sin"]
    assert bridge.why_general(SYSTEM, policy, params, _start().astype(dtype)) is None
    monkeypatch.setitem(jax_program.RULES, "sin", wrong)
    reason = bridge.why_general(SYSTEM, lambda p, x: policy(p, x), params, _start().astype(dtype))
    assert reason == "what was read of it gives other numbers than it gives itself"


def test_on_another_device_than_a_cpu(monkeypatch):
    """What is said there is true of `MLP` too, whose forward pass is one kernel on CUDA."""
    mlp = bridge.MLP((6, 8, 1))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(None):
        for policy, params in ((mlp, mlp.init(dtype="float64")), (_parts, POLICIES[_parts])):
            reason = "JAX runs on gpu, where one kernel does no more than the forward pass of an MLP"
            assert bridge.why_general(SYSTEM, policy, params, _start()) == reason
            with pytest.raises(ValueError, match=reason):
                bridge.rollout(SYSTEM, policy, params, _start(), 2, backend="fused")
