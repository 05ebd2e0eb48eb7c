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
from warp_phys.engine.phases import all_gates, open_gates
from warp_phys.errors import Diverged, check_choice, check_count
from warp_phys.flow import (
    Combined,
    Flow,
    FlowLike,
    combine,
    linear_parts,
    refuse_memory,
    refuse_whole,
    resolve,
    resolve_open_loop,
)
from warp_phys.interop.jax import calls
from warp_phys.interop.jax.arrays import (
    as_jax_array,
    check_rows,
    is_traced,
    key_of,
    real_of,
    rows_of_parameters,
    shared_columns,
)
from warp_phys.interop.jax.gates import meeting
from warp_phys.interop.jax.mlp import MLP
from warp_phys.interop.jax.program import Fused, read_and_check
from warp_phys.interop.jax.rows import (
    RowController,
    check_inputs,
    check_memory,
    first_rows,
    for_all,
    given_dims,
    rows_of,
    with_given,
    written_size,
)
from warp_phys.interop.jax.stepping import check_function, step_pull, step_rows
from warp_phys.interop.jax.trace import Program, check_call, trace
from warp_phys.rollout import BACKENDS, Backend, check_sizes
from warp_phys.systems.base import Simulator, System


def rollout(
    system: Simulator,
    controller: Callable[..., Any],
    params: Any,
    x0: Any,
    steps: int,
    flow: FlowLike = "combined",
    parameters: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    inputs: Any = None,
    memory: Any = None,
) -> tuple[jax.Array, ...]:
    """Return states (steps + 1, batch, D) and controls (steps, batch, K) of x_{n+1} = S(x_n, N(params, x_n)).

    With a memory, also what is remembered, (steps + 1, batch, H): its last entry, stopped or not, is where the next
    rollout goes on.

    What `jax.grad` finds for `params` is the flow's update, for x0, physical parameters, inputs and memory the flow's
    adjoints. Of a combined flow the sums over time and batch are compared, those of this call. Works under `jit`,
    `vmap` and inside `grad` and `vjp`; forward-mode and second derivatives are refused by JAX.

    Args:
        system: A `System`, a `JaxSystem`, or anything with `step` and `step_vjp` (see `Simulator`).
        controller: A JAX function of (params, states (batch, D)) to controls (batch, K), from its arguments alone. It
            is traced in each call of `rollout`, and what is traced runs in both passes; define it once, so that what
            is compiled is found again. One that couples rows, or has a backward pass of its own (`jax.custom_vjp`), is
            pulled step by step, which takes longer. With inputs it is called with (params, x, w), with a memory with
            (params, x, h), with both with (params, x, w, h); one with a memory returns (c, h').
        params: What the controller is made of, any pytree.
        x0: Initial states, shape (batch, D), float32, or float64 if JAX is set to use it.
        steps: Number of time steps T.
        flow: A name, a letter, a `Flow` or a `Combined`.
        parameters: Physical parameters by name, a number or one per sample each, differentiable.
        backend: "fused" (whole passes in one call of the engine, on a CPU: the controller is read as a row program,
            its code compiled at first sight), "general" (`lax.scan` and JAX's own derivatives) or "auto": fused where
            that is possible, on CUDA the forward pass of an `MLP`. `why_general` says why it is not.
        inputs: What controller and system are given at every step besides the state (a reference, a command, noise, a
            clock): shape (steps, E), (steps, 1, E) or (steps, batch, E). A system's own inputs come first; a controller
            that takes no inputs may leave them to it.
        memory: What the controller remembers at first, shape (batch, H).

    Raises:
        TypeError, ValueError: Arguments that do not fit; the message names the argument, what came, what is expected.
            The backend "fused" for a controller that is no row program.
            A combined flow of weights together with x0, inputs or memory, or of a part of a batch on a named axis, when
            it is differentiated: it would be no combination of the whole.
        NotRepeatable: The controller is another function when it is traced again.
        Diverged: A state is not finite. Under `jit` and inside `grad` numbers are not known: see `check_finite`.
    """
    check_choice("backend", backend, BACKENDS)
    flow, steps = resolve(flow), check_count("steps", steps)
    refuse_memory(flow)
    refuse_whole("in JAX it must be elementwise", flow)
    problem = _checked(system, controller, params, x0, steps, inputs, memory)
    inner, x0 = problem.system, problem.x0
    rows = rows_of_parameters(system, parameters, x0)
    all_gates(linear_parts(flow), steps, len(x0), inner)  # raises if gates are given for other numbers of steps, …
    fused = _fused(inner, problem.program) if backend != "general" else "the backend is 'general'"
    if backend == "fused" and isinstance(fused, str):
        raise ValueError(f"backend 'fused' cannot run this controller: {fused}; use 'general' or 'auto'")
    dense = controller if isinstance(controller, MLP) and backend != "general" and controller.fits(inner) else None
    spec = _Spec(
        key_of(inner), problem.program, steps, flow, bool(parameters), shared_columns(system, parameters),
        _named_axes(), None if isinstance(fused, str) else fused, dense,
    )  # fmt: skip
    states, controls = _unroll(spec, problem.leaves, problem.first, rows, problem.given)
    states = check_finite(states)
    if inner is system:
        return states, controls
    size, end = inner.own_size, inner.remembering_size
    own = states[:, :, :size], controls[:, :, : inner.own_controls]
    return own if memory is None else (*own, states[:, :, size:end])


def why_general(
    system: Simulator,
    controller: Callable[..., Any],
    params: Any,
    x0: Any,
    inputs: Any = None,
    memory: Any = None,
) -> str | None:
    """Return in one sentence why `rollout` runs a controller by the general backend; None if both passes are fused.

    Args:
        system: As for `rollout`.
        controller: Likewise.
        params: Likewise; their numbers do not count.
        x0: Likewise.
        inputs: Likewise.
        memory: Likewise.

    Raises:
        TypeError, ValueError, NotRepeatable: As `rollout`.
    """
    steps = 1 if inputs is None else (*jnp.shape(inputs), 1)[0]
    problem = _checked(system, controller, params, x0, steps, inputs, memory)
    fused = _fused(problem.system, problem.program)
    return fused if isinstance(fused, str) else None


def trajectory(
    system: System,
    x0: Any,
    controls: Any,
    flow: str | Flow = "regular",
    parameters: Mapping[str, Any] | None = None,
    inputs: Any = None,
) -> jax.Array:
    """Return the states (steps + 1, batch, D) under given controls: an open loop, in one call of the engine.

    Differentiable with respect to x0, controls, physical parameters and inputs, by one flow: of its gates those of the
    physics count, the others have no meaning without a controller. So "regular" and "modified" are the same, a
    `Flow(0.9)` decays, and there is nothing to be combined.

    Args:
        system: A `System`.
        x0: Initial states, shape (batch, D).
        controls: Shape (steps, batch, K).
        flow: A name, a letter or a `Flow`.
        parameters: Physical parameters by name, a number or one per sample each.
        inputs: What a system that has inputs is given, shape (steps, E), (steps, 1, E) or (steps, batch, E).

    Raises:
        TypeError, ValueError: Arguments that do not fit.
        Diverged: As for `rollout`.
    """
    check_instance("system", system)
    if not isinstance(system, System):
        raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}: scan over step instead")
    linear = resolve_open_loop(flow)
    x0, controls = check_rows("x0", x0, system), as_jax_array("controls", controls)
    if controls.ndim != 3 or controls.shape[1:] != (len(x0), system.control_size) or len(controls) == 0:
        expected = ("steps", len(x0), system.control_size)
        raise ValueError(shape_message("controls", expected, controls.shape, ", ".join(system.controls)))
    if controls.dtype != x0.dtype:
        raise TypeError(f"controls must hold {x0.dtype} as x0 does, got {controls.dtype}")
    if not is_traced(controls) and not np.isfinite(np.asarray(controls)).all():
        raise ValueError("controls must be finite")
    steps, rows = len(controls), rows_of_parameters(system, parameters, x0)
    given = None if inputs is None else check_inputs(inputs, x0, steps)
    if given is not None and given.shape[2] != system.input_size:
        raise ValueError(f"{type(system).__name__} has {system.input_size} inputs a step, got {given.shape[2]}")
    inner, _ = rows_of(system, None, 0, 0 if given is None else given.shape[2])
    all_gates([linear], steps, len(x0), inner)
    shared = shared_columns(system, parameters)
    spec = _Spec(key_of(inner), None, steps, linear, bool(parameters), shared)
    states = check_finite(_open_loop(spec, first_rows(inner, x0), controls, rows, given))
    return states if inner is system else states[:, :, : system.state_size]


def check_finite(states: jax.Array) -> jax.Array:
    """Return the states of a trajectory, or raise `Diverged` if one is not finite.

    Inside `jit` and `grad` there are no numbers yet and nothing is checked: what diverges is not finite in the
    results. Return the states from there and call this function on them, or set `jax_debug_nans`.

    Args:
        states: Shape (steps + 1, batch, D).

    Raises:
        TypeError, ValueError: Something else than such an array.
        Diverged: The first step, and the samples.
    """
    if is_traced(states):
        return states
    states = as_jax_array("states", states)
    if states.ndim != 3 or not jnp.issubdtype(states.dtype, jnp.floating):
        raise ValueError(f"states must have shape (steps + 1, batch, D), of floats, got {states.dtype}{states.shape}")
    finite = np.isfinite(np.asarray(states)).all(axis=2)
    if not finite.all():
        raise Diverged(int(np.argmin(finite.all(axis=1))), np.flatnonzero(~finite.all(axis=0)).tolist())
    return states


class _Problem(NamedTuple):
    """A rollout whose arguments have been found to fit."""

    system: Any
    """The system of the rows that the controller sees, see `rows`."""
    program: Program
    """The controller of these rows as it was traced."""
    leaves: tuple
    """Its first argument."""
    x0: jax.Array
    first: jax.Array
    """What the rows start from, without what is given."""
    given: jax.Array | None
    """What is given, shape (steps, 1 or batch, E)."""


def _checked(
    system: Any, controller: Callable[..., Any], params: Any, x0: Any, steps: int, inputs: Any, memory: Any
) -> _Problem:
    """Return a rollout as one of rows, or raise an error that says which argument does not fit, as `rollout` does."""
    if not callable(controller):
        hint = ": hand its apply" if hasattr(controller, "apply") else ""
        raise TypeError(f"controller must be a function of (params, states), got {type(controller).__name__}{hint}")
    is_beside = inputs is not None or memory is not None
    check_sizes(system, object() if is_beside else controller)
    x0 = check_rows("x0", x0, system)
    given = None if inputs is None else check_inputs(inputs, x0, steps)
    remembered = None if memory is None else check_memory(memory, x0)
    sizes = (0 if array is None else array.shape[-1] for array in (remembered, given))
    inner, of_rows = rows_of(system, controller, *sizes)
    first = first_rows(inner, x0, remembered)
    z = with_given(first, None if given is None else given[0])
    if isinstance(of_rows, RowController):
        seen = ", inputs" * of_rows.sees_inputs + ", memory" * (memory is not None)
        check_call("controller", controller, (params, *of_rows.parts(z)), f"(params, states{seen})")
    program, leaves = _traced(inner, of_rows, params, z)
    check_function(system, x0)
    return _Problem(inner, program, leaves, x0, first, given)


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
def _forward(
    spec: _Spec, params: Any, first: jax.Array, rows: jax.Array | None, given: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    arguments = (params, first, rows) if given is None else (params, first, rows, given)
    if spec.fused is None and spec.dense is None:
        return _scan(spec, *arguments)

    def unroll(passes):
        if passes is None:
            return functools.partial(_scan, spec)
        return lambda params, first, rows, *given: passes.unroll(spec.system, params, first, rows, spec.steps, *given)

    return jax.lax.platform_dependent(*arguments, cpu=unroll(spec.fused), default=unroll(spec.dense))


def _scan(
    spec: _Spec, params: Any, first: jax.Array, rows: jax.Array | None, given: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    def advance(written, w):
        x = with_given(written, w)
        c = spec.controller(params, x)
        y = step_rows(spec.system, x, c, rows)[:, : written.shape[1]]
        return y, (y, c)

    _, (states, controls) = jax.lax.scan(advance, first, given, length=spec.steps)
    states = jnp.concatenate([first[None], states])
    return with_given(states, None if given is None else jnp.pad(given, ((0, 1), (0, 0), (0, 0)))), controls


class _Kept(NamedTuple):
    """What a forward pass leaves for the backward pass: rows of states, and what they were computed from."""

    params: Any
    states: jax.Array
    controls: jax.Array
    rows: jax.Array | None
    given: jax.Array | None
    want_given: tuple | None
    """Whether an adjoint of what is given is asked for, known at once: an empty tuple, or None."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unroll(
    spec: _Spec, params: Any, first: jax.Array, rows: jax.Array | None, given: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return _forward(spec, params, first, rows, given)


def _unroll_forward(spec, *arguments):
    own, first, of_rows, of_given = map(_is_differentiated, arguments)
    _refuse_parts(spec, own, first, of_rows, of_given)
    params, first, rows, given = _values(arguments)
    states, controls = _forward(spec, params, first, rows, given)
    return (states, controls), _Kept(params, states, controls, rows, given, () if of_given else None)


def _unroll_backward(spec: _Spec, kept: _Kept, seeds: tuple) -> tuple:
    return _pull(spec, kept, tuple(map(_dense, seeds)))


@functools.partial(jax.jit, static_argnums=0)
def _pull(spec: _Spec, kept: _Kept, seeds: tuple) -> tuple:
    gates = _gates_of(spec, kept.states)
    phases = functools.partial(_phases, spec, gates)
    if spec.fused:
        fused = functools.partial(_fused_phases, spec, gates)
        found = jax.lax.platform_dependent(kept, seeds, cpu=fused, default=phases)
    else:
        found = phases(kept, seeds)
    updates, *adjoints = found
    update = jax.tree.map(lambda *parts: _combine(spec.flow, parts), *updates)
    return update, *_own_adjoints(spec, kept.rows, kept.given, *adjoints)


def _own_adjoints(spec: _Spec, rows: Any, given: Any, lam: jax.Array, adj_rows: Any, adj_given: Any) -> tuple:
    """Return a flow's own adjoints of what a trajectory starts from, of physical parameters, and of what is given.

    Args:
        spec: The call.
        rows: Physical parameters, or None.
        given: What is given, or None.
        lam: λ_0 of all rows, shape (flows, batch, D).
        adj_rows: Adjoints of physical parameters (flows, batch, P), or None.
        adj_given: Adjoints of what is given (flows, steps, batch, E), or None.
    """
    if rows is not None:
        adj_rows = jnp.zeros_like(rows) if adj_rows is None else _combine_rows(spec, adj_rows)
    if given is not None and adj_given is None:
        adj_given = jnp.zeros_like(given)
    elif given is not None:
        if given.shape[1] != adj_given.shape[2]:
            adj_given = adj_given.sum(axis=2, keepdims=True)
        adj_given = _combine(spec.flow, adj_given)
    return _combine(spec.flow, lam[:, :, : written_size(spec.system)]), adj_rows, adj_given


def _gates_of(spec: _Spec, states: jax.Array) -> np.ndarray:
    return all_gates(linear_parts(spec.flow), spec.steps, states.shape[1], spec.system)


def _phases(spec: _Spec, gates: np.ndarray, kept: _Kept, seeds: tuple) -> tuple:
    """Linearise, sweep, contract.

    Returns:
        The flows' updates of params, λ_0, and the adjoints of physical parameters and of what is given.
    """
    params, states, controls, *_ = kept
    program = spec.controller
    feeds_back = open_gates(gates, spec.system, kept.want_given is not None).any()
    if program.has_own_rules or (feeds_back and program.couples_rows):
        return _walk(spec, gates, kept, seeds, contract=True)
    over_time = jax.vmap(program, in_axes=(None, 0))
    if isinstance(spec.system, System):
        jacobian = _jacobian(lambda x: over_time(params, x), states[:-1], controls) if feeds_back else None
        mu, *adjoints = _sweep(spec, kept, jacobian, seeds, gates)
    else:
        mu, *adjoints = _walk(spec, gates, kept, seeds)
    pull = jax.vjp(lambda p: over_time(p, states[:-1]), params)[1]
    return [pull(mu[f])[0] for f in range(len(gates))], *adjoints


def _fused_phases(spec: _Spec, gates: np.ndarray, kept: _Kept, seeds: tuple) -> tuple:
    """Do the same in one call of the engine."""
    assert spec.fused is not None and kept.rows is not None
    trajectory, on_device = (kept.states, kept.controls), jnp.asarray(gates, kept.states.dtype)
    wanted = spec.want_rows, kept.want_given is not None
    return spec.fused.sweep(spec.system, kept.params, trajectory, kept.rows, seeds, on_device, *wanted)


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


def _sweep(spec: _Spec, kept: _Kept, jacobian: jax.Array | None, seeds: tuple, gates: np.ndarray) -> tuple:
    """Phase 2 in one launch for all flows; see `calls.sweep_call`.

    Returns:
        μ (flows, steps, batch, K), λ_0 (flows, batch, D), and the adjoints of physical parameters (flows, batch, P) and
        of what is given (flows, steps, batch, E), None if not wanted.
    """
    states, controls, rows = kept.states, kept.controls, kept.rows
    steps, batch, size = controls.shape
    flows, real, want_given = len(gates), real_of(states), kept.want_given is not None
    assert rows is not None
    if jacobian is None:
        jacobian = jnp.zeros((0, batch, size, states.shape[2]), states.dtype)
    dims = {
        "lam": (flows, batch, states.shape[2]),
        "mu": (flows, steps, batch, size),
        "adj_p": (flows if spec.want_rows else 0, steps, batch, rows.shape[1]),
        "adj_given": given_dims(spec.system, flows if want_given else 0, controls),
    }
    inputs = [states, controls, rows, jacobian, *seeds, jnp.asarray(gates, states.dtype)]
    lam, mu, adj_p, adj_given = calls.sweep_call(spec.system.structure, real)(*inputs, output_dims=dims)
    return mu, lam, adj_p.sum(axis=1) if spec.want_rows else None, adj_given if want_given else None


def _walk(spec: _Spec, gates: np.ndarray, kept: _Kept, seeds: tuple, contract: bool = False) -> tuple:
    """Phase 2 step by step: each step pulls the adjoint itself through the simulator, and the controller, of all rows.

    Returns:
        As `_sweep`; with `contract` the flows' updates of params in place of μ: states and params are pulled at once.
    """
    params, states, controls, rows, *_ = kept
    flows, written, want_given = range(len(gates)), written_size(spec.system), kept.want_given is not None
    is_open = [bool(own.any()) for own in open_gates(gates, spec.system, want_given)]
    meet = meeting(spec.system, gates)

    def retreat(carry, at):
        lam, updates, adj_rows = carry
        x, c, y, adj_x, adj_c, own = at
        pull = (
            jax.vjp(spec.controller, params, x)[1] if contract else jax.vjp(lambda x: spec.controller(params, x), x)[1]
        )
        back, mus, parts, of_rows = [], [], [], []
        for f in flows:
            dx, dc, dp = step_pull(spec.system, x, c, rows, lam[f], y)
            mu, pulled = adj_c + dc, None
            if contract or is_open[f]:
                *update, pulled = pull(mu)
                parts.append(_of_real_numbers(update))
            back.append(meet(own[f], adj_x, dx, pulled))
            mus.append(mu)
            of_rows.append(dp)
        lam = jnp.stack(back)
        if contract:
            updates = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(updates, parts, strict=True)]
        adj_rows = None if adj_rows is None else adj_rows + jnp.stack(of_rows)
        left = None if contract else jnp.stack(mus), lam[:, :, written:] if want_given else None
        return (lam, updates, adj_rows), left

    own = jnp.asarray(np.swapaxes(gates, 0, 1), states.dtype)
    last = jnp.broadcast_to(seeds[0][-1], (len(gates), *states.shape[1:]))
    zeros = [[jnp.zeros_like(leaf) for leaf in jax.tree.leaves(params) if _is_real(leaf)] for _ in flows if contract]
    adj_rows = None
    if spec.want_rows and rows is not None:
        adj_rows = jnp.zeros((len(gates), *rows.shape), rows.dtype)
    steps = (states[:-1], controls, states[1:], seeds[0][:-1], seeds[1], own)
    (lam, updates, adj_rows), left = jax.lax.scan(retreat, (last, zeros, adj_rows), steps, reverse=True)
    mu, adj_given = (None if array is None else jnp.swapaxes(array, 0, 1) for array in left)
    first = [_like(params, update) for update in updates] if contract else mu
    return first, lam, adj_rows, adj_given


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _open_loop(
    spec: _Spec, first: jax.Array, controls: jax.Array, rows: jax.Array, given: jax.Array | None
) -> jax.Array:
    call, dims = calls.trajectory_call(spec.system.structure, real_of(first)), spec.system.state_size
    return call(first, controls, rows, for_all(given, first), output_dims=(spec.steps + 1, len(first), dims))[0]


def _open_loop_forward(spec, *arguments):
    of_given = _is_differentiated(arguments[3])
    first, controls, rows, given = _values(arguments)
    states = _open_loop(spec, first, controls, rows, given)
    return states, _Kept(None, states, controls, rows, given, () if of_given else None)


def _open_loop_backward(spec, kept, adj_states):
    return _open_loop_pull(spec, kept, _dense(adj_states))


@functools.partial(jax.jit, static_argnums=0)
def _open_loop_pull(spec, kept, adj_states):
    seeds = adj_states, jnp.zeros_like(kept.controls)
    mu, *adjoints = _sweep(spec, kept, None, seeds, _gates_of(spec, kept.states))
    first, *others = _own_adjoints(spec, kept.rows, kept.given, *adjoints)
    return first, _combine(spec.flow, mu), *others


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


def _refuse_parts(spec: _Spec, own: bool, first: bool, rows: bool, given: bool) -> None:
    """Raise a ValueError where a combined flow of parts would pass for that of the whole.

    Args:
        spec: The call.
        own: Whether params are differentiated.
        first: Whether x0 or the memory is.
        rows: Whether physical parameters are.
        given: Whether inputs are.
    """
    flow = spec.flow
    if not isinstance(flow, Combined):
        return
    rule = getattr(flow.rule, "__name__", "rule")
    advice = f"differentiate by {flow.base.name!r} and by {flow.other.name!r} in two calls"
    if own and (first or given):
        start = "x0 or memory" if getattr(spec.system, "memory", 0) else "x0"
        name = start if first else "inputs"
        raise ValueError(
            f"{name} and params cannot be differentiated together by the flow {flow.name!r}, which is not linear: "
            f"where {name} comes from an earlier rollout or from an encoder, that would be combined twice. Stop it "
            f"with jax.lax.stop_gradient({name}), or take one rollout over the whole horizon, or "
            f"{advice} and give the results to {rule}"
        )
    if spec.axes and (own or first or rows or given):
        raise ValueError(
            f"rollout is mapped over the named axis {', '.join(spec.axes)}, and the flow {flow.name!r} is not linear: "
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
    return found.program, (jax.tree.leaves(params), found.held)


def _fused(system: Any, program: Program) -> Fused | str:
    """Return a controller as a row program, or why it is none."""
    device = getattr(jax.config, "jax_default_device", None)  # its own types do not know it
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform != "cpu":
        return f"JAX runs on {platform}, where one kernel does no more than the forward pass of an MLP"
    return read_and_check(program, system)
