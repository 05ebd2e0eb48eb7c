"""The README's example under the eyes of mypy and of pyright, with the wheel installed, outside of the checkout."""

import json
import os
import re
import subprocess
import sys
import typing

import pytest

from tests.docs.pages import blocks
from tests.packaging.installing import LIBRARIES, ROOT
from warp_phys.flow import NAMED, FlowName

WRONG = """
import torch

from warp_phys import CartPole
from warp_phys.controllers import MLP, Training
from warp_phys.interop.torch import Rollout, Update

system = CartPole(poles=1)
Rollout(system, MLP(system), 5, flow="regualr")  # wrong
Rollout(system, MLP(system), 5, backend="fast")  # wrong
Rollout(system, MLP(system), 5, on_divergence="stop")  # wrong
Rollout("cartpole", MLP(system), 5)  # wrong
right = Rollout(system, MLP(system), 5, flow="C", backend="general", on_divergence="mask")
optimiser = torch.optim.Adam(right.controller.parameters())
Update(right, optimiser, clip="nrm")  # wrong
Update(right, optimiser, when="finally")  # wrong
Update(right, optimiser, when=[1, 5], clip="norm")
system.loss(*right(system.sample(4)), when="ever")  # wrong
Training(clip="nrm")  # wrong
Training(clip="norm", flow="M")
"""
MISTAKES = [number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the README's example as it stands, and with a program of mistakes."""
    folder = tmp_path_factory.mktemp("programs")
    program = "\n".join(block[2] for block in blocks(ROOT / "README.md"))
    (folder / "example.py").write_text(program, encoding="utf-8")
    (folder / "wrong.py").write_text(WRONG, encoding="utf-8")
    return folder


def run(checker, folder):
    """Run a type checker, a module of this environment."""
    environment = os.environ | {"PYTHONPATH": str(LIBRARIES)}
    command = [sys.executable, "-P", "-m", *checker]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_mypy(installed, programs):
    done = run(["mypy", "--strict", "--python-executable", str(installed.python), "example.py", "wrong.py"], programs)
    found = re.findall(r"^(\w+)\.py:(\d+): error: (.*)", done.stdout, re.MULTILINE)
    assert [(name, int(line)) for name, line, _ in found] == [("wrong", line) for line in MISTAKES], done.stdout


def test_pyright(installed, programs):
    settings = ["--outputjson", "--pythonpath", str(installed.python), "--level", "error"]
    (programs / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    done = run(["basedpyright", *settings], programs)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = [(entry["file"].split("/")[-1].split("\\")[-1], entry["range"]["start"]["line"] + 1) for entry in found]
    assert lines == [("wrong.py", line) for line in MISTAKES], done.stdout


def test_the_names_of_flows_are_those_of_the_table():
    letters = [flow.letter for flow in NAMED.values() if flow.letter]
    assert sorted(typing.get_args(FlowName)) == sorted([*NAMED, *letters])
