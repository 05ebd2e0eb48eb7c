"""`python -m demos` lists the demos with a line each."""

import ast
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
    width = max(map(len, found))
    for name, line in found.items():
        print(f"python -m demos.{name:{width}}  {line}")
