"""The frame of the demos: two ways to see one, and what it says where one of them is not to be had."""

import importlib.util
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
from PIL import Image

from demos.film import Film
from demos.frame import Demo, Plot
from demos.views import run
from warp_phys import Diverged
from warp_phys.systems.drawing import Block, Picture


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

    says = "A bar grows: wait."
    clip = 0.4
    closed = 0

    def __init__(self, settings):
        super().__init__()
        self.speed, self.time = settings.speed, 0.0

    def advance(self, dt):
        self.time += self.speed * dt

    def picture(self):
        bar = Block((self.time / 2, 0.0, 0.5), (self.time, 1.0, 1.0), "#009E73")
        return Picture({"bar": bar}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def plots(self):
        return [Plot("length", ["length"], ["#D55E00"], lambda: (np.array([0.0, 1.0]), np.full((1, 2), self.time)))]

    def script(self):
        return [(0.2, lambda: setattr(self, "time", 0.8))]

    def close(self):
        Bar.closed += 1


def main(arguments):
    return run("bar", "A bar.", Bar, Settings, arguments)


def green(picture):
    """Length of the bar relative to the picture of the world, which is as high as it is wide."""
    bar = np.abs(picture - np.array([0x00, 0x9E, 0x73])).max(axis=-1) < 30
    if not bar.any():
        return 0.0
    return bar.any(axis=0).sum() / bar.any(axis=1).sum()


def test_the_picture_shows_the_state():
    film = Film(demo := Bar(Settings()))
    for share in (0.25, 0.5, 0.75, 0.1):
        demo.time = share
        assert green(np.asarray(film.show()).astype(int)) == pytest.approx(share, abs=0.02)
    ((_, _, (line,)),) = film.curves
    assert list(line.get_ydata()) == [0.1, 0.1]


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
    assert int((tmp_path / "a.mp4").read_text()) == 10 * 800 * 448 * 3
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
        (["--save", "a.txt"], "save must end in .gif, .png, .mp4, .html, got 'a.txt'"),
        (["--host", ""], "host must be an address such as 127.0.0.1, got an empty one"),
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


def test_a_missing_viewer_takes_one_line(monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "viser" else real(name, *rest))
    wanted = 'viser is not installed: pip install "warp_phys[viewer]", or '
    assert_fails([], wanted + "write a file with --save FILE.gif", capsys)
    assert_fails(["--save", str(tmp_path / "a.html")], wanted + "save a .gif", capsys)
    assert main(["--save", str(tmp_path / "a.png")]) == 0


def free_port():
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_port_in_use(capsys):
    pytest.importorskip("viser")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        message = f"port {port} of 127.0.0.1 is in use or not open to this user; choose another with --port, such as"
        assert_fails(["--port", str(port), "--no-open"], message, capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_page(number):
    pytest.importorskip("viser")
    port = free_port()
    program = "import sys; from tests.demos.test_frame import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--no-open", "--port", str(port), "--fps"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f"Open http://127.0.0.1:{port} " in page.stdout.readline()
        page.send_signal(number)
        said, wrong = page.communicate(timeout=30)
    finally:
        page.kill()
        page.wait()
    assert page.returncode == 128 + number
    assert "per second" in said
    assert "Traceback" not in wrong


def test_a_mistake_in_a_demo_ends_it(monkeypatch):
    """It is raised, and the page is closed; without this the program would wait for ever."""
    viser = pytest.importorskip("viser")
    monkeypatch.setattr(viser.ViserServer, "get_clients", lambda self: {0: None})

    class Broken(Bar):
        def advance(self, dt):
            raise RuntimeError("broken")

    port, before = free_port(), Bar.closed
    with pytest.raises(RuntimeError, match="broken"):
        run("bar", "A bar.", Broken, Settings, ["--no-open", "--port", str(port)])
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
