"""Pages as programs: their Python blocks, what these print, and what the pages say they print.

A fence with the word `output` holds what the block before it prints: a Python block, or a shell block whose last line
starts a program. Numbers may differ by one per cent, or by one in their last digit; a comment above the fence may
say otherwise, for what depends on the processor (a training takes another way where sums are rounded otherwise):
`<!-- numbers within a factor of 3 -->`, or `<!-- numbers of one processor -->`, of which the words alone are compared.
"""

import contextlib
import importlib.util
import io
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH = 120

FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOLERANCE = re.compile(r"<!-- numbers (?:within a factor of (\S+)|of one processor) -->\n$")
NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
MARK = "\x1e"


class Output(NamedTuple):
    """What a page says is printed."""

    text: str
    span: tuple[int, int]
    """Where it stands in the page."""
    block: int
    """The Python block that prints it, or -1."""
    command: str
    """The line of a shell that prints it, or nothing."""
    factor: float
    """By which numbers may differ; 1.01 if the page does not say."""


def blocks(page: Path) -> list[re.Match[str]]:
    """The Python blocks of a page, as matches whose second group is the code."""
    return [fence for fence in FENCE.finditer(page.read_text(encoding="utf-8")) if fence[1] == "python"]


def code(page: Path) -> str:
    """A page's Python blocks as one program, each line at its line number in the page, a mark printed before each."""
    text, lines = page.read_text(encoding="utf-8"), []
    for block in blocks(page):
        lines += [""] * (text.count("\n", 0, block.start()) - len(lines))
        lines += [f"print({MARK!r})", *block[2].splitlines()]
    return "\n".join(lines) + "\n" if lines else ""


def outputs(page: Path) -> list[Output]:
    """What a page says is printed, in order."""
    text, found, block, command = page.read_text(encoding="utf-8"), [], -1, ""
    for fence in FENCE.finditer(text):
        if fence[1] == "python":
            block, command = block + 1, ""
        elif fence[1] == "sh":
            command = fence[2].strip().splitlines()[-1].partition("  #")[0]
        elif fence[1] == "output":
            comment = TOLERANCE.search(text, 0, fence.start())
            factor = float(comment[1] or "inf") if comment else 1.01
            found.append(Output(fence[2], fence.span(2), -1 if command else block, command, factor))
    return found


def run_blocks(page: Path, folder: Path) -> list[str]:
    """Run a page's program, as a module on disk (Warp reads the source of kernels there); what each block prints."""
    name = "documented_" + page.stem.lower()
    file = folder / f"{name}.py"
    file.write_text(code(page), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A page may write files; they belong into the folder.
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        spec.loader.exec_module(module)
    return printed.getvalue().split(f"{MARK}\n")[1:]


def run_command(command: str, folder: Path) -> str:
    """Run a program as a page says, with its picture in a folder; what it prints, but for where the picture is."""
    words = [word.replace("docs/", f"{folder}{os.sep}") for word in shlex.split(command)]
    assert words[0] == "python", command
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, *words[1:]], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment
    )
    return "".join(line for line in done.stdout.splitlines(keepends=True) if str(folder) not in line)


def difference(said: str, printed: str, factor: float = 1.01) -> str | None:
    """Where a page and a program disagree, or None.

    >>> difference("loss 0.50, 3 left", "loss 0.504, 3  left")
    >>> difference("loss 0.50", "loss 0.6")
    'the page says 0.50, printed is 0.6'
    """
    words, others = (" ".join(NUMBER.sub("#", text).split()) for text in (said, printed))
    if words != others:
        return f"the page says {words!r}, printed is {others!r}"
    for ours, theirs in () if factor == math.inf else zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True):
        a, b = (float(text.replace("−", "-")) for text in (ours, theirs))
        digits = len(ours.partition("e")[0].partition(".")[2]) - int(ours.partition("e")[2] or 0)
        near = abs(a - b) <= 1.01 * 10.0**-digits if "." in ours or "e" in ours else a == b
        if not near and not (a * b > 0.0 and max(a / b, b / a) <= factor):
            return f"the page says {ours}, printed is {theirs}"
    return None
