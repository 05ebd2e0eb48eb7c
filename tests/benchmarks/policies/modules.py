"""The policies in torch, as one writes them: rows of states (batch, 4) to controls (batch, 1)."""

import torch
from torch import nn
from torch.nn import functional

from tests.benchmarks.policies.weights import (
    CELL,
    CHANNELS,
    CONSTANTS,
    HEADS,
    HIDDEN_STATE,
    LIMIT,
    TOKENS,
    WIDTH,
    make_policy_weights,
)  # fmt: skip


class Plain(nn.Module):
    """Three layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Normed(Plain):
    """With the sums of each layer normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first_norm(self.first(x)))
        return self.last(torch.tanh(self.second_norm(self.second(h))))


class Residual(Plain):
    """With the second layer added to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(h)))


class Angles(Plain):
    """Sees sine and cosine of the angle, and both rates; not the cart's place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = x[:, 2:3]
        return super().forward(torch.cat([torch.sin(angle), torch.cos(angle), x[:, 1:2], x[:, 3:]], dim=1))


class Clamped(Plain):
    """With limited controls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(LIMIT * super().forward(x), -LIMIT, LIMIT)


class Attention(nn.Module):
    """A block of attention over tokens, one for each number of the state and two for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix = nn.Linear(1, CHANNELS), nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(TOKENS * CHANNELS, 1)
        self.place = nn.Parameter(torch.zeros(TOKENS, CHANNELS))
        self.register_buffer("constants", torch.tensor(CONSTANTS), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = torch.cat([x, 0 * x[:, :1] + self.constants], dim=1)
        h = self.token(numbers[:, :, None]) + self.place
        parts = self.mix(h).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last((h + self.out(mixed)).flatten(1))


class GRU(nn.Module):
    """A cell with a constant hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(4, CELL), nn.Linear(CELL, 1)
        self.register_buffer("hidden", torch.full((CELL,), HIDDEN_STATE), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cell(x, 0 * x[:, :1] + self.hidden))


class LSTM(GRU):
    """Likewise, with the same numbers as both of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, CELL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = 0 * x[:, :1] + self.hidden
        return self.last(self.cell(x, (hidden, hidden))[0])


class Reference(Plain):
    """Sees where the cart shall be, besides the state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, w], dim=1))


class Noise(Plain):
    """Adds noise of a trained deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.log_deviation = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + torch.exp(self.log_deviation) * w


class RememberingGRU(nn.Module):
    """A cell that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(4, CELL), nn.Linear(CELL, 1)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.cell(x, h)
        return self.last(h), h


class RememberingLSTM(nn.Module):
    """Likewise, both states in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTMCell(4, CELL), nn.Linear(CELL, 1)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.cell(x, (h[:, :CELL], h[:, CELL:]))
        return self.last(states[0]), torch.cat(states, dim=1)


MODULES: dict[str, type[nn.Module]] = {
    "plain": Plain,
    "layer norm": Normed,
    "residual": Residual,
    "angles": Angles,
    "clamped": Clamped,
    "attention": Attention,
    "GRU cell": GRU,
    "LSTM cell": LSTM,
    "reference": Reference,
    "noise": Noise,
    "GRU": RememberingGRU,
    "LSTM": RememberingLSTM,
}
"""By the names of `weights.POLICIES`."""


def make_module(policy: str) -> nn.Module:
    """Return a policy with the weights that all contestants have."""
    module = MODULES[policy]()
    module.load_state_dict({name: torch.as_tensor(array) for name, array in make_policy_weights(policy).items()})
    return module
