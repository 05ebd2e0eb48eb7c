"""All contestants compute the same: loss and update at the same weights and states, and a first training step."""

import importlib.util

import numpy as np
import pytest

from tests.benchmarks import eager, engine
from tests.benchmarks.cases import PUBLISHED, make_case
from tests.benchmarks.statistics import relative_difference

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX, the extra bench")


def small_case(system, flow):
    return make_case(system, flow, 4, steps=12)


def assert_same(program, other):
    for _ in range(2):  # the second time after updates
        (loss, update), (expected_loss, expected) = program.loss_and_update(), other.loss_and_update()
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert [array.shape for array in update] == [array.shape for array in expected]
        assert relative_difference(update, expected) < 1e-3
        for each in (program, other):
            each.start()
            each.run(2)


@pytest.mark.parametrize("system", PUBLISHED)
def test_torch_computes_what_the_engine_computes(system):
    case = small_case(system, "C")  # M and R, compared
    assert_same(eager.Program(case), engine.Program(case, "general"))


@needs_jax
@pytest.mark.parametrize(("flow", "variant"), [("R", "plain"), ("C", "shared"), ("C", "deferred")])
@pytest.mark.parametrize("system", PUBLISHED)
def test_jax_computes_what_torch_computes(system, flow, variant):
    from tests.benchmarks.jax_peer.program import Program

    case = small_case(system, flow)
    program = Program(case, variant, inner=2, by_hand=variant == "deferred")
    assert_same(program, eager.Program(case))


@needs_jax
def test_updates_lead_to_the_same_weights():
    """Two updates of Adam, in one compiled call and one by one."""
    from tests.benchmarks.jax_peer.program import Program

    case = small_case("cartpole", "R")
    tuned, written, plain = Program(case, "deferred", inner=2), Program(case), eager.Program(case)
    for program in (tuned, written, plain):
        program.start()
        program.run(2)
    weights = [parameter.detach().numpy().T for parameter in plain.parameters]
    start = [np.asarray(array) for array in tuned.weights]
    moves = [w - s for w, s in zip(weights, start, strict=True)]
    for program in (tuned, written):
        found = [np.asarray(w) - s for w, s in zip(program.training[0], start, strict=True)]
        assert relative_difference(found, moves) < 1e-2  # where a gradient is nearly zero, Adam amplifies rounding
