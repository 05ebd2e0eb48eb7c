"""The plane of two parameters: click a start, see the paths of R, M, S and C, and which of them go round in circles."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from controllers.settings import check_setting
from demos import landscape_numbers
from demos.colours import colour
from demos.frame import Demo
from demos.landscape_numbers import FLOWS, Start, find_paths, losses_at
from demos.landscape_picture import LEAST_LOSS, STYLES, draw_minima, pale
from demos.landscape_picture import frame as frame_plane
from demos.views import run
from demos.widgets import button, choice, slider
from warp_phys.flow import resolve

CELLS = 120
ARROWS = 25
"""Arrows along each axis."""
PACE = 60.0
"""Steps of the optimisers that are shown per second."""
LOOP, CORNERS = 0.4, 64
"""Radius of the loop around the start, and points on it."""
OPTIMISERS = ("adam", "descent")


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    flow: str = "M"
    """Flow whose field is drawn at first: R, M, S or C."""
    optimiser: str = "adam"
    """What follows the updates at first: adam, or plain descent."""
    iterations: int = 300
    """Steps of each optimisation."""

    def __post_init__(self) -> None:
        """Check every setting."""
        for name, values in (("flow", FLOWS), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        check_setting("iterations", self.iterations, int, at_least=1, below=2001)


class PlaneDemo(Demo):
    """The plane at the left; losses along the paths, circulation and choices at the right."""

    size = (11.0, 6.4)
    clip = 7.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.flow, self.optimiser, self.iterations = settings.flow, settings.optimiser, settings.iterations
        self.numbers = landscape_numbers.Settings(cells=CELLS)
        self.landscape = self.numbers.landscape()
        self.rates = {"adam": 0.05, "descent": 0.01}
        self.start = np.array([2.75, -0.5])
        self.world = figure.add_axes((0.05, 0.08, 0.5, 0.86))
        self.losses = figure.add_axes((0.63, 0.62, 0.35, 0.32))
        self.circles = figure.add_axes((0.63, 0.34, 0.35, 0.15))
        self.draw_world()
        self.widgets = [
            choice(
                figure,
                (0.63, 0.04, 0.15, 0.19),
                "arrows: descent along",
                [f"{letter} {resolve(letter).name}" for letter in FLOWS],
                FLOWS.index(self.flow),
                lambda number: self.show_field(FLOWS[number]),
                [colour(letter) for letter in FLOWS],
            ),
            choice(
                figure,
                (0.81, 0.13, 0.1, 0.1),
                "optimiser",
                OPTIMISERS,
                OPTIMISERS.index(self.optimiser),
                lambda number: self.choose(OPTIMISERS[number]),
            ),
            button(figure, (0.92, 0.175, 0.06, 0.055), "again", self.replay),
            slider(figure, (0.84, 0.06, 0.09, 0.03), "rate ×", (-1, 1), 0.0, self.set_factor, "10^%.1f"),
        ]
        self.factor = 1.0
        self.show_field(self.flow)
        self.begin(self.start)

    def draw_world(self) -> None:
        """Draw what stands still, and empty lines for what moves."""
        reach = self.numbers.reach
        axis = reach * (2.0 * np.arange(CELLS) + 1.0 - CELLS) / CELLS
        points = np.stack(np.meshgrid(axis, axis), axis=-1)
        loss = np.maximum(self.landscape.evaluate(points.reshape(-1, 2), ()).loss.reshape(CELLS, CELLS), 1e-300)
        self.world.pcolormesh(axis, axis, loss, norm=LogNorm(1e-3, 1e6), cmap=pale("YlGnBu", 0.75), rasterized=True)
        draw_minima(self.world, self.landscape.minima((-reach, reach)))
        ticks = reach * (2.0 * np.arange(ARROWS) + 1.0 - ARROWS) / ARROWS
        self.grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
        self.fields = self.landscape.evaluate(self.grid, FLOWS).updates
        zeros = np.zeros(len(self.grid))
        self.arrows = self.world.quiver(*self.grid.T, zeros, zeros, pivot="mid", width=0.003, scale=ARROWS * 1.25)
        frame_plane(self.world, self.numbers, "Click a start. Colour: loss, dark is high; black: its minima")
        self.world.set_ylabel("θ2", labelpad=-6)
        outline = [Stroke(linewidth=3.6, foreground="white"), Normal()]
        self.paths_lines, self.heads, self.loss_lines = [], [], []
        for letter in FLOWS:
            look: Any = {"color": colour(letter), "linestyle": STYLES[letter], "linewidth": 2.0}
            self.paths_lines += self.world.plot([], [], zorder=4, path_effects=outline, **look)
            self.heads += self.world.plot(
                [], [], "s", color=colour(letter), markeredgecolor="white", markersize=8, zorder=5
            )
            self.loss_lines += self.losses.plot([], [], label=f"{letter} {resolve(letter).name}", **look)
        (self.dot,) = self.world.plot([], [], "o", color="white", markeredgecolor="black", markersize=9, zorder=6)
        (self.loop,) = self.world.plot([], [], color="black", linewidth=1.2, linestyle=":", zorder=4)
        self.losses.set(yscale="log", xlabel="iteration", ylim=(LEAST_LOSS, 1e4), xlim=(0, self.iterations))
        self.losses.set_title("Loss along the paths")
        self.losses.legend(loc="upper right", ncols=2, fontsize=8, framealpha=0.9)
        self.bars = self.circles.barh(range(len(FLOWS)), [0.0] * len(FLOWS), color=[colour(f) for f in FLOWS])
        self.circles.axvline(0, color="0.4", linewidth=0.8)
        self.circles.set(yticks=range(len(FLOWS)), yticklabels=FLOWS, xlim=(-1, 1), ylim=(3.6, -0.6))
        self.circles.set_title("Gain of one round along the dotted loop")
        self.moving = [*self.paths_lines, *self.heads, self.loop, self.dot, *self.loss_lines, *self.bars]

    def show_field(self, flow: str) -> None:
        """Draw where descent along a flow leads: unit arrows, none where its update is 0."""
        self.flow = flow
        update = self.fields[FLOWS.index(flow)]
        size = np.hypot(*update.T)
        along = -update / np.where(size > 0.0, size, 1.0)[:, None]
        self.arrows.set_UVC(*along.T)
        self.arrows.set_color(colour(flow))
        self.refresh()

    def choose(self, optimiser: str) -> None:
        """Follow the updates with another optimiser."""
        self.optimiser = optimiser
        self.begin(self.start)

    def set_factor(self, power: float) -> None:
        """Multiply the optimiser's rate by a power of ten."""
        self.factor = 10.0**power
        self.begin(self.start)

    def replay(self) -> None:
        """Show the paths once more."""
        self.shown = 0.0

    def begin(self, start: np.ndarray) -> None:
        """Optimise from a start, with all flows."""
        self.start, self.shown = np.asarray(start, float), 0.0
        numbers = landscape_numbers.Settings(
            starts=[Start(*map(float, self.start))],
            optimiser=self.optimiser,  # type: ignore[arg-type]
            rate=self.rates[self.optimiser] * self.factor,
            iterations=self.iterations,
        )
        found = [find_paths(self.landscape, numbers.starts, f, numbers.rule, self.iterations) for f in FLOWS]
        self.paths = np.stack(found)[:, :, 0]
        self.path_losses = np.maximum(losses_at(self.landscape, self.paths), LEAST_LOSS)
        self.gains = self.circulation(self.start)

    def circulation(self, centre: np.ndarray) -> np.ndarray:
        """∮ u · dθ / ∮ |u| |dθ| of every flow's update around a point, counter-clockwise, shape (4,).

        For a gradient field it is 0. Where it is not, one can go round and find it downhill all the way.
        """
        angle = 2.0 * np.pi * np.arange(CORNERS) / CORNERS
        around = LOOP * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        updates = self.landscape.evaluate(centre + around, FLOWS).updates
        tangents = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
        total = np.hypot(updates[..., 0], updates[..., 1]).sum(axis=1)
        return -(updates * tangents).sum(axis=(1, 2)) / np.maximum(total, 1e-300)

    def advance(self, dt: float) -> None:
        """Go on along the paths."""
        self.shown = min(self.shown + PACE * dt, float(self.iterations))

    def draw(self) -> None:
        """Draw the paths as far as they have been shown."""
        count = int(self.shown) + 1
        for i, (line, head, losses) in enumerate(zip(self.paths_lines, self.heads, self.loss_lines, strict=True)):
            path = self.paths[i, :count]
            line.set_data(*path.T)
            head.set_data(*path[np.isfinite(path).all(axis=1)][-1:].T)
            losses.set_data(np.arange(count), self.path_losses[i, :count])
            self.bars[i].set_width(self.gains[i])
        self.dot.set_data(*self.start[:, None])
        angle = np.linspace(0.0, 2.0 * np.pi, CORNERS + 1)
        self.loop.set_data(self.start[0] + LOOP * np.cos(angle), self.start[1] + LOOP * np.sin(angle))

    def press(self, event: Any) -> None:
        """Start where it was clicked."""
        if event.inaxes is self.world:
            self.begin(np.array([event.xdata, event.ydata]))

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: another start."""
        return [(3.5, lambda: self.begin(np.array([0.75, -3.25])))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("plane", __doc__, PlaneDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
