"""A torch function as a simulator: its physics, our flows."""

import contextlib
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.core.checks import check_repeated, differing_rows
from warp_phys.errors import NotRepeatable
from warp_phys.interop.foreign import ForeignSystem, check_result, not_finite_message
from warp_phys.interop.torch.leaves import Cuts, inner_grad, leaves_of, plainly_saved, reaches_back, within
from warp_phys.interop.torch.linearisation import add_parts


class TorchSystem(ForeignSystem):
    """x_{n+1} = function(x_n, c_n) for any torch function or module; autograd gives its vector-Jacobian product.

    It has no physical parameters of its own, and is stepped and differentiated step by step. Arrays are exchanged
    without copies. What the function depends on besides its arguments, as a module on its parameters, is trained by a
    torch rollout where it requires gradients: each flow's update of it is Σ_n (∂S/∂θ)ᵀ λ_{n+1}.

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
        with on_stream_of(x), torch.inference_mode(False), torch.no_grad():
            target = wp.to_torch(y, requires_grad=False)
            target.copy_(self._next(*(wp.to_torch(array, requires_grad=False) for array in (x, c))))

    def step_vjp(
        self,
        x: wp.array,
        c: wp.array,
        adj_y: wp.array,
        adj_x: wp.array,
        adj_c: wp.array,
        parameters: wp.array | None = None,
        adj_parameters: wp.array | None = None,
        y: wp.array | None = None,
        leaves: Sequence[torch.Tensor] = (),
        gradient: torch.Tensor | None = None,
        cuts: Cuts | None = None,
        reached: set[int] | None = None,
    ) -> None:
        """Write adj_x = (∂S/∂x)ᵀ adj_y and adj_c = (∂S/∂c)ᵀ adj_y.

        Args:
            x: States (batch, D).
            c: Controls (batch, K).
            adj_y: Adjoint of the next states (batch, D).
            adj_x: Written.
            adj_c: Written.
            parameters: There are none.
            adj_parameters: Likewise.
            y: The next states that the forward pass found; they are compared with what the function gives now.
            leaves: What else to differentiate by, see `leaves`.
            gradient: A flat tensor to which Σ (∂S/∂leaves)ᵀ adj_y is added.
            cuts: What `leaves` has filled.
            reached: To it the identities of those leaves are added that the next states do depend on.

        Raises:
            ValueError: The function is not differentiable, or its vector-Jacobian product is not finite though all
                that it is made from is.
            NotRepeatable: The function gives other states than y, or depends on more than `leaves`.
        """
        self._check_inputs(x, c, adj_y, "adj_y")
        with on_stream_of(x), torch.inference_mode(False), torch.enable_grad():
            inputs = [wp.to_torch(array, requires_grad=False).detach().requires_grad_() for array in (x, c)]
            with plainly_saved(), cuts or contextlib.nullcontext():
                result = self._evaluate(*inputs)
            if y is not None:
                self._compare(inputs, result.detach(), wp.to_torch(y, requires_grad=False))
            if y is not None and gradient is not None:
                _check_leaves(result, [*inputs, *leaves])
            if not result.requires_grad:
                raise ValueError(
                    "function must be differentiable: what it returns has no graph back to its arguments; detach(), "
                    "no_grad(), numpy() and .data do that"
                )
            adj = wp.to_torch(adj_y, requires_grad=False)
            by_x, by_c, *parts = _product(result, [*inputs, *leaves], adj)
            if gradient is not None:
                add_parts(gradient, parts, leaves)
            if reached is not None:
                reached.update(id(leaf) for leaf, part in zip(leaves, parts, strict=True) if part is not None)
            for name, array, product in (("x", adj_x, by_x), ("c", adj_c, by_c)):
                target = wp.to_torch(array, requires_grad=False)
                if product is None:
                    target.zero_()
                    continue
                target.copy_(product)
                if not torch.isfinite(target.sum()):
                    _explain(name, target, result, adj)

    def leaves(self, x: torch.Tensor, c: torch.Tensor, cuts: Cuts | None = None) -> list[torch.Tensor]:
        """Return the leaves of autograd's graph that the next states may depend on besides x (batch, D), c (batch, K).

        They are those at x and c, and the trained parameters of modules that the function is, or refers to: at other
        states it may use others of them. Empty `cuts` take up the tensors that have a history.
        """
        with torch.inference_mode(False), torch.enable_grad(), plainly_saved():
            inputs = [tensor.detach().requires_grad_() for tensor in (x, c)]
            copies = [tensor.clone() for tensor in inputs]
            result, first = self._evaluate(*copies), copies[0].grad_fn._sequence_nr()  # type: ignore[union-attr]
            if cuts is not None and reaches_back(result, first):
                copies = [tensor.clone() for tensor in inputs]
                with cuts.looking(copies[0].grad_fn._sequence_nr()):  # type: ignore[union-attr]
                    self._evaluate(*copies)
                with cuts:
                    result = self._evaluate(*copies)
        found = [leaf for leaf in leaves_of(result) if all(leaf is not own for own in inputs)]
        found += [p for module in _modules_of(self.function) for p in module.parameters() if p.requires_grad]
        return list({id(leaf): leaf for leaf in found}.values())

    def _compare(self, inputs: Sequence[torch.Tensor], now: torch.Tensor, before: torch.Tensor) -> None:
        """Raise `NotRepeatable` if the function gives other states than in the forward pass."""
        if torch.equal(now, before) or not differing_rows(now.cpu().numpy(), before.cpu().numpy()):
            return
        # with a graph torch may choose another algorithm, whose rounding is another
        again = self._next(*(tensor.detach() for tensor in inputs))
        check_repeated("function", again.cpu().numpy(), before.cpu().numpy())

    def _next(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the next states without a graph, whether or not the function makes one for itself on the way."""
        try:
            with torch.no_grad():
                return self._evaluate(x, c)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        with torch.enable_grad():
            return self._evaluate(*(tensor.detach().requires_grad_() for tensor in (x, c))).detach()

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


def _modules_of(function: Any) -> list[torch.nn.Module]:
    """Return the modules that a function is, belongs to or refers to by name."""
    found = [function, getattr(function, "__self__", None)]
    if isinstance(function, functools.partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isfunction(plain):
        names = inspect.getclosurevars(plain)
        found += [*names.nonlocals.values(), *names.globals.values()]
    return [value for value in found if isinstance(value, torch.nn.Module)]


def _check_leaves(result: torch.Tensor, known: Sequence[torch.Tensor]) -> None:
    """Raise `NotRepeatable` if the next states depend on a leaf that is not known."""
    ids = {id(leaf) for leaf in known}
    others = [tuple(leaf.shape) for leaf in leaves_of(result) if id(leaf) not in ids]
    if others:
        raise NotRepeatable(
            f"the step of function depends on a tensor of shape {others[0]} that it does not depend on at x0: make the "
            "function a torch.nn.Module that has it as a parameter, or detach it"
        )


def _product(result: torch.Tensor, inputs: Sequence[torch.Tensor], adj: torch.Tensor) -> tuple:
    """Return (∂result/∂inputs)ᵀ adj."""
    try:
        with within():
            return inner_grad(result, inputs, adj)  # steps may share a part of their graphs
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
    with within():
        return inner_grad(result, inputs, adj, retain_graph=False)


def on_stream_of(x: wp.array) -> contextlib.AbstractContextManager:
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
