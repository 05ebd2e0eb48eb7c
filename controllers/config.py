"""A run as a file: every setting of a training with its explanation, as TOML that a person can read and edit."""

import ast
import difflib
import inspect
import json
import textwrap
import tomllib
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from controllers.checkpoint import atomic_write
from controllers.settings import Training
from warp_phys.systems import SYSTEMS

WORDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
    dict: ("a table", (dict,)),
}
"""What a setting of each type is called, and which values it takes."""


def write_config(path: str | Path, settings: Training) -> None:
    """Write the settings of a run: a line for each, under what it means; the system's parameters are a table.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.toml"
    >>> write_config(path, Training(parameters={"poles": 4}))
    >>> print(*path.read_text().splitlines()[2:4], sep=" | ")
    # Physical system, by name. | system = "cartpole"
    >>> read_config(path)["parameters"]["poles"]
    4
    """
    content = asdict(settings)
    parameters = content.pop("parameters")
    lines = ["# A training. One like it: python -m controllers --config FILE; flags override lines.", ""]
    lines += _lines(Training, content)
    lines += [f"# Of the system {settings.system}.", "[parameters]", "", *_lines(SYSTEMS[settings.system], parameters)]
    with atomic_write(path) as file:
        file.write(("\n".join(lines).rstrip() + "\n").encode())


def read_config(path: str | Path) -> dict[str, Any]:
    """Read such a file, whole or in part, for `Training(**…)`, which checks the values.

    Raises:
        OSError: It cannot be read.
        ValueError, TypeError: It is no TOML, or a field is unknown or of another type; the message names it.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a file of settings: {error}") from None
    try:
        _check(Training, content, "")
        kind = SYSTEMS.get(content.get("system", Training.system))
        if kind is not None:  # else `Training` says which systems there are
            _check(kind, content.get("parameters", {}), "parameters.")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None
    return content


def field_help(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, inherited fields included.

    >>> field_help(Training)["rate"]
    'Learning rate of Adam.'
    """
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if "__dataclass_fields__" in base.__dict__]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for entry, below in zip(body[:-1], body[1:], strict=True):
            match entry, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _lines(kind: type, values: dict[str, Any]) -> list[str]:
    """Each value under its explanation; None has no word in TOML and is left out, as it is the default."""
    texts, lines = field_help(kind), list[str]()
    for name, value in values.items():
        if value is not None:
            comment = textwrap.wrap(texts.get(name, ""), 100, initial_indent="# ", subsequent_indent="# ")
            lines += [*comment, f"{name} = {_toml(value)}", ""]
    return lines


def _toml(value: Any) -> str:
    """A value as TOML: numbers to the last digit."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, str)) else repr(value)


def _check(kind: type, content: dict[str, Any], prefix: str) -> None:
    """Raise an error that names the field where one is unknown, or of another type."""
    hints, known = typing.get_type_hints(kind), [entry.name for entry in fields(kind)]
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown field {prefix + name!r}; {advice}")
        wanted = _mismatch(hints[name], value)
        if wanted:
            raise TypeError(f"{prefix}{name} must be {wanted}, got {value!r}")


def _mismatch(hint: Any, value: Any) -> str:
    """What a value of this type is called, where `value` is something else; empty where it fits or anything goes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "" if value in parts else f"one of {', '.join(parts)}"
    if origin is tuple:
        inner = WORDS[parts[0]][0].split()[-1] + "s"
        fits = isinstance(value, list) and not any(_mismatch(parts[0], entry) for entry in value)
        count = 0 if parts[-1] is Ellipsis else len(parts)
        return "" if fits and (not count or len(value) == count) else f"a list of {f'{count} ' if count else ''}{inner}"
    if origin in (typing.Union, types.UnionType):
        wanted = [_mismatch(part, value) for part in parts]
        return " or ".join(wanted) if all(wanted) else ""
    word, kinds = WORDS.get(origin or hint, ("", (object,)))
    return "" if isinstance(value, kinds) and (hint is bool or not isinstance(value, bool) or not word) else word
