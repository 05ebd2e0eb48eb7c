"""A JAX function as a simulator: its physics, our flows."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import warp as wp

from warp_phys.core.checks import repeated_message
from warp_phys.errors import NotRepeatable
from warp_phys.interop.foreign import ForeignSystem, check_result, not_finite_message
from warp_phys.interop.jax.trace import Program, kinds_of, trace

ROUNDING = 64.0
"""Units in the last place of a row's largest number by which two programs of one function may differ unasked."""


class JaxSystem(ForeignSystem):
    """x_{n+1} = function(x_n, c_n) for any JAX function; `jax.vjp` gives its vector-Jacobian product.

    In the rollouts of torch and of pure Warp it is compiled by `jax.jit` and called step by step; arrays are exchanged
    through DLPack, without copies where their memory is aligned as JAX wants it. In `warp_phys.interop.jax.rollout` it
    is a part of JAX's own program. It has no physical parameters of its own. The function is traced once for each shape
    of its arguments, as by `jax.jit`, and all passes run what was traced: make another one where something changes.

    Args:
        function: States (B, D) and controls (B, K) to the next states (B, D), row by row, in the precision of its
            arguments; JAX can trace and differentiate it.
        state_size: Number D of state components.
        control_size: Number K of control components.
        cost: Pointwise cost of states (N, D), shape (N,), for `loss`.

    Raises:
        TypeError, ValueError: Arguments that do not fit; at the first step, a function that returns another shape or
            precision, or cannot be traced; in a backward pass, one that is not differentiable.
        NotRepeatable: The function is another one when it is traced again, or a step is when it is computed again.

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
        write(y, self._compiled(self.traced(*inputs), *inputs))

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
    ) -> None:
        """Write adj_x = (∂S/∂x)ᵀ adj_y and adj_c = (∂S/∂c)ᵀ adj_y; compare the step with `y`, what it gave before.

        Raises:
            TypeError: JAX cannot differentiate the function.
            ValueError: The vector-Jacobian product is not finite though all that it is made from is.
            NotRepeatable: The step is not `y`.
        """
        self._check_inputs(x, c, adj_y, "adj_y")
        inputs = [as_jax(array) for array in (x, c)]
        program, before = self.traced(*inputs), None if y is None else as_jax(y)
        try:
            dx, dc, bad, far = self._compiled_vjp(program, *inputs, as_jax(adj_y), before)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise TypeError(f"function must be differentiable by jax.vjp, which says: {error}") from error
        if before is not None and np.asarray(far).any():
            self._check_repeats(program, inputs, np.asarray(before))
        write(adj_x, dx)
        write(adj_c, dc)
        for name, rows in zip(("x", "c"), np.asarray(bad), strict=True):
            if rows.any():
                raise ValueError(not_finite_message(name, np.flatnonzero(rows).tolist()))

    def traced(self, x: jax.Array, c: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the function as it was traced for arguments of these shapes.

        Raises:
            TypeError, ValueError: It cannot be traced, closes over what is differentiated, or returns something else
                than states.
            NotRepeatable: It is another function when it is traced again.
        """
        key = kinds_of(x, c)
        if key in self._traced:
            return self._traced[key]
        found = trace("function", self.function, x, c)
        if any(type(value).__name__ in ("JVPTracer", "LinearizeTracer") for value in found.held):
            raise TypeError(
                "function closes over a value that is being differentiated, and a JaxSystem has derivatives for states "
                "and controls only: make the value a part of the state or of the control"
            )
        if not isinstance(found.out, jax.ShapeDtypeStruct):
            raise TypeError(f"function must return an array, got {type(found.out).__name__}")
        check_result("function", found.out.shape, found.out.dtype, x.shape, x.dtype)
        program = _Step(found.program, found.held)
        if not found.held:  # what is traced around the function does not outlive this call
            self._traced[key] = program
        return program

    @functools.cached_property
    def _traced(self) -> dict[tuple, Any]:
        return {}

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(lambda program, x, c: program(x, c), static_argnums=0)

    @functools.cached_property
    def _compiled_vjp(self) -> Callable[..., Any]:
        def pull(program, x, c, adj_y, before):
            """Return both products, and for which rows something is wrong.

            That is: they are not finite though all that they are made from is; the step is not what it was `before`.
            """
            y, pull_back = jax.vjp(program, x, c)
            adjoints = pull_back(adj_y)
            healthy = jnp.isfinite(y).all(1) & jnp.isfinite(adj_y).all(1)
            bad = jnp.stack([~jnp.isfinite(adjoint).all(1) & healthy for adjoint in adjoints])
            if before is None:
                return *adjoints, bad, None
            size = jnp.max(jnp.abs(before), axis=1, keepdims=True, where=jnp.isfinite(before), initial=0.0)
            same = (y == before) | (jnp.isnan(y) & jnp.isnan(before))
            return *adjoints, bad, ~(same | (jnp.abs(y - before) <= ROUNDING * jnp.finfo(y.dtype).eps * size)).all(1)

        return jax.jit(pull, static_argnums=0)

    def _check_repeats(self, program: Any, inputs: list[jax.Array], before: np.ndarray) -> None:
        """Raise if the step is not what it was before; computed by the very program of the forward pass."""
        again = np.asarray(self._compiled(program, *inputs))
        differs = (again != before) & ~(np.isnan(again) & np.isnan(before))
        if differs.any():
            samples = np.flatnonzero(differs.any(axis=1)).tolist()
            raise NotRepeatable(repeated_message("function", float(np.abs(again - before)[differs].max()), samples))

    def _costs(self, states: Any, times: Sequence[int]) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(states, torch.Tensor):
            from warp_phys.interop.jax.from_torch import torch_costs  # noqa: PLC0415, the caller has imported torch already

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


@dataclass(frozen=True, eq=False)
class _Step:
    """A function as it was traced, of states and controls alone."""

    program: Program
    held: tuple

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return self.program(([x], self.held), c)


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
