"""A torch function as a simulator: its physics, our flows."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.interop.foreign import ForeignSystem, check_result, not_finite_message


class TorchSystem(ForeignSystem):
    """x_{n+1} = function(x_n, c_n) for any torch function or module; autograd gives its vector-Jacobian product.

    It has no physical parameters of its own, and is stepped and differentiated step by step. Arrays are exchanged
    without copies. A module's parameters are not trained.

    Args:
        function: States (B, D) and controls (B, K) to the next states (B, D), row by row; it runs in the precision
            and on the device of its arguments, and leaves them as they are.
        state_size: Number D of state components.
        control_size: Number K of control components.
        cost: Pointwise cost of states (N, D), shape (N,), for `loss`.

    Raises:
        TypeError, ValueError: Arguments that do not fit; at the first step, a function that returns another shape,
            precision or device, or changes its arguments; in a backward pass, one that is not differentiable.

    >>> system = TorchSystem(lambda x, c: x + 0.1 * c, state_size=2, control_size=2, cost=lambda x: (x * x).sum(1))
    >>> system.loss(torch.ones(3, 4, 2))
    tensor(2.)
    """

    def step(self, x: wp.array, c: wp.array, y: wp.array, parameters: wp.array | None = None) -> None:
        """Write y = function(x, c); x and y (batch, D), c (batch, K)."""
        self._check_inputs(x, c, y, "y")
        with _on_stream_of(x), torch.inference_mode(False), torch.no_grad():
            target = wp.to_torch(y, requires_grad=False)
            target.copy_(self._evaluate(*(wp.to_torch(array, requires_grad=False) for array in (x, c))))

    def step_vjp(
        self,
        x: wp.array,
        c: wp.array,
        adj_y: wp.array,
        adj_x: wp.array,
        adj_c: wp.array,
        parameters: wp.array | None = None,
        adj_parameters: wp.array | None = None,
    ) -> None:
        """Write adj_x = (∂S/∂x)ᵀ adj_y and adj_c = (∂S/∂c)ᵀ adj_y.

        Raises:
            ValueError: The function is not differentiable, or its vector-Jacobian product is not finite though all
                that it is made from is.
        """
        self._check_inputs(x, c, adj_y, "adj_y")
        with _on_stream_of(x), torch.inference_mode(False), torch.enable_grad():
            inputs = [wp.to_torch(array, requires_grad=False).detach().requires_grad_() for array in (x, c)]
            y = self._evaluate(*inputs)
            if not y.requires_grad:
                raise ValueError(
                    "function must be differentiable: what it returns has no graph back to its arguments; detach(), "
                    "no_grad(), numpy() and .data do that"
                )
            adj = wp.to_torch(adj_y, requires_grad=False)
            gradients = torch.autograd.grad(y, inputs, adj, allow_unused=True)
            outputs = zip(("x", "c"), (adj_x, adj_c), gradients, strict=True)
            for name, array, gradient in outputs:
                target = wp.to_torch(array, requires_grad=False)
                if gradient is None:
                    target.zero_()
                    continue
                target.copy_(gradient)
                if not torch.isfinite(target.sum()):
                    _explain(name, target, y, adj)

    def _evaluate(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        versions = x._version, c._version
        y = self.function(x, c)
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"function must return a torch.Tensor, got {type(y).__name__}")
        check_result("function", y.shape, y.dtype, x.shape, x.dtype)
        if y.device != x.device:
            raise ValueError(f"what function returns must be on device {x.device}, got {y.device}")
        if (x._version, c._version) != versions:
            raise ValueError("function must not change its arguments in place: they are the trajectory itself")
        return y

    def _costs(self, states: Any, times: Sequence[int]) -> torch.Tensor:
        assert self.cost is not None
        states = torch.as_tensor(states)
        rows = states[list(times)].reshape(-1, self.state_size)
        costs = self.cost(rows)
        if not isinstance(costs, torch.Tensor):
            raise TypeError(f"cost must return a torch.Tensor, got {type(costs).__name__}")
        check_result("cost", costs.shape, costs.dtype, (len(rows),), rows.dtype)
        return costs


def _on_stream_of(x: wp.array) -> contextlib.AbstractContextManager:
    """Return a context in which torch works on the stream that Warp works on."""
    if not wp.get_device(x.device).is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.stream(wp.stream_to_torch(x.device))


def _explain(name: str, gradient: torch.Tensor, y: torch.Tensor, adj_y: torch.Tensor) -> None:
    """Raise a ValueError if the product is not finite where all that it is made from is."""
    healthy = torch.isfinite(y).all(1) & torch.isfinite(adj_y).all(1)
    bad = torch.nonzero(~torch.isfinite(gradient).all(1) & healthy).flatten().tolist()
    if bad:
        raise ValueError(not_finite_message(name, bad))
