"""The frame of an interactive demo: what a demo is, and how its picture is kept moving."""

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from matplotlib.artist import Artist
from matplotlib.figure import Figure

LONGEST_STEP = 0.1
"""Seconds of a demo's time that one picture may pass, however long it took."""


class Demo:
    """A picture that moves by itself and can be touched; shown in a window, in a browser or in a file.

    A subclass builds its picture on `figure` in its constructor, lists in `moving` the artists that change from picture
    to picture, and gives `advance` and `draw`. What else changes (a title, a legend, limits) calls `refresh`.

    Args:
        figure: Empty, of the size `size`, with the canvas of the place where it will be shown.
    """

    size: ClassVar[tuple[float, float]] = (10.0, 6.0)
    """Width and height of the figure in inches."""
    clip: ClassVar[float] = 6.0
    """Seconds that a file shows if nothing else is asked for."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.moving: list[Artist] = []
        self.paused = False
        self.stale = True

    def advance(self, dt: float) -> None:
        """Let `dt` seconds pass; not called while the demo is paused."""
        raise NotImplementedError

    def draw(self) -> None:
        """Move the artists to where the state says."""
        raise NotImplementedError

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """What is done in a file, where nobody can touch the demo: times in seconds, increasing, with actions."""
        return ()

    def settle(self, time: float) -> None:
        """In a file, before the picture at this time: wait for what runs beside the picture."""

    def press(self, event: Any) -> None:
        """A mouse button went down; `event` is matplotlib's, in `event.inaxes` at `event.xdata`, `event.ydata`."""

    def drag(self, event: Any) -> None:
        """The mouse moved, with a button down or not."""

    def release(self, event: Any) -> None:
        """A mouse button went up."""

    def close(self) -> None:
        """End what runs beside the picture, such as threads; called once, however the demo ends."""

    def refresh(self) -> None:
        """Have the next picture drawn as a whole, what stands still included."""
        self.stale = True


class Stage:
    """Keeps the picture of a demo moving: what stands still is drawn once, the moving artists over it at every tick."""

    def __init__(self, demo: Demo) -> None:
        self.demo, self.canvas = demo, demo.figure.canvas
        self.frames = 0
        self.started = self.last = time.perf_counter()
        self.timer: Any = None
        """What calls `tick`; kept here, since a canvas does not keep it."""
        self.error: Exception | None = None
        """What went wrong in a picture, if anything did."""
        self._background: Any = None
        for artist in demo.moving:
            artist.set_animated(True)
        handlers: Any = {
            "button_press_event": demo.press,
            "motion_notify_event": demo.drag,
            "button_release_event": demo.release,
            "key_press_event": self._key,
            "draw_event": self._drawn,
        }
        for name, handler in handlers.items():
            self.canvas.mpl_connect(name, handler)

    def tick(self) -> None:
        """Show the next picture, as far on as time has passed since the last one."""
        now = time.perf_counter()
        passed, self.last = min(now - self.last, LONGEST_STEP), now
        self.show(passed)

    def show(self, dt: float) -> None:
        """Show the picture `dt` seconds of the demo's time later."""
        if not self.demo.paused:
            self.demo.advance(dt)
        self.demo.draw()
        self.frames += 1
        if self.demo.stale or self._background is None:
            self.demo.stale = False
            self.canvas.draw()
            return
        self.canvas.restore_region(self._background)  # type: ignore[attr-defined]
        self._draw_moving()
        if hasattr(self.canvas, "blit"):
            self.canvas.blit(self.demo.figure.bbox)

    def _drawn(self, _event: Any) -> None:
        # everything that stands still has been drawn: keep it. A file that is saved by hand has a size of its own.
        if not self.canvas.is_saving():
            self._background = self.canvas.copy_from_bbox(self.demo.figure.bbox)  # type: ignore[attr-defined]
            self._draw_moving()

    def _draw_moving(self) -> None:
        for artist in self.demo.moving:
            if artist.get_visible():
                self.demo.figure.draw_artist(artist)

    def _key(self, event: Any) -> None:
        if event.key == " ":
            self.demo.paused = not self.demo.paused
