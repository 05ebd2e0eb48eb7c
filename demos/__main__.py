"""`python -m demos` lists the demos with a line each; `python -m demos race` is `python -m demos.race`."""

import ast
import runpy
import sys
from pathlib import Path


def list_demos() -> dict[str, str]:
    """The first line of the docstring of every module here that can be run; nothing is imported."""
    demos = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(entry, ast.FunctionDef) and entry.name == "main" for entry in module.body):
            demos[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return demos


if __name__ == "__main__":
    found = list_demos()
    if len(sys.argv) > 1:
        name = sys.argv.pop(1)
        if name not in found:
            sys.exit(f"python -m {__package__}: error: the demo must be one of {', '.join(found)}, got {name!r}")
        runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)
    width = max(map(len, found))
    for name, line in found.items():
        print(f"python -m {__package__}.{name:{width}}  {line}")
