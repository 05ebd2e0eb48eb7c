"""A cart-pole that plans at every step, on a figure without a window."""

import numpy as np
import pytest

from demos.receding import KICK, RecedingDemo, Settings
from tests.demos.touch import click, mouse, play, staged


def test_it_swings_up_and_answers_a_kick():
    with staged(RecedingDemo, Settings()) as (demo, stage):
        play(stage, 2.4)
        angle = demo.simulation.state[2]
        assert np.cos(angle) > 0.97, "it stands"
        x, rate = demo.simulation.state[0], demo.simulation.state[3]
        click(demo, demo.world, x + 0.4, 0.8)
        assert demo.simulation.state[3] == pytest.approx(rate - KICK)
        play(stage, 1.2)
        assert np.cos(demo.simulation.state[2]) > 0.95, "it stands again"
        ahead = demo.plan.latest.states[:, 0].numpy()
        assert demo.path.get_ydata() == pytest.approx(np.cos(ahead[:, 2]))


def test_the_hand_pulls():
    with staged(RecedingDemo, Settings(horizon=5, iterations=1, noise=0.0)) as (demo, stage):
        mouse(demo, "button_press_event", demo.world, 0.0, 0.0)
        mouse(demo, "motion_notify_event", demo.world, 1.0, 0.0)
        play(stage, 0.4)
        assert demo.simulation.state[0] > 0.3 and demo.grip.get_xdata()[0] == pytest.approx(1.0)
        mouse(demo, "button_release_event", demo.world, 1.0, 0.0)
        assert demo.hand is None


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"iterations": 0}, {"error": -1.0}, {"noise": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
