"""Row programs out of functions of batches: operations on arrays that hold where numbers come from.

A place is an integer: sample, node and position in it, of a number that is computed; or, below zero, tensor and
position in it, of a number of a tensor. So layout (views, transposes, slices, concatenations, whatever they do to the
batch dimension) is the business of whatever moves integers, and what is left are the operations on numbers, each of
which must take its operands from one sample.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from warp_phys.programs.operations import OPERATIONS
from warp_phys.programs.program import Builder, Dense

LONGEST = 4096
"""Most numbers of a node that is no dense layer's."""

LARGEST = 1 << 22
"""Most numbers of an array of places."""

IN_NODE, IN_SAMPLE = 24, 44
"""Bits of a place's position in its node or tensor; and of node and position."""

POSITION, OF_SAMPLE = (1 << IN_NODE) - 1, (1 << IN_SAMPLE) - 1


class Unreadable(Exception):
    """A function is no row program; the message says why, in one sentence."""


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
        self._sizes: list[int] = []
        self._slots: dict[int, int] = {}
        self._moving: list[bool] = []

    def states(self) -> np.ndarray:
        """Return the places of the states, shape (samples, D)."""
        sample = np.arange(1, self.samples + 1)[:, None] << IN_SAMPLE
        return sample + np.arange(self.build.nodes[0].size)

    def tensor(self, value: Any, shape: Sequence[int]) -> np.ndarray:
        """Return the places of a tensor, which gets a slot once its numbers are used."""
        self.tensors.append(value)
        self._sizes.append(math.prod(shape))
        places = (len(self.tensors) - 1 << IN_NODE) + np.arange(self._sizes[-1])
        return (-1 - places).reshape(tuple(shape))

    def constant(self, values: Any) -> np.ndarray:
        """Return the places of numbers that stand in the program; equal ones have one."""
        values = np.asarray(values, np.float64)
        bits, index = np.unique(values.reshape(-1).view(np.int64), return_inverse=True)
        _limit(len(bits), "it holds a large tensor that is no parameter")
        node = self.build.add("constant", (), len(bits), tuple(bits.view(np.float64).tolist()))
        return ((node << IN_NODE) + index).reshape(values.shape)

    def finish(self, output: np.ndarray) -> tuple[Any, tuple[Any, ...]]:
        """Return the program whose controls stand at places (samples, K), and what its slots read in turn, or None."""
        (node,), sample = self.together([output])
        if sample is not None and (sample != np.arange(1, self.samples + 1)[:, None]).any():
            raise Unreadable("it returns its rows in another order")
        program = self.build.finish(node)
        of_slot = {slot: self.tensors[number] for number, slot in self._slots.items()}
        return program, tuple(None if slot < 0 else of_slot[slot] for slot in program.read)

    # --- samples and nodes

    def together(self, codes: Sequence[np.ndarray]) -> tuple[tuple[int, ...], np.ndarray | None]:
        """Return nodes with the numbers of arrays of one shape, place by place, and the sample of each place.

        The samples are None where all is the same for all of them.

        Raises:
            Unreadable: Samples do not take the same places, or places of each other.
        """
        codes = [self._loaded(code) for code in codes]
        owners = [code >> IN_SAMPLE for code in codes]
        sample: Any = np.maximum.reduce(owners)
        if not sample.any():
            return tuple(self._gathered(code.ravel()) for code in codes), None
        if any(((own > 0) & (own != sample)).any() for own in owners):
            raise Unreadable("its rows depend on each other, or on their number")
        sample = self._completed(sample)
        order, nodes = self._order(sample), []
        for code in codes:
            rows = (code & OF_SAMPLE).ravel()[order]
            if (rows != rows[0]).any():
                raise Unreadable("its rows do not all take the same way, or have numbers of their own")
            nodes.append(self._gathered(rows[0]))
        return tuple(nodes), sample

    def _gathered(self, row: np.ndarray) -> int:
        _limit(len(row), "it has too many numbers between its layers")
        return self.build.gather(list(zip((row >> IN_NODE).tolist(), (row & POSITION).tolist(), strict=True)))

    def _completed(self, sample: np.ndarray) -> np.ndarray:
        """Return samples with those of numbers that are the same for all, which stand among rows: by their position."""
        if sample.all():
            return sample
        for axis in range(sample.ndim):
            if sample.shape[axis] == self.samples:
                shape = [-1 if d == axis else 1 for d in range(sample.ndim)]
                position = np.broadcast_to(np.arange(1, self.samples + 1).reshape(shape), sample.shape)
                if ((sample == 0) | (sample == position)).all():
                    return position
        raise Unreadable("it joins what is the same for all rows with rows in one tensor")

    def _order(self, sample: np.ndarray) -> np.ndarray:
        """Return the positions of each sample in order, shape (samples, …)."""
        flat = sample.ravel()
        _limit(flat.size, "its batches are too large", LARGEST)
        if (np.bincount(flat, minlength=self.samples + 1)[1:] * self.samples != flat.size).any():
            raise Unreadable("its rows are not all treated alike")
        return np.argsort(flat, kind="stable").reshape(self.samples, -1)

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
            _limit(len(places), "it computes with a large tensor of weights, other than as a dense layer's")
            node = self.build.add("load", (), len(places), (self._slot(number), tuple(places.tolist())))
            loaded[own] = (node << IN_NODE) + index
        code[below] = loaded
        return code

    def _slot(self, number: int) -> int:
        if number not in self._slots:
            self._slots[number] = self.build.slot(self._sizes[number])
        return self._slots[number]

    def spread(self, node: int, sample: np.ndarray | None, shape: Sequence[int]) -> np.ndarray:
        """Return the places of a node whose numbers stand, sample by sample, where `sample` says."""
        if sample is None:
            return ((node << IN_NODE) + np.arange(math.prod(shape))).reshape(tuple(shape))
        order, code = self._order(sample), np.empty(sample.size, np.int64)
        first = (np.arange(1, self.samples + 1)[:, None] << IN_SAMPLE) + (node << IN_NODE)
        code[order] = first + np.arange(order.shape[1])
        return code.reshape(tuple(shape))

    # --- operations

    def elementwise(self, operation: str, operands: Sequence[Any], *numbers: float) -> np.ndarray:
        """Return the places of an operation on operands that are broadcast: arrays of places, or numbers."""
        codes = np.broadcast_arrays(*(o if isinstance(o, np.ndarray) else self.constant(o) for o in operands))
        nodes, sample = self.together(codes)
        made = self.build.add(operation, nodes, self.build.nodes[nodes[0]].size, tuple(map(float, numbers)))
        return self.spread(made, sample, codes[0].shape)

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
        (node,), sample = self.together([code.transpose(*others, *axes)])
        if sample is not None:
            sample = sample.reshape(-1, length)
            if (sample != sample[:, :1]).any():
                raise Unreadable("it reduces over the batch")
            sample = sample[:, 0]
        made = self.build.add(operation, (node,), self.build.nodes[node].size // length, (length,))
        return self.spread(made, sample, kept)

    def dense(self, x: np.ndarray, weights: int, outputs: int, flipped: bool, biases: int | None = None) -> np.ndarray:
        """Return the places of x Wᵀ + b over the last axis of x.

        Args:
            x: Places (…, window).
            weights: Number of the tensor W (outputs, window), or (window, outputs) if it is `flipped`.
            outputs: Outputs of a window.
            flipped: As said.
            biases: Number of the tensor b (outputs,).
        """
        window = x.shape[-1]
        (node,), sample = self.together([x.reshape(-1, window)])
        if sample is None:
            raise Unreadable("a layer's input is the same for all rows")
        if (sample != sample[:, :1]).any():
            raise Unreadable("a layer runs over the batch")
        positions = self.build.nodes[node].size // window
        slots = self._slot(weights), -1 if biases is None else self._slot(biases)
        numbers = Dense(positions, window, window, outputs, *slots, flipped, channels=window)
        made = self.build.add("dense", (node,), positions * outputs, tuple(numbers))
        return self.spread(made, np.broadcast_to(sample[:, :1], (len(sample), outputs)), (*x.shape[:-1], outputs))

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
        (m, inner), n = a.shape[-2:], b.shape[-1]
        a = np.broadcast_to(a, (*lead, m, inner)).reshape(-1, m, inner)
        b = np.broadcast_to(b, (*lead, inner, n)).reshape(-1, inner, n)
        ((first,), of_first), ((second,), of_second) = self.together([a]), self.together([b])
        if of_first is None or of_second is None:
            raise Unreadable("it multiplies rows by a matrix that is no layer's")
        owner = of_first[:, :1, :1]
        if (of_first != owner).any() or (of_second != owner).any():
            raise Unreadable("it multiplies rows with each other")
        groups = self.build.nodes[first].size // (m * inner)
        made = self.build.add("product", (first, second), groups * m * n, (groups, m, inner, n))
        return self.spread(made, np.broadcast_to(owner, (len(a), m, n)), (*lead, m, n))


def _limit(count: int, what: str, most: int = LONGEST) -> None:
    if count > most:
        raise Unreadable(what)
