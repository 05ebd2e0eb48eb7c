"""States that are grids with several numbers a point, between layers of torch that want channels first."""

import torch


class ToGrid(torch.nn.Module):
    """Rows (B, N · C), all numbers of a point side by side, become grids (B, C, N) for `torch.nn.Conv1d`.

    Args:
        channels: Numbers C of a point; 2 for a complex wave function [re ψ_1, im ψ_1, …].

    >>> ToGrid(2)(torch.arange(6.0)[None])
    tensor([[[0., 2., 4.],
             [1., 3., 5.]]])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the grids; a view."""
        return x.view(len(x), -1, self.channels).transpose(1, 2)

    def extra_repr(self) -> str:
        """Name the channels in the module's text."""
        return f"channels={self.channels}"


class FromGrid(torch.nn.Module):
    """Grids (B, C, N) become rows (B, N · C), all numbers of a point side by side: channels fastest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows."""
        return x.transpose(1, 2).flatten(1)
