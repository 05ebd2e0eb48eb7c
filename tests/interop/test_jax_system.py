"""JAX functions as simulators of torch rollouts: every flow equals that of the engine's own system."""

import copy
import pickle

import numpy as np
import pytest
import torch
import warp as wp

jax = pytest.importorskip("jax", reason='needs JAX: pip install "warp_phys[jax]"')

from tests.interop import jax_reference as in_jax  # noqa: E402
from tests.interop.foreign_rollouts import SYSTEM, all_of_an_update, initial_states, make_network  # noqa: E402
from tests.rollout import reference  # noqa: E402
from warp_phys import Diverged  # noqa: E402
from warp_phys.interop.extras import require  # noqa: E402
from warp_phys.interop.jax.system import JaxSystem  # noqa: E402
from warp_phys.interop.torch import Rollout  # noqa: E402

jnp = jax.numpy


@pytest.fixture(autouse=True)
def _double(device):
    with in_jax.double(device):
        yield


def _step(x, c):
    return in_jax.cart_pole_step(SYSTEM, x, c)


def _cost(x):
    return 1 - jnp.cos(x[:, 2::2]).mean(1)


FOREIGN = JaxSystem(_step, 6, 1, cost=_cost)


@pytest.mark.parametrize("when", ["final", "every"])
@pytest.mark.parametrize("flow", ["R", "M", "S", "C"])
def test_every_flow_equals_that_of_the_engines_system(flow, when, device):
    network, x0 = make_network(device), initial_states(device)
    got, expected = (all_of_an_update(system, network, x0, flow, when) for system in (FOREIGN, SYSTEM))
    assert reference.relative(got[0], expected[0]) < 1e-13
    assert float(got[1]) == pytest.approx(float(expected[1]), rel=1e-13)
    assert reference.relative(got[2], expected[2]) < 1e-11
    if flow != "S":
        assert reference.relative(got[3], expected[3]) < 1e-11


def test_the_loss_of_jax_and_of_torch_arrays():
    states, controls = np.random.default_rng(0).standard_normal((4, 3, 6)), np.ones((3, 3, 1))
    expected = float(SYSTEM.loss(states, controls, when=[1, 3], control_cost=0.5))
    for convert in (jnp.asarray, torch.as_tensor):
        got = FOREIGN.loss(convert(states), convert(controls), when=[1, 3], control_cost=0.5)
        assert float(got) == pytest.approx(expected, rel=1e-14)
    by_jax = jax.grad(lambda x: FOREIGN.loss(x, when="every"))(jnp.asarray(states))
    by_torch = torch.tensor(states, requires_grad=True)
    FOREIGN.loss(by_torch, when="every").backward()
    np.testing.assert_allclose(by_torch.grad.numpy(), np.asarray(by_jax), rtol=1e-14)


def test_strided_rows(device):
    """A block of samples, or a chunk of a larger array, is no obstacle."""
    wide = wp.array(np.random.default_rng(0).standard_normal((4, 12)), device=device)
    x, c, y = wide[:, 3:9], wp.zeros((4, 1), dtype=wp.float64, device=device), wp.zeros_like(wide)
    FOREIGN.step(x, c, y[:, 2:8])
    expected = np.asarray(jax.jit(_step)(jnp.asarray(wide.numpy()[:, 3:9]), jnp.zeros((4, 1))))
    np.testing.assert_allclose(y.numpy()[:, 2:8], expected, rtol=0, atol=1e-14)
    assert not y.numpy()[:, :2].any() and not y.numpy()[:, 8:].any()


def test_copies():
    rollout = Rollout(FOREIGN, make_network("cpu"), 3)
    for twin in (copy.deepcopy(rollout), pickle.loads(pickle.dumps(rollout))):
        assert torch.equal(twin(initial_states("cpu"))[0], rollout(initial_states("cpu"))[0])


def _by_numpy(x, c):
    return jnp.asarray(np.asarray(x))


def _callback(x, c):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def _halving(x, c):
    return jax.lax.while_loop(lambda y: (y * y).sum() > 1.0, lambda y: 0.5 * y, x + 0 * c)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x, c: x[:, :3], ValueError, r"what function returns must have shape \(5, 6\), got \(5, 3\)"),
        (lambda x, c: x.astype("float32"), TypeError, "must hold float64 as its arguments do, got float32"),
        (lambda x, c: (x, c), TypeError, "must return an array, got tuple"),
        (_by_numpy, TypeError, "function must be traceable by JAX, which says: The numpy.ndarray conversion method"),
        (_callback, TypeError, "function must be differentiable by jax.vjp, which says: Pure callbacks do not supp"),
        (_halving, TypeError, "function must be differentiable by jax.vjp, which says: Reverse-mode diff"),
        (lambda x, c: x + jnp.sqrt(0 * x), ValueError, "with respect to x is not finite for samples 0, 1, 2, 3, 4"),
    ],
)
def test_functions_that_do_not_do(function, error, message):
    network, x0 = make_network("cpu"), initial_states("cpu")
    with pytest.raises(error, match=message):
        Rollout(JaxSystem(function, 6, 1), network, 3, "M")(x0)[0].sum().backward()


def test_divergence_names_step_and_samples():
    system = JaxSystem(lambda x, c: jnp.where(x[:, :1] > 0.9, jnp.inf, _step(x, c)), 6, 1)
    x0 = initial_states("cpu")
    x0[:, 0] = torch.tensor([0.0, 0.1, 0.95, 0.2, 0.3])
    with pytest.raises(Diverged, match="step 1"):
        Rollout(system, make_network("cpu"), 3)(x0)


def test_float64_needs_a_setting_of_jax():
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64 needs jax.config.update"):
        Rollout(FOREIGN, make_network("cpu"), 3)(initial_states("cpu"))


def test_a_missing_extra_says_what_to_install():
    with pytest.raises(ImportError, match=r'no_such_module is not installed: pip install "warp_phys\[jax\]"'):
        require("no_such_module", "jax")
