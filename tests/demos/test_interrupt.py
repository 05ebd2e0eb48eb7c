"""Ctrl-C ends every demo without a traceback, also while its imports go on."""

import os
import subprocess
import sys

import pytest

from demos.__main__ import list_demos


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("name", sorted(list_demos()))
def test_ctrl_c_during_imports(name, tmp_path):
    """It comes as the first of the large libraries is imported."""
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    for library in ("matplotlib", "newton", "numpy", "torch", "warp"):
        (tmp_path / f"{library}.py").write_text(text)
    # -P: the current folder would come before these otherwise
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    command = [sys.executable, "-P", "-m", f"demos.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
