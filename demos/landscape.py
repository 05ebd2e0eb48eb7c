"""The plane of two parameters: the loss as a surface, and on it the paths of R, M, S and C from a start of your choice.

    python -m demos.landscape
    python -m demos.landscape --save landscape.png
    python -m demos.landscape --save landscape.png --start 2.5,2 --start -1,-3

Saved, it is a figure of losses, updates and their rotation; what is measured for it is printed. docs/landscape.md says
what one sees.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import warp
from matplotlib.figure import Figure

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags
from demos.colours import colour, flow_names
from demos.frame import ANYWHERE, Button, Choice, Control, Demo, Grip, Plot, Ray, Slider
from demos.landscape_numbers import (
    DEFAULT_STARTS,
    FLOWS,
    Settings,
    Start,
    compute,
    find_paths,
    losses_at,
    summarise,
)
from demos.landscape_picture import LEAST_LOSS, draw, save
from demos.outputs import PICTURES
from demos.views import View, show
from warp_phys.systems.drawing import ASLANT, Ball, Line, Picture, Shape, Surface, Text

CELLS = 81
"""Points along each axis of the surface."""
LOWEST, HIGHEST, TALL = 1e-3, 1e6, 0.3
"""Losses where the surface ends below and above, and its height per power of ten."""
PACE = 60.0
"""Steps of the optimisers that are shown per second."""
RATES = {"adam": 0.05, "descent": 0.01}


def heights(losses: np.ndarray) -> np.ndarray:
    """Return the height of the surface where the loss is this."""
    return TALL * np.log10(np.clip(losses, LOWEST, HIGHEST))


class LandscapeDemo(Demo):
    """The loss over the plane, on it the minima and four paths from a start."""

    says = "A loss as a landscape (dark is high): click it, and four ways of backpropagation walk down from there."
    clip = 7.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, self.factor = settings, 0.0
        self.landscape = settings.landscape()
        reach = settings.reach
        axis = np.linspace(-reach, reach, CELLS)
        points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        self.height = heights(self.landscape.evaluate(points, ()).loss).reshape(CELLS, CELLS)
        self.still = self.make_still(points)
        self.starts = list(settings.starts)
        self.begin(np.array(self.starts[0]))

    def make_still(self, points: np.ndarray) -> dict[str, Shape]:
        """The surface, the minima on it and the names of the axes."""
        corner = np.arange(CELLS * CELLS).reshape(CELLS, CELLS)[:-1, :-1].reshape(-1, 1)
        faces = np.concatenate([np.add(corner, three) for three in ((0, 1, CELLS + 1), (0, CELLS + 1, CELLS))])
        share = (self.height.reshape(-1) - heights(np.array(LOWEST))) / (TALL * np.log10(HIGHEST / LOWEST))
        inks = mpl.colormaps["YlGnBu"](0.75 * share)[:, :3]
        reach = self.settings.reach
        minima = self.landscape.minima((-reach, reach))
        ends = [(*point, heights(np.array(0.0)) + 0.03) for segment in minima for point in (*segment, (np.nan,) * 2)]
        return {
            "surface": Surface(np.concatenate([points, self.height.reshape(-1, 1)], axis=1), faces, inks),
            "minima": Line(np.array(ends).reshape(-1, 3), "#000000", 4.0),
            "first": Text((0.0, -1.1 * reach, self.height.min()), "θ1"),
            "second": Text((1.1 * reach, 0.0, self.height.min()), "θ2"),
        }

    def controls(self) -> Sequence[Control]:
        """What can be chosen."""
        return [
            Button("another start", self.another),
            Button("again", self.again),
            Choice("optimiser", tuple(RATES), lambda: self.settings.optimiser, self.choose),
            Slider("log10 of the rate's factor", -1.0, 1.0, 0.1, lambda: self.factor, self.set_factor),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """Losses along the paths."""
        inks = [colour(flow) for flow in FLOWS]
        return [
            Plot("loss along the paths", flow_names(FLOWS), inks, self.curves, "step", (LEAST_LOSS, HIGHEST), log=True)
        ]

    def grips(self) -> Mapping[str, Grip]:
        """A click is a start; the start can be dragged."""
        return {ANYWHERE: Grip(click=self.point), "start": Grip(drag=self.point)}

    def words(self) -> str:
        """Where the paths are."""
        step = int(self.shown)
        at = ", ".join(
            f"{flow} {loss:.1g}{'' if inside else ' (outside)'}"
            for flow, loss, inside in zip(FLOWS, self.path_losses[:, step], self.inside[:, step], strict=True)
        )
        return f"step {step}, losses: {at}. Black: where the loss is 0."

    def begin(self, start: np.ndarray) -> None:
        """Optimise from a start, with all flows."""
        self.start, self.shown = np.clip(start, -self.settings.reach, self.settings.reach), 0.0
        rule = replace(self.settings, rate=self.settings.rate * 10.0**self.factor).rule
        one, count = [Start(*map(float, self.start))], self.settings.iterations
        self.paths = np.stack([find_paths(self.landscape, one, flow, rule, count) for flow in FLOWS])[:, :, 0]
        losses = losses_at(self.landscape, self.paths)
        self.path_losses = np.maximum(losses, LEAST_LOSS)
        self.path_heights = heights(losses) + 0.05
        # shape (flows, steps + 1); a state that is not finite is nowhere
        self.inside = (np.abs(self.paths) < 1.001 * self.settings.reach).all(axis=2) & np.isfinite(losses)

    def another(self) -> None:
        """Take the next of the starts."""
        self.starts.append(self.starts.pop(0))
        self.begin(np.array(self.starts[0]))

    def again(self) -> None:
        """Show the paths once more."""
        self.shown = 0.0

    def choose(self, optimiser: str) -> None:
        """Follow the updates with another optimiser."""
        self.settings = replace(self.settings, optimiser=optimiser, rate=RATES[optimiser])  # type: ignore[arg-type]
        self.begin(self.start)

    def set_factor(self, power: float) -> None:
        """Multiply the optimiser's rate by a power of ten."""
        self.factor = power
        self.begin(self.start)

    def point(self, ray: Ray) -> None:
        """Start where somebody points at the surface."""
        place = self.meet(ray)
        if place is not None:
            self.begin(place)

    def meet(self, ray: Ray) -> np.ndarray | None:
        """Return where a ray meets the surface first, shape (2,), None where it passes by."""
        top, bottom = ray.meet((0, 0, self.height.max()), (0, 0, 1)), ray.meet((0, 0, self.height.min()), (0, 0, 1))
        if bottom is None:
            return None
        along = np.linspace(ray.origin if top is None else top, bottom, 2000)
        reach = self.settings.reach
        cells = np.round((along[:, :2] + reach) / (2.0 * reach) * (CELLS - 1)).astype(int)
        inside = ((cells >= 0) & (cells < CELLS)).all(axis=1)
        cells = np.clip(cells, 0, CELLS - 1)
        met = inside & (along[:, 2] <= self.height[cells[:, 1], cells[:, 0]] + 1e-9)
        return along[met.argmax(), :2] if met.any() else None

    def advance(self, dt: float) -> None:
        """Go on along the paths."""
        self.shown = min(self.shown + PACE * dt, float(self.settings.iterations))

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Losses so far, by step."""
        count = int(self.shown) + 1
        return np.arange(float(count)), self.path_losses[:, :count]

    def picture(self) -> Picture:
        """The surface with the paths so far."""
        count, parts = int(self.shown) + 1, dict(self.still)
        for flow, path, height, inside in zip(FLOWS, self.paths, self.path_heights, self.inside, strict=True):
            so_far = np.column_stack([path[:count], height[:count]])
            so_far[~inside[:count]] = np.nan
            parts[f"path of {flow}"] = Line(so_far, colour(flow), 5.0)
            # one that has left stands where it did so
            parts[f"head of {flow}"] = Ball(tuple(so_far[inside[:count]][-1]), 0.12, colour(flow))
        parts["start"] = Ball((*self.start, self.path_heights[0, 0]), 0.15, "#FFFFFF")
        reach = self.settings.reach
        low, high = (-reach, -reach, float(self.height.min())), (reach, reach, float(self.height.max()))
        return Picture(parts, low, high, view=ASLANT, still=frozenset(self.still))

    def script(self) -> Sequence[tuple[float, Callable[[], Any]]]:
        """In a recording: another start."""
        return [(3.5, self.another)]


def read_start(text: str) -> Start:
    """Read a start such as "2.5,-1".

    >>> read_start("2.5,-1")
    Start(theta1=2.5, theta2=-1.0)
    """
    try:
        start = Start(*(float(number) for number in text.split(",")))
    except (TypeError, ValueError):
        raise ValueError(f"start must be two numbers such as 2.5,-1, got {text!r}") from None
    if not np.isfinite(start).all():
        raise ValueError(f"start must be finite, got {text!r}")
    return start


def parse(arguments: Sequence[str]) -> tuple[Parser, View, Settings]:
    """Read a command line; exits with status 2 and one line where it makes no sense."""
    parser = Parser(
        prog="python -m demos.landscape", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add_flags(parser.add_argument_group("how to see it"), View)
    add_flags(group := parser.add_argument_group("the demo"), Settings, taken=[entry.name for entry in fields(View)])
    shown = " ".join(f"{start.theta1:g},{start.theta2:g}" for start in DEFAULT_STARTS)
    text = f"Where an optimisation starts, θ1,θ2; may be given again and again (default: {shown})."
    group.add_argument("--start", action="append", metavar="A,B", help=text)
    # "--start -1,2" in two words looks like two flags to argparse, "--start=-1,2" does not
    words = iter(arguments)
    joined = [f"{word}={next(words, '')}" if word == "--start" else word for word in words]
    given = vars(parser.parse_args(joined))
    starts = given.pop("start")
    try:
        view = View(
            **{entry.name: given.pop(entry.name) for entry in fields(View) if entry.name in given},
            kinds=(*PICTURES, ".html"),
        )
        if starts:
            given["starts"] = [read_start(start) for start in starts]
        settings = Settings(**given)
        settings.landscape()
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return parser, view, settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    warp.config.log_level = warp.LOG_WARNING
    torch.set_num_threads(1)
    parser, view, settings = parse(sys.argv[1:] if arguments is None else arguments)
    path = Path(view.save)
    if path.suffix.lower() not in PICTURES:
        return show(parser, lambda: LandscapeDemo(settings), view, "landscape")
    found = compute(settings)
    print(summarise(settings, found), end="", flush=True)
    figure = Figure(figsize=(12.5, 12.2), layout="constrained")
    draw(figure, settings, found)
    with parser.answering(), atomic_write(path) as file:
        save(figure, file, path.suffix[1:].lower())
    print(f"Picture: {path.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
