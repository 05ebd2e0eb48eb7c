"""The benchmark of physical parameters: contestants compute the same, and the table has its lines."""

import importlib.util

import pytest

from tests.benchmarks.cases import make_case
from tests.benchmarks.parameters import engine
from tests.benchmarks.parameters.__main__ import HEADER, run
from tests.benchmarks.settings import Settings
from tests.benchmarks.statistics import relative_difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX, the extra bench")


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("flow", ["R", "C"])
def test_jax_computes_what_the_engine_computes(flow, per_sample):
    """Each by itself: the adjoints of two parameters are few beside those of all weights."""
    from tests.benchmarks.parameters.jax_peer import Program

    case = make_case("cartpole", flow, 4, poles=1, steps=12)
    (loss, update), (expected_loss, expected) = (
        program.loss_and_update() for program in (engine.Program(case, "fused", per_sample), Program(case, per_sample))
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5) and len(update) == len(expected) == 8
    shape = (4,) if per_sample else ()
    assert [array.shape for array in update[-2:]] == [array.shape for array in expected[-2:]] == [shape, shape]
    assert all(relative_difference([a], [b]) < 1e-3 for a, b in zip(update[-2:], expected[-2:], strict=True))
    assert relative_difference(update, expected) < 1e-4


def test_the_table(tmp_path):
    lines = run(Settings(flow=("R",), repeats=2, seconds=0.0), str(tmp_path))
    assert [line[:2] for line in lines] == [["one set", "R"], ["one per sample", "R"]]
    assert all(len(line) == len(HEADER) and line[-1] == "" for line in lines)
