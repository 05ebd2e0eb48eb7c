"""Launches with tensors as arguments; on a CPU they are packed once, and then told where the tensors stand."""

from collections.abc import Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.interop.torch.dense import as_array

KEPT = 256
"""Kernels, with shapes and numbers of their arguments, whose launches are kept packed."""

_PACKED: dict[tuple, list[tuple[Any, list[Any]]]] = {}
"""Launches that nobody uses now, each with its packed arrays: another thread makes one of its own."""


def launch(kernel: wp.Kernel, dim: int | tuple[int, ...], arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a kernel, outside of any tape.

    Args:
        kernel: The kernel.
        dim: Its dimensions.
        arguments: Tensors, Warp arrays and numbers, in turn.
        device: Where they are.
    """
    if device.type != "cpu":
        wp.launch(kernel, dim, _arrays(arguments), device=str(device), record_tape=False)
        return
    arguments = [a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in arguments]
    key: list[Any] = [kernel, dim]
    addresses = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            key += (argument.dtype, argument.shape, argument.stride())
            addresses.append(argument.data_ptr())
        elif isinstance(argument, wp.array):
            key += (argument.shape, argument.strides)
            addresses.append(argument.ptr or 0)
        else:
            key.append(argument)
    free = _PACKED.get(tuple(key))
    if free is None:
        if len(_PACKED) >= KEPT:
            _PACKED.pop(next(iter(_PACKED)), None)
        free = _PACKED[tuple(key)] = []
    try:
        recorded, arrays = free.pop()
    except IndexError:
        recorded = wp.launch(kernel, dim, _arrays(arguments), device="cpu", record_tape=False, record_cmd=True)
        recorded.fwd_args = None  # which would keep the tensors of the first call
        packed = zip(recorded.params[1:], arguments, strict=True)
        arrays = [array for array, argument in packed if isinstance(argument, torch.Tensor | wp.array)]
    for array, address in zip(arrays, addresses, strict=True):
        array.data = address
    recorded.launch()
    free.append((recorded, arrays))


def _arrays(arguments: Sequence[Any]) -> list[Any]:
    return [as_array(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
