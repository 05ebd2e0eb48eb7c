"""The plane to touch: the picture shows the paths that were computed, from where it was clicked."""

import numpy as np
import pytest
from PIL import Image

from demos import plane
from demos.colours import colour
from demos.landscape_numbers import FLOWS, Start, find_paths
from demos.landscape_numbers import Settings as Numbers
from demos.plane import PlaneDemo, Settings
from tests.demos.touch import choose, click, play, press_button, staged

SHORT = Settings(iterations=12)


def test_a_click_starts_there_and_the_paths_are_those_of_the_optimiser():
    with staged(PlaneDemo, SHORT) as (demo, stage):
        click(demo, demo.world, 1.0, -3.0)
        np.testing.assert_allclose(demo.start, [1.0, -3.0], atol=1e-9)
        play(stage, 1.0)
        numbers = Numbers(starts=[Start(1.0, -3.0)], iterations=12)
        for letter, line, losses in zip(FLOWS, demo.paths_lines, demo.loss_lines, strict=True):
            path = find_paths(numbers.landscape(), numbers.starts, letter, numbers.rule, 12)[:, 0]
            np.testing.assert_allclose(np.transpose(line.get_data()), path, atol=1e-9)
            assert line.get_color() == colour(letter)
            expected = numbers.landscape().evaluate(path, ()).loss
            np.testing.assert_allclose(losses.get_ydata(), np.maximum(expected, 1e-7), rtol=1e-6)


def test_paths_grow_as_time_passes_and_again():
    with staged(PlaneDemo, SHORT) as (demo, stage):
        assert len(demo.paths_lines[0].get_xdata()) == 1
        play(stage, 0.12)
        assert 5 <= len(demo.paths_lines[0].get_xdata()) <= 10
        play(stage, 1.0)
        assert len(demo.paths_lines[0].get_xdata()) == 13
        press_button(demo, "again")
        stage.show(0.0)
        assert len(demo.paths_lines[0].get_xdata()) == 1


def test_only_a_gradient_field_gains_nothing_on_a_round():
    with staged(PlaneDemo, SHORT) as (demo, stage):
        gains = dict(zip(FLOWS, demo.gains, strict=True))
        assert abs(gains["R"]) < 1e-3
        assert min(abs(gains["M"]), abs(gains["S"])) > 0.1
        assert [bar.get_width() for bar in demo.bars] == pytest.approx(list(demo.gains))


def test_arrows_lead_down_along_the_chosen_flow():
    with staged(PlaneDemo, SHORT) as (demo, stage):
        choose(demo, "arrows: descent along", 0)
        update = demo.landscape.evaluate(demo.grid, "R").updates[0]
        along = np.stack([demo.arrows.U, demo.arrows.V], axis=1)
        assert ((along * update).sum(axis=1) < 0.0).mean() > 0.99
        np.testing.assert_allclose(np.hypot(*along.T), 1.0, atol=1e-9)


def test_another_optimiser_takes_another_path():
    with staged(PlaneDemo, SHORT) as (demo, stage):
        before = demo.paths.copy()
        choose(demo, "optimiser", 1)
        assert demo.optimiser == "descent" and (demo.paths[:, 1] != before[:, 1]).any()
        step = demo.paths[0, 1] - demo.paths[0, 0]
        np.testing.assert_allclose(
            step, -0.01 * demo.landscape.evaluate(demo.start[None], "R").updates[0, 0], rtol=1e-9
        )


def test_a_file(tmp_path):
    assert plane.main(["--save", str(tmp_path / "a.gif"), "--seconds", "0.2", "--iterations", "12"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 5  # pictures that are the same become one that stays longer
