"""Start-up where the kernel cache is empty, shared, oddly named or closed: it works, or says what to set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from warp_phys.core import kernel_cache

ROOT = Path(__file__).parents[1]

STEP = """
import errno, fcntl
def refuse(*arguments, **options):
    raise OSError(errno.ENOLCK, "No locks available")  # as on some network file systems
fcntl.flock = fcntl.lockf = refuse
import warp as wp
wp.config.log_level = wp.LOG_WARNING
import warp_phys
system = warp_phys.Polynomial()
x, c, y = (wp.full((2, 1), value, dtype=float, device="cpu") for value in (1.0, 2.0, 0.0))
system.step(x, c, y)
print(y.numpy().tolist(), warp_phys.__file__, wp.config.kernel_cache_dir, sep="|")
"""


def environment(**changes: str) -> dict[str, str]:
    """The environment without what says where kernels are kept, with changes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("WARP_CACHE_PATH", "XDG_CACHE_HOME")}
    return kept | {"PYTHONIOENCODING": "utf-8"} | changes


def test_three_processes_on_an_empty_cache_with_odd_names_and_no_locks(tmp_path):
    place = tmp_path / "two words Ω 核 'n' %s"
    shutil.copytree(ROOT / "warp_phys", place / "warp_phys", ignore=shutil.ignore_patterns("__pycache__"))
    own = environment(WARP_CACHE_PATH=str(place / "kernel cache"), PYTHONPATH=str(place))
    command = [sys.executable, "-c", STEP]
    started = [
        subprocess.Popen(command, env=own, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        for _ in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found, package, cache = out.strip().split("|")
        assert found == "[[3.0], [3.0]]"
        assert Path(package).is_relative_to(place) and Path(cache).is_relative_to(place / "kernel cache")
    modules = [path.name for path in Path(cache).iterdir() if path.name != "headers"]
    assert len(modules) == 1, "each compiled apart, one took its place, and nothing is left beside it"
    headers = list((Path(cache) / "headers").iterdir())
    assert len(headers) == 1 and headers[0].suffix == ".pch"
    # One that is out of date, or damaged, is no more than lost time.
    headers[0].write_bytes(headers[0].read_bytes()[:5000])
    shutil.rmtree(Path(cache) / modules[0])
    again = subprocess.run(command, env=own, cwd=place, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.startswith("[[3.0], [3.0]]"), again.stderr


HOMELESS = """
import numpy, warp._src.context
import warp_phys
assert warp._src.context.runtime is None  # an import starts nothing
for call in (
    lambda: warp_phys.CartPole().parameter_array(),
    lambda: warp_phys.Dense((4, 1), device="cpu"),
    lambda: warp_phys.audit(warp_phys.CartPole()),
    lambda: warp_phys.CartPole().loss(numpy.zeros((2, 1, 4))),
):
    try:
        call()
    except OSError as error:
        print(error)
"""


def test_a_home_that_cannot_be_written(tmp_path):
    home = tmp_path / "home"
    home.write_text("")  # no folder can be made here, whoever asks
    command = [sys.executable, "-c", HOMELESS]
    done = subprocess.run(command, env=environment(HOME=str(home)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert str(home) in line and "cannot be made (Not a directory)" in line
        assert "set the environment variable WARP_CACHE_PATH" in line


def test_a_command_line_in_such_a_home(tmp_path):
    home = tmp_path / "home"
    home.write_text("")
    line = ["-m", "controllers", "--epochs", "1", "--train-states", "8", "--out", str(tmp_path / "run")]
    own = environment(HOME=str(home), MPLCONFIGDIR=str(tmp_path))
    done = subprocess.run([sys.executable, *line], env=own, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "python -m controllers: error: " in done.stderr and "WARP_CACHE_PATH" in done.stderr


def test_a_cache_that_can_only_be_read_is_told(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.warns(
        RuntimeWarning, match="cannot be written: kernels that are in it already will do.*WARP_CACHE_PATH"
    ):
        kernel_cache.start_warp.__wrapped__()
