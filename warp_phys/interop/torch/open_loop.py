"""Trajectories under given controls, as one node of torch's graph."""

import functools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import as_structs, for_all_streams, shape_message
from warp_phys.core.checks import check_instance, numbers_of
from warp_phys.core.flow_gates import are_single
from warp_phys.core.kernel_cache import start_warp
from warp_phys.engine.phases import all_gates, check_gates
from warp_phys.errors import shown
from warp_phys.flow import Flow, resolve_open_loop
from warp_phys.interop.torch.dense import as_array, check_dense, is_finite, launch
from warp_phys.interop.torch.hybrid import Hybrid
from warp_phys.interop.torch.loss import (
    refuse_second_derivative,
    refuse_transforms,
    rows_of_parameters,
    structs_of,
    torch_stream,
)
from warp_phys.interop.torch.node import freeze_diverged
from warp_phys.interop.torch.rollout import Rollout
from warp_phys.interop.torch.rows import Beside, check_inputs, fill
from warp_phys.programs import native_kernels
from warp_phys.programs.program import SAMPLES
from warp_phys.systems.base import System
from warp_phys.systems.extended import Extended
from warp_phys.systems.hybrid import refuse_limit

GATES = 32
"""Gates that are kept."""


def trajectory(
    system: System | Hybrid,
    x0: torch.Tensor,
    controls: torch.Tensor,
    parameters: Mapping[str, Any] | None = None,
    inputs: torch.Tensor | None = None,
    flow: str | Flow = "regular",
) -> torch.Tensor:
    """Return the states (steps + 1, batch, D) under given controls: an open loop.

    Differentiable with respect to x0, controls, physical parameters and inputs, by one flow: of its gates those of the
    physics count, the others have no meaning without a controller. So "regular" and "modified" are the same, a
    `Flow(0.9)` decays, and there is nothing to be combined. The module of a `Hybrid` is trained, too.

    Args:
        system: A `System` or a `Hybrid`.
        x0: Initial states, shape (batch, D), float32 or float64.
        controls: Shape (steps, batch, K) or (steps, 1, K).
        parameters: Physical parameters by name, a number or one per sample each; tensors may require gradients.
        inputs: What a system that has inputs is given, shape (steps, E), (steps, 1, E) or (steps, batch, E).
        flow: A name, a letter or a `Flow`.

    Raises:
        TypeError, ValueError: Arguments that do not fit.
        Diverged: A state is not finite.

    >>> from warp_phys import CartPole
    >>> forces = torch.zeros(50, 8, 1, requires_grad=True)
    >>> trajectory(CartPole(), torch.ones(8, 4), forces)[-1].square().mean().backward()
    >>> forces.grad.shape
    torch.Size([50, 8, 1])
    """
    check_instance("system", system)
    if not isinstance(system, System | Hybrid):
        raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}: unroll Step instead")
    resolved = resolve_open_loop(flow)
    refuse_transforms("a trajectory")
    _check(system, x0, controls)
    check_gates([resolved], len(controls))
    start_warp()
    rows = rows_of_parameters(system, parameters, x0)
    if inputs is not None and not isinstance(inputs, torch.Tensor):
        raise TypeError(f"inputs must be a torch.Tensor, got {type(inputs).__name__}")
    if inputs is not None:
        check_dense("inputs", inputs)
        inputs = check_inputs("inputs", inputs, x0, len(controls), system.input_size or None)
    if (inputs is None) != (not system.inputs):
        names = ", ".join(system.inputs)
        raise ValueError(f"{type(system).__name__} has inputs ({names}): give inputs" if names else
                         f"{type(system).__name__} has no inputs")  # fmt: skip
    if isinstance(system, Hybrid):
        return _hybrid(system, resolved, x0, controls, rows, inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x0, controls, rows, inputs)):
        return _Trajectory.apply(system, resolved, x0, controls, rows, inputs)
    return _unroll(system, x0, controls, rows, inputs)[0][:, :, : system.state_size]


def finite_numbers(name: str, value: Any) -> torch.Tensor:
    """Return an array as a tensor of float64, attached to nothing.

    Raises:
        TypeError, ValueError: Something else than real, finite numbers.
    """
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.as_tensor(np.array(numbers_of(name, value), np.float64))
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be an array of numbers, got {shown(value)}") from None
    check_dense(name, value)
    if value.is_meta:
        raise TypeError(f"{name} must hold numbers, got a tensor on the device meta")
    tensor = value.detach()
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite")
    return tensor.to(torch.float64)


def _check(system: System | Hybrid, x0: Any, controls: Any) -> None:
    for name, value in (("x0", x0), ("controls", controls)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        check_dense(name, value)
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must hold torch.float32 or torch.float64, got {value.dtype}")
        if value.dtype != x0.dtype or value.device != x0.device:
            raise TypeError(f"{name} must be {x0.dtype} on {x0.device} as x0 is, got {value.dtype} on {value.device}")
    if x0.ndim != 2 or x0.shape[1] != system.state_size or len(x0) == 0:
        raise ValueError(shape_message("x0", (-1, system.state_size), x0.shape, ", ".join(system.states)))
    fits = controls.ndim == 3 and len(controls) > 0 and controls.shape[1] in (1, len(x0))
    if not fits or controls.shape[2] != system.control_size:
        expected = ("steps", len(x0), system.control_size)
        raise ValueError(shape_message("controls", expected, controls.shape, ", ".join(system.controls)))
    for name, value in (("x0", x0), ("controls", controls)):
        if not is_finite(value):
            raise ValueError(f"{name} must be finite")


def _unroll(system: System, x0: Any, controls: Any, rows: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return rows of states, controls of all samples, and the system of these rows."""
    inner = Extended(system, 0, inputs.shape[2]) if inputs is not None else system
    states = x0.new_empty((len(controls) + 1, len(x0), inner.state_size))
    controls = controls.detach().expand(-1, len(x0), -1).contiguous()
    fill(states, x0.detach(), Beside(None if inputs is None else inputs.detach()), inner)
    real = wp.dtype_from_torch(x0.dtype)
    with torch_stream(x0.device):
        p = structs_of(system, rows, states)
        if x0.device.type == "cpu":
            kernel, blocks = native_kernels.steps_kernel(inner.structure, real), -(-len(x0) // SAMPLES)
            launch(kernel, blocks, [states, controls, p, 0, len(controls)], x0.device)
        else:
            launch(kernels.trajectory_kernel(inner.structure, real), len(x0), [controls, p, states], x0.device)
    freeze_diverged(states, controls, "raise")
    return states, controls, inner


class _Given(torch.nn.Module):
    """A controller whose controls are given: the last of its inputs.

    Args:
        size: Number K of controls.
        like: Initial states.
    """

    like: torch.Tensor

    def __init__(self, size: int, like: torch.Tensor):
        super().__init__()
        self.size = size
        self.register_buffer("like", like.new_zeros(()))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return the controls in w (N, E), whatever the states."""
        return w[:, -self.size :]


def _hybrid(
    hybrid: Hybrid, flow: Flow, x0: torch.Tensor, controls: torch.Tensor, rows: torch.Tensor | None, inputs: Any
) -> torch.Tensor:
    """Return the states of a hybrid: a rollout to which the controls are inputs. It is kept, with its program."""
    refuse_limit(flow.limit)
    own, kind = next(hybrid.module.parameters(), None), (x0.dtype, x0.device)
    if own is not None and kind != (own.dtype, own.device):
        raise TypeError(f"x0 must be {own.dtype} on {own.device} as the module is, got {x0.dtype} on {x0.device}")
    if kind not in hybrid.open_loops:
        module, size = _Given(hybrid.control_size, x0), hybrid.input_size + hybrid.control_size
        hybrid.open_loops[kind] = Rollout(hybrid, module, len(controls), "regular", inputs=size), threading.RLock()
    rollout, lock = hybrid.open_loops[kind]
    if inputs is not None:
        batch = max(inputs.shape[1], controls.shape[1])
        controls = torch.cat([part.expand(-1, batch, -1) for part in (inputs, controls)], dim=2)
    with lock:  # calls for another number of steps wait
        rollout.steps = len(controls)
        (states, _), _ = rollout._unroll(x0, rows, rollout._given(x0, controls, None), flow)
    return states[:, :, : hybrid.state_size]


class _Trajectory(torch.autograd.Function):
    """An open loop as one node of torch's graph."""

    @staticmethod
    def forward(ctx, system, flow, x0, controls, rows, inputs):
        states, own, ctx.inner = _unroll(system, x0, controls, rows, inputs)
        ctx.system, ctx.flow, ctx.shared = system, flow, controls.shape[1] != len(x0)
        ctx.inputs = None if inputs is None else inputs.shape
        ctx.save_for_backward(states, own, rows)
        return states[:, :, : system.state_size] if ctx.inner is not system else states

    @staticmethod
    def backward(ctx, adj_states):
        refuse_second_derivative()
        states, controls, rows = ctx.saved_tensors
        if ctx.inner is not ctx.system:
            adj_states = torch.nn.functional.pad(adj_states, (0, states.shape[2] - adj_states.shape[2]))
        want_rows, want_inputs = ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        adj_x0, adj_controls, adj_rows, adj_inputs = _pull(
            ctx.system, ctx.inner, ctx.flow, states, controls, rows, adj_states.contiguous(), want_rows, want_inputs
        )
        if ctx.shared:
            adj_controls = adj_controls.sum(dim=1, keepdim=True)
        if want_rows and len(rows) == 1:
            adj_rows = adj_rows.sum(dim=0, keepdim=True)
        if want_inputs:
            own, end = ctx.system.state_size, ctx.inner.written_size
            adj_inputs[0, :, : end - own] += adj_x0[:, own:end]
            adj_inputs = adj_inputs.sum(dim=1, keepdim=True) if ctx.inputs[1] == 1 else adj_inputs
        adj_x0 = adj_x0[:, : ctx.system.state_size]
        return None, None, adj_x0, adj_controls, adj_rows if want_rows else None, adj_inputs if want_inputs else None


def _pull(
    system: System, inner: Any, flow: Flow, states: torch.Tensor, controls: torch.Tensor, rows: torch.Tensor | None,
    adj_states: torch.Tensor, want_rows: bool, want_inputs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return λ_0, μ, and the adjoints of each sample's physical parameters and inputs, empty if not wanted."""
    steps, batch, size = controls.shape
    make, on_cpu, count = states.new_zeros, states.device.type == "cpu", len(system.parameter_names)
    per_step = (1,) if on_cpu else (1, steps)
    adj_x = adj_states[steps:].clone()
    adj_controls = make((1, steps, batch, size))
    adj_p = make((*per_step, batch, count) if want_rows else (0,) * (len(per_step) + 2))
    given = inner.state_size - inner.written_size
    adj_inputs = make((1, steps, batch, given) if want_inputs else (0, 0, 0, 0))
    real = wp.dtype_from_torch(states.dtype)
    with torch_stream(states.device):
        gates = _gates_of(flow, steps, batch, inner.structure, real, str(states.device))
        single = are_single(gates)
        read = [states, controls, structs_of(system, rows, states)]
        if on_cpu:
            kernel = native_kernels.trajectory_vjp_kernel(inner.structure, real, want_rows, single)
            own = adj_inputs[0] if want_inputs else make((0, 0, 0))
            made = [make((1, SAMPLES, size)), adj_x, adj_controls[0], adj_p, own]
            launch(kernel, 1, [*read, adj_states, gates, *made], states.device)
        else:
            kernel = kernels.sweep_kernel(inner.structure, real, single)
            structs = as_structs(as_array(adj_p), system.types(real).Parameters)
            read += [make((0, 0, 0, 0)), adj_states, make(controls.shape), gates, 0, steps, adj_x]
            launch(kernel, (1, batch), [*read, adj_controls, structs, adj_inputs], states.device)
            adj_p = adj_p.sum(dim=1)
    return adj_x[0], adj_controls[0], adj_p[0] if want_rows else adj_p, adj_inputs[0] if want_inputs else adj_inputs


@functools.lru_cache(maxsize=GATES)
def _gates_of(flow: Flow, steps: int, batch: int, structure: Any, real: type, device: str) -> wp.array:
    return for_all_streams(wp.array(all_gates([flow], steps, batch, structure), dtype=real, device=device))
