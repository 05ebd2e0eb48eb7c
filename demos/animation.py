"""Small animations of trajectories, side by side."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from controllers.checkpoint import atomic_write


class Scene(NamedTuple):
    """One trajectory to show."""

    title: str
    colour: str
    states: np.ndarray
    """States, shape (steps + 1, D)."""
    controls: np.ndarray
    """Controls, shape (steps, K)."""


def write_gif(path: str | Path, system: Any, scenes: Sequence[Scene], frames: int, hold: float = 1.5) -> None:
    """Write trajectories of one system side by side as a GIF that repeats.

    Args:
        path: Where to.
        system: Draws its states (`sketch`).
        scenes: Trajectories of equal length, left to right.
        frames: Pictures, spread evenly over the trajectory; 25 are shown per second.
        hold: Seconds for which the last one stays.
    """
    write_pictures(path, draw_frames(system, scenes, frames), [40] * (frames - 1) + [40 + round(1000 * hold)])


def write_pictures(
    path: str | Path,
    pictures: Sequence[Image.Image],
    durations: Sequence[int],
    colours: int = 48,
    keep: Sequence[str] = (),
) -> None:
    """Write pictures as a GIF that repeats.

    Args:
        path: Where to.
        pictures: At least one, of equal size.
        durations: Milliseconds for which each is shown.
        colours: Colours of the palette.
        keep: Colours that shall be in it, however few pixels have them.
    """
    # One palette for all, from the first picture and the last: no flicker, and what stands still costs no bytes.
    ends = Image.fromarray(np.concatenate([np.asarray(pictures[0]), np.asarray(pictures[-1])]))
    found = ends.quantize(colors=colours - len(keep), method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    kept = [round(255.0 * part) for name in keep for part in to_rgb(name)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(found[: 3 * (colours - len(keep))] + kept)
    flat = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    with atomic_write(path) as file:
        flat[0].save(
            file, "GIF", save_all=True, append_images=flat[1:], duration=list(durations), loop=0, optimize=False
        )


def has_display() -> bool:
    """Whether a window could open here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def draw_frames(system: Any, scenes: Sequence[Scene], frames: int) -> list[Image.Image]:
    """Draw the trajectories at `frames` times."""
    figure = Figure(figsize=(3.5 * len(scenes), 3.6), dpi=80)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.2, wspace=0.06)
    canvas = FigureCanvasAgg(figure)
    sketches = []
    for axes, scene in zip(np.atleast_1d(figure.subplots(1, len(scenes))), scenes, strict=True):
        sketches.append(system.sketch(axes))
        axes.set_title(scene.title, color=scene.colour, fontweight="bold")
        for spine in axes.spines.values():
            spine.set(color=scene.colour, linewidth=2)
    steps = len(scenes[0].controls)
    pictures = []
    for step in np.linspace(0, steps, frames).round().astype(int):
        for sketch, scene in zip(sketches, scenes, strict=True):
            sketch(scene.states[step], scene.controls[min(step, steps - 1)])
        figure.suptitle(f"t = {step * system.dt:.2f} s", y=0.07, fontsize=10)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return pictures
