"""A torch module as a function of the states: evaluated, and linearised by autograd."""

from collections.abc import Sequence
from typing import Any

import torch
import warp as wp


def controls_of(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the controls (N, K) at the states x (N, D).

    Raises:
        TypeError: The module returns something else than a tensor.
        ValueError: The module has changed x.
    """
    before = None if x.is_inference() else x._version  # an inference tensor counts no versions
    output = module(x)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"controller must return the controls alone, a torch.Tensor, got {type(output).__name__}")
    if before is not None and x._version != before:
        raise ValueError("controller must not change its input in place, which is the trajectory itself: use x.clone()")
    return output


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
            return controls_of(self.module, self.x)

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


def _reached_by(output: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> set[int]:
    """Return the identities of the parameters that the graph of `output` leads to."""
    wanted, seen = {id(p) for p in parameters}, set()
    reached = wanted & {id(output)}
    nodes = [output.grad_fn] if output.grad_fn is not None else []
    while nodes and len(reached) < len(wanted):
        node = nodes.pop()
        reached |= wanted & {id(getattr(node, "variable", None))}
        after = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(after)
        nodes += after
    return reached


class TrainingCheck:
    """What a backward pass that trains asks of a controller: `check_pure` at every chunk, and a graph at one of them.

    A controller may well leave its parameters alone at some states, but not at all.
    """

    def __init__(self) -> None:
        self._is_known, self._reached = False, set[int]()

    def __call__(self, linear: Any, stored: wp.array) -> None:
        """Look at a chunk, see `phases.backward`."""
        check_pure(linear, stored)
        if isinstance(linear, TorchLinearisation) and linear.parameters:
            self._is_known = True
            if len(self._reached) < len(linear.parameters):
                self._reached |= _reached_by(linear.output, linear.parameters)

    def includes(self, parameter: torch.Tensor) -> bool:
        """Whether the controls depend on a trained parameter; those of layers that autograd does not run all count.

        torch leaves the `.grad` of one that they do not depend on alone, so that no optimiser moves it.
        """
        return not self._is_known or id(parameter) in self._reached

    def finish(self) -> None:
        """Raise a ValueError if there are parameters to train, and nothing led back to them."""
        if self._is_known and not self._reached:
            raise ValueError(
                "controller must be differentiable: what it returns has no graph back to its parameters; detach(), "
                "no_grad(), numpy() and .data do that. One that is not to be trained: controller.requires_grad_(False)"
            )
