"""What the engine raises when a user's input or a simulation goes wrong."""

from collections.abc import Sequence
from typing import TypeVar

Choice = TypeVar("Choice", bound=str)

MOST = 2**31 - 1
"""Largest count: kernels number rows and steps by 32 bits."""
LONGEST = 100
"""Letters of a value that a message shows."""


class Diverged(RuntimeError):
    """A trajectory has left the finite numbers.

    Attributes:
        step: First step n whose state x_n is not finite (1 is the state after the first step).
        samples: Indices of all samples that diverged, in ascending order.
        maskable: Whether `on_divergence="mask"` would leave samples to train on; the message then says so.
    """

    def __init__(self, step: int, samples: Sequence[int], maskable: bool = False):
        self.step, self.maskable = int(step), maskable
        self.samples = tuple(int(sample) for sample in samples)
        shown = ", ".join(map(str, self.samples[:8])) + (", …" if len(self.samples) > 8 else "")
        advice = ", or pass on_divergence='mask' to train on the others" if maskable else ""
        super().__init__(
            f"the trajectory leaves the finite numbers at step {self.step}; {len(self.samples)} sample(s) diverge: "
            f"{shown}. Use a smaller dt or bound the controls{advice}"
        )

    def __reduce__(self):  # RuntimeError would be rebuilt from its message alone
        return Diverged, (self.step, self.samples, self.maskable)


class NotRepeatable(ValueError):
    """A controller or a simulator gave other numbers when a backward pass computed it again than in the forward pass.

    The update would belong to neither; see docs/contract.md for what may be the cause.
    """


def check_count(name: str, value: object, least: int = 1, most: int = MOST) -> int:
    """Return `value` as an int from `least` to `most`, or raise a ValueError or TypeError that names it.

    >>> check_count("poles", 0)
    Traceback (most recent call last):
        ...
    ValueError: poles must be at least 1, got 0
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {shown(value)} of type {type(value).__name__}")
    try:
        count = value.__index__()
    except (TypeError, ValueError, RuntimeError):  # arrays have the method, whatever they hold
        raise TypeError(f"{name} must be an integer, got {shown(value)} of type {type(value).__name__}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(count)}")
    if count > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(count)}")
    return count


def check_choice(name: str, value: Choice, choices: Sequence[str]) -> Choice:
    """Return `value` if it is one of `choices`, else raise a ValueError that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """Return a value as a message shows it, on one line and not longer than a line.

    >>> shown("short"), shown(2**200), shown([0] * 1000)[-5:]
    ("'short'", 'an integer of 201 bits', ', 0,…')
    """
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
