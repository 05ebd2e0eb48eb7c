"""A row program: what a network computes of one row of states, in single static assignment.

A node is a vector of numbers of a row: its operation, the nodes that it takes, numbers that belong to it. Weights and
other numbers that come from tensors are read through slots, so that a program stays the same while they change.

| operation | takes | numbers | gives |
| --- | --- | --- | --- |
| input | | | the state |
| load | | slot, entries | numbers of a tensor, the same for all rows |
| constant | | the numbers | them |
| gather | nodes | (which node, which number) for each number | numbers of other nodes, in any order |
| dense | x | those of `Dense` | a layer |
| sum, largest | x | length of a group | a number for each group of x |
| product | a, b | groups, rows, inner size, columns | a (groups, rows, inner) times b (groups, inner, columns) |
| any of `operations.OPERATIONS` | operands of one size | its own | number by number |
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from warp_phys.programs.operations import FUSED, OPERATIONS

SAMPLES = 8
"""Samples of a block: they are unrolled together and share the weights that are loaded."""

FEW = 8
"""Most outputs of a last layer that is worth no register's width of outputs."""

PAD = 16
"""Widths of layers are padded to a multiple of this, as in native/layers.h."""


class Node(NamedTuple):
    """A vector of numbers of a row."""

    operation: str
    inputs: tuple[int, ...]
    size: int
    numbers: tuple = ()


class Dense(NamedTuple):
    """The numbers of a dense node: a layer on windows of its input, all with the same weights, and its activation."""

    positions: int
    """Number of windows."""
    window: int
    """Numbers of a window."""
    stride: int
    """Numbers from one window to the next."""
    outputs: int
    """Outputs of a window."""
    weights: int
    """Slot of the weights (outputs, window)."""
    biases: int
    """Slot of the biases, −1 for none."""
    flipped: bool
    """Whether the weights have shape (window, outputs) instead."""
    channels: int
    """A window's number k stands for the weight (k mod channels) · (window / channels) + k / channels of an output."""
    activation: str = "identity"

    @property
    def reach(self) -> int:
        """Numbers of the input that windows of a padded width take."""
        return (self.positions - 1) * self.stride + padded(self.window)

    @property
    def weight_at(self) -> str:
        """Where the weight of number k of a window and output o stands in its tensor, in C++."""
        k = f"(k % {self.channels} * {self.window // self.channels} + k / {self.channels})"
        return f"{k} * {self.outputs} + o" if self.flipped else f"o * {self.window} + {k}"

    @property
    def few(self) -> bool:
        """Whether there are too few outputs for vectors of outputs."""
        return self.positions == 1 and self.outputs <= FEW


def _multiply_adds(node: Node) -> int:
    if node.operation == "dense":
        dense = Dense(*node.numbers)
        return dense.positions * dense.window * dense.outputs
    if node.operation in ("input", "constant", "load", "gather"):
        return 0
    return node.size * (node.numbers[2] if node.operation == "product" else 1)


class Program:
    """Nodes, the first one the input, the last one the output. Equal ones have one hash: kernels are cached by it.

    Args:
        nodes: The nodes; each takes earlier ones.
        slots: How many numbers the tensor of each slot has.
    """

    def __init__(self, nodes: tuple[Node, ...], slots: tuple[int, ...]):
        self.nodes, self.slots, self._hash = nodes, slots, hash((nodes, slots))
        self.inputs = nodes[0].size
        """Numbers D of a state."""
        self.outputs = nodes[-1].size
        """Numbers K of a control."""
        self.readers = tuple(i for i, node in enumerate(nodes) if node.operation in ("dense", "load"))
        """The nodes that read slots."""
        of_readers = [nodes[i] for i in self.readers]
        read = [node.numbers[4:6] if node.operation == "dense" else node.numbers[:1] for node in of_readers]
        self.read: tuple[int, ...] = tuple(slot for slots in read for slot in slots)
        """The slots that they read, in turn; −1 where a dense node has no biases."""
        begins = itertools.accumulate(map(len, read), initial=0)
        self.first_read: dict[int, int] = dict(zip(self.readers, begins, strict=False))
        """Where in `read` the slots of each reader begin."""
        self.multiply_adds = sum(map(_multiply_adds, nodes))
        """Multiply-adds of one evaluation of one row, about."""

    def reached(self) -> tuple[bool, ...]:
        """Return, for each entry of `read`, whether adjoints of the output lead to it."""
        found = [False] * (len(self.nodes) - 1) + [True]
        for i, node in reversed(list(enumerate(self.nodes))):
            if found[i] and node.operation != "largest":
                adjoints = OPERATIONS[node.operation].adjoints if node.operation in OPERATIONS else None
                for k, j in enumerate(node.inputs):
                    found[j] = found[j] or adjoints is None or adjoints[k] != ""
        counts = [2 if self.nodes[i].operation == "dense" else 1 for i in self.readers]
        return tuple(found[i] for i, count in zip(self.readers, counts, strict=True) for _ in range(count))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Program) and (self.nodes, self.slots) == (other.nodes, other.slots)

    def __repr__(self) -> str:
        return f"Program({len(self.nodes)} nodes, {self._hash:x})"


class Builder:
    """Makes a program node by node; what is there already is not made again.

    Args:
        inputs: Numbers D of a state.
    """

    def __init__(self, inputs: int):
        self.nodes, self.slots = [Node("input", (), inputs)], []
        self._known: dict[Node, int] = {self.nodes[0]: 0}

    def slot(self, count: int) -> int:
        """Return a new slot for a tensor of so many numbers."""
        self.slots.append(count)
        return len(self.slots) - 1

    def add(self, operation: str, inputs: tuple[int, ...], size: int, numbers: tuple = ()) -> int:
        """Return a node."""
        if operation == "stop" and self.nodes[inputs[0]].operation == "derivative of":
            inputs = self.nodes[inputs[0]].inputs[:1]
        node = Node(operation, inputs, size, numbers)
        if operation in OPERATIONS:
            assert len(inputs) == len(OPERATIONS[operation].adjoints)
            assert all(self.nodes[i].size == size for i in inputs)
            if operation == "scale" and numbers == (0.0,):  # what it would make of infinity, a rollout refuses anyway
                return self.add("constant", (), size, (0.0,) * size)
        if node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return self._known[node]

    def gather(self, entries: list[tuple[int, int]]) -> int:
        """Return a node of numbers (node, which), that node itself if they are all of it."""
        first = entries[0][0]
        if entries == [(first, k) for k in range(self.nodes[first].size)]:
            return first
        inputs = tuple(dict.fromkeys(node for node, _ in entries))
        sources = {self.nodes[i].operation for i in inputs}
        if sources == {"constant"}:
            return self.add("constant", (), len(entries), tuple(self.nodes[i].numbers[k] for i, k in entries))
        if sources == {"load"} and len(slots := {self.nodes[i].numbers[0] for i in inputs}) == 1:
            places = tuple(self.nodes[i].numbers[1][k] for i, k in entries)
            return self.add("load", (), len(entries), (slots.pop(), places))
        return self.add("gather", inputs, len(entries), tuple((inputs.index(node), k) for node, k in entries))

    def finish(self, output: int) -> Program:
        """Return the program of all that leads to a node, which becomes its last one."""
        node = self.nodes[output]
        if node.operation in ("input", "load", "constant"):
            output = self.add("gather", (output,), node.size, tuple((0, k) for k in range(node.size)))
        nodes = _fused(_biased(self.nodes, self.slots, output), output)
        kept, stack = {0, output}, [output]
        while stack:
            for i in nodes[stack.pop()].inputs:
                if i not in kept:
                    kept.add(i)
                    stack.append(i)
        order = [i for i in sorted(kept) if i != output] + [output]
        number = {old: new for new, old in enumerate(order)}
        moved = [nodes[i]._replace(inputs=tuple(number[j] for j in nodes[i].inputs)) for i in order]
        return Program(tuple(moved), tuple(self.slots))


def _biased(nodes: list[Node], slots: list[int], output: int) -> list[Node]:
    """Return nodes in which dense nodes add the tensor that is added to them, if nothing else is made of them."""
    out, uses = list(nodes), Counter(i for node in nodes for i in node.inputs)
    uses[output] += 1
    for i, node in enumerate(nodes):
        for x, b in (node.inputs, node.inputs[::-1]) if node.operation == "add" else ():
            if out[x].operation == "dense" and uses[x] == 1 and out[b].operation == "load":
                dense, (slot, places) = Dense(*out[x].numbers), out[b].numbers
                whole = slots[slot] == dense.outputs and places == tuple(range(dense.outputs)) * dense.positions
                if whole and dense.biases < 0 and dense.activation == "identity":
                    out[i] = out[x]._replace(numbers=tuple(dense._replace(biases=slot)))
    return out


def _fused(nodes: list[Node], output: int) -> list[Node]:
    """Return nodes in which dense nodes apply the activation that is all that is made of them."""
    out, uses = list(nodes), Counter(i for node in nodes for i in node.inputs)
    uses[output] += 1
    for i, node in enumerate(nodes):
        if node.operation not in FUSED or node.numbers not in ((), (1.0,)) or uses[node.inputs[0]] > 1:
            continue
        sums = out[node.inputs[0]]
        if sums.operation == "dense" and Dense(*sums.numbers).activation == "identity":
            dense: Any = Dense(*sums.numbers)
            out[i] = sums._replace(numbers=tuple(dense._replace(activation=node.operation)))
    return out


def chain(sizes: Sequence[int], activation: str) -> Program:
    """Return dense layers of these sizes, D first and K last, with an activation after every layer but the last.

    The slots are weights (outputs, inputs) and biases in turn.

    >>> chain((4, 8, 1), "tanh").nodes[1].numbers
    (1, 4, 4, 8, 0, 1, False, 4, 'tanh')
    """
    builder, x = Builder(sizes[0]), 0
    for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        name = activation if i < len(sizes) - 2 else "identity"
        numbers = Dense(1, n, n, m, builder.slot(n * m), builder.slot(m), False, n, name)
        x = builder.add("dense", (x,), m, tuple(numbers))
    return builder.finish(x)


def padded(n: int) -> int:
    """Return the width that n numbers take."""
    return -(-n // PAD) * PAD
