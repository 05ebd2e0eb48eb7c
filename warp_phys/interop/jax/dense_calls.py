"""Controllers with the physics, whole passes in one call of JAX's foreign function interface."""

import functools
from typing import Any

import warp as wp

from warp_phys.core.arrays import as_structs
from warp_phys.engine.layers import Dense, Workspace
from warp_phys.engine.phases import Seeds, Trajectory
from warp_phys.interop.jax.calls import EAGER, fill
from warp_phys.programs.network import Network
from warp_phys.programs.program import Program
from warp_phys.systems.base import System


class _Passes:
    """A program with memory of its own, to be overwritten by each call: JAX's calls into Warp come one at a time."""

    def __init__(self, program: Program, offsets: tuple[int, ...], real: type):
        self.network, self.offsets, self.workspace = Network(program, real), offsets, Workspace()

    def pack(self, weights: wp.array) -> Network:
        """Return the network with these weights."""
        self.network.pack(self.addresses(weights))
        return self.network

    def addresses(self, flat: wp.array) -> list[int]:
        """Return where the tensors that the program reads stand in a flat array."""
        return [0 if offset < 0 else flat.ptr + offset * flat.strides[-1] for offset in self.offsets]


@functools.cache
def _passes(program: Program, offsets: tuple[int, ...], real: type) -> _Passes:
    return _Passes(program, offsets, real)


@functools.cache
def unroll_call(structure: System, program: Program, offsets: tuple[int, ...], real: type) -> Any:
    """A whole forward pass on a CPU: x0, p, flat weights and inputs to states and controls, see `calls.fill`."""
    struct = structure.types(real).Parameters

    def unroll(
        x0: wp.array2d[real],
        p: wp.array2d[real],
        weights: wp.array[real],
        given: wp.array3d[real],
        states: wp.array3d[real],
        controls: wp.array3d[real],
    ):
        fill(structure, states, x0, given)
        network = _passes(program, offsets, real).pack(weights)
        network.unroll(structure, states, controls, as_structs(p, struct), keep=False)

    return wp.jax_callable(unroll, num_outputs=2, vmap_method="sequential", **EAGER)


@functools.cache
def sweep_call(structure: System, program: Program, offsets: tuple[int, ...], real: type) -> Any:
    """A whole backward pass of all flows, on a CPU: λ_0 (flows, batch, D), flat updates of the weights.

    And the adjoints of the physical parameters (flows, batch, P) and of what is given (flows, steps, batch, E), or none
    of either if that array has no flows.
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
        adj_given: wp.array4d[real],
    ):
        passes = _passes(program, offsets, real)
        trajectory, seeds = Trajectory(states, controls, as_structs(p, struct)), Seeds(adj_states, adj_controls)
        network = passes.pack(weights)
        wanted = [array if len(array) else None for array in (adj_p, adj_given)]
        packed = network.sweep(structure, trajectory, seeds, gates, lam, passes.workspace, *wanted)
        updates.zero_()
        network.unpack(packed, [passes.addresses(updates[f]) for f in range(len(gates))])

    return wp.jax_callable(sweep, num_outputs=4, vmap_method="sequential", **EAGER)


@functools.cache
def dense_unroll_call(structure: System, sizes: tuple[int, ...], activation: str, real: type) -> Any:
    """A whole forward pass of dense layers, on CUDA too: x0, p and flat weights to states and controls."""
    struct = structure.types(real).Parameters

    def unroll(
        x0: wp.array2d[real],
        p: wp.array2d[real],
        weights: wp.array[real],
        states: wp.array3d[real],
        controls: wp.array3d[real],
    ):
        dense, start = _dense(sizes, activation, real, str(x0.device)), 0
        for parameter in dense.parameters:
            wp.copy(parameter, weights[start : start + parameter.size].reshape(parameter.shape))
            start += parameter.size
        wp.copy(states[0], x0)
        dense.unroll(structure, states, controls, as_structs(p, struct))

    return wp.jax_callable(unroll, num_outputs=2, vmap_method="sequential", **EAGER)


@functools.cache
def _dense(sizes: tuple[int, ...], activation: str, real: type, device: str) -> Dense:
    return Dense(sizes, activation, device=device, dtype=real)
