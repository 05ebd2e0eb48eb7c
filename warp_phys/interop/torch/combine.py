"""The sums of flows behind the gradients of torch parameters.

A combined update is no linear function of what it combines: M and R must be summed apart, over all backward passes
since the gradients were cleared, and compared afterwards. So each backward pass hands autograd the change that it
makes to the combination, C(Σ + new) − C(Σ), and `p.grad` always holds C of the sums, besides whatever else adds to
it. Passes may run in several threads; those that add to one `p.grad` must come one after the other.
"""

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from warp_phys.flow import Combined, refuse_whole
from warp_phys.interop.torch.leaves import OwnHook

Pair = tuple[torch.Tensor, torch.Tensor]

PASSES = 8
"""Passes of autograd whose updates wait for p.grad: one per thread that is in one, and those of torch.autograd.grad,
which never reach it."""


class PassUpdates:
    """What one backward pass found for one parameter: a part of two flat tensors, cut out only if it is needed."""

    def __init__(self, base: torch.Tensor, other: torch.Tensor, part: slice, shape: torch.Size):
        self.flat, self.part, self.shape = (base, other), part, shape

    def pair(self) -> Pair:
        """The updates by the base and by the other flow."""
        base, other = (flat[self.part].view(self.shape) for flat in self.flat)
        return base, other


class ParameterSums:
    """Sums of the base and the other flow for one parameter, by combined flow.

    A sum is valid as long as `p.grad` is what the last backward pass left. Clearing the gradient, to None or to zero,
    or changing it in any other way starts a new sum.
    """

    def __init__(self, parameter: torch.Tensor):
        self.grad: torch.Tensor | None = None
        self.version = -1
        self.settled: dict[Combined, PassUpdates | Pair] = {}
        self.pending: dict[int, dict[Combined, PassUpdates | Pair]] = {}  # by pass of autograd
        self.lock = threading.RLock()  # passes may run in several threads
        # autograd calls the one before it adds to p.grad, the other after; neither may keep the parameter alive
        reference = weakref.ref(parameter)
        parameter.register_hook(OwnHook(lambda _grad: self._forget_if_changed(reference())))
        parameter.register_post_accumulate_grad_hook(self._settle)

    def add(self, flow: Combined, parameter: torch.Tensor, new: PassUpdates) -> tuple[Pair, Pair] | None:
        """Add one pass's updates; return the sums before and after it, or None if it is the first."""
        with self.lock:
            self._forget_if_changed(parameter)
            pending = self.pending.setdefault(torch._C._current_graph_task_id(), {})
            if len(self.pending) > PASSES:
                self.pending.pop(next(iter(self.pending)))
            known = pending.get(flow, self.settled.get(flow))
            if known is None:
                pending[flow] = new
                return None
            before, update = known.pair() if isinstance(known, PassUpdates) else known, new.pair()
            after = before[0] + update[0], before[1] + update[1]
            pending[flow] = after
            return before, after

    def _settle(self, parameter: torch.Tensor) -> None:
        with self.lock:
            self.settled.update(self.pending.pop(torch._C._current_graph_task_id(), {}))
            self.grad = parameter.grad
            self.version = -1 if self.grad is None else self.grad._version

    def _forget_if_changed(self, parameter: torch.Tensor | None) -> None:
        with self.lock:
            grad = None if parameter is None else parameter.grad
            if grad is None or grad is not self.grad or grad._version != self.version:
                self.settled.clear()
                self.grad = None
                left = None if grad is None or parameter is None else _left_in(grad, parameter)
                if left is not None and grad is not None:
                    self.grad, self.version = grad, grad._version
                    self.settled.update([left])


class Source(Protocol):
    """Who writes gradients without autograd."""

    def left(self, index: int, version: int) -> tuple[Combined, torch.Tensor, torch.Tensor] | None:
        """Return the flow and the updates, all parameters in one tensor, that a gradient of this version is made of.

        None where it is made of anything else.
        """


def announce(source: Source, grads: Sequence[torch.Tensor]) -> None:
    """Have later passes of autograd ask who wrote these gradients of the parameters, in their order, what is in them.

    So what they add, they add to that one's sums.
    """
    for index, (grad, part) in enumerate(zip(grads, places_of(grads), strict=True)):
        _WRITTEN[grad] = weakref.ref(source), index, part


def _left_in(grad: torch.Tensor, parameter: torch.Tensor) -> tuple[Combined, PassUpdates] | None:
    if grad not in _WRITTEN:
        return None
    source, index, part = _WRITTEN[grad]
    writer = source()
    left = None if writer is None else writer.left(index, grad._version)
    return None if left is None else (left[0], PassUpdates(left[1], left[2], part, parameter.shape))


_WRITTEN = WeakIdKeyDictionary()
_SUMS = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def number_of_hooks(parameter: torch.Tensor) -> int:
    """Number of hooks that autograd calls with a parameter's gradient."""
    return len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ())  # type: ignore


def has_own_hooks(parameter: torch.Tensor) -> bool:
    """Whether a parameter has hooks besides those of its sums."""
    count = number_of_hooks(parameter)
    if count == 0:
        return False
    with _LOCK:
        return count > (2 if parameter in _SUMS else 0)


def combined_changes(
    flow: Combined, parameters: Sequence[torch.Tensor], base: torch.Tensor, other: torch.Tensor
) -> list[torch.Tensor]:
    """Return for each parameter the change of its combined update that one pass makes.

    Args:
        flow: How to combine.
        parameters: The trained parameters.
        base: The pass's update by the base flow, all parameters in one flat tensor.
        other: Its update by the other flow, likewise.
    """
    changes = split(flow.apply(base, other), parameters)
    for i, (parameter, part) in enumerate(zip(parameters, places_of(parameters), strict=True)):
        with _LOCK:
            if parameter not in _SUMS:
                _SUMS[parameter] = ParameterSums(parameter)
            own = _SUMS[parameter]
        sums = own.add(flow, parameter, PassUpdates(base, other, part, parameter.shape))
        if sums is not None:
            refuse_whole(
                "updates of several backward passes cannot be added up parameter by parameter. Clear the gradients, "
                "and make one loss of all",
                flow,
            )
            before, after = sums
            changes[i] = flow.rule(*after) - flow.rule(*before)
    return changes


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many numbers tensors hold together."""
    return sum(tensor.numel() for tensor in tensors)


def places_of(tensors: Iterable[torch.Tensor]) -> list[slice]:
    """Return where each tensor stands in a flat one of all of them, in their order."""
    ends = itertools.accumulate((tensor.numel() for tensor in tensors), initial=0)
    return list(itertools.starmap(slice, itertools.pairwise(ends)))


def split(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of a flat tensor in the shapes of `like`; views."""
    return [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in like]), like, strict=True)]
