"""Buttons, choices and sliders in the style of the demos."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.widgets import Button, RadioButtons, Slider

Box = tuple[float, float, float, float]
"""Left, bottom, width and height in parts of the figure."""


def button(figure: Figure, box: Box, label: str, pressed: Callable[[], Any]) -> Button:
    """Put a button on a figure; keep what is returned, or it falls silent."""
    made = Button(figure.add_axes(box), label, color="0.93", hovercolor="0.85", useblit=False)
    made.label.set_fontsize(9)
    made.on_clicked(lambda _event: pressed())
    return made


def choice(
    figure: Figure,
    box: Box,
    title: str,
    labels: Sequence[str],
    active: int,
    chosen: Callable[[int], Any],
    colours: Sequence[str] | None = None,
) -> RadioButtons:
    """Put a choice of one among several on a figure; `chosen` is told the number. Keep what is returned."""
    axes = figure.add_axes(box)
    axes.set_title(title, fontsize=9, loc="left", pad=3)
    axes.spines[:].set_color("0.8")
    inks = list(colours or ["0.15"] * len(labels))
    # The stage keeps the background itself; widgets that did so too would be wiped away.
    made = RadioButtons(
        axes,
        labels,
        active=active,
        useblit=False,
        label_props={"color": inks, "fontsize": [9] * len(labels)},
        radio_props={"edgecolor": inks, "facecolor": inks, "s": [36] * len(labels)},
    )
    made.on_clicked(lambda label: chosen(list(labels).index(str(label))))
    return made


def slider(
    figure: Figure,
    box: Box,
    label: str,
    limits: tuple[float, float],
    value: float,
    moved: Callable[[float], Any],
    form: str = "%.2g",
    step: float | None = None,
) -> Slider:
    """Put a slider on a figure. Keep what is returned."""
    made = Slider(figure.add_axes(box), label, *limits, valinit=value, valfmt=form, valstep=step, color="0.6")
    for text in (made.label, made.valtext):
        text.set_fontsize(9)
    made.on_changed(moved)
    return made
