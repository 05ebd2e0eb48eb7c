"""Arrays at the boundary: what comes in is checked here, once, before any kernel runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.checks import check_given
from warp_phys.core.rows import REAL_TYPES
from warp_phys.errors import shown

_NUMPY_TYPES: dict[type, type] = {real: dtype for dtype, real in REAL_TYPES.items()}


def real_type(dtype: Any) -> type:
    """Return wp.float32 or wp.float64 for a numpy dtype, a numpy or Warp type, or a name.

    Raises:
        TypeError: It is neither of the two precisions.

    >>> real_type("float64") is wp.float64
    True
    """
    try:
        if dtype in _NUMPY_TYPES:
            return dtype
        if dtype is not None:  # which numpy takes for float64
            return REAL_TYPES[np.dtype(dtype).type]
    except (KeyError, TypeError, ValueError):
        pass
    raise TypeError(f"dtype must be float32 or float64, got {shown(dtype)}")


def numpy_type(real: type) -> type:
    """Return the numpy type of a Warp precision."""
    return _NUMPY_TYPES[real]


def check_array(
    name: str, value: Any, shape: Sequence[int], like: wp.array | None = None, columns: str = ""
) -> wp.array:
    """Return `value` if it is a Warp array of this shape, and of the precision and device of `like`.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        shape: Expected shape; −1 admits any length.
        like: Array whose dtype and device are expected; None admits either precision.
        columns: What the columns mean, for the message.

    Raises:
        TypeError: Not a Warp array, or of another precision.
        ValueError: Another shape or another device.
    """
    if not isinstance(value, wp.array):
        raise TypeError(
            f"{name} must be a warp array, got {type(value).__name__}; "
            "wrap it without a copy: wp.from_torch, wp.from_jax, wp.from_dlpack or wp.array(..., copy=False)"
        )
    if len(value.shape) != len(shape) or any(n not in (-1, m) for n, m in zip(shape, value.shape, strict=True)):
        raise ValueError(shape_message(name, shape, value.shape, columns))
    if like is None:
        if value.dtype not in _NUMPY_TYPES:
            raise TypeError(f"{name} must hold float32 or float64, got {value.dtype.__name__}")
    elif value.dtype is not like.dtype:
        raise TypeError(f"{name} must hold {like.dtype.__name__} as the other arrays do, got {value.dtype.__name__}")
    elif value.device != like.device:
        raise ValueError(f"{name} must be on device {like.device}, got {value.device}")
    return value


def shape_message(name: str, expected: Sequence[int | str], got: Sequence[int], columns: str = "") -> str:
    """Return the text of a shape error; a −1 among the expected lengths reads as batch."""
    wanted = ", ".join("batch" if n == -1 else str(n) for n in expected)
    wanted += "," if len(expected) == 1 else ""
    return f"{name} must have shape ({wanted}), got {tuple(got)}" + (f"; its columns are {columns}" if columns else "")


def parameter_rows(names: Sequence[str], defaults: Sequence[float], values: Mapping[str, Any]) -> np.ndarray:
    """Return physical parameters as rows, shape (1 or batch, len(names)), float64.

    Args:
        names: Names of the parameters.
        defaults: Their values where `values` says nothing.
        values: A number, or one number per sample, for some of the names.

    Raises:
        TypeError, ValueError: Something else than numbers by name, an unknown name, lengths that differ, or a number
            that is not finite.
    """
    check_given(names, values)
    columns = [
        np.atleast_1d(np.asarray(values.get(n, d), dtype=np.float64)) for n, d in zip(names, defaults, strict=True)
    ]
    rows = max((len(column) for column in columns), default=1)
    for name, column in zip(names, columns, strict=True):
        if column.ndim != 1 or len(column) not in (1, rows):
            raise ValueError(f"parameter {name} must be a number or {rows} numbers, got shape {column.shape}")
        if not np.isfinite(column).all():
            raise ValueError(f"parameter {name} must be finite, got {column}")
    return np.stack([np.broadcast_to(column, rows) for column in columns], axis=1)


def alias(array: wp.array, dtype: Any, shape: Sequence[int], strides: Sequence[int] | None = None) -> wp.array:
    """Return another view of an array's memory, without adjoint; it keeps the memory alive.

    To Warp's `verify_autograd_array_access` it is the array: what reads the view has read the array.
    """
    layout: dict[str, Any] = {"shape": tuple(shape), "device": array.device, "capacity": array.capacity}
    if strides is not None:
        layout["strides"] = tuple(strides)
    view: Any = wp.array(ptr=array.ptr, dtype=dtype, **layout)
    view._source = array
    view._ref, view._is_read = array, array._is_read  # as in views that Warp makes
    return view


def for_all_streams(array: wp.array) -> wp.array:
    """Return an array that is kept and read later, on any stream, once it is filled.

    A copy to a CUDA device is ordered with the work of the stream that is current then, and with no other.
    """
    if array.device.is_cuda:  # type: ignore[union-attr]
        wp.synchronize_stream(array.device)
    return array


CACHE_LINE = 64
"""Bytes that a CPU loads together; a vector that lies across two lines costs two loads."""


def aligned_zeros(shape: Sequence[int], dtype: Any, device: Any) -> wp.array:
    """Return zeros that start at a cache line if they are numbers on a CPU."""
    if not wp.get_device(device).is_cpu or dtype not in _NUMPY_TYPES:
        return wp.zeros(tuple(shape), dtype=dtype, device=device)
    count, size = math.prod(shape), np.dtype(_NUMPY_TYPES[dtype]).itemsize
    raw = wp.zeros(count + CACHE_LINE // size, dtype=dtype, device=device)
    skip = -raw.ptr % CACHE_LINE // size
    return alias(raw[skip : skip + count], dtype, shape)


def as_structs(rows: wp.array, struct: Any) -> wp.array:
    """Return `rows`, shape (…, fields), as an array (…) of structs: same memory, same adjoint memory."""
    view = alias(rows, struct, rows.shape[:-1])
    if rows.grad is not None:
        view.grad = as_structs(rows.grad, struct)
    return view


def parameter_numbers(structs: wp.array) -> Any:
    """Return the numbers behind an array of parameter structs, shape (…, parameters); `.grad` is their adjoint.

    Of a slice they are a view. None for structs of anything but numbers of one precision.

    >>> from warp_phys import CartPole
    >>> parameter_numbers(CartPole().parameter_array({"pole_mass": 0.5}, device="cpu")).numpy()[:, 2]
    array([0.5], dtype=float32)
    """
    source = getattr(structs, "_source", None)
    return _as_numbers(structs) if source is None else source


def _as_numbers(structs: wp.array) -> wp.array | None:
    """Do the opposite of `as_structs`."""
    types = [field.type for field in getattr(structs.dtype, "vars", {}).values()]
    if not types or len(set(types)) > 1 or types[0] not in _NUMPY_TYPES:
        return None
    shape, strides = (*structs.shape, len(types)), (*structs.strides, wp.types.type_size_in_bytes(types[0]))
    view = alias(structs, types[0], shape, strides)
    if structs.grad is not None:
        view.grad = _as_numbers(structs.grad)
    return view
