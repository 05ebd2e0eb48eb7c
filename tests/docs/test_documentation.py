"""What the documentation says is run: code blocks, doctests, links."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.docs.pages import PAGES, ROOT, WIDTH, blocks, code, difference, outputs, run_blocks, run_command
from tests.docs.remake import pictures

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """Return the anchor that Markdown viewers give a heading.

    >>> anchor("Gates on a tape: `gate`")
    'gates-on-a-tape-gate'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def modules() -> list[str]:
    """Return the names of all modules whose docstrings hold examples; programs' entry points aside."""
    names = []
    for package in ("warp_phys", "controllers", "demos"):
        found = pkgutil.walk_packages([str(ROOT / package)], package + ".")
        names += [package, *(module.name for module in found if not module.name.endswith("__main__"))]
    # warp_phys.controllers and warp_phys.demos are other names of the same modules
    names = [name for name in names if not re.match(r"warp_phys\.(controllers|demos)\b", name)]
    return [name for name in names if ">>> " in source(name)]


def source(name: str) -> str:
    """Return the text of a module."""
    path = ROOT.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")


def skip_without_jax(needed: bool) -> None:
    """Skip a test that needs JAX where there is none."""
    if needed:
        pytest.importorskip("jax", reason='needs JAX: pip install "warp_phys[jax]"')


@pytest.mark.parametrize("page", [p for p in PAGES if code(p)], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks_run(page, tmp_path):
    """A page's blocks run in order, and print what the page says."""
    skip_without_jax("import jax" in code(page))
    if "import mujoco" in code(page):
        pytest.importorskip("mujoco", reason='needs MuJoCo: pip install "warp_phys[mujoco]"')
    if "import onnxruntime" in code(page):
        pytest.importorskip("onnxruntime", reason='needs pip install "warp_phys[export]"')
    printed = run_blocks(page, tmp_path)
    for output in outputs(page):
        if not output.command:
            assert difference(output.text, printed[output.block], output.factor) is None


COMMANDS = [(page.stem, output) for page in PAGES for output in outputs(page) if output.command]


@pytest.mark.parametrize("output", [o for _, o in COMMANDS], ids=[f"{page}: {o.command}" for page, o in COMMANDS])
def test_programs_print_what_pages_say(output, tmp_path):
    assert difference(output.text, run_command(output.command, tmp_path), output.factor) is None


@pytest.mark.parametrize(
    ("said", "printed"), [("a 1.0", "b 1.0"), ("a 1.00", "a 1.02"), ("a 2", "a 3"), ("a 1", "a 1 2"), ("1e-3", "-1e-3")]
)
def test_what_differs_is_seen(said, printed):
    assert difference(said, said) is None
    assert difference(said, printed) is not None


def test_every_picture_has_a_line_that_makes_it():
    """`make pictures` finds them by these lines; those of docs/results are the outcome of hours of runs."""
    made = {word for page in PAGES for line in pictures(page) for word in line.split() if word.startswith("docs/")}
    made |= {word for _, output in COMMANDS for word in output.command.split() if word.startswith("docs/")}
    made.add("docs/swingup.gif")
    found = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".gif", ".html")]
    assert {p.relative_to(ROOT).as_posix() for p in found if p.parent.name != "results"} == made


def test_readme_example_trains():
    """The example of the README has few lines, and leaves an update in every parameter."""
    example = blocks(ROOT / "README.md")[0][2]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names = {}
    torch.manual_seed(0)  # of some weights the combined update leaves nothing for the last bias, a single number
    exec(compile(example, "README.md", "exec"), names)
    assert names["states"].shape == (101, 256, 10)
    assert names["controls"].shape == (100, 256, 1)
    for parameter in names["controller"].parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    skip_without_jax(name.startswith("warp_phys.interop.jax"))
    results = doctest.testmod(importlib.import_module(name), extraglobs={"np": np})
    assert results.attempted > 0
    assert results.failed == 0


@page_of
def test_links_lead_somewhere(page):
    """Relative links name a file that exists and, after a #, one of its headings."""
    for target in LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert file.exists(), f"{target} does not exist"
        if fragment:
            assert fragment in map(anchor, HEADING.findall(prose(file))), f"{target}: there is no such heading"


def test_the_readme_leads_to_every_page():
    """Of the site's, but its first one, which tells what the README does, and the reference."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    (where,) = re.findall(r"^## Where to read on$.*?(?=^## )", (ROOT / "README.md").read_text("utf-8"), re.S | re.M)
    assert {target.removeprefix("docs/") for target in LINK.findall(where)} == pages


@page_of
def test_lines_are_short(page):
    long = [n for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > WIDTH]
    assert not long, f"lines longer than {WIDTH} characters: {long}"


@page_of
def test_pages_name_no_path_of_a_machine(page):
    """A page speaks of the project, with paths relative to its root."""
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", page.read_text(encoding="utf-8"))
