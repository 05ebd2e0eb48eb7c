"""C++ for a CPU from a row program: the bodies of the functions that `native_kernels` puts into its kernels.

Every body works on `count` rows that stand together, node by node: products of matrices by the layers of
`native/layers.h`, everything else vector by vector.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from warp_phys.programs.operations import FUSED, OPERATIONS
from warp_phys.programs.plan import padded
from warp_phys.programs.program import Dense, Node, Program

FEWEST = 4
"""Fewest numbers side by side that are copied by a loop rather than by a table."""


ROLLED = "\n#pragma clang loop unroll(disable)\n"
"""In front of loops over a node: unrolled, a hundred of them would take a compiler half a minute."""

APART = "[&]() __attribute__((noinline)) {"
"""Opens a function of a node's own, for the same reason; `}();` closes it."""


def literal(number: float) -> str:
    """Return a number in C++."""
    if number != number:  # noqa: PLR0124
        return 'T(__builtin_nan(""))'
    if number in (float("inf"), float("-inf")):
        return f"T({'-' if number < 0 else ''}__builtin_inf())"
    return f"T({float(number).hex()})"


def _heads(scalar: str) -> list[str]:
    return [
        "using namespace warp_phys;",
        f"typedef {scalar} T;",
        "typedef warp_phys::vector<T> V;",
        "constexpr int L = Vector<T>::lanes;",
    ]


def _layer(dense: Dense, scalar: str) -> str:
    activation = FUSED.get(dense.activation, "identity")
    return f"Layer<{scalar}, {activation}, {dense.positions}, {dense.window}, {dense.stride}, {dense.outputs}>"


def _runs(numbers: Sequence[tuple[int, int]], at: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Return (first target, first source, length) of numbers that stand side by side in source and target."""
    first = 0
    sources = [at[node] + k for node, k in numbers]
    for k in range(1, len(sources) + 1):
        if k == len(sources) or sources[k] != sources[k - 1] + 1:
            yield first, sources[first], k - first
            first = k


def _copies(numbers: Sequence[tuple[int, int]], at: Sequence[int], to: int, back: bool) -> list[str]:
    """Return the lines that gather numbers of a row r to `to`; or that scatter the adjoints there back."""
    table: list[tuple[int, int]] = []
    lines = []
    for target, source, length in _runs(numbers, at):
        if length < FEWEST:
            table += [(target + k, source + k) for k in range(length)]
        elif back:
            lines.append(f"{ROLLED}for (int k = 0; k < {length}; ++k) adj[{source} + k] += adj[{to + target} + k];")
        else:
            lines.append(f"{ROLLED}for (int k = 0; k < {length}; ++k) r[{to + target} + k] = r[{source} + k];")
    if len(table) <= FEWEST:
        for target, source in table:
            lines.append(f"adj[{source}] += adj[{to + target}];" if back else f"r[{to + target}] = r[{source}];")
    else:
        sources, targets = (", ".join(str(pair[i]) for pair in table) for i in (1, 0))
        lines += [f"{{ static const int from[] = {{{sources}}}, into[] = {{{targets}}};"]
        body = f"adj[from[k]] += adj[{to} + into[k]]" if back else f"r[{to} + into[k]] = r[from[k]]"
        lines.append(f"{ROLLED}for (int k = 0; k < {len(table)}; ++k) {body}; }}")
    return lines


def _operands(node: Node, at: Sequence[int], base: str) -> str:
    """Return the declarations of the operands' vectors at k."""
    names = zip("abc", node.inputs, strict=False)
    return " ".join(f"const V {name} = load({base} + {at[i]} + k);" for name, i in names)


def evaluate_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that evaluates `count` rows of states x and writes all nodes to `row`."""
    row, at, lines = program.row, program.offsets, _heads(scalar)
    inputs = program.inputs
    each_row = f"for (int s = 0; s < count; ++s) {{ T* r = row + s * {row};"
    lines += [
        f"T* row = rows.data + (long long)slot * {row};",
        f"const T* x = states.data + ((long long)n * batch + first) * {inputs};",
        f"{each_row} for (int k = 0; k < {inputs}; ++k) r[k] = x[s * {inputs} + k];",
        f"clear_tail<T, {inputs}>(r); }}",
    ]
    reader = 0
    for i, node in enumerate(program.nodes):
        operation, own = node.operation, at[i]
        if operation == "dense":
            dense = Dense(*node.numbers)
            verb = "forward_few" if dense.few else "forward"
            weights = f"packed.data + {program.packed[reader]}"
            lines.append(
                f"{_layer(dense, scalar)}::{verb}(count, row + {at[node.inputs[0]]}, {row}, {weights}, row + {own}, "
                f"{row}, 0);"
            )
            if dense.few:
                lines.append(f"{each_row} clear_tail<T, {node.size}>(r + {own}); }}")
        elif operation != "input":
            source = f"packed.data + {program.packed[reader]}" if operation == "load" else ""
            lines += [APART, each_row, *_value(program, i, source), "}}();"]
        reader += operation in ("dense", "load")
    return lines


def _value(program: Program, i: int, source: str) -> list[str]:
    """Return the lines that compute node i of a row r."""
    node, at, own = program.nodes[i], program.offsets, program.offsets[i]
    size, tail = node.size, f"clear_tail<T, {node.size}>(r + {own});"
    if node.operation == "load":
        return [f"for (int k = 0; k < {padded(size)}; k += L) store(r + {own} + k, load({source} + k));"]
    if node.operation == "constant":
        values = ", ".join(map(literal, node.numbers))
        return [
            f"static const T values[] = {{{values}}};",
            f"for (int k = 0; k < {size}; ++k) r[{own} + k] = values[k];",
            tail,
        ]
    if node.operation == "gather":
        entries = [(node.inputs[j], k) for j, k in node.numbers]
        return [*_copies(entries, at, own, back=False), tail]
    if node.operation in ("sum", "largest"):
        verb = "sum_groups" if node.operation == "sum" else "largest_of_groups"
        return [f"{verb}<T, {size}, {node.numbers[0]}>(r + {at[node.inputs[0]]}, r + {own});", tail]
    if node.operation == "product":
        groups, m, inner, n = node.numbers
        a, b = (f"r + {at[j]}" for j in node.inputs)
        call = f"multiply_groups<T, {groups}, {m}, {inner}, {n}, false>"
        return [f"{call}({a}, {m * inner}, {inner}, 1, {b}, {inner * n}, {n}, 1, r + {own});", tail]
    value = OPERATIONS[node.operation].value.format(*map(literal, node.numbers))
    operands = _operands(node, at, "r")
    loop = (
        f"{ROLLED}for (int k = 0; k < {padded(size)}; k += L) {{ {operands} store(r + {own} + k, V{{}} + ({value})); }}"
    )
    return [loop, tail if size % 16 else ""]


def _trained(program: Program) -> list[bool]:
    """Return which nodes lead back to weights."""
    found: list[bool] = []
    for node in program.nodes:
        found.append(node.operation in ("dense", "load") or any(found[i] for i in node.inputs))
    return found


def _moving(program: Program) -> list[bool]:
    """Return which nodes lead back to the input."""
    found: list[bool] = []
    for node in program.nodes:
        found.append(node.operation == "input" or any(found[i] for i in node.inputs))
    return found


def pull_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that takes adjoints of the output of `count` rows back to every node before it."""
    row, at, lines = program.row, program.offsets, _heads(scalar)
    trained, moving, room = _trained(program), _moving(program), program.offsets[-1]
    uses = Counter(i for node in program.nodes for i in set(node.inputs))
    each_row = f"for (int s = 0; s < count; ++s) {{ T* adj = deltas_ + s * {row}; const T* r = h + s * {row};"
    lines += [
        f"T* deltas_ = deltas.data + (long long)delta_slot * {row};",
        f"const T* h = rows.data + (long long)slot * {row};",
        f"{each_row} for (int k = 0; k < {at[-2]}; k += L) store(adj + k, V{{}}); }}",
    ]
    places = {i: reader for reader, i in enumerate(program.readers)}
    for i, node in reversed(list(enumerate(program.nodes))):
        wanted = [j for j in node.inputs if trained[j] or moving[j]]
        if node.operation in ("input", "load", "constant", "largest") or not (wanted or node.operation == "dense"):
            continue
        # what leads back to the input alone is asked for only where its adjoint is
        guard = "" if node.operation == "dense" or any(trained[j] for j in wanted) else "if (to_input) "
        if node.operation != "dense":
            lines += [guard + APART, each_row, *_adjoint(program, i), "}}();"]
            continue
        dense, own, x = Dense(*node.numbers), at[i], node.inputs[0]
        if dense.activation != "identity":
            slope = f"{FUSED[dense.activation]}::slope(load(r + {own} + k))"
            loop = f"for (int k = 0; k < {padded(node.size)}; k += L)"
            lines.append(f"{each_row} {loop} store(adj + {own} + k, load(adj + {own} + k) * {slope}); }}")
        if x not in wanted:
            continue
        reader = places[i]
        weights = f"packed.data + {program.packed[reader] + padded(dense.outputs)}"
        if not dense.few:
            weights = f"transposed.data + {program.transposed[reader]}"
        alone = uses[x] == 1 and dense.positions == 1
        target = at[x] if alone else room
        call = f"{_layer(dense, scalar)}::template pull<identity, false>"
        ends = f"deltas_ + {own}, {row}, {weights}, deltas_ + {target}, {row}, h, {row}"
        guard = "" if trained[x] else "if (to_input) "
        lines.append(f"{guard}{{ {call}(count, {ends});")
        if not alone:
            loop = f"for (int k = 0; k < {(dense.positions - 1) * dense.stride + dense.window}; ++k)"
            lines.append(f"{each_row} {loop} adj[{at[x]} + k] += adj[{room} + k]; }}")
        lines.append("}")
    return lines


def _adjoint(program: Program, i: int) -> list[str]:
    """Return the lines that add to the adjoints of the operands of node i, of a row with values r and adjoints adj."""
    node, at, own = program.nodes[i], program.offsets, program.offsets[i]
    if node.operation == "gather":
        return _copies([(node.inputs[j], k) for j, k in node.numbers], at, own, back=True)
    if node.operation == "sum":
        (length,) = node.numbers
        inner = f"for (int k = 0; k < {length}; ++k) adj[{at[node.inputs[0]]} + g * {length} + k] += adj[{own} + g];"
        return [f"for (int g = 0; g < {node.size}; ++g) {inner}"]
    if node.operation == "product":
        groups, m, inner, n = node.numbers
        a, b = node.inputs
        sizes = f"<T, {groups}, {m}, {n}, {inner}, true>", f"<T, {groups}, {inner}, {m}, {n}, true>"
        d = f"adj + {own}, {m * n}, {n}, 1"
        return [
            f"multiply_groups{sizes[0]}({d}, r + {at[b]}, {inner * n}, 1, {n}, adj + {at[a]});",
            f"multiply_groups{sizes[1]}(r + {at[a]}, {m * inner}, 1, {inner}, {d}, adj + {at[b]});",
        ]
    operation, numbers = OPERATIONS[node.operation], [literal(number) for number in node.numbers]
    lines = [
        f"{ROLLED}for (int k = 0; k < {padded(node.size)}; k += L) {{",
        _operands(node, at, "r"),
        f"[[maybe_unused]] const V y = load(r + {own} + k), d = load(adj + {own} + k);",
    ]
    for j, adjoint in zip(node.inputs, operation.adjoints, strict=True):
        if adjoint:
            lines.append(f"store(adj + {at[j]} + k, load(adj + {at[j]} + k) + ({adjoint.format(*numbers)}));")
    lines.append("}")
    if node.size % 16:  # nothing that is no number may come out of what lies behind
        lines += [f"clear_tail<T, {node.size}>(adj + {at[j]});" for j in dict.fromkeys(node.inputs)]
    return lines


def contract_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that adds the gradients of what was read over `count` rows, in the packed layout."""
    row, at, lines = program.row, program.offsets, _heads(scalar)
    lines += [
        f"const T* d = deltas.data + (long long)delta_slot * {row};",
        f"const T* x = rows.data + (long long)slot * {row};",
        f"T* g = gradients.data + (long long)gradient * {program.packed[-1]};",
    ]
    for reader, i in enumerate(program.readers):
        node, own = program.nodes[i], program.packed[reader]
        if node.operation == "load":
            add = f"store(g + {own} + k, load(g + {own} + k) + load(d + s * {row} + {at[i]} + k));"
            lines.append(f"for (int s = 0; s < count; ++s) for (int k = 0; k < {padded(node.size)}; k += L) {add}")
            continue
        dense = Dense(*node.numbers)
        verb = "contract_few" if dense.few else "contract"
        ends = f"x + {at[node.inputs[0]]}, {row}, d + {at[i]}, {row}, g + {own}"
        lines.append(f"{_layer(dense, scalar)}::{verb}(count, {ends});")
    return lines


def _weight(dense: Dense) -> str:
    """Return where the weight of number k of a window and output o stands in its tensor."""
    k = "k"
    if dense.channels != dense.window:
        k = f"(k % {dense.channels} * {dense.window // dense.channels} + k / {dense.channels})"
    return f"w[{k} * {dense.outputs} + o]" if dense.flipped else f"w[o * {dense.window} + {k}]"


def _addresses(program: Program) -> list[list[int]]:
    """Return for each reader where its tensors' addresses stand."""
    places, start = [], 0
    for i in program.readers:
        count = 2 if program.nodes[i].operation == "dense" else 1
        places.append(list(range(start, start + count)))
        start += count
    return places


def pack_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that reads all tensors, given by their addresses in turn, into the layouts of the layers."""
    lines = _heads(scalar)
    for reader, (i, places) in enumerate(zip(program.readers, _addresses(program), strict=True)):
        node = program.nodes[i]
        lines += [
            "{",
            f"const T* w = (const T*)addresses.data[{places[0]}];",
            f"T* to = packed.data + {program.packed[reader]};",
        ]
        if node.operation == "load":
            which = ", ".join(map(str, node.numbers[1]))
            lines.append(f"static const int which[] = {{{which}}};")
            lines.append(f"for (int k = 0; k < {node.size}; ++k) to[k] = w[which[k]]; }}")
            continue
        dense = Dense(*node.numbers)
        width, out = padded(dense.window), padded(dense.outputs)
        lines += [
            f"const T* b = (const T*)addresses.data[{places[1]}];",
            f"for (int o = 0; o < {dense.outputs}; ++o) to[o] = b ? b[o] : 0;",
            f"to += {out};",
            f"T* back = {'to' if dense.few else f'transposed.data + {program.transposed[reader]}'};",
            f"for (int o = 0; o < {dense.outputs}; ++o) for (int k = 0; k < {dense.window}; ++k) {{",
            f"    back[o * {width} + k] = {_weight(dense)};",
            "" if dense.few else f"    to[k * {out} + o] = {_weight(dense)};",
            "}}",
        ]
    return lines


def unpack_lines(program: Program, scalar: str) -> list[str]:
    """Return the body that adds a flow's packed gradients to those of the tensors, given by their addresses, or 0."""
    lines, count = _heads(scalar), len(program.read)
    for reader, (i, places) in enumerate(zip(program.readers, _addresses(program), strict=True)):
        node = program.nodes[i]
        lines += [
            "{",
            f"const T* g = gradients.data + (long long)flow * {program.packed[-1]} + {program.packed[reader]};",
            f"T* w = (T*)addresses.data[flow * {count} + {places[0]}];",
        ]
        if node.operation == "load":
            which = ", ".join(map(str, node.numbers[1]))
            lines.append(f"static const int which[] = {{{which}}};")
            lines.append(f"if (w) for (int k = 0; k < {node.size}; ++k) w[which[k]] += g[k]; }}")
            continue
        dense = Dense(*node.numbers)
        width, out = padded(dense.window), padded(dense.outputs)
        source = f"g[{out} + o * {width} + k]" if dense.few else f"g[{out} + k * {out} + o]"
        lines += [
            f"T* b = (T*)addresses.data[flow * {count} + {places[1]}];",
            f"if (w) for (int o = 0; o < {dense.outputs}; ++o) for (int k = 0; k < {dense.window}; ++k)",
            f"    {_weight(dense)} += {source};",
            f"if (b) for (int o = 0; o < {dense.outputs}; ++o) b[o] += g[o];",
            "}",
        ]
    return lines
