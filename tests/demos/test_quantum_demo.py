"""The quantum particle: the picture shows the wave, a click disturbs it, the control brings it back."""

import numpy as np
import pytest
from PIL import Image

from demos import quantum
from demos.quantum import QuantumDemo, Settings, make_system
from tests.demos.touch import choose, click, play, press_button, staged


def norm(demo):
    return np.linalg.norm(demo.simulation.state)


def test_it_draws_the_state():
    with staged(QuantumDemo, Settings()) as (demo, stage):
        play(stage, 1.0)
        density = np.abs(demo.wave()) ** 2
        curve = demo.moving[0].get_ydata()
        np.testing.assert_allclose(curve[1:-1], density * 33 / 2, rtol=1e-5)
        np.testing.assert_allclose(demo.dots.get_offsets()[:, 1], np.angle(demo.wave()), atol=1e-6)
        assert demo.overlap_line.get_ydata()[-1] == demo.trace[-1][1]
        assert demo.pulse_line.get_ydata()[-1] == demo.trace[-1][0]
        assert norm(demo) == pytest.approx(1.0, abs=1e-5)


def test_the_state_is_reached_and_reached_again_after_a_click():
    with staged(QuantumDemo, Settings(target=4, speed=40.0)) as (demo, stage):
        assert demo.overlap() < 0.1
        play(stage, 10.0)
        reached = np.mean([overlap for _, overlap in demo.trace][-32:])
        assert reached > 0.85
        click(demo, demo.world, 0.5, 1.0)
        assert norm(demo) == pytest.approx(1.0, abs=1e-5)
        assert demo.overlap() < reached - 0.05
        play(stage, 10.0)
        assert np.mean([overlap for _, overlap in demo.trace][-32:]) > 0.8


def test_a_click_makes_a_bump_where_it_was():
    with staged(QuantumDemo, Settings()) as (demo, stage):
        before = demo.wave()
        click(demo, demo.world, 0.5, 1.0)
        change = np.abs(demo.wave() - before * (before.conj() @ demo.wave()))
        assert make_system(3).positions[change.argmax()] == pytest.approx(0.5, abs=0.15)


def test_choices():
    with staged(QuantumDemo, Settings()) as (demo, stage):
        state = demo.simulation.state.copy()
        choose(demo, "target", 2)
        assert demo.target == 5
        np.testing.assert_array_equal(demo.simulation.state, state)
        press_button(demo, "control on / off")
        play(stage, 0.5)
        assert demo.simulation.control[0] == 0.0
        press_button(demo, "new start")
        assert (demo.simulation.state != state).any()


@pytest.mark.parametrize("target", quantum.TARGETS)
def test_every_controller_is_there(target):
    with staged(QuantumDemo, Settings(target=target)) as (demo, _):
        assert np.isfinite(demo.simulation.decide()).all()


def test_a_file(tmp_path):
    assert quantum.main(["--save", str(tmp_path / "a.gif"), "--seconds", "0.2"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 5  # pictures that are the same become one that stays longer
