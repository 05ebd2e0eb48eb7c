"""What calls of a module, or its user, may change about it besides numbers of parameters: how it is noticed."""

import functools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from warp_phys.interop.torch.chain import HOOKS


def parts_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a module and all its parts, each once: what `modules()` gives, in another order and much sooner."""
    found, left = {id(module): module}, [module]
    for part in left:
        for inner in part._modules.values():
            if inner is not None and id(inner) not in found:
                found[id(inner)] = inner
                left.append(inner)
    return left


def state_of(module: torch.nn.Module, outside: bool = False) -> tuple:
    """Return all of it, to be compared; see `Snapshot`."""
    return Snapshot(module, outside).state


class Snapshot:
    """What may change about a module, as it is now; and a way to see that nothing has, much sooner than by another one.

    With `outside`, which is for programs, also what its functions read that belongs to no module (globals, and what
    they close over), but no numbers of buffers.
    """

    def __init__(self, module: torch.nn.Module, outside: bool = False):
        parts = parts_of(module)
        self.parameters = [p for part in parts for p in part._parameters.values() if p is not None]
        self.buffers = [b for part in parts for b in part._buffers.values() if b is not None]
        self._dicts: list[tuple[dict, list, list]] = []  # with their keys and values
        self._empty: list[dict] = []
        self._kinds: list[tuple[torch.nn.Module, type, Any]] = []
        self._trained = [p.requires_grad for p in self.parameters]
        self._looks: list[tuple[Callable[[], Any], Any]] = []
        self._marks: list[tuple[Callable[[], Any], Any]] = []
        self.state = tuple(mark for part in parts for mark in self._marks_of(part, outside))

    def _marks_of(self, part: torch.nn.Module, outside: bool) -> Iterator[Any]:
        kind: Any = type(part)
        own, forward = vars(part), getattr(part.forward, "__func__", part.forward)
        self._kinds.append((part, kind, forward))
        yield from (_Same(part), kind, _Same(forward))
        for content in (own, part._modules, part._parameters, part._buffers, *(own.get(name, {}) for name in HOOKS)):
            if content:
                self._dicts.append((content, list(content.keys()), list(content.values())))
            else:
                self._empty.append(content)
        for name, value in own.items():
            if name not in _OF_MODULES:
                yield from (name, self._seen(value))
        yield tuple(_Same(hook) for name in HOOKS for hook in own.get(name, {}).values())
        for p in part._parameters.values():
            yield from (_Same(p), p is not None and p.requires_grad)
        for buffer in part._buffers.values():
            if outside and buffer is not None and buffer.is_floating_point():  # read by kernels, in each pass
                yield self._seen_by(functools.partial(_shape, buffer))
            else:
                yield self._seen(buffer)
        if outside:
            for function in (forward, *(value for value in own.values() if isinstance(value, FunctionType))):
                for look in _read_outside(getattr(function, "__func__", function), kind):
                    value = look()
                    self._looks.append((look, value))
                    yield self._seen(value)

    def _seen(self, value: Any) -> Any:
        look = functools.partial(_mark, value)
        return look() if type(value) in _FIXED else self._seen_by(look)

    def _seen_by(self, look: Callable[[], Any]) -> Any:
        mark = look()
        if not isinstance(mark, _Same):  # which stays as long as the object
            self._marks.append((look, mark))
        return mark

    def is_current(self) -> bool:
        """Whether a snapshot made now would be equal; it says no now and then where it would."""
        for content, keys, values in self._dicts:
            if list(content.keys()) != keys or not all(map(operator.is_, content.values(), values)):
                return False
        for part, kind, forward in self._kinds:
            if type(part) is not kind or getattr(part.forward, "__func__", part.forward) is not forward:
                return False
        return (
            not any(self._empty)
            and [p.requires_grad for p in self.parameters] == self._trained
            and all(look() is value for look, value in self._looks)
            and all(look() == mark for look, mark in self._marks)
        )


class Key:
    """A value that is compared by identity first, and whose hash is computed once."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: Any):
        self.value, self._hash = value, hash(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._hash == other._hash and self.value == other.value)

    def __hash__(self) -> int:
        return int(self._hash)


class _Same:
    """An object that is equal to itself alone; it is kept, so that no other one takes its place in memory."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_FIXED = {bool, int, float, str, type(None), torch.dtype}
"""What cannot change but by becoming another object."""


def _read_outside(function: Any, owner: type, depth: int = 2) -> Iterator[Callable[[], Any]]:
    """Yield what a function of somebody's reads that is no argument, each as a call that looks it up.

    These are globals by name, what is read of modules among them, what it closes over and what the class of its object
    has; and likewise for functions, methods and properties among these. What is not there, and may come, is None.
    """
    code = getattr(function, "__code__", None)
    if code is None or (getattr(function, "__module__", None) or "torch").partition(".")[0] == "torch":
        return
    names, found = _names(code), list[Callable[[], Any]]()
    found += [functools.partial(function.__globals__.get, name) for name in names]
    found += [functools.partial(getattr, cell, "cell_contents", None) for cell in function.__closure__ or ()]
    places = [place for look in found if isinstance(place := look(), ModuleType | type)]
    for place in [*places, *owner.__mro__]:
        home = place.__name__ if isinstance(place, ModuleType) else place.__module__
        if home.partition(".")[0] not in _LIBRARIES:
            found += [functools.partial(vars(place).get, name) for name in names]
    yield from found
    for look in found if depth else ():
        helper = look()
        inner = helper.fget if isinstance(helper, property) else helper
        if isinstance(inner, FunctionType) and inner is not function:
            yield from _read_outside(inner, owner, depth - 1)


_LIBRARIES = {"torch", "numpy", "math", "builtins"}
"""Where nobody changes anything."""


def _names(code: CodeType) -> tuple[str, ...]:
    """Return the names that code reads, that of functions inside it too."""
    inside = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return tuple(dict.fromkeys([*code.co_names, *inside]))


_OF_MODULES = {name for name in vars(torch.nn.Module()) if name != "training"}
"""What every module has; of these what matters is looked at by itself."""

LONGEST, CONTENT = 64, 16384
"""Most entries of a list or a mapping, and numbers of an array, that are looked at."""

_OPAQUE = (type, torch.nn.Module, FunctionType, ModuleType)
"""What is looked at elsewhere, or changes for reasons of its own."""


def _mark(value: Any, depth: int = 3) -> Any:  # noqa: PLR0911, a kind each
    """Return what tells whether an attribute has become another one."""
    if isinstance(value, torch.Tensor):
        return _Same(value), -1 if value.is_inference() else value._version, value.shape, _numbers(value)
    if value is None or isinstance(value, bool | int | str | torch.dtype):
        return value
    if isinstance(value, float):
        return value if value == value else "nan"  # noqa: PLR0124
    if depth and isinstance(value, Mapping | list | tuple) and len(value) <= LONGEST:
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        return id(type(value)), tuple(
            (key if isinstance(key, str | int) else id(key), _mark(v, depth - 1)) for key, v in entries
        )
    if isinstance(value, np.ndarray):
        return _Same(value), value.shape, hash(value.tobytes()) if value.size <= CONTENT else None
    if isinstance(value, Mapping | list | tuple | set | frozenset | deque):
        return _Same(value), len(value)
    own = None if isinstance(value, _OPAQUE) else _held(value)
    if own is None:
        return _Same(value)
    if not depth or len(own) > LONGEST:
        return _Same(value), len(own)
    return _Same(value), tuple((name, _mark(entry, depth - 1)) for name, entry in own.items())


def _numbers(tensor: torch.Tensor) -> int | None:
    """Return a hash of a tensor's numbers: what shares its memory may change them without a new version of it."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return None
    if tensor.layout is not torch.strided or tensor.numel() > CONTENT:
        return None
    return hash(
        tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )


def _held(value: Any) -> dict[str, Any] | None:
    """Return what an object holds, in its dictionary and in slots; None if it has neither."""
    own, found = getattr(value, "__dict__", None), dict[str, Any]()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        found |= {name: getattr(value, name, None) for name in names if name[:2] != "__"}
    if isinstance(own, dict):
        return found | own
    return found or None


def _shape(tensor: torch.Tensor) -> tuple:
    return _Same(tensor), tensor.shape, tensor.stride(), tensor.dtype
