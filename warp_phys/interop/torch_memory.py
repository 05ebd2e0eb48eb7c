"""The running average of an update that a flow with a memory consults."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from warp_phys.flow import Combined


class Memory:
    """A running average over the updates of a training, of all trained parameters in one flat tensor.

    It begins at zero, and again where the trained parameters are others in number or shape.
    """

    def __init__(self) -> None:
        self._mean: torch.Tensor | None = None
        self._shapes: list[torch.Size] = []

    def mean(self, trainable: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the average, in memory that stays; for the parameters that are trained now."""
        shapes, first = [parameter.shape for parameter in trainable], trainable[0]
        old = self._mean
        if old is None or self._shapes != shapes or (old.dtype, old.device) != (first.dtype, first.device):
            size = sum(parameter.numel() for parameter in trainable)
            self._mean, self._shapes = torch.zeros(size, dtype=first.dtype, device=first.device), shapes
        assert self._mean is not None
        return self._mean

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: a copy of the average, or None, and the shapes that it belongs to."""
        mean = None if self._mean is None else self._mean.clone()
        return {"mean": mean, "shapes": [tuple(shape) for shape in self._shapes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            TypeError, ValueError: It returned something else.
        """
        if set(state) != {"mean", "shapes"}:
            raise ValueError(f"state must have mean and shapes, as state_dict returns them, got {sorted(state)}")
        mean, shapes = state["mean"], [torch.Size(shape) for shape in state["shapes"]]
        if mean is not None and not isinstance(mean, torch.Tensor):
            raise TypeError(f"the mean in state must be a tensor or None, got {type(mean).__name__}")
        size = sum(shape.numel() for shape in shapes)
        if mean is not None and mean.shape != (size,):
            raise ValueError(f"the mean in state must have shape ({size},) for its shapes, got {tuple(mean.shape)}")
        self._mean, self._shapes = None if mean is None else mean.clone(), shapes


def combine_remembering(
    flow: Combined, parts: Sequence[torch.Tensor], mean: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a flow's update, after the consulted flow's has gone into the average; nothing here waits for a device.

    Args:
        flow: A flow with a memory.
        parts: The updates of its base and of its other flow, flat.
        mean: The average, changed in place: decay · mean + (1 − decay) · other / |other|. Where that is not finite it
            stays.
        skip: A number on the device; where it is not 0, the average stays.
    """
    base, other = parts
    length = torch.linalg.vector_norm(other, dtype=torch.float64)
    wide = other.double() * torch.where(length > 0.0, (1.0 - flow.memory) / length, 0.0)
    keep = torch.isfinite(length) if skip is None else torch.isfinite(length) & (skip == 0.0)
    mean.copy_(torch.where(keep, mean.double() * flow.memory + wide, mean.double()))
    return flow.apply(base, mean)
