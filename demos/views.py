"""Three ways to see a demo: a window, a page in a browser, a file; and the command line that chooses one.

A demo's module ends with

    def main(arguments: Sequence[str] | None = None) -> int:
        return run("cartpole", __doc__, CartPoleDemo, Settings, arguments)
"""

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import warp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags, stop_on_signals
from controllers.settings import check_setting
from demos.animation import has_display, write_pictures
from demos.colours import POLES, colour
from demos.frame import Demo, Stage
from demos.outputs import check_file

FORMATS = (".gif", ".png", ".mp4")
INTERVAL = 15
"""Milliseconds between two pictures at least, where they are shown as they are made."""
STYLE: Any = {"font.size": 9.0, "axes.titlesize": 10.0, "toolbar": "None"}
INKS = (*(colour(letter) for letter in "RMSC"), *POLES)
"""Colours that a .gif keeps exactly."""
HINT = "see it in a browser with --browser, or write a file with --save FILE.gif"


GIF_RATE = 50
"""Pictures a second at most in a GIF: browsers show what is to last less than 20 ms for 100."""


class CannotShow(Exception):
    """The demo cannot be shown in the way that was asked for; the message says why, and what to do instead."""


@dataclass(frozen=True)
class View:
    """How a demo is shown."""

    save: str = ""
    """Write a file (.gif, .png or .mp4) in place of opening a window; no display is needed."""
    seconds: float = 0.0
    """Length of the file, or time after which a window or page closes; 0: the demo's own length, or never."""
    rate: float = 25.0
    """Pictures per second in a file; at most 50 in a .gif."""
    browser: bool = False
    """Show a page in a browser, served on this machine only."""
    port: int = 8988
    """Port of the page."""
    fps: bool = False
    """Print how many pictures per second were shown."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if self.save:
            check_file("save", self.save, FORMATS)
        if self.save and self.browser:
            raise ValueError("save and browser exclude each other")
        check_setting("seconds", self.seconds, float, at_least=0)
        check_setting("rate", self.rate, float, above=0)
        check_setting("port", self.port, int, at_least=1, below=65536)


Make = Callable[[Figure, Any], Demo]


def run(
    name: str, doc: str | None, make: Make, kind: type, arguments: Sequence[str] | None = None, sized: Any = None
) -> int:
    """Run a demo from its command line; returns the exit status.

    Args:
        name: The demo's module.
        doc: Its docstring.
        make: Makes the demo on a figure, from settings.
        kind: Dataclass of its settings; its fields become flags.
        arguments: The command line.
        sized: Where `size` and `clip` are found, if `make` has none.
    """
    warp.config.log_level = warp.LOG_WARNING
    # A controller is tiny: several threads would wait for one another, and the picture for them.
    torch.set_num_threads(1)
    parser = Parser(prog=f"python -m demos.{name}", description=(doc or "").partition("\n")[0], allow_abbrev=False)
    add_flags(parser.add_argument_group("how to see it"), View)
    add_flags(parser.add_argument_group("the demo"), kind, taken=[entry.name for entry in fields(View)])
    given = vars(parser.parse_args(arguments))
    try:
        view = View(**{entry.name: given.pop(entry.name) for entry in fields(View) if entry.name in given})
        settings = kind(**given)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    size, clip = (getattr(sized or make, word, getattr(Demo, word)) for word in ("size", "clip"))
    try:
        with parser.answering("the demo"), mpl.rc_context(STYLE), stop_on_signals() as (stop, received):
            if view.save:
                save(lambda figure: make(figure, settings), view, size, clip, stop)
            elif view.browser:
                serve(lambda figure: make(figure, settings), view, size, name, stop)
            else:
                open_window(lambda figure: make(figure, settings), view, size, name, stop)
    except CannotShow as error:
        parser.error(str(error))
    return 128 + received[0] if received else 0


@contextmanager
def staged(make: Callable[[Figure], Demo], figure: Figure) -> Iterator[Stage]:
    """Make a demo on a figure; it is closed in the end."""
    demo = make(figure)
    try:
        yield Stage(demo)
    finally:
        demo.close()


def open_window(make: Callable[[Figure], Demo], view: View, size: tuple[float, float], name: str, stop: Event) -> None:
    """Show a demo in a window until it is closed."""
    if not has_display():
        raise CannotShow(f"there is no display to open a window on; {HINT}")
    from matplotlib import pyplot as plt  # noqa: PLC0415, it looks for a display as soon as it is imported

    try:
        figure = plt.figure(f"{name} – warp_phys", figsize=size)
    except (ImportError, RuntimeError) as error:
        raise CannotShow(f"no window can be opened ({error}); {HINT}") from None
    try:
        if mpl.get_backend().lower() == "agg":
            raise CannotShow(
                "no window can be opened: the display does not answer, or Python has no window toolkit (tkinter or "
                f"PyQt6 would do); {HINT}"
            )
        with staged(make, figure) as stage:
            play(stage, view, stop, lambda: plt.close(figure))
            plt.show()
            tell_rate(stage, view)
    finally:
        plt.close(figure)


def play(stage: Stage, view: View, stop: Event, end: Callable[[], Any]) -> None:
    """Have a canvas show one picture after the other; calls `end` on a signal, or when the time is over."""
    timer = stage.canvas.new_timer(interval=INTERVAL)

    def tick() -> None:
        over = view.seconds and stage.last - stage.started > view.seconds
        if stop.is_set() or over:
            timer.stop()
            end()
            return
        try:
            stage.tick()
        except Exception as error:
            # a window system would print it, and wait for ever
            stage.error = error
            timer.stop()
            end()

    timer.add_callback(tick)
    timer.start()
    stage.timer = timer
    stage.canvas.mpl_connect("close_event", lambda _event: timer.stop())


def tell_rate(stage: Stage, view: View) -> None:
    """Print how many pictures were shown per second, if asked for; raise what ended them, if anything did."""
    if stage.error:
        raise stage.error
    if view.fps:
        seconds = stage.last - stage.started
        print(f"{stage.frames} pictures in {seconds:.1f} s, {stage.frames / max(seconds, 1e-9):.1f} per second")


def serve(make: Callable[[Figure], Demo], view: View, size: tuple[float, float], name: str, stop: Event) -> None:
    """Show a demo on a page that only this machine can open, until a signal comes."""
    try:
        from matplotlib.backends.backend_webagg import (  # noqa: PLC0415, needs an extra
            FigureManagerWebAgg,
            WebAggApplication,
        )
        from matplotlib.backends.backend_webagg_core import NavigationToolbar2WebAgg  # noqa: PLC0415
        from tornado.ioloop import IOLoop  # noqa: PLC0415
    except ImportError:
        raise CannotShow('a page needs tornado: pip install "warp_phys[browser]"') from None
    from matplotlib import pyplot as plt  # noqa: PLC0415

    plt.switch_backend("webagg")
    try:
        server = WebAggApplication().listen(view.port, "127.0.0.1")
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "in use" if error.errno == errno.EADDRINUSE else "not open to this user"
        raise CannotShow(f"port {view.port} is {why}; choose another with --port, such as {view.port + 1}") from None
    # no tools that would move the axes under the mouse
    NavigationToolbar2WebAgg.toolitems = [item for item in NavigationToolbar2WebAgg.toolitems if item[0] == "Download"]
    loop = IOLoop.current()
    figure = plt.figure(f"{name} – warp_phys", figsize=size)
    assert isinstance(figure.canvas.manager, FigureManagerWebAgg)
    try:
        # Opaque pictures are sent as differences, of which a browser that falls behind loses some: traces would stay.
        figure.patch.set_alpha(254 / 255)
        with staged(make, figure) as stage:
            play(stage, view, stop, loop.stop)
            address = f"http://127.0.0.1:{view.port}/{figure.number}"  # type: ignore[attr-defined]
            print(f"Open {address} in a browser; Ctrl-C here ends the demo.")
            print(f"From afar, first: ssh -L {view.port}:127.0.0.1:{view.port} <this machine>", flush=True)
            loop.start()
            tell_rate(stage, view)
    finally:
        server.stop()
        plt.close(figure)


def save(make: Callable[[Figure], Demo], view: View, size: tuple[float, float], clip: float, stop: Event) -> None:
    """Write a demo, with what its script does, as a file; a .png shows its last moment."""
    path = Path(view.save)
    kind = path.suffix.lower()
    if kind == ".mp4" and not shutil.which("ffmpeg"):
        raise CannotShow("a .mp4 needs the program ffmpeg, which was not found; install it, or save a .gif")
    if kind == ".gif" and view.rate > GIF_RATE:
        raise CannotShow(f"a .gif shows at most {GIF_RATE} pictures a second; take a lower --rate, or save a .mp4")
    figure = Figure(figsize=size, dpi=80)
    FigureCanvasAgg(figure)
    count = max(1, round((view.seconds or clip) * view.rate))
    with staged(make, figure) as stage:
        pictures = []
        for picture in render(stage, count, 1.0 / view.rate):
            if stop.is_set():
                return
            pictures = [*pictures, picture] if kind != ".png" else [picture]
        tell_rate(stage, view)
    if kind == ".png":
        with atomic_write(path) as file:
            pictures[-1].save(file, "PNG", optimize=True)
    elif kind == ".gif":
        ends = np.round(np.arange(count + 1) * 100.0 / view.rate).astype(int)  # a GIF holds hundredths of a second
        write_pictures(path, pictures, (10 * np.diff(ends)).tolist(), colours=96, keep=INKS)
    else:
        write_film(path, pictures, view.rate)
    print(f"{'Picture' if kind == '.png' else 'Film'}: {path.resolve()}")


def render(stage: Stage, count: int, dt: float) -> Iterator[Image.Image]:
    """Play a demo with its script; yields pictures."""
    script = list(stage.demo.script())
    for number in range(count):
        while script and script[0][0] <= number * dt:
            script.pop(0)[1]()
        stage.demo.settle(number * dt)
        stage.show(dt)
        yield Image.fromarray(np.asarray(stage.canvas.buffer_rgba())[..., :3].copy())  # type: ignore[attr-defined]


def write_film(path: Path, pictures: Sequence[Image.Image], rate: float) -> None:
    """Write pictures as a film that browsers play, by way of the program ffmpeg."""
    width, height = pictures[0].size
    partial = path.with_name(path.name + ".partial.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", f"{rate:g}", "-i", "-", "-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-pix_fmt", "yuv420p"]
    frames = b"".join(picture.tobytes() for picture in pictures)
    done = subprocess.run([*command, str(partial)], input=frames, capture_output=True, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CannotShow(f"ffmpeg could not write a .mp4 ({said[-1] if said else 'it failed'}); save a .gif instead")
    partial.replace(path)
