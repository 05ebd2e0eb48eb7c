"""The picture of the plane of two parameters: loss and paths, streamlines of the updates, their rotation."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from demos.colours import colour
from demos.landscape_numbers import FLOWS, Found, Settings
from warp_phys.flow import resolve

STYLES = {"R": "-", "M": (0, (4, 1.5)), "S": (0, (1, 1)), "C": "-"}
STREAM_POINTS = 121
"""Points along each axis from which streamlines are interpolated."""
LEAST_LOSS = 1e-7
"""Where the drawing of losses ends."""
SWATCH_ROWS = 50
"""Rows of pixels that each colour of a flow adds to what the palette is made from."""


def draw(figure: Figure, settings: Settings, found: Found) -> None:
    """Draw everything on an empty figure."""
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 11, "axes.linewidth": 0.7}):
        rows: Any = figure.subfigures(3, 1, height_ratios=[1.42, 1.0, 1.0])
        above, middle, below = rows
        middle.suptitle(
            "Where descent leads. Minima black; vermillion: it leads away; light blue, and grey areas: the update is 0",
            fontsize=11,
        )
        below.suptitle(
            "Rotation: antisymmetric part of the update's Jacobian, relative to the whole (0: a gradient field)",
            fontsize=11,
        )
        left, right = above.subplots(1, 2, gridspec_kw={"width_ratios": [1.0, 0.95]})
        draw_loss(above, left, settings, found)
        draw_descent(right, settings, found)
        draw_streamlines(middle, middle.subplots(1, len(FLOWS), sharey=True), settings, found)
        draw_rotation(below, below.subplots(1, len(FLOWS), sharey=True), settings, found)


def draw_loss(figure: Any, axes: Axes, settings: Settings, found: Found) -> None:
    """Draw the loss, its minima and the paths on it."""
    norm = LogNorm(1e-3, 1e6)
    loss, colours = np.maximum(found.loss, 1e-300), pale("YlGnBu", 0.75)
    image = axes.pcolormesh(found.axis, found.axis, loss, norm=norm, cmap=colours, rasterized=True)
    figure.colorbar(image, ax=axes, extend="both", pad=0.02)
    draw_minima(axes, found.minima)
    for i, letter in enumerate(FLOWS):
        for path in np.moveaxis(found.paths[i], 1, 0):
            (line,) = axes.plot(*path.T, color=colour(letter), linestyle=STYLES[letter], linewidth=1.8, zorder=4)
            line.set_path_effects([Stroke(linewidth=3.4, foreground="white"), Normal()])
            last = path[np.isfinite(path).all(axis=1)][-1:]
            axes.plot(*last.T, "s", color=colour(letter), markeredgecolor="white", markersize=6.5, zorder=5)
    for number, start in enumerate(settings.starts, 1):
        axes.plot(*start, "o", color="white", markeredgecolor="black", markersize=13, zorder=6)
        axes.annotate(str(number), start, ha="center", va="center_baseline", fontsize=9.5, zorder=7)
    frame(axes, settings, "Loss, its minima (black) and paths from numbered starts")
    axes.set_ylabel("θ2", labelpad=-6)


def draw_descent(axes: Axes, settings: Settings, found: Found) -> None:
    """Draw the loss along the paths."""
    for i, letter in enumerate(FLOWS):
        losses = np.maximum(found.path_losses[i], LEAST_LOSS)
        for number, line in enumerate(losses.T, 1):
            label = f"{letter} {resolve(letter).name}" if number == 1 else None
            axes.plot(line, color=colour(letter), linestyle=STYLES[letter], linewidth=1.6, label=label)
    rule = "Adam" if settings.optimiser == "adam" else "descent"
    axes.set(yscale="log", xlabel="iteration", ylim=(LEAST_LOSS, None), xlim=(0, settings.iterations))
    axes.set_title(f"Loss along the paths: {rule}, rate {settings.rate:g}")
    axes.legend(loc="lower left", fontsize=10, framealpha=0.95)


def draw_streamlines(figure: Any, row: Sequence[Axes], settings: Settings, found: Found) -> None:
    """Draw where descent along each update leads, coloured by the update's size."""
    norm = LogNorm(1e-2, 1e6)
    colours = pale("viridis_r", 0.9, start=0.12)
    every = max(1, round(len(found.axis) / STREAM_POINTS))
    axis = found.axis[::every]
    for i, (axes, letter) in enumerate(zip(row, FLOWS, strict=True)):
        update = found.updates[i, ::every, ::every]
        size = np.hypot(*np.moveaxis(update, -1, 0))
        still = ~(np.isfinite(size) & (size > 0.0))
        # unit vectors: between points that differ by decades the larger one would decide alone
        along = np.ma.masked_array(-update / np.where(still, 1.0, size)[..., None], np.stack([still, still], axis=-1))
        if still.any():
            axes.contourf(axis, axis, still.astype(float), [0.5, 1.5], colors="0.88")
        axes.streamplot(
            axis,
            axis,
            along[..., 0],
            along[..., 1],
            color=np.where(still, norm.vmin, size),
            norm=norm,
            cmap=colours,
            density=1.1,
            linewidth=0.9,
            arrowsize=0.8,
        )
        draw_minima(axes, found.minima, found.tendencies[i])
        frame(axes, settings, f"{letter} {resolve(letter).name}")
        axes.title.set_color(colour(letter) if letter != "S" else "0.4")
        axes.title.set_fontweight("bold")
    figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=row, extend="both", label="|update|", pad=0.01)
    row[0].set_ylabel("θ2", labelpad=-6)


def draw_rotation(figure: Any, row: Sequence[Axes], settings: Settings, found: Found) -> None:
    """Draw the antisymmetric part of each update's Jacobian, relative to the whole."""
    colours: dict[str, Any] = {"cmap": "PuOr", "vmin": -1.0, "vmax": 1.0, "rasterized": True}
    for i, (axes, letter) in enumerate(zip(row, FLOWS, strict=True)):
        axes.set_facecolor("0.8")
        image = axes.pcolormesh(found.axis, found.axis, found.share[i], **colours)
        draw_minima(axes, found.minima)
        frame(axes, settings, f"{letter}, median {np.nanmedian(np.abs(found.share[i])):.1g}")
    figure.colorbar(image, ax=row, pad=0.01)
    row[0].set_ylabel("θ2", labelpad=-6)


def draw_minima(axes: Axes, minima: np.ndarray, tendencies: np.ndarray | None = None) -> None:
    """Draw the minima in black, those that repel in vermillion, those that are ignored in sky blue, on a white seam."""
    colours = (
        "black"
        if tendencies is None
        else np.select([tendencies < 0.0, tendencies == 0.0], ["#D55E00", "#56B4E9"], "black")
    )
    for line_colours, width in (("white", 4.0), (colours, 2.0)):
        lines = LineCollection(list(minima), colors=line_colours, linewidths=width, capstyle="round", zorder=3)
        axes.add_collection(lines, autolim=False)


def frame(axes: Axes, settings: Settings, title: str) -> None:
    """Give a plane of θ its limits, labels and title."""
    limits = (-settings.reach, settings.reach)
    axes.set(xlim=limits, ylim=limits, xlabel="θ1", title=title, aspect="equal")


def save(figure: Figure, file: Any, kind: str) -> None:
    """Write a figure; a .png in 256 colours, which look the same and take half the bytes."""
    if kind != "png":
        figure.savefig(file, format=kind)
        return
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    # the palette is that of the picture and of areas of the lines' own colours, which else are few among many
    own = np.array([to_rgb(colour(letter)) for letter in FLOWS])
    swatches = np.repeat((255.0 * own).round().astype(np.uint8), SWATCH_ROWS, axis=0)
    swatches = np.broadcast_to(swatches[:, None], (len(swatches), pixels.shape[1], 3))
    both = Image.fromarray(np.concatenate([pixels, swatches]))
    few = both.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    few.crop((0, 0, pixels.shape[1], pixels.shape[0])).save(file, "PNG", optimize=True)


def pale(name: str, end: float, start: float = 0.0) -> ListedColormap:
    """Return the part of a colour map between two of its places."""
    return ListedColormap(mpl.colormaps[name](np.linspace(start, end, 256)))
