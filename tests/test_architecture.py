"""Imports go one way, and importing the engine costs no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for room in ("warp_phys", "controllers", "demos") for path in (ROOT / room).rglob("*.py"))
FRAMEWORKS = {"torch", "jax", "newton", "gymnasium", "matplotlib"}

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
    anywhere = {module.split(".")[0] for module in _imports(path, top_level=False)}
    assert not anywhere & FORBIDDEN[room]
    if room == "warp_phys" and "interop" not in path.parts:
        assert not anywhere & FRAMEWORKS
        assert not any(module.startswith("warp_phys.interop") for module in _imports(path, top_level=True))


def test_the_engine_comes_alone():
    program = "import sys, warp_phys; print(sorted({'torch', 'matplotlib', 'jax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip().endswith("[]")
