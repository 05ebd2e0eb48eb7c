"""In a checkout both names of a module are one module, wherever Python is started."""

import os
import subprocess
import sys

import pytest

from tests.packaging.installing import ROOT

ONE = """
import importlib, sys
first, second = sys.argv[1:]
for name in (first, second):
    importlib.import_module(name)
assert sys.modules[first] is sys.modules[second]
short = min(sys.argv[1:], key=len)
assert sys.modules[first].__name__ == short == sys.modules[first].__spec__.name
from warp_phys.controllers import MLP
import controllers
assert MLP is controllers.MLP is importlib.import_module("warp_phys.controllers.networks").MLP
print("one")
"""


def run(*arguments, cwd=ROOT):
    """Run Python with the checkout on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize("name", ["controllers", "controllers.training", "demos.experiments.plan", "demos"])
@pytest.mark.parametrize("first", [0, 1])
def test_two_names_are_one_module(name, first):
    names = [name, f"warp_phys.{name}"]
    done = run("-c", ONE, names[first], names[1 - first])
    assert done.stdout == "one\n", done.stderr


def test_programs_start_by_their_long_names(tmp_path):
    """Anywhere; the processes that a program hires find its functions by the name that it was started by."""
    small = "--poles 1 --epochs 1 --frames 2 --no-open --out out".split()
    done = run("-m", "warp_phys.demos", "swingup", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "summary.txt").exists()
    done = run("-m", "warp_phys.controllers", "--poles", "none", cwd=tmp_path)
    assert done.stderr == "python -m controllers: error: argument --poles: invalid int value: 'none'\n"


def test_what_is_not_there_is_told_as_ever():
    done = run("-c", "import warp_phys.controllers.wheels")
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'warp_phys.controllers.wheels'")


def test_another_folder_of_that_name_is_told(tmp_path):
    """The other folder is left alone: it is ours that cannot be had."""
    (tmp_path / "controllers").mkdir()
    (tmp_path / "controllers" / "__init__.py").write_text("MINE = True\n")
    done = run(
        "-c", "import warp_phys, controllers\nassert controllers.MINE\nimport warp_phys.controllers", cwd=tmp_path
    )
    assert f"is the checkout {ROOT}, whose folder controllers is hidden by {tmp_path}" in done.stderr
    assert "install it as a wheel instead" in done.stderr
