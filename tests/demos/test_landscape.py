"""The landscape demo: the picture that it leaves, that it says what was computed, its command line."""

import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from demos import landscape
from demos.__main__ import list_demos
from demos.landscape_numbers import FLOWS, Settings, Start, compute, find_paths, summarise
from warp_phys.diagnose.landscape import Landscape
from warp_phys.flow import resolve

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
        (["--save", "a.txt"], "save must end in .png, .pdf, .svg, got 'a.txt'"),
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


def test_without_a_display_it_asks_for_a_file(monkeypatch, capsys):
    monkeypatch.setattr(landscape, "has_display", lambda: False)
    with pytest.raises(SystemExit) as exit_status:
        landscape.main(SMALL)
    assert exit_status.value.code == 2
    assert "there is no display to open a window on; give --save FILE.png" in capsys.readouterr().err


def test_with_a_display_it_opens_a_window(monkeypatch, tmp_path):
    matplotlib.use("Agg")
    shown = []
    monkeypatch.setattr(landscape, "has_display", lambda: True)
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    monkeypatch.chdir(tmp_path)
    try:
        assert landscape.main(SMALL) == 0
        (figure,) = shown
        titles = [axes.get_title() for axes in figure.get_axes()]
        assert [f"{letter} {resolve(letter).name}" for letter in FLOWS] == titles[3:7]
    finally:
        plt.close("all")
    assert not list(tmp_path.iterdir())


def test_it_is_listed():
    assert "landscape" in list_demos() and not {"landscape_numbers", "landscape_picture"} & set(list_demos())
