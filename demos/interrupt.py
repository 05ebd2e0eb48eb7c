"""The seconds that imports take: Ctrl-C in them, and libraries that are not there."""

import os
import signal
import sys


def end_on_interrupt(*extras: str) -> None:
    """Let Ctrl-C just end the program, with status 130, and a library that is missing end it with one sentence.

    To be called before anything slow is imported; Ctrl-C also ends demos that have nothing to save so.

    Args:
        extras: Libraries beyond those that every demo needs, each with an extra of its own name.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from warp_phys.interop.extras import require  # noqa: PLC0415, it loads Warp

    try:
        require("torch", "demos")
        require("matplotlib", "demos")
        for extra in extras:
            require(extra, extra)
    except ImportError as error:
        sys.exit(f"error: {error}")
