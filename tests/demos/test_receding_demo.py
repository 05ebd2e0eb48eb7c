"""A cart-pole that plans at every step."""

import numpy as np
import pytest

from demos.receding import KICK, RecedingDemo, Settings
from tests.demos.touch import click, drag, from_front, made, play, release


def test_it_swings_up_and_answers_a_kick():
    with made(RecedingDemo, Settings()) as demo:
        play(demo, 2.4)
        angle = demo.simulation.state[2]
        assert np.cos(angle) > 0.97, "it stands"
        x, rate = demo.simulation.state[0], demo.simulation.state[3]
        click(demo, "pole 1", from_front(x + 0.4, 0.8))
        assert demo.simulation.state[3] == pytest.approx(rate - KICK)
        play(demo, 1.2)
        assert np.cos(demo.simulation.state[2]) > 0.95, "it stands again"
        ahead = demo.plan.latest.states[:, 0].numpy()
        assert demo.picture().parts["plan"].points[:, 2] == pytest.approx(np.cos(ahead[:, 2]))


def test_the_hand_pulls():
    with made(RecedingDemo, Settings(horizon=5, iterations=1, noise=0.0)) as demo:
        drag(demo, "cart", from_front(1.0, 0.0))
        play(demo, 0.4)
        assert demo.simulation.state[0] > 0.3
        assert demo.picture().parts["hand"].points[0, 0] == pytest.approx(1.0)
        release(demo, "cart")
        assert demo.hand is None


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"iterations": 0}, {"error": -1.0}, {"noise": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
