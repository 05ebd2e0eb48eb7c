"""What the tests of this folder share: the distributions, and programs in an environment of their own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = Path(sysconfig.get_path("purelib"))
"""Where the libraries are that the tests have; on PYTHONPATH they serve another environment, this checkout does not."""
BUILT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")
NEEDED = ("warp", "numpy", "numpy.libs")
"""All that the engine needs, as folders in LIBRARIES."""


def build(folder: Path) -> Path:
    """Build an sdist and from it a wheel, as `make dist` does; returns the wheel, unpacked beside itself in `files`."""
    source = folder / "source"
    for room in ("warp_phys", "controllers", "demos"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "files")
    return wheel


class Environment:
    """A virtual environment outside of the checkout; nothing but the wheel is in it.

    Args:
        folder: Where to make it.
        wheel: What to install in it.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        install = ["pip", "--python", str(self.python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run([sys.executable, "-m", *install, "--disable-pip-version-check"], check=True)
        self.bare = folder / "needed"
        self.bare.mkdir()
        for name in NEEDED:
            if (LIBRARIES / name).exists():
                (self.bare / name).symlink_to(LIBRARIES / name, target_is_directory=True)

    def run(self, *arguments: str, cwd: Path, libraries: Path = LIBRARIES) -> subprocess.CompletedProcess:
        """Run Python in `cwd`, with the libraries of a folder at hand."""
        environment = os.environ | {"PYTHONPATH": str(libraries)}
        command = [str(self.python), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
