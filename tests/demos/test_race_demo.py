"""The race: four trainings in a thread, their curves and carts in the picture, pause, restart, and an end."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from controllers.training import Loop
from demos import race
from demos.race import RaceDemo, Settings
from demos.race_training import FLOWS, Lane, Race
from tests.demos.touch import choose, press_button, staged


def wait_for(race, epochs, seconds=60.0):
    """Wait until all lanes have come so far."""
    deadline = time.monotonic() + seconds
    while race.finished_epochs() < epochs:
        assert race.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def finished():
    """A short race that is over."""
    made = Race(poles=1, rate=1e-3, seed=0, epochs=3)
    made.start()
    made.join(120)
    assert not made.is_alive()
    return made


def test_every_lane_is_the_training_alone(finished):
    """Taking turns changes nothing."""
    for flow in ("R", "C"):
        settings = finished.training(flow)
        loop = Loop(settings)
        loop.run(lambda: False, None, None)
        assert finished.lanes[flow].losses[0] == loop.records[0].test_loss
    assert [len(lane.losses) for lane in finished.lanes.values()] == [3] * 4
    assert len({lane.losses[-1] for lane in finished.lanes.values()}) == 4


def test_all_lanes_start_from_the_same_weights(finished):
    weights = [Loop(finished.training(flow)).controller[0].weight for flow in FLOWS]
    assert all((weight == weights[0]).all() for weight in weights)


def test_curves_and_carts_show_what_was_learned(finished):
    with staged(RaceDemo, Settings(poles=1, epochs=2)) as (demo, stage):
        wait_for(demo.race, 2)
        demo.race.join(20)
        stage.show(0.0)
        stage.show(0.4)
        for line, lane, ride in zip(demo.lines, demo.race.lanes.values(), demo.rides, strict=True):
            assert list(line.get_ydata()) == lane.losses and list(line.get_xdata()) == [1, 2]
            assert ride is lane.ride
        assert "done" in demo.note.get_text()
        step = int(demo.clock * race.SLOWLY / 0.01)
        cart = demo.moving[len(demo.lines) + 1]
        assert np.mean(cart.get_xy()[:4, 0]) == pytest.approx(demo.rides[0].states[step, 0], abs=1e-5)


def test_pause_rate_and_restart():
    before = threading.active_count()
    with staged(RaceDemo, Settings(poles=1, epochs=100000)) as (demo, stage):
        wait_for(demo.race, 1)
        press_button(demo, "pause")
        time.sleep(0.5)
        done = demo.race.finished_epochs()
        time.sleep(0.5)
        assert demo.race.finished_epochs() == done
        demo.set_rate(-2.0)
        first = demo.race
        press_button(demo, "pause")
        wait_for(first, done + 2)
        assert first.rate == pytest.approx(0.01)
        assert "rate 1.0e-02" in demo.describe(1)
        press_button(demo, "restart")
        assert demo.race is not first and demo.race.seed == first.seed + 1 and demo.race.rate == pytest.approx(0.01)
        choose(demo, "poles", 1)
        stage.show(0.1)
        assert demo.race.poles == 2 and demo.poles == 2
    assert threading.active_count() == before


def test_the_learning_rate_reaches_the_optimiser(finished):
    loop, lane = Loop(finished.training("R")), Lane("R")
    finished.rate = 0.005
    finished.turn(lane, loop, 1)
    assert loop.optimiser.param_groups[0]["lr"] == 0.005 and len(lane.losses) == 1


def test_an_error_in_the_thread_ends_the_demo(tmp_path, monkeypatch):
    def fail(self, flow):
        raise ValueError("no such training")

    monkeypatch.setattr(Race, "training", fail)
    with pytest.raises(ValueError, match="no such training"):
        race.main(["--save", str(tmp_path / "race.png"), "--seconds", "1"])
    assert not list(tmp_path.iterdir())


def test_a_lane_that_diverges_is_named():
    class Broken:
        optimiser = Loop(Race(1, 1e-3, 0, 1).training("R")).optimiser
        settings = Race(1, 1e-3, 0, 1).training("R")

        def run(self, *arguments):
            raise race_training_diverged()

    made = Race(1, 1e-3, 0, 1)
    made.turn(made.lanes["R"], Broken(), 1)
    assert made.lanes["R"].diverged and not made.lanes["M"].diverged


def race_training_diverged():
    """A divergence as the engine raises it."""
    from demos.race_training import Diverged

    error = Diverged.__new__(Diverged)
    Exception.__init__(error, "states are not finite")
    return error


def test_a_file(tmp_path):
    assert race.main(["--save", str(tmp_path / "a.gif"), "--seconds", "0.4", "--poles", "1"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 10  # pictures that are the same become one that stays longer
