"""The bridge to JAX: rollouts whose reverse-mode derivative is a flow of one's choice, under `jit`, inside `grad`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from warp_phys.core.arrays import shape_message
from warp_phys.core.checks import check_instance
from warp_phys.engine.phases import flow_gates
from warp_phys.errors import Diverged, check_choice, check_count
from warp_phys.flow import Combined, Flow, FlowLike, combine, linear_parts, refuse_memory, resolve
from warp_phys.interop.jax import calls
from warp_phys.interop.jax.arrays import (
    check_rows,
    is_traced,
    key_of,
    real_of,
    rows_of_parameters,
    shared_columns,
)
from warp_phys.interop.jax.mlp import MLP
from warp_phys.interop.jax.program import Fused, read_and_check
from warp_phys.interop.jax.stepping import check_function, step_pull, step_rows
from warp_phys.interop.jax.trace import Program, trace
from warp_phys.rollout import BACKENDS, Backend, check_sizes
from warp_phys.systems.base import Simulator, System


def rollout(
    system: Simulator,
    controller: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x0: Any,
    steps: int,
    flow: FlowLike = "combined",
    parameters: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Return states (steps + 1, batch, D) and controls (steps, batch, K) of x_{n+1} = S(x_n, N(params, x_n)).

    What `jax.grad` finds for `params` is the flow's update, for x0 and physical parameters the flow's adjoints. Of a
    combined flow the sums over time and batch are compared, those of this call. Works under `jit`, `vmap` and inside
    `grad` and `vjp`; forward-mode and second derivatives are refused by JAX.

    Args:
        system: A `System`, a `JaxSystem`, or anything with `step` and `step_vjp` (see `Simulator`).
        controller: A JAX function of (params, states (batch, D)) to controls (batch, K), from its arguments alone. It
            is traced in each call of `rollout`, and what is traced runs in both passes; define it once, so that what
            is compiled is found again. One that couples rows, or has a backward pass of its own (`jax.custom_vjp`), is
            pulled step by step, which takes longer.
        params: What the controller is made of, any pytree.
        x0: Initial states, shape (batch, D), float32, or float64 if JAX is set to use it.
        steps: Number of time steps T.
        flow: A name, a letter, a `Flow` or a `Combined`.
        parameters: Physical parameters by name, a number or one per sample each, differentiable.
        backend: "fused" (whole passes in one call of the engine, on a CPU: the controller is read as a row program,
            its code compiled at first sight), "general" (`lax.scan` and JAX's own derivatives) or "auto": fused where
            that is possible, on CUDA the forward pass of an `MLP`. `why_general` says why it is not.

    Raises:
        TypeError, ValueError: Arguments that do not fit; the message names the argument, what came, what is expected.
            The backend "fused" for a controller that is no row program.
            A combined flow of weights and x0 together, or of a part of a batch on a named axis, when it is
            differentiated: it would be no combination of the whole.
        NotRepeatable: The controller is another function when it is traced again.
        Diverged: A state is not finite. Under `jit` and inside `grad` numbers are not known: see `check_finite`.
    """
    if not callable(controller):
        hint = ": hand its apply" if hasattr(controller, "apply") else ""
        raise TypeError(f"controller must be a function of (params, states), got {type(controller).__name__}{hint}")
    check_sizes(system, controller)
    check_choice("backend", backend, BACKENDS)
    flow, steps = resolve(flow), check_count("steps", steps)
    refuse_memory(flow)
    x0 = check_rows("x0", x0, system)
    rows = rows_of_parameters(system, parameters, x0)
    flow_gates(linear_parts(flow), steps)  # raises if gates are given for another number of steps
    program, inputs = _traced(system, controller, params, x0)
    fused = _fused(system, program) if backend != "general" else "the backend is 'general'"
    if backend == "fused" and isinstance(fused, str):
        raise ValueError(f"backend 'fused' cannot run this controller: {fused}; use 'general' or 'auto'")
    dense = controller if isinstance(controller, MLP) and backend != "general" and controller.fits(system) else None
    spec = _Spec(
        key_of(system), program, steps, flow, bool(parameters), shared_columns(system, parameters), _named_axes(),
        None if isinstance(fused, str) else fused, dense,
    )  # fmt: skip
    states, controls = _unroll(spec, inputs, x0, rows)
    return check_finite(states), controls


def why_general(
    system: Simulator, controller: Callable[[Any, jax.Array], jax.Array], params: Any, x0: Any
) -> str | None:
    """Return in one sentence why `rollout` runs a controller by the general backend; None if both passes are fused.

    Args:
        system: As for `rollout`.
        controller: Likewise.
        params: Likewise; their numbers do not count.
        x0: Likewise.

    Raises:
        TypeError, ValueError, NotRepeatable: As `rollout`.
    """
    fused = _fused(system, _traced(system, controller, params, check_rows("x0", x0, system))[0])
    return fused if isinstance(fused, str) else None


def trajectory(
    system: System,
    x0: Any,
    controls: Any,
    flow: FlowLike = "regular",
    parameters: Mapping[str, Any] | None = None,
) -> jax.Array:
    """Return the states (steps + 1, batch, D) under given controls: an open loop, in one call of the engine.

    Differentiable with respect to x0, controls and physical parameters. Without a controller the flow's physics gate
    is all that counts, so "regular" and "modified" are the same.

    Args:
        system: A `System`.
        x0: Initial states, shape (batch, D).
        controls: Shape (steps, batch, K).
        flow: A name, a letter, a `Flow` or a `Combined`.
        parameters: Physical parameters by name, a number or one per sample each.

    Raises:
        TypeError, ValueError: Arguments that do not fit; as for `rollout`, a combined flow of x0 and controls together
            or on a named axis, when it is differentiated, if its two flows differ in an open loop.
        Diverged: As for `rollout`.
    """
    check_instance("system", system)
    if not isinstance(system, System):
        raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}: scan over step instead")
    x0, controls = check_rows("x0", x0, system), jnp.asarray(controls)
    if controls.ndim != 3 or controls.shape[1:] != (len(x0), system.control_size) or len(controls) == 0:
        expected = ("steps", len(x0), system.control_size)
        raise ValueError(shape_message("controls", expected, controls.shape, ", ".join(system.controls)))
    if controls.dtype != x0.dtype:
        raise TypeError(f"controls must hold {x0.dtype} as x0 does, got {controls.dtype}")
    flow = resolve(flow)
    refuse_memory(flow)
    flow_gates(linear_parts(flow), len(controls))
    shared = shared_columns(system, parameters)
    spec = _Spec(key_of(system), None, len(controls), flow, bool(parameters), shared, _named_axes())
    return check_finite(_open_loop(spec, x0, controls, rows_of_parameters(system, parameters, x0)))


def check_finite(states: jax.Array) -> jax.Array:
    """Return the states of a trajectory, or raise `Diverged` if one is not finite.

    Inside `jit` and `grad` there are no numbers yet and nothing is checked: what diverges is not finite in the
    results. Return the states from there and call this function on them, or set `jax_debug_nans`.

    Raises:
        Diverged: The first step, and the samples.
    """
    if is_traced(states):
        return states
    finite = np.isfinite(np.asarray(states)).all(axis=2)
    if not finite.all():
        raise Diverged(int(np.argmin(finite.all(axis=1))), np.flatnonzero(~finite.all(axis=0)).tolist())
    return states


class _Spec(NamedTuple):
    """What shapes a program: a key of JAX's caches."""

    system: Any
    controller: Any
    steps: int
    flow: Flow | Combined
    want_rows: bool
    """Whether the adjoints of the physical parameters may be wanted."""
    shared: tuple[bool, ...] = ()
    """Which physical parameters all samples share."""
    axes: tuple[str, ...] = ()
    """Named axes over which the call is mapped: the batch may be a part of a whole."""
    fused: Fused | None = None
    """The controller as a row program, for a CPU."""
    dense: MLP | None = None
    """The controller as dense layers, for other devices."""


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec: _Spec, params: Any, x0: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if spec.fused is None and spec.dense is None:
        return _scan(spec, params, x0, rows)

    def unroll(passes):
        if passes is None:
            return functools.partial(_scan, spec)
        return lambda params, x0, rows: passes.unroll(spec.system, params, x0, rows, spec.steps)

    return jax.lax.platform_dependent(params, x0, rows, cpu=unroll(spec.fused), default=unroll(spec.dense))


def _scan(spec: _Spec, params: Any, x0: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    def advance(x, _):
        c = spec.controller(params, x)
        y = step_rows(spec.system, x, c, rows)
        return y, (y, c)

    _, (states, controls) = jax.lax.scan(advance, x0, None, length=spec.steps)
    return jnp.concatenate([x0[None], states]), controls


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unroll(spec: _Spec, params: Any, x0: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    return _forward(spec, params, x0, rows)


def _unroll_forward(spec, *arguments):
    _refuse_parts(spec, "rollout", *map(_is_differentiated, arguments))
    params, x0, rows = _values(arguments)
    states, controls = _forward(spec, params, x0, rows)
    return (states, controls), (params, states, controls, rows)


def _unroll_backward(spec: _Spec, residuals: tuple, seeds: tuple) -> tuple:
    return _pull(spec, residuals, tuple(map(_dense, seeds)))


@functools.partial(jax.jit, static_argnums=0)
def _pull(spec: _Spec, residuals: tuple, seeds: tuple) -> tuple:
    rows = residuals[-1]
    gates = flow_gates(linear_parts(spec.flow), spec.steps)
    phases = functools.partial(_phases, spec, gates)
    if spec.fused:
        fused = functools.partial(_fused_phases, spec, gates)
        updates, lam, adj_rows = jax.lax.platform_dependent(residuals, seeds, cpu=fused, default=phases)
    else:
        updates, lam, adj_rows = phases(residuals, seeds)
    adj_rows = None if rows is None else jnp.zeros_like(rows) if adj_rows is None else _combine_rows(spec, adj_rows)
    update = jax.tree.map(lambda *parts: _combine(spec.flow, parts), *updates)
    return update, _combine(spec.flow, lam), adj_rows


def _phases(spec: _Spec, gates: np.ndarray, residuals: tuple, seeds: tuple) -> tuple:
    """Linearise, sweep, contract: the flows' updates of params, λ_0, and the adjoints of physical parameters."""
    params, states, controls, rows = residuals
    feeds_back, program = gates[:, :, 1].any(), spec.controller
    if program.has_own_rules or (feeds_back and program.couples_rows):
        return _walk(spec, gates, residuals, seeds, contract=True)
    over_time = jax.vmap(program, in_axes=(None, 0))
    if isinstance(spec.system, System):
        jacobian = _jacobian(lambda x: over_time(params, x), states[:-1], controls) if feeds_back else None
        lam, mu, adj_rows = _sweep(spec, states, controls, rows, jacobian, seeds, gates)
    else:
        mu, lam, adj_rows = _walk(spec, gates, residuals, seeds)
    pull = jax.vjp(lambda p: over_time(p, states[:-1]), params)[1]
    return [pull(mu[f])[0] for f in range(len(gates))], lam, adj_rows


def _fused_phases(spec: _Spec, gates: np.ndarray, residuals: tuple, seeds: tuple) -> tuple:
    """Do the same in one call of the engine."""
    params, states, controls, rows = residuals
    assert spec.fused is not None
    on_device = jnp.asarray(gates, states.dtype)
    return spec.fused.sweep(spec.system, params, (states, controls), rows, seeds, on_device, spec.want_rows)


_unroll.defvjp(_unroll_forward, _unroll_backward, symbolic_zeros=True)


def _combine(flow: Flow | Combined, parts: Any) -> jax.Array:
    """Return a flow's own update from those of its linear parts."""
    return parts[0] if parts[0].dtype == jax.dtypes.float0 else combine(flow, parts)  # integers have no derivative


def _combine_rows(spec: _Spec, parts: jax.Array) -> jax.Array:
    """Return a flow's own adjoints of physical parameters, shape (batch, parameters).

    What all samples share is summed before the comparison, and handed out in equal parts: JAX adds them up again.
    """
    own, total = _combine(spec.flow, parts), _combine(spec.flow, parts.sum(axis=1))
    return jnp.where(jnp.asarray(spec.shared), total / len(own), own)


def _jacobian(controller: Callable, states: jax.Array, controls: jax.Array) -> jax.Array:
    """Return ∂N/∂x at all rows, shape (steps, batch, K, D): one backward pass per control component."""
    pull = jax.vjp(controller, states)[1]
    units = jnp.eye(controls.shape[2], dtype=controls.dtype)
    seeds = jnp.broadcast_to(units[:, None, None, :], (len(units), *controls.shape))
    return jnp.moveaxis(jax.vmap(pull)(seeds)[0], 0, 2)


def _sweep(spec, states, controls, rows, jacobian, seeds, gates):
    """Phase 2 in one launch for all flows; see `calls.sweep_call`."""
    steps, batch, size = controls.shape
    flows, real = len(gates), real_of(states)
    if jacobian is None:
        jacobian = jnp.zeros((0, batch, size, states.shape[2]), states.dtype)
    dims = {
        "lam": (flows, batch, states.shape[2]),
        "mu": (flows, steps, batch, size),
        "adj_p": (flows if spec.want_rows else 0, steps, batch, rows.shape[1]),
    }
    inputs = [states, controls, rows, jacobian, *seeds, jnp.asarray(gates, states.dtype)]
    lam, mu, adj_p = calls.sweep_call(spec.system.structure, real)(*inputs, output_dims=dims)
    return lam, mu, adj_p.sum(axis=1) if spec.want_rows else None


def _walk(spec: _Spec, gates: np.ndarray, residuals: tuple, seeds: tuple, contract: bool = False) -> tuple:
    """Phase 2 step by step: each step pulls the adjoint itself through the simulator, and the controller, of all rows.

    Returns:
        μ (flows, steps, batch, K), or with `contract` the flows' updates of params; λ_0 (flows, batch, D); the physical
        parameters' adjoints (flows, batch, P), or None. With `contract` states and params are pulled at once.
    """
    params, states, controls, rows = residuals
    flows = range(len(gates))

    def retreat(carry, at):
        lam, updates, adj_rows = carry
        x, c, y, adj_x, adj_c, own = at
        pull = (
            jax.vjp(spec.controller, params, x)[1] if contract else jax.vjp(lambda x: spec.controller(params, x), x)[1]
        )
        back, mus, parts, of_rows = [], [], [], []
        for f in flows:
            dx, dc, dp = step_pull(spec.system, x, c, rows, lam[f], y)
            mu = adj_c + dc
            total = adj_x + _gated(own[f, 0], dx)
            if contract or gates[f, :, 1].any():
                *update, pulled = pull(mu)
                total += _gated(own[f, 1], pulled)
                parts.append(_of_real_numbers(update))
            back.append(total)
            mus.append(mu)
            of_rows.append(dp)
        lam = jnp.stack(back)
        if contract:
            updates = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(updates, parts, strict=True)]
        adj_rows = None if adj_rows is None else adj_rows + jnp.stack(of_rows)
        return (lam, updates, adj_rows), None if contract else jnp.stack(mus)

    own = jnp.asarray(np.swapaxes(gates, 0, 1), states.dtype)
    last = jnp.broadcast_to(seeds[0][-1], (len(gates), *states.shape[1:]))
    zeros = [[jnp.zeros_like(leaf) for leaf in jax.tree.leaves(params) if _is_real(leaf)] for _ in flows if contract]
    adj_rows = jnp.zeros((len(gates), *rows.shape), rows.dtype) if spec.want_rows else None
    steps = (states[:-1], controls, states[1:], seeds[0][:-1], seeds[1], own)
    (lam, updates, adj_rows), mu = jax.lax.scan(retreat, (last, zeros, adj_rows), steps, reverse=True)
    if contract:
        return [_like(params, update) for update in updates], lam, adj_rows
    return jnp.swapaxes(mu, 0, 1), lam, adj_rows


def _is_real(leaf: Any) -> bool:
    """Whether a number has a derivative."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _of_real_numbers(cotangents: Any) -> list[jax.Array]:
    """Return the cotangents of what has a derivative."""
    return [leaf for leaf in jax.tree.leaves(cotangents) if leaf.dtype != jax.dtypes.float0]


def _like(params: Any, update: list[jax.Array]) -> Any:
    """Return an update of what has a derivative in the structure of `params`."""
    rest = iter(update)
    return jax.tree.map(
        lambda leaf: next(rest) if _is_real(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0), params
    )


def _gated(gate: jax.Array, value: jax.Array) -> jax.Array:
    """Return the product; a gate of zero is a cut: what lies behind it may be infinite."""
    return jnp.where(gate == 0.0, 0.0, gate * value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _open_loop(spec: _Spec, x0: jax.Array, controls: jax.Array, rows: jax.Array) -> jax.Array:
    call = calls.trajectory_call(spec.system.structure, real_of(x0))
    return call(x0, controls, rows, output_dims=(spec.steps + 1, *x0.shape))[0]


def _open_loop_forward(spec, *arguments):
    if len({part.gates(spec.steps)[:, 0].tobytes() for part in linear_parts(spec.flow)}) > 1:
        given = [_is_differentiated(argument) for argument in arguments]
        _refuse_parts(spec, "trajectory", given[1], given[0], given[2])
    x0, controls, rows = _values(arguments)
    states = _open_loop(spec, x0, controls, rows)
    return states, (states, controls, rows)


def _open_loop_backward(spec, residuals, adj_states):
    return _open_loop_pull(spec, residuals, _dense(adj_states))


@functools.partial(jax.jit, static_argnums=0)
def _open_loop_pull(spec, residuals, adj_states):
    states, controls, rows = residuals
    gates = flow_gates(linear_parts(spec.flow), spec.steps)
    seeds = adj_states, jnp.zeros_like(controls)
    lam, mu, adj_rows = _sweep(spec, states, controls, rows, None, seeds, gates)
    adj_rows = jnp.zeros_like(rows) if adj_rows is None else _combine_rows(spec, adj_rows)
    return _combine(spec.flow, lam), _combine(spec.flow, mu), adj_rows


_open_loop.defvjp(_open_loop_forward, _open_loop_backward, symbolic_zeros=True)


def _is_differentiated(argument: Any) -> bool:
    """Whether derivatives are asked for: what an argument of a rule with symbolic zeros says."""
    return any(leaf.perturbed for leaf in jax.tree.leaves(argument))


def _values(arguments: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, arguments)


def _dense(seed: Any) -> jax.Array:
    """Return an adjoint that may be known to be zero as an array."""
    is_zero = isinstance(seed, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros(seed.shape, seed.dtype) if is_zero else seed


def _named_axes() -> tuple[str, ...]:
    """Return the names that a caller gave to axes over which this call is mapped, those of more than one entry."""
    names = [name for name in jex.unsafe_get_axis_names_DO_NOT_USE() if not str(name).startswith("_")]
    return tuple(str(name) for name in names if jax.lax.axis_size(name) > 1)


def _refuse_parts(spec: _Spec, call: str, controls: bool, x0: bool, rows: bool) -> None:
    """Raise a ValueError where a combined flow of parts would pass for that of the whole.

    Args:
        spec: The call.
        call: Its name.
        controls: Whether params or controls are differentiated.
        x0: Whether x0 is.
        rows: Whether physical parameters are.
    """
    flow = spec.flow
    if not isinstance(flow, Combined):
        return
    rule, given = getattr(flow.rule, "__name__", "rule"), "params" if call == "rollout" else "controls"
    advice = f"differentiate by {flow.base.name!r} and by {flow.other.name!r} in two calls"
    if controls and x0:
        raise ValueError(
            f"x0 and {given} cannot be differentiated together by the flow {flow.name!r}, which is not linear: where "
            "x0 comes from an earlier rollout or from an encoder, that would be combined twice. Stop it with "
            "jax.lax.stop_gradient(x0), or take one rollout over the whole horizon, or "
            f"{advice} and give the results to {rule}"
        )
    if spec.axes and (controls or x0 or rows):
        raise ValueError(
            f"{call} is mapped over the named axis {', '.join(spec.axes)}, and the flow {flow.name!r} is not linear: "
            f"each part of a batch would be combined by itself. Instead {advice}, take jax.lax.pmean of both "
            f"results, and give the means to {rule}"
        )


def _traced(system: Any, controller: Callable, params: Any, x0: jax.Array) -> tuple[Any, Any]:
    """Return what runs as the controller in all passes, and its first argument.

    Raises:
        TypeError, ValueError: It returns something else than controls, or cannot be traced.
        NotRepeatable: See `trace`.
    """
    try:
        hash(controller)
    except TypeError:
        raise TypeError("controller must be hashable, it is a key of compiled programs: use a plain function") from None
    size = system.control_size
    found = trace("controller", controller, params, x0)
    out = found.out
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(f"controller must return an array, got {type(out).__name__}")
    if out.shape != (len(x0), size):
        raise ValueError(shape_message("what controller returns", (len(x0), size), out.shape))
    if out.dtype != x0.dtype:
        raise TypeError(f"controller must return {x0.dtype} as x0 holds, got {out.dtype}")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)} if isinstance(controller, MLP) else set()
    if kinds - {str(x0.dtype)}:
        raise TypeError(f"params of an MLP must hold {x0.dtype} as x0 does, got {', '.join(sorted(kinds))}")
    check_function(system, x0)
    return found.program, (jax.tree.leaves(params), found.held)


def _fused(system: Any, program: Program) -> Fused | str:
    """Return a controller as a row program, or why it is none."""
    device = getattr(jax.config, "jax_default_device", None)  # its own types do not know it
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform != "cpu":
        return f"JAX runs on {platform}, where one kernel does no more than the forward pass of an MLP"
    return read_and_check(program, system)
