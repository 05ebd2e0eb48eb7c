"""Row programs out of functions of batches: operations on arrays that hold where numbers come from.

A place is an integer: sample, node and position in it, of a number that is computed; or, below zero, tensor and
position in it, of a number of a tensor. So layout (views, transposes, slices, concatenations, whatever they do to the
batch dimension) is the business of whatever moves integers, and what is left are the operations on numbers, each of
which must take its operands from one sample.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from warp_phys.programs.operations import OPERATIONS
from warp_phys.programs.program import Builder, Dense

LONGEST = 4096
"""Most numbers of a node that is no dense layer's."""

WIDEST = 64 * LONGEST
"""Most numbers that a dense layer takes."""

LARGEST = 1 << 22
"""Most numbers of an array of places."""

IN_NODE, IN_SAMPLE = 24, 44
"""Bits of a place's position in its node or tensor; and of node and position."""

POSITION, OF_SAMPLE = (1 << IN_NODE) - 1, (1 << IN_SAMPLE) - 1

OF_WEIGHTS = "it computes with a large tensor of weights, other than as a dense layer's"

ALIKE: dict[str, tuple[str, *tuple[float, ...]]] = {
    "neg": ("negate",), "sqrt": ("root",), "rsqrt": ("reciprocal root",), "square": ("square",), "abs": ("absolute",),
    "sign": ("sign",), "sin": ("sine",), "cos": ("cosine",), "tan": ("tangent",), "asin": ("arcsine",),
    "acos": ("arccosine",), "atan": ("arctangent",), "sinh": ("hyperbolic sine",), "cosh": ("hyperbolic cosine",),
    "tanh": ("tanh",), "asinh": ("inverse hyperbolic sine",), "acosh": ("inverse hyperbolic cosine",),
    "atanh": ("inverse hyperbolic tangent",), "exp": ("exponential",), "expm1": ("exponential less one",),
    "log": ("logarithm",), "log1p": ("logarithm of one more",), "erf": ("error function", 2.0 / math.sqrt(math.pi)),
}  # fmt: skip
"""Operations on one number by the name that torch and JAX have for them: what they are here, and its numbers."""


class Unreadable(Exception):
    """A function is no row program; the message says why, in one sentence."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise `Unreadable` with the first line of an error, after what it means."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise Unreadable(f"{what}: {type(error).__name__} {first[:160]}") from None


class _Groups(NamedTuple):
    """Groups of numbers, each of which an operation takes at once."""

    rows: np.ndarray
    """Nodes and positions of one sample's groups, in turn, shape (groups, numbers)."""
    sample: np.ndarray
    """Sample of each group of the batch; 0 for what is the same for all of them."""
    which: np.ndarray
    """Which of `rows` each is."""

    def places(self, node: int, size: int) -> np.ndarray:
        """Return the places (groups of the batch, size) of a node with `size` numbers for each of `rows`."""
        first = (self.sample << IN_SAMPLE) + (node << IN_NODE) + self.which * size
        return first[:, None] + np.arange(size)


class Reading:
    """Builds a program out of operations on arrays of places.

    Args:
        inputs: Numbers D of a state.
        samples: Samples of the batch that stands for any.
    """

    def __init__(self, inputs: int, samples: int):
        self.build, self.samples = Builder(inputs), samples
        self.tensors: list[Any] = []
        """What the places below zero refer to, by number."""
        self._numbers: dict[int, int] = {}
        self._sizes: list[int] = []
        self._slots: dict[int, int] = {}
        self._moving: list[bool] = []

    def states(self) -> np.ndarray:
        """Return the places of the states, shape (samples, D)."""
        sample = np.arange(1, self.samples + 1)[:, None] << IN_SAMPLE
        return sample + np.arange(self.build.nodes[0].size)

    def tensor(self, value: Any, shape: Sequence[int]) -> np.ndarray:
        """Return the places of a tensor, which gets a slot once its numbers are used."""
        size, number = math.prod(shape), self._numbers.setdefault(id(value), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(value)
            self._sizes.append(size)
        return (-1 - (number << IN_NODE) - np.arange(size)).reshape(tuple(shape))

    def constant(self, values: Any) -> np.ndarray:
        """Return the places of numbers that stand in the program; equal ones have one."""
        values = np.asarray(values, np.float64)
        bits, index = np.unique(values.reshape(-1).view(np.int64), return_inverse=True)
        _limit(len(bits), "it holds a large tensor that is no parameter")
        node = self.build.add("constant", (), len(bits), tuple(bits.view(np.float64).tolist()))
        return ((node << IN_NODE) + index).reshape(values.shape)

    def finish(self, output: np.ndarray) -> tuple[Any, tuple[Any, ...]]:
        """Return the program whose controls stand at places (samples, K), and what its slots read in turn, or None."""
        groups = self._groups(output)
        if not groups.sample.any() and len(groups.rows) > 1:
            raise Unreadable("it returns rows that do not depend on the states, and are not all the same")
        if groups.sample.any() and not np.array_equal(groups.sample, np.arange(1, self.samples + 1)):
            raise Unreadable("it returns its rows in another order")
        program = self.build.finish(self._node(groups.rows))
        of_slot = {slot: self.tensors[number] for number, slot in self._slots.items()}
        return program, tuple(None if slot < 0 else of_slot[slot] for slot in program.read)

    # --- samples and nodes

    def joined(self, code: np.ndarray) -> np.ndarray:
        """Return places in which each row takes what is the same for all of them, along the axis of the rows."""
        sample = _samples(code)
        if not sample.any() or sample.all():
            return code
        for axis in range(code.ndim):
            flat = np.moveaxis(sample, axis, 0).reshape(code.shape[axis], -1)
            owner = flat.max(1)
            if owner.all() and ((flat == 0) | (flat == owner[:, None])).all():
                shape = [-1 if d == axis else 1 for d in range(code.ndim)]
                return np.where(sample > 0, code, self._loaded(code) + (owner.reshape(shape) << IN_SAMPLE))
        return code

    def _groups(self, code: np.ndarray, mixed: str = "its rows depend on each other, or on their number") -> _Groups:
        """Return what stands in places (groups, numbers), each group of one sample or the same for all rows.

        Raises:
            Unreadable: There are both kinds of groups; samples do not take the same places; or, which is called
                `mixed`, those of each other.
        """
        _limit(code.size, "its batches are too large", LARGEST)
        own = _samples(code)
        sample = own.max(1, initial=0)
        if not sample.any():
            code, which = np.unique(code, axis=0, return_inverse=True)  # rows that are copies are computed once
            return _Groups(self._loaded(code), sample, which.reshape(-1))
        if ((own > 0) & (own != sample[:, None])).any():
            raise Unreadable(mixed)
        if not sample.all():
            raise Unreadable("it joins what is the same for all rows with rows in one tensor")
        if (np.bincount(sample, minlength=self.samples + 1)[1:] * self.samples != len(sample)).any():
            raise Unreadable("its rows are not all treated alike")
        order = np.argsort(sample, kind="stable").reshape(self.samples, -1)
        rows = (self._loaded(code) & OF_SAMPLE)[order]
        if (rows != rows[0]).any():
            raise Unreadable("its rows do not all take the same way, or have numbers of their own")
        which = np.empty_like(sample)
        which[order] = np.arange(order.shape[1])
        return _Groups(rows[0], sample, which)

    def _node(self, rows: np.ndarray, most: int = LONGEST) -> int:
        """Return a node of these numbers, in turn."""
        _limit(rows.size, "it has too many numbers between its layers", most)
        flat = rows.ravel()
        return self.build.gather(list(zip((flat >> IN_NODE).tolist(), (flat & POSITION).tolist(), strict=True)))

    def _loaded(self, code: np.ndarray) -> np.ndarray:
        """Return places in which numbers of tensors have become numbers of nodes that load them."""
        below = code < 0
        if not below.any():
            return code
        code, wanted = code.copy(), -1 - code[below]
        loaded = np.empty_like(wanted)
        for number in np.unique(wanted >> IN_NODE).tolist():
            own = wanted >> IN_NODE == number
            places, index = np.unique(wanted[own] & POSITION, return_inverse=True)
            _limit(len(places), OF_WEIGHTS)
            node = self.build.add("load", (), len(places), (self._slot(number), tuple(places.tolist())))
            loaded[own] = (node << IN_NODE) + index
        code[below] = loaded
        return code

    def _slot(self, number: int) -> int:
        if number not in self._slots:
            self._slots[number] = self.build.slot(self._sizes[number])
        return self._slots[number]

    # --- operations

    def elementwise(self, operation: str, operands: Sequence[Any], *numbers: float) -> np.ndarray:
        """Return the places of an operation on operands that are broadcast: arrays of places, or numbers."""
        codes = np.broadcast_arrays(*(o if isinstance(o, np.ndarray) else self.constant(o) for o in operands))
        groups = self._groups(np.stack([code.ravel() for code in codes], 1))
        nodes = tuple(self._node(operand) for operand in groups.rows.T)
        made = self.build.add(operation, nodes, len(groups.rows), tuple(map(float, numbers)))
        return groups.places(made, 1).reshape(codes[0].shape)

    def arithmetic(self, operation: str, a: Any, b: Any) -> np.ndarray:
        """Return the places of a sum, difference, product or quotient; numbers become a part of the operation."""
        if not isinstance(a, np.ndarray) and operation in ("add", "multiply"):
            a, b = b, a
        if not isinstance(a, np.ndarray) and operation == "subtract":
            return self.elementwise("shift", [self.elementwise("negate", [b])], a)
        if isinstance(b, np.ndarray) or not isinstance(a, np.ndarray):
            return self.elementwise(operation, [a, b])
        if operation in ("add", "subtract"):
            return self.elementwise("shift", [a], b if operation == "add" else -b)
        return self.elementwise("scale", [a], b if operation == "multiply" else 1.0 / b)

    def power(self, a: np.ndarray, exponent: float) -> np.ndarray:
        """Return the places of a number's power, which is not 0."""
        if exponent == 1:
            return a
        special = {2: "square", 0.5: "root", -1: "reciprocal", -0.5: "reciprocal root"}
        if exponent in special:
            return self.elementwise(special[exponent], [a])
        return self.elementwise("power", [a], exponent)

    def reduced(self, operation: str, code: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Return the places of a sum or a largest number over axes, which become 1."""
        axes = [axis % code.ndim for axis in axes]
        others = [d for d in range(code.ndim) if d not in axes]
        length = math.prod(code.shape[d] for d in axes)
        kept = [1 if d in axes else code.shape[d] for d in range(code.ndim)]
        moved = code.transpose(*others, *axes).reshape(-1, length)
        groups = self._groups(moved, "it reduces over the batch")
        made = self.build.add(operation, (self._node(groups.rows),), len(groups.rows), (length,))
        return groups.places(made, 1).reshape(kept)

    def total(self, code: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Return the places of sums over axes, which become 1."""
        return self.reduced("sum", code, axes)

    def largest(self, code: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Return the places of the largest numbers over axes, which become 1; equal ones share their derivative."""
        largest = self.reduced("largest", code, axes)
        first = self.elementwise("equal", [code, largest])
        share = self.elementwise("divide", [first, self.total(first, axes)])
        shared = self.elementwise("multiply", [code, self.elementwise("stop", [share])])
        return self.elementwise("derivative of", [largest, self.total(shared, axes)])

    def smallest(self, code: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Return the places of the smallest numbers, likewise."""
        return self.elementwise("negate", [self.largest(self.elementwise("negate", [code]), axes)])

    def dense(self, x: np.ndarray, weights: np.ndarray, biases: np.ndarray | None = None) -> np.ndarray:
        """Return the places of x Wᵀ + b, over the last axis of x, for weights W (outputs, window)."""
        outputs, window = weights.shape
        number, flipped = self.whole(weights), False
        if number is None:
            number, flipped = self.whole(weights.T), True
        of_biases = None if biases is None else self.whole(biases)
        if biases is not None and (of_biases is None or biases.shape != (outputs,)):
            return self.elementwise("add", [self.dense(x, weights), biases])
        if number is None:  # computed, once for each row
            y = self.product(x.reshape(-1, window), weights.T).reshape(*x.shape[:-1], outputs)
            return y if biases is None else self.elementwise("add", [y, biases])
        groups = self._groups(x.reshape(-1, window), "a layer runs over the batch")
        slots = self._slot(number), -1 if of_biases is None else self._slot(of_biases)
        numbers = Dense(len(groups.rows), window, window, outputs, *slots, flipped, channels=window)
        made = self.build.add("dense", (self._node(groups.rows, WIDEST),), len(groups.rows) * outputs, tuple(numbers))
        return groups.places(made, outputs).reshape(*x.shape[:-1], outputs)

    def moves(self, code: np.ndarray) -> bool:
        """Whether adjoints at places lead back to the states or to tensors, rather than to what is stopped."""
        for node in self.build.nodes[len(self._moving) :]:
            ways = getattr(OPERATIONS.get(node.operation), "adjoints", [node.operation != "largest"] * len(node.inputs))
            leads = (self._moving[i] for i, way in zip(node.inputs, ways, strict=True) if way)
            self._moving.append(node.operation in ("input", "load", "dense") or any(leads))
        return any(
            node < 0 or self._moving[node]
            for node in np.unique(np.where(code < 0, -1, (code & OF_SAMPLE) >> IN_NODE)).tolist()
        )

    def whole(self, code: np.ndarray) -> int | None:
        """Return the number of the tensor whose places these are, all of them in order; None if there is none."""
        flat = -1 - code.ravel()
        number = int(flat[0]) >> IN_NODE if flat.size else -1
        fits = number >= 0 and self._sizes[number] == flat.size
        return number if fits and (flat == (number << IN_NODE) + np.arange(flat.size)).all() else None

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the places of a (…, M, K) times b (…, K, N)."""
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shape = *lead, a.shape[-2], b.shape[-1]
        (m, inner), n = a.shape[-2:], b.shape[-1]
        a = np.broadcast_to(a, (*lead, m, inner)).reshape(-1, m, inner)
        b = np.broadcast_to(b, (*lead, inner, n)).reshape(-1, inner, n)
        if (b == b[:1]).all() and not _samples(b).any():  # one product for all rows of a sample
            groups = self._groups(a.reshape(-1, inner))
            first, second, count, m = groups.rows, self._loaded(b[0]), 1, len(groups.rows)
        else:
            both = np.concatenate([a.reshape(len(a), -1), b.reshape(len(b), -1)], 1)
            groups = self._groups(both, "it multiplies rows with each other")
            first, second = np.split(groups.rows, [m * inner], 1)
            count = len(groups.rows)
        size = count * m * n
        _limit(max(first.size, second.size, size), OF_WEIGHTS)
        made = self.build.add("product", (self._node(first), self._node(second)), size, (count, m, inner, n))
        return groups.places(made, size // len(groups.rows)).reshape(shape)


def _samples(code: np.ndarray) -> np.ndarray:
    """Return the sample of each place, counted from 1; 0 for what is the same for all rows."""
    return np.maximum(code, 0) >> IN_SAMPLE


def _limit(count: int, what: str, most: int = LONGEST) -> None:
    if count > most:
        raise Unreadable(what)
