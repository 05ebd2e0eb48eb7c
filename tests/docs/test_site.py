"""The site: built without a warning, its links checked; pages that are notebooks; what Colab is led to."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import PAGES, ROOT, blocks

for needed in ("mkdocs", "material", "mkdocstrings", "jupytext"):
    pytest.importorskip(needed, reason='needs pip install "warp_phys[docs]"')

NOTEBOOKS = [page for page in PAGES if page.read_text(encoding="utf-8").startswith("---\njupyter:")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as GitHub builds it."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"GITHUB_REPOSITORY": "someone/something", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_has_every_page(site):
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / (name if name.name != "index" else name.parent) / "index.html").exists(), name


def test_the_reference_has_shapes_units_and_examples(site):
    systems, engine = (
        (site / "api" / name / "index.html").read_text(encoding="utf-8") for name in ("systems", "engine")
    )
    assert "Half length l of a pole [m]." in systems
    assert "doc-symbol" in engine or "doc-heading" in engine
    assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", engine, flags=re.DOTALL)  # doctests are code


def test_links_to_the_sources_lead_to_the_repository(site):
    page = (site / "extending" / "index.html").read_text(encoding="utf-8")
    assert 'href="https://github.com/someone/something/blob/main/warp_phys/systems/pendulum.py"' in page


def test_there_are_three_notebooks():
    assert [page.stem for page in NOTEBOOKS] == ["explodes", "own_simulator", "tutorial"]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_page_is_a_notebook(site, page):
    """Its cells are the page's blocks, which the tests run, after one that installs; Colab is led to its file."""
    book = json.loads((site / "notebooks" / f"{page.stem}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert cells[0] == '%pip install --quiet "warp-phys[demos] @ git+https://github.com/someone/something"'
    assert cells[1:] == [block[2].strip() for block in blocks(page)]
    html = (site / page.stem / "index.html").read_text(encoding="utf-8")
    assert f"colab.research.google.com/github/someone/something/blob/gh-pages/notebooks/{page.stem}.ipynb" in html
    assert f'href="../notebooks/{page.stem}.ipynb"' in html


def test_without_a_repository_nothing_leads_to_one(monkeypatch):
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert "colab" not in hooks.badge("tutorial") and "github" not in hooks.notebook(NOTEBOOKS[0].read_text("utf-8"))
