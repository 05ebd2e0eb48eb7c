"""C++ for a CPU from a row program: the bodies of the functions that `native_kernels` puts into its kernels.

Every body works on `count` rows that stand together, stage by stage of the program's `Layout`: products of matrices by
the layers of `native/layers.h`, everything else vector by vector. In the code r is a row, c what does not depend on the
state, adj the adjoints of a row.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from warp_phys.programs.layout import Layout, Place, Stage, layout_of, node_is_elementwise, runs
from warp_phys.programs.operations import FUSED, OPERATIONS
from warp_phys.programs.program import Dense, Program, padded

FEWEST = 4
"""Fewest numbers side by side that are copied by a loop rather than by a table."""

ROLLED = "\n#pragma clang loop unroll(disable)\n"
"""In front of loops over a node: unrolled, a hundred of them would take a compiler half a minute."""

APART = "[&]() __attribute__((noinline)) {"
"""Opens a function of a stage's own, for the same reason; `}();` closes it."""


def literal(number: float) -> str:
    """Return a number in C++."""
    if number != number:  # noqa: PLR0124
        return 'T(__builtin_nan(""))'
    if number in (float("inf"), float("-inf")):
        return f"T({'-' if number < 0 else ''}__builtin_inf())"
    return f"T({float(number).hex()})"


def evaluate_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that evaluates `count` rows of states x and writes all nodes to `row`."""
    layout, inputs = layout_of(program), program.inputs
    part = _Part(layout, scalar, static=False)
    return [
        *_heads(scalar),
        f"T* row = rows.data + (long long)slot * {layout.row};",
        f"const T* c = packed.data + {layout.statics};",
        f"const T* x = states.data + ((long long)n * batch + first) * {inputs};",
        f"{part.each_row} for (int k = 0; k < {inputs}; ++k) r[k] = x[s * {inputs} + k];",
        *(_copy(f"c + {layout.static_at[i]}", f"r + {layout.at[i]}", program.nodes[i].size) for i in layout.spread),
        f"clear_tail<T, {inputs}>(r); }}",
        *part.forward(),
    ]


def pull_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that takes adjoints of the output of `count` rows back to every node before it."""
    layout = layout_of(program)
    return [
        *_heads(scalar),
        f"T* deltas_ = deltas.data + (long long)delta_slot * {layout.row};",
        f"const T* h = rows.data + (long long)slot * {layout.row};",
        f"const T* c = packed.data + {layout.statics};",
        *_Part(layout, scalar, static=False).backward()[0],
    ]


def contract_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that adds the gradients of what was read over `count` rows, in the packed layout."""
    layout = layout_of(program)
    part = _Part(layout, scalar, static=False)
    found = part.backward()[1]
    lines = [
        *_heads(scalar),
        f"const T* d = deltas.data + (long long)delta_slot * {layout.row};",
        f"const T* x = rows.data + (long long)slot * {layout.row};",
        f"T* g = gradients.data + (long long)gradient * {layout.packed[-1]};",
        *part.contract(found),
    ]
    for i in sorted(i for i in found if layout.static[i]):
        to = layout.statics + layout.static_at[i]
        add = f"store(g + {to} + k, load(g + {to} + k) + load(d + s * {layout.row} + {layout.at[i]} + k));"
        size = padded(program.nodes[i].size)
        lines.append(f"for (int s = 0; s < count; ++s) {ROLLED}for (int k = 0; k < {size}; k += L) {add}")
    return lines


def pack_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that reads all tensors, given by their addresses in turn, and computes what depends on no row."""
    layout, lines = layout_of(program), _heads(scalar)
    lines += [f"T* row = packed.data + {layout.statics}; const T* c = row; constexpr int count = 1; (void)c;"]
    for reader, (i, place) in enumerate(program.first_read.items()):
        node = program.nodes[i]
        lines += ["{", f"const T* w = (const T*)addresses.data[{place}];"]
        if node.operation == "load":
            which = ", ".join(map(str, node.numbers[1]))
            lines.append(f"static const int which[] = {{{which}}};")
            lines.append(f"for (int k = 0; k < {node.size}; ++k) row[{layout.static_at[i]} + k] = w[which[k]]; }}")
            continue
        dense = Dense(*node.numbers)
        width, out = padded(dense.window), padded(dense.outputs)
        lines += [
            f"const T* b = (const T*)addresses.data[{place + 1}];",
            f"T* to = packed.data + {layout.packed[reader]};",
            f"for (int o = 0; o < {dense.outputs}; ++o) to[o] = b ? b[o] : 0;",
            f"to += {out};",
            f"T* back = {'to' if dense.few else f'transposed.data + {layout.transposed[reader]}'};",
            f"for (int o = 0; o < {dense.outputs}; ++o) for (int k = 0; k < {dense.window}; ++k) {{",
            f"    const T value = w[{dense.weight_at}];",
            f"    back[o * {width} + k] = value;",
            "" if dense.few else f"    to[k * {out} + o] = value;",
            "}}",
        ]
    for i, node in enumerate(program.nodes):
        if node.operation == "constant" and i in layout.static_at:
            values = ", ".join(map(literal, node.numbers))
            lines.append(f"{{ static const T values[] = {{{values}}};")
            lines.append(f"for (int k = 0; k < {node.size}; ++k) row[{layout.static_at[i]} + k] = values[k]; }}")
    return lines + _Part(layout, scalar, static=True).forward()


def unpack_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that adds a flow's packed gradients to those of the tensors, given by their addresses, or 0."""
    layout, count = layout_of(program), len(program.read)
    part, found = _Part(layout, scalar, static=True), set(layout.static_at)
    lines = [
        *_heads(scalar),
        f"T* g = gradients.data + (long long)flow * {layout.packed[-1]};",
        f"T* deltas_ = g + {layout.statics}; const T *d = deltas_, *h = packed.data + {layout.statics};",
        "const T *c = h, *x = h; constexpr int count = 1; (void)d; (void)c; (void)x;",
        *part.backward(found)[0],
        *part.contract(found),
    ]
    for reader, (i, place) in enumerate(program.first_read.items()):
        node = program.nodes[i]
        lines += ["{", f"T* w = (T*)addresses.data[flow * {count} + {place}];"]
        if node.operation == "load":
            which = ", ".join(map(str, node.numbers[1]))
            lines.append(f"static const int which[] = {{{which}}};")
            own = layout.static_at[i]
            lines.append(f"if (w) for (int k = 0; k < {node.size}; ++k) w[which[k]] += deltas_[{own} + k]; }}")
            continue
        dense = Dense(*node.numbers)
        width, out = padded(dense.window), padded(dense.outputs)
        source = f"own[{out} + o * {width} + k]" if dense.few else f"own[{out} + k * {out} + o]"
        lines += [
            f"const T* own = g + {layout.packed[reader]};",
            f"T* b = (T*)addresses.data[flow * {count} + {place + 1}];",
            f"if (w) for (int o = 0; o < {dense.outputs}; ++o) for (int k = 0; k < {dense.window}; ++k)",
            f"    w[{dense.weight_at}] += {source};",
            f"if (b) for (int o = 0; o < {dense.outputs}; ++o) b[o] += own[o];",
            "}",
        ]
    return lines


class _Part:
    """The code of the nodes that depend on the state, or of those that do not."""

    def __init__(self, layout: Layout, scalar: str, static: bool):
        self.layout, self.program, self.scalar, self.static = layout, layout.program, scalar, static
        self.nodes = self.program.nodes
        self.at = layout.static_at if static else layout.at
        self.row = 0 if static else layout.row
        self.stages = layout.static_stages if static else layout.stages
        self.each_row = f"for (int s = 0; s < count; ++s) {{ T* r = row + s * {self.row};"
        self.each_adjoint = (
            f"for (int s = 0; s < count; ++s) {{ T* adj = deltas_ + s * {self.row}; const T* r = h + s * {self.row};"
        )

    def value(self, place: Place) -> str:
        """Return the address of a value, for elementwise operations."""
        if self.layout.static[place.node]:
            return f"c + {self.layout.static_at[place.node] + place.first}"
        return f"r + {self.at[place.node] + place.first}"

    def own(self, j: int) -> int:
        """Return where a row has the numbers of node j, for operations that are not elementwise."""
        base, first, _ = self.layout.base(j)
        return self.at[base] + first

    # --- forward

    def forward(self) -> list[str]:
        """Return the lines that compute all nodes of `count` rows."""
        lines: list[str] = []
        for stage in self.stages:
            i = stage.nodes[0]
            if self.nodes[i].operation == "dense":
                lines += self._dense(i)
            else:
                body = self._group(stage) if stage.size else self._value(i)
                lines += [APART, self.each_row, *body, "}}();"]
        return lines

    def _dense(self, i: int) -> list[str]:
        node, layout = self.nodes[i], self.layout
        dense, own = Dense(*node.numbers), self.at[i]
        verb = "forward_few" if dense.few else "forward"
        weights = f"packed.data + {layout.packed[self.program.readers.index(i)]}"
        ends = f"row + {self.own(node.inputs[0])}, {self.row}, {weights}, row + {own}, {self.row}"
        lines = [f"{self._layer(dense)}::{verb}(count, {ends}, {layout.slopes.get(i, 0)});"]
        if dense.few:
            lines.append(f"{self.each_row} clear_tail<T, {node.size}>(r + {own}); }}")
        return lines

    def _layer(self, dense: Dense) -> str:
        activation = FUSED.get(dense.activation, "identity")
        sizes = f"{dense.positions}, {dense.window}, {dense.stride}, {dense.outputs}"
        return f"Layer<{self.scalar}, {activation}, {sizes}>"

    def _value(self, i: int) -> list[str]:
        """Return the lines that compute node i of a row r."""
        node, own = self.nodes[i], self.at[i]
        size, tail = node.size, f"clear_tail<T, {node.size}>(r + {own});"
        if node.operation == "gather":
            return [*_copies(self._sources(i), own), tail]
        if node.operation in ("sum", "largest"):
            verb = "sum_groups" if node.operation == "sum" else "largest_of_groups"
            return [f"{verb}<T, {size}, {node.numbers[0]}>(r + {self.own(node.inputs[0])}, r + {own});", tail]
        assert node.operation == "product"
        groups, m, inner, n = node.numbers
        a, b = (f"r + {self.own(j)}" for j in node.inputs)
        call = f"multiply_groups<T, {groups}, {m}, {inner}, {n}, false>"
        return [f"{call}({a}, {m * inner}, {inner}, 1, {b}, {inner * n}, {n}, 1, r + {own});", tail]

    def _sources(self, i: int) -> list[int]:
        return [self.at[base] + k for base, k in self.layout.entries(i)]

    def _group(self, stage: Stage) -> list[str]:
        """Return the lines that compute a group of a row r, number by number."""
        code = _Loop(self, stage)
        for i in stage.nodes:
            node = self.nodes[i]
            if node.operation == "sum":
                code.before.append(f"V t{i}{{}};")
                code.inside.append(
                    f"t{i} += kept<T, {stage.size}>({code.operand(node.inputs[0], recompute=False)}, k);"
                )
                code.after.append(f"store(r + {self.at[i]}, alone(total<T>(t{i})));")
                code.after.append(f"clear_tail<T, 1, L>(r + {self.at[i]});")
                continue
            code.compute(i, recompute=False)
            if i in self.layout.stored:
                code.inside.append(f"store(r + {self.at[i]} + k, v{i});")
                if stage.size % padded(1):
                    code.after.append(f"clear_tail<T, {stage.size}>(r + {self.at[i]});")
        return code.lines()

    # --- backward

    def backward(self, reached: set[int] | None = None) -> tuple[list[str], set[int]]:
        """Return the lines that take adjoints back, and which nodes' adjoints are then in memory.

        Args:
            reached: The nodes that have adjoints to begin with; None for the output.
        """
        found = {len(self.nodes) - 1} if reached is None else set(reached)
        lines: list[str] = []
        readers: dict[int, int] = {}  # the first stage that reads a node is the last one that adds to its adjoint
        for number, stage in reversed(list(enumerate(self.stages))):
            readers |= {base: number for i in stage.nodes for base in self.layout.bases(i)}
        sloped: set[int] = set()
        for number, stage in reversed(list(enumerate(self.stages))):
            bases = {base for i in stage.nodes for base in self.layout.bases(i)}
            last = {base for base in bases if readers[base] == number and self.slope(base)}
            i = stage.nodes[0]
            if stage.size:
                body = _LoopBack(self, stage, found, last, sloped).body()
            elif i not in found:
                continue
            elif self.nodes[i].operation == "dense":
                lines += self._dense_adjoint(i, found, last, sloped)
                continue
            else:
                body = self._adjoint(i, found)
            if body:
                lines += [self._guard(stage.nodes) + APART, self.each_adjoint, *body, "}}();"]
        return lines, found

    def _guard(self, nodes: Sequence[int]) -> str:
        """Return the condition of what leads back to the input alone: it is asked for only where its adjoint is."""
        operands = {j for i in nodes for j in self.nodes[i].inputs}
        return "" if any(self.layout.trained[j] for j in operands) else "if (to_input) "

    def slope(self, i: int) -> str:
        """Return the slope at number k of the activation of a dense node of a row r, empty for any other node."""
        node = self.nodes[i]
        if i not in self.at or node.operation != "dense" or self.layout.static[i] != self.static:
            return ""
        activation = Dense(*node.numbers).activation
        kept = self.at[i] + self.layout.slopes.get(i, 0)
        return f"{FUSED[activation]}::slope(load(r + {kept} + k))" if activation != "identity" else ""

    def clear(self, base: int, found: set[int]) -> list[str]:
        """Return the line that makes the adjoint of a node zero unless there is something in it."""
        if base in found:
            return []
        found.add(base)
        loop = f"{ROLLED}for (int k = 0; k < {padded(self.nodes[base].size)}; k += L)"
        return [f"{loop} store(adj + {self.at[base]} + k, V{{}});"]

    def _dense_adjoint(self, i: int, found: set[int], last: set[int], sloped: set[int]) -> list[str]:
        node, layout, lines = self.nodes[i], self.layout, []
        dense, own = Dense(*node.numbers), self.at[i]
        if self.slope(i) and i not in sloped:
            loop = f"{ROLLED}for (int k = 0; k < {padded(node.size)}; k += L)"
            lines.append(
                f"{self.each_adjoint} {loop} store(adj + {own} + k, load(adj + {own} + k) * {self.slope(i)}); }}"
            )
        x, first, _ = layout.base(node.inputs[0])
        if not layout.wanted(x):
            return lines
        reader = self.program.readers.index(i)
        weights = f"packed.data + {layout.packed[reader] + padded(dense.outputs)}"
        if not dense.few:
            weights = f"transposed.data + {layout.transposed[reader]}"
        covered = (dense.positions - 1) * dense.stride + dense.window
        whole = first == 0 and covered == self.nodes[x].size
        guard = "" if layout.trained[x] else "if (to_input) "
        if not whole and x not in found:
            lines += [f"{guard}{self.each_adjoint}", *self.clear(x, found), "}"]
        before, kept = "identity", 0
        if x in last and whole:
            before, kept = FUSED[Dense(*self.nodes[x].numbers).activation], layout.slopes.get(x, 0)
            sloped.add(x)
        flags = f"{before}, {_bool(before != 'identity')}, {_bool(x in found)}"
        found.add(x)
        ends = f"deltas_ + {own}, {self.row}, {weights}, deltas_ + {self.at[x] + first}, {self.row}"
        values = f"h + {self.at[x] + first + kept}, {self.row}"
        lines.append(f"{guard}{self._layer(dense)}::template pull<{flags}>(count, {ends}, {values});")
        return lines

    def _adjoint(self, i: int, found: set[int]) -> list[str]:
        """Return the lines that add to the adjoints of the operands of node i, of a row."""
        node, layout, own = self.nodes[i], self.layout, self.at[i]
        if node.operation == "largest":
            return []
        wanted = [base for base in sorted(layout.bases(i)) if layout.wanted(base)]
        if not wanted:
            return []
        if node.operation == "gather":
            entries = layout.entries(i)
            moved = all(base not in found for base in wanted) and len(set(entries)) == len(entries)
            moved &= len(entries) == sum(self.nodes[base].size for base in layout.bases(i))
            lines = [] if moved else [line for base in wanted for line in self.clear(base, found)]
            found |= set(wanted)
            pairs = [
                (k, at)
                for k, (base, at) in enumerate(zip((b for b, _ in entries), self._sources(i), strict=True))
                if layout.wanted(base)
            ]
            return [*lines, *_scatter(pairs, own, "=" if moved else "+=")]
        lines = [line for base in wanted for line in self.clear(base, found)]
        if node.operation == "sum":
            (length,), x = node.numbers, self.own(node.inputs[0])
            inner = f"for (int k = 0; k < {length}; ++k) adj[{x} + g * {length} + k] += adj[{own} + g];"
            return [*lines, f"for (int g = 0; g < {node.size}; ++g) {inner}"]
        groups, m, inner, n = node.numbers
        a, b = (self.own(j) for j in node.inputs)
        d = f"adj + {own}, {m * n}, {n}, 1"
        if layout.base(node.inputs[0]).node in wanted:
            call = f"multiply_groups<T, {groups}, {m}, {n}, {inner}, true>"
            lines.append(f"{call}({d}, r + {b}, {inner * n}, 1, {n}, adj + {a});")
        if layout.base(node.inputs[1]).node in wanted:
            call = f"multiply_groups<T, {groups}, {inner}, {m}, {n}, true>"
            lines.append(f"{call}(r + {a}, {m * inner}, 1, {inner}, {d}, adj + {b});")
        return lines

    def contract(self, found: set[int]) -> list[str]:
        """Return the lines that add the gradients of dense layers, from values x and adjoints d of rows, to g."""
        lines = []
        for reader, i in enumerate(self.program.readers):
            node = self.nodes[i]
            if i not in found or node.operation != "dense" or self.layout.static[i] != self.static:
                continue
            dense = Dense(*node.numbers)
            verb = "contract_few" if dense.few else "contract"
            ends = f"x + {self.own(node.inputs[0])}, {self.row}, d + {self.at[i]}, {self.row}"
            lines.append(f"{self._layer(dense)}::{verb}(count, {ends}, g + {self.layout.packed[reader]});")
        return lines


class _Loop:
    """The code of a loop over the numbers of a group."""

    def __init__(self, part: _Part, stage: Stage):
        self.part, self.stage = part, stage
        self.beside = {i for i in stage.nodes if node_is_elementwise(part.program, i)}
        self.before: list[str] = []
        self.inside: list[str] = []
        self.later: list[str] = []
        self.after: list[str] = []
        self._known: set[str] = set()

    def lines(self) -> list[str]:
        """Return the loop, with what stands before and behind it."""
        loop = f"{ROLLED}for (int k = 0; k < whole<T>({self.stage.size}); k += L) {{"
        return [*self.before, loop, *self.inside, *self.later, "}", *self.after]

    def operand(self, j: int, recompute: bool) -> str:
        """Return the name of the numbers of node j: of this group and computed (again), or loaded."""
        name = f"v{j}"
        if name in self._known:
            return name
        part, place = self.part, self.part.layout.place(j)
        if j in self.beside and not (recompute and j in part.layout.stored):
            self.compute(j, recompute)
            return name
        self._known.add(name)
        node = part.nodes[place.node]
        if node.operation == "constant" and (place.repeated or len(set(node.numbers)) == 1):
            self.before.append(f"const V {name} = V{{}} + {literal(node.numbers[place.first])};")
        elif place.repeated:
            self.before.append(f"const V {name} = V{{}} + *({part.value(place)});")
        else:
            self.inside.append(f"const V {name} = load({part.value(place)} + k);")
        return name

    def compute(self, i: int, recompute: bool) -> None:
        """Compute node i of the group."""
        if f"v{i}" in self._known:
            return
        node = self.part.nodes[i]
        text = OPERATIONS[node.operation].value.format(*map(literal, node.numbers))
        names = {letter: self.operand(j, recompute) for letter, j in zip("abc", node.inputs, strict=False)}
        self.inside.append(f"const V v{i} = {_named(text, names)};")
        self._known.add(f"v{i}")

    def fill(self, adjoint: str, i: int) -> str:
        """Return an expression for an adjoint of node i in terms of variables; what it takes is loaded or computed."""
        node, names = self.part.nodes[i], {"d": f"d{i}"}
        for letter in dict.fromkeys(re.findall(r"\b[abcy]\b", adjoint)):  # in an order that no hash decides
            names[letter] = self.operand(i if letter == "y" else node.inputs["abc".index(letter)], recompute=True)
        return _named(adjoint, names)


class _LoopBack(_Loop):
    """The code of a loop that takes the adjoints of a group back.

    Args:
        part: What the group belongs to.
        stage: The group.
        found: The nodes whose adjoints are in memory; added to.
        last: Dense nodes whose adjoints no other stage adds to later.
        sloped: Those whose adjoints have been multiplied by the slope of their activation; added to.
    """

    def __init__(self, part: _Part, stage: Stage, found: set[int], last: set[int], sloped: set[int]):
        super().__init__(part, stage)
        self.found, self.last, self.sloped = found, last, sloped
        self.terms: dict[int, list[str]] = defaultdict(list)  # of nodes of the group, and of whole vectors in memory
        self.outer: dict[tuple[int, int], list[str]] = defaultdict(list)
        self.totals: dict[tuple[int, int], str] = {}  # of one number that many are

    def body(self) -> list[str]:
        """Return the lines; none where no adjoint leads further back."""
        for i in reversed(self.stage.nodes):
            node = self.part.nodes[i]
            for j, adjoint in zip(node.inputs, self._adjoints(i), strict=False):
                if adjoint and self.part.layout.wanted(j):
                    self._add(j, f"({self.fill(adjoint, i)})")
        if not self.outer and not self.totals:
            return []
        return [*self._store(), *self.lines()]

    def _adjoints(self, i: int) -> Sequence[str]:
        """Return the expressions for the operands of node i, its own adjoint computed; none where it has none."""
        node, at = self.part.nodes[i], self.part.at
        if node.operation == "sum":
            if i in self.found:
                self.before.append(f"const V d{i} = V{{}} + adj[{at[i]}];")
            return ("d",) if i in self.found else ()
        mine = self.terms.pop(i, [])
        if i in self.found:
            mine.append(f"load(adj + {at[i]} + k)")
        if not mine:
            return ()
        self.later.append(f"[[maybe_unused]] const V d{i} = {' + '.join(mine)};")
        return [text.format(*map(literal, node.numbers)) for text in OPERATIONS[node.operation].adjoints]

    def _add(self, j: int, term: str) -> None:
        """Add to the adjoint of node j."""
        base, first, repeated = self.part.layout.place(j)
        if j in self.beside:
            self.terms[j].append(term)
        elif not repeated:
            self.outer[base, first].append(term)
        else:
            if (base, first) not in self.totals:
                self.totals[base, first] = f"t{len(self.totals)}"
                self.before.append(f"V t{len(self.totals) - 1}{{}};")
            self.later.append(f"{self.totals[base, first]} += kept<T, {self.stage.size}>({term}, k);")

    def _store(self) -> list[str]:
        """Write the sums to memory; returns the lines that make zero what is written to in parts."""
        part, size = self.part, self.stage.size
        parts = {base for base, _ in self.totals if part.nodes[base].size > 1}
        for base, first in self.outer:
            if first or part.nodes[base].size != size:
                parts.add(base)
        clear = [line for base in sorted(parts) for line in part.clear(base, self.found)]
        for (base, first), sums in self.outer.items():
            to, slope = f"adj + {part.at[base] + first} + k", ""
            if base in self.found:
                sums.insert(0, f"load({to})")
            if base in self.last and base not in parts:
                slope = f" * {part.slope(base)}"
                self.sloped.add(base)
            self.later.append(f"store({to}, ({' + '.join(sums)}){slope});")
            if size % padded(1):
                self.after.append(f"clear_tail<T, {size}>(adj + {part.at[base] + first});")
        self.found |= {base for base, _ in self.outer}
        for (base, first), name in self.totals.items():
            at = part.at[base] + first
            if part.nodes[base].size > 1:
                self.after.append(f"adj[{at}] += total<T>({name});")
            else:  # as a whole vector, which is read as one
                before = f"load(adj + {at}) + " if base in self.found else ""
                self.after.append(f"store(adj + {at}, {before}alone(total<T>({name})));")
                self.found.add(base)
        return clear


def _named(text: str, names: dict[str, str]) -> str:
    return re.sub(r"\b[abcdy]\b", lambda match: names[match.group()], text)


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _heads(scalar: str) -> list[str]:
    return [
        "using namespace warp_phys;",
        f"typedef {scalar} T;",
        "typedef warp_phys::vector<T> V;",
        "constexpr int L = Vector<T>::lanes; (void)L;",
    ]


def _copy(source: str, target: str, size: int) -> str:
    return f"{ROLLED}for (int k = 0; k < {padded(size)}; k += L) store({target} + k, load({source} + k));"


def _copies(sources: Sequence[int], to: int) -> list[str]:
    """Return the lines that gather numbers of a row r to `to`."""
    table: list[tuple[int, int]] = []
    lines = []
    for target, source, length in runs(list(sources)):
        if length < FEWEST:
            table += [(target + k, source + k) for k in range(length)]
        else:
            lines.append(f"{ROLLED}for (int k = 0; k < {length}; ++k) r[{to + target} + k] = r[{source} + k];")
    return lines + _by_table(table, f"r[{to} + into] = r[from];")


def _scatter(pairs: Sequence[tuple[int, int]], own: int, verb: str) -> list[str]:
    """Return the lines that bring the adjoints of a gather, by (number, place of its source), back."""
    table: list[tuple[int, int]] = []
    lines = []
    for target, source, length in runs([source for _, source in pairs]):
        targets = [k for k, _ in pairs[target : target + length]]
        if length < FEWEST or targets[-1] - targets[0] != length - 1:
            table += list(pairs[target : target + length])
        else:
            body = f"adj[{source} + k] {verb} adj[{own + targets[0]} + k];"
            lines.append(f"{ROLLED}for (int k = 0; k < {length}; ++k) {body}")
    return lines + _by_table(table, f"adj[from] {verb} adj[{own} + into];")


def _by_table(table: Sequence[tuple[int, int]], body: str) -> list[str]:
    """Return the lines that do something for pairs (into, from)."""
    if len(table) <= FEWEST:
        return [re.sub(r"\binto\b", str(t), re.sub(r"\bfrom\b", str(f), body)) for t, f in table]
    targets, sources = (", ".join(str(pair[i]) for pair in table) for i in (0, 1))
    inner = re.sub(r"\binto\b", "into_[k]", re.sub(r"\bfrom\b", "from_[k]", body))
    return [
        f"{{ static const int from_[] = {{{sources}}}, into_[] = {{{targets}}};",
        f"{ROLLED}for (int k = 0; k < {len(table)}; ++k) {inner} }}",
    ]
