"""How much arithmetic an update needs: the matrix products of the controller, counted from the layer sizes."""

from tests.benchmarks.cases import Case, grid_lengths, weight_shapes


def multiply_adds(case: Case) -> tuple[int, int]:
    """Multiply-adds of one evaluation of the controller for one state: of all layers, and of the first one.

    >>> from tests.benchmarks.cases import make_case
    >>> multiply_adds(make_case("cartpole", "R", 8))
    (11100, 1000)
    """
    windows = (*grid_lengths(case.sizes["points"]), 1) if case.system == "quantum" else (1, 1, 1)
    layers = [n * inputs * shape[-1] for n, (shape, inputs, _) in zip(windows, weight_shapes(case), strict=True)]
    return sum(layers), layers[0]


def operations(case: Case) -> int:
    """Floating-point operations of the controller's matrix products in one update.

    With m multiply-adds an evaluation, m1 of them in the first layer, and n = batch × steps evaluations: forward pass,
    weight gradients and input gradients take 2 m n each. M needs no gradient of the state through the controller,
    which spares the first layer's 2 m1 n. C has one forward pass and the backward passes of R and of M.
    """
    m, m1 = multiply_adds(case)
    each = {"R": 6 * m, "M": 6 * m - 2 * m1, "C": 10 * m - 2 * m1}[case.flow]
    return each * case.batch * case.steps
