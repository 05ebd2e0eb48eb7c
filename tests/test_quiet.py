"""Warp starts and compiles in silence where a program asks for it; what else goes wrong is still told."""

import os
import subprocess
import sys

import pytest
import warp as wp

from warp_phys import quiet
from warp_phys.core.kernel_cache import start_warp
from warp_phys.core.quiet import NO_DRIVER

PROGRAM = """
import numpy as np
from warp_phys import Polynomial, quiet
quiet()
import warp as wp
x, c, y = (wp.zeros((1, 1), device="cpu") for _ in range(3))
Polynomial().step(x, c, y)
"""


@pytest.fixture
def not_started():
    """Warp as in a new process: whatever ran here before may have started it, which is done once."""
    start_warp.cache_clear()
    yield
    start_warp.cache_clear()


def test_a_program_says_nothing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_other_warnings_are_passed_on(monkeypatch, capfd, not_started):
    monkeypatch.setattr(wp.config, "log_level", wp.LOG_ERROR)
    monkeypatch.setattr(wp, "init", lambda: os.write(2, b"Warp CUDA warning: " + NO_DRIVER + b".\nanother one\n"))
    quiet()
    assert capfd.readouterr().err == "another one\n"
    assert wp.config.log_level == wp.LOG_ERROR  # never louder than it was


def test_errors_go_on_being_told(monkeypatch, capfd, not_started):
    def fail():
        os.write(2, b"why\n")
        raise RuntimeError("no Warp")

    monkeypatch.setattr(wp, "init", fail)
    with pytest.raises(RuntimeError, match="no Warp"):
        quiet()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "why\nlater\n"
