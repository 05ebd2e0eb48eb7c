"""Steps as expressions: every function that has one, against Warp's own code and adjoints; what has none."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import warp as wp

from tests.problems import PROBLEMS
from tests.systems import test_native_steps as blocks
from tests.systems.test_solve import Coupled
from warp_phys import Quantum
from warp_phys.programs.native_physics import lane_functions
from warp_phys.programs.trace import FAILURES, step_struct
from warp_phys.systems import System, SystemFunctions
from warp_phys.systems.integrators import integrate


@dataclass(frozen=True)
class Every(System):
    """A rate of change that is made of one function of Warp, or of one construct."""

    way: str = "sin"
    dt: float = 0.1
    gain: float = 0.7

    states = ("a [1]", "b [1]", "c [1]")
    controls = ("d [1]",)

    def functions(self, real):
        return _functions(self, real)

    def sample(self, batch, seed=0, dtype=np.float32):
        return np.random.default_rng(seed).uniform(-2.0, 2.0, (batch, 3)).astype(dtype)


@functools.cache
def _functions(system, real):
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters
    Pair = wp.types.vector(length=2, dtype=real)
    half, pair = real(0.5), Pair(0.3, -0.7)
    square = wp.types.matrix(shape=(2, 2), dtype=real)(1.0, 0.5, -0.25, 2.0)

    @wp.func
    def tan(x: State, c: Control, p: Parameters):
        return wp.tan(p.gain * x[0])

    @wp.func
    def exp(x: State, c: Control, p: Parameters):
        return wp.exp(x[0] * x[1])

    @wp.func
    def log(x: State, c: Control, p: Parameters):
        return wp.log(real(1.0) + x[0] * x[0]) / p.gain

    @wp.func
    def sqrt(x: State, c: Control, p: Parameters):
        return -wp.sqrt(real(1.0) + x[0] * x[0])

    @wp.func
    def tanh(x: State, c: Control, p: Parameters):
        return real(2.0) - wp.tanh(x[0] + c[0])

    @wp.func
    def extremes(x: State, c: Control, p: Parameters):
        return wp.min(x[0], x[1]) * wp.max(x[1], x[2]) + wp.abs(x[0])

    @wp.func
    def where(x: State, c: Control, p: Parameters):
        return wp.where(x[0] > x[1], x[0] * x[2], x[1]) + wp.where(x[2] <= real(0.0), x[0], real(1.0))

    @wp.func
    def vectors(x: State, c: Control, p: Parameters):
        a = Pair(x[0], x[1])
        b = Pair(x[2], a[1])
        both = (a + real(2.0) * b - a * p.gain) / real(3.0)
        return wp.dot(a, both) + wp.length(-b) * wp.length_sq(both) - b[-1]

    @wp.func
    def squared(v: Pair):
        return v[0] * v[0] + v[1]

    @wp.func
    def moved(v: Pair):
        v[0] = v[0] + real(0.5)
        return squared(v)

    @wp.func
    def copy(x: State, c: Control, p: Parameters):
        a = Pair(x[0], x[1])
        b = a
        b[0] = x[2]  # a stays, as it does when `moved` writes to its argument
        return a[0] * b[0] + b[1] * b[1] + moved(a) * a[0]

    @wp.func
    def calls(x: State, c: Control, p: Parameters):
        a = Pair(x[0], x[1])
        total = squared(a) + a[0]
        k = 7
        k //= 2
        k %= 2
        total *= real(k + 1)
        for i in range(3):
            total += x[(i + 1) % 3] * p.gain - x[i // 2] * real(wp.max(i, 1))
        return total

    @wp.func
    def constants(x: State, c: Control, p: Parameters):
        total = half * x[0]
        for i in range(2):
            for j in range(2):
                total += square[i, j] * x[i] * x[j] * pair[i]
        return total + wp.dot(pair, Pair(x[1], x[2]))

    @wp.func
    def branch(x: State, c: Control, p: Parameters):
        y = x[0]
        if x[0] > x[1]:
            y = x[1] * x[1]
        return y

    @wp.func
    def doubled(x: real):
        return real(2.0) * x

    @wp.func_grad(doubled)
    def adj_doubled(x: real, adj_ret: real):
        wp.adjoint[x] += real(3.0) * adj_ret

    @wp.func
    def surrogate(x: State, c: Control, p: Parameters):
        return doubled(x[0])

    ways = {
        "tan": tan, "exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh, "extremes": extremes, "where": where,
        "vectors": vectors, "copy": copy, "calls": calls, "constants": constants, "branch": branch,
        "surrogate": surrogate,
    }  # fmt: skip
    chosen = ways[system.way]

    @wp.func
    def rate(x: State, c: Control, p: Parameters):
        y = chosen(x, c, p)
        return State(y * x[2], y + c[0], y * y - p.gain * x[1])

    @wp.func
    def cost(x: State, p: Parameters):
        return x[0] * x[0]

    return SystemFunctions(integrate(rate, types, "euler"), cost)


WAYS = ["tan", "exp", "log", "sqrt", "tanh", "extremes", "where", "vectors", "calls", "constants"]


@pytest.mark.parametrize("system", [*(Every(way=way) for way in WAYS), Coupled()], ids=[*WAYS, "solve"])
def test_traced_steps_equal_warps(system):
    assert None not in lane_functions(system.structure, wp.float64)
    blocks.test_blocks_equal_functions(system)


def test_a_component_that_is_written_twice():
    """Warp's own adjoint of it is wrong, see docs/mathematics.md; the adjoint of the expression is right."""
    system, h = Every(way="copy"), 1e-6
    x, c, adj, _ = blocks._problem(system)
    y, adj_x, *_ = blocks._by_blocks(system, np.float64, {})

    def steps(x):
        out = wp.zeros_like(blocks._array(x, np.float64))
        system.step(blocks._array(x, np.float64), blocks._array(c, np.float64), out)
        return out.numpy()

    np.testing.assert_allclose(y, steps(x), rtol=1e-14)
    for i in range(3):
        change = h * np.eye(3)[i]
        slope = (steps(x + change) - steps(x - change)) / (2 * h)
        np.testing.assert_allclose(adj_x[..., i], (adj * slope).sum(-1), atol=1e-8)


@pytest.mark.parametrize("way", ["branch", "surrogate"])
def test_what_is_no_expression_is_left_to_warp(way):
    """A number that decides what is done; an adjoint that is not that of the value."""
    assert lane_functions(Every(way=way).structure, wp.float64) == (None, None)
    blocks.test_blocks_equal_functions(Every(way=way))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_systems_are_traced_unless_they_are_large(problem):
    large = problem.system.state_size > 40 or isinstance(problem.system, Quantum)  # which has an adjoint of its own
    structure = problem.system.structure
    is_traced = True
    try:
        step_struct(structure, structure.functions(wp.float32).step, wp.float32)
    except FAILURES:
        is_traced = False
    assert is_traced == (not large)
