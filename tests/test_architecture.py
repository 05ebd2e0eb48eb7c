"""Imports go one way, and importing the engine costs no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for room in ("warp_phys", "controllers", "demos") for path in (ROOT / room).rglob("*.py"))
FRAMEWORKS = {"torch", "jax", "newton", "gymnasium", "matplotlib"}
STAND_INS = {f"warp_phys/{folder}/__init__.py" for folder in ("controllers", "demos")}
"""Other names of these folders, in a checkout; the first says to type checkers what it stands for."""

FORBIDDEN = {
    "warp_phys": {"controllers", "demos"},
    "controllers": {"demos"},
    "demos": set(),
}


def _imports(path, top_level):
    """Return the modules that a file imports; at its top level only, or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    if path.relative_to(ROOT).as_posix() in STAND_INS:
        return
    anywhere = {module.split(".")[0] for module in _imports(path, top_level=False)}
    assert not anywhere & FORBIDDEN[room]
    if room == "warp_phys" and "interop" not in path.parts:
        assert not anywhere & FRAMEWORKS
        assert not any(module.startswith("warp_phys.interop") for module in _imports(path, top_level=False))


def _arrows():
    """Return for each module of the engine the modules that it imports, at its top level or when it runs."""
    modules = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "warp_phys":
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    arrows = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inside & modules.keys() or {node.module}
        arrows[name] = found & modules.keys() - {name}
    return arrows


def _circle(arrows):
    """Return names on a circle, empty if there is none."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def _room(module):
    """Return the folder of a file; files that stand beside folders are rooms of their own."""
    folder = module.rpartition(".")[0]
    is_folder = (ROOT / Path(*module.split("."))).is_dir()
    return module if is_folder or folder in ("", "warp_phys", "warp_phys.interop") else folder


def test_no_circles():
    arrows = _arrows()
    assert len(arrows) > 50 and _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]
    assert _circle(arrows) == []
    rooms = {}
    for name, targets in arrows.items():
        rooms.setdefault(_room(name), set()).update(map(_room, targets))
    assert _circle({room: targets - {room} for room, targets in rooms.items()}) == []


def test_the_engine_comes_alone():
    program = "import sys, warp_phys; print(sorted({'torch', 'matplotlib', 'jax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip().endswith("[]")
