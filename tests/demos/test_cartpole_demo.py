"""The cart-pole to touch: the picture shows the state, a hand moves it, the controllers hold it."""

import numpy as np
import pytest
from PIL import Image

from demos import cartpole
from demos.cartpole import CartPoleDemo, Settings
from demos.colours import colour
from tests.demos.touch import choose, click, curves, drag, from_front, made, play, press, release


def angles(demo):
    """Angles of the poles, 0 upright."""
    return (demo.simulation.state[2::2] + np.pi) % (2.0 * np.pi) - np.pi


def test_it_draws_the_state():
    with made(CartPoleDemo, Settings(poles=3, seed=1)) as demo:
        play(demo, 1.0)
        state = demo.simulation.between()
        parts = demo.picture().parts
        for i, angle in enumerate(state[2::2]):
            pole = parts[f"pole {i + 1}"]
            assert pole.start[0] == pytest.approx(state[0])
            reach = np.subtract(pole.end, pole.start)
            assert reach == pytest.approx([np.sin(angle), 0.0, np.cos(angle)], abs=1e-5)
        _, times, forces = curves(demo, "force [N]")
        assert forces[0, -1] == demo.trace[-1][0] and times[-1] == 0.0
        names, _, shown = curves(demo, "angle [°], 0 is upright")
        assert names == ["pole 1", "pole 2", "pole 3"]
        assert shown[:, -1] == pytest.approx(demo.trace[-1][1:])
        assert parts["cart"].colour == colour("C")


def test_combined_holds_a_pole_and_recovers_from_a_kick():
    with made(CartPoleDemo, Settings(poles=1, flow="C")) as demo:
        play(demo, 8.0)
        assert np.abs(angles(demo)).max() < 0.2, "it has swung up"
        before = demo.simulation.state[3]
        x = demo.simulation.state[0]
        # a click to the right of the pole's axis pushes it to the left
        click(demo, "pole 1", from_front(x + 0.4, 0.7))
        assert demo.simulation.state[3] == pytest.approx(before - cartpole.KICK)
        play(demo, 0.12)
        assert np.abs(angles(demo)).max() > 0.15, "the kick has moved it"
        play(demo, 8.0)
        assert np.abs(angles(demo)).max() < 0.2, "it has recovered"


def test_combined_swings_up_four_poles_and_they_hang_again():
    with made(CartPoleDemo, Settings(poles=4, flow="C")) as demo:
        assert np.cos(demo.simulation.state[2::2]).max() < -0.9
        play(demo, 1.0)
        assert np.cos(demo.simulation.state[2::2]).min() > 0.95
        play(demo, 2.0)
        assert demo.age < 1.0, "an episode is over, another one has begun"


def test_without_the_controller_the_pole_falls():
    with made(CartPoleDemo, Settings(poles=1)) as demo:
        press(demo, "stand up")
        press(demo, "controller on / off")
        play(demo, 1.5)
        assert np.abs(angles(demo)).max() > 1.0
        assert demo.simulation.control[0] == 0.0
        assert "switched off" in demo.words()
        before = demo.simulation.state[3]
        press(demo, "kick a pole")
        assert abs(demo.simulation.state[3] - before) == pytest.approx(cartpole.KICK, abs=1e-5)


def test_the_cart_follows_the_hand():
    with made(CartPoleDemo, Settings(poles=2)) as demo:
        drag(demo, "cart", from_front(1.2, 0.05))
        play(demo, 2.0)
        assert demo.simulation.state[0] == pytest.approx(1.2, abs=0.3)
        assert demo.picture().parts["hand"].points[0, 0] == pytest.approx(1.2)
        release(demo, "cart")
        assert len(demo.picture().parts["hand"].points) == 0


def test_a_pole_follows_the_hand():
    with made(CartPoleDemo, Settings(poles=1)) as demo:
        demo.steering = False
        for _ in range(50):
            drag(demo, "pole 1", from_front(demo.simulation.state[0] + 2.0, 0.0))
            play(demo, 0.04)
        assert angles(demo)[0] == pytest.approx(np.pi / 2, abs=0.3)
        release(demo, "pole 1")
        assert demo.pulled is None


def test_switching_flow_and_poles():
    with made(CartPoleDemo, Settings(poles=1)) as demo:
        before = demo.simulation.decide()
        choose(demo, "trained with", "R regular")
        assert demo.flow == "R" and demo.picture().parts["cart"].colour == "#D55E00"
        assert demo.simulation.decide() != before
        build = demo.build
        choose(demo, "poles", "4")
        play(demo, 0.04)
        assert demo.build != build and demo.simulation.state.shape == (10,)
        assert "trained with R" in demo.words()


@pytest.mark.parametrize("poles", [1, 2, 3, 4])
@pytest.mark.parametrize("flow", cartpole.FLOWS)
def test_every_controller_is_there(poles, flow):
    with made(CartPoleDemo, Settings(poles=poles, flow=flow)) as demo:
        assert np.isfinite(demo.simulation.decide()).all()


def test_the_picture_follows_the_cart():
    with made(CartPoleDemo, Settings()) as demo:
        demo.simulation.state[0] = demo.simulation.previous[0] = 7.0
        demo.advance(0.0)
        assert demo.picture().low[0] == pytest.approx(7.0 - cartpole.FREE - cartpole.REACH)


def test_a_file(tmp_path):
    assert cartpole.main(["--save", str(tmp_path / "a.gif"), "--seconds", "0.2", "--poles", "2"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 5  # pictures that are the same become one that stays longer


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
