"""Dense controllers with the physics, whole passes in one call of JAX's foreign function interface."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import warp as wp

from warp_phys.core.arrays import as_structs
from warp_phys.engine.layers import Dense, Workspace
from warp_phys.engine.phases import Seeds, Trajectory
from warp_phys.interop.jax.calls import EAGER
from warp_phys.systems.base import System


class _Layers:
    """Layers with weights of their own, to be overwritten by each call: JAX's calls into Warp come one at a time."""

    def __init__(self, sizes: tuple[int, ...], activation: str, real: type, device: str):
        self.dense = Dense(sizes, activation, device=device, dtype=real)
        self.workspace = Workspace()

    def load(self, weights: wp.array) -> Dense:
        """Return the layers with these weights."""
        for parameter, part in self._parts(self.dense.parameters, weights):
            wp.copy(parameter, part)
        return self.dense

    def store(self, gradients: Sequence[wp.array], out: wp.array) -> None:
        """Write gradients to a flat array."""
        for gradient, part in self._parts(gradients, out):
            wp.copy(part, gradient)

    @staticmethod
    def _parts(arrays: Sequence[wp.array], flat: wp.array) -> Iterator[tuple[wp.array, wp.array]]:
        start = 0
        for array in arrays:
            yield array, flat[start : start + array.size].reshape(array.shape)
            start += array.size


@functools.cache
def _layers(sizes: tuple[int, ...], activation: str, real: type, device: str) -> _Layers:
    return _Layers(sizes, activation, real, device)


@functools.cache
def unroll_call(structure: System, sizes: tuple[int, ...], activation: str, real: type) -> Any:
    """A whole forward pass: x0, p and flat weights to states and controls."""
    struct = structure.types(real).Parameters

    def unroll(
        x0: wp.array2d[real],
        p: wp.array2d[real],
        weights: wp.array[real],
        states: wp.array3d[real],
        controls: wp.array3d[real],
    ):
        dense = _layers(sizes, activation, real, str(x0.device)).load(weights)
        wp.copy(states[0], x0)
        dense.unroll(structure, states, controls, as_structs(p, struct))

    return wp.jax_callable(unroll, num_outputs=2, vmap_method="sequential", **EAGER)


@functools.cache
def sweep_call(structure: System, sizes: tuple[int, ...], activation: str, real: type) -> Any:
    """A whole backward pass of all flows, on a CPU: λ_0 (flows, batch, D), flat updates of the weights.

    And the physical parameters' adjoints (flows, batch, P), or none of them if that array has no flows.
    """
    struct = structure.types(real).Parameters

    def sweep(
        states: wp.array3d[real],
        controls: wp.array3d[real],
        p: wp.array2d[real],
        weights: wp.array[real],
        adj_states: wp.array3d[real],
        adj_controls: wp.array3d[real],
        gates: wp.array3d[real],
        lam: wp.array3d[real],
        updates: wp.array2d[real],
        adj_p: wp.array3d[real],
    ):
        layers = _layers(sizes, activation, real, str(states.device))
        dense, workspace = layers.load(weights), layers.workspace
        gradients = [dense.gradients(workspace, f"gradient of flow {f}, ") for f in range(len(gates))]
        trajectory = Trajectory(states, controls, as_structs(p, struct))
        seeds, wanted = Seeds(adj_states, adj_controls), adj_p if len(adj_p) else None
        dense.sweep(structure, trajectory, seeds, gates, lam, gradients, workspace, wanted)
        for f, gradient in enumerate(gradients):
            layers.store(gradient, updates[f])

    return wp.jax_callable(sweep, num_outputs=3, vmap_method="sequential", **EAGER)
