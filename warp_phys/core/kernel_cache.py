"""Where Warp keeps compiled kernels, and what to set where it cannot."""

import functools
import os
import warnings

import warp as wp

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
