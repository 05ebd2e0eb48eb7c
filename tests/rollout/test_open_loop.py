"""Trajectories under given controls, against torch unrolled, in float64."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import warp as wp

from tests.rollout import reference
from tests.rollout.test_systems_with_inputs import Wind, wind_step
from warp_phys import CartPole, Flow, Quantum, Repulsion
from warp_phys.interop.torch import trajectory

STEPS, BATCH = 9, 11


def _numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _check(got, right):
    for a, b in zip(got, right, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-10 * torch.linalg.norm(b)


def _unrolled(step, x0, controls, alpha=1.0):
    states = [x0]
    for n in range(len(controls)):
        gate = alpha[n] if isinstance(alpha, torch.Tensor) else alpha
        own = reference._Meeting.apply(states[-1], gate, 1.0, None)[0]
        states.append(step(own, controls[n]))
    return torch.stack(states)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gate", ["one", "decay", "per component", "per sample"])
def test_gradients(gate, shared):
    system = CartPole(poles=2, dt=0.05)
    x0 = torch.from_numpy(system.sample(BATCH, dtype=np.float64)).requires_grad_()
    controls = (3.0 * _numbers(STEPS, 1 if shared else BATCH, 1)).requires_grad_()
    mass, gravity = (
        (_numbers(BATCH, seed=4).abs().clamp(max=2.0) * 0.1 + 0.1).requires_grad_(),
        torch.tensor(9.0, dtype=torch.float64),
    )
    gravity.requires_grad_()
    alphas = {
        "one": (1.0, 1.0),
        "decay": (0.9, 0.9),
        "per component": ((a := _numbers(1, 1, 6).numpy()), torch.from_numpy(a).expand(STEPS, 1, 6)),
        "per sample": ((b := _numbers(STEPS, BATCH).numpy()), torch.from_numpy(b)[:, :, None]),
    }
    given, alpha = alphas[gate]
    parameters = {"pole_mass": mass, "gravity": gravity}
    states = trajectory(system, x0, controls, parameters, flow=Flow(given))
    leaves = [x0, controls, mass, gravity]

    class Named:
        pole_mass, total_mass, half_length, dt = mass[:, None], 1.1, 0.5, 0.05

    Named.gravity = gravity
    right = _unrolled(lambda x, c: reference.cart_pole_step(Named, x, c.expand(BATCH, 1)), x0, controls, alpha)
    _check([states], [right])
    _check(*(torch.autograd.grad((s.cos() * (1 + s)).sum(), leaves) for s in (states, right)))


def test_inputs():
    system, x0, controls = Wind(), _numbers(BATCH, 2).requires_grad_(), _numbers(STEPS, BATCH, 1).requires_grad_()
    for w in (_numbers(STEPS, BATCH, 3, seed=1).requires_grad_(), _numbers(STEPS, 3, seed=1).requires_grad_()):
        states = trajectory(system, x0, controls, inputs=w)
        x, rows = x0, [x0]
        for n in range(STEPS):
            x = wind_step(system, x, controls[n], w[n].expand(BATCH, 3))
            rows.append(x)
        right = torch.stack(rows)
        _check([states], [right])
        losses = [system.loss(s, controls, "every", 0.1, inputs=w) + s.sin().sum() for s in (states, right)]
        _check(*(torch.autograd.grad(loss, [x0, controls, w]) for loss in losses))


@pytest.mark.parametrize("system", [Repulsion(drivers=2, evaders=3), Quantum(points=6)])
def test_systems_with_lanes_of_their_own(system):
    """The same states as step by step, and the derivative along a direction."""
    x0 = torch.from_numpy(system.sample(3, dtype=np.float64))
    controls = (0.3 * _numbers(STEPS, 3, system.control_size)).requires_grad_()
    states = trajectory(system, x0, controls)
    own, c = wp.array(states.detach().numpy(), dtype=wp.float64), wp.array(controls.detach().numpy(), dtype=wp.float64)
    before = own.numpy().copy()
    system.trajectory(own, c)
    assert np.abs(own.numpy() - before).max() < 1e-12
    (grad,) = torch.autograd.grad(states[-1].sin().sum(), [controls])
    direction, h = _numbers(*controls.shape, seed=5), 1e-6
    ends = [trajectory(system, x0, controls.detach() + s * h * direction)[-1].sin().sum() for s in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float((grad * direction).sum()), rel=1e-6)


def test_launches_in_threads():
    """They take the arrays of each call, in any layout and thread, and keep none of them."""
    system = CartPole(poles=2, dt=0.05)
    x0 = torch.from_numpy(system.sample(BATCH, dtype=np.float64))

    def gradient(seed, is_transposed=False):
        controls = _numbers(STEPS, BATCH, 1, seed=seed)
        if is_transposed:
            controls = controls.transpose(0, 1).contiguous().transpose(0, 1)
        states = trajectory(system, x0, controls.requires_grad_())
        system.loss(states, when="every").backward()
        return weakref.ref(states), controls.grad

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, range(16)))
    for seed, (_, found) in enumerate(together):
        _check([found, found], [gradient(seed)[1], gradient(seed, is_transposed=True)[1]])
    gc.collect()
    assert all(states() is None for states, _ in together)


def test_one_system_is_known_from_another():
    """A loss or a trajectory of one leaves the parameters of another alone."""
    systems = [CartPole(pole_mass=mass) for mass in (0.1, 0.3)]
    x = torch.as_tensor(systems[0].sample(3, dtype=np.float64))

    def step(system):
        x_array, c, y = (wp.from_torch(t) for t in (x, torch.ones_like(x[:, :1]), torch.zeros_like(x)))
        system.step(x_array, c, y)
        return wp.to_torch(y).clone()

    before = step(systems[0])
    for system in systems:
        system.loss(x[None].repeat(3, 1, 1), torch.ones(2, 3, 1, dtype=torch.float64), "every")
        trajectory(system, x, torch.ones(2, 3, 1, dtype=torch.float64))
    assert torch.equal(step(systems[0]), before)


def test_errors():
    system, x0, controls = CartPole(), torch.zeros(3, 4), torch.zeros(5, 3, 1)
    cases = [
        (lambda: trajectory(system, x0[:, :3], controls), "x0 must have shape"),
        (lambda: trajectory(system, x0, controls[:, :2]), "controls must have shape"),
        (lambda: trajectory(system, x0.numpy(), controls), "x0 must be a torch.Tensor"),
        (lambda: trajectory(system, x0, controls.double()), "controls must be torch.float32"),
        (lambda: trajectory(system, x0 / 0.0, controls), "x0 must be finite"),
        (lambda: trajectory(system, x0, controls, flow="C"), "an open loop"),
        (lambda: trajectory(system, x0, controls, inputs=torch.zeros(5, 2)), "has no inputs"),
        (lambda: trajectory(Wind(), x0[:, :2], controls), "has inputs"),
        (lambda: trajectory(object(), x0, controls), "must be a warp_phys.System"),
        (lambda: trajectory(system, x0, controls, {"mass": 1.0}), "mass"),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
