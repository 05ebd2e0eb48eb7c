"""A dense network as a JAX function that the engine can also run itself on CUDA, physics and all."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_seed
from warp_phys.errors import check_choice, check_count, shown
from warp_phys.interop.jax.arrays import real_of
from warp_phys.interop.jax.dense_calls import dense_unroll_call
from warp_phys.interop.jax.program import WIDEST
from warp_phys.programs.activations import ACTIVATIONS
from warp_phys.systems.base import System

Params = list[tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class MLP:
    """Dense layers c = N(params, x), an activation after every layer but the last.

    As a controller of `rollout` with a `System` it is unrolled together with the physics in one kernel, on CUDA too.

    Args:
        sizes: Layer sizes from D to K, for instance (10, 100, 100, 1).
        activation: One of `warp_phys.programs.activations.ACTIVATIONS`.

    Raises:
        TypeError, ValueError: Sizes or a name that do not fit.

    >>> controller = MLP((6, 16, 1))
    >>> controller(controller.init(seed=0), jnp.zeros((8, 6))).shape
    (8, 1)
    """

    sizes: tuple[int, ...]
    activation: str = "tanh"

    def __post_init__(self):
        if not isinstance(self.sizes, Iterable):
            raise TypeError(f"sizes must be numbers of inputs, hidden units and outputs, got {shown(self.sizes)}")
        object.__setattr__(self, "sizes", tuple(check_count("sizes", size) for size in self.sizes))
        if len(self.sizes) < 2:
            raise ValueError(
                f"sizes must be those of the inputs, of hidden layers and of the outputs, got {self.sizes}"
            )
        check_choice("activation", self.activation, tuple(ACTIVATIONS))

    @property
    def state_size(self) -> int:
        """Number D of inputs."""
        return self.sizes[0]

    @property
    def control_size(self) -> int:
        """Number K of outputs."""
        return self.sizes[-1]

    def init(self, seed: int = 0, dtype: Any = np.float32) -> Params:
        """Return Glorot-uniform weights (out, in) and zero biases (out,), a pair per layer."""
        generator, params, dtype = np.random.default_rng(check_seed(seed)), [], numpy_type(real_type(dtype))
        for inputs, outputs in zip(self.sizes[:-1], self.sizes[1:], strict=True):
            bound = math.sqrt(6.0 / (inputs + outputs))
            weight = generator.uniform(-bound, bound, (outputs, inputs))
            params.append((jnp.asarray(weight, dtype), jnp.zeros(outputs, dtype)))
        return params

    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        """Return the controls (batch, K) for states (batch, D)."""
        self.check_params(params)
        for weight, bias in params[:-1]:
            x = getattr(jax.nn, self.activation)(x @ weight.T + bias)
        weight, bias = params[-1]
        return x @ weight.T + bias

    def check_params(self, params: Params) -> None:
        """Raise a ValueError if weights and biases do not have the shapes that the sizes say."""
        expected = [((m, n), (m,)) for n, m in zip(self.sizes[:-1], self.sizes[1:], strict=True)]
        got = [tuple(jnp.shape(array) for array in layer) for layer in params]
        if got != expected:
            raise ValueError(f"params must have shapes {expected} for sizes {self.sizes}, got {got}")

    def fits(self, system: Any) -> bool:
        """Whether the engine can run whole passes with this system."""
        return isinstance(system, System) and max(self.sizes) <= WIDEST

    def unroll(self, system: System, inputs: Any, x0: jax.Array, rows: jax.Array, steps: int) -> tuple:
        """Return states and controls of a rollout, from one call of the engine, on any device."""
        dims = {"states": (steps + 1, *x0.shape), "controls": (steps, len(x0), self.control_size)}
        call = dense_unroll_call(system.structure, self.sizes, self.activation, real_of(x0))
        return tuple(call(x0, rows, jnp.concatenate([leaf.reshape(-1) for leaf in inputs[0]]), output_dims=dims))
