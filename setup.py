"""What pyproject.toml cannot say: a wheel has the folders `controllers` and `demos` inside `warp_phys`.

In a checkout they are packages of their own, and import each other by their short names. Every second project on robots
has folders of these names, so a wheel installs neither at the top level of site-packages: what is copied into it says
`from warp_phys.controllers import …` and `python -m warp_phys.demos` where the checkout has the short names.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ("controllers", "demos")
STAND_INS = ("warp_phys.checkout", *(f"warp_phys.{folder}" for folder in FOLDERS))
"""What only a checkout needs, see warp_phys/checkout.py."""
SHORT = re.compile(rf"(^\s*(?:>>> )?from | -m )(?=(?:{'|'.join(FOLDERS)})\b)", re.MULTILINE)


class Build(build_py):
    """Copies the Python files, with the names that they have in a wheel."""

    def find_package_modules(self, package, package_dir):
        """Leave out what only a checkout needs."""
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if f"{entry[0]}.{entry[1]}" not in STAND_INS]

    def build_module(self, module, module_file, package):
        """Copy a file, then write the names in full."""
        file, copied = super().build_module(module, module_file, package)
        text = Path(file).read_text(encoding="utf-8")
        Path(file).write_text(SHORT.sub(r"\1warp_phys.", text), encoding="utf-8", newline="\n")
        return file, copied


setup(
    packages=[
        *find_packages(include=["warp_phys*"], exclude=STAND_INS),
        *(f"warp_phys.{name}" for name in find_packages(include=[f"{folder}*" for folder in FOLDERS])),
    ],
    package_dir={f"warp_phys.{folder}": folder for folder in FOLDERS},
    cmdclass={"build_py": Build},
)
