"""Warp without its greeting."""

import os
import sys
import tempfile

import warp as wp

from warp_phys.core.kernel_cache import start_warp

NO_DRIVER = b"Could not find or load the NVIDIA CUDA driver"


def quiet() -> None:
    """Start Warp in silence, and have it report no kernels that it compiles or loads: warnings and errors alone.

    It raises `wp.config.log_level` to `wp.LOG_WARNING`, for the whole process, and has Warp look for devices at once.
    That there is no driver for GPUs is not told either. A program calls it before anything else; the library never
    does.
    """
    wp.config.log_level = max(wp.config.log_level, wp.LOG_WARNING)
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # a program without a standard error
        start_warp()
        return
    # That there is no driver comes from C, past every setting: what comes meanwhile is kept, and passed on without it.
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            start_warp()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            for line in kept:
                if NO_DRIVER not in line:
                    os.write(2, line)
