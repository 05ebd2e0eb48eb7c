"""Frameworks that are optional: what to install where one is missing."""

import importlib.util


def require(module: str, extra: str) -> None:
    """Raise an ImportError that says what to install if a module is missing.

    >>> require("numpy", "numpy")
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'{module} is not installed: pip install "warp_phys[{extra}]"')
