"""Checks of numbers at the boundary: settings, and physical parameters given by name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from warp_phys.errors import NotRepeatable


def check_number(name: str, value: Any, least: float = -math.inf, positive: bool = False) -> None:
    """Raise a TypeError or ValueError that names `value` if it is not a finite number, at least `least` or positive.

    >>> check_number("control_cost", -1.0, least=0)
    Traceback (most recent call last):
        ...
    ValueError: control_cost must be a number of at least 0, got -1.0
    """
    number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        if -math.inf < number < math.inf and number >= least and (number > 0.0 or not positive):
            return
        error: type[Exception] = ValueError
    else:
        error = TypeError
    wanted = "a positive number" if positive else "a finite number"
    wanted = f"a number of at least {least:g}" if math.isfinite(least) else wanted
    raise error(f"{name} must be {wanted}, got {value!r}")


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


def range_of(name: str) -> str:
    """Return what a physical parameter must be, "finite", or "positive" too: a time step."""
    return "positive" if name == "dt" else "finite"


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
        is_array = hasattr(value, "shape") and not any(
            kind in str(getattr(value, "dtype", "")) for kind in ("bool", "complex")
        )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        is_list = is_list and not any(isinstance(entry, (bool, str, bytes)) for entry in value)
        if not (is_array or is_number or is_list):
            raise TypeError(f"parameter {name} must be a number or one number per sample, got {value!r}")


def check_lengths(name: str, shape: Sequence[int], batch: int) -> None:
    """Raise a ValueError if this shape is not that of a number, or of one number per sample."""
    if len(shape) > 1 or (len(shape) == 1 and shape[0] not in (1, batch)):
        got = shape[0] if len(shape) == 1 else f"shape {tuple(shape)}"
        raise ValueError(f"parameter {name} must be a number or {batch} numbers, one per sample, got {got}")
