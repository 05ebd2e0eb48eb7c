"""Gradient flows: through which path, and how strongly, feedback travels back in time.

One backward step of an unrolling x_{n+1} = S(x_n, c_n), c_n = N(x_n; θ) with the adjoints λ_n = dL/dx_n, μ_n = dL/dc_n:

    μ_n = ∂L/∂c_n + (∂S/∂c)ᵀ λ_{n+1}
    λ_n = ∂L/∂x_n + α (∂S/∂x)ᵀ λ_{n+1} + β (∂N/∂x)ᵀ μ_n

A `Flow` is the pair of gates (α, β). A `Combined` is a pure function of the updates of two flows.

Source: Schnell & Thuerey, "Stabilizing Backpropagation Through Time to Learn Complex Physics", ICLR 2024.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from warp_phys.core.checks import check_number
from warp_phys.errors import check_count

Gate = float | tuple[float, ...]


@dataclass(frozen=True)
class Flow:
    """Feedback through the simulator, weighted by `physics`, and through the controller, weighted by `controller`.

    Both gates are numbers, or one number for every step n = 0 … T−1. A gate below one is a decay; a gate of zero at
    some steps, or a `window`, truncates.

    >>> Flow(physics=1.0, controller=0.0) == MODIFIED
    True
    >>> Flow(0.9, 0.9).name
    'physics 0.9, controller 0.9'
    >>> Flow(window=2).gates(4)[:, 0]
    array([0., 1., 0., 1.])
    """

    physics: Gate = 1.0
    """Gate α of the physics path (∂S/∂x)ᵀ, a number or T numbers."""
    controller: Gate = 1.0
    """Gate β of the controller path (∂N/∂x)ᵀ, a number or T numbers."""
    window: int | None = None
    """Truncation: no feedback crosses the steps 0, window, 2 window, …; None never cuts."""

    def __post_init__(self):
        for name in ("physics", "controller"):
            object.__setattr__(self, name, _gate(name, getattr(self, name)))
        if self.window is not None:
            object.__setattr__(self, "window", check_count("window", self.window))

    @property
    def name(self) -> str:
        """Name in words: that of the table of flows, or the gates."""
        return _NAMES.get(self, (_describe(self), ""))[0]

    @property
    def letter(self) -> str:
        """Letter in the table of flows, or an empty string."""
        return _NAMES.get(self, ("", ""))[1]

    def gates(self, steps: int) -> np.ndarray:
        """Return α and β for each step, shape (steps, 2).

        Raises:
            ValueError: A gate is given step by step, for another number of steps.
        """
        out = np.empty((steps, 2))
        for column, name in enumerate(("physics", "controller")):
            gate = getattr(self, name)
            if isinstance(gate, tuple) and len(gate) != steps:
                raise ValueError(f"the flow's {name} gate has {len(gate)} numbers, the rollout has {steps} steps")
            out[:, column] = gate
        if self.window is not None:
            out[:: self.window] = 0.0
        return out


def _gate(name: str, value: object) -> Gate:
    """Check one gate; a sequence becomes a tuple, so that a flow stays hashable."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}") from None
    if array.ndim > 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a finite number, or one finite number per step, got {value!r}")
    return float(array) if array.ndim == 0 else tuple(array.tolist())


def _describe(flow: Flow) -> str:
    def text(gate: Gate) -> str:
        return "per step" if isinstance(gate, tuple) else f"{gate:g}"

    window = "" if flow.window is None else f", window {flow.window}"
    return f"physics {text(flow.physics)}, controller {text(flow.controller)}{window}"


REGULAR = Flow(1.0, 1.0)
"""R, the gradient: backpropagation through time."""
MODIFIED = Flow(1.0, 0.0)
"""M, the balanced physics gradient: feedback travels back in time through the simulator only."""
STOPPED = Flow(0.0, 0.0)
"""S, no feedback in time."""
CONTROLLER = Flow(0.0, 1.0)
"""N, feedback through the controller only."""

_NAMES: dict[Flow, tuple[str, str]] = {
    REGULAR: ("regular", "R"),
    MODIFIED: ("modified", "M"),
    STOPPED: ("stopped", "S"),
    CONTROLLER: ("controller", "N"),
}


def agree(base: Any, other: Any) -> Any:
    """Keep `base` where `other` has the same sign, else 0; where their sum is nan, nan.

    Args:
        base: Update to follow, any shape; numpy, torch or JAX.
        other: Update consulted for its sign only, shape of `base`.

    Raises:
        ValueError: The shapes differ.

    Source: Schnell & Thuerey, ICLR 2024, section 3.3.

    >>> agree(np.array([1.0, -2.0, 3.0]), np.array([2.0, 1.0, 5.0]))
    array([1., 0., 3.])
    """
    _check_shapes(base, other)
    return _where_agreeing(base, other, base)


def geometric(base: Any, other: Any) -> Any:
    """Return the geometric mean of the two, with their sign, where they have the same sign, else 0.

    Args:
        base: One update, any shape; numpy, torch or JAX.
        other: The other, shape of `base`.

    Raises:
        ValueError: The shapes differ.

    >>> geometric(np.array([1.0, -2.0, -3.0]), np.array([4.0, 1.0, -12.0]))
    array([ 2.,  0., -6.])
    """
    _check_shapes(base, other)
    library = _library(base)
    # root by root: the product of two small updates would vanish in float32
    size = library.sqrt(library.abs(base)) * library.sqrt(library.abs(other))
    return _where_agreeing(base, other, library.sign(base) * size)


def minmod(base: Any, other: Any) -> Any:
    """Return the smaller of the two where they have the same sign, else 0.

    Args:
        base: One update, any shape; numpy, torch or JAX.
        other: The other, shape of `base`.

    Raises:
        ValueError: The shapes differ.

    >>> minmod(np.array([1.0, -2.0, -3.0]), np.array([4.0, 1.0, -2.0]))
    array([ 1.,  0., -2.])
    """
    _check_shapes(base, other)
    library = _library(base)
    return _where_agreeing(base, other, library.where(library.abs(base) < library.abs(other), base, other))


def _check_shapes(base: Any, other: Any) -> None:
    if base.shape != other.shape:
        raise ValueError(f"base and other must have one shape, got {tuple(base.shape)} and {tuple(other.shape)}")


def _where_agreeing(base: Any, other: Any, value: Any) -> Any:
    """Return `value` where the signs agree, else 0; nan where the sum is nan."""
    library = _library(base)
    kept = library.where(library.sign(base) == library.sign(other), value, 0.0)
    total = base + other
    return library.where(total != total, total, kept)  # noqa: PLR0124, the test for nan


def _library(array: Any) -> Any:
    """Return the module whose functions work on `array`: numpy, torch or JAX."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else sys.modules["torch"]


@dataclass(frozen=True)
class Combined:
    """An update made from the updates of two flows, component by component: `rule(base, other)`.

    The rule is not linear, so sums come first: over the batch, over accumulated backward passes and over ranks, for
    each flow apart; then the rule; then clipping; then the optimiser.
    """

    base: Flow = MODIFIED
    """Flow whose update is followed."""
    other: Flow = REGULAR
    """Flow whose update is consulted."""
    rule: Callable[[Any, Any], Any] = agree
    """Pure function of two arrays of one shape, elementwise."""
    memory: float = 0.0
    """Decay, in [0, 1), of a running average of `other` over the updates of a training, each scaled to length 1: the
    rule takes that average in place of the update itself. The signs of a minibatch's R are noisy, those of the average
    less so. Only `warp_phys.interop.torch.Update` keeps an average; 0 needs none."""
    either: bool = False
    """Whether the rule, where the average leaves nothing of a component, takes the update itself: with the sign
    agreement, whether M may agree with either. One that is not finite is not asked. Only with a memory."""

    def __post_init__(self):
        for name in ("base", "other"):
            if not isinstance(getattr(self, name), Flow):
                raise TypeError(f"{name} must be a Flow, got {getattr(self, name)!r}")
        if not callable(self.rule):
            raise TypeError(f"rule must be a function of two arrays, got {self.rule!r}")
        check_number("memory", self.memory)
        if not 0.0 <= self.memory < 1.0:
            raise ValueError(f"memory must be at least 0 and below 1, got {self.memory!r}")
        object.__setattr__(self, "memory", float(self.memory))
        if not isinstance(self.either, bool):
            raise TypeError(f"either must be True or False, got {self.either!r}")
        if self.either and not self.memory:
            raise ValueError("either=True needs a memory above 0")

    def apply(self, base: Any, other: Any, mean: Any = None) -> Any:
        """Return what the rule makes of two updates, or raise a ValueError if that has not their shape.

        Args:
            base: The update of the base flow.
            other: That of the other flow.
            mean: The average of that, where the flow has a memory.
        """
        update = self._apply(base, other if mean is None else mean)
        if mean is None or not self.either:
            return update
        return _library(base).where(update == 0.0, self._apply(base, other), update)

    def _apply(self, base: Any, other: Any) -> Any:
        update = self.rule(base, other)
        if getattr(update, "shape", None) != base.shape:
            name, got = getattr(self.rule, "__name__", "rule"), getattr(update, "shape", type(update).__name__)
            got = got if isinstance(got, str) else tuple(got)
            raise ValueError(f"rule {name} must return the shape of its arguments, {tuple(base.shape)}, got {got}")
        return update

    @property
    def name(self) -> str:
        """Name in words: that by which `resolve` knows it, or the rule and the flows."""
        for name, known in NAMED.items():
            if self == known:
                return name
        memory = f", memory {self.memory:g}" if self.memory else ""
        memory += " or now" if self.either else ""
        return f"{getattr(self.rule, '__name__', 'rule')}({self.base.name}; {self.other.name}{memory})"

    @property
    def letter(self) -> str:
        """Letter in the table of flows, or an empty string."""
        return "C" if self == COMBINED else ""


COMBINED = Combined()
"""C, the published method: M where sign(M) = sign(R), else 0."""

NAMED: dict[str, Flow | Combined] = {
    "regular": REGULAR,
    "modified": MODIFIED,
    "stopped": STOPPED,
    "controller": CONTROLLER,
    "combined": COMBINED,
    "geometric": Combined(rule=geometric),
    "minmod": Combined(rule=minmod),
    "averaged": Combined(memory=0.9),
    "either": Combined(memory=0.9, either=True),
}
"""The flows by name. Those of the publication are also known by their letters R, M, S, N and C."""
FlowName = Literal[
    "regular", "modified", "stopped", "controller", "combined", "geometric", "minmod", "averaged", "either",
    "R", "M", "S", "N", "C",
]  # fmt: skip
"""These names and letters, for type checkers."""
FlowLike = FlowName | Flow | Combined
"""What stands for a flow wherever one is asked for; `resolve` makes a flow of any text."""


def resolve(flow: str | Flow | Combined) -> Flow | Combined:
    """Return the flow that a name, a letter or a flow stands for.

    Raises:
        ValueError: No flow has this name.
        TypeError: `flow` is neither text nor a flow.

    >>> resolve("M") is MODIFIED
    True
    """
    if isinstance(flow, (Flow, Combined)):
        return flow
    if not isinstance(flow, str):
        raise TypeError(f"flow must be a name, a letter, a Flow or a Combined, got {flow!r}")
    for name, known in NAMED.items():
        if flow.lower() == name or (flow and flow == known.letter):
            return known
    names = ", ".join(f"{name!r} ({known.letter})" if known.letter else repr(name) for name, known in NAMED.items())
    raise ValueError(f"flow {flow!r} is unknown; known are {names}, or give a Flow(physics, controller)")


def linear_parts(flow: Flow | Combined) -> tuple[Flow, ...]:
    """Return the flows that a backward pass must run for `flow`: itself, or the two that it combines."""
    return (flow.base, flow.other) if isinstance(flow, Combined) else (flow,)


def combine(flow: Flow | Combined, parts: Sequence[Any]) -> Any:
    """Return a flow's own update from those of its `linear_parts`, as the rule takes them.

    Raises:
        ValueError: The flow has a memory.
    """
    refuse_memory(flow)
    return flow.apply(parts[0], parts[1]) if isinstance(flow, Combined) else parts[0]


def memory_in(flow: Flow | Combined) -> float:
    """Return the memory of a flow, 0 for one that has none."""
    return flow.memory if isinstance(flow, Combined) else 0.0


def refuse_memory(*flows: Flow | Combined) -> None:
    """Raise a ValueError for a flow whose update is no function of one pass alone."""
    for flow in flows:
        if memory_in(flow):
            raise ValueError(
                f"flow {flow.name!r} has a memory, which only warp_phys.interop.torch.Update keeps; "
                "Combined() without one is 'combined'"
            )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of the angle between two updates, nan where one of them is zero or not finite."""
    product = norm(a) * norm(b)
    return float(np.sum(a * b)) / product if product > 0.0 and math.isfinite(product) else math.nan


def norm(a: np.ndarray) -> float:
    """Return the Euclidean norm; without numpy's BLAS, whose idle threads keep a core busy long after a call."""
    return math.sqrt(float(np.sum(a * a)))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of components, in [0, 1], on which two updates have the same sign."""
    return float(np.mean(np.sign(a) == np.sign(b))) if a.size else math.nan


def parts_of(flows: Sequence[Flow | Combined]) -> tuple[Flow, ...]:
    """Return the flows that a backward pass must run for all of `flows`, each once, in their order."""
    return tuple(dict.fromkeys(part for flow in flows for part in linear_parts(flow)))
