"""What a tensor of torch's depends on, and derivatives by it that nobody's hooks see before autograd hands them out.

A rollout differentiates its controller in passes of autograd of its own, inside the pass that called it. A hook on a
parameter is meant for the gradient that comes out at the end, once; in the passes inside it keeps still.
"""

from collections.abc import Sequence
from typing import Any

import torch


def leaves_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaves of autograd's graph that tensors depend on, in the order in which they are found."""
    found = {id(tensor): tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad}
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "AccumulateGrad":
            found[id(node.variable)] = node.variable  # type: ignore[attr-defined]
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(found.values())


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
