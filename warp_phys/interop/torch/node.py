"""An unrolling as one node of torch's graph, and what becomes of samples that diverge."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from warp_phys.errors import Diverged
from warp_phys.flow import Combined, Flow
from warp_phys.interop.torch.combine import places_of, size_of
from warp_phys.interop.torch.dense import is_finite
from warp_phys.interop.torch.leaves import Cuts, inner_grad, is_within, leaves_of
from warp_phys.interop.torch.loss import refuse_second_derivative
from warp_phys.interop.torch.rows import Beside


class Sources:
    """What an unrolling depends on besides its trained parameters: leaves of autograd's graph, and where they come in.

    A combined update is no linear function of the updates that it is made of. Where x0 or the physical parameters have
    a history, each flow's adjoint is therefore followed to the leaves of that history by itself, and combined there:
    two rollouts in a chain give what one over both horizons gives.
    """

    def __init__(
        self,
        controller: Sequence[torch.Tensor],
        system: Sequence[torch.Tensor] = (),
        histories: Sequence[torch.Tensor | None] = (None, None, None, None),
        cuts: Mapping[int, torch.Tensor] | None = None,
        combined: bool = False,
    ):
        self.controller, self.system = list(controller), list(system)
        self.histories = [(h, leaves_of(h)) if h is not None and h.requires_grad else None for h in histories]
        self.apart = any(self.histories)
        """Whether x0, physical parameters, inputs and memory reach the node through their leaves."""
        self.cuts = dict(cuts or {})
        """The tensors that some of the leaves stand for, by the leaves' identity, see `leaves.Cuts`."""
        self.cuts_of_system: Cuts | None = None
        self._behind = [leaves_of(tensor) for tensor in self.cuts.values()]
        self.combined = combined
        """Whether the histories of those tensors are followed for each flow, too."""
        others = [leaf for history in self.histories if history for leaf in history[1]]
        others += [leaf for leaves in self._behind for leaf in leaves if combined]
        self._elsewhere = {id(leaf) for leaf in others}
        self.leaves = list({id(leaf): leaf for leaf in (*self.controller, *self.system, *others)}.values())
        """All leaves, each once, those of the controller first."""
        self.size = size_of(self.leaves)
        self._parts = {id(leaf): place for leaf, place in zip(self.leaves, places_of(self.leaves), strict=True)}
        numbers = [leaf for leaf in self.leaves if leaf.is_complex()]
        if numbers:
            raise ValueError(
                f"what is trained must be real numbers, got a tensor of {numbers[0].dtype}, shape "
                f"{tuple(numbers[0].shape)}: keep real and imaginary parts as real numbers, see torch.view_as_complex"
            )

    @property
    def inputs(self) -> list[torch.Tensor]:
        """What autograd shall hand the leaves' gradients to: the leaves, or the tensors that they stand for."""
        if self.combined:
            return self.leaves
        return [self.cuts.get(id(leaf), leaf) for leaf in self.leaves]

    @property
    def origins(self) -> list[torch.Tensor]:
        """All leaves that get a gradient in the end."""
        own = [leaf for leaf in self.leaves if id(leaf) not in self.cuts]
        return [*own, *(leaf for leaves in self._behind for leaf in leaves)]

    def check(self) -> None:
        """Raise a ValueError if the gradient of a history is asked for, of which there is none."""
        for name, history in zip(("x0", "parameters", "inputs", "memory"), self.histories, strict=True):
            if history is not None and history[0].retains_grad:
                raise ValueError(
                    f"{name} must not retain its gradient with a combined flow, which combines at the leaves that "
                    f"{name} depends on: detach it, or ask for the linear flows, each in a backward pass of its own"
                )
        if self.combined and any(tensor.retains_grad for tensor in self.cuts.values()):
            raise ValueError(
                "a tensor that the rollout depends on must not retain its gradient with a combined flow, which "
                "combines at the leaves behind it: ask for the linear flows, each in a backward pass of its own"
            )

    @property
    def has_others(self) -> bool:
        """Whether there are leaves that the controller has nothing to do with, or not alone."""
        return bool(self._elsewhere or self.system) or (self.combined and bool(self.cuts))

    def elsewhere(self, leaf: torch.Tensor) -> bool:
        """Whether the trajectory depends on a leaf in another way than through controller or simulator."""
        return id(leaf) in self._elsewhere

    def add(
        self, update: torch.Tensor, leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Add gradients of some of the leaves to a flow's flat update of all of them."""
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                update[self._parts[id(leaf)]] += gradient.reshape(-1)

    def follow(self, update: torch.Tensor, flow: Flow, adjoints: Sequence[torch.Tensor | None]) -> None:
        """Add what one flow's adjoints of the histories mean for their leaves."""
        for history, adjoint in zip(self.histories, adjoints, strict=True):
            if history is None or adjoint is None:
                continue
            tensor, leaves = history
            if tensor.is_leaf:
                self.add(update, leaves, [adjoint])
                continue
            with _as_one_flow(flow):
                self.add(update, leaves, inner_grad(tensor, leaves, adjoint))
        for (leaf, tensor), leaves in zip(self.cuts.items() if self.combined else (), self._behind, strict=False):
            adjoint = update[self._parts[leaf]].view(tensor.shape)
            with _as_one_flow(flow):
                self.add(update, leaves, inner_grad(tensor, leaves, adjoint.clone()))


def refuse_reentrant(*tensors: torch.Tensor) -> None:
    """Raise a ValueError where a checkpoint has cut what a combined flow must follow: a leaf, made in a backward pass.

    Other checkpoints compute again too, but only what autograd has saved.
    """
    if torch._C._current_graph_task_id() == -1 or not any(tensor.is_leaf for tensor in tensors):
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        raise ValueError(
            "a rollout by a combined flow cannot be computed again within a backward pass, where nothing leads from "
            "its x0 or parameters to what they come from: torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
        )


_ONE = threading.local()


@contextlib.contextmanager
def _as_one_flow(flow: Flow) -> Iterator[None]:
    """Have the rollouts that this thread runs backward follow one flow of their combined ones."""
    before = getattr(_ONE, "flow", None)
    _ONE.flow = flow
    try:
        yield
    finally:
        _ONE.flow = before


class Unroll(torch.autograd.Function):
    """The unrolling as one node of torch's graph."""

    @staticmethod
    def forward(
        ctx, rollout: Any, flow: Flow | Combined | None, sources: Sources, found: Any, x0, rows, inputs, memory, *leaves
    ):
        """Unroll; return rows of states and controls."""
        ctx.set_materialize_grads(False)
        ctx.beside = Beside(*(None if t is None else t.detach() for t in (inputs, memory)))
        states, controls, masked, kept = rollout._forward(x0, rows, keep=True, beside=ctx.beside)
        rollout._look_after(found, states[0], controls, masked)
        ctx.rollout, ctx.flow, ctx.kept, ctx.signature = rollout, flow, kept, rollout._adapter.signature()
        ctx.sources, ctx.found = sources, found
        ctx.program = rollout._adapter.program_key() if found is None else None
        ctx.save_for_backward(states, controls, rows, masked)
        # not saved, but kept: behind hooks of saved tensors, as a checkpoint's, others would come, and of any version
        frozen = [p for p in rollout.trained.parameters() if not p.requires_grad]
        ctx.versions = [(p, p._version) for p in (*leaves, *frozen, *sources.cuts.values())]
        # a history that is followed to its leaves is not autograd's; what else has one may become combined too late
        given = (x0, rows, inputs, memory, *leaves)
        ctx.has_history = any(t is not None and t.requires_grad and not t.is_leaf for t in given)
        return states, controls

    @staticmethod
    def backward(ctx, adj_states, adj_controls):
        """Return the flow's adjoints of x0 and of the parameter rows, and its update of the leaves."""
        refuse_second_derivative()
        states, controls, rows, masked = ctx.saved_tensors
        rollout, sources = ctx.rollout, ctx.sources
        if any(p._version != version for p, version in ctx.versions):
            raise RuntimeError(
                "a parameter of the controller has been modified in place since the forward pass: call the rollout "
                "again before the backward pass"
            )
        is_another = ctx.program is not None and rollout._adapter.program_key() != ctx.program
        if is_another or rollout._adapter.signature() != ctx.signature:
            raise RuntimeError(
                "the controller has changed since the forward pass (layers, frozen parameters, or their memory): "
                "call the rollout again before the backward pass"
            )
        if adj_states is None and adj_controls is None:
            return (None,) * (8 + len(sources.leaves))
        flow = ctx.flow or rollout.flow
        combined = isinstance(flow, Combined)
        if combined and ctx.has_history:
            raise RuntimeError(
                "the flow has become a combined one since the forward pass, where x0, parameters or something that the "
                "controller depends on has a history: call the rollout again"
            )
        if combined and is_within():
            raise ValueError(
                "a rollout within a controller or a simulator must have a linear flow: a combined one would be "
                "combined at every step of the rollout around it"
            )
        sources.check()
        wanted, alone = ctx.needs_input_grad[4:8], getattr(_ONE, "flow", None) if combined else None
        adjoints, grads = rollout._backward(
            states, controls, rows, masked, ctx.kept, sources, (adj_states, adj_controls), wanted,
            must_train=not (any(wanted) or sources.apart or sources.system), found=ctx.found,
            flow=alone or flow, alone=alone is not None, beside=ctx.beside,
        )  # fmt: skip
        own = (adjoint if is_wanted else None for adjoint, is_wanted in zip(adjoints, wanted, strict=True))
        return None, None, None, None, *own, *grads


def freeze_diverged(states: torch.Tensor, controls: torch.Tensor, on_divergence: str) -> torch.Tensor:
    """Freeze samples that leave the finite numbers, in place; return their indices.

    Raises:
        Diverged: There are such samples, and they shall not be masked, or none would be left.
    """
    none = torch.empty(0, dtype=torch.long, device=states.device)
    if is_finite(states):
        return none
    finite = torch.isfinite(states).all(dim=2)
    samples = torch.nonzero(~finite.all(dim=0)).flatten()
    first = finite[:, samples].long().argmin(dim=0)
    some = len(samples) < states.shape[1]
    if on_divergence == "raise" or not some:
        raise Diverged(int(first.min()), samples.tolist(), maskable=some)
    for sample, n in zip(samples.tolist(), first.tolist(), strict=True):
        states[n:, sample] = states[n - 1, sample]
        controls[n - 1 :, sample] = 0.0
    return samples


def owned(seed: torch.Tensor | None, like: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Return the adjoint of a trajectory as a contiguous tensor, zero for masked samples."""
    if seed is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    if len(masked):
        seed = seed.clone()
        seed[:, masked] = 0.0
    return seed.contiguous()


def without(samples: torch.Tensor, masked: torch.Tensor, dim: int) -> torch.Tensor:
    """Return samples, along `dim`, in which a healthy one stands in for the masked ones.

    Their adjoints start at zero; at a healthy state they stay zero, at a frozen one of 1e300 they may become nan, as at
    physical parameters that divide by zero.
    """
    if len(masked) == 0:
        return samples
    source = torch.arange(samples.shape[dim], device=samples.device)
    source[masked] = min(set(range(samples.shape[dim])) - set(masked.tolist()))
    return samples.index_select(dim, source)
