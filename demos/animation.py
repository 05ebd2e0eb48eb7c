"""Small animations of trajectories, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    pictures = draw_frames(system, scenes, frames)
    # One palette for all, from the first picture and the last: no flicker, and what stands still costs no bytes.
    ends = Image.fromarray(np.concatenate([np.asarray(pictures[0]), np.asarray(pictures[-1])]))
    palette = ends.quantize(colors=48, method=Image.Quantize.MAXCOVERAGE)
    flat = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [40] * (frames - 1) + [40 + round(1000 * hold)]
    with atomic_write(path) as file:
        flat[0].save(file, "GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0, optimize=False)


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
