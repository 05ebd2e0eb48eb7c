"""Where Warp keeps compiled kernels, and what to set where it cannot."""

import atexit
import contextlib
import functools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import warp as wp

from warp_phys.core.codegen import mend_constants

ADVICE = (
    "compiled kernels need a folder of their own: set the environment variable WARP_CACHE_PATH to one that can be "
    "written, before Python starts"
)


@functools.cache
def start_warp() -> None:
    """Initialise Warp, once.

    Raises:
        OSError: The folder of compiled kernels cannot be made; the message names the variable to set.
    """
    mend_constants()
    try:
        wp.init()
    except OSError as error:
        raise OSError(
            error.errno, f"{wp.config.kernel_cache_dir} cannot be made ({error.strerror}): {ADVICE}"
        ) from None
    folder = str(wp.config.kernel_cache_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        warnings.warn(
            f"{folder} cannot be written: kernels that are in it already will do, others cannot be compiled; {ADVICE}",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    _keep_headers(os.path.join(folder, "headers"))


def _keep_headers(folder: str) -> None:
    """Keep what the compiler for CPUs makes of Warp's headers, for later processes.

    Warp makes it anew in each process that compiles, in a folder that goes with the process: some two seconds before
    the first kernel. Here the first process that has made it puts it into place, whole, and others use it. The compiler
    looks whether it is up to date; where it is not, Warp compiles without and removes it.
    """
    runtime: Any = wp._src.context.runtime  # Warp has no public name for it
    if getattr(runtime, "llvm", None) is None or not hasattr(runtime, "get_clang_pch_dir"):
        return
    own_folder, made = runtime.get_clang_pch_dir, set[str]()

    def is_kept() -> bool:
        return os.path.isdir(folder) and len(os.listdir(folder)) > 0

    def keep() -> None:
        for own in tuple(made):  # another thread may add to it
            if not is_kept() and any(Path(own).glob("builtin*.pch")):
                with contextlib.suppress(OSError):  # another process was first, or the disk is full
                    copy = f"{folder}-{os.getpid()}"
                    os.mkdir(copy)
                    try:
                        for file in Path(own).glob("builtin*.pch"):
                            shutil.copy(file, copy)
                        os.rename(copy, folder)
                    finally:
                        shutil.rmtree(copy, ignore_errors=True)

    def choose_folder() -> str:
        keep()
        if is_kept():
            return folder
        own: str = own_folder()
        if not made:
            atexit.register(keep)  # now: what is registered last comes first, and the folder is removed at exit
        made.add(own)
        return own

    runtime.get_clang_pch_dir = choose_folder
