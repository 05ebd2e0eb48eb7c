"""A chain of layers as a `Plan`, as the kernels for CUDA take it; and sizes of rows on a CPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


def plan_of(program: Any) -> Plan:
    """Return a chain of dense nodes as a plan."""
    layers, channels = [], program.inputs
    for node in program.nodes[1:]:
        if node.operation == "gather":
            channels = program.inputs // max(1, node.numbers[1][1]) if program.inputs > 1 else 1
            continue
        positions, window, stride, outputs, _weights, _biases, _flipped, order, activation = node.numbers
        layers.append(Layer(positions, window, stride, outputs, activation, order))
    return Plan(program.inputs, channels, tuple(layers))


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
