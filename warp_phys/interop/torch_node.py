"""An unrolling as one node of torch's graph, and what becomes of samples that diverge."""

from typing import Any

import torch

from warp_phys.errors import Diverged
from warp_phys.interop.torch_loss import refuse_second_derivative


class Unroll(torch.autograd.Function):
    """The unrolling as one node of torch's graph."""

    @staticmethod
    def forward(ctx, rollout: Any, x0, rows, *trainable):
        """Unroll; return states and controls."""
        ctx.set_materialize_grads(False)
        states, controls, masked, kept = rollout._forward(x0, rows, keep=True)
        ctx.rollout, ctx.kept, ctx.signature = rollout, kept, rollout._adapter.signature()
        ctx.save_for_backward(states, controls, rows, masked)
        # not saved, but kept: behind hooks of saved tensors, as a checkpoint's, others would come, and of any version
        ctx.trainable, frozen = trainable, [p for p in rollout.controller.parameters() if not p.requires_grad]
        ctx.versions = [(p, p._version) for p in (*trainable, *frozen)]
        return states, controls

    @staticmethod
    def backward(ctx, adj_states, adj_controls):
        """Return the flow's adjoints of x0 and of the parameter rows, and its update of the trainable parameters."""
        refuse_second_derivative()
        states, controls, rows, masked = ctx.saved_tensors
        trainable = ctx.trainable
        if any(p._version != version for p, version in ctx.versions):
            raise RuntimeError(
                "a parameter of the controller has been modified in place since the forward pass: call the rollout "
                "again before the backward pass"
            )
        if ctx.rollout._adapter.signature() != ctx.signature:
            raise RuntimeError(
                "the controller has changed since the forward pass (layers, frozen parameters, or their memory): "
                "call the rollout again before the backward pass"
            )
        if adj_states is None and adj_controls is None:
            return (None,) * (3 + len(trainable))
        want_x0, want_rows = ctx.needs_input_grad[1:3]
        seeds = (adj_states, adj_controls)
        adj_x0, adj_rows, grads = ctx.rollout._backward(
            states, controls, rows, masked, ctx.kept, trainable, seeds, want_rows, not (want_x0 or want_rows)
        )
        return None, adj_x0 if want_x0 else None, adj_rows, *grads


def freeze_diverged(states: torch.Tensor, controls: torch.Tensor, on_divergence: str) -> torch.Tensor:
    """Freeze samples that leave the finite numbers, in place; return their indices.

    Raises:
        Diverged: There are such samples, and they shall not be masked, or none would be left.
    """
    none = torch.empty(0, dtype=torch.long, device=states.device)
    if torch.isfinite(states.sum()):  # one cheap pass; the sum may overflow where no state does
        return none
    finite = torch.isfinite(states).all(dim=2)
    if finite.all():
        return none
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
