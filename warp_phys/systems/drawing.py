"""What a system looks like, in shapes of space that any front end can draw; here also on matplotlib's axes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Point = Sequence[float]
"""x to the right, y away from who looks, z up."""

INK, GREY, PALE = "#262626", "#666666", "#999999"
BLUE = "#1f77b4"

FRONT = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
"""What a flat picture shows: x to the right, z up."""
ABOVE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
"""x to the right, y up."""
ASLANT = ((1.0, 0.3, 0.0), (0.0, 0.3, 1.0))
"""As from in front, what is farther away to the right and higher."""


@dataclass(frozen=True, eq=False)
class Line:
    """A line through points, shape (N, 3), with gaps where they are nan; `width` in points of the screen."""

    points: np.ndarray
    colour: str | np.ndarray = INK
    """One for all, such as "#0072B2", or one per point: shape (N, 3), from 0 to 1."""
    width: float = 1.5


@dataclass(frozen=True, eq=False)
class Rod:
    """A round bar from one point to another."""

    start: Point
    end: Point
    radius: float
    colour: str = INK


@dataclass(frozen=True, eq=False)
class Cone:
    """A cone from the centre of its base to its tip."""

    start: Point
    end: Point
    radius: float
    colour: str = INK


@dataclass(frozen=True, eq=False)
class Ball:
    """A sphere."""

    centre: Point
    radius: float
    colour: str = INK


@dataclass(frozen=True, eq=False)
class Block:
    """A box along the axes; `size` is its whole length in each of them."""

    centre: Point
    size: Point
    colour: str = INK


@dataclass(frozen=True, eq=False)
class Surface:
    """Triangles with a colour per corner: `faces` (F, 3) number the rows of `points` (N, 3) and `colour` (N, 3)."""

    points: np.ndarray
    faces: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True, eq=False)
class Text:
    """Words at a place."""

    place: Point
    words: str
    colour: str = INK


Shape = Line | Rod | Cone | Ball | Block | Surface | Text


@dataclass(frozen=True)
class Picture:
    """What one state looks like."""

    parts: Mapping[str, Shape]
    """Shapes by name, those behind first; the same names for every state."""
    low: Point
    """Corner of the box that is to be seen; it may move from state to state."""
    high: Point
    """The corner across."""
    view: Sequence[Sequence[float]] = FRONT
    """How a flat picture looks at it: where x, y and z lead to the right and up, shape (2, 3)."""
    labels: tuple[str, str] = ("", "")
    """Of the axes of a flat picture; one without a name has no numbers."""
    equal: bool = True
    """Whether a metre is as long in both."""
    still: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of parts that never change."""


def moved(parts: Mapping[str, Shape], by: Point) -> dict[str, Shape]:
    """Return the parts of a picture somewhere else.

    >>> moved({"ball": Ball((1.0, 0.0, 0.0), 0.1)}, (0.0, 2.0, 0.0))["ball"].centre
    array([1., 2., 0.])
    """
    places = ("points", "start", "end", "centre", "place")
    found = {}
    for name, shape in parts.items():
        at: Any = {place: np.add(getattr(shape, place), by) for place in places if hasattr(shape, place)}
        found[name] = replace(shape, **at)
    return found


def cross(place: Point, size: float, plane: Sequence[Sequence[float]] = FRONT, colour: str = GREY) -> Line:
    """Return a cross that marks a place, in the plane of a view."""
    across, up = (size * np.asarray(direction) for direction in plane)
    arms = [-across - up, across + up, np.full(3, np.nan), up - across, across - up]
    return Line(np.asarray(place, dtype=float) + np.array(arms), colour, 3.0)


def sketch(axes: Any, picture: Callable[..., Picture]) -> Callable[..., Sequence[Any]]:
    """Return a function that shows `picture` of its arguments on matplotlib `axes` and returns the artists.

    >>> from matplotlib.figure import Figure
    >>> ball = lambda x: Picture({"ball": Ball((x, 0, 0), 0.5)}, low=(-1, -1, -1), high=(1, 1, 1))
    >>> axes = Figure().add_subplot()
    >>> len(sketch(axes, ball)(0.2)), axes.get_xlim()
    (1, (np.float64(-1.0), np.float64(1.0)))
    """
    artists: dict[str, tuple[type, Any]] = {}
    dressed: list[Any] = []

    def move(*state: Any, **more: Any) -> Sequence[Any]:
        shown = picture(*state, **more)
        look = (shown.view, shown.labels, shown.equal)
        if dressed != [look]:
            dressed[:] = [look]
            _dress(axes, shown)
        (left, bottom), (right, top) = _ends(shown)
        axes.set(xlim=(left, right), ylim=(bottom, top))
        for name in [name for name in artists if name not in shown.parts]:
            artists.pop(name)[1].remove()
        for order, (name, shape) in enumerate(shown.parts.items()):
            if name in artists and artists[name][0] is not type(shape):
                artists.pop(name)[1].remove()
            if name not in artists:
                artists[name] = type(shape), _MAKERS[type(shape)](axes, shape, shown.view)
            elif name in shown.still:
                continue
            _MOVERS[type(shape)](artists[name][1], shape, np.asarray(shown.view))
            artists[name][1].set_zorder(1 + order)
        return [artist for _, artist in artists.values()]

    return move


def corners(picture: Picture) -> np.ndarray:
    """Return the eight corners of the box that is to be seen, shape (8, 3)."""
    ends = np.array([picture.low, picture.high], dtype=float)
    return np.array([[ends[i, 0], ends[j, 1], ends[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])


def _ends(picture: Picture) -> Iterator[np.ndarray]:
    flat = corners(picture) @ np.asarray(picture.view).T
    return iter((flat.min(axis=0), flat.max(axis=0)))


def _dress(axes: Any, picture: Picture) -> None:
    axes.set_aspect("equal" if picture.equal else "auto")
    for axis, label in zip((axes.xaxis, axes.yaxis), picture.labels, strict=True):
        axis.set_label_text(label)
        axis.set_visible(bool(label))


def _outline(shape: Rod | Cone | Ball | Block, view: np.ndarray) -> np.ndarray:
    """Corners of what a flat picture shows of a solid, shape (N, 2)."""
    if isinstance(shape, Ball):
        circle = np.exp(1j * np.linspace(0.0, 2.0 * np.pi, 33))
        return view @ np.asarray(shape.centre) + shape.radius * np.stack([circle.real, circle.imag], axis=1)
    if isinstance(shape, Block):
        half = 0.5 * np.asarray(shape.size, dtype=float)
        across, up = view * half
        # the silhouette of a box: of its three edges the sum of all that lead to the right, and so on round it
        edges = np.stack([across, up], axis=1)
        edges = edges * np.where(np.arctan2(edges[:, 1:], edges[:, :1]) < 0.0, -1.0, 1.0)
        edges = edges[np.argsort(np.arctan2(edges[:, 1], edges[:, 0]))]
        ring = -edges.sum(axis=0) + 2.0 * np.concatenate([np.zeros((1, 2)), np.cumsum(edges, axis=0)])
        return view @ np.asarray(shape.centre) + np.concatenate([ring, -ring])
    start, end = (view @ np.asarray(point, dtype=float) for point in (shape.start, shape.end))
    along = end - start
    aside = shape.radius * np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-12)
    if isinstance(shape, Cone):
        return np.stack([start - aside, start + aside, end])
    return np.stack([start - aside, start + aside, end + aside, end - aside])


def _make_line(axes: Any, shape: Line, _view: Any) -> Any:
    if isinstance(shape.colour, str):
        return axes.plot([], [], color=shape.colour, linewidth=shape.width, solid_capstyle="round")[0]
    return axes.vlines([], [], [], linewidth=shape.width)


def _move_line(artist: Any, shape: Line, view: np.ndarray) -> None:
    flat = np.asarray(shape.points, dtype=float) @ view.T
    if isinstance(shape.colour, str):
        artist.set_data(*flat.T)
        artist.set_color(shape.colour)
    else:
        artist.set_segments(np.stack([flat[:-1], flat[1:]], axis=1))
        artist.set_color(np.clip(0.5 * (shape.colour[:-1] + shape.colour[1:]), 0.0, 1.0))


def _make_solid(axes: Any, _shape: Shape, _view: Any) -> Any:
    return axes.fill([0.0] * 3, [0.0] * 3)[0]


def _move_solid(artist: Any, shape: Any, view: np.ndarray) -> None:
    artist.set_xy(_outline(shape, view))
    artist.set(facecolor=shape.colour, edgecolor="none" if not isinstance(shape, Ball) else "white", linewidth=0.5)


def _make_surface(axes: Any, shape: Surface, view: Any) -> Any:
    flat = np.asarray(shape.points, dtype=float) @ np.asarray(view, dtype=float).T
    made = axes.tripcolor(*flat.T, shape.faces, facecolors=np.zeros(len(shape.faces)), rasterized=True)
    made.set_array(None)
    made.set_facecolor(shape.colour[shape.faces].mean(axis=1))
    return made


def _move_surface(_artist: Any, _shape: Surface, _view: np.ndarray) -> None:
    """Surfaces stand still."""


def _make_text(axes: Any, _shape: Text, _view: Any) -> Any:
    return axes.text(0.0, 0.0, "", ha="center", va="center", fontsize=9, clip_on=True)


def _move_text(artist: Any, shape: Text, view: np.ndarray) -> None:
    artist.set_position(view @ np.asarray(shape.place, dtype=float))
    artist.set(text=shape.words, color=shape.colour)


_MAKERS: dict[type, Callable[..., Any]] = {
    Line: _make_line,
    Surface: _make_surface,
    Text: _make_text,
    **dict.fromkeys((Rod, Cone, Ball, Block), _make_solid),
}
_MOVERS: dict[type, Callable[..., Any]] = {
    Line: _move_line,
    Surface: _move_surface,
    Text: _move_text,
    **dict.fromkeys((Rod, Cone, Ball, Block), _move_solid),
}
