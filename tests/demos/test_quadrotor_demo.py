"""The quadrotor in wind."""

import numpy as np
import pytest
import torch

from demos.quadrotor import QuadrotorDemo, Settings, Windy
from tests.demos.touch import control, curves, drag, from_front, made, play, press
from warp_phys import Quadrotor
from warp_phys.interop.torch import Step


def test_it_holds_its_place_in_wind_and_follows_the_target():
    with made(QuadrotorDemo, Settings(wind_x=6.0)) as demo:
        play(demo, 3.0)
        assert demo.trace[-1][2] < 0.3, "at the target, in gusts"
        drag(demo, "goal", from_front(1.2, 0.9))
        assert demo.target == pytest.approx([1.2, 0.9])
        control(demo, "wind to the right [m/s]").move(-5.0)
        press(demo, "gusts on / off")
        assert demo.mean[0] == -5.0 and not demo.gusts
        play(demo, 4.0)
        assert demo.simulation.wind == pytest.approx([-5.0, 0.0], abs=0.1), "the last gust has died away"
        assert np.hypot(*(demo.simulation.state[:2] - demo.target)) < Quadrotor.arm
        assert curves(demo, "distance to the target [m]")[2][0, -1] == pytest.approx(demo.trace[-1][2])
        body = demo.picture().parts["body"]
        middle = 0.5 * (np.asarray(body.start) + np.asarray(body.end))
        assert middle[[0, 2]] == pytest.approx(demo.simulation.between()[:2], abs=1e-6)


def test_the_wind_is_that_of_the_system():
    state, control, wind = np.array([0.1, -0.2, 0.3, 1.0, 2.0, -1.0], np.float32), np.array([0.5, 0.7]), [3.0, -2.0]
    simulation = Windy(torch.nn.Identity(), state)
    simulation.wind = np.array(wind)
    simulation.step(control)
    system = Quadrotor(wind_x=wind[0], wind_z=wind[1])
    expected = Step(system)(torch.from_numpy(state[None]), torch.tensor(control[None], dtype=torch.float32))
    np.testing.assert_allclose(simulation.state, expected[0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"wind_x": 9.0}, {"wind_z": -5.0}, {"seed": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
