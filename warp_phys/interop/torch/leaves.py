"""What a tensor of torch's depends on, and derivatives by it that nobody's hooks see before autograd hands them out.

A rollout differentiates its controller in passes of autograd of its own, inside the pass that called it. A hook on a
parameter is meant for the gradient that comes out at the end, once; in the passes inside it keeps still.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def leaves_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaves of autograd's graph that tensors depend on, in the order in which they are found."""
    found = {id(tensor): tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad}
    for node in nodes_of(*tensors):
        if type(node).__name__ == "AccumulateGrad":
            found[id(node.variable)] = node.variable  # type: ignore[attr-defined]
    return list(found.values())


def nodes_of(*tensors: torch.Tensor) -> Iterator[Any]:
    """Go through the nodes of autograd's graph that tensors depend on."""
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def reaches_back(output: torch.Tensor, number: int) -> bool:
    """Whether a tensor's graph has operations from before that of a number, as autograd numbers them."""
    return any(node._sequence_nr() < number for node in nodes_of(output))


class Cuts(TorchFunctionMode):
    """Has functions of torch's compute with leaves in place of tensors that have a history from before the call.

    What a module or a simulator depends on may come from an encoder. Its history is then no part of what is
    differentiated at every step: adjoints add up at the leaf, and go through the history once, as in torch. Hooks on
    the way see what they are meant for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """The tensors, and the leaves in their place."""
        self.before: int | None = None
        """In a call that looks for such tensors, the number of the first operation that belongs to it."""
        self._seen: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._leaf(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        if type(value) is dict:
            return {key: self._replaced(entry) for key, entry in value.items()}
        return value

    @contextlib.contextmanager
    def looking(self, number: int) -> Iterator[None]:
        """Look for tensors with a history in a call whose first operation has this number; replace them afterwards."""
        self.before = number
        try:
            with self:
                yield
        finally:
            self.before = None
        # not before: inside of transformed functions no leaves can be made
        self.pairs = {key: (tensor, tensor.detach().requires_grad_()) for key, tensor in self._seen.items()}

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.before is None:
            return self.pairs[id(tensor)][1] if id(tensor) in self.pairs else tensor
        node = None if tensor.is_complex() else tensor.grad_fn
        if node is not None and node._sequence_nr() < self.before:  # type: ignore[attr-defined]
            self._seen[id(tensor)] = tensor
        return tensor

    def of(self, leaves: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the tensors that some of the leaves stand for, by the leaves' identity."""
        wanted = {id(leaf) for leaf in leaves}
        return {id(leaf): tensor for tensor, leaf in self.pairs.values() if id(leaf) in wanted}


@contextlib.contextmanager
def plainly_saved() -> Iterator[None]:
    """Keep what autograd saves from hooks of somebody's: a checkpoint counts what its function saves."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        yield


_WITHIN = threading.local()


def is_within() -> bool:
    """Whether this thread differentiates a controller or a simulator at a step."""
    return getattr(_WITHIN, "depth", 0) > 0


@contextlib.contextmanager
def within() -> Iterator[None]:
    """Mark derivatives of a controller or a simulator at a step."""
    _WITHIN.depth = getattr(_WITHIN, "depth", 0) + 1
    try:
        yield
    finally:
        _WITHIN.depth -= 1


def inner_grad(
    output: torch.Tensor, inputs: Sequence[torch.Tensor], seed: torch.Tensor, retain_graph: bool = True
) -> tuple[torch.Tensor | None, ...]:
    """Return (∂output/∂inputs)ᵀ seed, without a call of the hooks on leaves among the inputs.

    Args:
        output: Any tensor with a graph.
        inputs: What it is differentiated by.
        seed: Adjoint of the output, its shape.
        retain_graph: Whether the graph may be used again.

    Returns:
        A tensor for each input; None for one that the output does not depend on.
    """
    tasks: list[int] = []
    if any([_quieten(tensor) for tensor in inputs if tensor.is_leaf and tensor._backward_hooks]):  # noqa: C419, all of them
        with torch.enable_grad():
            output = _Root.apply(output, tasks)
    try:
        return torch.autograd.grad(output, inputs, seed, retain_graph=retain_graph, allow_unused=True)
    finally:
        _INSIDE.difference_update(tasks)


class OwnHook:
    """A hook of the engine's own, which may be called in the passes inside."""

    def __init__(self, function: Any):
        self.function = function

    def __call__(self, grad: torch.Tensor) -> Any:
        """Call the function."""
        return self.function(grad)


class _QuietHook:
    """A hook of somebody's that keeps still in the passes inside."""

    def __init__(self, hook: Any):
        self.hook = hook

    def __call__(self, grad: torch.Tensor) -> Any:
        """Call the hook, unless this is a pass inside."""
        return None if torch._C._current_graph_task_id() in _INSIDE else self.hook(grad)


_INSIDE: set[int] = set()
"""The passes of autograd that run inside a rollout's own, as autograd numbers them: on any thread, for any device."""


def _quieten(leaf: torch.Tensor) -> bool:
    """Make the hooks of a leaf keep still where they should; return whether there are any."""
    hooks: Any = leaf._backward_hooks
    foreign = [(key, hook) for key, hook in hooks.items() if not isinstance(hook, OwnHook)]
    for key, hook in foreign:
        if not isinstance(hook, _QuietHook):
            hooks[key] = _QuietHook(hook)  # its handle goes on to remove it
    return bool(foreign)


class _Root(torch.autograd.Function):
    """The identity; the first thing that a pass inside does is to say so."""

    @staticmethod
    def forward(ctx, output, tasks):
        ctx.tasks = tasks
        return output.view_as(output)

    @staticmethod
    def backward(ctx, adj):
        task = torch._C._current_graph_task_id()
        _INSIDE.add(task)
        ctx.tasks.append(task)
        return adj, None
