"""The weather in a rollout and the picture of a diagnosis: right numbers, and files without a display."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from demos import diagnose as program
from demos import weather, weather_numbers
from demos.colours import colour
from demos.diagnostics_picture import draw
from demos.weather_numbers import FLOWS, Forecast, Scenario, Settings, growth, train
from tests.demos.touch import control, curves, made, play, press
from warp_phys import CartPole
from warp_phys.diagnose.rotation import Rotation
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout, diagnose

SMALL = Scenario("a cart", CartPole(poles=1, dt=0.05), 20, "final", 1, 24)


@pytest.fixture(scope="module")
def forecast():
    torch.set_num_threads(1)
    return Forecast(SMALL, samples=4, seed=0)


@pytest.fixture
def small(monkeypatch, forecast):
    monkeypatch.setattr(weather_numbers, "SCENARIOS", {"quantum": SMALL})
    monkeypatch.setattr(weather, "SCENARIOS", {"quantum": SMALL})
    monkeypatch.setattr(weather, "Forecast", lambda *_: forecast)


@pytest.mark.parametrize("horizon", [3, 24])
def test_every_horizon_is_that_of_a_rollout(forecast, horizon):
    """What is made of one long unrolling is what a rollout of that length diagnoses."""
    rollout = Rollout(SMALL.system, train(SMALL, 0), horizon)
    found = diagnose(rollout, SMALL.system.sample(4, seed=1), FLOWS)
    expected = found.adjoints / found.batch[:, -1:, None]
    np.testing.assert_allclose(forecast.adjoints(horizon)[[0, 1, 2]], expected[[0, 1, 2]], rtol=2e-3, atol=1e-5)
    grown = growth(forecast.adjoints(horizon))
    assert grown[0][0] == pytest.approx(found.batch[0, 1] / found.batch[0, -1], rel=2e-3)
    assert grown[0][1] == pytest.approx((found.adjoints[0, 1] / found.adjoints[0, -1]).max(), rel=2e-3)
    assert grown[2][0] == 0.0


def test_scrubbing_moves_the_light(small):
    with made(weather.WeatherDemo, Settings(horizon=5, samples=4, seed=1)) as demo:
        names, steps, found = curves(demo, "strength of feedback")
        assert names[0] == "R regular" and list(steps) == [1, 2, 3, 4, 5]
        control(demo, "horizon").move(12)
        _, steps, found = curves(demo, "strength of feedback")
        assert len(steps) == 12 and found[0, -1] == pytest.approx(1.0) and "Back over 12 steps" in demo.words()
        assert np.isnan(found[2, :-1]).all()
        light = demo.picture().parts["light R"]
        height = weather.TALL * np.log10(np.clip(found[0], weather.LEAST, weather.MOST))
        np.testing.assert_allclose(light.points[:, 2], height)
        press(demo, "let the horizon grow")
        play(demo, 1.0, 0.1)
        assert demo.position == 24 and not demo.playing
        press(demo, "let the horizon grow")
        assert demo.position == 2.0


def test_light_flows_backward(small):
    with made(weather.WeatherDemo, Settings(horizon=20, samples=4, seed=1)) as demo:
        places = []
        for _ in range(4):
            play(demo, 0.2 * weather.PULSE, 0.1)
            parts = demo.picture().parts
            places.append(parts["pulse R"].centre[0])
            # it is brightest where the pulse is
            brightest = parts["light R"].points[parts["light R"].colour.sum(axis=1).argmax()]
            assert brightest[0] == pytest.approx(places[-1])
        assert (np.diff(places) < 0.0).all()


def test_it_opens_where_feedback_has_grown_a_hundredfold_and_trains_nothing(monkeypatch):
    monkeypatch.setattr(weather_numbers, "train", lambda *_: pytest.fail("a training has begun"))
    with made(weather.WeatherDemo, Settings()) as demo:
        (r, _), (m, _), _, (c, _) = growth(demo.adjoints)
        assert r > 100.0 and 0.5 < m < 2.0 and c < 2.0


def test_diagnosis_prints_and_draws(tmp_path, capsys):
    path = tmp_path / "diagnosis.png"
    flags = "--poles 1 --steps 20 --epochs 0 --samples 4 --probes 0"
    assert program.main([*flags.split(), "--save", str(path)]) == 0
    printed = capsys.readouterr().out
    for words in ("CartPole, 20 steps, 4 samples", "feedback of", "closed loop", "4.weight", "R's feedback"):
        assert words in printed
    with Image.open(path) as image:
        assert image.size == (1200, 680) and len(np.unique(np.asarray(image.convert("L")))) > 50


def test_the_picture_has_the_numbers_and_colours():
    found = program.compute(program.Settings(poles=1, steps=20, epochs=0, samples=4, probes=0))
    rotation = {"modified": Rotation(0.25, 0.05, 1.0, 0.1, 4.0, 0.2, 8)}
    figure, turning = Figure(), Figure()
    draw(figure, found)
    draw(turning, replace(found, rotation=rotation))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    line = lines["R regular"]
    assert line.get_color() == colour("R")
    np.testing.assert_allclose(line.get_ydata(), found.batch[found.index(resolve("R"))] / 2.0)
    assert turning.axes[5].patches[0].get_height() == 0.25
    assert to_hex(turning.axes[5].patches[0].get_facecolor()).upper() == colour("M")
    assert "not asked for" in [text.get_text() for text in figure.axes[5].texts]


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (weather.main, ["--system", "pendulum"], "system must be one of quantum, cartpole, got 'pendulum'"),
        (weather.main, ["--horizon", "999"], "horizon"),
        (program.main, ["--steps", "1"], "steps"),
        (program.main, ["--probes", "1"], "probes must be 0, or at least 3 for a standard error, got 1"),
        (program.main, ["--probes", "2"], "probes must be 0, or at least 3 for a standard error, got 2"),
        (program.main, ["--save", "x.gif"], "save must end in .png, .pdf, .svg, got 'x.gif'"),
    ],
)
def test_mistakes_are_one_line(main, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
