"""A wheel outside of the checkout: what is in it, what it leaves alone, what it asks for."""

import ast
import email
import re
import tarfile

import pytest

import warp_phys
from tests.packaging.installing import ROOT

FUSED = """
import numpy as np
import controllers, demos
assert controllers.MINE and demos.MINE
import torch
from warp_phys import CartPole
from warp_phys.controllers import MLP, Training, train
from warp_phys.interop.torch import Rollout
import warp_phys.controllers.commandline, warp_phys.demos.views, warp_phys.demos.experiments.plan

system = CartPole(poles=2)
rollout = Rollout(system, MLP(system, (8,), seed=0), steps=5, flow="C", backend="fused")
states, controls = rollout(system.sample(4, seed=0))
system.loss(states, controls).backward()
print(rollout.backend, float(next(rollout.controller.parameters()).grad.abs().sum()) > 0)
import sys
from pathlib import Path
here = Path.cwd()
ours = [name for name in sys.modules if name.split(".")[0] in ("controllers", "demos")]
assert all(Path(sys.modules[name].__file__).is_relative_to(here) for name in ours), ours
"""

ALONE = """
import numpy as np
import warp_phys
system = warp_phys.CartPole(poles=1)
print(system.sample(2, seed=0).shape)
import importlib
for name in (
    "interop.torch", "interop.torch.rollout", "interop.jax", "interop.newton", "interop.gymnasium",
    "controllers", "controllers.networks", "controllers.settings", "controllers.training", "controllers.checkpoint",
):
    try:
        importlib.import_module("warp_phys." + name)
        print(name, "is there")
    except ImportError as error:
        print(name, "|", type(error).__name__, "|", error)
"""


@pytest.fixture
def project(tmp_path):
    """A project that has folders of these names."""
    for name in ("controllers", "demos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    return tmp_path


def test_its_files(wheel):
    files = wheel.parent / "files"
    found = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    assert {name.split("/")[0] for name in found} == {"warp_phys", f"warp_phys-{warp_phys.__version__}.dist-info"}
    wanted = set()
    for folder in ("warp_phys", "controllers", "demos"):
        kinds = {".py", ".h", ".npz", ".typed"}
        paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
        wanted |= {path.as_posix() if folder == "warp_phys" else f"warp_phys/{path.as_posix()}" for path in paths}
    wanted -= {"warp_phys/checkout.py"}
    assert {name for name in found if name.startswith("warp_phys/")} == wanted
    assert "warp_phys/programs/native/rows.h" in wanted and "warp_phys/demos/trained/herd.npz" in wanted


def test_its_modules_say_their_names_in_full(wheel):
    for path in (wheel.parent / "files").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] in ("controllers", "demos") for name in names), path
        assert not re.search(r"-m (controllers|demos)\b", text), path


def test_it_is_the_checkout_but_for_names(wheel):
    """Nothing else is changed in a file: the same lines, and each that differs is an import or names a program."""
    files = wheel.parent / "files" / "warp_phys"
    for folder in ("controllers", "demos"):
        for path in (ROOT / folder).rglob("*.py"):
            here = path.read_text(encoding="utf-8").splitlines()
            there = (files / path.relative_to(ROOT)).read_text(encoding="utf-8").splitlines()
            for mine, its in zip(here, there, strict=True):
                assert its.replace(f"warp_phys.{folder}", folder).replace("warp_phys.controllers", "controllers") == (
                    mine.replace(f"warp_phys.{folder}", folder).replace("warp_phys.controllers", "controllers")
                )


def test_an_sdist_holds_all_that_a_checkout_needs(wheel):
    (sdist,) = wheel.parent.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"setup.py", "CHANGELOG.md", "CITATION.cff", "LICENSE", "controllers/training.py"} <= names
    assert {"warp_phys/checkout.py", "warp_phys/controllers/__init__.py", "warp_phys/demos/__init__.py"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_it_asks_for_warp_and_numpy_only(wheel):
    (metadata,) = (wheel.parent / "files").glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(encoding="utf-8"))
    asked = [line for line in message.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[<>=]", line)[0] for line in asked) == ["numpy", "warp-lang"]
    assert message["Version"] == warp_phys.__version__


def test_nothing_stands_at_the_top_of_site_packages(installed, tmp_path):
    for name in ("controllers", "demos"):
        done = installed.run("-c", f"import warp_phys.{name}; import {name}", cwd=tmp_path)
        assert done.stderr.strip().endswith(f"ModuleNotFoundError: No module named '{name}'")


def test_a_project_with_such_folders_is_left_alone(installed, project):
    (project / "main.py").write_text(FUSED)
    done = installed.run("main.py", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fused True"


def test_its_programs_start(installed, project):
    listed = installed.run("-m", "warp_phys.demos", cwd=project).stdout.splitlines()
    assert any(line.startswith("python -m warp_phys.demos.race ") for line in listed)
    program = ["-m", "warp_phys.demos", "cartpole", "--save", "cart.png", "--seconds", "0.1"]
    done = installed.run(*program, cwd=project)
    assert done.returncode == 0, done.stderr
    assert (project / "cart.png").read_bytes().startswith(b"\x89PNG")
    done = installed.run("-m", "warp_phys.controllers", "--poles", "none", cwd=project)
    assert done.stderr == "python -m warp_phys.controllers: error: argument --poles: invalid int value: 'none'\n"


def test_the_engine_alone(installed, tmp_path):
    """With Warp and numpy at hand the engine works, and all else says in one sentence what to install."""
    done = installed.run("-c", ALONE, cwd=tmp_path, libraries=installed.bare)
    assert done.returncode == 0, done.stderr
    shape, *lines = done.stdout.splitlines()[-11:]
    assert shape == "(2, 4)"
    assert len(lines) == 10
    for line in lines:
        room, name = line.split(" | ")[0].split(".")[:2] if "interop" in line else ("", "torch")
        assert line.endswith(f'| ImportError | {name} is not installed: pip install "warp_phys[{name}]"'), line
    for demo in ("cartpole", "swingup", "newton_control"):
        done = installed.run("-m", f"warp_phys.demos.{demo}", cwd=tmp_path, libraries=installed.bare)
        assert (done.returncode, done.stderr) == (1, 'error: torch is not installed: pip install "warp_phys[demos]"\n')
