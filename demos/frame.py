"""The frame of a demo: what it shows and what can be done with it, said once for the browser and for files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from warp_phys.systems.drawing import Picture


class Ray(NamedTuple):
    """Where somebody points: from the eye through the place on the screen."""

    origin: np.ndarray
    """Shape (3,)."""
    direction: np.ndarray
    """Shape (3,), of any length."""

    def meet(self, place: Sequence[float], normal: Sequence[float]) -> np.ndarray | None:
        """Return where it meets the plane through a place, shape (3,), None where it runs along or away.

        >>> Ray(np.array([0.0, -2.0, 1.0]), np.array([0.5, 1.0, 0.0])).meet((0, 0, 0), (0, 1, 0))
        array([1., 0., 1.])
        """
        across = float(np.dot(self.direction, normal))
        ahead = float(np.dot(np.subtract(place, self.origin), normal))
        if across == 0.0 or ahead / across < 0.0:
            return None
        return self.origin + ahead / across * self.direction


@dataclass(frozen=True)
class Button:
    """Something to press."""

    label: str
    press: Callable[[], Any]


@dataclass(frozen=True)
class Choice:
    """One of several."""

    label: str
    options: Sequence[str]
    read: Callable[[], str]
    """What is chosen now."""
    choose: Callable[[str], Any]


@dataclass(frozen=True)
class Slider:
    """A number."""

    label: str
    least: float
    most: float
    step: float
    read: Callable[[], float]
    """The number as it is now."""
    move: Callable[[float], Any]


Control = Button | Choice | Slider


@dataclass(frozen=True)
class Plot:
    """Curves over one axis."""

    title: str
    names: Sequence[str]
    colours: Sequence[str]
    read: Callable[[], tuple[np.ndarray, np.ndarray]]
    """x, shape (N,), and the curves, shape (curves, N); nan where there is nothing."""
    x_label: str = "time [s]"
    y_range: tuple[float, float] | None = None
    """What the axis shows, else what there is; needed where it is logarithmic."""
    log: bool = False


@dataclass(frozen=True)
class Grip:
    """What can be done with a part of the picture; all in the coordinates of the picture."""

    drag: Callable[[Ray], Any] | None = None
    """It is held and the pointer has moved."""
    release: Callable[[], Any] = field(default=lambda: None)
    """It is let go."""
    click: Callable[[Ray], Any] | None = None
    """It was pressed and let go on the spot."""


ANYWHERE = ""
"""In place of a part's name: the grip of the whole picture, which can be clicked."""


class Demo:
    """Something that moves by itself and can be touched; shown on a page or in a file.

    A subclass gives `says`, `picture` and `advance`, and what can be touched: `controls`, `plots`, `grips`. It is used
    from one thread only.
    """

    says: ClassVar[str]
    """One sentence: what it shows and what to do."""
    clip: ClassVar[float] = 6.0
    """Seconds that a file shows if nothing else is asked for."""
    dark: ClassVar[bool] = False
    """Whether the page is dark."""

    def __init__(self) -> None:
        self.paused = False

    def advance(self, dt: float) -> None:
        """Let `dt` seconds pass; not called while the demo is paused."""
        raise NotImplementedError

    def picture(self) -> Picture:
        """Return what it looks like now."""
        raise NotImplementedError

    def controls(self) -> Sequence[Control]:
        """Return what stands beside the picture, in order; asked once."""
        return ()

    def plots(self) -> Sequence[Plot]:
        """Return the curves beside the picture; asked once, and again where `build` has changed."""
        return ()

    def grips(self) -> Mapping[str, Grip]:
        """Return what can be done with which parts of the picture; asked whenever parts are new."""
        return {}

    @property
    def build(self) -> Any:
        """Changes where the plots have other curves than before, or the picture is another one to be looked at."""
        return None

    def words(self) -> str:
        """Return what is the case now, in a line or two."""
        return ""

    def script(self) -> Sequence[tuple[float, Callable[[], Any]]]:
        """What is done in a file, where nobody can touch the demo: times in seconds, increasing, with actions."""
        return ()

    def settle(self, time: float) -> None:
        """In a file, before the picture at this time: wait for what runs beside the picture."""

    def close(self) -> None:
        """End what runs beside the picture, such as threads; called once, however the demo ends."""

    def pause(self) -> None:
        """Hold the time, or let it go on."""
        self.paused = not self.paused
