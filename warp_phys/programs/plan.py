"""A small network as a `Plan`: layers, each a dense layer on windows of its input, and where their numbers stand.

A row of a trajectory holds all levels of the network, input first, output last: `Plan.offsets`. Adjoints have the same
layout. Where an activation does not tell its slope by its value, the slopes follow, `Plan.slopes` numbers behind.
"""

from collections.abc import Sequence
from typing import NamedTuple

SAMPLES = 8
"""Samples of a block: they are unrolled together and share the weights that are loaded."""

FEW = 8
"""Most outputs of a last layer that is worth no register's width of outputs."""

PAD = 16
"""Widths of layers are padded to a multiple of this, as in native/layers.h."""

CHUNK_NUMBERS = 16384
"""Numbers of a flow's rows that a backward pass works on at a time: they stay in the second-level cache."""


class Layer(NamedTuple):
    """A dense layer on windows of its input row, all with the same weights, and its activation."""

    positions: int
    """Number of windows."""
    window: int
    """Numbers of a window."""
    stride: int
    """Numbers from one window to the next."""
    outputs: int
    """Outputs of a window."""
    activation: str
    """Name of the activation, one of `activations.ACTIVATIONS`."""
    channels: int
    """A window's number k stands for the weight (k mod channels) · (window / channels) + k / channels of an output."""


class Plan(NamedTuple):
    """A network: its layers, and how its input is ordered. Hashable: kernels are cached by it."""

    inputs: int
    """Numbers D of a state."""
    channels: int
    """Order of the input, as in `Layer.channels`; equal to `inputs` where it is read as it comes."""
    layers: tuple[Layer, ...]
    """The layers, the first one first."""

    @property
    def outputs(self) -> int:
        """Numbers K of a control."""
        return self.layers[-1].outputs

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one evaluation of one row."""
        return sum(layer.positions * layer.window * layer.outputs for layer in self.layers)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each level starts in a row, input first, output last; the last entry is the length of all."""
        sizes = [padded(self.inputs), *((a.positions - 1) * a.outputs + padded(a.outputs) for a in self.layers)]
        for i, layer in enumerate(self.layers):
            sizes[i] = max(sizes[i], (layer.positions - 1) * layer.stride + padded(layer.window))
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + padded(size))
        return tuple(starts)

    @property
    def slopes(self) -> int:
        """How far behind an activation its slope is kept; zero if no activation needs that."""
        return self.offsets[-1] if any(layer.activation == "silu" for layer in self.layers) else 0

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return self.offsets[-1] + self.slopes

    def few(self, i: int) -> bool:
        """Whether layer i has too few outputs for vectors of outputs."""
        layer = self.layers[i]
        return i > 0 and layer.positions == 1 and layer.outputs <= FEW

    @property
    def packed(self) -> tuple[int, ...]:
        """Where each layer starts in the packed weights, and in gradients; the last entry is the length."""
        starts = [0]
        for i, layer in enumerate(self.layers):
            columns = layer.outputs * padded(layer.window) if self.few(i) else layer.window * padded(layer.outputs)
            starts.append(starts[-1] + padded(layer.outputs) + columns)
        return tuple(starts)

    @property
    def transposed(self) -> tuple[int, ...]:
        """Where each layer's transposed weights start in their array; a layer of few outputs has none there."""
        starts = [0]
        for i, layer in enumerate(self.layers):
            starts.append(starts[-1] + (0 if self.few(i) else layer.outputs * padded(layer.window)))
        return tuple(starts)

    @property
    def chunk(self) -> int:
        """Rows that a backward pass takes at a time, if it can choose."""
        return max(SAMPLES, min(64, CHUNK_NUMBERS // self.row))


def dense_plan(sizes: Sequence[int], activation: str) -> Plan:
    """Return dense layers of these sizes, D first and K last, with an activation after every layer but the last."""
    last = len(sizes) - 2
    layers = [
        Layer(1, n, 0, m, activation if i < last else "identity", n)
        for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]
    return Plan(sizes[0], sizes[0], tuple(layers))


def padded(n: int) -> int:
    """Return the width that n numbers take."""
    return -(-n // PAD) * PAD
