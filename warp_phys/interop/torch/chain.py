"""Chains of torch modules that the engine's own layers express, read as a row program by the modules' types.

That takes no time, where `program` takes a tenth of a second or more for any module.
"""

from typing import Any, NamedTuple

import torch

from warp_phys.interop.torch.grid import FromGrid, ToGrid
from warp_phys.programs.program import Builder, Dense, Program

ACTIVATIONS: dict[type, str] = {
    torch.nn.Tanh: "tanh",
    torch.nn.ReLU: "relu",
    torch.nn.ELU: "elu",
    torch.nn.SiLU: "silu",
    torch.nn.Sigmoid: "sigmoid",
}
"""The activations by torch module."""

PRECISIONS = (torch.float32, torch.float64)

WIDEST = 65536
"""Most inputs or outputs of a layer: beyond it a matrix library is as good."""


READ: dict[type, tuple[str, ...]] = {
    torch.nn.Conv1d: ("stride", "padding", "dilation", "groups"),
    torch.nn.ELU: ("alpha",),
    torch.nn.Flatten: ("start_dim", "end_dim"),
    torch.nn.Unflatten: ("dim", "unflattened_size"),
    ToGrid: ("channels",),
}
"""What a plan depends on besides types and parameters, by torch module."""


class Planned(NamedTuple):
    """A module as a row program."""

    plan: Program
    """The program."""
    tensors: tuple[torch.Tensor | None, ...]
    """What it reads, as `Program.read` says; None for a bias that is not there."""
    is_chain: bool
    """Whether it is a chain of layers, known by their types, and not by what they did once."""


class _Reader:
    """Goes through the layers of a module and keeps the shape that the data have between them."""

    def __init__(self, inputs: int):
        self.inputs = self.order = inputs
        self.grid: tuple[int, int] | None = None  # channels and points
        self.size, self.channels = inputs, inputs  # of a row; how its numbers are ordered, see `Dense.channels`
        self.layers: list[Dense] = []
        self.tensors: list[torch.Tensor | None] = []
        self.build, self.slots = Builder(inputs), dict[int, int]()

    def read(self, module: Any) -> bool:
        """Take up one layer; return False where it cannot be expressed."""
        kind = type(module)
        if kind in ACTIVATIONS:
            return self._activate(ACTIVATIONS[kind], getattr(module, "alpha", 1.0))
        if kind is torch.nn.Linear:
            return self.grid is None and self._linear(module)
        if kind is torch.nn.Conv1d:
            return self.grid is not None and self._convolve(module)
        return self._reshape(module)

    def _reshape(self, module: Any) -> bool:
        """Take up a layer without numbers of its own, which only orders those of the data."""
        kind = type(module)
        if kind is ToGrid:
            return self._to_grid(module.channels, self.size // max(1, module.channels))
        if kind is torch.nn.Unflatten and not self.layers and (module.dim, len(module.unflattened_size)) == (1, 2):
            self.order = module.unflattened_size[0]
            return self._to_grid(*module.unflattened_size)
        if kind is torch.nn.Flatten and (module.start_dim, module.end_dim) in ((1, -1), (1, 2)):
            if self.grid is not None:
                self.channels, self.grid = self.grid[0], None
            return bool(self.layers)
        if kind is not FromGrid or self.grid is None:
            return False
        self.grid = None
        return True

    def _activate(self, name: str, alpha: float) -> bool:
        if not self.layers or self.layers[-1].activation != "identity" or alpha != 1.0:
            return False
        self.layers[-1] = self.layers[-1]._replace(activation=name)
        return True

    def _linear(self, module: Any) -> bool:
        if not self._keep(module, dimensions=2) or module.weight.shape[1] != self.size:
            return False
        outputs = len(module.weight)
        slots = self._slot(module.weight), self._slot(module.bias)
        self.layers.append(Dense(1, self.size, self.size, outputs, *slots, False, self.channels))
        self.size = self.channels = outputs
        return True

    def _convolve(self, module: Any) -> bool:
        assert self.grid is not None
        channels, points = self.grid
        plain = (module.padding, module.dilation, module.groups) == ((0,), (1,), 1)
        if not plain or not self._keep(module, dimensions=3) or module.weight.shape[1] != channels:
            return False
        outputs, _, kernel = module.weight.shape
        (stride,) = module.stride
        positions = (points - kernel) // stride + 1
        if positions < 1:
            return False
        slots = self._slot(module.weight), self._slot(module.bias)
        self.layers.append(Dense(positions, kernel * channels, stride * channels, outputs, *slots, False, channels))
        self.grid, self.size = (outputs, positions), positions * outputs
        self.channels = self.size
        return True

    def _slot(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return -1
        if id(tensor) not in self.slots:
            self.slots[id(tensor)] = self.build.slot(tensor.numel())
        return self.slots[id(tensor)]

    def program(self) -> Program:
        """Return what has been read."""
        inputs, channels = self.inputs, self.order
        x = self.build.gather([(0, k % channels * (inputs // channels) + k // channels) for k in range(inputs)])
        for dense in self.layers:
            x = self.build.add("dense", (x,), dense.positions * dense.outputs, tuple(dense))
        return self.build.finish(x)

    def _to_grid(self, channels: int, points: int) -> bool:
        if self.grid is not None or self.channels != self.size or channels * points != self.size:
            return False
        self.grid = channels, points
        return True

    def _keep(self, module: Any, dimensions: int) -> bool:
        """Take up weight and bias, if they are plain parameters, of the precision and on the device of all others.

        Shapes are those of the tensors: they may be others than the module was made with.
        """
        if has_more(module):
            return False
        weight, bias = module.weight, module.bias
        like: Any = self.tensors[0] if self.tensors else weight
        for tensor in (weight,) if bias is None else (weight, bias):
            if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_contiguous():
                return False
            if tensor.dtype not in PRECISIONS or (tensor.dtype, tensor.device) != (like.dtype, like.device):
                return False
        if weight.ndim != dimensions or (bias is not None and bias.shape != weight.shape[:1]):
            return False
        outputs, window = len(weight), weight.shape[1:].numel()
        if min(outputs, window) < 1 or max(outputs, window) > WIDEST:
            return False
        self.tensors += [weight, bias]
        return True


def read_plan(module: torch.nn.Module, inputs: int) -> Planned | None:
    """Return a `torch.nn.Sequential` as layers, or None for any other module.

    The layers may be Linear, Conv1d, the activations, Flatten, Unflatten, `ToGrid` and `FromGrid`; the last one with
    weights has one window, as a Linear has. A module with hooks or a `forward` of its own is another module.

    Args:
        module: The module.
        inputs: Numbers D of a state.
    """
    if not is_sequential(module):
        return None
    reader = _Reader(inputs)
    for layer in module._modules.values():  # children() would leave out an activation that is used twice
        if layer is None or has_hooks(layer) or not reader.read(layer):
            return None
    if not reader.layers or reader.grid is not None or reader.layers[-1].positions > 1:
        return None
    if reader.channels not in (1, reader.size):  # a grid is flattened at the end: the controls stand in another order
        return None
    return Planned(reader.program(), tuple(reader.tensors), is_chain=True)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


def is_sequential(module: torch.nn.Module) -> bool:
    """Whether a module is a `torch.nn.Sequential` that does nothing but run its layers in turn, and has only theirs."""
    if not isinstance(module, torch.nn.Sequential) or type(module).forward is not torch.nn.Sequential.forward:
        return False
    if any(p is not None and p.requires_grad for p in module._parameters.values()):
        return False
    return not has_hooks(module) and not are_hooks_everywhere()


def has_hooks(module: torch.nn.Module | None) -> bool:
    """Whether a module does more than its class says: hooks, or a `forward` of its own."""
    return module is None or "forward" in vars(module) or any(getattr(module, name) for name in HOOKS)


def has_more(layer: torch.nn.Module) -> bool:
    """Whether a layer holds anything besides weight and bias, which it would not use."""
    return bool(layer._parameters.keys() - {"weight", "bias"} or layer._modules)


def are_hooks_everywhere() -> bool:
    """Whether there are hooks on all modules of the process."""
    return any(getattr(torch.nn.modules.module, name, None) for name in _GLOBAL_HOOKS)
