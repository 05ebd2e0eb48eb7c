"""What a controller sees besides the state: inputs that are given for every step, and a memory of its own."""

import inspect
import sys
from typing import Any, NamedTuple

import torch

from warp_phys.core.arrays import shape_message
from warp_phys.interop.torch.dense import is_finite


class Beside(NamedTuple):
    """What a trajectory starts from besides the states."""

    inputs: torch.Tensor | None = None
    """Shape (steps, 1 or batch, E)."""
    memory: torch.Tensor | None = None
    """Shape (batch, H)."""

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is asked for."""
        return any(tensor is not None and tensor.requires_grad for tensor in self)

    def detach(self) -> "Beside":
        """Return it without history."""
        return Beside(*(None if tensor is None else tensor.detach() for tensor in self))


NOTHING = Beside()


class RowModule(torch.nn.Module):
    """A controller of state, inputs and memory as one of rows [x | h | v | w], see `systems.extended`.

    With a network in the physics the rows are [x | x̂ | h | v | w], see `systems.hybrid`.

    Args:
        controller: Maps (x), (x, w), (x, h) or (x, w, h) to c, or with a memory to (c, h').
        system: The extended system.
        sees_inputs: Whether the controller takes the inputs.
        network: Maps (x, c) to r, if the physics has such.
    """

    def __init__(
        self, controller: torch.nn.Module, system: Any, sees_inputs: bool, network: torch.nn.Module | None = None
    ):
        super().__init__()
        self.controller, self.network = controller, network
        self._own, self._memory_end, self._inputs_begin = (
            system.own_size,
            system.remembering_size,
            system.written_size,
        )
        memory = system.remembering_size - system.own_size
        self._seen = self._own // 2 if network is not None else 0
        self.has_memory, self.has_inputs = memory > 0, sees_inputs
        self.outputs = system.own_controls, memory

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return [c | r | h'] for rows (N, D + H + V + E)."""
        arguments = [z[:, self._seen : self._own]]
        if self.has_inputs:
            arguments.append(z[:, self._inputs_begin :])
        if self.has_memory:
            arguments.append(z[:, self._own : self._memory_end])
        output = self.controller(*arguments)
        if not self.has_memory:
            return self._with_given(z, output)
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise TypeError(f"a controller with a memory must return (c, h'), got {type(output).__name__}")
        for name, part, size in zip(("c", "h'"), output, self.outputs, strict=True):
            if not isinstance(part, torch.Tensor) or part.ndim != 2 or part.shape[1] != size:
                got = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
                raise ValueError(f"a controller with a memory must return {name} of shape (batch, {size}), got {got}")
        c, memory = output
        return torch.cat([self._with_given(z, c), memory], dim=1)

    def _with_given(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return [c | r], or the controls c where there is no network in the physics."""
        if self.network is None:
            return c
        if not isinstance(c, torch.Tensor) or c.ndim != 2 or c.shape[1] != self.outputs[0]:
            got = tuple(c.shape) if isinstance(c, torch.Tensor) else type(c).__name__
            raise ValueError(f"the controller must return controls of shape (batch, {self.outputs[0]}), got {got}")
        return torch.cat([c, self.network(z[:, : self._seen], c)], dim=1)


def blame(module: torch.nn.Module, text: str, part: torch.nn.Module | None = None) -> str:
    """Return the text of an error, which begins with "controller", as it is for what a rollout runs.

    With a network in the physics it may be this that is at fault; where no part is known to be, both are named.
    """
    if isinstance(module, torch.nn.ModuleDict):  # what is trained of a hybrid
        network = module["physics"] if "physics" in module else None
    else:
        network = module.network if isinstance(module, RowModule) else None
    if network is None or (part is not None and all(part is not inner for inner in network.modules())):
        return text
    who = "controller or the module of a Hybrid" if part is None else "the module of a Hybrid"
    return who + text.removeprefix("controller")


def takes_inputs(controller: torch.nn.Module, memory: int) -> bool:
    """Whether a controller's forward must be given another argument besides state and memory.

    Raises:
        ValueError: It is known that it takes too few arguments for a memory, or that they may be mistaken for others.
    """
    try:
        parameters = inspect.signature(controller.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [p for p in parameters if p.kind in kinds]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return False
    needed = sum(p.default is inspect.Parameter.empty for p in taken)
    if memory and len(taken) < 2:
        raise ValueError("with a memory the controller is called with (x, h), or (x, w, h): its forward takes x alone")
    if memory and len(taken) > 2 and needed < 3:
        names = ", ".join(p.name for p in taken)
        raise ValueError(
            f"with a memory the controller's arguments must have no defaults, its forward takes ({names}): which of "
            "them is the memory could not be told"
        )
    return needed > 1 + (memory > 0)


def has_room(controller: torch.nn.Module, memory: int) -> bool:
    """Whether a controller's forward can be given another argument besides state and memory."""
    while is_optimized(controller) or _is_parallel(controller):
        inner: Any = controller._orig_mod if hasattr(controller, "_orig_mod") else controller.module
        controller = inner
    try:
        parameters = list(inspect.signature(controller.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return several or sum(p.kind in kinds for p in parameters) > 1 + (memory > 0)


def is_optimized(module: torch.nn.Module) -> bool:
    """Whether a module is what `torch.compile` has returned; the compiler is not imported for that."""
    compiler = sys.modules.get("torch._dynamo")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _is_parallel(module: torch.nn.Module) -> bool:
    """Whether a module is another one, wrapped by torch to run in parallel."""
    home = type(module).__module__
    return home.startswith(("torch.nn.parallel", "torch.distributed")) and hasattr(module, "module")


def check_inputs(name: str, value: torch.Tensor, like: torch.Tensor, steps: int, size: int | None) -> torch.Tensor:
    """Return inputs as (steps, 1 or batch, E), or raise an error that names what is wrong with them.

    Args:
        name: What they are called.
        value: Shape (steps, E), (steps, 1, E) or (steps, batch, E).
        like: Initial states (batch, D).
        steps: Number of time steps.
        size: E, if it is known.

    Raises:
        TypeError, ValueError: Another shape, precision or device; numbers that are not finite.
    """
    batch, columns = len(like), "E" if size is None else size
    given = value[:, None] if value.ndim == 2 else value
    if given.ndim != 3 or given.shape[0] != steps or given.shape[1] not in (1, batch) or given.shape[2] == 0:
        raise ValueError(f"{shape_message(name, (steps, -1, columns), value.shape)}, or ({steps}, {columns})")
    if size is not None and given.shape[2] != size:
        raise ValueError(f"{shape_message(name, (steps, -1, size), value.shape)}: this rollout's have {size} columns")
    _check_kind(name, given, like)
    return given


def check_memory(value: torch.Tensor, like: torch.Tensor, size: int) -> torch.Tensor:
    """Return a memory (batch, H), or raise an error that says what is wrong with it."""
    if value.shape != (len(like), size):
        raise ValueError(shape_message("memory", (len(like), size), value.shape))
    _check_kind("memory", value, like)
    return value


def _check_kind(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must hold {like.dtype} as x0 does, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on device {like.device} as x0 is, got {value.device}")
    if not is_finite(value):
        raise ValueError(f"{name} must be finite")


def fill(states: torch.Tensor, x0: torch.Tensor, beside: Beside, system: Any) -> None:
    """Write initial states, memory and the inputs of all steps into rows (steps + 1, batch, D + H + V + E)."""
    size, end, written = system.own_size, system.remembering_size, system.written_size
    states[0, :, :size] = x0.repeat(1, 2) if system.stands_twice else x0
    if end > size:
        states[0, :, size:end] = 0.0 if beside.memory is None else beside.memory
    if beside.inputs is not None:
        states[:-1, :, written:] = beside.inputs
        states[-1, :, written:] = 0.0
        if written > end:
            states[0, :, end:written] = beside.inputs[0, :, : written - end]


def first_row(x0: torch.Tensor, beside: Beside, system: Any) -> torch.Tensor:
    """Return the rows that a trajectory starts from, (batch, D + H + V + E), without history."""
    if system.state_size == x0.shape[1]:
        return x0
    rows = x0.new_zeros((2, len(x0), system.state_size))
    first = beside.detach()
    fill(rows, x0.detach(), first._replace(inputs=None if first.inputs is None else first.inputs[:1]), system)
    return rows[0]


def adjoints_of(adj_x0: torch.Tensor, adj_inputs: torch.Tensor | None, beside: Beside, system: Any) -> tuple:
    """Return the adjoints of initial states, inputs and memory of all flows.

    Args:
        adj_x0: Those of the first rows, shape (flows, batch, D + H + V + E).
        adj_inputs: Those of what is given to every step, shape (flows, steps, batch, E), or None.
        beside: What they are of.
        system: The extended system.
    """
    size, end, written = system.own_size, system.remembering_size, system.written_size
    if adj_inputs is not None:
        adj_inputs[:, 0, :, : written - end] += adj_x0[:, :, end:written]
        if beside.inputs is not None and beside.inputs.shape[1] == 1:
            adj_inputs = adj_inputs.sum(dim=2, keepdim=True)
    own = adj_x0[:, :, :size]
    if system.stands_twice:
        own = own[:, :, : size // 2] + own[:, :, size // 2 :]
    return own, adj_inputs, adj_x0[:, :, size:end]
