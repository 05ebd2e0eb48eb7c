"""C++ for a block of threads from a row program: the bodies of functions that `block_kernels` puts into its kernels.

A block has a tile of samples, and goes through the nodes together: a node is a loop over its numbers, of which each
thread takes some, neighbours next to each other. `native/blocks.h` has the products of matrices. Number k of sample s
of a node that starts at `places` stands at (place + k) · tile + s, and so does its adjoint.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from warp_phys.programs.block_plan import layer_parts, max_numbers, places, weight_starts
from warp_phys.programs.native_code import literal
from warp_phys.programs.operations import OPERATIONS
from warp_phys.programs.program import Dense, Node, Program

ROOM = -1
"""Stands for the memory of the sums of parts, where nodes are listed."""

RUNS = 4
"""Most runs of numbers side by side that are told apart by comparisons rather than by a table."""


class Loop(NamedTuple):
    """Something that is done for each number of a node by the thread that has it."""

    body: str
    """C++ for number i of all samples."""
    writes: int
    """The node whose numbers, or adjoints, it writes; the loop is over these."""
    own: tuple[int, ...] = ()
    """Further nodes of that size, of which it reads number i."""
    others: tuple[int, ...] = ()
    """Nodes of which it reads numbers that other threads may have written."""


class Layer(NamedTuple):
    """A product with a matrix of weights, for which the threads share out the work in a way of their own."""

    call: str
    """C++ for all numbers."""
    writes: int
    """The node whose numbers, or adjoints, it writes."""
    reads: int
    """The node that it reads."""
    parts: bool
    """Whether it puts sums of parts into the room for them."""


class _Stages:
    """Puts loops and layers one after the other, and a barrier where a thread needs what another one has written."""

    def __init__(self, tile: int, program: Program):
        self.tile, self.program, self.lines = tile, program, list[str]()
        self._fresh: dict[int, bool] = {}  # what was written since the last barrier: whether number i by thread i alone
        self._open = 0  # numbers of the loop that further bodies may join

    def add(self, stage: Loop | Layer) -> None:
        if isinstance(stage, Layer):
            touched = {stage.reads, stage.writes} | ({ROOM} if stage.parts else set())
            self._wait_for(touched)
            self._close()
            self.lines.append(stage.call)
            self._fresh |= dict.fromkeys(touched - {stage.reads}, False)
            return
        own = {stage.writes, *stage.own}
        self._wait_for({*stage.others, *(node for node in own if not self._fresh.get(node, True))})
        size = self.program.nodes[stage.writes].size
        if self._open != size:
            self._close()
            self.lines += ["#pragma unroll 1", f"for (int i = thread; i < {size * self.tile}; i += threads) {{"]
            self._open = size
        self.lines.append(f"    {{ {stage.body} }}")
        self._fresh[stage.writes] = self._fresh.get(stage.writes, True)

    def finish(self) -> list[str]:
        """Return all lines; behind them every thread sees everything."""
        self._close()
        return [*self.lines, "barrier();"]

    def _wait_for(self, nodes: Iterable[int]) -> None:
        if any(node in self._fresh for node in nodes):
            self._close()
            self.lines.append("barrier();")
            self._fresh = {}

    def _close(self) -> None:
        if self._open:
            self.lines.append("}")
            self._open = 0


class _Code:
    """A program's code for blocks of a tile of samples; values are at r, adjoints at adj, packed weights at weights."""

    def __init__(self, program: Program, scalar: str, tile: int):
        self.program, self.scalar, self.tile = program, scalar, tile
        self.at = [place * tile for place in places(program)]
        self.weights = dict(zip(program.readers, weight_starts(program), strict=False))
        self.tables: list[str] = []

    def heads(self) -> list[str]:
        """Return the lines that stand in front."""
        return [
            "using namespace warp_phys;",
            f"typedef {self.scalar} T; typedef T V;",
            f"constexpr int TILE = {self.tile};",
            *self.tables,
        ]

    def table(self, name: str, kind: str, numbers: Iterable[str]) -> str:
        """Keep a table and return its name."""
        self.tables.append(f"static const {kind} {name}[] = {{{', '.join(numbers)}}};")
        return name

    def layer(self, i: int) -> str:
        """Return the C++ type of a dense node."""
        d = Dense(*self.program.nodes[i].numbers)
        return f"BlockLayer<T, TILE, {d.positions}, {d.window}, {d.stride}, {d.outputs}>"


def _operands(code: _Code, node: Node) -> str:
    """Return the declarations of number i of the operands."""
    names = zip("abc", node.inputs, strict=False)
    return " ".join(f"[[maybe_unused]] const V {name} = r[{code.at[j]} + i];" for name, j in names)


def _runs(entries: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Return (first target, first source, length) of (target, source) that go on side by side."""
    first = 0
    for k in range(1, len(entries) + 1):
        if k == len(entries) or entries[k] != (entries[k - 1][0] + 1, entries[k - 1][1] + 1):
            yield *entries[first], k - first
            first = k


class _Kind:
    """A kind of node: its value, and what its adjoint adds to those of its operands."""

    def value(self, code: _Code, i: int) -> Loop | Layer:
        raise NotImplementedError

    def adjoints(self, code: _Code, i: int, wanted: set[int]) -> Iterator[Loop | Layer]:
        """Return what adds to the adjoints of those operands that are wanted."""
        yield from ()


class _Elementwise(_Kind):
    def value(self, code: _Code, i: int) -> Loop:
        node = code.program.nodes[i]
        value = OPERATIONS[node.operation].value.format(*map(literal, node.numbers))
        return Loop(f"{_operands(code, node)} r[{code.at[i]} + i] = {value};", i, node.inputs)

    def adjoints(self, code: _Code, i: int, wanted: set[int]) -> Iterator[Loop]:
        node, numbers = code.program.nodes[i], [literal(n) for n in code.program.nodes[i].numbers]
        for j, adjoint in zip(node.inputs, OPERATIONS[node.operation].adjoints, strict=True):
            if adjoint and j in wanted:
                own = f"[[maybe_unused]] const V y = r[{code.at[i]} + i], d = adj[{code.at[i]} + i];"
                yield Loop(
                    f"{_operands(code, node)} {own} adj[{code.at[j]} + i] += {adjoint.format(*numbers)};", j, (i,)
                )


class _Load(_Kind):
    def value(self, code: _Code, i: int) -> Loop:
        return Loop(f"r[{code.at[i]} + i] = weight_at(weights + {code.weights[i]} + i / TILE);", i)


class _Constant(_Kind):
    def value(self, code: _Code, i: int) -> Loop:
        table = code.table(f"values{i}", "T", map(literal, code.program.nodes[i].numbers))
        return Loop(f"r[{code.at[i]} + i] = {table}[i / TILE];", i)


class _Gather(_Kind):
    def value(self, code: _Code, i: int) -> Loop:
        node = code.program.nodes[i]
        entries = [(k, code.at[node.inputs[j]] // code.tile + source) for k, (j, source) in enumerate(node.numbers)]
        runs = list(_runs(entries))
        if len(runs) <= RUNS:
            shifts = [f"{(source - target) * code.tile}" for target, source, _ in runs]
            tests = [f"i < {(target + length) * code.tile} ? " for target, _, length in runs[:-1]]
            shift = "".join(f"{test}{s} : " for test, s in zip(tests, shifts, strict=False)) + shifts[-1]
            return Loop(f"r[{code.at[i]} + i] = r[i + ({shift})];", i, (), node.inputs)
        table = code.table(f"from{i}", "int", (str(source) for _, source in entries))
        return Loop(f"r[{code.at[i]} + i] = r[{table}[i / TILE] * TILE + i % TILE];", i, (), node.inputs)

    def adjoints(self, code: _Code, i: int, wanted: set[int]) -> Iterator[Loop]:
        node = code.program.nodes[i]
        for number, j in enumerate(node.inputs):
            if j not in wanted:
                continue
            entries = [(k, source) for k, (which, source) in enumerate(node.numbers) if which == number]
            runs = list(_runs(entries))
            if len(runs) <= RUNS:
                for target, source, length in runs:
                    low, high = source * code.tile, (source + length) * code.tile
                    shift = code.at[i] + (target - source) * code.tile
                    test = f"if (i >= {low} && i < {high}) " if length < code.program.nodes[j].size else ""
                    yield Loop(f"{test}adj[{code.at[j]} + i] += adj[i + ({shift})];", j, (), (i,))
                continue
            targets = [[k for k, source in entries if source == number] for number in range(code.program.nodes[j].size)]
            starts = [0]
            for own in targets:
                starts.append(starts[-1] + len(own))
            into = code.table(f"into{i}_{j}", "int", (str(k) for own in targets for k in own))
            first = code.table(f"first{i}_{j}", "int", map(str, starts))
            yield Loop(
                f"T sum = 0; for (int k = {first}[i / TILE]; k < {first}[i / TILE + 1]; ++k) "
                f"sum += adj[{code.at[i]} + {into}[k] * TILE + i % TILE]; adj[{code.at[j]} + i] += sum;",
                j, (), (i,),
            )  # fmt: skip


class _Sum(_Kind):
    def value(self, code: _Code, i: int) -> Loop:
        (x,), (length,) = code.program.nodes[i].inputs, code.program.nodes[i].numbers
        number = f"r[{code.at[x]} + (i / TILE * {length} + k) * TILE + i % TILE]"
        return Loop(
            f"T sum = 0; for (int k = 0; k < {length}; ++k) sum += {number}; r[{code.at[i]} + i] = sum;", i, (), (x,)
        )

    def adjoints(self, code: _Code, i: int, wanted: set[int]) -> Iterator[Loop]:
        (x,), (length,) = code.program.nodes[i].inputs, code.program.nodes[i].numbers
        yield Loop(f"adj[{code.at[x]} + i] += adj[{code.at[i]} + i / TILE / {length} * TILE + i % TILE];", x, (), (i,))


class _Largest(_Kind):
    def value(self, code: _Code, i: int) -> Loop:
        (x,), (length,) = code.program.nodes[i].inputs, code.program.nodes[i].numbers
        return Loop(
            f"const T* x = r + {code.at[x]} + i / TILE * {length} * TILE + i % TILE; T best = x[0]; "
            f"for (int k = 1; k < {length}; ++k) best = x[k * TILE] > best ? x[k * TILE] : best; "
            f"r[{code.at[i]} + i] = best;",
            i, (), (x,),
        )  # fmt: skip


class _Product(_Kind):
    """y[g, m, n] = Σ_k a[g, m, k] b[g, k, n]."""

    def value(self, code: _Code, i: int) -> Loop:
        a, b = code.program.nodes[i].inputs
        _, m, inner, n = code.program.nodes[i].numbers
        number = f"const int s = i % TILE, row = i / TILE / {n}, column = i / TILE % {n}, group = row / {m}"
        factors = (
            f"r[{code.at[a]} + (row * {inner} + k) * TILE + s]",
            f"r[{code.at[b]} + ((group * {inner} + k) * {n} + column) * TILE + s]",
        )
        return Loop(f"{number}; {self._sum(inner, factors)} r[{code.at[i]} + i] = sum;", i, (), (a, b))

    def adjoints(self, code: _Code, i: int, wanted: set[int]) -> Iterator[Loop]:
        a, b = code.program.nodes[i].inputs
        _, m, inner, n = code.program.nodes[i].numbers
        if a in wanted:
            number = f"const int s = i % TILE, row = i / TILE / {inner}, k = i / TILE % {inner}, group = row / {m}"
            factors = (
                f"adj[{code.at[i]} + (row * {n} + j) * TILE + s]",
                f"r[{code.at[b]} + ((group * {inner} + k) * {n} + j) * TILE + s]",
            )
            yield Loop(f"{number}; {self._sum(n, factors, 'j')} adj[{code.at[a]} + i] += sum;", a, (), (i,))
        if b in wanted:
            number = f"const int s = i % TILE, row = i / TILE / {n}, j = i / TILE % {n}"
            number += f", group = row / {inner}, k = row % {inner}"
            factors = (
                f"r[{code.at[a]} + ((group * {m} + l) * {inner} + k) * TILE + s]",
                f"adj[{code.at[i]} + ((group * {m} + l) * {n} + j) * TILE + s]",
            )
            yield Loop(f"{number}; {self._sum(m, factors, 'l')} adj[{code.at[b]} + i] += sum;", b, (), (i,))

    @staticmethod
    def _sum(length: int, factors: tuple[str, str], k: str = "k") -> str:
        return f"T sum = 0; for (int {k} = 0; {k} < {length}; ++{k}) sum += {' * '.join(factors)};"


class _DenseKind(_Kind):
    def value(self, code: _Code, i: int) -> Layer:
        (x,), (parts, _) = code.program.nodes[i].inputs, layer_parts(code.program, i)
        activation = Dense(*code.program.nodes[i].numbers).activation
        value = "a" if activation == "identity" else OPERATIONS[activation].value.format()
        call = (
            f"{code.layer(i)}::template forward<{parts}>(thread, threads, r + {code.at[x]}, "
            f"weights + {code.weights[i]}, r + {code.at[-1]}, r + {code.at[i]}, [](V a) -> V {{ return {value}; }});"
        )
        return Layer(call, i, x, parts > 1)

    def adjoints(self, code: _Code, i: int, wanted: set[int]) -> Iterator[Loop | Layer]:
        (x,), (_, parts) = code.program.nodes[i].inputs, layer_parts(code.program, i)
        activation = Dense(*code.program.nodes[i].numbers).activation
        if activation != "identity":
            own = f"[[maybe_unused]] const V y = r[{code.at[i]} + i], d = adj[{code.at[i]} + i];"
            yield Loop(f"{own} adj[{code.at[i]} + i] = {OPERATIONS[activation].adjoints[0].format()};", i)
        if x in wanted:
            call = (
                f"{code.layer(i)}::template pull<{parts}>(thread, threads, adj + {code.at[i]}, "
                f"weights + {code.weights[i]}, adj + {code.at[-1]}, adj + {code.at[x]});"
            )
            yield Layer(call, x, i, parts > 1)


KINDS: dict[str, _Kind] = {
    **dict.fromkeys(OPERATIONS, _Elementwise()),
    "load": _Load(), "constant": _Constant(), "gather": _Gather(), "sum": _Sum(), "largest": _Largest(),
    "product": _Product(), "dense": _DenseKind(),
}  # fmt: skip
"""The kinds of nodes by operation; the input is there before."""


def evaluate_lines(program: Program, scalar: str, tile: int, memory: str) -> list[str]:
    """Return the body that computes all nodes of a block's tile from the input, at the memory of an expression."""
    code, stages = _Code(program, scalar, tile), _Stages(tile, program)
    for i, node in enumerate(program.nodes):
        if node.operation != "input":
            stages.add(KINDS[node.operation].value(code, i))
    return [*code.heads(), "const T* weights = packed.data;", f"T* r = {memory};", *stages.finish()]


def pull_lines(program: Program, scalar: str, tile: int) -> list[str]:
    """Return the body that takes adjoints of the output of a block's tile back to every node, all others being zero."""
    code, stages, size = _Code(program, scalar, tile), _Stages(tile, program), tile * max_numbers(program)
    active = _active(program)
    for i, node in reversed(list(enumerate(program.nodes))):
        if node.operation != "input":
            for stage in KINDS[node.operation].adjoints(code, i, active):
                stages.add(stage)
    return [
        *code.heads(),
        "const T* weights = packed.data;",
        f"const T* r = rows.data + (long long)block * {size};",
        f"T* adj = deltas.data + (long long)block * {size};",
        *stages.finish(),
    ]


def _active(program: Program) -> set[int]:
    """Return the nodes that lead back to the input or to weights: whose adjoints are of use."""
    found: set[int] = set()
    for i, node in enumerate(program.nodes):
        if node.operation in ("input", "dense", "load") or not found.isdisjoint(node.inputs):
            found.add(i)
    return found


def pack_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that reads number i of the packed weights from the tensors, given by their addresses in turn."""
    starts, entries, tables, lines = weight_starts(program), program.first_read, [], []
    for reader, i in enumerate(program.readers):
        node, first, entry = program.nodes[i], starts[reader], entries[i]
        lines += [f"if (i < {starts[reader + 1]}) {{", f"const T* w = (const T*)addresses.data[{entry}];"]
        if node.operation == "load":
            tables.append(f"static const int which{i}[] = {{{', '.join(map(str, node.numbers[1]))}}};")
            lines.append(f"packed.data[i] = w[which{i}[i - {first}]]; }} else")
            continue
        dense = Dense(*node.numbers)
        own, size = dense.outputs, dense.outputs * dense.window
        lines += [
            f"const T* b = (const T*)addresses.data[{entry + 1}];",
            f"const int j = i - {first + own}, back = j - {size};",
            f"const int o = j < 0 ? j + {own} : back < 0 ? j % {own} : back / {dense.window};",
            f"const int k = back < 0 ? j / {own} : back % {dense.window};",
            f"packed.data[i] = j >= 0 ? w[{dense.weight_at}] : b ? b[o] : T(0);",
            "} else",
        ]
    return [f"typedef {scalar} T;", *tables, *lines, "{}"]


NUMBERS, PARTS = 32, 8
"""Gradients of a block that contracts, and the threads that share the sum over rows of each."""


def contract_lines(program: Program, scalar: str, tile: int, memory: str) -> list[str]:
    """Return the body that adds the gradients of a block's `NUMBERS` numbers of a reader to those of its tensors."""
    code, entries, sums, targets = _Code(program, scalar, tile), program.first_read, [], []
    for reader, i in enumerate(program.readers):
        node, entry, occurrences = program.nodes[i], entries[i], ""
        if node.operation == "load":  # a number that is read more than once has one thread, too
            times = Counter(node.numbers[1])
            distinct, order = sorted(times), sorted(range(node.size), key=node.numbers[1].__getitem__)
            begin = itertools.accumulate((times[number] for number in distinct), initial=0)
            tables = {"which": distinct, "order": order, "begin": begin}
            which, at, bounds = (code.table(f"{name}{i}", "int", map(str, of)) for name, of in tables.items())
            layer, x, o, k = f"BlockLayer<T, TILE, 1, 1, 1, {node.size}>", 0, f"{at}[n]", "-1"
            size, target = len(distinct), f"entry = {entry}; at = {which}[i];"
            occurrences = f"for (int n = {bounds}[i]; n < {bounds}[i + 1]; ++n) "
        else:
            dense = Dense(*node.numbers)
            layer, x, o, k = code.layer(i), code.at[node.inputs[0]], f"i % {dense.outputs}", f"i / {dense.outputs} - 1"
            size = dense.outputs * (1 + dense.window)
            target = f"const int o = {o}, k = {k}; entry = {entry} + (k < 0); at = k < 0 ? o : {dense.weight_at};"
        both = f"part, {PARTS}, SIZE, rows.data + {x}, deltas.data + {code.at[i]}"
        add = f"{occurrences}total += {layer}::contract(count, {both}, {k}, {o});"
        sums.append(f"if (reader == {reader} && i < {size}) {{ {add} }}")
        targets.append(f"if (reader == {reader} && i < {size}) {{ {target} }}")
    all_ = NUMBERS * PARTS
    return [
        *code.heads(),
        f"constexpr int SIZE = {tile * max_numbers(program)};",
        f"T* parts = {memory};",
        f"const int first = block * {NUMBERS};",
        "const auto sum = [&](int i, int part) -> T { T total = 0;",
        *sums,
        "return total; };",
        f"for (int j = thread; j < {all_}; j += threads) parts[j] = sum(first + j % {NUMBERS}, j / {NUMBERS});",
        "barrier();",
        f"for (int j = thread; j < {NUMBERS}; j += threads) {{",
        "const int i = first + j; int entry = -1; long long at = 0;",
        *targets,
        "if (entry < 0 || offsets.data[entry] < 0) continue;",
        f"T total = 0; for (int part = 0; part < {PARTS}; ++part) total += parts[part * {NUMBERS} + j];",
        "gradient.data[offsets.data[entry] + at] += total; }",
    ]


def contract_blocks(program: Program, offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return number and blocks of each reader of which a tensor has a gradient, at an offset that is not negative."""
    entries = program.first_read
    for reader, i in enumerate(program.readers):
        node, size, count = program.nodes[i], program.nodes[i].size, 1
        if node.operation == "dense":
            dense = Dense(*node.numbers)
            size, count = dense.outputs * (1 + dense.window), 2
        if max(offsets[entries[i] : entries[i] + count]) >= 0:
            yield reader, -(-size // NUMBERS)
