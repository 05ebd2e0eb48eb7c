"""Ctrl-C in the seconds that imports take, and in demos that have nothing to save."""

import os
import signal


def end_on_interrupt() -> None:
    """Let Ctrl-C just end the program: status 130, no traceback. To be called before anything slow is imported."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
