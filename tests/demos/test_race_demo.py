"""The race: trainings in a thread, their curves and carts in the picture, pause, restart, and an end."""

import re
import threading
import time

import numpy as np
import pytest

from controllers.training import Loop
from demos import race, race_starts
from demos.colours import colour
from demos.race import RaceDemo, Settings
from demos.race_training import FLOWS, Lane, Race
from tests.demos.touch import choose, control, curves, made, press


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
    assert [len(lane.losses) for lane in finished.lanes.values()] == [3] * len(FLOWS)
    assert len({lane.losses[-1] for lane in finished.lanes.values()}) == len(FLOWS)


def test_all_lanes_start_from_the_same_weights(finished):
    weights = [Loop(finished.training(flow)).controller[0].weight for flow in FLOWS]
    assert all((weight == weights[0]).all() for weight in weights)


def test_curves_and_carts_show_what_was_learned(finished):
    with made(RaceDemo, Settings(poles=1, epochs=2)) as demo:
        wait_for(demo.race, 2)
        demo.race.join(20)
        demo.advance(0.0)
        demo.advance(0.4)
        names, epochs, losses = curves(demo, "test loss; 0: all upright, 2: all hanging")
        assert names == ["R regular", "M modified", "S stopped", "C combined", "either"] and list(epochs) == [1.0, 2.0]
        for row, lane, ride in zip(losses, demo.race.lanes.values(), demo.rides, strict=True):
            assert list(row) == lane.losses and ride is lane.ride
        assert "done" in demo.words()
        # every lane shows its latest controller, all from the same state and at the same moment
        assert all((ride.states[0] == demo.rides[0].states[0]).all() for ride in demo.rides)
        step = int(demo.clock * race.SLOWLY / 0.01)
        parts = demo.picture().parts
        for flow, ride in zip(FLOWS, demo.rides, strict=True):
            pole, angle = parts[f"{flow} pole 1"], ride.states[step, 2]
            assert np.subtract(pole.end, pole.start) == pytest.approx([np.sin(angle), 0.0, np.cos(angle)], abs=1e-5)
            assert parts[f"{flow} cart"].colour == colour(flow)
            assert parts[f"{flow} name"].words == f"{flow} {demo.race.lanes[flow].losses[-1]:.2g}"


def test_pause_rate_and_restart():
    before = threading.active_count()
    with made(RaceDemo, Settings(poles=1, epochs=100000)) as demo:
        wait_for(demo.race, 1)
        press(demo, "pause / go on")
        time.sleep(0.5)
        done = demo.race.finished_epochs()
        time.sleep(0.5)
        assert demo.race.finished_epochs() == done
        control(demo, "log10 of the rate").move(-2.0)
        first = demo.race
        press(demo, "pause / go on")
        wait_for(first, done + 2)
        assert first.rate == pytest.approx(0.01)
        assert "rate 1.0e-02" in demo.words()
        press(demo, "restart with other weights")
        assert demo.race is not first and demo.race.seed == first.seed + 1 and demo.race.rate == pytest.approx(0.01)
        choose(demo, "poles", "2")
        demo.advance(0.1)
        assert demo.race.poles == 2 and demo.picture().parts["C pole 2"]
    assert threading.active_count() == before


def test_who_falls_first(capsys):
    """The command that says so runs the race that is shown, until somebody has fallen."""
    assert race_starts.first_to_fall({"R": [0.2], "C": [0.3]}) == ("nobody", 0)
    assert race_starts.main(["--starts", "1", "--poles", "1", "--epochs", "20"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^start 0: first below 0\.1: (\w+), epoch (\d+); then R ", said, re.MULTILINE), said
    assert re.search(r"^First to fall: \w+ 1$", said, re.MULTILINE), said
    with pytest.raises(SystemExit):
        race_starts.main(["--starts", "0"])


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
