"""The engine's kernels as calls of JAX's foreign function interface, on CPU and CUDA; made once per structure.

XLA owns all memory; its stream is Warp's current stream while a call runs. Physical parameters are rows of numbers,
one row per sample.
"""

import functools
import inspect
from typing import Any

import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import as_structs
from warp_phys.core.flow_gates import are_single
from warp_phys.systems.base import System

EAGER: dict[str, Any] = {"graph_mode": wp.JaxCallableGraphMode.NONE}
"""Calls stay out of JAX's CUDA graphs: a graph cannot hold the loading of a module, or a copy to the host."""


@functools.cache
def step_call(structure: Any, real: type) -> Any:
    """One step y = S(x, c; p): shapes (batch, D), (batch, K), (batch, P) to (batch, D)."""
    struct = structure.types(real).Parameters

    def step(x: wp.array2d[real], c: wp.array2d[real], p: wp.array2d[real], y: wp.array2d[real]):
        if structure.written_size < structure.state_size:
            y.zero_()
        kernel = kernels.step_kernel(structure, real)
        _launch(kernel, len(x), [x, c, as_structs(p, struct)], [y])

    return wp.jax_callable(step, num_outputs=1, **EAGER)


@functools.cache
def step_vjp_call(structure: Any, real: type) -> Any:
    """The step's vector-Jacobian product: x, c, p, adj_y to adj_x, adj_c, adj_p of each sample."""
    struct = structure.types(real).Parameters

    def step_vjp(
        x: wp.array2d[real],
        c: wp.array2d[real],
        p: wp.array2d[real],
        adj_y: wp.array2d[real],
        adj_x: wp.array2d[real],
        adj_c: wp.array2d[real],
        adj_p: wp.array2d[real],
    ):
        kernel = kernels.step_vjp_kernel(structure, real)
        inputs = [x, c, as_structs(p, struct), adj_y]
        _launch(kernel, len(x), inputs, [adj_x, adj_c, as_structs(adj_p, struct)])

    return wp.jax_callable(step_vjp, num_outputs=3, **EAGER)


@functools.cache
def trajectory_call(structure: Any, real: type) -> Any:
    """All steps under given controls: x0, controls, p, inputs to states (steps + 1, batch, D), see `fill`."""
    struct = structure.types(real).Parameters

    def trajectory(
        x0: wp.array2d[real],
        controls: wp.array3d[real],
        p: wp.array2d[real],
        given: wp.array3d[real],
        states: wp.array3d[real],
    ):
        fill(structure, states, x0, given)
        kernel = kernels.trajectory_kernel(structure, real)
        _launch(kernel, len(x0), [controls, as_structs(p, struct)], [states])

    return wp.jax_callable(trajectory, num_outputs=1, vmap_method="sequential", **EAGER)


@functools.cache
def sweep_call(structure: Any, real: type) -> Any:
    """The adjoints of all flows from the last step to the first, see `kernels.sweep_kernel`.

    Outputs: λ_0 (flows, batch, D), μ (flows, steps, batch, K), the physical parameters' adjoints
    (flows, steps, batch, P) and those of what is given (flows, steps, batch, E), or none of either if that array has no
    flows. A Jacobian of no steps stands for closed controller gates.
    """
    struct = structure.types(real).Parameters

    def sweep(
        states: wp.array3d[real],
        controls: wp.array3d[real],
        p: wp.array2d[real],
        jacobian: wp.array4d[real],
        adj_states: wp.array3d[real],
        adj_controls: wp.array3d[real],
        gates: wp.array3d[real],
        lam: wp.array3d[real],
        mu: wp.array4d[real],
        adj_p: wp.array4d[real],
        adj_given: wp.array4d[real],
    ):
        steps, batch, _ = controls.shape
        for f in range(len(gates)):
            wp.copy(lam[f], adj_states[steps])
        inputs = [states, controls, as_structs(p, struct), jacobian, adj_states, adj_controls, gates, 0, steps, lam]
        outputs = [mu, as_structs(adj_p, struct), adj_given]
        _launch(kernels.sweep_kernel(structure, real, are_single(gates)), (len(gates), batch), inputs, outputs)

    return wp.jax_callable(sweep, num_outputs=4, vmap_method="sequential", **EAGER)


@functools.cache
def cost_call(structure: Any, real: type) -> Any:
    """The pointwise cost at chosen times: states, times, p to costs (times, batch)."""
    struct = structure.types(real).Parameters

    def costs(
        states: wp.array3d[real],
        times: wp.array[int],
        p: wp.array2d[real],
        out: wp.array2d[real],
    ):
        _launch(kernels.cost_kernel(structure, real), out.shape, [states, times, as_structs(p, struct)], [out])

    return wp.jax_callable(costs, num_outputs=1, vmap_method="sequential", **EAGER)


@functools.cache
def cost_vjp_call(structure: Any, real: type) -> Any:
    """Its vector-Jacobian product: states, times, p, adj_costs to adj_states and adj_p (times, batch, P)."""
    struct = structure.types(real).Parameters

    def costs_vjp(
        states: wp.array3d[real],
        times: wp.array[int],
        p: wp.array2d[real],
        adj_costs: wp.array2d[real],
        adj_states: wp.array3d[real],
        adj_p: wp.array3d[real],
    ):
        adj_states.zero_()
        kernel = kernels.cost_vjp_kernel(structure, real)
        inputs = [states, times, as_structs(p, struct), adj_costs]
        _launch(kernel, adj_costs.shape, inputs, [adj_states, as_structs(adj_p, struct)])

    return wp.jax_callable(costs_vjp, num_outputs=2, vmap_method="sequential", **EAGER)


@functools.cache
def foreign_step_call(system: Any, real: type) -> Any:
    """The step of a `Simulator` that is no `System`: x, c to y."""

    def step(x: wp.array2d[real], c: wp.array2d[real], y: wp.array2d[real]):
        system.step(x, c, y)

    return wp.jax_callable(step, num_outputs=1, vmap_method="sequential", **EAGER)


def compares(system: Any) -> bool:
    """Whether a foreign system's `step_vjp` takes the next states that the forward pass found, to compare its own."""
    return not isinstance(system, System) and "y" in inspect.signature(system.step_vjp).parameters


@functools.cache
def foreign_step_vjp_call(system: Any, real: type, with_y: bool = False) -> Any:
    """Its vector-Jacobian product: x, c, adj_y, and y for one that compares, to adj_x, adj_c."""

    def step_vjp(
        x: wp.array2d[real],
        c: wp.array2d[real],
        adj_y: wp.array2d[real],
        adj_x: wp.array2d[real],
        adj_c: wp.array2d[real],
    ):
        system.step_vjp(x, c, adj_y, adj_x, adj_c)

    def comparing_step_vjp(
        x: wp.array2d[real],
        c: wp.array2d[real],
        adj_y: wp.array2d[real],
        y: wp.array2d[real],
        adj_x: wp.array2d[real],
        adj_c: wp.array2d[real],
    ):
        system.step_vjp(x, c, adj_y, adj_x, adj_c, y=y)

    function = comparing_step_vjp if with_y else step_vjp
    return wp.jax_callable(function, num_outputs=2, vmap_method="sequential", **EAGER)


def fill(structure: Any, states: wp.array, first: wp.array, given: wp.array) -> None:
    """Write what rows start from, and what is given at all steps, (steps, batch, E), none if rows hold nothing such."""
    written, steps = structure.written_size, len(states) - 1
    if written == structure.state_size:
        wp.copy(states[0], first)
        return
    wp.copy(states[0, :, :written], first)
    wp.copy(states[:steps, :, written:], given)
    states[steps].zero_()


def _launch(kernel: wp.Kernel, dim: Any, inputs: list, outputs: list) -> None:
    """Launch on the device of the first array; no tape of the caller's records it."""
    device = inputs[0].device
    wp.launch(kernel, dim=dim, inputs=inputs, outputs=outputs, device=device, record_tape=False)
