"""A demo as pictures for a file, drawn by matplotlib: its picture at the left, its curves at the right."""

import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from demos.frame import Demo, Plot
from warp_phys.systems.drawing import sketch

SIZE, DOTS = (10.0, 5.6), 80
"""Of a picture in inches, and dots per inch."""


class Film:
    """Draws a demo as it is now, as often as it is asked to."""

    def __init__(self, demo: Demo) -> None:
        self.demo, self.build = demo, demo.build
        self.figure = Figure(figsize=SIZE, dpi=DOTS)
        self.canvas = FigureCanvasAgg(self.figure)
        self.lay_out()

    def lay_out(self) -> None:
        """Put the picture and the curves on the empty figure."""
        plots = list(self.demo.plots())
        grid = self.figure.add_gridspec(
            max(1, len(plots)),
            2 if plots else 1,
            width_ratios=(1.9, 1.0) if plots else (1.0,),
            left=0.05,
            right=0.98,
            top=0.84,
            bottom=0.09,
            hspace=0.55,
            wspace=0.16,
        )
        self.world = self.figure.add_subplot(grid[:, 0])
        self.world.set_facecolor("#1A1A1A" if self.demo.dark else "white")
        self.show_world = sketch(self.world, self.demo.picture)
        self.curves = [(plot, *draw_plot(self.figure.add_subplot(grid[i, 1]), plot)) for i, plot in enumerate(plots)]
        self.figure.suptitle("\n".join(textwrap.wrap(self.demo.says, 110)), fontsize=10, y=0.985)

    def show(self) -> Image.Image:
        """Draw the next picture."""
        if self.build != self.demo.build:
            self.build = self.demo.build
            self.figure.clear()
            self.lay_out()
        self.show_world()
        self.world.set_title("\n".join(textwrap.wrap(self.demo.words(), 85)), fontsize=8)
        for plot, axes, lines in self.curves:
            x, curves = plot.read()
            for line, values in zip(lines, curves, strict=True):
                line.set_data(x, np.where(values > 0.0, values, np.nan) if plot.log else values)
            axes.relim()
            axes.autoscale_view(scaley=plot.y_range is None)
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def draw_plot(axes: Any, plot: Plot) -> tuple[Any, list[Any]]:
    """Put empty curves on axes; returns both."""
    lines = [
        axes.plot([], [], color=colour, linewidth=1.5, label=name)[0]
        for name, colour in zip(plot.names, plot.colours, strict=True)
    ]
    axes.set_title(plot.title, fontsize=9)
    axes.set_xlabel(plot.x_label, fontsize=8, labelpad=1)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.0)
    if plot.log:
        axes.set_yscale("log")
    if plot.y_range is not None:
        axes.set_ylim(plot.y_range)
    if len(lines) > 1:
        axes.legend(fontsize=7, loc="best", ncols=2, framealpha=0.8)
    return axes, lines


def play(demo: Demo, seconds: float, rate: float) -> Iterator[None]:
    """Let a demo do what its script says; every step of 1 / `rate` seconds is one picture to be shown."""
    script = list(demo.script())
    for number in range(max(1, round(seconds * rate))):
        while script and script[0][0] <= number / rate:
            script.pop(0)[1]()
        demo.settle(number / rate)
        if not demo.paused:
            demo.advance(1.0 / rate)
        yield
