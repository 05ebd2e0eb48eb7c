"""Functions of JAX traced once, so that all passes of a rollout run one program; and what is known about such a one."""

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from warp_phys.errors import NotRepeatable
from warp_phys.interop.jax.arrays import is_traced

OWN_RULES = {"custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin", "linear_call", "custom_transpose_call"}
"""Primitives whose backward pass is a function of the user's, which need not be linear."""

CALLBACKS = {"pure_callback", "io_callback"}
"""Primitives that call Python while a program runs."""

BITS = 8
"""Bits of a row's number that tell rows apart in the search for coupled ones; beyond them, 1 pair in 256 shares all."""


@dataclass(frozen=True, eq=False)
class Program:
    """A function of (inputs, last argument) as it was traced: a key of compiled programs.

    `inputs` are the leaves of the arguments but the last, and the traced values that the function closes over.
    """

    jaxpr: Any
    consts: tuple
    """What the function closes over; None for a value that is traced and therefore handed in."""
    of_rules: tuple = ()
    """What the user's own backward passes close over, to tell programs apart."""

    def __call__(self, inputs: tuple[Sequence[Any], Sequence[Any]], last: jax.Array) -> jax.Array:
        """Return what the function returns."""
        leaves, held = inputs
        rest = iter(held)
        consts = [next(rest) if const is None else const for const in self.consts]
        return jax.core.eval_jaxpr(self.jaxpr, consts, *leaves, last)[0]

    @functools.cached_property
    def primitives(self) -> frozenset[str]:
        """Names of all primitives, those of inner programs included."""
        return frozenset(_primitives(self.jaxpr))

    @property
    def has_own_rules(self) -> bool:
        """Whether a backward pass goes through functions of the user's, which may be no linear map of the adjoint."""
        return not OWN_RULES.isdisjoint(self.primitives)

    @functools.cached_property
    def couples_rows(self) -> bool:
        """Whether a row of the last argument has a derivative in another row of what is returned, as far as is known.

        Tried on random numbers, with adjoints of some rows only: the others must find exactly zero. Where nothing
        finite can be found the answer is yes, which is the side on which no update is wrong.
        """
        rows = self.jaxpr.invars[-1].aval.shape[0]
        if rows == 1:
            return False
        number = np.random.default_rng(0).permutation(rows)
        bits = [(number >> bit) % 2 == 1 for bit in range(min(BITS, int(rows - 1).bit_length()))]
        masks = np.stack([side for bit in bits for side in (bit, ~bit)])
        leaks = jax.jit(functools.partial(_leaks, self))
        known = False
        try:
            with jax.ensure_compile_time_eval():
                for kind in range(3):
                    coupled, finite = leaks(*draw(self, kind), masks)
                    if bool(coupled):
                        return True
                    known |= bool(finite)
        except Exception:  # whatever a function does not allow outside its place, as a named axis
            return True
        return not known


class Trace(NamedTuple):
    """What tracing finds."""

    program: Program
    held: tuple
    """Traced values that the function closes over, for the inputs of `program`."""
    out: Any
    """Shape and precision of what the function returns."""


def trace(name: str, function: Callable, *arguments: Any) -> Trace:
    """Trace a function, as it is now; a program that is known already is found again, and with it all compiled ones.

    Raises:
        NotRepeatable: Traced a second time it is another program: it draws random numbers, counts, remembers.
        TypeError, ValueError: It cannot be traced, or not with such arguments.
    """
    check_call(name, function, arguments)
    first = _trace_now(name, function, arguments)
    _refuse_memory(name, function, first)
    known = _programs(function, first.text, kinds_of(*arguments))
    for program in known:
        if _same(program.consts + program.of_rules, first.consts + first.of_rules):
            return Trace(program, first.held, first.out)
    second = _trace_now(name, function, arguments)
    _refuse_memory(name, function, second, first)
    if first.text != second.text or not _same(first.consts + first.of_rules, second.consts + second.of_rules):
        raise NotRepeatable(
            f"{name} {_name_of(function)} is another function when it is traced again: a rollout would freeze what "
            "changes, the same for all steps. It must compute from its arguments alone, without random numbers of "
            "numpy or of Python, counters and lists that grow: hand what changes through "
            + ("params or inputs, or as its memory" if name == "controller" else "the states or the controls")
        )
    program = Program(first.jaxpr, first.consts, first.of_rules)
    if not CALLBACKS.isdisjoint(program.primitives):
        _check_callbacks(name, function, program)
    known.append(program)
    return Trace(program, first.held, first.out)


class _Raw(NamedTuple):
    jaxpr: Any
    consts: tuple
    of_rules: tuple
    held: tuple
    text: str
    """What it looks like, with the backward passes of the user's own."""
    out: Any


_FINISHED: weakref.WeakSet = weakref.WeakSet()
"""Traces that are over: a value of theirs that turns up again was kept in Python."""


@functools.lru_cache(maxsize=512)
def _programs(function: Callable, text: str, kinds: tuple) -> list[Program]:
    """Return the list of programs known for a function, what it looked like and where; they differ in constants."""
    return []


def kinds_of(*arguments: Any) -> tuple:
    """Return what a program depends on besides the function: shapes, precisions, and the mesh of devices around."""
    avals = [jax.typeof(leaf) for leaf in jax.tree.leaves(arguments)]
    kinds = tuple((aval.shape, str(aval.dtype), getattr(aval, "vma", None)) for aval in avals)
    return kinds, jax.sharding.get_abstract_mesh()


def _trace_now(name: str, function: Callable, arguments: tuple) -> _Raw:
    def once(*arguments):  # a new function each time: JAX knows the other one again, and would not look
        for leaf in jax.tree.leaves(arguments):
            _FINISHED.add(leaf._trace)
        return function(*arguments)

    try:
        closed, out = jax.make_jaxpr(once, return_shape=True)(*arguments)
    except jax.errors.UnexpectedTracerError:
        raise _memory_error(name, function) from None
    except jax.errors.JAXTypeError as error:
        text = str(error).partition("\n")[0]
        raise TypeError(f"{name} must be traceable by JAX, which says: {text}") from error
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        axis = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} uses a named axis that does not exist where it is called ({axis}): call it inside the "
            "jax.shard_map or jax.vmap that has this axis"
        ) from error
    held = tuple(const for const in closed.consts if is_traced(const))
    consts = tuple(None if is_traced(const) else const for const in closed.consts)
    program = Program(closed.jaxpr, consts)
    rules = _backward_pass(program, held) if program.has_own_rules else None
    text = str(closed.jaxpr) if rules is None else f"{closed.jaxpr}\n{rules.jaxpr}"
    return _Raw(closed.jaxpr, consts, () if rules is None else tuple(rules.consts), held, _without_addresses(text), out)


def _backward_pass(program: Program, held: tuple) -> Any:
    """Return the traced vector-Jacobian product, or None if there is none."""

    def pull(*arguments):
        y, pull_back = jax.vjp(lambda *arguments: program((arguments[:-1], held), arguments[-1]), *arguments)
        return pull_back(jnp.ones_like(y))

    try:
        return jax.make_jaxpr(pull)(*(var.aval for var in program.jaxpr.invars))
    except (TypeError, ValueError, NotImplementedError):
        return None


def _without_addresses(text: str) -> str:
    return re.sub("0x[0-9a-f]+", "0x", text)


def check_call(name: str, function: Callable, arguments: tuple, takes: str = "") -> None:
    """Raise a TypeError for a function of other arguments, or arguments that hold something else than numbers."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None  # none is known
    try:
        _ = signature and signature.bind(*arguments)
    except TypeError as error:
        takes = takes or ("(params, states)" if name == "controller" else "(states, controls)")
        hint = ": hand its apply, a function of both" if hasattr(function, "apply") else ""
        raise TypeError(f"{name} must be a function of {takes}, {_name_of(function)} is not ({error}){hint}") from None
    for leaf in jax.tree.leaves(arguments):
        try:
            jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"params must be a pytree of numbers and arrays, got a leaf of type {type(leaf).__name__}: keep in the "
                "controller itself what is no number"
            ) from None


def _refuse_memory(name: str, function: Callable, raw: _Raw, before: _Raw | None = None) -> None:
    """Raise if a function uses a value of a trace that is over."""
    allowed = None if before is None else {id(value) for value in before.held}
    if any(value._trace in _FINISHED or (allowed is not None and id(value) not in allowed) for value in raw.held):
        raise _memory_error(name, function)


def _memory_error(name: str, function: Callable) -> NotRepeatable:
    return NotRepeatable(
        f"{name} {_name_of(function)} uses a value that an earlier call of it has kept in Python (an attribute, a "
        "list, a cache). What it remembers from step to step is handed to it and returned by it: give rollout(…, "
        "memory=h0), or compute it anew in each call"
    )


def _name_of(function: Callable) -> str:
    function = getattr(function, "controller", function)  # of rows
    return getattr(function, "__qualname__", type(function).__qualname__)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists of constants hold the same numbers."""
    return len(some) == len(others) and all(map(_equal, some, others))


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if one is None or other is None or is_traced(one) or is_traced(other):
        return False
    if jnp.issubdtype(one.dtype, jax.dtypes.extended):
        one, other = (jax.random.key_data(key) for key in (one, other))
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jex.jaxprs_in_params(equation.params):
            yield from _primitives(inner)


def draw(program: Program, kind: int) -> tuple:
    """Return inputs and last argument of random numbers: of both signs, positive, and small ones with large states."""
    generator = np.random.default_rng(kind)

    def numbers(aval: Any, scale: float) -> Any:
        if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0, impl=str(jax.random.key_impl(aval))), aval.shape)
        if not jnp.issubdtype(aval.dtype, jnp.inexact):
            return jnp.zeros(aval.shape, aval.dtype)
        values = generator.uniform(0.1, 1.0, aval.shape) if kind == 1 else generator.standard_normal(aval.shape)
        return jnp.asarray(scale * values, aval.dtype)

    small, large = (0.1, 100.0) if kind == 2 else (1.0, 1.0)
    *leaves, last = program.jaxpr.invars
    held = [var for var, const in zip(program.jaxpr.constvars, program.consts, strict=True) if const is None]
    inputs = tuple([numbers(var.aval, small) for var in group] for group in (leaves, held))
    return inputs, numbers(last.aval, large)


def _leaks(program: Program, inputs: tuple, last: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whether adjoints of the rows of a mask reach another row, and whether all that was found is finite."""
    y, pull = jax.vjp(functools.partial(program, inputs), last)
    seed = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)

    def through(mask):
        (adjoint,) = pull(jnp.where(mask[:, None], seed, 0.0))
        return (jnp.where(mask[:, None], 0.0, adjoint) != 0.0).any(), jnp.isfinite(adjoint).all()

    leaks, finite = jax.lax.map(through, masks)
    return (leaks & finite).any(), finite.all()


def _check_callbacks(name: str, function: Callable, program: Program) -> None:
    """Raise if calls back to Python give other numbers the second time."""
    with jax.ensure_compile_time_eval():  # without `jit`, which would keep here what a callback without arguments says
        one, other = (np.asarray(program(*draw(program, 0))) for _ in range(2))
    if one.tobytes() != other.tobytes():
        raise NotRepeatable(
            f"{name} {_name_of(function)} calls back to Python and gets other numbers for the same arguments: what is "
            "called must compute from its arguments alone, without random numbers, counters and memory"
        )
