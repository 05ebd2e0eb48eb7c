"""The quantum particle: the picture shows the wave, a click disturbs it, the control brings it back."""

import numpy as np
import pytest

from demos import quantum
from demos.frame import ANYWHERE
from demos.quantum import QuantumDemo, Settings, make_system
from tests.demos.touch import choose, click, control, curves, from_front, made, play, press


def norm(demo):
    return np.linalg.norm(demo.simulation.state)


def test_it_draws_the_state():
    with made(QuantumDemo, Settings()) as demo:
        play(demo, 1.0)
        density = np.abs(demo.wave()) ** 2
        parts = demo.picture().parts
        np.testing.assert_allclose(parts["density"].points[1:-1, 2], density * 33 / 2, rtol=1e-5)
        before = parts["before"].points
        assert np.nanmax(before[:, 1]) > 0.0 and len(before) == len(parts["before"].colour)
        assert curves(demo, "share in the target state")[2][0, -1] == demo.trace[-1][1]
        assert curves(demo, "control")[2][0, -1] == demo.trace[-1][0]
        assert norm(demo) == pytest.approx(1.0, abs=1e-5)


def test_colours_tell_the_phase():
    system = make_system(3)
    still = system.eigenstate(2)
    for turn, brightest in ((0.0, 0), (2.0 * np.pi / 3.0, 1), (4.0 * np.pi / 3.0, 2)):
        psi = np.abs(still) * np.exp(1j * turn)
        picture = system.picture(np.stack([psi.real, psi.imag], axis=1).reshape(-1))
        assert (picture.parts["phase"].colour.argmax(axis=1) == brightest).all()


def test_the_state_is_reached_and_reached_again_after_a_click():
    with made(QuantumDemo, Settings(target=4, speed=40.0)) as demo:
        assert demo.overlap() < 0.1
        play(demo, 10.0)
        reached = np.mean([overlap for _, overlap in demo.trace][-32:])
        assert reached > 0.85
        click(demo, ANYWHERE, from_front(0.5, 1.0))
        assert norm(demo) == pytest.approx(1.0, abs=1e-5)
        assert demo.overlap() < reached - 0.05
        play(demo, 10.0)
        assert np.mean([overlap for _, overlap in demo.trace][-32:]) > 0.8


def test_a_click_makes_a_bump_where_it_was():
    with made(QuantumDemo, Settings()) as demo:
        before = demo.wave()
        click(demo, ANYWHERE, from_front(0.5, 1.0))
        change = np.abs(demo.wave() - before * (before.conj() @ demo.wave()))
        assert make_system(3).positions[change.argmax()] == pytest.approx(0.5, abs=0.15)


def test_choices():
    with made(QuantumDemo, Settings()) as demo:
        state = demo.simulation.state.copy()
        choose(demo, "target: eigenstate", "5")
        assert demo.target == 5 and "eigenstate 5" in demo.words()
        np.testing.assert_array_equal(demo.simulation.state, state)
        press(demo, "control on / off")
        play(demo, 0.5)
        assert demo.simulation.control[0] == 0.0
        press(demo, "new start")
        assert (demo.simulation.state != state).any()
        control(demo, "steps per second").move(4.0)
        assert demo.speed == 4.0


@pytest.mark.parametrize("target", quantum.TARGETS)
def test_every_controller_is_there(target):
    with made(QuantumDemo, Settings(target=target)) as demo:
        assert np.isfinite(demo.simulation.decide()).all()
