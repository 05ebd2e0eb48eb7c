"""Warp functions as expressions: a step run once on symbols instead of numbers, and the adjoint of what it computes.

What is traced is straight code: loops over known counts, calls of other Warp functions, vectors and matrices. Where a
number decides what is done next, or a function has no symbol here, `Untraceable` is raised, and Warp's own code runs.
"""

import ast
import copy
import re
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import warp as wp

from warp_phys.core.rows import scalar_name
from warp_phys.programs.native_code import literal
from warp_phys.programs.operations import OPERATIONS

LARGEST = 4000
"""Most nodes of a graph."""


class Untraceable(Exception):
    """A function does something that expressions do not say."""


FAILURES = (Untraceable, ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)
"""What tracing may end with: symbols are not all that Warp's types are."""


class Node(NamedTuple):
    """A number: an operation of `OPERATIONS` on other numbers, a constant, or an input."""

    operation: str
    operands: tuple[Any, ...]


class Graph:
    """Expressions, each made once."""

    def __init__(self):
        self.nodes: list[Node] = []
        self._known: dict[Node, int] = {}

    def add(self, operation: str, *operands: Any) -> "Number":
        """Return the number of a node."""
        node = Node(operation, operands)
        if node not in self._known:
            if len(self.nodes) >= LARGEST:
                raise Untraceable(f"it takes more than {LARGEST} operations")
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return Number(self, self._known[node])

    def number(self, value: Any) -> "Number":
        """Return a constant as a number."""
        if isinstance(value, Number):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Untraceable(f"{type(value).__name__} is no number")
        return self.add("constant", float(value))


class Number:
    """A node of a graph, with the arithmetic of numbers."""

    def __init__(self, graph: Graph, index: int):
        self.graph, self.index = graph, index

    @property
    def constant(self) -> float | None:
        """Return the value, if it is known."""
        node = self.graph.nodes[self.index]
        return node.operands[0] if node.operation == "constant" else None

    def _join(self, operation: str, other: Any, flip: bool = False) -> Any:
        if isinstance(other, Row):
            return NotImplemented
        return _binary(operation, *((self.graph.number(other), self) if flip else (self, self.graph.number(other))))

    def __add__(self, other):
        return self._join("add", other)

    def __radd__(self, other):
        return self._join("add", other, flip=True)

    def __sub__(self, other):
        return self._join("subtract", other)

    def __rsub__(self, other):
        return self._join("subtract", other, flip=True)

    def __mul__(self, other):
        return self._join("multiply", other)

    def __rmul__(self, other):
        return self._join("multiply", other, flip=True)

    def __truediv__(self, other):
        return self * _reciprocal(self.graph.number(other))

    def __rtruediv__(self, other):
        return self.graph.number(other) * _reciprocal(self)

    def __neg__(self):
        return -1.0 * self if self.constant is not None else self.graph.add("negate", self.index)

    def __pos__(self):
        return self

    def __gt__(self, other):
        return self._join("greater", other)

    def __lt__(self, other):
        return self._join("greater", other, flip=True)

    def __ge__(self, other):
        return self._join("greater or equal", other)

    def __le__(self, other):
        return self._join("greater or equal", other, flip=True)

    __eq__ = __ne__ = __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise Untraceable("a number decides what is done next")


_FOLDED: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}


def _binary(operation: str, a: Number, b: Number) -> Number:
    graph, x, y = a.graph, a.constant, b.constant
    if operation in _FOLDED:
        if x is not None and y is not None:
            return graph.number(_FOLDED[operation](x, y))
        if operation != "multiply" and y == 0.0:
            return a
        if operation == "add" and x == 0.0:
            return b
        if operation == "multiply" and 1.0 in (x, y):
            return b if x == 1.0 else a
    return graph.add(operation, a.index, b.index)


def _reciprocal(a: Number) -> Number:
    if a.constant:
        return a.graph.number(1.0 / a.constant)
    return a.graph.add("reciprocal", a.index)


def _apply(operation: str, *operands: Any) -> Number:
    graph = next((a.graph for a in operands if isinstance(a, Number)), None)
    if graph is None:
        raise Untraceable(f"{operation} of plain numbers")
    return graph.add(operation, *(graph.number(a).index for a in operands))


class Row:
    """A vector of numbers."""

    def __init__(self, values: Sequence[Any]):
        self.values = list(values)

    def _join(self, other: Any, function: Callable[[Any, Any], Any]) -> "Row":
        others = other.values if isinstance(other, Row) else [other] * len(self.values)
        return Row([function(a, b) for a, b in zip(self.values, others, strict=True)])

    def __add__(self, other):
        return self._join(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self._join(other, lambda a, b: a - b)

    def __mul__(self, other):
        if isinstance(other, Row):
            raise Untraceable("a product of vectors")
        return self._join(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self._join(other, lambda a, b: a / b)

    def __neg__(self):
        return Row([-a for a in self.values])

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[_index(i, len(self))]

    def __setitem__(self, i, value):
        self.values[_index(i, len(self))] = value


class Matrix:
    """A matrix of numbers."""

    def __init__(self, rows: Sequence[Sequence[Any]]):
        self.rows = [Row(row) for row in rows]

    def __getitem__(self, at):
        i, j = at
        return self.rows[_index(i, len(self.rows))][j]

    def __setitem__(self, at, value):
        i, j = at
        self.rows[_index(i, len(self.rows))][j] = value


def _index(i: Any, length: int) -> int:
    if not isinstance(i, int):
        raise Untraceable("an index that is no integer")
    if not -length <= i < length:
        raise IndexError(f"index {i} is out of range for a vector of {length} numbers")
    return i


def _dot(a: Row, b: Row) -> Any:
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total = total + a[i] * b[i]
    return total


def _length(a: Row) -> Number:
    return _apply("length", _dot(a, a))


def _choose(which: Any, a: Any, b: Any) -> Any:
    if isinstance(which, bool):
        return a if which else b
    return _apply("choose", which, a, b)


def square_root(a: Number) -> Number:
    """Return the root of a number."""
    return _apply("root", a)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sin": lambda a: _apply("sine", a),
    "cos": lambda a: _apply("cosine", a),
    "tan": lambda a: _apply("sine", a) / _apply("cosine", a),
    "exp": lambda a: _apply("exponential", a),
    "log": lambda a: _apply("logarithm", a),
    "sqrt": square_root,
    "tanh": lambda a: _apply("tanh", a),
    "abs": lambda a: _choose(a < 0.0, -a, a),
    "min": lambda a, b: _choose(a < b, a, b),
    "max": lambda a, b: _choose(a > b, a, b),
    "where": _choose,
    "dot": _dot,
    "length": _length,
    "length_sq": lambda a: _dot(a, a),
    "static": lambda a: a,
}
"""Functions of Warp by their names there."""

NATIVE: dict[Any, Callable[..., Any]] = {}
"""What functions of C++ are on symbols."""


_SLOPES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "add": lambda d, y, a, b: (d, d),
    "subtract": lambda d, y, a, b: (d, -d),
    "multiply": lambda d, y, a, b: (d * b, d * a),
    "negate": lambda d, y, a: (-d,),
    "reciprocal": lambda d, y, a: (d * -(y * y),),
    "sine": lambda d, y, a: (d * _apply("cosine", a),),
    "cosine": lambda d, y, a: (d * -_apply("sine", a),),
    "exponential": lambda d, y, a: (d * y,),
    "logarithm": lambda d, y, a: (d / a,),
    "root": lambda d, y, a: (d * (0.5 / y),),
    "length": lambda d, y, a: (d * (0.5 * _apply("choose", y > 0.0, 1.0 / y, 0.0)),),  # of no length: 0, as in Warp
    "tanh": lambda d, y, a: (d * (1.0 - y * y),),
    "greater": lambda d, y, a, b: (None, None),
    "greater or equal": lambda d, y, a, b: (None, None),
    "choose": lambda d, y, a, b, c: (None, _apply("choose", a, d, 0.0), _apply("choose", a, 0.0, d)),
}
"""What an operation adds to the adjoints of its operands, of its own adjoint d, value y and operands."""


def adjoints(outputs: Sequence[Number], seeds: Sequence[Number], inputs: Sequence[Number]) -> list[Number]:
    """Return the adjoints of the inputs where those of the outputs are `seeds`."""
    graph = outputs[0].graph
    found: dict[int, Number] = {}

    def collect(index: int, value: Number) -> None:
        found[index] = found[index] + value if index in found else value

    for output, seed in zip(outputs, seeds, strict=True):
        collect(output.index, seed)
    for index in range(max(found), -1, -1):  # operands stand before what is made of them
        node = graph.nodes[index]
        if index in found and node.operation not in ("input", "constant"):
            operands = [Number(graph, i) for i in node.operands]
            slopes = _SLOPES[node.operation](found[index], Number(graph, index), *operands)
            for operand, slope in zip(operands, slopes, strict=True):
                if slope is not None:
                    collect(operand.index, slope)
    return [found.get(number.index, graph.number(0.0)) for number in inputs]


class _Values(ast.NodeTransformer):
    """Assignments copy, and integers divide as in C++."""

    def visit_Assign(self, node):
        self.generic_visit(node)
        node.value = ast.Call(ast.Name("_copied", ast.Load()), [node.value], [])
        return node

    def visit_AugAssign(self, node):
        """Rewrite `a += b` as `a = a + b`."""
        read = copy.deepcopy(node.target)
        read.ctx = ast.Load()
        return self.visit(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)))

    def visit_BinOp(self, node):
        self.generic_visit(node)
        names = {ast.Div: "_divided", ast.FloorDiv: "_whole", ast.Mod: "_rest"}
        name = names.get(type(node.op))
        return node if name is None else ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], [])


def _copied(value: Any) -> Any:
    if isinstance(value, Matrix):
        return Matrix([row.values for row in value.rows])
    return Row(value.values) if isinstance(value, Row) else value


def _divided(a: Any, b: Any) -> Any:
    return _whole(a, b) if isinstance(a, int) and isinstance(b, int) else a / b


def _whole(a: Any, b: Any) -> int:
    if not (isinstance(a, int) and isinstance(b, int) and a >= 0 and b > 0):
        raise Untraceable("a division without remainder")
    return a // b


def _rest(a: Any, b: Any) -> int:
    return a - b * _whole(a, b)


class _Warp:
    """Stands for the module warp in a traced function."""

    def __init__(self, graph: Graph, real: type):
        self._graph, self._real = graph, real

    def __getattr__(self, name: str) -> Any:
        return _FUNCTIONS[name] if name in _FUNCTIONS else _symbol(getattr(wp, name), self._graph, self._real)


def _symbol(value: Any, graph: Graph, real: type) -> Any:
    """Return what stands for a value from outside a traced function."""
    if value is real:
        return graph.number
    if value is wp:
        return _Warp(graph, real)
    if isinstance(value, wp.Function):
        return _FUNCTIONS[value.key] if value.is_builtin() else traced(value, graph, real)
    if real in (type(value), getattr(value, "_wp_scalar_type_", None)):
        return _constructor(value, graph) if isinstance(value, type) else _constant(value)
    if callable(value):
        raise Untraceable(f"{value} has no symbol")
    return value


def _constructor(kind: Any, graph: Graph) -> Callable[..., Any]:
    """Return what makes vectors or matrices of one type."""
    length, *more = kind._shape_
    if more:
        return lambda: Matrix([[graph.number(0.0)] * more[0]] * length)
    return lambda *values: _vector(graph, length, values)


def _constant(value: Any) -> Any:
    """Return a number, a vector or a matrix of Warp as plain numbers."""
    length, *more = getattr(value, "_shape_", (0,))
    if more:
        return Matrix([[float(value[i, j]) for j in range(more[0])] for i in range(length)])
    return Row([float(value[i]) for i in range(length)]) if length else float(value)


def _vector(graph: Graph, length: int, values: Sequence[Any]) -> Row:
    values = values or [0.0] * length
    if len(values) != length:
        raise Untraceable("a vector that is not made of its numbers")
    return Row([graph.number(value) for value in values])


def traced(function: Any, graph: Graph, real: type) -> Callable[..., Any]:
    """Return a Warp function as a Python function of numbers and rows."""
    if function in NATIVE:
        return NATIVE[function]
    own_adjoint = function.custom_grad_func is not None or function.custom_replay_func is not None
    if function.native_snippet is not None or own_adjoint or len(function.user_overloads) > 1:
        raise Untraceable(f"{function.key} is more than its Python says")
    made: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not made:
            made.append(_made(function, graph, real))
        return made[0](*map(_copied, arguments))

    return call


def _made(function: Any, graph: Graph, real: type) -> Any:
    source = function.func
    closure = dict(zip(source.__code__.co_freevars, source.__closure__ or (), strict=True))
    names = {name.id for name in ast.walk(function.adj.tree) if isinstance(name, ast.Name)}
    builtins = {"range": range, "int": int, "len": len}
    scope: dict[str, Any] = {
        "__builtins__": builtins,
        "_copied": _copied,
        "_divided": _divided,
        "_whole": _whole,
        "_rest": _rest,
    }
    for name in names:
        if name in closure:
            scope[name] = _symbol(closure[name].cell_contents, graph, real)
        elif name in source.__globals__:
            scope[name] = _symbol(source.__globals__[name], graph, real)
    definition = copy.deepcopy(function.adj.tree.body[0])
    ast.increment_lineno(definition, function.adj.fun_lineno - 1)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    tree = ast.fix_missing_locations(_Values().visit(ast.Module([definition], [])))
    exec(compile(tree, function.adj.filename, "exec"), scope)
    return scope[definition.name]


def step_struct(structure: Any, step: Any, real: type, parameters: bool = False) -> str:
    """Return the struct `Step` of native/lanes.h: a system's step, and its adjoint, for eight samples at a time.

    With `parameters` the adjoint is that of the physical parameters too.

    Raises:
        Untraceable: The step is no expression.
    """
    graph = Graph()
    sizes = {"x": structure.state_size, "c": structure.control_size, "lambda": structure.state_size}
    x, c, seeds = ([graph.add("input", name, i) for i in range(size)] for name, size in sizes.items())
    numbers = [graph.add("input", "p", i) for i in range(len(structure.parameter_names))]
    own = _parameters(structure, numbers)
    y = traced(step, graph, real)(Row(x), Row(c), own)
    found = adjoints(y.values, seeds, [*x, *c, *(numbers if parameters else ())])
    return _struct(graph, sizes, y.values, found, real)


def _parameters(structure: Any, numbers: Sequence[Number]) -> Any:
    return SimpleNamespace(**dict(zip(structure.parameter_names, numbers, strict=True)))


def check_indices(owner: str, structure: Any, functions: Any, real: type) -> None:
    """Raise an IndexError, with its place, where a system's step or cost reads or writes beyond the end of a vector."""
    graph = Graph()
    x, c = (Row([graph.number(0.5)] * size) for size in (structure.state_size, structure.control_size))
    own = _parameters(structure, [graph.number(0.5)] * len(structure.parameter_names))
    w = [Row([graph.number(0.5)] * structure.input_size)] if structure.inputs else []
    of_cost = w[: len(functions.cost.input_types) - 2]
    for function, arguments in ((functions.step, (x, c, *w, own)), (functions.cost, (x, *of_cost, own))):
        try:
            traced(function, graph, real)(*arguments)
        except IndexError as error:
            place = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename != __file__)
            raise IndexError(
                f"{owner}.functions: {error}, in {place.name} at {place.filename}:{place.lineno}: {place.line!r}"
            ) from None
        except FAILURES:
            continue


def _struct(graph: Graph, sizes: dict[str, int], y: list[Number], found: list[Number], real: type) -> str:
    """Return the C++ of a step y and of the adjoints found; what does not depend on `lambda` is kept for all flows."""
    moving: list[bool] = []  # which nodes depend on adjoints
    for node in graph.nodes:
        by_input = node.operation == "input" and node.operands[0] == "lambda"
        known = node.operation in ("input", "constant")
        moving.append(by_input or (not known and any(moving[i] for i in node.operands)))
    wanted = _reached(graph, [a.index for a in found])
    needed = {a.index for a in found}
    for i in wanted:
        if moving[i] and graph.nodes[i].operation != "input":
            needed.update(graph.nodes[i].operands)
    kept = [i for i in sorted(needed) if not moving[i] and graph.nodes[i].operation != "constant"]
    names = {i: f"kept[{k}]" for k, i in enumerate(kept)}
    first = _lines(graph, [i for i in wanted if not moving[i]], {})
    first += [f"kept[{k}] = v{i};" for k, i in enumerate(kept)]
    back = _lines(graph, [i for i in wanted if moving[i] or graph.nodes[i].operation == "constant"], names)
    d, k = sizes["x"], sizes["c"]
    places = [*(f"lambda[{i}]" for i in range(d)), *(f"mu[{i}]" for i in range(k))]
    places += [f"own[{i}]" for i in range(len(found) - d - k)]
    ends = [f"{place} = {names.get(a.index, f'v{a.index}')};" for place, a in zip(places, found, strict=True)]
    forward = _lines(graph, _reached(graph, [a.index for a in y]), {})
    return f"""
        using namespace warp_phys;
        typedef {scalar_name(real)} T;
        struct Step {{
            typedef warp_phys::lanes<T> V;
            enum {{ D = {d}, K = {k}, P = {len(found) - d - k}, READS_NEXT = 0 }};
            V kept[{max(1, len(kept))}];
            Step(const V* x, const V* c, const V* p, const V*) {{
                #pragma clang fp contract(fast)
                {" ".join(first)}
            }}
            static inline void step(const V* x, const V* c, const V* p, V* y) {{
                #pragma clang fp contract(fast)
                {" ".join(forward)}
                {" ".join(f"y[{i}] = v{a.index};" for i, a in enumerate(y))}
            }}
            inline void pull(V* lambda, V* mu{", V* own" * (len(found) > d + k)}) const {{
                #pragma clang fp contract(fast)
                {" ".join(back)}
                {" ".join(ends)}
            }}
        }};"""


def _reached(graph: Graph, outputs: Sequence[int]) -> list[int]:
    """Return the nodes that lead to some others, and these, in order."""
    found = set(outputs)
    for i in range(max(outputs), -1, -1):
        if i in found and graph.nodes[i].operation not in ("input", "constant"):
            found.update(graph.nodes[i].operands)
    return sorted(found)


def _lines(graph: Graph, chosen: Sequence[int], names: dict[int, str]) -> list[str]:
    """Return the C++ of some nodes, each a vector v0, v1 …; those in `names` are there already."""
    lines, sines = [], set()
    for i in chosen:
        operation, operands = graph.nodes[i]
        if i in names:
            continue
        if operation == "input":
            lines.append(f"const V v{i} = {operands[0]}[{operands[1]}];")
        elif operation == "constant":
            lines.append(f"const V v{i} = V{{}} + {literal(operands[0])};")
        elif operation in ("sine", "cosine"):
            a = operands[0]
            if a not in sines:
                sines.add(a)
                lines.append(f"V sine{a}, cosine{a}; sine_cosine({names.get(a, f'v{a}')}, sine{a}, cosine{a});")
            lines.append(f"const V v{i} = {operation}{a};")
        else:
            letters = {letter: names.get(j, f"v{j}") for letter, j in zip("abc", operands, strict=False)}
            value = _VALUES.get(operation) or OPERATIONS[operation].value.format()
            parts = (letters.get(part, part) for part in _LETTER.split(value))
            lines.append(f"const V v{i} = {''.join(parts)};")
    return lines


_LETTER = re.compile(r"\b([abc])\b")
_VALUES = {
    "root": "square_root(a)",
    "length": "square_root(a)",
    "exponential": "by_vectors<T>(a, [](warp_phys::vector<T> z) { return exponential_of(z); })",
    "tanh": "by_vectors<T>(a, [](warp_phys::vector<T> z) { return tanh_of(z); })",
}
"""Operations that lanes have of their own."""
