"""Two names for one module: in a checkout `warp_phys.controllers.x` is the module `controllers.x`, never a copy of it.

A wheel has the folders `controllers` and `demos` inside this package (`setup.py`), and none of what stands here.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("controllers", "demos")
PREFIX = "warp_phys."


class Alias(MetaPathFinder, Loader):
    """Finds `warp_phys.<folder>.<module>` as `<folder>.<module>`."""

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        """Where the module is; None for all other names."""
        if not name.startswith(tuple(f"{PREFIX}{folder}." for folder in FOLDERS)):
            return None
        found = find_spec(name.removeprefix(PREFIX))
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return spec_from_loader(name, self, origin=found.origin, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that has the short name in the place of a new one."""
        sys.modules[module.__name__] = import_module(module.__name__.removeprefix(PREFIX))

    def get_code(self, name: str) -> Any:
        """The module's code, for `python -m`."""
        short = name.removeprefix(PREFIX)
        found = find_spec(short)
        return found.loader.get_code(short)  # type: ignore[union-attr]


def stand_in(name: str) -> None:
    """Put the folder beside `warp_phys` in the place of `warp_phys.<folder>`.

    Raises:
        ImportError: Another package of that name comes first on the path; it is left alone.
    """
    for folder in FOLDERS:  # programs in one import the other by its short name
        _load(folder)
    if not any(isinstance(finder, Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, Alias())
    sys.modules[name] = sys.modules[name.removeprefix(PREFIX)]


def _load(folder: str) -> None:
    """Import a folder of the checkout, which may be off the path."""
    spec = find_spec(folder) or PathFinder.find_spec(folder, [str(ROOT)])
    if spec is None or spec.loader is None or Path(spec.origin or "").resolve().parent != ROOT / folder:
        where = spec and (spec.origin or spec.submodule_search_locations)
        raise ImportError(
            f"this warp_phys is the checkout {ROOT}, whose folder {folder} is hidden by {where}; "
            f"install it as a wheel instead: pip install {ROOT}"
        )
    if folder not in sys.modules:
        sys.modules[folder] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[folder])
        except BaseException:  # nothing half made stays behind
            del sys.modules[folder]
            raise
