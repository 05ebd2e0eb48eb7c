"""The herd: the target and the dogs follow the hand, and the sheep go to the target."""

import numpy as np
import pytest
import torch

from demos import herd, herd_drags
from demos.herd import SYSTEM, HerdDemo, Settings
from tests.demos.touch import curves, drag, from_above, made, play, press, release
from warp_phys.interop.torch import Rollout


def flock(demo):
    """Mean distance of the sheep from the target."""
    return float(np.hypot(*(demo.positions()[SYSTEM.drivers :] - demo.target).T).mean())


def test_it_draws_the_state():
    with made(HerdDemo, Settings()) as demo:
        play(demo, 1.0)
        demo.move_target(np.array([1.0, -2.0]))
        agents = demo.simulation.between().reshape(-1, 4)[:, :2] + demo.target
        parts = demo.picture().parts
        for i, place in enumerate(agents[SYSTEM.drivers :]):
            np.testing.assert_allclose(parts[f"evader {i + 1}"].centre[:2], place, atol=1e-6)
        for i, place in enumerate(agents[: SYSTEM.drivers]):
            dog = parts[f"driver {i + 1}"]
            middle = np.add(dog.start, np.subtract(dog.end, dog.start) * 0.25 / 0.65)
            np.testing.assert_allclose(middle[:2], place, atol=1e-6)
        np.testing.assert_allclose(parts["goal"].centre[:2], [1.0, -2.0])
        _, _, distances = curves(demo, "distance to the target [m]")
        assert distances[-1, -1] == pytest.approx(demo.trace[-1].mean())


def test_a_target_that_is_dragged_moves_nobody_else_but_the_sheep_follow():
    with made(HerdDemo, Settings(seed=6)) as demo:
        play(demo, 6.0)
        assert flock(demo) < 2.0
        before = demo.positions().copy()
        drag(demo, "goal", from_above(0.75, 0.5))
        drag(demo, "goal", from_above(2.0, 2.0))
        release(demo, "goal")
        np.testing.assert_allclose(demo.target, [2.0, 2.0], atol=1e-9)
        np.testing.assert_allclose(demo.positions(), before, atol=1e-5)
        far = flock(demo)
        assert far > 1.5
        play(demo, 6.0)
        later = [distances.mean() for distances in list(demo.trace)[-30:]]
        assert np.mean(later) < 0.7 * far


def test_a_dog_follows_the_hand():
    with made(HerdDemo, Settings(seed=1)) as demo:
        drag(demo, "driver 1", from_above(4.0, 4.0))
        assert demo.led == 0
        play(demo, 6.0)
        np.testing.assert_allclose(demo.positions()[0], [4.0, 4.0], atol=0.5)
        assert len(demo.picture().parts["leash"].points) == 2
        release(demo, "driver 1")
        assert demo.led is None


def test_the_dogs_run_round_the_flock_on_opposite_sides():
    """Where the network says nothing they hold the flock together, wherever they begin."""
    policy = herd.Policy()
    for parameter in policy.network.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        states, _ = Rollout(SYSTEM, policy, 150)(SYSTEM.sample(20, seed=0))
    places = states.reshape(151, 20, -1, 4)[..., :2]
    middle = places[:, :, SYSTEM.drivers :].mean(dim=2, keepdim=True)
    dogs = (places[:, :, : SYSTEM.drivers] - middle)[30:]
    lengths = dogs.norm(dim=3)
    assert ((lengths > 0.8 * herd.RADIUS) & (lengths < 1.6 * herd.RADIUS)).all()
    cosines = (dogs[:, :, 0] * dogs[:, :, 1]).sum(dim=2) / lengths.prod(dim=2)
    assert (cosines < -0.9).all()
    angles = torch.atan2(dogs[:, :, 0, 1], dogs[:, :, 0, 0]).diff(dim=0).remainder(2.0 * np.pi)
    assert ((angles > 0.1) & (angles < 1.0)).all(), "and all the same way round"
    spread = (places[-1, :, SYSTEM.drivers :] - middle[-1]).norm(dim=2).max()
    assert spread < 2.0, "no sheep strays"


def test_leading_a_dog_gives_the_acceleration_that_is_wanted():
    state = SYSTEM.sample(1, seed=5)[0].astype(float)
    agents = state.reshape(-1, 4)
    goal = agents[1, :2] + np.array([0.5, -1.0])
    control = herd.lead(state, np.array([0.1, 0.2, 0.3, 0.4]), 1, goal)
    np.testing.assert_array_equal(control[:2], [0.1, 0.2])
    rho = agents[1, :2] - agents[2:, :2].sum(axis=0)
    drive = control[2] * rho + control[3] * np.array([-rho[1], rho[0]])
    np.testing.assert_allclose(drive, herd.PULL * np.array([0.5, -1.0]), rtol=0.01)


def test_choices():
    with made(HerdDemo, Settings()) as demo:
        state = demo.simulation.state.copy()
        press(demo, "new start")
        assert (demo.simulation.state != state).any()
        press(demo, "move the target")
        assert np.hypot(*demo.target) == pytest.approx(herd.JUMP)
        press(demo, "pause / go on")
        assert demo.paused


def test_what_becomes_of_drags(capsys):
    """The command says it for the demo's own dogs."""
    distances = herd_drags.run_drags(herd.load_weights("herd", herd.FLOW, herd.Policy()), drags=100, seed=3)
    assert distances.shape == (181, 100)
    assert (distances.min(axis=0) < herd_drags.NEAR).mean() >= 0.9, "they are brought back"
    assert (distances[-60:].mean(axis=0) < herd_drags.NEAR).mean() >= 0.8, "and held there"
    said = herd_drags.summarise(np.stack([np.full(181, 2.0), np.linspace(3.0, 0.0, 181)], axis=1))
    assert "2 drags" in said and "Within 1 m at some time: 50%" in said
    assert "within 1 m: 50%; nearer than at the drag: 50%" in said
    assert herd_drags.main(["--drags", "2"]) == 0
    assert "2 drags within 4 m" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        herd_drags.main(["--drags", "0"])
