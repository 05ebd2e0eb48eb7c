"""Demos on a figure without a window, and a mouse for them."""

from contextlib import contextmanager

import numpy as np
from matplotlib.backend_bases import MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from demos.frame import Stage


@contextmanager
def staged(kind, settings):
    """A demo on its stage, after its first picture."""
    figure = Figure(figsize=kind.size, dpi=80)
    FigureCanvasAgg(figure)
    demo = kind(figure, settings)
    try:
        stage = Stage(demo)
        stage.show(0.0)
        yield demo, stage
    finally:
        demo.close()


def mouse(demo, name, axes, x, y):
    """Send a mouse event at a place in the coordinates of some axes, through the canvas's callbacks."""
    place = axes.transData.transform((x, y))
    button = None if name == "motion_notify_event" else 1
    canvas = demo.figure.canvas
    canvas.callbacks.process(name, MouseEvent(name, canvas, *place, button))


def click(demo, axes, x, y):
    """Press and release the mouse."""
    mouse(demo, "button_press_event", axes, x, y)
    mouse(demo, "button_release_event", axes, x, y)


def press_button(demo, label):
    """Click in the middle of the button with this label."""
    (axes,) = [axes for axes in demo.figure.axes if any(text.get_text() == label for text in axes.texts)]
    click(demo, axes, 0.5, 0.5)


def choose(demo, title, number):
    """Click the entry of this number in the choice under this title."""
    (widget,) = [widget for widget in demo.widgets if widget.ax.get_title(loc="left") == title]
    click(demo, widget.ax, *widget.ax.transData.inverted().transform(place_of(widget, number)))


def place_of(widget, number):
    """Where an entry's label is, in pixels."""
    box = widget.labels[number].get_window_extent()
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def play(stage, seconds, dt=0.04):
    """Let time pass as fast as it can be computed; only the last picture is drawn."""
    for _ in range(round(seconds / dt)):
        stage.demo.advance(dt)
    stage.show(0.0)


def pixels(stage):
    """The picture, (height, width, 3)."""
    return np.asarray(stage.canvas.buffer_rgba())[..., :3].astype(int)
