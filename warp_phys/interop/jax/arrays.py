"""Checks of JAX arrays at the boundary, and physical parameters as rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warp_phys.core.arrays import real_type, shape_message
from warp_phys.core.checks import check_given, check_lengths, range_of, within
from warp_phys.core.kernel_cache import start_warp
from warp_phys.errors import shown
from warp_phys.systems.base import System


def real_of(array: jax.Array) -> type:
    """Return the Warp type of an array's numbers."""
    return real_type(array.dtype)


def key_of(system: Any) -> Any:
    """Return what compiled programs are made for: a system's structure, since its numbers are an argument of theirs."""
    key = system.structure if isinstance(system, System) else system
    try:
        hash(key)
    except TypeError:
        raise TypeError(f"system must be hashable for JAX to know it again, {type(system).__name__} is not") from None
    return key


def is_traced(array: Any) -> bool:
    """Whether an array stands for numbers that are not there yet, under `jit` or inside a transformation."""
    return isinstance(array, jax.core.Tracer)


def check_rows(name: str, value: Any, system: Any) -> jax.Array:
    """Return states as a JAX array of shape (batch, D), or raise a TypeError or ValueError that says why not.

    Finiteness is checked where the numbers are known.
    """
    if isinstance(value, np.ndarray) and value.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{name} holds float64, which JAX is not set to use: jax.config.update('jax_enable_x64', True), or "
            f"{name}.astype('float32')"
        )
    start_warp()
    array = as_jax_array(name, value)
    columns = ", ".join(getattr(system, "states", ()))
    if array.ndim != 2 or array.shape[1] != system.state_size or len(array) == 0:
        raise ValueError(shape_message(name, (-1, system.state_size), array.shape, columns))
    if array.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{name} must hold float32 or float64, got {array.dtype}")
    if not is_traced(array):
        bad = np.flatnonzero(~np.isfinite(np.asarray(array)).all(axis=1)).tolist()
        if bad:
            raise ValueError(f"{name} must be finite, rows {bad[:8]} are not")
    return array


def as_jax_array(name: str, value: Any) -> jax.Array:
    """Return what JAX takes for an array, numpy's of any byte order too, or raise a TypeError that names it."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = value.astype(value.dtype.newbyteorder("="), copy=False)
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers: {error}") from None


def rows_of_parameters(system: Any, values: Mapping[str, Any] | None, like: jax.Array) -> jax.Array | None:
    """Return physical parameters as rows (batch, number of parameters) for states `like`; None for a foreign system.

    Raises:
        TypeError, ValueError: Something else than numbers, an unknown name, lengths that differ, numbers that are not
            finite or not in their range, where the numbers are known.
    """
    values = {} if values is None else values
    names: Sequence[str] = getattr(system, "parameter_names", ())
    check_given(names, values)
    if not isinstance(system, System):
        return None
    columns = [_column(system, name, values.get(name, getattr(system, name)), like) for name in names]
    return jnp.stack(columns, axis=1)


def shared_columns(system: Any, values: Mapping[str, Any] | None) -> tuple[bool, ...]:
    """Return which physical parameters all samples share."""
    names: Sequence[str] = getattr(system, "parameter_names", ())
    return tuple(jnp.size((values or {}).get(name, 0.0)) == 1 for name in names)


def _column(system: Any, name: str, value: Any, like: jax.Array) -> jax.Array:
    column = as_jax_array(f"parameter {name}", value).astype(like.dtype)
    check_lengths(name, column.shape, len(like))
    if not is_traced(column):
        numbers = np.asarray(column)
        if not np.isfinite(numbers).all() or not within(range_of(system, name), numbers).all():
            raise ValueError(f"parameter {name} must be {range_of(system, name)}, got {shown(value)}")
    return jnp.broadcast_to(column, len(like))
