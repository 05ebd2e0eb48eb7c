"""What the documentation says is run: code blocks, doctests, links."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDTH = 120

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code(page: Path) -> str:
    """Return a page's Python blocks as one program, each line at its line number in the page."""
    text, lines = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        first = text.count("\n", 0, match.start(1))
        lines += [""] * (first - len(lines)) + match[1].splitlines()
    return "\n".join(lines) + "\n" if lines else ""


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
    """A page's blocks run in order, in a module on disk: Warp reads the source of kernels from their file."""
    skip_without_jax("import jax" in code(page))
    if "import mujoco" in code(page):
        pytest.importorskip("mujoco", reason='needs MuJoCo: pip install "warp_phys[mujoco]"')
    name = "documented_" + page.stem.lower()
    file = tmp_path / f"{name}.py"
    file.write_text(code(page), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def test_readme_example_trains():
    """The example of the README has few lines, and leaves an update in every parameter."""
    example = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]
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


@page_of
def test_lines_are_short(page):
    long = [n for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > WIDTH]
    assert not long, f"lines longer than {WIDTH} characters: {long}"


@page_of
def test_pages_name_no_path_of_a_machine(page):
    """A page speaks of the project, with paths relative to its root."""
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_index():
    linked = LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"} <= set(linked)
