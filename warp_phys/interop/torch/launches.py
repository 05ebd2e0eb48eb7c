"""Launches with tensors as arguments."""

from collections.abc import Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.interop.torch.dense import as_array


def launch(kernel: wp.Kernel, dim: int | tuple[int, ...], arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a kernel, outside of any tape.

    Args:
        kernel: The kernel.
        dim: Its dimensions.
        arguments: Tensors, Warp arrays and numbers, in turn.
        device: Where they are.
    """
    given = [as_array(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    wp.launch(kernel, dim, given, device=str(device), record_tape=False)
