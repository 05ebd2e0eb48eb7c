"""tests/gpu/run.sh in its dry mode: the steps, the table, a time limit, mistakes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run.sh")
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and timeout"
)


def run(*arguments, python=sys.executable, packages=None):
    environment = {"PYTHON": str(python), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    packages = packages or [path for path in sys.path if path.endswith("-packages")]
    environment |= {"PYTHONPATH": ":".join(map(str, packages))}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=500)


def test_a_dry_run(tmp_path):
    """What takes long, tests and benchmark, is cut short by the limit: their lines stand in the table."""
    done = run("--dry", "--out", tmp_path, "--limit", "25")
    steps = [line.split(",")[:2] for line in (tmp_path / "steps.csv").read_text().splitlines()]
    assert [name for name, _ in steps] == ["environment", "device", "tests", "benchmark"], done.stdout + done.stderr
    assert all(end in ("passed", "out of time", "no time left") for _, end in steps), done.stdout
    assert done.returncode == int(any(end != "passed" for _, end in steps))
    assert "| step | end | seconds | |" in done.stdout
    assert (tmp_path / "table.md").read_text() in done.stdout


def test_no_time(tmp_path):
    done = run("--dry", "--out", tmp_path, "--limit", "0")
    assert done.returncode == 1
    assert "| environment | no time left | 0 |  |" in done.stdout


def test_what_is_missing_is_said(tmp_path):
    """A Python without anything, one with torch alone, one with torch and pip where the wheels are none."""
    bare, modules, wheels = tmp_path / "bare", tmp_path / "modules", tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    for folder in (modules, wheels):
        folder.mkdir()

    def said(*arguments):
        done = run("--dry", "--out", tmp_path / "out", *arguments, python=bare / "bin" / "python", packages=[modules])
        assert done.returncode == 1 and "| environment | failed (1) |" in done.stdout
        return done.stderr

    assert "has no torch that can be imported" in said("--wheels", wheels)
    (modules / "torch.py").touch()
    assert "has no pip, which --wheels needs" in said("--wheels", wheels)
    (modules / "pip.py").write_text("raise SystemExit(__import__('sys').argv[-1] != '--version')")
    (modules / "warp.py").write_text("raise ImportError")
    assert re.search("lacks warp[a-z ]*: --wheels must name a folder with their wheels", said("--wheels", wheels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--moon"], "unknown: --moon"),
        (["--limit"], "--limit needs a value"),
        (["--limit", "soon"], "limit must be a number of seconds, got soon"),
        (["--wheels", "/no/such/folder"], "there is no folder /no/such/folder"),
    ],
)
def test_mistakes(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
