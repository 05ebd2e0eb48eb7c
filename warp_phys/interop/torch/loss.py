"""The loss of a trajectory as a node of torch's graph, and what the nodes of this bridge share."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import as_structs, shape_message
from warp_phys.core.checks import check_given, check_instance, check_lengths, numbers_of, range_of, within
from warp_phys.core.kernel_cache import start_warp
from warp_phys.errors import shown
from warp_phys.interop.torch.dense import as_array, check_dense, launch
from warp_phys.systems.base import System
from warp_phys.systems.losses import COSTS, When, chosen_array, chosen_times


def pointwise_cost(system: System, states: torch.Tensor, times: When, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Return the pointwise cost at chosen times, shape (times, batch), attached to autograd.

    Args:
        system: The system.
        states: Shape (steps + 1, batch, D), float32 or float64.
        times: Distinct steps, "final" or "every".
        parameters: Physical parameters by name; torch tensors may require gradients.

    Raises:
        TypeError, ValueError: Arguments that do not fit.
    """
    check_instance("system", system)
    if not isinstance(system, System):
        raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}")
    if not isinstance(states, torch.Tensor):
        raise TypeError(f"states must be a torch.Tensor, got {type(states).__name__}")
    check_dense("states", states)
    if states.is_meta or states.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"states must hold torch.float32 or torch.float64, got {states.dtype} on {states.device}")
    if states.ndim != 3 or states.shape[2] != system.state_size or 0 in states.shape:
        expected = ("steps + 1", "batch", system.state_size)
        raise ValueError(shape_message("states", expected, states.shape, ", ".join(system.states)))
    return _cost(system, states, chosen_times(times, len(states) - 1, "times"), parameters)


def _cost(system: System, states: torch.Tensor, times: Sequence[int], parameters: Mapping[str, Any]) -> torch.Tensor:
    """Return the pointwise cost, as `pointwise_cost` does, of what has been checked."""
    rows = rows_of_parameters(system, parameters, states[0])
    if torch.compiler.is_compiling() and getattr(system, "_torch_name", None) is not None:
        return torch.ops.warp_phys.cost(states, rows, list(times), system._torch_name)  # type: ignore[attr-defined]
    refuse_transforms("a loss")
    start_warp()
    return _PointwiseCost.apply(states, system, tuple(times), rows)


COSTS["torch"] = _cost


class _PointwiseCost(torch.autograd.Function):
    """costs[i, b] = cost(states[times[i], b])."""

    @staticmethod
    def forward(ctx, states, system, times, rows):
        ctx.system, ctx.times = system, tuple(times)
        ctx.save_for_backward(states, rows)
        return costs_at(system, states, ctx.times, rows)

    @staticmethod
    def backward(ctx, adj_costs):
        refuse_second_derivative()
        states, rows = ctx.saved_tensors
        want_rows = rows is not None and ctx.needs_input_grad[3]
        adj_states, adj_rows = costs_vjp(ctx.system, states, ctx.times, rows, adj_costs, want_rows)
        return adj_states, None, None, adj_rows


def costs_at(system: System, states: torch.Tensor, times: tuple[int, ...], rows: torch.Tensor | None) -> torch.Tensor:
    """Return the pointwise costs at chosen times, shape (times, batch), attached to nothing."""
    costs = states.new_empty((len(times), states.shape[1]))
    with torch_stream(states.device):
        kernel = kernels.cost_kernel(system.structure, wp.dtype_from_torch(states.dtype))
        launch(kernel, tuple(costs.shape), [*_inputs(system, states, times, rows), costs], states.device)
    return costs


def costs_vjp(
    system: System,
    states: torch.Tensor,
    times: tuple[int, ...],
    rows: torch.Tensor | None,
    adj_costs: torch.Tensor,
    want_rows: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the adjoints of states and of parameter rows (None if not wanted), in buffers of their own."""
    adj_states = torch.zeros_like(states, memory_format=torch.contiguous_format)
    shape = (*adj_costs.shape, len(system.parameter_names)) if want_rows else (0, 0, 0)
    adj_rows = states.new_empty(shape)
    with torch_stream(states.device):
        real = wp.dtype_from_torch(states.dtype)
        structs = as_structs(as_array(adj_rows), system.types(real).Parameters)
        given = [*_inputs(system, states, times, rows), adj_costs.contiguous(), adj_states, structs]
        launch(kernels.cost_vjp_kernel(system.structure, real), tuple(adj_costs.shape), given, states.device)
    if rows is None or not want_rows:
        return adj_states, None
    per_sample = adj_rows.sum(dim=0)
    return adj_states, per_sample.sum(dim=0, keepdim=True) if len(rows) == 1 else per_sample


def _inputs(system: System, states: torch.Tensor, times: tuple[int, ...], rows: torch.Tensor | None) -> list[Any]:
    """Return states, chosen times and physical parameters as the kernels take them."""
    states = states.detach()
    return [states, chosen_array(times, str(states.device)), structs_of(system, rows, states)]


def structs_of(system: System, rows: torch.Tensor | None, like: torch.Tensor) -> wp.array:
    """Return physical parameters as kernels take them: of rows as `rows_of_parameters` has them."""
    real = wp.dtype_from_torch(like.dtype)
    if rows is None:
        return system.own_parameters(real, str(like.device))
    return as_structs(as_array(rows.detach().contiguous()), system.types(real).Parameters)


def rows_of_parameters(system: Any, values: Mapping[str, Any] | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return physical parameters as rows (1 or batch, number of parameters) for states `like`, (batch, D).

    None stands for the system's own.

    Raises:
        TypeError, ValueError: Something else than numbers, an unknown name, lengths that differ, numbers that are not
            finite, or not in their range.
    """
    if values is None:
        return None
    names = getattr(system, "parameter_names", ())
    check_given(names, values)
    if not values:
        return None
    given = {name: _as_tensor(name, value, like.dtype) for name, value in values.items()}
    for name, column in given.items():
        check_lengths(name, column.shape, len(like))
    if not torch.compiler.is_compiling() and not in_transform():
        _check_ranges(system, given, values)
    kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    columns = []
    for name in names:
        own = given[name].reshape(-1) if name in given else torch.full((1,), float(getattr(system, name)), **kind)
        columns.append(own.to(like.device, non_blocking=own.is_cpu))
    return torch.stack(torch.broadcast_tensors(*columns), dim=1)


def _as_tensor(name: str, value: Any, dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):  # strides below zero, another byte order, lists of tensors
        return torch.as_tensor(np.array(numbers_of(f"parameter {name}", value), np.float64), dtype=dtype)


def _check_ranges(system: Any, given: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Raise a ValueError if a physical parameter is not in its range.

    Numbers on a CUDA device are waited for once, those on the host not at all.
    """
    fine = [torch.isfinite(c) & within(range_of(system, n), c) for n, c in given.items()]
    place = next((flags.device for flags in fine if not flags.is_cpu), torch.device("cpu"))
    if torch.stack([flags.all().to(place, non_blocking=True) for flags in fine]).all():
        return
    name = next(name for name, flags in zip(given, fine, strict=True) if not flags.all())
    raise ValueError(f"parameter {name} must be {range_of(system, name)}, got {shown(values[name])}")


def torch_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which Warp launches on torch's current stream of a CUDA device; on a CPU it does nothing."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return wp.ScopedStream(wp.stream_from_torch(device), sync_enter=False)


def refuse_second_derivative() -> None:
    """Raise a RuntimeError if autograd would differentiate what runs now."""
    if torch.is_grad_enabled():
        raise RuntimeError("a rollout and its loss can be differentiated once: create_graph=True is not supported")


def refuse_inference(what: str) -> None:
    """Raise a RuntimeError in torch.inference_mode, whose tensors no later update could write to."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} does not run in torch.inference_mode: it differentiates")


def in_transform() -> bool:
    """Whether torch.func is at work."""
    return torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


def refuse_transforms(what: str) -> None:
    """Raise a RuntimeError inside torch.func's vmap, grad, vjp, jvp and what is made of them."""
    if in_transform():
        raise RuntimeError(
            f"{what} does not run inside torch.func (vmap, grad, vjp, jvp, …): call backward() or "
            "torch.autograd.grad, or unroll warp_phys.interop.torch.Step, which does"
        )
