"""Clipping of gradients."""

from collections.abc import Iterable, Sequence

import torch


def gradients_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the `.grad` of all parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_gradients(gradients: Sequence[torch.Tensor], clip: str, limit: float) -> None:
    """Clip in place: "value" each component to [−limit, limit], "norm" the norm of all together to at most limit."""
    if clip == "value":
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
    elif clip == "norm" and gradients:
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        factor = (limit / torch.linalg.vector_norm(torch.stack(norms))).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor)
