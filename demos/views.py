"""Two ways to see a demo, a page in a browser and a file, and the command line that chooses one.

A demo's module ends with

    def main(arguments: Sequence[str] | None = None) -> int:
        return run("cartpole", __doc__, CartPoleDemo, Settings, arguments)
"""

import itertools
import shutil
import subprocess
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import warp
from PIL import Image

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags, stop_on_signals
from controllers.settings import check_setting
from demos.animation import has_display, write_pictures
from demos.colours import colour
from demos.film import Film, play
from demos.frame import Demo
from demos.outputs import check_file
from warp_phys.interop.extras import require
from warp_phys.systems.cartpole import POLE_COLOURS

KINDS = {".gif": "Film", ".png": "Picture", ".mp4": "Film", ".html": "Scene"}
INTERVAL = 1.0 / 50.0
"""Seconds between two pictures on a page at least."""
INKS = (*map(colour, ("R", "M", "S", "C", "either")), *POLE_COLOURS)
"""Colours that a .gif keeps exactly."""
GIF_RATE = 50
"""Pictures a second at most in a GIF: browsers show what is to last less than 20 ms for 100."""


class CannotShow(Exception):
    """The demo cannot be shown in the way that was asked for; the message says why, and what to do instead."""


@dataclass(frozen=True)
class View:
    """How a demo is shown."""

    save: str = ""
    """Write a file (.gif, .png, .mp4, or .html: a scene to be turned) in place of serving a page."""
    seconds: float = 0.0
    """Length of the file, or time after which the page ends; 0: the demo's own length, or never."""
    rate: float = 25.0
    """Pictures per second in a file; at most 50 in a .gif."""
    host: str = "127.0.0.1"
    """Address that the page is served at; with this one only this machine can open it."""
    port: int = 8988
    """Port of the page."""
    open: bool = True
    """Open the page in a browser where there is a display."""
    fps: bool = False
    """Print how many pictures per second were shown."""

    kinds: InitVar[Sequence[str]] = tuple(KINDS)

    def __post_init__(self, kinds: Sequence[str]) -> None:
        """Check every setting."""
        if self.save:
            check_file("save", self.save, kinds)
        check_setting("seconds", self.seconds, float, at_least=0)
        check_setting("rate", self.rate, float, above=0)
        check_setting("port", self.port, int, at_least=1, below=65536)
        if not self.host:
            raise ValueError("host must be an address such as 127.0.0.1, got an empty one")


def run(
    name: str, doc: str | None, make: Callable[[Any], Demo], kind: type, arguments: Sequence[str] | None = None
) -> int:
    """Run a demo from its command line; returns the exit status.

    Args:
        name: The demo's module.
        doc: Its docstring.
        make: Makes the demo from settings.
        kind: Dataclass of its settings; its fields become flags.
        arguments: The command line.
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
    return show(parser, lambda: make(settings), view, name)


def show(parser: Parser, make: Callable[[], Demo], view: View, name: str) -> int:
    """Show a demo; what cannot be done takes one line. Returns the exit status."""

    def made() -> Demo:
        try:
            return make()
        except ValueError as error:  # a damaged file of weights
            raise CannotShow(str(error)) from None

    try:
        with parser.answering("the demo"), stop_on_signals() as (stop, received):
            (save if view.save else serve)(made, view, name, stop)
    except CannotShow as error:
        parser.error(str(error))
    return 128 + received[0] if received else 0


def need_viewer(instead: str) -> None:
    """Raise CannotShow where the extra for pages is missing."""
    try:
        require("viser", "viewer")
    except ImportError as error:
        raise CannotShow(f"{error}, or {instead}") from None


def serve(make: Callable[[], Demo], view: View, name: str, stop: Event) -> None:
    """Show a demo on a page until a signal comes or its time is over."""
    need_viewer("write a file with --save FILE.gif")
    from demos import page  # noqa: PLC0415, needs an extra

    try:
        with page.open_server(view.host, view.port, f"{name} – warp_phys") as server:
            demo = make()
            try:
                shown = page.Page(server, demo)
                address = f"http://{f'[{view.host}]' if ':' in view.host else view.host}:{view.port}"
                print(f"Open {address} in a browser; Ctrl-C here ends the demo.")
                print(f"From afar, first: ssh -L {view.port}:127.0.0.1:{view.port} <this machine>", flush=True)
                if view.open and has_display():
                    webbrowser.open(address)
                begun = time.perf_counter()
                while not stop.is_set() and not 0.0 < view.seconds < time.perf_counter() - begun:
                    now = time.perf_counter()
                    shown.tick()
                    stop.wait(max(0.0, INTERVAL - (time.perf_counter() - now)))
                if view.fps:
                    seconds = time.perf_counter() - begun
                    print(f"{shown.frames} pictures in {seconds:.1f} s, {shown.frames / seconds:.1f} per second")
            finally:
                demo.close()
    except page.PortTaken:
        why = f"port {view.port} of {view.host} is in use or not open to this user"
        raise CannotShow(f"{why}; choose another with --port, such as {view.port + 1}") from None


def save(make: Callable[[], Demo], view: View, _name: str, stop: Event) -> None:
    """Write a demo, with what its script does, as a file; a .png shows its last moment."""
    path = Path(view.save)
    kind = path.suffix.lower()
    if kind == ".mp4" and not shutil.which("ffmpeg"):
        raise CannotShow("a .mp4 needs the program ffmpeg, which was not found; install it, or save a .gif")
    if kind == ".gif" and view.rate > GIF_RATE:
        raise CannotShow(f"a .gif shows at most {GIF_RATE} pictures a second; take a lower --rate, or save a .mp4")
    if kind == ".html":
        need_viewer("save a .gif")
    demo = make()
    try:
        (write_scene if kind == ".html" else write_pictures_of)(demo, view, path, stop)
    finally:
        demo.close()
    if not stop.is_set():
        print(f"{KINDS[kind]}: {path.resolve()}")


def write_scene(demo: Demo, view: View, path: Path, stop: Event) -> None:
    """Write a page that plays what a demo does, to be turned and zoomed without a server."""
    from demos import page  # noqa: PLC0415, needs an extra

    steps = itertools.takewhile(lambda _: not stop.is_set(), play(demo, view.seconds or demo.clip, view.rate))
    text = page.record(demo, steps, view.rate)
    if stop.is_set():
        return
    with atomic_write(path) as file:
        file.write(text.encode())


def write_pictures_of(demo: Demo, view: View, path: Path, stop: Event) -> None:
    """Write a picture or a film of a demo."""
    film, kind, pictures = Film(demo), path.suffix.lower(), []
    for _ in play(demo, view.seconds or demo.clip, view.rate):
        if stop.is_set():
            return
        if kind != ".png":
            pictures.append(film.show())
    if kind == ".png":
        with atomic_write(path) as file:
            film.show().save(file, "PNG", optimize=True)
    elif kind == ".gif":
        # a GIF holds hundredths of a second
        ends = np.round(np.arange(len(pictures) + 1) * 100.0 / view.rate).astype(int)
        write_pictures(path, pictures, (10 * np.diff(ends)).tolist(), colours=96, keep=INKS)
    else:
        write_film(path, pictures, view.rate)


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
