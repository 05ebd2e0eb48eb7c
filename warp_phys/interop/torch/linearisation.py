"""A torch module as a function of the states: evaluated, and linearised by autograd."""

import contextlib
from collections.abc import Sequence

import torch
import warp as wp

from warp_phys.interop.torch.combine import places_of
from warp_phys.interop.torch.leaves import Cuts, inner_grad, plainly_saved, reaches_back, within
from warp_phys.interop.torch.rows import blame


def controls_of(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the controls (N, K) at the states x (N, D).

    Raises:
        TypeError: The module returns something else than a tensor, or other numbers than x holds.
        ValueError: The module does not take rows of this length, has changed x, or returns no row for each row.
    """
    before = None if x.is_inference() else x._version  # an inference tensor counts no versions
    try:
        output = module(x)
    except RuntimeError as error:
        if any(word in str(error) for word in ("shape", "size", "dimension")):
            raise ValueError(blame(module, f"controller fails at states of shape {tuple(x.shape)}: {error}")) from error
        raise
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            blame(module, f"controller must return the controls alone, a torch.Tensor, got {type(output).__name__}")
        )
    if before is not None and x._version != before:
        raise ValueError(
            blame(
                module, "controller must not change its input in place, which is the trajectory itself: use x.clone()"
            )
        )
    if output.ndim != 2 or len(output) != len(x):
        raise ValueError(
            blame(module, f"controller must return shape ({len(x)}, K), a row per state, got {tuple(output.shape)}")
        )
    if output.dtype != x.dtype:
        raise TypeError(
            blame(module, f"controller must return {x.dtype} as the states hold, got {output.dtype}: convert it")
        )
    return output


def relative_tolerance(dtype: torch.dtype) -> float:
    """Return by how much what is computed again may differ from the largest number of what was computed before."""
    return 1e-4 if dtype == torch.float32 else 1e-10


class TorchLinearisation:
    """A module's autograd graph at N rows, used for the input Jacobian and for every flow's contraction.

    `leaves` are what it is differentiated by besides the rows: the parameters, and what else the controls depend on.
    """

    def __init__(
        self, module: torch.nn.Module, leaves: Sequence[torch.Tensor], x: torch.Tensor, cuts: Cuts | None = None
    ):
        with torch.inference_mode(False), torch.enable_grad():
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        self.module, self.leaves, self.x, self.cuts = module, leaves, x, cuts
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
        if not self.leaves or not self.output.requires_grad:
            return
        for mu_f, gradient in zip(wp.to_torch(mu), gradients, strict=True):
            add_parts(gradient, self._product(self.leaves, mu_f), self.leaves)

    def pull_and_contract(
        self, mu: wp.array, adj_x: wp.array, gradients: Sequence[torch.Tensor], is_open: Sequence[bool]
    ) -> None:
        """Do both in one pass of autograd per flow; mu (flows, N, K), adj_x (flows, N, D), written where it is open."""
        if not self.output.requires_grad:
            wp.to_torch(adj_x).zero_()
            return
        parts = zip(wp.to_torch(mu), wp.to_torch(adj_x), gradients, is_open, strict=True)
        for mu_f, adj, gradient, open_ in parts:
            sources = (self.x, *self.leaves) if open_ else tuple(self.leaves)
            if not sources:
                continue
            found = list(self._product(sources, mu_f))
            own = found.pop(0) if open_ else None
            adj.zero_() if own is None else adj.copy_(own)
            add_parts(gradient, found, self.leaves)

    def adjoints(self, mu: torch.Tensor) -> list[torch.Tensor]:
        """Return (∂N/∂x)ᵀ mu and Σ (∂N/∂leaf)ᵀ mu for each leaf, zeros where the controls do not depend on one."""
        sources = [self.x, *self.leaves]
        if not self.output.requires_grad:
            return [torch.zeros_like(source) for source in sources]
        found = self._product(sources, mu)
        return [torch.zeros_like(s) if a is None else dense(a) for s, a in zip(sources, found, strict=True)]

    def _pull(self, mu: torch.Tensor, out: torch.Tensor) -> None:
        if not self.output.requires_grad:  # a controller that does not look at its input
            out.zero_()
            return
        (adj,) = self._product((self.x,), mu)
        out.zero_() if adj is None else out.copy_(adj)

    def _evaluate(self) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad(), plainly_saved():
            x = self.x.clone()  # a leaf cannot be changed in place, to be told so
            first: int = x.grad_fn._sequence_nr()  # type: ignore[union-attr]
            with contextlib.nullcontext() if self.cuts is None else self.cuts:
                output = controls_of(self.module, x)
        self.reaches_back = reaches_back(output, first)
        """Whether the controls depend on operations from before the call."""
        return output

    def find_cuts(self) -> Cuts:
        """Return what takes the place of such operations' results."""
        cuts = Cuts()
        with torch.inference_mode(False), torch.enable_grad(), plainly_saved():
            x = self.x.clone()
            with cuts.looking(x.grad_fn._sequence_nr()):  # type: ignore[union-attr]
                self.module(x)
        return cuts

    def _product(self, inputs: Sequence[torch.Tensor], mu: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return (∂N/∂inputs)ᵀ mu; None for an input that the controls do not depend on.

        The graph of a module that torch has compiled may serve only once, as torch says when it is asked for more; then
        there is a new one each time.
        """
        if self._serves_once:
            self.output = self._evaluate()
        else:
            try:
                with within():
                    return inner_grad(self.output, inputs, mu)
            except RuntimeError as error:
                if "donated buffers" not in str(error):
                    raise
            self._serves_once = True
        with within():
            return inner_grad(self.output, inputs, mu, retain_graph=False)


def add_parts(gradient: torch.Tensor, parts: Sequence[torch.Tensor | None], leaves: Sequence[torch.Tensor]) -> None:
    """Add tensors in the shapes of `leaves` to the beginning of a flat one; None stands for zeros."""
    for part, place in zip(parts, places_of(leaves), strict=True):
        if part is not None:
            gradient[place] += dense(part).reshape(-1)


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient with all of its zeros: that of an embedding may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient
