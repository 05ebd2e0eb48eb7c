"""Values for arguments, sensible ones and nonsense, by the kind of the argument; and what an error must look like."""

import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
REFUSALS: tuple[type[Exception], ...] = (TypeError, ValueError)
"""What a refused argument raises; `Diverged` and others are no refusals."""

Kind = Any
"""A strategy of pairs: a value, and whether it is to be accepted; None where that depends on others."""


@dataclass(frozen=True, repr=False)
class Entry:
    """A public function, arguments with which it works, and of what kind each of them is."""

    name: str
    call: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that work; a function makes them anew for each call where it is marked by `fresh`."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    """What messages call an argument, where it is not its name."""

    def __repr__(self) -> str:
        return self.name

    def given(self) -> dict[str, Any]:
        """Arguments that work."""
        return {name: value() if isinstance(value, Fresh) else value for name, value in self.arguments.items()}


@dataclass(frozen=True)
class Fresh:
    """A value that is made for each call."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        return self.make()


def good(*values: Any) -> Kind:
    """Values that are to be accepted."""
    return st.sampled_from([(value, True) for value in values])


def bad(*values: Any) -> Kind:
    """Values that are to be refused."""
    return st.sampled_from([(value, False) for value in values])


def either(*values: Any) -> Kind:
    """Values that may be accepted or refused."""
    return st.sampled_from([(value, None) for value in values])


def checked(strategy: Any, is_good: Callable[[Any], bool | None]) -> Kind:
    """Values of a strategy, by a rule."""
    return strategy.map(lambda value: (value, is_good(value)))


class Odd:
    """An object of a user's own, whose representation takes lines."""

    def __repr__(self) -> str:
        return "an odd object\nof two lines"


NOTHING = (object(), Odd(), {}, {"a": 1}, [], (), b"bytes", "", "text", lambda: None, ..., 1j, int, Exception("e"))
"""What is no number, count, array, function of arrays, or name."""
NO_NUMBERS = (
    *NOTHING,
    None,
    True,
    "1.0",
    [1.0],
    np.array([1.0, 2.0]),
    np.array("a"),
    torch.ones(2),
    np.datetime64("now"),
)
NO_COUNTS = (*NO_NUMBERS, 1.0, 1.5, float("nan"), np.float64(2.0), torch.tensor(1.5), "3")


def count(least: int = 1, most: int = 4, limit: int = 2**31 - 1, optional: bool = False) -> Kind:
    """Integers from `least`; `most` is the largest that is tried, `limit` the largest that is allowed."""
    beyond = bad(limit + 1, 2**63, 2**70, 10**400, -(2**70)) if limit < 2**63 else bad(limit + 1, -(2**70))
    whole = checked(st.integers(-3, most), lambda n: n >= least)
    kinds = checked(st.integers(least, most), lambda _: True)
    as_numpy = kinds.map(lambda pair: (np.int64(pair[0]), True))
    nothing = [value for value in NO_COUNTS if value is not None or not optional]
    return st.one_of(whole, as_numpy, beyond, bad(*nothing))


def seed(optional: bool = False) -> Kind:
    """Seeds: integers from 0 to 2⁶⁴ − 1."""
    own = bad(np.random.default_rng(0), [1, 2], np.random.SeedSequence(1), -1, 2**64)
    return st.one_of(count(0, 2**20, 2**64 - 1, optional), own)


def number(least: float | None = None, positive: bool = False, most: float = 1e3, tensors: bool = True) -> Kind:
    """Finite numbers, at least `least` or positive; none above `most` is tried.

    Args:
        least: The least that is allowed.
        positive: Whether they must be positive.
        most: The largest that is tried.
        tensors: Whether tensors are looked into; one that stands for a number may be traced or on a device.
    """
    allowed = (lambda x: x > 0) if positive else (lambda x: least is None or x >= least)
    plain = st.floats(-10.0, most, allow_subnormal=False)
    as_numpy = plain.map(np.float64)
    whole = st.integers(-3, 9)
    wrong = [value for value in NO_NUMBERS if tensors or not isinstance(value, torch.Tensor)]
    wrong += [torch.tensor(float("nan"))] if tensors else []
    return st.one_of(
        checked(plain, allowed),
        checked(as_numpy, allowed),
        checked(whole, allowed),
        bad(float("nan"), float("inf"), -float("inf"), np.float64("nan"), 10**400, *wrong),
    )


def flag() -> Kind:
    """True or False."""
    return st.one_of(good(True, False, np.bool_(True)), bad(0, 1, None, 1.0, "yes", "False", *NOTHING))


def choice(*names: str) -> Kind:
    """One of a few words."""
    other = checked(st.text(max_size=8), lambda text: text in names)
    nothing = [value for value in NOTHING if not isinstance(value, str)]
    return st.one_of(good(*names), other, bad(None, 0, True, [names[0]], np.array(names), names[0].encode(), *nothing))


def function(*made: Any, optional: bool = True) -> Kind:
    """Functions; those given are accepted."""
    nothing = (0, 1.5, "text", [], {}, np.ones(2), torch.ones(2), b"f", object())
    return st.one_of(good(*made, *([None] if optional else [])), bad(*nothing, *([] if optional else [None])))


def device(optional: bool = True) -> Kind:
    """Devices that are here: the CPU."""
    wrong = ("gpu", "cuda:99", "tpu:0", "", "CPU!", 3, 1.5, [], b"cpu", object(), True)
    return st.one_of(good("cpu", *([None] if optional else [])), bad(*wrong))


def dtype() -> Kind:
    """The two precisions."""
    wrong = ("float16", "int32", int, complex, "f3", object(), 3, None, [], torch.float16)
    return st.one_of(good("float32", np.float32, np.float64, np.dtype("float64")), bad(*wrong))


def flow(extra: Sequence[Any] = (), wrong: Sequence[Any] = ()) -> Kind:
    """Flows by name or letter, and `extra`."""
    names = ("R", "M", "S", "N", "C", "regular", "modified", "combined", "minmod", *extra)
    nothing = (None, 0, 1.5, b"R", {}, np.ones(2), object(), "", "X", "r2", "both", *wrong)
    return st.one_of(good(*names), bad(*nothing))


def linear_flow(*extra: Any) -> Kind:
    """Flows that combine no two others."""
    names = ("R", "M", "S", "N", "regular", "modified", *extra)
    return st.one_of(
        good(*names), bad(None, 0, 1.5, b"R", {}, np.ones(2), object(), "", "X", "C", "combined", "minmod")
    )


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda a: a,
    "Fortran order": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "strides below zero": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "another byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
}
"""One array in memory in many ways."""


def array(
    shape: tuple[int, ...],
    kinds: Sequence[str] = ("numpy",),
    values: Sequence[float] = (0.0, 1.0, -0.5),
    dtype: str = "float32",
    optional: bool = False,
    lists: bool = True,
) -> Kind:
    """Arrays of one shape and precision: in all layouts, and what is none.

    Args:
        shape: Their shape; it is varied for what must be refused.
        kinds: Whose arrays are taken: "numpy", "torch".
        values: Numbers that they hold.
        dtype: Their precision.
        optional: Whether None will do.
        lists: Whether nested lists are taken; None where that is left open.
    """
    right = np.resize(np.array(values, dtype), shape)
    made: list[tuple[Any, bool | None]] = []
    if "numpy" in kinds:
        made += [(layout(right), True) for layout in LAYOUTS.values()]
    if "torch" in kinds:
        tensor = torch.from_numpy(right.copy())
        spread = torch.from_numpy(np.repeat(right, 2, axis=-1))[..., ::2]
        made += [(tensor, True), (spread, True), (tensor.clone().requires_grad_(), True)]
        made += [(tensor.to_sparse(), False), (tensor.to("meta"), False), (tensor.to(torch.complex64), False)]
    made += [(right.tolist(), lists)]
    wrong_shapes = [(), (0,), (*shape[:-1], shape[-1] + 1), (*shape, 1), shape[:-1], (*shape[:-1], 0), (0, *shape[1:])]
    wrong: list[Any] = [np.zeros(other, dtype) for other in wrong_shapes]
    wrong += [right.astype(kind) for kind in ("bool", "complex64", "U8", "object", "S4")]
    for value in (np.nan, np.inf, -np.inf):
        broken = right.copy()
        broken.flat[-1] = value
        wrong.append(broken)
    wrong += [[[1.0], [1.0, 2.0]], "text", 3, 1.5, object(), b"bytes", {"a": 1}, lambda: None, np.array(["a"])]
    wrong += [] if optional else [None]
    if "torch" in kinds:
        wrong = [
            torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) and a.dtype.kind in "fbc" else a for a in wrong
        ]
    return st.sampled_from(made + [(value, False) for value in wrong])


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of an array, that of a number for anything else."""
    return tuple(value.shape) if hasattr(value, "shape") else ()


def attempt(entry: Entry, argument: str, value: Any, is_good: bool | None) -> Any:
    """Call an entry with one argument replaced; fail unless it works or refuses as it should.

    Returns:
        What it returned, None where it refused.
    """
    given = entry.given() | {argument: value() if isinstance(value, Fresh) else value}
    try:
        result = entry.call(**given)
    except REFUSALS as error:
        assert is_good is not True, f"{entry.name} refuses {argument}={value!r}: {error}"
        check_message(error, entry.said.get(argument, argument))
        return None
    assert is_good is not False, f"{entry.name} accepts {argument}={value!r}"
    return result


def check_message(error: Exception, said: str) -> None:
    """Fail unless an error is one that this project raises on purpose, and says in a few lines what is wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    where = f"{last.filename}:{last.lineno}: {line}: {type(error).__name__}: {error}"
    assert Path(last.filename).is_relative_to(ROOT) and line.startswith("raise"), f"an error from within, {where}"
    text = str(error)
    assert any(word in text for word in said.split("|")), f"the message does not name {said}, {where}"
    assert 0 < len(text) < 2000, where
