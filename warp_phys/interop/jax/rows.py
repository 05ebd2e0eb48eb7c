"""What a controller sees besides the state: inputs that are given for every step, and a memory of its own.

A rollout with them is one of rows [x | h | v | w], see `systems.extended`; everything that is differentiated is handed
to it as JAX arrays, so that JAX itself takes rows apart and puts them together.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warp_phys.core.arrays import shape_message
from warp_phys.interop.jax.arrays import as_jax_array, is_traced, key_of
from warp_phys.systems.base import System
from warp_phys.systems.extended import ExtendedSimulator, extended


@dataclass(frozen=True)
class RowController:
    """A controller of state, inputs and memory as one of rows; equal ones are one key of compiled programs."""

    controller: Callable[..., Any]
    """Maps (params, x), (params, x, w), (params, x, h) or (params, x, w, h) to c, or with a memory to (c, h')."""
    sees_inputs: bool
    """Whether it takes the inputs."""
    sizes: tuple[int, int, int]
    """Where the state, the memory, and what a step writes end in a row."""
    outputs: tuple[int, int]
    """Numbers of c and h'."""

    def parts(self, z: jax.Array) -> list[jax.Array]:
        """Return what the controller is called with, besides params, for rows z (N, D + H + V + E)."""
        own, remembering, written = self.sizes
        given = [z[:, written:]] if self.sees_inputs else []
        return [z[:, :own], *given, *([z[:, own:remembering]] if self.outputs[1] else [])]

    def __call__(self, params: Any, z: jax.Array) -> Any:
        """Return [c | h'], shape (N, K + H)."""
        output = self.controller(params, *self.parts(z))
        if not self.outputs[1]:
            return output
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise TypeError(f"a controller with a memory must return (c, h'), got {type(output).__name__}")
        for name, part, size in zip(("c", "h'"), output, self.outputs, strict=True):
            if jnp.shape(part) != (len(z), size):
                expected = f"a controller with a memory must return {name} of shape ({len(z)}, {size})"
                raise ValueError(f"{expected}, got {jnp.shape(part)}")
            if part.dtype != z.dtype:
                raise TypeError(f"a controller with a memory must return {name} of {z.dtype}, got {part.dtype}")
        return jnp.concatenate(list(output), axis=1)


def rows_of(system: Any, controller: Any, memory: int, inputs: int) -> tuple[Any, Any]:
    """Return the system of the rows, and the controller of these; both as they are without memory and inputs.

    Raises:
        ValueError: The system has inputs of its own that are not given.
    """
    own = system.input_size if isinstance(system, System) else 0
    if inputs < own:
        raise ValueError(
            f"{type(system).__name__} has inputs ({', '.join(system.inputs)}): give inputs=w of at least {own} numbers "
            f"a step, got {inputs or 'none'}"
        )
    if not memory and not inputs:
        return system, controller
    rows = (
        extended(system, memory, inputs) if isinstance(system, System) else _simulator(key_of(system), memory, inputs)
    )
    sees_inputs = inputs > 0 and (inputs > own or _takes_inputs(controller, memory))
    sizes, outputs = (rows.own_size, rows.remembering_size, rows.written_size), (rows.own_controls, memory)
    return rows, RowController(controller, sees_inputs, sizes, outputs)


@functools.lru_cache(maxsize=64)
def _simulator(system: Any, memory: int, inputs: int) -> ExtendedSimulator:
    """Return rows of a simulator that is no `System`: one object each, which is a key of compiled programs."""
    return ExtendedSimulator(system, memory, inputs)


def _takes_inputs(controller: Any, memory: int) -> bool:
    """Whether a controller can be given another argument besides params, state and memory; or raise a ValueError."""
    try:
        parameters = inspect.signature(controller).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [p for p in parameters if p.kind in kinds]
    needed = sum(p.default is inspect.Parameter.empty for p in taken)
    if memory and len(taken) > 3 and needed < 4:
        names = ", ".join(p.name for p in taken)
        raise ValueError(
            f"with a memory the controller's arguments must have no defaults, it takes ({names}): which of them is the "
            "memory could not be told"
        )
    return len(taken) > 2 + (memory > 0)


def check_inputs(value: Any, x0: jax.Array, steps: int) -> jax.Array:
    """Return inputs as (steps, 1 or batch, E), or raise a TypeError or ValueError that says what is wrong with them.

    Args:
        value: Shape (steps, E), (steps, 1, E) or (steps, batch, E).
        x0: Initial states.
        steps: Number of time steps.
    """
    array = as_jax_array("inputs", value)
    given = array[:, None] if array.ndim == 2 else array
    if given.ndim != 3 or given.shape[0] != steps or given.shape[1] not in (1, len(x0)) or given.shape[2] == 0:
        expected = shape_message("inputs", (steps, f"1 or {len(x0)}", "E"), array.shape)
        raise ValueError(f"{expected}, or ({steps}, E)")
    return _checked("inputs", given, x0)


def check_memory(value: Any, x0: jax.Array) -> jax.Array:
    """Return a memory (batch, H), or raise a TypeError or ValueError that says what is wrong with it."""
    array = as_jax_array("memory", value)
    if array.ndim != 2 or len(array) != len(x0) or array.shape[1] == 0:
        raise ValueError(shape_message("memory", (len(x0), "H"), array.shape))
    return _checked("memory", array, x0)


def _checked(name: str, array: jax.Array, x0: jax.Array) -> jax.Array:
    if array.dtype != x0.dtype:
        raise TypeError(f"{name} must hold {x0.dtype} as x0 does, got {array.dtype}")
    if not is_traced(array) and not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"{name} must be finite")
    return array


def first_rows(system: Any, x0: jax.Array, memory: jax.Array | None = None) -> jax.Array:
    """Return what a trajectory of rows starts from, without what is given: [x | h | v], of which v is zero.

    Only a system's own cost reads the inputs of the step before, v, and no cost of this bridge reads rows.
    """
    size = getattr(system, "carried_size", 0)
    parts = [x0, *([] if memory is None else [memory]), *([jnp.zeros((len(x0), size), x0.dtype)] if size else [])]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def with_given(written: jax.Array, given: jax.Array | None) -> jax.Array:
    """Return rows of one step, or of all steps, with what is given at them, the same for all samples or not."""
    if given is None:
        return written
    return jnp.concatenate([written, jnp.broadcast_to(given, (*written.shape[:-1], given.shape[-1]))], axis=-1)


def for_all(given: jax.Array | None, x0: jax.Array) -> jax.Array:
    """Return what is given as the engine takes it: (steps, batch, E), or an empty array where there is nothing."""
    if given is None:
        return jnp.zeros((0, 0, 0), x0.dtype)
    return jnp.broadcast_to(given, (len(given), len(x0), given.shape[2]))


def given_dims(system: Any, flows: int, controls: jax.Array) -> tuple[int, ...]:
    """Return the shape of the adjoints of what is given, for controls (steps, batch, K); of no flows nothing is."""
    steps, batch, _ = controls.shape
    return (flows, steps, batch, system.state_size - written_size(system)) if flows else (0, 0, 0, 0)


def written_size(system: Any) -> int:
    """Return how many numbers of a row a step writes; the others are given."""
    return getattr(system, "written_size", system.state_size)
