"""Small networks that steer a system: any torch module mapping states (B, D) to controls (B, K) will do as well."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from warp_phys.core.checks import check_seed
from warp_phys.errors import check_count, shown
from warp_phys.interop.torch.grid import FromGrid, ToGrid

ACTIVATIONS: dict[str, type[torch.nn.Module]] = {
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "elu": torch.nn.ELU,
    "silu": torch.nn.SiLU,
    "sigmoid": torch.nn.Sigmoid,
}
INITS = ("glorot", "zero-last", "torch")
WIDEST = 2**16
"""Most units of a layer."""


class Sized(Protocol):
    """What a controller needs to know of a system."""

    @property
    def state_size(self) -> int:
        """Numbers in one state, D."""

    @property
    def control_size(self) -> int:
        """Numbers in one control, K."""


def check_sized(system: Any) -> None:
    """Raise a TypeError where a system does not tell its sizes."""
    for name in ("state_size", "control_size"):
        if isinstance(system, type) or not hasattr(system, name):
            raise TypeError(f"system must be one with {name}, got {shown(system)}")
        check_count(name, getattr(system, name))


class Chain(torch.nn.Sequential):
    """A sequence of layers whose constructor takes other arguments; a slice of it is a plain sequence."""

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        # torch builds a slice with the constructor of the subclass.
        layers = list(self)
        return torch.nn.Sequential(*layers[index]) if isinstance(index, slice) else layers[index]


class MLP(Chain):
    """Dense network c = Wₙ a(… a(W₁ x + b₁) …) + bₙ with activation a and a linear output.

    It is a plain chain Linear, activation, …, Linear, so that the engine can run it inside its own kernels.

    Args:
        system: Anything with `state_size` D and `control_size` K.
        hidden: Width of each hidden layer, at most 65536; empty for a linear controller.
        activation: One of tanh, relu, elu, silu, sigmoid.
        init: "glorot": Glorot-uniform weights, zero biases. "zero-last": the same, but the last weight is zero, as the
            published scripts start. "torch": as torch starts its linear layers.
        seed: Seed of the weights, torch's global generator is then left alone; None draws from the global generator.

    Raises:
        TypeError, ValueError: An argument is not one of the above.

    Source: Schnell & Thuerey, ICLR 2024; Glorot & Bengio, AISTATS 2010.

    >>> from types import SimpleNamespace
    >>> controller = MLP(SimpleNamespace(state_size=6, control_size=1), hidden=(100, 100), seed=0)
    >>> controller(torch.zeros(8, 6)).shape
    torch.Size([8, 1])
    """

    def __init__(
        self,
        system: Sized,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        init: str = "glorot",
        seed: int | None = None,
    ) -> None:
        check_network(hidden, activation, init, seed)
        check_sized(system)
        widths = [system.state_size, *hidden, system.control_size]
        layers: list[torch.nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [torch.nn.utils.skip_init(torch.nn.Linear, inputs, outputs), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])
        initialise([layer for layer in self if isinstance(layer, torch.nn.Linear)], init, seed)


class Linear(MLP):
    """Linear controller c = W x + b: an `MLP` without hidden layers.

    Args:
        system: Anything with `state_size` and `control_size`.
        init: As for `MLP`.
        seed: As for `MLP`.
    """

    def __init__(self, system: Sized, init: str = "glorot", seed: int | None = None) -> None:
        super().__init__(system, hidden=(), init=init, seed=seed)


class GridCNN(Chain):
    """Convolutions over a grid of complex numbers, then a linear output; as published for quantum control.

    A state [re ψ_1, im ψ_1, …] is a grid of N points with two channels. Two layers of `channels` convolutions follow,
    kernel 3, stride 2, no padding, each with its activation; then all points are flattened, channels fastest.

    It is a plain chain of layers, so that the engine can run it inside its own kernels.

    Args:
        system: Anything with `state_size` D = 2 N, N at least 7, and `control_size` K.
        channels: Channels of both layers.
        activation: One of tanh, relu, elu, silu, sigmoid.
        init: As for `MLP`.
        seed: As for `MLP`.

    Raises:
        TypeError, ValueError: An argument is not one of the above, or the grid is too small for two layers.

    Source: Schnell & Thuerey, ICLR 2024.

    >>> from types import SimpleNamespace
    >>> GridCNN(SimpleNamespace(state_size=64, control_size=1), seed=0)(torch.zeros(8, 64)).shape
    torch.Size([8, 1])
    """

    def __init__(
        self,
        system: Sized,
        channels: int = 60,
        activation: str = "tanh",
        init: str = "glorot",
        seed: int | None = None,
    ) -> None:
        check_network((channels,), activation, init, seed)
        check_sized(system)
        if system.state_size % 2 or system.state_size < 2 * SMALLEST_GRID:
            raise ValueError(f"system must have a grid of at least {SMALLEST_GRID} points, got {system}")
        points = ((system.state_size // 2 - 3) // 2 + 1 - 3) // 2 + 1
        first = torch.nn.utils.skip_init(torch.nn.Conv1d, 2, channels, 3, stride=2)
        second = torch.nn.utils.skip_init(torch.nn.Conv1d, channels, channels, 3, stride=2)
        output = torch.nn.utils.skip_init(torch.nn.Linear, points * channels, system.control_size)
        activate = ACTIVATIONS[activation]
        super().__init__(ToGrid(2), first, activate(), second, activate(), FromGrid(), output)
        initialise([first, second, output], init, seed)


SMALLEST_GRID = 7
"""Points that two layers of kernel 3 and stride 2 need."""


class GRU(torch.nn.Module):
    """A gated recurrent unit that remembers, and dense layers behind it: h' = GRU(x, h), c = MLP(h').

    Its `forward(x, h)` returns (c, h'), as a rollout with a memory of so many units asks for.

    Args:
        system: Anything with `state_size` D and `control_size` K.
        units: Numbers H that it remembers.
        hidden: As for `MLP`, of the layers behind the unit.
        activation: As for `MLP`.
        init: As for `MLP`, of the layers behind the unit; the unit starts as torch's.
        seed: As for `MLP`.

    Raises:
        TypeError, ValueError: An argument is not one of the above.

    >>> from types import SimpleNamespace
    >>> c, h = GRU(SimpleNamespace(state_size=6, control_size=1), 16, seed=0)(torch.zeros(8, 6), torch.zeros(8, 16))
    >>> c.shape, h.shape
    (torch.Size([8, 1]), torch.Size([8, 16]))
    """

    def __init__(
        self,
        system: Sized,
        units: int,
        hidden: Sequence[int] = (),
        activation: str = "tanh",
        init: str = "glorot",
        seed: int | None = None,
    ) -> None:
        units = check_count("units", units, 1, WIDEST)
        check_network(hidden, activation, init, seed)
        check_sized(system)
        super().__init__()
        self.cell = torch.nn.utils.skip_init(torch.nn.GRUCell, system.state_size, units)
        self.layers = MLP(_Sizes(units, system.control_size), hidden, activation, init, seed)
        # Numbers of their own: the layers draw from a generator of this seed, too.
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        with torch.no_grad():
            for parameter in self.cell.parameters():
                parameter.uniform_(-(units**-0.5), units**-0.5, generator=generator)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return controls (B, K), and what is remembered now (B, H)."""
        h = self.cell(x, h)
        return self.layers(h), h


class _Sizes(NamedTuple):
    """The sizes of a network."""

    state_size: int
    control_size: int


class WithInputs(torch.nn.Module):
    """A network that takes the inputs of a step as further components of the state: `forward(x, w)`."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return controls (B, K)."""
        controls: torch.Tensor = self.network(torch.cat([x, w], dim=1))
        return controls


class RecurrentWithInputs(torch.nn.Module):
    """The same of a network with a memory: `forward(x, w, h)`."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return controls (B, K), and what is remembered now (B, H)."""
        controls, remembered = self.network(torch.cat([x, w], dim=1), h)
        return controls, remembered


def make_network(
    kind: str,
    system: Sized,
    hidden: Sequence[int],
    activation: str,
    init: str,
    seed: int | None,
    inputs: int = 0,
    memory: int = 0,
) -> torch.nn.Module:
    """Return a network by name, see `check_kind`; one that is given `inputs` numbers a step, and remembers `memory`."""
    kind = check_kind(kind, system, inputs, memory)
    if kind == "grid-cnn":
        return GridCNN(system, activation=activation, init=init, seed=seed)
    sizes = _Sizes(system.state_size + inputs, system.control_size) if inputs else system
    if kind == "gru":
        recurrent = GRU(sizes, memory, hidden, activation, init, seed)
        return RecurrentWithInputs(recurrent) if inputs else recurrent
    dense = MLP(sizes, hidden, activation, init, seed)
    return WithInputs(dense) if inputs else dense


def check_kind(kind: str, system: Sized, inputs: int, memory: int) -> str:
    """Return which network this is, "auto" resolved: a GRU with a memory, a GridCNN for a system on a grid, or an MLP.

    Raises:
        ValueError: It cannot take inputs, or the memory does not fit.

    >>> check_kind("dense", None, inputs=0, memory=8)
    Traceback (most recent call last):
        ...
    ValueError: memory needs network gru or auto, a network dense remembers nothing, got memory 8
    """
    if kind == "auto":
        kind = "gru" if memory else "grid-cnn" if hasattr(system, "points") else "dense"
    if kind != "gru" and memory:
        raise ValueError(f"memory needs network gru or auto, a network {kind} remembers nothing, got memory {memory}")
    if kind == "gru" and not memory:
        raise ValueError("network gru needs memory, its units, got memory 0")
    if kind == "grid-cnn" and inputs:
        raise ValueError("inputs are not for a network grid-cnn, whose layers see the grid alone: choose dense or gru")
    return kind


def check_network(hidden: Sequence[int], activation: str, init: str, seed: int | None = None) -> None:
    """Raise TypeError or ValueError where the arguments of a network cannot be met.

    >>> check_network((100,), "cosine", "glorot")
    Traceback (most recent call last):
        ...
    ValueError: activation must be one of tanh, relu, elu, silu, sigmoid, got 'cosine'
    """
    is_sequence = isinstance(hidden, Sequence) and not isinstance(hidden, str)
    if not is_sequence or not all(type(width) is int and 0 < width <= WIDEST for width in hidden):
        raise ValueError(f"hidden must be widths from 1 to {WIDEST}, such as (100, 100), got {shown(hidden)}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}")
    if not isinstance(init, str) or init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {shown(init)}")
    if seed is not None:
        check_seed(seed)


@torch.no_grad()
def initialise(layers: Sequence[torch.nn.Linear | torch.nn.Conv1d], init: str, seed: int | None) -> None:
    """Set the weights of a chain of linear layers and convolutions, see `MLP`."""
    generator = None if seed is None else torch.Generator().manual_seed(int(seed))
    for layer in layers:
        if init == "torch":
            # Kaiming with a = √5, which torch uses, comes to this bound for weights and biases alike.
            bound = layer.weight[0].numel() ** -0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            if layer.bias is not None:
                layer.bias.uniform_(-bound, bound, generator=generator)
        else:
            torch.nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    if init == "zero-last":
        layers[-1].weight.zero_()
