"""Where the numbers of a row program stand in the memory of a CPU, and in which order its nodes are computed.

A row of a trajectory holds what is needed of each node behind it; adjoints have the same layout. Elementwise nodes of
one size are computed together, number by number, so that what only they need stays in registers: of these, a backward
pass keeps what is costly and computes again what is not. Runs of another node's numbers are read in place, and one
number as many is read as one. What does not depend on the state is computed once, when weights are packed, and stands
behind them.
"""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from warp_phys.programs.operations import KEPT_SLOPES, OPERATIONS, Operation
from warp_phys.programs.program import SAMPLES, Dense, Program, padded

CHUNK_NUMBERS = 16384
"""Numbers of a flow's rows that a backward pass works on at a time: they stay in the second-level cache."""

MOST = 32
"""Most nodes that are computed together: registers are few."""

CHEAP = {"clamped", "larger", "smaller", "one_where"}
"""Functions that are worth no memory."""


class Stage(NamedTuple):
    """Nodes that are computed together: one, or a group of elementwise ones and sums over them."""

    size: int
    """Numbers of each node of a group; 0 for a node of another kind."""
    nodes: list[int]


class Place(NamedTuple):
    """Where a node's numbers are found: in another one's, from one on, or that one as many."""

    node: int
    first: int
    repeated: bool


class Layout:
    """Offsets and stages of a program.

    Args:
        program: The program.
    """

    def __init__(self, program: Program):
        self.program = program
        self.trained, self.moving = _leads_to(program, "dense", "load"), _leads_to(program, "input")
        self.static = [not moving for moving in self.moving[:-1]] + [False]
        """Which nodes do not depend on the state."""
        self.places = _places(program)
        """Where the numbers of gathers are found that need not be copied."""
        self.copied = {i for i, place in self.places.items() if place.repeated and _taken_whole(program, i)}
        """Gathers that are copied for some of those that take them."""
        self.stages = self._make_stages(static=False)
        self.static_stages = self._make_stages(static=True)
        self.stored = self._choose_stored()
        """Nodes of groups whose values are in memory."""
        self._make_weights()
        self._make_rows()

    def place(self, j: int) -> Place:
        """Return where an elementwise node finds the numbers of node j."""
        return self.places.get(j, Place(j, 0, False))

    def base(self, j: int) -> Place:
        """Return where nodes that are not elementwise find the numbers of node j."""
        return Place(j, 0, False) if j in self.copied else self.place(j)

    def wanted(self, j: int) -> bool:
        """Whether an adjoint of node j is of any use."""
        return self.trained[j] or self.moving[j]

    def kept_slopes(self, i: int) -> bool:
        """Whether the slopes of the activation of a dense node are kept."""
        node = self.program.nodes[i]
        return node.operation == "dense" and Dense(*node.numbers).activation in KEPT_SLOPES

    def _make_stages(self, static: bool) -> list[Stage]:
        stages: list[Stage] = []
        found: dict[int, int] = {}
        for i, node in enumerate(self.program.nodes):
            if self.static[i] != static or node.operation in ("input", "load", "constant"):
                continue
            if i in self.places and i not in self.copied:
                continue
            size = member_size(self.program, i)
            if not size:
                found[i] = len(stages)
                stages.append(Stage(0, [i]))
                continue
            least = 0
            for j in node.inputs:
                base = self.place(j).node
                if base in found:
                    stage = stages[found[base]]
                    beside = j == base and stage.size == size and node_is_elementwise(self.program, j)
                    least = max(least, found[base] + (not beside))
            fits = (s for s in range(least, len(stages)) if stages[s].size == size and len(stages[s].nodes) < MOST)
            found[i] = next(fits, len(stages))
            if found[i] == len(stages):
                stages.append(Stage(size, []))
            stages[found[i]].nodes.append(i)
        return stages

    def bases(self, i: int) -> set[int]:
        """Return the nodes whose memory node i reads."""
        node = self.program.nodes[i]
        if node.operation == "gather":
            return {base for base, _ in self.entries(i)}
        find = self.place if member_size(self.program, i) else self.base
        return {find(j).node for j in node.inputs}

    def _choose_stored(self) -> set[int]:
        nodes, stored = self.program.nodes, {len(self.program.nodes) - 1}
        every = [*self.stages, *self.static_stages]
        for stage in every:
            beside = {j for j in stage.nodes if node_is_elementwise(self.program, j)} if stage.size else set()
            for i in stage.nodes:
                read = self.bases(i)
                if stage.size:  # what is made beside it is read from registers
                    read -= {j for j in nodes[i].inputs if j in beside}
                stored |= read | ({i} if nodes[i].operation == "sum" else set())
        for stage in every:
            if stage.size:
                self._keep_for_adjoints(stage, stored)
        return stored

    def _keep_for_adjoints(self, stage: Stage, stored: set[int]) -> None:
        needed: set[int] = set()
        for i in stage.nodes:
            node = self.program.nodes[i]
            if node.operation in OPERATIONS:
                for j, adjoint in zip(node.inputs, OPERATIONS[node.operation].adjoints, strict=True):
                    if self.wanted(j):
                        needed |= {i if name == "y" else node.inputs["abc".index(name)] for name in names_in(adjoint)}
        for i in reversed(stage.nodes):
            if i in needed and i not in stored:
                node = self.program.nodes[i]
                if is_cheap(OPERATIONS[node.operation]):
                    needed |= set(node.inputs)
                else:
                    stored.add(i)

    def entries(self, i: int) -> list[tuple[int, int]]:
        """Return the numbers of a gather as (node, which), of nodes that are in memory."""
        node = self.program.nodes[i]
        return _entries(node.inputs, node.numbers, self.places)

    def _make_weights(self) -> None:
        program, packed, transposed = self.program, [0], [0]
        for i in program.readers:
            node, own, back = program.nodes[i], 0, 0
            if node.operation == "dense":
                dense = Dense(*node.numbers)
                columns = dense.outputs * padded(dense.window), dense.window * padded(dense.outputs)
                own, back = padded(dense.outputs) + columns[not dense.few], 0 if dense.few else columns[0]
            packed.append(packed[-1] + own)
            transposed.append(transposed[-1] + back)
        self.statics = packed[-1]
        """Where the numbers that do not depend on the state begin, behind the packed weights."""
        held = [i for i, static in enumerate(self.static) if static and self._is_held(i)]
        self.static_at, length = self._offsets(held)
        self.packed, self.transposed = (*packed[:-1], packed[-1] + length), tuple(transposed)
        """Where the numbers of each reader start in the packed weights, and in the transposed ones; then the length."""

    def _make_rows(self) -> None:
        nodes = self.program.nodes
        own = [i for stage in self.stages for i in stage.nodes]
        used = {base for i in own for base in self.bases(i)}
        whole = {base for i in own if not member_size(self.program, i) for base in self.bases(i)}
        self.spread = [i for i in sorted(whole) if self.static[i]]
        """What does not depend on the state and is copied into each row."""
        held = [i for i in range(len(nodes)) if (i in used if self.static[i] else self._is_held(i))]
        self.at, self.row = self._offsets(held)
        """Where each node starts in a row, and the length of a row."""
        self.output = self.at[len(nodes) - 1]
        """Where the controls start in a row."""
        self.chunk = max(SAMPLES, min(64, CHUNK_NUMBERS // self.row))
        """Rows that a backward pass takes at a time, if it can choose."""

    def _is_held(self, i: int) -> bool:
        if member_size(self.program, i):
            return i in self.stored
        return i not in self.places or i in self.copied

    def _offsets(self, held: list[int]) -> tuple[dict[int, int], int]:
        """Return where nodes start that stand in memory one behind the other, and the length of all."""
        nodes, room = self.program.nodes, {i: padded(self.program.nodes[i].size) for i in held}
        for i, node in enumerate(nodes):
            if node.operation == "dense":
                dense, (base, first, _) = Dense(*node.numbers), self.base(node.inputs[0])
                if i in room:
                    room[i] = max(room[i], padded((dense.positions - 1) * dense.outputs + padded(dense.outputs)))
                if base in room:
                    room[base] = max(room[base], padded(first + dense.reach))
        at, length = {}, 0
        for i in held:
            at[i] = length
            length += room[i] * (2 if self.kept_slopes(i) else 1)
        self.slopes = getattr(self, "slopes", {}) | {i: room[i] for i in held if self.kept_slopes(i)}
        """How far behind its values the slopes of a dense node's activation are kept."""
        return at, length


@functools.cache
def layout_of(program: Program) -> Layout:
    """Return the layout of a program."""
    return Layout(program)


def node_is_elementwise(program: Program, i: int) -> bool:
    """Whether a node is an operation on numbers."""
    return program.nodes[i].operation in OPERATIONS


def member_size(program: Program, i: int) -> int:
    """Return the numbers of a node that can be computed together with others: elementwise, or one sum; else 0."""
    node = program.nodes[i]
    if node.operation == "sum" and node.size == 1:
        return program.nodes[node.inputs[0]].size
    return node.size if node.operation in OPERATIONS else 0


def names_in(expression: str) -> set[str]:
    """Return which of the operands a, b, c and the value y an expression of `operations` takes."""
    return set(re.findall(r"\b[abcy]\b", expression))


def is_cheap(operation: Operation) -> bool:
    """Whether a value is computed again rather than kept."""
    return "/" not in operation.value and set(re.findall(r"(\w+)[<(]", operation.value)) <= CHEAP


def _leads_to(program: Program, *operations: str) -> list[bool]:
    found: list[bool] = []
    for node in program.nodes:
        found.append(node.operation in operations or any(found[i] for i in node.inputs))
    return found


def _entries(inputs: tuple[int, ...], numbers: tuple, places: dict[int, Place]) -> list[tuple[int, int]]:
    entries = []
    for which, k in numbers:
        node, first, repeated = places.get(inputs[which], Place(inputs[which], 0, False))
        entries.append((node, first if repeated else first + k))
    return entries


def _places(program: Program) -> dict[int, Place]:
    nodes, places = program.nodes, {}
    for i, node in enumerate(nodes[:-1]):
        if node.operation != "gather":
            continue
        entries = _entries(node.inputs, node.numbers, places)
        base, first = entries[0]
        size = nodes[base].size
        if entries == [(base, first + k) for k in range(node.size)]:
            # what is written to in whole vectors must not reach into numbers behind it
            ends = node.size % padded(1) == 0 or first + node.size == size
            if ends and first + padded(node.size) <= padded(size):
                places[i] = Place(base, first, False)
                continue
        if len(set(entries)) == 1:
            places[i] = Place(base, first, True)
    return places


def _taken_whole(program: Program, i: int) -> bool:
    return any(
        i in node.inputs and node.operation != "gather" and not member_size(program, k)
        for k, node in enumerate(program.nodes)
    )


def runs(sources: list[int]) -> Iterator[tuple[int, int, int]]:
    """Return (first target, first source, length) of numbers that stand side by side in source and target.

    >>> list(runs([4, 5, 9]))
    [(0, 4, 2), (2, 9, 1)]
    """
    first = 0
    for k in range(1, len(sources) + 1):
        if k == len(sources) or sources[k] != sources[k - 1] + 1:
            yield first, sources[first], k - first
            first = k
