"""The swing-up demo: what it leaves, that it says what was recorded, that Ctrl-C ends it."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from controllers.record import Record, read_record
from demos import swingup
from demos.__main__ import list_demos
from demos.animation import Scene, write_gif
from demos.colours import COLOURS, colour
from warp_phys import CartPole
from warp_phys.flow import NAMED


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder that a short demo left."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "summary.txt").write_text("from an earlier demo")
    assert swingup.main(["--epochs", "3", "--frames", "12", "--out", str(folder), "--no-open"]) == 0
    return folder


def test_it_leaves_its_files_and_nothing_else(out):
    names = {"either.csv", "curves.png", "regular.csv", "summary.txt", "swingup.gif"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_animation_has_its_frames_and_is_small(out):
    with Image.open(out / "swingup.gif") as image:
        assert image.n_frames == 12
        assert image.size == (560, 288)
    assert (out / "swingup.gif").stat().st_size < 1_000_000


def test_the_summary_says_what_was_recorded(out):
    summary = " ".join((out / "summary.txt").read_text().split())
    regular, combined = (float(text) for text in re.search(r"R (\S+), C (\S+)\. ", summary).groups())
    for value, name in ((regular, "regular"), (combined, "either")):
        losses = read_record(out / f"{name}.csv")["test_loss"]
        assert len(losses) == 3
        assert value == pytest.approx(losses[-1], rel=1e-5)
    assert "seed 0, 3 epochs each" in summary
    assert regular != combined


def test_both_trainings_start_from_the_same_weights(out):
    # The first epoch's mean loss still shows the start: the two updates differ, but not yet by much.
    regular, combined = (read_record(out / f"{name}.csv")["minibatch_loss"][0] for name in ("regular", "either"))
    assert regular == pytest.approx(combined, rel=0.2)
    trainings = [swingup.Swingup().training(flow) for flow in swingup.FLOWS]
    assert trainings[0].seed == trainings[1].seed
    assert [training.flow for training in trainings] == ["regular", "either"]


@pytest.mark.parametrize(
    ("regular", "combined", "verdict"),
    [
        (0.4, 0.1, "C ends 4.0 times lower than R"),
        (0.1, 0.4, "R ends 4.0 times lower than C"),
        (0.4, 0.41, "The two end about level"),
    ],
)
def test_the_summary_is_honest(regular, combined, verdict):
    outcomes = {}
    for flow, loss in (("regular", regular), ("either", combined)):
        records = [
            Record(epoch, 1.0, 1.0, 9.0 if epoch < 18 else loss, 1.0, 0.0, 0.5, 1e-3, 1.0) for epoch in range(20)
        ]
        outcomes[flow] = swingup.Outcome(records, np.zeros((2, 6)), np.zeros((1, 1)))
    assert verdict in " ".join(swingup.summarise(swingup.Swingup(epochs=20), outcomes, 5.0).split())


def test_the_film_shows_the_hardest_start():
    """Whichever of the two has it: the third start of one, all poles down, where the others end upright."""
    system = CartPole(poles=2)
    well, badly = np.zeros((2, 4, 6), np.float32), np.zeros((2, 4, 6), np.float32)
    well[-1, 1, [2, 4]], badly[-1, 2, [2, 4]] = 0.5, np.pi
    outcomes = [swingup.Outcome([], states, np.zeros((1, 4, 1), np.float32)) for states in (well, badly)]
    for first, second in (outcomes, outcomes[::-1]):
        assert swingup.hardest(system, {"regular": first, "either": second}) == 2


def test_ctrl_c_ends_both_trainings(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "demos.swingup", "--epochs", "100000", "--out", str(tmp_path / "out")]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert any("epoch 1/" in line for line in program.stderr)
        # A terminal sends Ctrl-C to the whole group.
        os.killpg(program.pid, signal.SIGINT)
        # This waits until nobody holds the other end any more, so for both trainings as well.
        said = program.communicate(timeout=30)[1]
    finally:
        program.kill()
        program.wait()
    assert program.returncode == 130, said
    assert "Stopped: both trainings have ended" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--frames", "500"], "frames must be an integer at least 2 and below 102, got 500"),
        (["--epochs", "0"], "epochs must be an integer at least 1, got 0"),
        (["--poles", "0"], "poles"),
    ],
)
def test_mistakes_take_one_line(line, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        swingup.main([*line, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_it_opens_the_animation_only_on_a_display(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not swingup.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert swingup.has_display()


def test_a_gif_shows_the_trajectory_and_rests_at_its_end(tmp_path):
    states = np.zeros((21, 4))
    states[:, 2] = np.linspace(np.pi, 0, 21)
    scenes = [Scene(title, "#009E73", states, np.zeros((20, 1))) for title in ("left", "right")]
    write_gif(tmp_path / "a.gif", CartPole(poles=1), scenes, frames=11, hold=1.0)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 11
        durations, pictures = [], []
        for frame in range(11):
            image.seek(frame)
            durations.append(image.info["duration"])
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
    assert durations == [40] * 10 + [1040]
    assert (pictures[0] != pictures[-1]).any()


def test_flows_have_colours_of_their_own():
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert [colour(letter) for letter in "RMSNC"] == ["#D55E00", "#0072B2", "#999999", "#CC79A7", "#009E73"]
    assert set(COLOURS) == set(NAMED)


def test_demos_are_listed():
    demos = list_demos()
    assert "swingup" in demos
    assert "colours" not in demos
    assert all(line.endswith(".") for line in demos.values())
