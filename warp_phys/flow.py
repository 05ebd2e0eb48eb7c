"""Gradient flows: through which path, and how strongly, feedback travels back in time.

One backward step of an unrolling x_{n+1} = S(x_n, c_n), c_n = N(x_n; θ) with the adjoints λ_n = dL/dx_n, μ_n = dL/dc_n:

    μ_n = ∂L/∂c_n + (∂S/∂c)ᵀ λ_{n+1}
    λ_n = ∂L/∂x_n + α (∂S/∂x)ᵀ λ_{n+1} + β (∂N/∂x)ᵀ μ_n

A `Flow` is the pair of gates (α, β), and a third one, γ, for what a controller remembers: where it returns h_{n+1}
besides c_n, of x_n and h_n, with the adjoint ν_n of all that it returns,

    λ_n = ∂L/∂x_n + α (∂S/∂x)ᵀ λ_{n+1} + β (∂N/∂x)ᵀ ν_n
    η_n = ∂L/∂h_n + γ (∂N/∂h)ᵀ ν_n

A `Combined` is a pure function of the updates of two flows.

Source: Schnell & Thuerey, "Stabilizing Backpropagation Through Time to Learn Complex Physics", ICLR 2024.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from warp_phys.core.checks import check_flag, check_number, holds_numbers, numbers_of
from warp_phys.errors import check_count, shown


class Gates:
    """The numbers of a gate, an array that does not change; equal ones have one hash."""

    def __init__(self, array: np.ndarray):
        self.array = array.copy()
        self.array.flags.writeable = False
        self._key = self.array.shape, self.array.tobytes()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gates) and self._key == other._key

    def __repr__(self) -> str:
        return f"gates of shape {self.array.shape}"

    def __deepcopy__(self, memo: Any) -> "Gates":
        return self


Gate = float | tuple[float, ...] | Gates


@dataclass(frozen=True)
class Flow:
    """Feedback through the simulator, weighted by `physics`, and through the controller, weighted by `controller`.

    These gates are numbers, or arrays: one number for every step n = 0 … T−1, shape (T,); for every step and sample,
    (T, B); for every step, sample and component of the state, (T, B, D). Of two or three dimensions any may be 1. A
    gate below one is a decay; a gate of zero at some steps, or a `window`, truncates.

    >>> Flow(physics=1.0, controller=0.0) == MODIFIED
    True
    >>> Flow(0.9, 0.9).name
    'physics 0.9, controller 0.9'
    >>> Flow(window=2).gates(4)[:, 0]
    array([0., 1., 0., 1.])
    """

    physics: Gate = 1.0
    """Gate α of the physics path (∂S/∂x)ᵀ."""
    controller: Gate = 1.0
    """Gate β of the controller path (∂N/∂x)ᵀ."""
    window: int | None = None
    """Truncation: no feedback crosses the steps 0, window, 2 window, …; None never cuts."""
    memory: Gate = 1.0
    """Gate γ of the path through a controller's memory (∂N/∂h)ᵀ, a number or T numbers."""
    limit: float | None = None
    """If given, the controller's feedback of a sample at a step, β (∂N/∂x)ᵀ ν_n, is scaled down to at most so many
    times the norm of the physics' feedback α (∂S/∂x)ᵀ λ_{n+1}. 0 is a controller gate of 0."""

    def __post_init__(self):
        for name in ("physics", "controller", "memory"):
            object.__setattr__(self, name, _gate(name, getattr(self, name)))
        if isinstance(self.memory, Gates):
            raise ValueError(f"memory must be a number, or one number per step, got shape {self.memory.array.shape}")
        if self.window is not None:
            object.__setattr__(self, "window", check_count("window", self.window))
        if self.limit is not None:
            check_number("limit", self.limit, least=0.0)
            object.__setattr__(self, "limit", float(self.limit))

    @property
    def is_plain(self) -> bool:
        """Whether the gates of states are numbers that all samples and components share."""
        return self.limit is None and not any(isinstance(gate, Gates) for gate in (self.physics, self.controller))

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
            ValueError: A gate is given step by step, for another number of steps; or the flow is not `is_plain`.
        """
        if not self.is_plain:
            raise ValueError(f"flow {self.name!r} has a limit, or gates of single samples or components")
        return np.stack([self._by_step("physics", steps), self._by_step("controller", steps)], axis=1)

    def check(self, steps: int) -> None:
        """Raise a ValueError if a gate is given for another number of steps."""
        for name in ("physics", "controller", "memory"):
            self._check_length(name, steps)

    def _check_length(self, name: str, steps: int) -> None:
        gate = getattr(self, name)
        length = len(gate) if isinstance(gate, tuple) else gate.array.shape[0] if isinstance(gate, Gates) else steps
        if length not in ((1, steps) if isinstance(gate, Gates) else (steps,)):
            raise ValueError(f"the flow's {name} gate has {length} numbers, the rollout has {steps} steps")

    def _by_step(self, name: str, steps: int) -> np.ndarray:
        """Return a gate, shape (steps,) or three dimensions, cut where the window ends."""
        self._check_length(name, steps)
        gate = getattr(self, name)
        out = gate.array if isinstance(gate, Gates) else np.full(steps, gate, dtype=float)
        if out.ndim == 2:
            out = out[:, :, None]
        if self.window is not None:
            out = np.repeat(out, steps, axis=0) if len(out) == 1 else out.copy()
            out[:: self.window] = 0.0
        return out

    def all_gates(self, steps: int, batch: int, size: int) -> np.ndarray:
        """Return all gates: α and β of each component of the state, γ and κ (infinity where there is no limit).

        Args:
            steps: Number of time steps.
            batch: Number of samples.
            size: Number D of state components.

        Returns:
            Shape (steps, 1 or batch, 2 D + 2).

        Raises:
            ValueError: A gate is given for another number of steps, samples or components.
        """
        parts = []
        for name in ("physics", "controller"):
            gate = self._by_step(name, steps)
            gate = gate.reshape(steps, 1, 1) if gate.ndim == 1 else gate
            for length, own, what in zip(gate.shape[1:], (batch, size), ("samples", "components"), strict=True):
                if length not in (1, own):
                    raise ValueError(f"the flow's {name} gate is for {length} {what}, there are {own}")
            parts.append(gate)
        samples = max(gate.shape[1] for gate in parts)
        out = np.empty((steps, samples, 2 * size + 2))
        out[:, :, :size], out[:, :, size : 2 * size] = parts
        out[:, :, -2] = self._by_step("memory", steps)[:, None]
        out[:, :, -1] = np.inf if self.limit is None else self.limit
        return out


def _is_mask(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == bool


def _gate(name: str, value: object) -> Gate:
    """Check one gate; a sequence becomes a tuple or `Gates`, so that a flow stays hashable."""
    if isinstance(value, Gates):
        return value
    try:
        # an array of booleans is open and closed gates
        array = numbers_of(name, np.asarray(value, float) if _is_mask(value) else value).astype(float)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or an array of numbers, got {shown(value)}") from None
    if array.ndim > 3 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be a finite number, or finite numbers of shape (steps,), (steps, batch) or (steps, batch, "
            f"D), where any of three may be 1, got {shown(value)}"
        )
    if array.ndim > 1:
        return Gates(array)
    return float(array) if array.ndim == 0 else tuple(array.tolist())


def _describe(flow: Flow) -> str:
    def text(gate: Gate) -> str:
        if isinstance(gate, Gates):
            return f"of shape {gate.array.shape}"
        return "per step" if isinstance(gate, tuple) else f"{gate:g}"

    window = "" if flow.window is None else f", window {flow.window}"
    memory = "" if flow.memory == 1.0 else f", memory {text(flow.memory)}"
    limit = "" if flow.limit is None else f", limit {flow.limit:g}"
    return f"physics {text(flow.physics)}, controller {text(flow.controller)}{window}{memory}{limit}"


REGULAR = Flow(1.0, 1.0)
"""R, the gradient: backpropagation through time."""
MODIFIED = Flow(1.0, 0.0)
"""M, the balanced physics gradient: feedback travels back in time through the simulator only."""
STOPPED = Flow(0.0, 0.0, memory=0.0)
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
        TypeError, ValueError: No arrays of numbers of one library; the shapes differ.

    Source: Schnell & Thuerey, ICLR 2024, section 3.3.

    >>> agree(np.array([1.0, -2.0, 3.0]), np.array([2.0, 1.0, 5.0]))
    array([1., 0., 3.])
    """
    _check_updates(base, other)
    return _where_agreeing(base, other, base)


def geometric(base: Any, other: Any) -> Any:
    """Return the geometric mean of the two, with their sign, where they have the same sign, else 0.

    Args:
        base: One update, any shape; numpy, torch or JAX.
        other: The other, shape of `base`.

    Raises:
        TypeError, ValueError: No arrays of numbers of one library; the shapes differ.

    >>> geometric(np.array([1.0, -2.0, -3.0]), np.array([4.0, 1.0, -12.0]))
    array([ 2.,  0., -6.])
    """
    _check_updates(base, other)
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
        TypeError, ValueError: No arrays of numbers of one library; the shapes differ.

    >>> minmod(np.array([1.0, -2.0, -3.0]), np.array([4.0, 1.0, -2.0]))
    array([ 1.,  0., -2.])
    """
    _check_updates(base, other)
    library = _library(base)
    return _where_agreeing(base, other, library.where(library.abs(base) < library.abs(other), base, other))


def _check_updates(base: Any, other: Any) -> None:
    for name, value in (("base", base), ("other", other)):
        if not hasattr(value, "shape") or not holds_numbers(getattr(value, "dtype", None)):
            raise TypeError(f"{name} must be an array of real numbers, got {shown(value)}")
    if (_library(base) is sys.modules.get("torch")) != (_library(other) is sys.modules.get("torch")):
        raise TypeError(f"base and other must be of one library, got {type(base).__name__} and {type(other).__name__}")
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


def _check_arguments(rule: Callable[[Any, Any], Any]) -> None:
    """Raise a TypeError if a rule cannot be called with two arrays."""
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # functions that are not written in Python tell nothing
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"rule must be a function of two arrays, {shown(rule)} is not: {error}") from None


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
    """Pure function of two arrays of one shape, elementwise unless it sees the `whole`."""
    memory: float = 0.0
    """Decay, in [0, 1), of a running average of `other` over the updates of a training, each scaled to length 1: the
    rule takes that average in place of the update itself. The signs of a minibatch's R are noisy, those of the average
    less so. Only `warp_phys.interop.torch.Update` keeps an average; 0 needs none."""
    either: bool = False
    """Whether the rule, where the average leaves nothing of a component, takes the update itself: with the sign
    agreement, whether M may agree with either. One that is not finite is not asked. Only with a memory."""

    whole: bool = False
    """Whether the rule sees whole vectors, the flat updates of all that a pass trains, as projections do: then there is
    one backward pass per update, and nothing else, as x0, has a gradient by the flow. Only in the torch bridge."""

    def __post_init__(self):
        for name in ("base", "other"):
            if not isinstance(getattr(self, name), Flow):
                raise TypeError(f"{name} must be a Flow, got {getattr(self, name)!r}")
        if not callable(self.rule):
            raise TypeError(f"rule must be a function of two arrays, got {shown(self.rule)}")
        _check_arguments(self.rule)
        check_number("memory", self.memory)
        if not 0.0 <= self.memory < 1.0:
            raise ValueError(f"memory must be at least 0 and below 1, got {self.memory!r}")
        object.__setattr__(self, "memory", float(self.memory))
        for name in ("either", "whole"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
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
        name = getattr(self.rule, "__name__", "rule")
        try:
            update = self.rule(base, other)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            raise ValueError(f"rule {name} fails for two arrays of shape {tuple(base.shape)}: {error}") from error
        if getattr(update, "shape", None) != base.shape:
            got = getattr(update, "shape", type(update).__name__)
            got = got if isinstance(got, str) else tuple(got)
            raise ValueError(f"rule {name} must return the shape of its arguments, {tuple(base.shape)}, got {got}")
        if update.dtype != base.dtype:
            raise ValueError(f"rule {name} must return {base.dtype} as its arguments hold, got {update.dtype}")
        return update

    @property
    def name(self) -> str:
        """Name in words: that by which `resolve` knows it, or the rule and the flows."""
        for name, known in NAMED.items():
            if self == known:
                return name
        memory = f", memory {self.memory:g}" if self.memory else ""
        memory += " or now" if self.either else ""
        whole = "; whole" if self.whole else ""
        return f"{getattr(self.rule, '__name__', 'rule')}({self.base.name}; {self.other.name}{memory}{whole})"

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
        raise TypeError(f"flow must be a name, a letter, a Flow or a Combined, got {shown(flow)}")
    for name, known in NAMED.items():
        if flow.lower() == name or (flow and flow == known.letter):
            return known
    names = ", ".join(f"{name!r} ({known.letter})" if known.letter else repr(name) for name, known in NAMED.items())
    raise ValueError(f"flow {shown(flow)} is unknown; known are {names}, or give a Flow(physics, controller)")


def resolve_open_loop(flow: str | Flow | Combined) -> Flow:
    """Return the flow that a name, a letter or a flow stands for, where there is no controller.

    Raises:
        ValueError, TypeError: It is no flow, or one that compares two, which are the same there.

    >>> resolve_open_loop("M") is MODIFIED
    True
    """
    resolved = resolve(flow)
    if isinstance(resolved, Combined):
        raise ValueError(
            f"flow {resolved.name!r} compares feedback through a controller with that through the physics: an open "
            "loop has the physics alone, give 'regular' or a Flow"
        )
    return resolved


def linear_parts(flow: Flow | Combined) -> tuple[Flow, ...]:
    """Return the flows that a backward pass must run for `flow`: itself, or the two that it combines."""
    return (flow.base, flow.other) if isinstance(flow, Combined) else (flow,)


def resolve_all(flows: FlowLike | Sequence[FlowLike]) -> tuple[Flow | Combined, ...]:
    """Return the flows that one or several names, letters or flows stand for.

    Raises:
        ValueError: No flow has this name.
        TypeError: Neither text nor flows.
    """
    if isinstance(flows, (str, Flow, Combined)):
        return (resolve(flows),)
    if not isinstance(flows, Iterable) or isinstance(flows, (bytes, Mapping)):
        raise TypeError(f"flows must be a flow or several, got {shown(flows)}")
    return tuple(map(resolve, flows))


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


def refuse_whole(what: str, *flows: Flow | Combined) -> None:
    """Raise a ValueError for a flow whose rule sees whole vectors, of which there are only parts."""
    for flow in flows:
        if isinstance(flow, Combined) and flow.whole:
            raise ValueError(f"the rule of flow {flow.name!r} sees whole vectors: {what}")


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
