"""The herd: the target and the dogs follow the mouse, and the sheep go to the target."""

import numpy as np
import pytest
from PIL import Image

from demos import herd
from demos.herd import SYSTEM, HerdDemo, Settings
from tests.demos.touch import choose, mouse, play, press_button, staged


def flock(demo):
    """Mean distance of the sheep from the target."""
    return float(np.hypot(*(demo.positions()[SYSTEM.drivers :] - demo.target).T).mean())


def test_it_draws_the_state():
    with staged(HerdDemo, Settings()) as (demo, stage):
        play(stage, 1.0)
        agents = demo.simulation.between().reshape(-1, 4)
        np.testing.assert_allclose(np.transpose(demo.dogs.get_data()), agents[: SYSTEM.drivers, :2], atol=1e-6)
        np.testing.assert_allclose(np.transpose(demo.sheep.get_data()), agents[SYSTEM.drivers :, :2], atol=1e-6)
        assert demo.mean.get_ydata()[-1] == pytest.approx(demo.trace[-1].mean())


def test_a_target_that_is_dragged_moves_nobody_else_but_the_sheep_follow():
    with staged(HerdDemo, Settings(flow="C", seed=6)) as (demo, stage):
        play(stage, 3.0)
        assert flock(demo) < 2.0
        before = demo.positions().copy()
        mouse(demo, "button_press_event", demo.world, 0.0, 0.0)
        # the axes' coordinates start at the target, so the second event is seen from where the first one left it
        mouse(demo, "motion_notify_event", demo.world, 0.75, 0.5)
        mouse(demo, "motion_notify_event", demo.world, 0.75, 0.5)
        mouse(demo, "button_release_event", demo.world, 0.0, 0.0)
        np.testing.assert_allclose(demo.target, [1.5, 1.0], atol=1e-9)
        np.testing.assert_allclose(demo.positions(), before, atol=1e-5)
        far = flock(demo)
        assert far > 2.0
        play(stage, 4.0)
        later = [distances.mean() for distances in list(demo.trace)[-15:]]
        assert np.mean(later) < 0.7 * far
        # on the screen it is the target that has moved
        assert demo.world.get_xlim() == pytest.approx((-demo.reach - 1.5, demo.reach - 1.5))


def test_a_dog_follows_the_mouse():
    with staged(HerdDemo, Settings(seed=1)) as (demo, stage):
        x, y = demo.positions()[0]
        mouse(demo, "button_press_event", demo.world, x, y)
        assert demo.held == 0
        mouse(demo, "motion_notify_event", demo.world, 4.0, 4.0)
        play(stage, 6.0)
        np.testing.assert_allclose(demo.positions()[0], [4.0, 4.0], atol=0.5)
        mouse(demo, "button_release_event", demo.world, 4.0, 4.0)
        assert demo.held is None


def test_leading_a_dog_gives_the_acceleration_that_is_wanted():
    state = SYSTEM.sample(1, seed=5)[0].astype(float)
    agents = state.reshape(-1, 4)
    goal = agents[1, :2] + np.array([0.5, -1.0])
    control = herd.lead(state, np.array([0.1, 0.2, 0.3, 0.4]), 1, goal)
    np.testing.assert_array_equal(control[:2], [0.1, 0.2])
    rho = agents[1, :2] - agents[2:, :2].sum(axis=0)
    drive = control[2] * rho + control[3] * np.array([-rho[1], rho[0]])
    np.testing.assert_allclose(drive, herd.PULL * np.array([0.5, -1.0]), atol=1e-9)


def test_choices():
    with staged(HerdDemo, Settings()) as (demo, stage):
        before = demo.simulation.decide()
        choose(demo, "dogs trained with", 0)
        assert demo.flow == "R" and (demo.simulation.decide() != before).any()
        state = demo.simulation.state.copy()
        press_button(demo, "new start")
        assert (demo.simulation.state != state).any()
        press_button(demo, "pause")
        state = demo.simulation.state.copy()
        stage.show(0.5)
        np.testing.assert_array_equal(demo.simulation.state, state)


def test_a_file(tmp_path):
    assert herd.main(["--save", str(tmp_path / "a.gif"), "--seconds", "0.2"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 5  # pictures that are the same become one that stays longer
