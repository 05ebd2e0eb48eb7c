"""The pointwise cost of a JAX system as a node of torch's graph."""

from typing import Any

import jax
import torch

from warp_phys.interop.torch.loss import refuse_second_derivative


def torch_costs(system: Any, states: torch.Tensor, times: tuple[int, ...]) -> torch.Tensor:
    """Return the costs of a `JaxSystem` at chosen times, shape (times · batch,), attached to autograd.

    Args:
        system: The system; it has a cost.
        states: Shape (steps + 1, batch, D).
        times: Distinct steps.
    """
    return _Costs.apply(states[list(times)].reshape(-1, system.state_size), system)


class _Costs(torch.autograd.Function):
    """costs[i] = cost(rows[i])."""

    @staticmethod
    def forward(ctx, rows, system):
        costs, ctx.pull = jax.vjp(system.costs_of_rows, _to_jax(rows))
        return _to_torch(costs, rows)

    @staticmethod
    def backward(ctx, adj_costs):
        refuse_second_derivative()
        (adj_rows,) = ctx.pull(_to_jax(adj_costs))
        return _to_torch(adj_rows, adj_costs), None


def _to_jax(tensor: torch.Tensor) -> jax.Array:
    """Return a copy: JAX may read the memory after torch has written to it again."""
    if tensor.dtype == torch.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError("states hold float64, which JAX is not set to use: jax.config.update('jax_enable_x64', True)")
    if tensor.is_cuda:
        return jax.numpy.array(jax.dlpack.from_dlpack(tensor.detach().contiguous()), copy=True).block_until_ready()
    return jax.numpy.asarray(tensor.detach().numpy().copy())


def _to_torch(array: jax.Array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_dlpack(array.block_until_ready()).to(like.device).clone()
