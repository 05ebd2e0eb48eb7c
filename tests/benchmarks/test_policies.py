"""Policies of one's own: all contestants compute the same, and the tables have their rows. Nothing is said of time."""

import doctest
import importlib.util

import pytest

from tests.benchmarks.cases import make_case
from tests.benchmarks.policies import eager, engine, weights
from tests.benchmarks.policies.__main__ import Chosen, Result, main, run, tables
from tests.benchmarks.statistics import relative_difference

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX, the extra bench")


def test_doctests():
    assert doctest.testmod(weights).failed == 0


@needs_jax
@pytest.mark.parametrize("policy", weights.POLICIES)
def test_jax_computes_what_torch_computes(policy):
    from tests.benchmarks.policies.jax_peer import Program

    case = make_case("cartpole", "R", 4, poles=1, steps=12)
    (loss, update), (expected_loss, expected) = (
        program.loss_and_update() for program in (Program(case, policy), eager.Program(case, policy))
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert [array.shape for array in update] == [array.shape for array in expected]
    assert relative_difference(update, expected) < 1e-4


def test_policies_are_fused_and_agree(tmp_path):
    chosen = Chosen(policy=("residual", "clamped"), flow=("C",), batch=(8,), repeats=2, out=str(tmp_path))
    results = run(chosen, lambda _text: None)
    assert [result.policy for result in results] == ["residual", "clamped"]
    for result in results:
        assert {"fused", "general", "torch"} <= set(result.entries)
        assert set(result.notes) <= {"JAX is not installed"}
        assert all(len(entry.ms) == 2 for entry in result.entries.values())
    text = (tmp_path / "policies.md").read_text(encoding="utf-8")
    assert text == tables(results)
    assert sum(line.startswith(("| residual | C | 8 |", "| clamped | C | 8 |")) for line in text.splitlines()) == 4


def test_what_cannot_be_read_is_said():
    """A policy that the fused backend does not take has a row that says why not."""
    case = make_case("cartpole", "R", 8, poles=1)
    result = Result("plain", case, notes=["fused: no"])
    assert result.cells()[3] == "–"
    assert result.cells()[-1] == "fused: no"
    assert engine.Program(case, "plain", "general").rollout.why_general is not None


def test_unknown_policies_are_refused():
    with pytest.raises(SystemExit):
        main(["--policy", "telepathy"])
