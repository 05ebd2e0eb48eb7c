"""The loss of a trajectory, from a system's pointwise cost."""

import functools
import importlib
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import for_all_streams, numpy_type, real_type, shape_message
from warp_phys.core.checks import check_number, numbers_of
from warp_phys.core.kernel_cache import start_warp
from warp_phys.errors import check_choice, shown

COSTS: dict[str, Callable[..., Any]] = {}
"""The pointwise cost of other frameworks' arrays; a bridge enters its own when it is imported, since a system imports
no framework."""

EXTENDED: dict[str, Any] = {}
"""The system whose rows hold inputs beside states, see `extended`, which enters it."""

When = Literal["final", "every"] | Sequence[int]
"""Times at which the cost counts: the last, all but the first, or chosen steps."""


def loss(
    system: Any,
    states: Any,
    controls: Any,
    when: When,
    control_cost: float,
    parameters: Mapping[str, Any],
    inputs: Any = None,
) -> Any:
    """Return the loss; `System.loss` documents it."""
    check_trajectory(system, states, controls, control_cost)
    if isinstance(states, wp.array):
        times = chosen_times(when, states.shape[0] - 1)
        if system.cost_reads_inputs:
            _beside(system, states, inputs)
        return _warp_loss(system, states, controls, times, control_cost, parameters)
    costs = pointwise_costs(system, states, when, parameters, inputs)
    controls = controls if controls is None or _framework(states) else np.asarray(controls)
    value = costs.mean() if system.time_average else costs.mean(1).sum()
    if controls is None or (_is_known(control_cost) and control_cost == 0.0):
        return value
    return value + control_cost * (controls * controls).mean()


def pointwise_costs(system: Any, states: Any, when: When, parameters: Mapping[str, Any], inputs: Any = None) -> Any:
    """Return the pointwise cost at the chosen times, shape (times, batch), of arrays of torch, JAX or numpy."""
    times, framework = chosen_times(when, states.shape[0] - 1), _framework(states)
    if system.cost_reads_inputs:
        states = _beside(system, states, inputs)
        system = EXTENDED["system"](system)
    if not framework:
        return _numpy_costs(system, np.asarray(states), times, parameters)
    if framework not in COSTS:
        importlib.import_module(f"warp_phys.interop.{framework}")
    return COSTS[framework](system, states, times, parameters)


def _framework(array: Any) -> str:
    """Return whose array this is, empty for numpy."""
    return "torch" if _is_torch(array) else "jax" if _is_jax(array) else ""


def _beside(system: Any, states: Any, inputs: Any) -> Any:
    """Return states with the inputs of the steps that have led to them, (steps + 1, batch, D + E)."""
    steps, batch, size = states.shape[0] - 1, states.shape[1], system.input_size
    if inputs is None:
        raise ValueError(f"the cost of {type(system).__name__} reads its inputs: give loss(states, …, inputs=w)")
    if isinstance(states, wp.array):
        raise TypeError(
            f"the cost of {type(system).__name__} reads its inputs, for which arrays of torch, numpy or JAX are needed"
        )
    library = sys.modules["torch"] if _is_torch(states) else sys.modules["jax.numpy"] if _is_jax(states) else np
    if library is np:
        w = numbers_of("inputs", inputs).astype(states.dtype)
    elif _is_torch(states):
        w = library.as_tensor(inputs, dtype=states.dtype, device=states.device)
    else:
        w = library.asarray(inputs, states.dtype)
    w = w[:, None] if w.ndim == 2 else w
    if w.ndim != 3 or w.shape[0] != steps or w.shape[1] not in (1, batch) or w.shape[2] < size:
        raise ValueError(shape_message("inputs", ("steps", "1 or batch", size), w.shape, ", ".join(system.inputs)))
    w = library.concatenate([w[:1], w])[:, :, :size]
    return library.concatenate([states, library.broadcast_to(w, (steps + 1, batch, size))], -1)


def _is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _is_jax(array: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array)


def _is_known(weight: Any) -> bool:
    """Whether this is a number here; one of torch or JAX may be traced, on a device, or have a gradient."""
    return not _is_torch(weight) and not _is_jax(weight)


def check_trajectory(system: Any, states: Any, controls: Any, control_cost: float) -> None:
    """Raise a TypeError or ValueError that names what is wrong with the arrays of a trajectory."""
    if not hasattr(states, "shape") or not hasattr(states, "dtype"):
        raise TypeError(f"states must be an array, got {type(states).__name__}")
    if not _is_real(states.dtype):
        raise TypeError(f"states must hold float32 or float64, got {states.dtype}")
    shape = tuple(states.shape)
    if len(shape) != 3 or shape[2] != system.state_size or shape[0] < 2 or shape[1] < 1:
        message = shape_message("states", ("steps + 1", "batch", system.state_size), shape, ", ".join(system.states))
        raise ValueError(message)
    if _is_known(control_cost):
        check_number("control_cost", control_cost, least=0.0)
    elif _framework(control_cost) != _framework(states):
        raise TypeError(f"control_cost must be a number, or of the library of the states, got {shown(control_cost)}")
    if controls is None and not (_is_known(control_cost) and control_cost == 0.0):
        raise ValueError("control_cost needs the controls: pass controls, shape (steps, batch, K)")
    if controls is not None:
        _check_controls(controls, states)
    if controls is not None and tuple(controls.shape) != (shape[0] - 1, shape[1], system.control_size):
        expected = (shape[0] - 1, shape[1], system.control_size)
        raise ValueError(shape_message("controls", expected, controls.shape, ", ".join(system.controls)))


def _is_real(dtype: Any) -> bool:
    """Whether this is float32 or float64, of any library; of numpy in any byte order."""
    if isinstance(dtype, np.dtype):
        return dtype.kind == "f" and dtype.itemsize in (4, 8)
    return any(kind in str(dtype) for kind in ("float32", "float64"))


def _check_controls(controls: Any, states: Any) -> None:
    """Raise a TypeError if controls are no array of numbers of the kind that states are."""
    if not hasattr(controls, "shape") or not hasattr(controls, "dtype"):
        raise TypeError(f"controls must be an array, got {shown(controls)}")
    name = _framework(states) or ("warp" if isinstance(states, wp.array) else "")
    own = _framework(controls) or ("warp" if isinstance(controls, wp.array) else "")
    if own != name:
        raise TypeError(
            f"controls must be an array as states are, {type(states).__name__}, got {type(controls).__name__}"
        )
    if not _is_real(controls.dtype):
        raise TypeError(f"controls must hold float32 or float64, got {controls.dtype}")


def check_loss(system: Any, when: When, steps: int, control_cost: float) -> Literal["final", "every"] | tuple[int, ...]:
    """Raise a TypeError or ValueError if a system has no loss, or its loss does not take these arguments.

    Returns:
        `when`, chosen steps as plain integers.
    """
    if not callable(getattr(system, "loss", None)):
        raise TypeError(
            f"system must have a loss, {type(system).__name__} has none: write one as an expression of the states and "
            "controls that the rollout returns, and call its backward()"
        )
    check_number("control_cost", control_cost, least=0.0)
    times = chosen_times(when, steps)
    return when if isinstance(when, str) else times


def chosen_times(when: When, steps: int, name: str = "when") -> tuple[int, ...]:
    """Return the steps at which the cost counts.

    Raises:
        TypeError, ValueError: Neither a name nor distinct integers from 0 to `steps`.

    >>> chosen_times("final", 3), chosen_times("every", 3), chosen_times([1, 3], 3)
    ((3,), (1, 2, 3), (1, 3))
    """
    if isinstance(when, str):
        check_choice(name, when, ("final", "every"))
        return (steps,) if when == "final" else tuple(range(1, steps + 1))
    wanted = f"{name} must be 'final', 'every' or distinct steps from 0 to {steps}, got {shown(when)}"
    try:
        given = tuple(when)
        times = tuple(operator.index(n) for n in given)
    except TypeError:
        raise TypeError(wanted) from None
    if any(isinstance(n, bool) for n in given):
        raise TypeError(wanted)
    if not times or len(set(times)) != len(times) or min(times) < 0 or max(times) > steps:
        raise ValueError(wanted)
    return times


@functools.lru_cache(maxsize=64)
def chosen_array(times: tuple[int, ...], device: str) -> wp.array:
    """Return chosen times on a device; kept, since a training asks for the same ones again and again."""
    return for_all_streams(wp.array(times, dtype=int, device=device))


def _numpy_costs(system, states, times, parameters) -> np.ndarray:
    """Return the pointwise costs of numpy states, shape (times, batch)."""
    start_warp()
    real = real_type(states.dtype)
    x = wp.array(np.ascontiguousarray(states, numpy_type(real)), dtype=real, device="cpu", copy=False)
    p = system.check_parameters(system.parameter_array(parameters, device="cpu", dtype=real), x, x.shape[1])
    costs = wp.empty((len(times), x.shape[1]), dtype=real, device="cpu")
    chosen = chosen_array(times, "cpu")
    kernel = kernels.cost_kernel(system.structure, real)
    wp.launch(kernel, dim=costs.shape, inputs=[x, chosen, p], outputs=[costs], device="cpu", record_tape=False)
    return costs.numpy()


def weights(system: Any, costs: Any, controls: Any, control_cost: float) -> tuple[float, float]:
    """Return what a pointwise cost and a squared control weigh in the loss, for their arrays; controls may be None."""
    count = math.prod(costs.shape) if system.time_average else costs.shape[1]
    return 1.0 / count, 0.0 if controls is None else control_cost / (
        math.prod(controls.shape[:2]) * system.own_controls
    )


def _warp_loss(system, states, controls, times, control_cost, parameters) -> wp.array:
    """Return the loss as a Warp array of one element; an active tape records it."""
    real, device = states.dtype, states.device
    p = system.check_parameters(system.parameter_array(parameters, device=device, dtype=real), states, states.shape[1])
    chosen = chosen_array(times, str(device))
    costs = wp.empty((len(times), states.shape[1]), dtype=real, device=device, requires_grad=True)
    total = wp.zeros(1, dtype=real, device=device, requires_grad=True)
    kernel = kernels.cost_kernel(system.structure, real)
    wp.launch(kernel, dim=costs.shape, inputs=[states, chosen, p], outputs=[costs], device=device)
    per_sample, weight = weights(system, costs, controls, control_cost)
    wp.launch(kernels.mean_kernel(real), dim=costs.shape, inputs=[costs, per_sample], outputs=[total], device=device)
    if control_cost:
        square = kernels.mean_square_kernel(real)
        wp.launch(square, dim=controls.shape, inputs=[controls, weight], outputs=[total], device=device)
    return total
