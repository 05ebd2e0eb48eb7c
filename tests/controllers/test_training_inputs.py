"""Trainings whose controller is given something at every step, and remembers."""

import numpy as np
import pytest
import torch
import warp as wp
from small_training import GIVEN, never, same_bits, small, without_seconds

from controllers import train
from controllers.checkpoint import load_checkpoint
from controllers.commandline import main, parse
from controllers.config import read_config
from controllers.record import Record
from controllers.settings import Training
from controllers.signals import draw_signals
from controllers.tracking import tracking
from controllers.training import Loop
from tests.rollout.test_systems_with_inputs import Wind
from warp_phys import CartPole

FLAGS = "--poles 1 --dt 0.02 --steps 20 --batch 8 --train-states 32 --test-states 16 --when every".split()
FLAGS += "--inputs noise steps --track position --period 5 --memory 4 --hidden 8".split()


def test_signals_are_what_they_are_called():
    given = draw_signals(("clock", "noise", "steps"), np.random.default_rng(0), 200, 12, 2.0, 5)
    assert given.shape == (200, 12, 3)
    levels, clock, noise = np.moveaxis(given, 2, 0)  # the reference first
    assert (clock == np.arange(12) / 12).all()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1.0) < 0.1
    for begin, end in ((0, 5), (5, 10), (10, 12)):
        assert (levels[:, begin:end] == levels[:, begin : begin + 1]).all()
    assert (levels[:, 4] != levels[:, 5]).all()
    assert 1.9 < abs(levels).max() <= 2.0
    (waves,) = np.moveaxis(draw_signals(("sine",), np.random.default_rng(0), 200, 12, 2.0, 5), 2, 0)
    assert 1.9 < abs(waves).max() <= 2.0
    assert waves[:, 5:] == pytest.approx(waves[:, :-5], abs=1e-12)
    assert abs(waves[:, 0]).min() < 0.1 < abs(waves[:, 0]).max()  # phases of their own


def test_inputs_are_a_function_of_seed_and_key():
    settings = Training(inputs=("noise",), steps=3)
    drawn = [settings.draw_inputs(2, *key) for key in ((0,), (1,), (0, 0), (0, 1), (1, 0))]
    drawn.append(Training(inputs=("noise",), steps=3, seed=1).draw_inputs(2, 0))
    assert len({tuple(numbers.flat) for numbers in drawn}) == len(drawn)
    assert (settings.draw_inputs(2, 0, 1) == drawn[3]).all()
    assert Training(steps=3).draw_inputs(2, 0).shape == (2, 3, 0)


def test_a_reference_adds_its_distance_to_the_cost_and_leaves_the_steps_alone():
    loop = Loop(small(tracking_cost=0.3, **GIVEN))
    inputs = loop.test_inputs.transpose(0, 1)
    with torch.no_grad():
        states, controls, _ = loop.rollout(loop.test_states, inputs=inputs)
    error = states[1:, :, 0] - inputs[:, :, 0]
    right = ((1.0 - states[1:, :, 2].cos()) + 0.3 * error.square()).mean()
    assert loop.evaluate(loop.test_states, loop.test_inputs) == pytest.approx(float(right), rel=1e-5)
    x, c = (wp.from_torch(tensor) for tensor in (states[3], controls[3].contiguous()))
    following = wp.empty_like(x)
    CartPole(poles=1, dt=0.02).step(x, c, following)
    torch.testing.assert_close(wp.to_torch(following), states[4], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_tracked_is_refused():
    with pytest.raises(ValueError, match="tracking_weight must be not negative, got -1"):
        tracking(CartPole(), "position", weight=-1.0)
    with pytest.raises(TypeError, match=r"no inputs of its own to follow a reference, Wind has wind \[m/s\], gusts"):
        tracking(Wind(), "position")


def test_minibatches_in_parts_are_given_the_same_inputs():
    updates = []
    for accumulate in (1, 3):
        loop = Loop(small(accumulate=accumulate, **GIVEN))
        loop.update(loop.train_states[None, :8], never)
        updates.append(torch.cat([parameter.grad.flatten() for parameter in loop.parameters]))
    assert (updates[0] - updates[1]).norm() < 1e-4 * updates[0].norm()


def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits(tmp_path):
    out, asked = str(tmp_path / "run"), iter(range(100))
    whole = train(small(epochs=3, **GIVEN))
    assert not train(small(epochs=3, out=out, **GIVEN), stop=lambda: next(asked) >= 6).finished
    assert load_checkpoint(tmp_path / "run")["minibatch"] == 2
    assert Training(**read_config(tmp_path / "run" / "run.toml")) == small(epochs=3, out=out, **GIVEN)
    assert main(["--resume", "--out", out]) == 0
    resumed = [Record(*values) for values in load_checkpoint(tmp_path / "run")["records"]]
    assert without_seconds(resumed) == without_seconds(whole.records)
    again = train(small(epochs=3, **GIVEN), graph=True)
    assert same_bits(again.controller, whole.controller)
    assert whole.records[-1].train_loss < whole.records[0].train_loss


def test_the_command_line_asks_for_them():
    assert parse([*FLAGS, "--epochs", "1", "--out", ""]).settings == small(epochs=1, checkpoint_every=20, **GIVEN)
