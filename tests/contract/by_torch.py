"""What torch itself finds for an unrolled controller, with `detach` where a flow stops feedback."""

import torch

from tests.rollout.reference import unroll
from warp_phys.flow import Combined, linear_parts, resolve
from warp_phys.interop.torch import Rollout, Step
from warp_phys.systems import CartPole

SYSTEM = CartPole(poles=1, dt=0.05)
STEPS = 12


def start(batch=4, seed=0, system=SYSTEM):
    return torch.as_tensor(system.sample(batch, seed=seed, dtype="float64"))


def a_loss(states, controls):
    """A loss of every state and control."""
    return SYSTEM.loss(states, controls, when="every") + 0.01 * controls.square().mean()


def leaves(module):
    return [p for p in module.parameters() if p.requires_grad]


def collect(loss, tensors, clear=True):
    """Return the gradients that a backward pass of `loss()` leaves, hooks and all; zeros for none."""
    for tensor in tensors:
        tensor.grad = None
    loss().backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]


def by_torch(controller, tensors, x0, flow, steps=STEPS, step=None, loss=a_loss):
    """Return each tensor's update by a flow, from torch's own unrolling; one backward pass per linear flow.

    `controller` and `x0` may be functions that make them anew for each pass, since torch frees their graphs.
    """
    flow, step = resolve(flow), step or Step(SYSTEM)
    parts = []
    for part in linear_parts(flow):
        module = controller() if not isinstance(controller, torch.nn.Module) else controller
        begin = x0() if callable(x0) else x0
        parts.append(collect(lambda: loss(*unroll(step, module, begin, part.gates(steps))), tensors))  # noqa: B023
    if isinstance(flow, Combined):
        return [flow.apply(base, other) for base, other in zip(*parts, strict=True)]
    return parts[0]


def by_engine(controller, tensors, x0, flow, steps=STEPS, system=SYSTEM, loss=a_loss, **settings):
    """Return the same from a rollout."""
    module = controller() if not isinstance(controller, torch.nn.Module) else controller
    rollout = Rollout(system, module, steps, flow, **settings)
    return collect(lambda: loss(*rollout(x0() if callable(x0) else x0)), tensors)


def assert_same(got, expected, tolerance=1e-10):
    """Assert that updates are equal to rounding, measured by the largest component of all."""
    size = max(float(b.abs().max()) for b in expected)
    assert size > 0.0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * size, (a, b)


FLOWS = ["R", "M", "S", "C"]
