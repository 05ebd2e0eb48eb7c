"""A JAX function as a simulator: its physics, our flows."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys.interop.extras import require
from warp_phys.interop.foreign import ForeignSystem, check_result, not_finite_message

require("jax", "jax")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402


class JaxSystem(ForeignSystem):
    """x_{n+1} = function(x_n, c_n) for any JAX function; `jax.vjp` gives its vector-Jacobian product.

    In the rollouts of torch and of pure Warp it is compiled by `jax.jit` and called step by step; arrays are exchanged
    through DLPack, without copies where their memory is aligned as JAX wants it. In `warp_phys.interop.jax.rollout` it
    is a part of JAX's own program. It has no physical parameters of its own.

    Args:
        function: States (B, D) and controls (B, K) to the next states (B, D), row by row, in the precision of its
            arguments; JAX can trace and differentiate it.
        state_size: Number D of state components.
        control_size: Number K of control components.
        cost: Pointwise cost of states (N, D), shape (N,), for `loss`.

    Raises:
        TypeError, ValueError: Arguments that do not fit; at the first step, a function that returns another shape or
            precision, or cannot be traced; in a backward pass, one that is not differentiable.

    >>> system = JaxSystem(lambda x, c: x + 0.1 * c, state_size=2, control_size=2, cost=lambda x: (x * x).sum(1))
    >>> float(system.loss(jnp.ones((3, 4, 2))))
    2.0
    """

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what JAX has compiled."""
        return {name: getattr(self, name) for name in ("function", "state_size", "control_size", "cost")}

    def step(self, x: wp.array, c: wp.array, y: wp.array, parameters: wp.array | None = None) -> None:
        """Write y = function(x, c); x and y (batch, D), c (batch, K)."""
        self._check_inputs(x, c, y, "y")
        inputs = [as_jax(array) for array in (x, c)]
        self.check_function(*inputs)
        write(y, self._compiled(*inputs))

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
            TypeError: JAX cannot differentiate the function.
            ValueError: The vector-Jacobian product is not finite though all that it is made from is.
        """
        self._check_inputs(x, c, adj_y, "adj_y")
        inputs = [as_jax(array) for array in (x, c)]
        self.check_function(*inputs)
        try:
            dx, dc, bad = self._compiled_vjp(*inputs, as_jax(adj_y))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise TypeError(f"function must be differentiable by jax.vjp, which says: {error}") from error
        write(adj_x, dx)
        write(adj_c, dc)
        for name, rows in zip(("x", "c"), np.asarray(bad), strict=True):
            if rows.any():
                raise ValueError(not_finite_message(name, np.flatnonzero(rows).tolist()))

    def check_function(self, x: jax.Array, c: jax.Array) -> None:
        """Raise a TypeError or ValueError if the function cannot be traced or returns something else than states."""
        key = (x.shape, str(x.dtype))
        if key in self._checked:
            return
        try:
            y = jax.eval_shape(self.function, x, c)
        except jax.errors.JAXTypeError as error:
            text = str(error).partition("\n")[0]
            raise TypeError(f"function must be traceable by JAX, which says: {text}") from error
        if not isinstance(y, jax.ShapeDtypeStruct):
            raise TypeError(f"function must return an array, got {type(y).__name__}")
        check_result("function", y.shape, y.dtype, x.shape, x.dtype)
        self._checked.add(key)

    @functools.cached_property
    def _checked(self) -> set[tuple]:
        return set()

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(self.function)

    @functools.cached_property
    def _compiled_vjp(self) -> Callable[..., Any]:
        def pull(x, c, adj_y):
            """Return both products, and for which rows they are not finite though all that they are made from is."""
            y, pull_back = jax.vjp(self.function, x, c)
            adjoints = pull_back(adj_y)
            healthy = jnp.isfinite(y).all(1) & jnp.isfinite(adj_y).all(1)
            bad = jnp.stack([~jnp.isfinite(adjoint).all(1) & healthy for adjoint in adjoints])
            return *adjoints, bad

        return jax.jit(pull)

    def _costs(self, states: Any, times: Sequence[int]) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(states, torch.Tensor):
            from warp_phys.interop.jax_torch import torch_costs  # noqa: PLC0415, the caller has imported torch already

            return torch_costs(self, states, tuple(times))
        return self.costs_of_rows(jnp.asarray(states)[np.asarray(times)].reshape(-1, self.state_size))

    def costs_of_rows(self, rows: jax.Array) -> jax.Array:
        """Return the pointwise costs of states (N, D), shape (N,)."""
        assert self.cost is not None
        costs = self.cost(rows)
        if not isinstance(costs, jax.Array):
            raise TypeError(f"cost must return a JAX array, got {type(costs).__name__}")
        check_result("cost", costs.shape, costs.dtype, rows.shape[:1], rows.dtype)
        return costs


def as_jax(array: wp.array) -> jax.Array:
    """Return a Warp array as a JAX array, without a copy where JAX can use the memory.

    Raises:
        ValueError: The array holds float64, and JAX is not set to use it.
    """
    if array.dtype is wp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("float64 needs jax.config.update('jax_enable_x64', True), or use float32 throughout")
    if wp.get_device(array.device).is_cuda:  # JAX works on a stream of its own
        wp.synchronize_stream(wp.get_stream(array.device))
    return jnp.from_dlpack(array if array.is_contiguous else array.contiguous())


def write(target: wp.array, values: jax.Array) -> None:
    """Copy the numbers of a JAX array to a Warp array of the same shape, and wait for them."""
    wp.copy(target, wp.from_jax(values.block_until_ready()))
