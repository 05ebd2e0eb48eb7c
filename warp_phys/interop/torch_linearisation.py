"""A torch module linearised by autograd."""

from collections.abc import Sequence
from typing import Any

import torch
import warp as wp


class TorchLinearisation:
    """A module's autograd graph at N rows, used for the input Jacobian and for every flow's contraction."""

    def __init__(self, module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter], x: torch.Tensor):
        self.module, self.parameters, self.x = module, parameters, x.detach().requires_grad_()
        self.output = self._evaluate()
        self._serves_once = False

    def jacobian(self, out: wp.array) -> None:
        """Write ∂N/∂x, shape (N, K, D), with one backward pass per control component."""
        target, seed = wp.to_torch(out), torch.zeros_like(self.output)
        for k in range(self.output.shape[1]):
            seed[:, k] = 1.0
            self._pull(seed, target[:, k])
            seed[:, k] = 0.0

    def pull(self, mu: wp.array, adj_x: wp.array) -> None:
        """Write adj_x = (∂N/∂x)ᵀ mu."""
        self._pull(wp.to_torch(mu), wp.to_torch(adj_x))

    def contract(self, mu: wp.array, gradients: Sequence[torch.Tensor]) -> None:
        """Add Σ (∂N/∂θ)ᵀ mu[f] over the rows of each flow f to the flat tensor gradients[f]."""
        if not self.parameters or not self.output.requires_grad:
            return
        for mu_f, gradient in zip(wp.to_torch(mu), gradients, strict=True):
            gradient.add_(_flatten(self._product(self.parameters, mu_f), self.parameters))

    def _pull(self, mu: torch.Tensor, out: torch.Tensor) -> None:
        if not self.output.requires_grad:  # a controller that does not look at its input
            out.zero_()
            return
        (adj,) = self._product((self.x,), mu)
        out.zero_() if adj is None else out.copy_(adj)

    def _evaluate(self) -> torch.Tensor:
        with torch.enable_grad():
            return self.module(self.x)

    def _product(self, inputs: Sequence[torch.Tensor], mu: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return (∂N/∂inputs)ᵀ mu; None for an input that the controls do not depend on.

        The graph of a module that torch has compiled may serve only once, as torch says when it is asked for more; then
        there is a new one each time.
        """
        if self._serves_once:
            self.output = self._evaluate()
        else:
            try:
                return torch.autograd.grad(self.output, inputs, mu, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "donated buffers" not in str(error):
                    raise
            self._serves_once = True
        return torch.autograd.grad(self.output, inputs, mu, allow_unused=True)


def _flatten(parts: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors as one flat tensor; None stands for zeros of the shape in `like`."""
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(parts, like, strict=True)])


def check_pure(linear: Any, stored: wp.array) -> None:
    """Raise a ValueError if a controller gives other controls for the same states than it gave in the forward pass."""
    if not isinstance(linear, TorchLinearisation):
        return  # dense layers have no memory
    before = wp.to_torch(stored)
    error = (linear.output.detach() - before).abs().max()
    tolerance = 1e-4 if before.dtype == torch.float32 else 1e-10
    if not error <= tolerance * (1.0 + before.abs().max()):
        raise ValueError(
            f"controller must give the same controls for the same states each time, they differ by {float(error):.3g}; "
            "dropout, batch normalisation, noise, memory do that: use controller.eval(), or put memory into the state"
        )
