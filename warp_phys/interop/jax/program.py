"""Any JAX function of (params, states) read as a row program from its jaxpr, and held against the function itself.

What does not depend on the states is left to JAX, which computes it before a rollout (and takes its derivative after
it): weights may be stacked, normalised, made by another network. Of the rest, what moves numbers is run on arrays of
places (`programs.reading`), and each operation on numbers becomes one of the table.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from warp_phys.engine.phases import all_gates
from warp_phys.flow import REGULAR
from warp_phys.interop.jax import trace as jax_trace
from warp_phys.interop.jax.arrays import real_of, rows_of_parameters
from warp_phys.interop.jax.dense_calls import sweep_call, unroll_call
from warp_phys.interop.jax.rows import for_all, given_dims
from warp_phys.programs.reading import ALIKE, Reading, Unreadable, explained
from warp_phys.systems.base import System

WIDEST = 256
"""Widest layer of a program: beyond it a matrix library is as good."""

LONGEST_SCAN = 64
"""Most steps of a `lax.scan` that is written out."""


class Fused(NamedTuple):
    """A traced controller as a row program: what runs whole passes with the physics."""

    plan: Any
    """The row program."""
    before: tuple["_Step", ...]
    """What is computed of the inputs before a rollout."""
    tensors: tuple[int, ...]
    """Which of its values the program reads."""
    offsets: tuple[int, ...]
    """Where each tensor that a slot reads starts among all their numbers, in turn; −1 for none."""

    def weights(self, inputs: tuple[Sequence[Any], Sequence[Any]], dtype: Any) -> jax.Array:
        """Return all numbers that the program reads, as one flat array."""
        values = dict(enumerate([*inputs[0], *inputs[1]]))
        for step in self.before:
            values.update(zip(step.outs, step.run(*(values[k] for k in step.ins)), strict=True))
        parts = [jnp.asarray(values[k]).astype(dtype).reshape(-1) for k in self.tensors]
        return jnp.concatenate([*parts, jnp.zeros(1, dtype)])  # never empty

    def unroll(
        self, structure: System, inputs: Any, x0: jax.Array, rows: jax.Array, steps: int, given: Any = None
    ) -> tuple:
        """Return states and controls of a rollout, from one call of the engine.

        Where the system's rows hold inputs, those are `given`, shape (steps, 1 or batch, E).
        """
        batch = len(x0)
        dims = {"states": (steps + 1, batch, structure.state_size), "controls": (steps, batch, self.plan.outputs)}
        call = unroll_call(structure, self.plan, self.offsets, real_of(x0))
        return tuple(call(x0, rows, self.weights(inputs, x0.dtype), for_all(given, x0), output_dims=dims))

    def sweep(
        self,
        structure: System,
        inputs: Any,
        trajectory: tuple,
        rows: jax.Array,
        seeds: tuple,
        gates: jax.Array,
        want_rows: bool,
        want_given: bool = False,
    ) -> tuple[list[Any], jax.Array, jax.Array | None, jax.Array | None]:
        """Return what the flows find, from one call of the engine.

        Their updates, λ_0 (flows, batch, D) and, if wanted, the adjoints of the physical parameters (flows, batch, P)
        and of what is given (flows, steps, batch, E).

        Args:
            structure: The system's structure.
            inputs: What the traced controller is called with.
            trajectory: States (steps + 1, batch, D) and controls (steps, batch, K).
            rows: Physical parameters, shape (batch, P).
            seeds: The explicit derivatives of the loss, likewise.
            gates: See `phases.all_gates`.
            want_rows: Whether the parameters' adjoints are wanted.
            want_given: Whether those of what is given are.
        """
        states, controls = trajectory
        weights, pull = jax.vjp(lambda inputs: self.weights(inputs, states.dtype), inputs)
        dims = {
            "lam": (len(gates), *states.shape[1:]),
            "updates": (len(gates), len(weights)),
            "adj_p": (len(gates) if want_rows else 0, *rows.shape),
            "adj_given": given_dims(structure, len(gates) if want_given else 0, controls),
        }
        call = sweep_call(structure, self.plan, self.offsets, real_of(states))
        lam, updates, adj_p, adj_given = call(states, controls, rows, weights, *seeds, gates, output_dims=dims)
        own = (adj_p if want_rows else None, adj_given if want_given else None)
        return [pull(update)[0] for update in updates], lam, *own


def read_and_check(program: jax_trace.Program, system: Any) -> Fused | str:
    """Return a traced controller as a row program that gives its own controls and derivatives; or why there is none."""
    if not isinstance(system, System):
        return "the simulator is not a System of the engine"
    known = _known(program, system.structure)
    if not known:
        try:
            with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices(backend="cpu")[0]):
                read = _read(program)
                _check_numbers(read, program, system)
                known.append(read)
        except Unreadable as error:
            known.append(str(error))
    return known[0]


@functools.lru_cache(maxsize=512)
def _known(program: jax_trace.Program, structure: System) -> list[Fused | str]:
    return []


def _read(program: jax_trace.Program) -> Fused:
    if program.has_own_rules:
        raise Unreadable("it has a backward pass of its own (custom_vjp), which sees the adjoints of each step")
    if not jax_trace.CALLBACKS.isdisjoint(program.primitives):
        raise Unreadable("it calls back to Python")
    with explained("it cannot be read"):  # a primitive with parameters that its rule does not know
        return _Reader(program).read()


def _check_numbers(read: Fused, program: jax_trace.Program, system: System) -> None:
    """Raise `Unreadable` unless a fused step gives the controls and adjoints that JAX gives.

    Each leaf is compared by its own size, and by how much it is changed by rounding errors in what goes in.
    """
    last = program.jaxpr.invars[-1]
    x = jnp.asarray(system.sample(last.aval.shape[0], seed=0, dtype=np.dtype(last.aval.dtype)))
    rows: Any = rows_of_parameters(system, None, x)
    all_open: Any = all_gates([REGULAR], 1, len(x), system)

    @jax.jit
    def by_jax(inputs, x, seed):
        return program(inputs, x), jax.vjp(program, inputs, x)[1](seed)

    @jax.jit
    def fused(inputs, x, seed):
        size = system.written_size
        states, controls = read.unroll(system.structure, inputs, x[:, :size], rows, 1, x[None, :, size:])
        seeds, gates = (jnp.zeros_like(states), seed[None]), jnp.asarray(all_open, x.dtype)
        updates, lam, *_ = read.sweep(system.structure, inputs, (states, controls), rows, seeds, gates, False)
        return controls[0], (updates[0], lam[0])

    known, rounding = False, np.finfo(x.dtype).eps
    bound = 1e-4 if x.dtype == np.float32 else 1e-10
    seed = jnp.cos(jnp.arange(len(x) * read.plan.outputs, dtype=x.dtype)).reshape(len(x), -1)
    for kind in (2, 1, 0):
        arguments = jax_trace.draw(program, kind)[0], x, seed
        with explained("no code can be made of it"):
            got, expected = (_numbers(function(*arguments)) for function in (fused, by_jax))
        nearby = _numbers(by_jax(*jax.tree.map(lambda leaf: _rounded(leaf, rounding), arguments)))
        known |= all(np.isfinite(part).all() for part in expected)
        largest = max(map(_size, expected[1:]))
        for i, (new, old, beside) in enumerate(zip(got, expected, nearby, strict=True)):
            noise = 10 * _size(beside - old) + 8 * rounding * (largest if i else 0.0)  # of a leaf that cancels
            if not (np.abs(new - old)[np.isfinite(old)] <= bound * _size(old) + noise).all():
                raise Unreadable("what was read of it gives other numbers than it gives itself")
    if not known:
        raise Unreadable("nothing finite comes out of it where it is tried")


def _numbers(found: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found) if leaf.dtype != jax.dtypes.float0]


def _size(part: np.ndarray) -> float:
    return float(np.abs(part[np.isfinite(part)]).max(initial=0.0))


def _rounded(leaf: Any, rounding: float) -> Any:
    """Return numbers with a rounding error each; what is no real number as it is."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    signs = np.where(np.arange(leaf.size) % 3 == 1, -1.0, 1.0).reshape(leaf.shape)
    return leaf * (1.0 + rounding * signs).astype(leaf.dtype)


class _Step(NamedTuple):
    """A step of what is computed before a rollout."""

    run: Callable[..., Sequence[Any]]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class _Value:
    """A value of a program: numbers that are known at once, or computed before a rollout, or for each row."""

    def __init__(self, number: Any = None, key: Any = None, code: Any = None, aval: Any = None):
        self.number, self.key, self.code = number, key, code
        self.aval = number if aval is None else aval

    @property
    def of_rows(self) -> bool:
        """Whether it depends on the states."""
        return self.number is None and self.key is None


class _Reader(Reading):
    """Runs a jaxpr on places, and builds the program of what it computes of the states."""

    def __init__(self, program: jax_trace.Program):
        states = program.jaxpr.invars[-1].aval
        super().__init__(states.shape[1], states.shape[0])
        self.program, self.dtype = program, states.dtype
        self.before: list[_Step] = []
        self.keys = 0
        self.still: set[int | None] = {None}
        """What is computed before a rollout and has no derivative; None stands for numbers known at once."""

    def read(self) -> Fused:
        """Return the program."""
        jaxpr, consts = self.program.jaxpr, self.program.consts
        leaves = [self._computed(var.aval) for var in jaxpr.invars[:-1]]
        held = [self._computed(var.aval) for var, const in zip(jaxpr.constvars, consts, strict=True) if const is None]
        rest, values = iter(held), []
        for const in consts:
            values.append(next(rest) if const is None else self._constant(const))
        states = _Value(code=self.states(), aval=jaxpr.invars[-1].aval)
        (out,) = self._run(jaxpr, values, [*leaves, states])
        if not out.of_rows:
            raise Unreadable("it does not depend on the states")
        plan, keys = self.finish(self.places(out))
        for node in plan.nodes:
            if node.operation == "dense" and max(node.numbers[1], node.numbers[3]) > WIDEST:
                raise Unreadable(f"a layer is wider than {WIDEST}, where a matrix library is as good")
        tensors = tuple(dict.fromkeys(key for key in keys if key is not None))
        sizes = dict(zip(plan.read, keys, strict=True))
        starts, start = {}, 0
        for key in tensors:
            starts[key] = start
            start += next(plan.slots[slot] for slot, k in sizes.items() if k == key)
        offsets = tuple(-1 if key is None else starts[key] for key in keys)
        return Fused(plan, self._needed(tensors), tensors, offsets)

    def _needed(self, keys: Sequence[int]) -> tuple[_Step, ...]:
        """Return the steps that lead to values."""
        wanted, steps = set(keys), []
        for step in reversed(self.before):
            if wanted.intersection(step.outs):
                wanted.update(step.ins)
                steps.append(step)
        return tuple(reversed(steps))

    # --- values

    def _computed(self, aval: Any, code: np.ndarray | None = None) -> _Value:
        """Return a new value that is computed before a rollout."""
        self.keys += 1
        return _Value(key=self.keys - 1, code=code, aval=aval)

    def _record(self, run: Callable, ins: Sequence[_Value], avals: Sequence[Any]) -> list[_Value]:
        """Take a step before a rollout; return its values."""
        keys = tuple(self._key(value) for value in ins)
        outs = [self._computed(aval) for aval in avals]
        self.before.append(_Step(run, keys, tuple(out.key for out in outs)))
        return outs

    def _key(self, value: _Value) -> int:
        if value.key is not None:
            return value.key
        return self._record(lambda: (value.number,), (), (value.aval,))[0].key

    def _constant(self, const: Any) -> _Value:
        """Return what the function closes over: an array is read at run time, so that code does not depend on it."""
        if not jnp.issubdtype(const.dtype, jax.dtypes.extended):
            if const.ndim == 0 or not jnp.issubdtype(const.dtype, jnp.floating):
                return _Value(np.asarray(const))
        (value,) = self._record(lambda: (const,), (), (jax.typeof(const),))
        if const.dtype == self.dtype:
            bits = np.ascontiguousarray(const).view(f"i{self.dtype.itemsize}")
            value.code = self._alike(value, [bits])
        return value

    def _alike(self, value: _Value, alike: Sequence[np.ndarray]) -> np.ndarray:
        """Return places of a tensor in which numbers have one place if all that they are made of has."""
        code = self.tensor(value.key, value.aval.shape)
        if self.samples in code.shape:  # else nothing can be said once for each sample
            keys = np.stack([np.broadcast_to(part, code.shape).ravel() for part in alike])
            _, first, index = np.unique(keys, axis=1, return_index=True, return_inverse=True)
            code = code.ravel()[first][index.ravel()].reshape(code.shape)
        return code

    def _is_real(self, aval: Any) -> bool:
        return aval.dtype in (self.dtype, np.bool_)

    def places(self, value: _Value) -> np.ndarray:
        if value.code is None:
            if not self._is_real(value.aval):
                raise Unreadable(f"it computes with rows and numbers of type {value.aval.dtype}")
            value.code = self.constant(value.number) if value.key is None else self.tensor(value.key, value.aval.shape)
        return value.code

    def operand(self, value: _Value) -> Any:
        """Return a number, or places."""
        if value.number is not None and value.number.size and (value.number == value.number.flat[0]).all():
            return float(value.number.flat[0])
        return self.places(value)

    # --- programs

    def _run(self, jaxpr: Any, consts: Sequence[_Value], arguments: Sequence[_Value]) -> list[_Value]:
        """Return what a jaxpr gives."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def value_of(var: Any) -> _Value:
            is_literal = isinstance(var, jax.extend.core.Literal)
            return _Value(np.asarray(var.val, var.aval.dtype)) if is_literal else values[var]

        for equation in jaxpr.eqns:
            if any(type(var).__name__ != "DropVar" for var in equation.outvars):
                outs = self._equation(equation, [value_of(var) for var in equation.invars])
                values.update(zip(equation.outvars, outs, strict=True))
        return [value_of(var) for var in jaxpr.outvars]

    def run_closed(self, closed: Any, arguments: Sequence[_Value]) -> list[_Value]:
        if not hasattr(closed, "consts"):
            return self._run(closed, (), arguments)
        return self._run(closed.jaxpr, [self._constant(jnp.asarray(c)) for c in closed.consts], arguments)

    def _equation(self, equation: Any, ins: list[_Value]) -> list[_Value]:
        name, params, avals = equation.primitive.name, equation.params, [var.aval for var in equation.outvars]
        if name in INLINED:
            return self.run_closed(params[INLINED[name]], ins)
        if name in SAME or (name == "convert_element_type" and ins[0].aval.dtype == avals[0].dtype):
            return ins
        if all(value.number is not None for value in ins):
            return [_Value(number) for number in _evaluate(equation, [value.number for value in ins])]
        moved = self._moved(equation, ins) if name in LAYOUT else None
        if moved or not any(value.of_rows for value in ins):
            return moved or self._before(equation, ins)
        if name in CONTROL:
            return CONTROL[name](self, equation, ins)
        return self._computed_by_rows(equation, ins)

    def _computed_by_rows(self, equation: Any, ins: list[_Value]) -> list[_Value]:
        name, aval = equation.primitive.name, equation.outvars[0].aval
        if name not in RULES:
            raise Unreadable(f"it uses {name}, {WHY.get(name, 'which is no operation of row programs')}")
        if not self._is_real(aval):
            raise Unreadable(f"its {name} gives numbers of type {aval.dtype}")
        code = np.broadcast_to(RULES[name](self, equation, *ins), aval.shape)
        return [_Value(code=code, aval=aval)]

    def _moved(self, equation: Any, ins: list[_Value]) -> list[_Value] | None:
        """Return what an operation that moves numbers gives, or None if its numbers have no places."""
        of_indices, move = LAYOUT[equation.primitive.name]
        indices = range(len(ins))[of_indices]
        data = [value for i, value in enumerate(ins) if i not in indices]
        if any(ins[i].number is None for i in indices) or not all(self._is_real(value.aval) for value in data):
            return None
        arguments = [value.number if i in indices else self.places(value) for i, value in enumerate(ins)]
        codes = move(arguments, equation.params | {"nan": int(self.constant(math.nan))})
        avals = [var.aval for var in equation.outvars]
        if any(value.of_rows for value in data):
            return [_Value(code=self.joined(code), aval=aval) for code, aval in zip(codes, avals, strict=True)]
        outs = self._record(_bound(equation), ins, avals)
        for out, code in zip(outs, codes, strict=True):
            out.code = code
        return outs

    def _before(self, equation: Any, ins: list[_Value]) -> list[_Value]:
        """Leave an equation to JAX; numbers that are computed alike for all samples have one place."""
        name, avals = equation.primitive.name, [var.aval for var in equation.outvars]
        outs = self._record(_bound(equation), ins, avals)
        if len(outs) == 1 and self._is_real(avals[0]) and all(self._is_real(value.aval) for value in ins):
            if name in RULES.keys() - REDUCTIONS:
                outs[0].code = self._alike(outs[0], [self.places(value) for value in ins])
            elif name == "dot_general":
                a, b, _ = _matrices(self, equation, *ins)
                groups, (m, n) = len(a), (a.shape[1], b.shape[1])
                first, second = _alike_rows(a).reshape(groups, m, 1), _alike_rows(b).reshape(groups, 1, n)
                shape = avals[0].shape
                alike = [np.broadcast_to(part, (groups, m, n)).reshape(shape) for part in (first, second)]
                outs[0].code = self._alike(outs[0], alike)
        return outs

    def slice(self, value: _Value, i: int) -> _Value:
        """Return entry i along the first axis."""
        aval = jax.ShapeDtypeStruct(value.aval.shape[1:], value.aval.dtype)
        if value.number is not None:
            return _Value(value.number[i])
        code = None if value.code is None else value.code[i]
        if value.of_rows:
            return _Value(code=code, aval=aval)
        (out,) = self._record(lambda a: (a[i],), [value], [aval])
        out.code = code
        return out

    def stack(self, values: list[_Value]) -> _Value:
        """Return values side by side along a new first axis."""
        aval = jax.ShapeDtypeStruct((len(values), *values[0].aval.shape), values[0].aval.dtype)
        if any(value.of_rows for value in values):
            return _Value(code=self.joined(np.stack([self.places(value) for value in values])), aval=aval)
        return self._record(lambda *parts: (jnp.stack(parts),), values, [aval])[0]

    def matrix(self, value: _Value, order: Sequence[int], shape: Sequence[int], i: int) -> np.ndarray:
        """Return the places of a tensor: matrix i of a value whose axes are brought in order, and to a shape."""
        aval = jax.ShapeDtypeStruct(shape[1:], value.aval.dtype)
        (out,) = self._record(lambda a: (a.transpose(order).reshape(shape)[i],), [value], [aval])
        return self.tensor(out.key, aval.shape)

    def stopped(self, value: _Value) -> _Value:
        """Return a value without a derivative."""
        if value.of_rows:
            return _Value(code=self.elementwise("stop", [value.code]), aval=value.aval)
        (out,) = self._record(lambda a: (jax.lax.stop_gradient(a),), [value], [value.aval])
        self.still.add(out.key)
        return out


def _alike_rows(code: np.ndarray) -> np.ndarray:
    """Return a number for each row of (groups, M, K), the same for equal ones."""
    return np.unique(code.reshape(-1, code.shape[-1]), axis=0, return_inverse=True)[1].reshape(code.shape[:2])


def _bound(equation: Any) -> Callable[..., Sequence[Any]]:
    """Return an equation as a function of arrays."""

    def run(*arguments):
        found = equation.primitive.bind(*arguments, **equation.primitive.get_bind_params(equation.params))
        return found if equation.primitive.multiple_results else (found,)

    return run


# --- numbers that are known at once


def _evaluate(equation: Any, numbers: list[np.ndarray]) -> list[np.ndarray]:
    name, params, avals = equation.primitive.name, equation.params, [var.aval for var in equation.outvars]
    if name == "iota":
        shape, axis = params["shape"], params["dimension"]
        column = np.arange(shape[axis]).reshape([-1 if d == axis else 1 for d in range(len(shape))])
        found: Any = [np.broadcast_to(column, shape)]
    elif name == "convert_element_type":
        found = numbers
    elif name in NUMPY:
        found = [NUMPY[name](*numbers)]
    else:
        found = _bound(equation)(*map(jnp.asarray, numbers))
    return [np.asarray(number).astype(aval.dtype) for number, aval in zip(found, avals, strict=True)]


NUMPY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal, "and": np.bitwise_and, "or": np.bitwise_or,
    "not": np.invert, "max": np.maximum, "min": np.minimum, "neg": np.negative,
}  # fmt: skip
"""What is faster by numpy than by a compiled program of JAX."""


# --- layout


def _broadcast(a: np.ndarray, params: dict) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for d, size in zip(params["broadcast_dimensions"], a.shape, strict=True):
        shape[d] = size
    return np.broadcast_to(a.reshape(shape), params["shape"])


def _slice(a: np.ndarray, params: dict) -> np.ndarray:
    bounds = params["start_indices"], params["limit_indices"], params["strides"] or [1] * a.ndim
    return a[tuple(slice(*bound) for bound in zip(*bounds, strict=True))]


def _one(move: Callable) -> tuple[slice, Callable]:
    """Return the entry of an operation that moves the numbers of one array."""
    return slice(0, 0), lambda arguments, params: [move(arguments[0], params)]


def _by_jax(primitive: Any, indices: slice) -> tuple[slice, Callable]:
    """Return the entry of an operation that JAX itself does, on places."""

    def move(arguments: list[np.ndarray], params: dict) -> list[np.ndarray]:
        nan, params = params["nan"], {name: value for name, value in params.items() if name != "nan"}
        if params.get("fill_value", 0) is None:
            params["fill_value"] = nan
        with jax.enable_x64(True):
            return [np.asarray(primitive.bind(*map(jnp.asarray, arguments), **params))]

    return indices, move


LAYOUT: dict[str, tuple[slice, Callable]] = {
    "reshape": _one(lambda a, params: a.reshape(params["new_sizes"])),
    "transpose": _one(lambda a, params: a.transpose(params["permutation"])),
    "squeeze": _one(lambda a, params: a.squeeze(tuple(params["dimensions"]))),
    "rev": _one(lambda a, params: np.flip(a, tuple(params["dimensions"]))),
    "tile": _one(lambda a, params: np.tile(a, params["reps"])),
    "broadcast_in_dim": _one(_broadcast),
    "slice": _one(_slice),
    "split": (slice(0, 0), lambda a, params: np.split(a[0], np.cumsum(params["sizes"])[:-1], axis=params["axis"])),
    "concatenate": (slice(0, 0), lambda a, params: [np.concatenate(a, params["dimension"])]),
    "stack": (slice(0, 0), lambda a, params: [np.stack(a, params["axis"])]),
    "select_n": (slice(0, 1), lambda a, _params: [np.choose(a[0].astype(int), a[1:])]),
    "pad": _by_jax(jax.lax.pad_p, slice(0, 0)),
    "gather": _by_jax(jax.lax.gather_p, slice(1, 2)),
    "scatter": _by_jax(jax.lax.scatter_p, slice(1, 2)),
    "dynamic_slice": _by_jax(jax.lax.dynamic_slice_p, slice(1, None)),
    "dynamic_update_slice": _by_jax(jax.lax.dynamic_update_slice_p, slice(2, None)),
}
"""Operations that move numbers: which arguments are indices, and the rule."""


# --- control


def _cond(reader: _Reader, equation: Any, ins: list[_Value]) -> list[_Value]:
    if ins[0].number is None:
        raise Unreadable("it uses cond, which depends on numbers: jnp.where chooses row by row")
    branches = equation.params["branches"]
    return reader.run_closed(branches[int(np.clip(ins[0].number, 0, len(branches) - 1))], ins[1:])


def _scan(reader: _Reader, equation: Any, ins: list[_Value]) -> list[_Value]:
    params = equation.params
    if params["length"] > LONGEST_SCAN:
        raise Unreadable(f"it uses scan over more than {LONGEST_SCAN} steps")
    consts, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    carry, found = ins[consts:carried], []
    steps = range(params["length"])
    for i in reversed(steps) if params["reverse"] else steps:
        own = [reader.slice(value, i) for value in ins[carried:]]
        outs = reader.run_closed(params["jaxpr"], [*ins[:consts], *carry, *own])
        carry = outs[: len(carry)]
        found.append(outs[len(carry) :])
    found = found[::-1] if params["reverse"] else found
    return [*carry, *(reader.stack(list(values)) for values in zip(*found, strict=True))]


def _custom_jvp(reader: _Reader, equation: Any, ins: list[_Value]) -> list[_Value]:
    """Take the value of the function, and the derivative that its rule says.

    The rule is linear in the tangents: the arguments themselves take their place, and all else is stopped.
    """
    closed = equation.params["call_jaxpr"]
    source = closed.jaxpr.debug_info.func_src_info or ""
    name, _, place = source.partition(" at ")
    if place.startswith(OF_JAX):
        known = None
        if name == "relu":
            known = reader.elementwise("relu", [reader.places(ins[0])])
        elif name == "logaddexp" and ins[1].number is not None and not ins[1].number.any():
            known = reader.elementwise("softplus", [reader.places(ins[0])], 1.0, math.inf)
        if known is not None:
            aval = closed.out_avals[0]
            return [_Value(code=np.broadcast_to(known, aval.shape), aval=aval)]
    if not any(reader.moves(value.code) if value.of_rows else value.key not in reader.still for value in ins):
        return reader.run_closed(closed, ins)
    moving = [i for i, value in enumerate(ins) if value.number is None and value.aval.dtype == reader.dtype]

    def rule(arguments, tangents):
        def function(*given):
            full = list(arguments)
            for i, value in zip(moving, given, strict=True):
                full[i] = value
            return _bound(equation)(*full)

        return jax.jvp(function, [arguments[i] for i in moving], tangents)[1]

    avals = [jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype) for value in ins]
    traced = jax.make_jaxpr(rule)(avals, [avals[i] for i in moving])
    stopped = [value if value.number is not None else reader.stopped(value) for value in ins]
    tangents = reader.run_closed(traced, [*stopped, *(ins[i] for i in moving)])
    joined = []
    for value, tangent in zip(reader.run_closed(closed, stopped), tangents, strict=True):
        code = reader.elementwise("derivative of", [reader.places(value), reader.places(tangent)])
        joined.append(_Value(code=code, aval=value.aval))
    return joined


OF_JAX = os.path.dirname(jax.__file__)

INLINED = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
}
"""Primitives that stand for the program that they hold, and where they hold it."""

SAME = {"copy", "copy_p", "pvary", "optimization_barrier"}
"""Primitives that give back their arguments, as far as numbers go."""

CONTROL: dict[str, Callable] = {"cond": _cond, "scan": _scan, "custom_jvp_call": _custom_jvp}
"""Primitives that hold programs, and what becomes of them."""


# --- operations on numbers


def _unary(operation: str, *numbers: float) -> Callable:
    return lambda reader, _equation, a: reader.elementwise(operation, [reader.places(a)], *numbers)


def _binary(operation: str) -> Callable:
    return lambda reader, _equation, a, b: reader.arithmetic(operation, reader.operand(a), reader.operand(b))


def _extreme(operation: str, neutral: float) -> Callable:
    def rule(reader: _Reader, _equation: Any, a: _Value, b: _Value) -> np.ndarray:
        operands = [reader.operand(value) for value in (a, b)]
        others = [operand for operand in operands if not isinstance(operand, float) or operand != neutral]
        return others[0] if len(others) == 1 else reader.elementwise(operation, operands, 0.5, 0.5)

    return rule


def _compare(operation: str, swapped: bool = False, negated: bool = False) -> Callable:
    def rule(reader: _Reader, _equation: Any, a: _Value, b: _Value) -> np.ndarray:
        operands = [reader.operand(value) for value in ((b, a) if swapped else (a, b))]
        code = reader.elementwise(operation, operands)
        return _negated(reader, code) if negated else code

    return rule


def _negated(reader: _Reader, truth: np.ndarray) -> np.ndarray:
    return reader.arithmetic("subtract", 1.0, truth)


def _logical(operation: str) -> Callable:
    def rule(reader: _Reader, _equation: Any, *ins: _Value) -> np.ndarray:
        if any(value.aval.dtype != np.bool_ for value in ins):
            raise Unreadable("it computes with bits")
        codes = [reader.places(value) for value in ins]
        if operation == "not":
            return _negated(reader, codes[0])
        return reader.elementwise(operation, codes, *((0.5, 0.5) if operation == "maximum" else ()))

    return rule


def _convert(reader: _Reader, equation: Any, a: _Value) -> np.ndarray:
    if equation.params["new_dtype"] == np.bool_ and a.aval.dtype != np.bool_:
        return _negated(reader, reader.elementwise("equal", [reader.places(a), 0.0]))
    if a.aval.dtype not in (np.bool_, reader.dtype):
        raise Unreadable(f"it converts rows of type {a.aval.dtype}")
    return reader.places(a)


def _power(reader: _Reader, equation: Any, a: _Value, *exponent: _Value) -> np.ndarray:
    n = reader.operand(exponent[0]) if exponent else equation.params["y"]
    if isinstance(n, np.ndarray) or n == 0:
        raise Unreadable("it raises to a power that is computed, or zero")
    code = reader.places(a)
    if n == 3:
        return reader.elementwise("multiply", [reader.elementwise("square", [code]), code])
    return reader.power(code, n)


def _select(reader: _Reader, _equation: Any, which: _Value, *cases: _Value) -> np.ndarray:
    if which.aval.dtype != np.bool_ or len(cases) != 2:
        raise Unreadable("it selects by a whole number that is computed")
    return reader.elementwise("choose", [reader.places(which), reader.operand(cases[1]), reader.operand(cases[0])])


def _clamp(reader: _Reader, _equation: Any, low: _Value, a: _Value, high: _Value) -> np.ndarray:
    bounds = [reader.operand(value) for value in (low, high)]
    if any(isinstance(bound, np.ndarray) for bound in bounds):
        raise Unreadable("it clamps between numbers that are no constants: jnp.clip does so")
    return reader.elementwise("hardtanh", [reader.places(a)], *bounds)


def _erfc(reader: _Reader, _equation: Any, a: _Value) -> np.ndarray:
    return _negated(reader, reader.elementwise("error function", [reader.places(a)], 2.0 / math.sqrt(math.pi)))


def _is_finite(reader: _Reader, _equation: Any, a: _Value) -> np.ndarray:
    code = reader.places(a)
    return reader.elementwise("equal", [reader.elementwise("subtract", [code, code]), 0.0])


def _over_axes(find: Callable) -> Callable:
    def rule(reader: _Reader, equation: Any, a: _Value) -> np.ndarray:
        return find(reader, reader.places(a), equation.params["axes"]).reshape(equation.outvars[0].aval.shape)

    return rule


def _matrices(reader: _Reader, equation: Any, a: _Value, b: _Value) -> tuple[np.ndarray, np.ndarray, list]:
    """Return the operands of a product as (groups, M, K) and (groups, N, K), and their axes in this order."""
    (of_a, of_b), (groups_a, groups_b) = equation.params["dimension_numbers"]
    codes: list[Any] = []
    orders = []
    for value, contracted, groups in ((a, of_a, groups_a), (b, of_b, groups_b)):
        shape = value.aval.shape
        own = [d for d in range(len(shape)) if d not in contracted and d not in groups]
        order = (*groups, *own, *contracted)
        sizes = (math.prod(shape[d] for d in axes) for axes in (groups, own, contracted))
        codes.append(reader.places(value).transpose(order).reshape(tuple(sizes)))
        orders.append(order)
    return codes[0], codes[1], orders


def _dot_general(reader: _Reader, equation: Any, a: _Value, b: _Value) -> np.ndarray:
    shape = equation.outvars[0].aval.shape
    x, w, orders = _matrices(reader, equation, a, b)
    if a.of_rows and b.of_rows:
        return reader.product(x, w.transpose(0, 2, 1)).reshape(shape)
    if a.of_rows:
        return _layers(reader, x, w, b, orders[1]).reshape(shape)
    return _layers(reader, w, x, a, orders[0]).transpose(0, 2, 1).reshape(shape)


def _layers(reader: _Reader, x: np.ndarray, w: np.ndarray, weights: _Value, order: tuple[int, ...]) -> np.ndarray:
    """Return x (groups, M, K) times w (groups, N, K) that is computed before the rollout: (groups, M, N)."""
    (groups, m, _), shape = x.shape, w.shape
    if (w == w[0]).all():
        x, w = x.reshape(1, groups * m, -1), w[:1]
    made = []
    for i, (rows, matrix) in enumerate(zip(x, w, strict=True)):
        whole = any(reader.whole(places) is not None for places in (matrix, matrix.T))
        made.append(reader.dense(rows, matrix if whole else reader.matrix(weights, order, shape, i)))
    return np.stack(made).reshape(groups, m, -1)


def _absolute(reader: _Reader, _equation: Any, value: _Value) -> np.ndarray:
    """Return |a|, whose derivative at 0 is 1 in JAX."""
    return reader.elementwise("leaky relu", [reader.elementwise("negate", [reader.places(value)])], -1.0)


RULES: dict[str, Callable] = {name: _unary(*operation) for name, operation in ALIKE.items()} | {
    "abs": _absolute,
    "add": _binary("add"), "add_any": _binary("add"), "sub": _binary("subtract"), "mul": _binary("multiply"),
    "div": _binary("divide"), "integer_pow": _power, "pow": _power,
    "atan2": lambda r, _equation, a, b: r.elementwise("angle", [r.operand(a), r.operand(b)]),
    "logistic": _unary("sigmoid"), "erfc": _erfc, "stop_gradient": _unary("stop"),
    "max": _extreme("maximum", -math.inf), "min": _extreme("minimum", math.inf), "clamp": _clamp,
    "gt": _compare("greater"), "ge": _compare("greater or equal"), "lt": _compare("greater", swapped=True),
    "le": _compare("greater or equal", swapped=True), "eq": _compare("equal"), "ne": _compare("equal", negated=True),
    "and": _logical("multiply"), "or": _logical("maximum"), "not": _logical("not"), "select_n": _select,
    "is_finite": _is_finite, "convert_element_type": _convert, "dot_general": _dot_general,
    "reduce_sum": _over_axes(_Reader.total), "reduce_max": _over_axes(_Reader.largest),
    "reduce_min": _over_axes(_Reader.smallest),
}  # fmt: skip
"""What each primitive becomes, by its name."""

REDUCTIONS = {"dot_general", "reduce_sum", "reduce_max", "reduce_min"}
"""Those that are not number by number."""

WHY = {
    "argmax": "whose derivative is zero everywhere",
    "while": "a loop whose length is computed: lax.scan has one that is known",
    "sort": "whose order depends on numbers",
}
"""Reasons of their own."""
