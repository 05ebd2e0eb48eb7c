"""The table of elementwise operations of row programs: what each computes, and its adjoint, in C++ on vectors.

In an expression a, b, c are operands, y is the value, d its adjoint; {0}, {1} are numbers that stand in the program.
The derivatives at kinks are torch's.
"""

from typing import NamedTuple


class Operation(NamedTuple):
    """An operation on numbers, applied to each number of a row."""

    value: str
    """The value, an expression."""
    adjoints: tuple[str, ...]
    """For each operand what is added to its adjoint; an empty text where torch has no graph."""


OPERATIONS: dict[str, Operation] = {
    "add": Operation("a + b", ("d", "d")),
    "subtract": Operation("a - b", ("d", "-d")),
    "multiply": Operation("a * b", ("d * b", "d * a")),
    "divide": Operation("a / b", ("d / b", "-d * y / b")),
    "negate": Operation("-a", ("-d",)),
    "scale": Operation("a * {0}", ("d * {0}",)),
    "shift": Operation("a + {0}", ("d",)),
    "square": Operation("a * a", ("2 * a * d",)),
    "power": Operation("power(a, V{{}} + {0})", ("d * {0} * power(a, V{{}} + ({0} - 1))",)),
    "reciprocal": Operation("1 / a", ("-d * y * y",)),
    "raise": Operation(
        "power(a, b)",
        (
            "b == V{{}} ? V{{}} : d * b * power(a, b - 1)",
            "((a == V{{}}) & (b >= V{{}})) ? V{{}} : d * y * logarithm(a)",
        ),
    ),
    "length": Operation("root(a)", ("y == V{{}} ? V{{}} : d / (2 * y)",)),
    "root": Operation("root(a)", ("d / (2 * y)",)),
    "reciprocal root": Operation("1 / root(a)", ("d * y / (-2 * a)",)),
    "sine": Operation("sine(a)", ("d * cosine(a)",)),
    "cosine": Operation("cosine(a)", ("-d * sine(a)",)),
    "tangent": Operation("tangent(a)", ("d * (1 + y * y)",)),
    "arctangent": Operation("arctangent(a)", ("d / (1 + a * a)",)),
    "angle": Operation(  # of nothing: 0, as in torch
        "angle_of(a, b)",
        (
            "(a == V{{}}) & (b == V{{}}) ? V{{}} : d * b / (a * a + b * b)",
            "(a == V{{}}) & (b == V{{}}) ? V{{}} : -d * a / (a * a + b * b)",
        ),
    ),
    "arcsine": Operation("arcsine(a)", ("d / root(1 - a * a)",)),
    "arccosine": Operation("arccosine(a)", ("-d / root(1 - a * a)",)),
    "hyperbolic sine": Operation("hyperbolic_sine(a)", ("d * hyperbolic_cosine(a)",)),
    "hyperbolic cosine": Operation("hyperbolic_cosine(a)", ("d * hyperbolic_sine(a)",)),
    "inverse hyperbolic sine": Operation("inverse_hyperbolic_sine(a)", ("d / root(a * a + 1)",)),
    "inverse hyperbolic cosine": Operation("inverse_hyperbolic_cosine(a)", ("d / root(a * a - 1)",)),
    "inverse hyperbolic tangent": Operation("inverse_hyperbolic_tangent(a)", ("d / (1 - a * a)",)),
    "exponential": Operation("exponential_of(a)", ("d * y",)),
    "exponential less one": Operation("exponential_less_one(a)", ("d * (y + 1)",)),
    "logarithm": Operation("logarithm(a)", ("d / a",)),
    "logarithm of one more": Operation("logarithm_of_one_more(a)", ("d / (1 + a)",)),
    "error function": Operation("error_function(a)", ("d * {0} * exponential_of(-a * a)",)),
    "tanh": Operation("tanh_of(a)", ("d * (1 - y * y)",)),
    "sigmoid": Operation("logistic(a)", ("d * y * (1 - y)",)),
    "relu": Operation("a < V{{}} ? V{{}} : a", ("y > V{{}} ? d : V{{}}",)),
    "silu": Operation("a * logistic(a)", ("d * logistic(a) * (1 + a * (1 - logistic(a)))",)),
    "elu": Operation("a > V{{}} ? a : {0} * (exponential_of(a) - 1)", ("a > V{{}} ? d : d * {0} * exponential_of(a)",)),
    "leaky relu": Operation("a > V{{}} ? a : a * {0}", ("a > V{{}} ? d : d * {0}",)),
    "softplus": Operation(
        "a * {0} > V{{}} + {1} ? a : softplus_of(a * {0}) / {0}",
        ("a * {0} > V{{}} + {1} ? d : d * logistic(a * {0})",),
    ),
    "absolute": Operation("a < V{{}} ? -a : a", ("a > V{{}} ? d : a < V{{}} ? -d : V{{}}",)),
    "sign": Operation("one_where<V>(a > V{{}}) - one_where<V>(a < V{{}})", ("V{{}}",)),
    "clamp": Operation(
        "clamped(a, {0}, {1})",
        ("((a >= V{{}} + {0}) & (a <= V{{}} + {1})) ? d : V{{}}",),
    ),
    "hardtanh": Operation(
        "clamped(a, {0}, {1})",
        ("((a > V{{}} + {0}) & (a < V{{}} + {1})) ? d : V{{}}",),
    ),
    "maximum": Operation(
        "larger(a, b)",
        ("a > b ? d : a < b ? V{{}} : d * {0}", "b > a ? d : b < a ? V{{}} : d * {1}"),
    ),
    "minimum": Operation(
        "smaller(a, b)",
        ("a < b ? d : a > b ? V{{}} : d * {0}", "b < a ? d : b > a ? V{{}} : d * {1}"),
    ),
    "floor": Operation("__builtin_elementwise_floor(a)", ("V{{}}",)),
    "ceiling": Operation("__builtin_elementwise_ceil(a)", ("V{{}}",)),
    "truncated": Operation("__builtin_elementwise_trunc(a)", ("V{{}}",)),
    "rounded": Operation("__builtin_elementwise_rint(a)", ("V{{}}",)),
    "remainder": Operation("remainder(a, b)", ("d", "-d * __builtin_elementwise_floor(a / b)")),
    "remainder towards zero": Operation(
        "remainder_towards_zero(a, b)", ("d", "-d * __builtin_elementwise_trunc(a / b)")
    ),
    "stop": Operation("a", ("",)),
    "derivative of": Operation("a", ("", "d")),
    "greater": Operation("one_where<V>(a > b)", ("", "")),
    "greater or equal": Operation("one_where<V>(a >= b)", ("", "")),
    "equal": Operation("one_where<V>(a == b)", ("", "")),
    "both": Operation("one_where<V>((a != V{{}}) & (b != V{{}}))", ("", "")),
    "either": Operation("one_where<V>((a != V{{}}) | (b != V{{}}))", ("", "")),
    "choose": Operation("a != V{{}} ? b : c", ("", "a != V{{}} ? d : V{{}}", "a != V{{}} ? V{{}} : d")),
}
"""The operations by name."""

FUSED = {"tanh": "hyperbolic_tangent", "relu": "relu", "sigmoid": "sigmoid", "elu": "elu", "silu": "silu"}
"""Those that a dense node can apply to its sums while they are in registers: `native/layers.h` has them; elu of 1."""

KEPT_SLOPES = {"silu"}
"""Those of them whose values do not tell their slopes."""
