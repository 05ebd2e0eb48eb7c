"""The cart-pole to touch: the picture shows the state, the mouse moves it, the controllers hold it."""

import numpy as np
import pytest
from PIL import Image

from demos import cartpole
from demos.cartpole import CartPoleDemo, Settings
from demos.colours import colour
from tests.demos.touch import choose, click, mouse, play, press_button, staged


def angles(demo):
    """Angles of the poles, 0 upright."""
    return (demo.simulation.state[2::2] + np.pi) % (2.0 * np.pi) - np.pi


def test_it_draws_the_state():
    with staged(CartPoleDemo, Settings(poles=3, seed=1)) as (demo, stage):
        play(stage, 1.0)
        state = demo.simulation.between()
        poles = demo.moving[1:4]
        for line, angle in zip(poles, state[2::2], strict=True):
            (x0, x1), (y0, y1) = line.get_data()
            assert (x0, y0) == pytest.approx((state[0], 0.0))
            assert (x1 - x0, y1) == pytest.approx((np.sin(angle), np.cos(angle)), abs=1e-5)
        assert demo.force_line.get_ydata()[-1] == demo.trace[-1][0]
        for i, line in enumerate(demo.lines):
            assert line.get_ydata()[-1] == pytest.approx(demo.trace[-1][1 + i])
        assert 99 <= len(demo.trace) <= 100


def test_combined_holds_a_pole_and_recovers_from_a_kick():
    with staged(CartPoleDemo, Settings(poles=1, flow="C")) as (demo, stage):
        play(stage, 8.0)
        assert np.abs(angles(demo)).max() < 0.2, "it has swung up"
        before = demo.simulation.state[3]
        x = demo.simulation.state[0]
        demo.world.set_xlim(x - 2, x + 2)
        # a click to the right of the pole pushes it to the left
        click(demo, demo.world, x + 0.4, 0.7)
        assert demo.simulation.state[3] == pytest.approx(before - cartpole.KICK)
        play(stage, 0.12)
        assert np.abs(angles(demo)).max() > 0.15, "the kick has moved it"
        play(stage, 8.0)
        assert np.abs(angles(demo)).max() < 0.2, "it has recovered"


def test_combined_swings_up_four_poles_and_they_hang_again():
    with staged(CartPoleDemo, Settings(poles=4, flow="C")) as (demo, stage):
        assert np.cos(demo.simulation.state[2::2]).max() < -0.9
        play(stage, 1.0)
        assert np.cos(demo.simulation.state[2::2]).min() > 0.95
        play(stage, 2.0)
        assert demo.age < 1.0, "an episode is over, another one has begun"


def test_without_the_controller_the_pole_falls():
    with staged(CartPoleDemo, Settings(poles=1)) as (demo, stage):
        press_button(demo, "stand up")
        press_button(demo, "controller on / off")
        play(stage, 1.5)
        assert np.abs(angles(demo)).max() > 1.0
        assert demo.simulation.control[0] == 0.0


def test_the_cart_follows_the_mouse():
    with staged(CartPoleDemo, Settings(poles=2)) as (demo, stage):
        mouse(demo, "button_press_event", demo.world, 0.1, 0.05)
        mouse(demo, "motion_notify_event", demo.world, 1.2, 0.05)
        play(stage, 2.0)
        assert demo.simulation.state[0] == pytest.approx(1.2, abs=0.3)
        assert demo.grip.get_xdata()[0] == pytest.approx(1.2)
        mouse(demo, "button_release_event", demo.world, 1.2, 0.05)
        assert demo.hand is None
        stage.show(0.0)
        assert len(demo.grip.get_xdata()) == 0


def test_switching_flow_and_poles():
    with staged(CartPoleDemo, Settings(poles=1)) as (demo, stage):
        before = demo.simulation.decide()
        choose(demo, "controller trained with", 0)
        assert demo.flow == "R"
        assert demo.cart.get_facecolor()[:3] == pytest.approx([0xD5 / 255, 0x5E / 255, 0.0])
        assert demo.simulation.decide() != before
        choose(demo, "poles", 3)
        stage.show(0.02)
        assert demo.simulation.state.shape == (10,)
        assert len(demo.lines) == 4
        assert demo.world.get_title().startswith("trained with R")
        assert colour("R") == "#D55E00"


@pytest.mark.parametrize("poles", [1, 2, 3, 4])
@pytest.mark.parametrize("flow", cartpole.FLOWS)
def test_every_controller_is_there(poles, flow):
    with staged(CartPoleDemo, Settings(poles=poles, flow=flow)) as (demo, _):
        assert np.isfinite(demo.simulation.decide()).all()


def test_the_picture_follows_the_cart():
    with staged(CartPoleDemo, Settings()) as (demo, stage):
        demo.simulation.state[0] = demo.simulation.previous[0] = 7.0
        stage.show(0.0)
        assert demo.world.get_xlim() == pytest.approx(
            (7.0 - cartpole.FREE - cartpole.REACH, 7.0 - cartpole.FREE + cartpole.REACH)
        )


def test_a_file(tmp_path):
    assert cartpole.main(["--save", str(tmp_path / "a.gif"), "--seconds", "0.2", "--poles", "2"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 5  # pictures that are the same become one that stays longer
        assert image.size == (800, 512)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--poles", "5"], "poles must be an integer at least 1 and below 5"),
        (["--flow", "N"], "flow must be one of R, M"),
    ],
)
def test_mistakes(line, message, capsys):
    with pytest.raises(SystemExit):
        cartpole.main(line)
    assert message in capsys.readouterr().err
