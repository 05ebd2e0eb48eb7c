"""Files that speak of the project: one version, one paper."""

import re

import warp_phys
from tests.packaging.installing import ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_in_one_place():
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == warp_phys.__version__
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "README.md"):
        assert f'"{warp_phys.__version__}"' not in read(name)
        assert not re.search(r"^version:", read(name), re.MULTILINE)


def test_the_paper_is_cited():
    for name in ("CITATION.cff", "README.md"):
        assert "Stabilizing Backpropagation Through Time to Learn Complex Physics" in read(name)
    assert "arXiv:2405.02041" in read("CITATION.cff")


def test_the_workflows_install_what_make_does():
    (extras,) = re.findall(r"--editable \"(\S+)\"", read(".github/workflows/tests.yml"))
    assert extras in read("Makefile")
