"""Checks of arguments at the boundary: numbers, seeds, functions, devices, and physical parameters given by name.

Counts and choices are checked in `warp_phys.errors`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.kernel_cache import start_warp
from warp_phys.errors import NotRepeatable, check_count, shown

MOST_SEED = 2**64 - 1
"""Largest seed: what torch's generators take, too."""


def check_number(name: str, value: Any, least: float = -math.inf, positive: bool = False) -> None:
    """Raise a TypeError or ValueError that names `value` if it is not a finite number, at least `least` or positive.

    >>> check_number("control_cost", -1.0, least=0)
    Traceback (most recent call last):
        ...
    ValueError: control_cost must be a number of at least 0, got -1.0
    """
    number = plain_number(value)
    if number is not None:
        if -math.inf < number < math.inf and number >= least and (number > 0.0 or not positive):
            return
        error: type[Exception] = ValueError
    else:
        error = TypeError
    wanted = "a positive number" if positive else "a finite number"
    wanted = f"a number of at least {least:g}" if math.isfinite(least) else wanted
    raise error(f"{name} must be {wanted}, got {shown(value)}")


def plain_number(value: Any) -> float | None:
    """Return a number as a float, one of numpy or of an array without dimensions too; None for anything else.

    A tensor that stands for no number (on the meta device, traced, quantised) is none.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer above all floats
        return math.inf if value > 0 else -math.inf


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise a TypeError.

    >>> check_flag("graph", "no")
    Traceback (most recent call last):
        ...
    TypeError: graph must be True or False, got 'no'
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_seed(value: Any, name: str = "seed") -> int:
    """Return a seed, an integer from 0 to 2⁶⁴ − 1, or raise a TypeError or ValueError.

    >>> check_seed(-1)
    Traceback (most recent call last):
        ...
    ValueError: seed must be at least 0, got -1
    """
    return check_count(name, value, 0, MOST_SEED)


def check_path(name: str, value: Any) -> Path:
    """Return a path, given as text or as a path, or raise a TypeError.

    >>> check_path("folder", None)
    Traceback (most recent call last):
        ...
    TypeError: folder must be text or a path, got None
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be text or a path, got {shown(value)}")
    return Path(value)


def check_function(name: str, value: Any, of: str, optional: bool = True) -> None:
    """Raise a TypeError if `value` is no function, nor None where it is `optional`.

    Args:
        name: The argument.
        value: What the caller passed.
        of: What the function takes, for the message.
        optional: Whether None will do.
    """
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name} must be a function of {of}{', or None' if optional else ''}, got {shown(value)}")


def check_device(device: Any) -> wp.Device:
    """Return a Warp device, the current one for None, or raise a TypeError or ValueError that lists those present."""
    start_warp()
    if device is None or isinstance(device, wp.Device):
        return wp.get_device(device)
    if not isinstance(device, str) and type(device).__module__ != "torch":
        raise TypeError(f"device must be the name of a device, got {shown(device)}")
    try:
        return wp.get_device(str(device))
    except (ValueError, RuntimeError):
        present = ", ".join(found.alias for found in wp.get_devices())
        raise ValueError(f"device must be one that is present ({present}), got {shown(str(device))}") from None


def check_finite_array(name: str, value: Any, dtype: Any = np.float64) -> np.ndarray:
    """Return an argument as a numpy array of finite numbers, or raise a TypeError or ValueError that names it."""
    array = numbers_of(name, value)
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, entry {first} is not")
    return array


def numbers_of(name: str, value: Any) -> np.ndarray:
    """Return an argument as a numpy array of real numbers, or raise a TypeError or ValueError that names it."""
    try:
        # torch's may have a gradient or be on a device
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be an array, rows of one length, got {shown(value)}") from None
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return array


def check_repeated(name: str, again: np.ndarray, before: np.ndarray) -> None:
    """Raise `NotRepeatable` if a simulator's step, computed again, differs by more than rounding.

    Args:
        name: What the simulator is called.
        again: Next states (batch, D), found now.
        before: Those of the forward pass.
    """
    bad = differing_rows(again, before)
    if bad:
        raise NotRepeatable(repeated_message(name, float(np.abs(again - before)[bad].max()), bad))


def differing_rows(again: np.ndarray, before: np.ndarray, units: float = 64.0) -> list[int]:
    """Return the rows in which two arrays (rows, columns) differ by more than so many units in the last place."""
    size = np.maximum(np.abs(before), np.abs(again)).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        close = (np.abs(again - before) <= units * np.finfo(before.dtype).eps * size) | (again == before)
    close |= np.isnan(again) & np.isnan(before)
    return np.flatnonzero(~close.all(axis=1)).tolist()


def repeated_message(name: str, error: float, samples: Sequence[int]) -> str:
    """Return the text of an error about a step that does not repeat itself."""
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    return (
        f"the step of {name} gives other states now than in the forward pass, for the same state and control: they "
        f"differ by {error:.3g} in samples {shown}. Until the backward pass is done it must compute from its arguments "
        "alone: no noise, no dropout (eval()), no number or weight that changes in between; what differs from sample "
        "to sample or from call to call belongs into the state or the physical parameters"
    )


def check_instance(name: str, value: Any) -> None:
    """Raise a TypeError if `value` is a class."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be an instance, got the class {value.__name__}")


def range_of(system: Any, name: str) -> str:
    """Return what a physical parameter must be: "finite", "positive" or "not negative" too."""
    return system.range_of(name) if hasattr(system, "range_of") else "positive" if name == "dt" else "finite"


def within(range_: str, values: Any) -> Any:
    """Return where numbers, of any library, are in a range of `range_of`; finiteness apart."""
    return values > 0.0 if range_ == "positive" else values >= 0.0 if range_ == "not negative" else values == values  # noqa: PLR0124


def check_given(names: Sequence[str], values: Any) -> None:
    """Raise a TypeError or ValueError if `values` are not physical parameters by name, among `names`.

    >>> check_given((), {"g": 9.81})
    Traceback (most recent call last):
        ...
    ValueError: parameters g are unknown; there are none
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"parameters must be a mapping of names to numbers, got {type(values).__name__}")
    unknown = [str(name) for name in values if name not in names]
    if unknown:
        raise ValueError(f"parameters {', '.join(unknown)} are unknown; there are {', '.join(names) or 'none'}")
    for name, value in values.items():
        if isinstance(value, list | tuple) and any(getattr(entry, "requires_grad", False) for entry in value):
            raise TypeError(f"parameter {name} is a list of tensors with gradients: give one tensor, torch.stack([…])")
        is_array = hasattr(value, "shape") and holds_numbers(getattr(value, "dtype", None))
        is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0
        is_list = is_list and not any(plain_number(entry) is None for entry in value)
        if not (is_array or is_list or plain_number(value) is not None):
            raise TypeError(f"parameter {name} must be a number or one number per sample, got {shown(value)}")
        too_large = (entry for entry in (value if is_list and not is_array else [value]) if isinstance(entry, int))
        if any(math.isinf(plain_number(entry) or 0.0) for entry in too_large):
            raise ValueError(f"parameter {name} must be finite, got {shown(value)}")


def holds_numbers(dtype: Any) -> bool:
    """Whether this is a type of real numbers, of numpy or of any other library."""
    if isinstance(dtype, np.dtype):
        return dtype.kind in "fiu" or "float" in dtype.name  # bfloat16 has a kind of its own
    return any(kind in str(dtype) for kind in ("float", "int"))


def check_lengths(name: str, shape: Sequence[int], batch: int) -> None:
    """Raise a ValueError if this shape is not that of a number, or of one number per sample."""
    if len(shape) > 1 or (len(shape) == 1 and shape[0] not in (1, batch)):
        got = shape[0] if len(shape) == 1 else f"shape {tuple(shape)}"
        raise ValueError(f"parameter {name} must be a number or {batch} numbers, one per sample, got {got}")
