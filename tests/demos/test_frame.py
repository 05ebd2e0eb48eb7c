"""The frame of the demos: three ways to see one, and what it says where one of them is not to be had."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.backend_bases import KeyEvent
from PIL import Image

from demos import views
from demos.frame import Demo
from demos.views import run
from tests.demos.touch import mouse, pixels, staged
from warp_phys import Diverged


@dataclass(frozen=True)
class Settings:
    """Settings of the small demo."""

    speed: float = 1.0
    """How fast the bar grows."""

    def __post_init__(self):
        if self.speed <= 0:
            raise ValueError(f"speed must be positive, got {self.speed}")


class Bar(Demo):
    """A bar that grows as time passes."""

    size = (2.0, 1.0)
    clip = 0.4
    closed = 0

    def __init__(self, figure, settings):
        super().__init__(figure)
        self.speed, self.time, self.seen, self.done = settings.speed, 0.0, [], []
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 1), ylim=(0, 1))
        self.axes.set_axis_off()
        (self.bar,) = self.axes.fill([0, 0, 0, 0], [0, 0, 1, 1], color="#009E73")
        self.moving = [self.bar]

    def advance(self, dt):
        self.time += self.speed * dt

    def draw(self):
        self.bar.set_xy([(0, 0), (self.time, 0), (self.time, 1), (0, 1)])

    def script(self):
        return [(0.2, lambda: setattr(self, "time", 0.8))]

    def press(self, event):
        self.seen.append(("press", round(event.xdata, 2)))

    def close(self):
        Bar.closed += 1


def main(arguments):
    return run("bar", "A bar.", Bar, Settings, arguments)


def green(picture):
    """Share of the picture that the bar covers."""
    return (np.abs(picture - np.array([0x00, 0x9E, 0x73])).max(axis=-1) < 30).mean()


def test_the_picture_shows_the_state():
    with staged(Bar, Settings()) as (demo, stage):
        for share in (0.25, 0.5, 0.75):
            stage.show(0.25)
            assert demo.time == pytest.approx(share)
            assert green(pixels(stage)) == pytest.approx(share, abs=0.02)
        # the bar is drawn over a background that is drawn once, so it can shrink as well
        demo.time = 0.1
        stage.show(0.0)
        assert green(pixels(stage)) == pytest.approx(0.1, abs=0.02)


def test_a_mouse_and_the_space_bar_reach_the_demo():
    with staged(Bar, Settings()) as (demo, stage):
        mouse(demo, "button_press_event", demo.axes, 0.3, 0.5)
        assert demo.seen == [("press", 0.3)]
        stage.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", stage.canvas, " "))
        stage.show(0.5)
        assert demo.paused and demo.time == 0.0


def test_ticks_follow_the_clock_but_never_leap(monkeypatch):
    now = iter([10.0, 10.03, 15.0])
    monkeypatch.setattr("demos.frame.time.perf_counter", lambda: next(now))
    with staged(Bar, Settings()) as (demo, stage):
        stage.tick()
        assert demo.time == pytest.approx(0.03)
        stage.tick()
        assert demo.time == pytest.approx(0.13)


def test_a_gif_shows_the_script(tmp_path, capsys):
    before = Bar.closed
    assert main(["--save", str(tmp_path / "a.gif"), "--rate", "10"]) == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 4
        shares = []
        for number in range(4):
            image.seek(number)
            assert image.info["duration"] == 100
            shares.append(green(np.asarray(image.convert("RGB")).astype(int)))
    assert shares == pytest.approx([0.1, 0.2, 0.9, 1.0], abs=0.02)
    assert Bar.closed == before + 1
    assert "a.gif" in capsys.readouterr().out


def test_a_png_shows_the_end(tmp_path):
    assert main(["--save", str(tmp_path / "a.png"), "--seconds", "0.16", "--speed", "3"]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert green(np.asarray(image.convert("RGB")).astype(int)) == pytest.approx(0.48, abs=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the program ffmpeg is not installed")
def test_a_film(tmp_path):
    assert main(["--save", str(tmp_path / "a.mp4"), "--seconds", "0.4"]) == 0
    assert b"ftyp" in (tmp_path / "a.mp4").read_bytes()[:16]


def test_a_film_is_made_by_ffmpeg(tmp_path, monkeypatch):
    """What ffmpeg is given: as many bytes as the pictures have."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor last; do :; done\nwc -c > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert main(["--save", str(tmp_path / "a.mp4"), "--seconds", "0.4"]) == 0
    assert int((tmp_path / "a.mp4").read_text()) == 10 * 160 * 80 * 3
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no encoder >&2\nexit 1\n")
    with pytest.raises(SystemExit):
        main(["--save", str(tmp_path / "b.mp4")])
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "a.mp4"}


def test_a_gif_lasts_as_long_as_is_asked(tmp_path, capsys):
    """It holds hundredths of a second."""
    path = tmp_path / "a.gif"
    assert main(["--save", str(path), "--rate", "30", "--seconds", "1"]) == 0
    with Image.open(path) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    assert sum(durations) == 1000 and {30, 40} <= set(durations)  # what stands still is one picture
    assert_fails(["--save", str(path), "--rate", "60"], "a .gif shows at most 50 pictures a second", capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--save", "a.txt"], "save must end in .gif, .png, .mp4, got 'a.txt'"),
        (["--save", "a.gif", "--browser"], "save and browser exclude each other"),
        (["--port", "70000"], "port must be an integer at least 1 and below 65536, got 70000"),
        (["--seconds", "-1"], "seconds must be a number at least 0, got -1.0"),
        (["--rate", "0"], "rate must be a number above 0, got 0.0"),
        (["--speed", "0"], "speed must be positive, got 0.0"),
    ],
)
def test_mistakes_take_one_line(line, message, capsys):
    assert_fails(line, message, capsys)


def assert_fails(line, message, capsys):
    """The program ends with status 2 and one line that holds the message."""
    with pytest.raises(SystemExit) as exit_status:
        main(line)
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_codec(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert_fails(["--save", "a.mp4"], "a .mp4 needs the program ffmpeg, which was not found; install it, or", capsys)


def test_no_display(monkeypatch, capsys):
    monkeypatch.setattr(views, "has_display", lambda: False)
    message = "there is no display to open a window on; see it in a browser with --browser, or write a file with --save"
    assert_fails([], message, capsys)


def test_a_display_that_does_not_answer(monkeypatch, capsys):
    monkeypatch.setattr(views, "has_display", lambda: True)
    monkeypatch.setattr(plt, "figure", refuse)
    assert_fails([], "no window can be opened (Cannot load backend); see it in a browser with --browser", capsys)


def refuse(*arguments, **options):
    """As matplotlib does without a display."""
    raise ImportError("Cannot load backend")


def test_a_port_in_use(capsys):
    pytest.importorskip("tornado")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        message = f"port {port} is in use; choose another with --port, such as {port + 1}"
        try:
            assert_fails(["--browser", "--port", str(port)], message, capsys)
        finally:
            plt.switch_backend("agg")


def test_without_tornado(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_webagg", None)
    assert_fails(["--browser"], 'a page needs tornado: pip install "warp_phys[browser]"', capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_page(number, tmp_path):
    pytest.importorskip("tornado")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = "import sys; from tests.demos.test_frame import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--browser", "--port", str(port), "--fps"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f"Open http://127.0.0.1:{port}/" in page.stdout.readline()
        page.send_signal(number)
        said, wrong = page.communicate(timeout=30)
    finally:
        page.kill()
        page.wait()
    assert page.returncode == 128 + number
    assert "per second" in said
    assert "Traceback" not in wrong


def test_a_mistake_in_a_demo_ends_it(capsys):
    """It is raised, and the page is closed; without this the program would wait for ever."""
    pytest.importorskip("tornado")

    class Broken(Bar):
        def draw(self):
            super().draw()
            if self.time > 0.0:
                raise RuntimeError("broken")

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    before = Bar.closed
    try:
        with pytest.raises(RuntimeError, match="broken"):
            run("bar", "A bar.", Broken, Settings, ["--browser", "--port", str(port)])
    finally:
        plt.switch_backend("agg")
    assert Bar.closed == before + 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_a_divergence_takes_one_line(tmp_path, capsys):
    class Diverging(Bar):
        def advance(self, dt):
            raise Diverged(3, [0])

    with pytest.raises(SystemExit) as exit_status:
        run("bar", "A bar.", Diverging, Settings, ["--save", str(tmp_path / "a.png")])
    error = capsys.readouterr().err
    assert exit_status.value.code == 1 and error.count("\n") == 1
    assert error.startswith("python -m demos.bar: error: the demo diverged: the trajectory leaves the finite numbers")


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    main(["--save", str(tmp_path / "a.png")])
    assert threading.active_count() == before
