"""Makes the pictures and the printed output of README and docs anew: `make pictures`.

    python -m tests.docs.remake              # all
    python -m tests.docs.remake tutorial     # what one page prints and shows

Pictures are those that a page makes by a line with `--save docs/…`, and the film of `make demo`. What docs/results
holds is left alone: it is the outcome of hours of runs (docs/paper.md).
"""

import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tests.docs.pages import FENCE, PAGES, ROOT, WIDTH, outputs, run_blocks, run_command
from warp_phys import quiet

PICTURE = re.compile(r"^python .*--save docs/\S+.*$", re.MULTILINE)


def pictures(page: Path) -> list[str]:
    """The lines of a page that make a picture of docs, and print nothing that the page shows."""
    shown = {output.command for output in outputs(page)}
    fences = [fence[2] for fence in FENCE.finditer(page.read_text(encoding="utf-8")) if fence[1] == "sh"]
    joined = [re.sub(r"\\\n\s*", "", fence) for fence in fences]  # commands may take two lines
    lines = [line.partition("  #")[0] for fence in joined for line in PICTURE.findall(fence)]
    return [line for line in dict.fromkeys(lines) if line not in shown]


def wrapped(text: str) -> str:
    """Text whose lines fit into a page."""
    lines = [textwrap.wrap(line, WIDTH - 2, drop_whitespace=True) or [""] for line in text.rstrip().splitlines()]
    return "\n".join(part for parts in lines for part in parts) + "\n"


def remake(page: Path) -> None:
    """Make one page's output and pictures."""
    for line in pictures(page):
        print(line, flush=True)
        subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, cwd=ROOT)
    found = outputs(page)
    if not found:
        return
    print(page.relative_to(ROOT), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        printed = run_blocks(page, folder) if any(not output.command for output in found) else []
        texts = [run_command(o.command, folder) if o.command else printed[o.block] for o in found]
        for made in folder.glob("*.png"):  # a picture that a line made beside its output
            made.replace(ROOT / "docs" / made.name)
    text = page.read_text(encoding="utf-8")
    for output, new in reversed(list(zip(found, texts, strict=True))):
        text = text[: output.span[0]] + wrapped(new) + text[output.span[1] :]
    page.write_text(text, encoding="utf-8", newline="\n")


def film() -> None:
    """Make the film of `make demo`."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-m", "demos.swingup", "--no-open", "--out", name], check=True, cwd=ROOT)
        (Path(name) / "swingup.gif").replace(ROOT / "docs" / "swingup.gif")


def main(arguments: Sequence[str]) -> None:
    """Make all, or what the pages of these names have."""
    quiet()
    for page in PAGES:
        if not arguments or page.stem.lower() in arguments:
            remake(page)
    if not arguments or "readme" in arguments:
        film()


if __name__ == "__main__":
    main([name.lower() for name in sys.argv[1:]])
