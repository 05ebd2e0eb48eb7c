"""The structure of a system: what its kernels are made from, and the checks of its Warp functions."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import warp as wp

from warp_phys.programs.trace import check_indices


def structure_of(system: Any) -> Any:
    """Return a system's structure: of its class, without physical parameters. Equal ones have one hash.

    Reading a physical parameter of it is an error, and `functions` are looked through once, when first asked for.
    """
    kind: Any = type(system)
    blank = object.__new__(_structure_class(kind, system.parameter_names))
    for field in fields(system):
        if field.name not in system.parameter_names:
            object.__setattr__(blank, field.name, getattr(system, field.name))
    return blank


@functools.cache
def _structure_class(kind: Any, parameter_names: tuple[str, ...]) -> type:
    shaping = tuple(field.name for field in fields(kind) if field.compare and field.name not in parameter_names)

    def values(self):
        return tuple((name, getattr(self, name)) for name in shaping)

    def refused(name):
        def read(self):
            raise TypeError(
                f"{kind.__name__}.functions reads the physical parameter {name} from the system, where it has none: "
                f"numbers travel in the argument p of the Warp functions, so that a new one compiles nothing; read "
                f"p.{name}. A number that shapes the kernels is a field with another annotation than float"
            )

        return property(read)

    @functools.cache
    def functions(self, real):
        made = kind.functions(self, real)
        for function in (made.step, made.cost):
            _check_function(kind.__name__, function, real)
        check_indices(kind.__name__, self, made, real)
        return made

    members = {
        "__hash__": lambda self: hash(values(self)),
        "__eq__": lambda self, other: type(self) is type(other) and values(self) == values(other),
        "__repr__": lambda self: f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in values(self))})",
        "structure": property(lambda self: self),
        "functions": functions,
        **{name: refused(name) for name in parameter_names},
    }
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, **members})


def _check_function(owner: str, function: Any, real: type) -> None:
    """Raise a TypeError where a Warp function, or one that it calls, mixes float64 with Warp's literals, float32."""
    called = _called(function, {})  # finds physical parameters that are read from the system, too
    if real is not wp.float64:
        return
    try:
        function.adj.build(None)
    except Exception as error:
        reason = str(error).rpartition("\n;")[2]
        where = re.findall(r'function "(\w+)" at (.+:\d+):\n(.*)\n', str(error))
        if not where or "float64" not in reason:
            raise
        name, place, line = where[-1]
        raise TypeError(_literal_message(owner, name, place, line.strip(), reason)) from None
    for other in called:
        for node in _quotients(other.adj.tree):
            place = f"{other.adj.filename}:{other.adj.fun_lineno + node.lineno - 1}"
            reason = "arithmetic of plain numbers is done in float32, whatever is made of the result"
            raise TypeError(_literal_message(owner, other.key, place, ast.unparse(node), reason))


def _called(function: Any, found: dict[Any, None]) -> dict[Any, None]:
    """Return a Warp function, and all written in Python that it calls."""
    if function not in found and not function.is_builtin():
        found[function] = None
        for other in function.adj.get_references()[2]:
            _called(other, found)
    return found


def _quotients(node: ast.AST) -> Iterator[ast.BinOp]:
    """Return the arithmetic of plain numbers in a function's source, but for what is found at compile time."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("wp.static", "warp.static"):
        return
    if isinstance(node, ast.BinOp) and _literal(node.left) and _literal(node.right):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _quotients(child)


def _literal(node: ast.AST) -> bool:
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


def _literal_message(owner: str, name: str, place: str, line: str, reason: str) -> str:
    return (
        f"{owner}.functions(wp.float64): {name} mixes precisions at {place}: {line!r} ({reason}); to Warp a "
        "plain number is float32: write real(0.5) for 0.5, real(4.0) / real(3.0) for 4.0 / 3.0"
    )
