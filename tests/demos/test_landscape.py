"""The landscape demo: the picture that it leaves, that it says what was computed, its command line."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from demos import landscape
from demos.__main__ import list_demos
from demos.frame import ANYWHERE, Ray
from demos.landscape import CELLS, LandscapeDemo, heights
from demos.landscape_numbers import FLOWS, Settings, Start, compute, find_paths, summarise
from tests.demos.touch import choose, click, control, curves, from_above, made, play, press
from warp_phys.diagnose.landscape import Landscape

SMALL = ["--cells", "40", "--iterations", "12"]


@pytest.fixture(scope="module")
def found():
    """Numbers of a small picture."""
    return compute(Settings(cells=40, iterations=12, starts=[Start(0.5, -0.5), Start(-2.0, 1.0)]))


def test_it_leaves_its_picture_and_nothing_else(tmp_path, capsys):
    assert landscape.main([*SMALL, "--save", str(tmp_path / "a.png"), "--start", "-1,2", "--start=0.5,-0.5"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1250, 1220)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for wanted in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)):  # R, M and C are in it
        assert (np.abs(pixels - np.array(wanted)).max(axis=1) < 24).sum() > 100
    said = capsys.readouterr().out
    assert "of 2" in said and "Picture: " in said
    assert (tmp_path / "a.png").stat().st_size < 400_000


def test_rows_are_the_second_parameter(found):
    theta = np.array([[found.axis[31], found.axis[4]]])
    expected = Landscape(device="cpu").evaluate(theta, FLOWS)
    assert found.loss[4, 31] == expected.loss[0]
    np.testing.assert_array_equal(found.updates[:, 4, 31], expected.updates[:, 0])
    assert found.axis[0] == pytest.approx(-3.9) and found.axis[-1] == pytest.approx(3.9)


def test_paths_begin_at_their_starts(found):
    np.testing.assert_array_equal(found.paths[:, 0], [[[0.5, -0.5], [-2.0, 1.0]]] * 4)
    expected = Landscape(device="cpu").evaluate(found.paths[2, -1], ()).loss
    np.testing.assert_array_equal(found.path_losses[2, -1], expected)


def test_descent_follows_the_update():
    plane, start, rate = Landscape(device="cpu"), np.array([[0.4, -0.3]]), 0.02
    path = find_paths(plane, start, "M", lambda p: torch.optim.SGD(p, rate), 30)
    theta = start
    for at in path:
        np.testing.assert_allclose(at, theta, rtol=1e-12)
        theta = theta - rate * plane.evaluate(theta, "M").updates[0]
    assert np.abs(path[-1] - path[0]).max() > 0.05


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 0.05), lambda p: torch.optim.SGD(p, 0.05)])
def test_paths_do_not_feel_each_other(make):
    """Also where a neighbour leaves the finite numbers: its path is nan from there on, the others go on."""
    plane, starts = Landscape(device="cpu"), np.array([[0.3, 0.2], [-3.9, 3.9], [2.5, -0.5]])
    together = find_paths(plane, starts, "R", make, 40)
    for b in (0, 2):
        np.testing.assert_array_equal(together[:, b], find_paths(plane, starts[b : b + 1], "R", make, 40)[:, 0])
    assert np.isfinite(together[:, [0, 2]]).all()


def test_a_lost_path_is_nan_from_there_on():
    plane, starts = Landscape(device="cpu"), np.array([[0.3, 0.2], [-3.9, 3.9]])
    path = find_paths(plane, starts, "R", lambda p: torch.optim.SGD(p, 0.05), 40)
    lost = np.isnan(path[:, 1]).all(axis=1)
    assert not lost[0] and lost[-1]
    np.testing.assert_array_equal(lost, np.isnan(path[:, 1]).any(axis=1))
    assert (np.diff(lost.astype(int)) >= 0).all()


def test_who_leads_away_from_minima(found):
    away, still = (found.tendencies < 0.0).mean(axis=1), (found.tendencies == 0.0).mean(axis=1)
    assert away[0] == away[3] == 0.0 and away[1] > 0.3 and away[2] > 0.2
    assert still[3] > 0.2 and not still[:3].any()


def test_the_summary_says_what_was_computed(found):
    text = summarise(Settings(cells=40, iterations=12, starts=[Start(0.5, -0.5), Start(-2.0, 1.0)]), found)
    rows = {line[0]: line.split()[2:] for line in text.splitlines() if re.match("[RMSC] [a-z]{5}", line)}
    assert set(rows) == set(FLOWS)
    for i, letter in enumerate(FLOWS):
        sizes = np.hypot(found.updates[i, ..., 0], found.updates[i, ..., 1])
        assert float(rows[letter][0]) == pytest.approx(sizes.max(), rel=0.05)
        assert float(rows[letter][2]) == pytest.approx(np.nanmedian(np.abs(found.share[i])), rel=0.05)
        assert rows[letter][-1] == f"{found.arrived[i]:.1%}"


def test_without_minima_and_with_lost_paths(tmp_path, capsys):
    """Nothing in reach, and descent that explodes: still a picture, here one of lines."""
    line = ["--reach", "0.1", "--optimiser", "descent", "--rate", "100", "--start", "4,4"]
    assert landscape.main([*SMALL, *line, "--steps", "8", "--save", str(tmp_path / "a.pdf")]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert "Length of the minima: 0.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--save", "a.txt"], "save must end in .png, .pdf, .svg, .html, got 'a.txt'"),
        (["--start", "1"], "start must be two numbers such as 2.5,-1, got '1'"),
        (["--start", "1,nan"], "start must be finite, got '1,nan'"),
        (["--start", "1,1"] * 10, "there must be one to nine starts, got 10"),
        (["--rate", "0"], "rate must be a number above 0, got 0.0"),
        (["--steps", "17"], "steps must be an integer at least 1 and below 17, got 17"),
        (["--device", "abacus"], "abacus"),
        (["--target", "inf"], "target must be finite, got inf"),
    ],
)
def test_mistakes_take_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        landscape.main(line)
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_start_is_where_the_surface_is_pointed_at():
    with made(LandscapeDemo, Settings(iterations=12)) as demo:
        # from above, and aslant: first met is what is seen
        click(demo, ANYWHERE, from_above(1.0, -3.0))
        np.testing.assert_allclose(demo.start, [1.0, -3.0], atol=0.06)
        play(demo, 1.0)
        one = [Start(*demo.start)]
        for i, letter in enumerate(FLOWS):
            path = find_paths(demo.landscape, one, letter, Settings().rule, 12)[:, 0]
            np.testing.assert_allclose(demo.picture().parts[f"path of {letter}"].points[:, :2], path, atol=1e-9)
            expected = np.maximum(demo.landscape.evaluate(path, ()).loss, 1e-7)
            np.testing.assert_allclose(curves(demo, "loss along the paths")[2][i], expected, rtol=1e-6)
        eye = np.array([0.3, -9.0, 6.0])
        place = demo.meet(Ray(eye, np.array([0.1, 1.5, 0.7]) - eye))
        row, column = (round((place[i] + 4.0) / 8.0 * (CELLS - 1)) for i in (1, 0))
        towards = np.array([*place, demo.height[row, column]]) - eye
        across = np.linalg.norm(np.cross(towards, np.array([0.1, 1.5, 0.7]) - eye))
        assert across / np.linalg.norm(np.array([0.1, 1.5, 0.7]) - eye) < 0.25
        assert demo.meet(Ray(eye, np.array([0.0, 0.0, 1.0]))) is None


def test_the_surface_is_the_loss():
    with made(LandscapeDemo, Settings(iterations=2)) as demo:
        surface = demo.picture().parts["surface"]
        some = surface.points[::97]
        np.testing.assert_allclose(some[:, 2], heights(demo.landscape.evaluate(some[:, :2], ()).loss))
        corners = surface.points[surface.faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert (normals[:, 2] > 0.0).all(), "it is seen from above"


def test_paths_grow_and_another_optimiser_takes_another_path():
    with made(LandscapeDemo, Settings(iterations=12)) as demo:
        assert len(demo.picture().parts["path of R"].points) == 1
        play(demo, 0.12)
        assert 5 <= len(demo.picture().parts["path of R"].points) <= 10
        before = demo.paths.copy()
        choose(demo, "optimiser", "descent")
        assert (demo.paths[:, 1] != before[:, 1]).any()
        step = demo.paths[0, 1] - demo.paths[0, 0]
        update = demo.landscape.evaluate(demo.start[None], "R").updates[0, 0]
        np.testing.assert_allclose(step, -0.01 * update, rtol=1e-9)
        control(demo, "log10 of the rate's factor").move(1.0)
        np.testing.assert_allclose(demo.paths[0, 1] - demo.paths[0, 0], 10.0 * step, rtol=1e-9)
        press(demo, "another start")
        np.testing.assert_allclose(demo.start, Settings().starts[1])
        press(demo, "again")
        assert demo.shown == 0.0


def test_a_path_that_leaves_the_surface_ends_there():
    with made(LandscapeDemo, Settings(iterations=12)) as demo:
        play(demo, 1.0)
        demo.paths[1, 5:] = demo.paths[1, 5:] + 100.0
        demo.inside[1, 5:] = False
        parts = demo.picture().parts
        assert np.isfinite(parts["path of M"].points).all(axis=1).tolist() == [True] * 5 + [False] * 8
        np.testing.assert_allclose(parts["head of M"].centre[:2], demo.paths[1, 4])
        assert "(outside)" in demo.words().split(", ")[2] and demo.words().count("(outside)") == 1
        demo.begin(np.array([demo.settings.reach, 0.0]))
        assert demo.inside[:, 0].all()


def test_it_is_listed():
    assert "landscape" in list_demos() and not {"landscape_numbers", "landscape_picture"} & set(list_demos())
