"""What the engine raises when a user's input or a simulation goes wrong."""

from collections.abc import Sequence
from typing import TypeVar

Choice = TypeVar("Choice", bound=str)


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


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return `value` as an int, or raise a ValueError or TypeError that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    count = value.__index__()
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def check_choice(name: str, value: Choice, choices: Sequence[str]) -> Choice:
    """Return `value` if it is one of `choices`, else raise a ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
