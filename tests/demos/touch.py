"""Demos without a front end, and somebody who touches them."""

from contextlib import contextmanager

import numpy as np

from demos.frame import ANYWHERE, Ray


@contextmanager
def made(kind, settings):
    """A demo, closed in the end."""
    demo = kind(settings)
    try:
        yield demo
    finally:
        demo.close()


def play(demo, seconds, dt=0.04):
    """Let time pass as fast as it can be computed."""
    for _ in range(round(seconds / dt)):
        demo.advance(dt)


def control(demo, label):
    """The control with this label."""
    (found,) = [entry for entry in demo.controls() if entry.label == label]
    return found


def press(demo, label):
    """Press a button."""
    control(demo, label).press()


def choose(demo, label, option):
    """Choose an option, which then is the one that is read."""
    choice = control(demo, label)
    assert option in choice.options
    choice.choose(option)
    assert choice.read() == option


def from_front(x, z):
    """A look along the y axis at a place."""
    return Ray(np.array([x, -5.0, z]), np.array([0.0, 1.0, 0.0]))


def from_above(x, y):
    """A look down at a place."""
    return Ray(np.array([x, y, 9.0]), np.array([0.0, 0.0, -1.0]))


def drag(demo, part, ray):
    """Hold a part of the picture where the ray leads."""
    assert part in demo.picture().parts
    demo.grips()[part].drag(ray)


def release(demo, part):
    """Let a part go."""
    demo.grips()[part].release()


def click(demo, part, ray):
    """Click a part of the picture, or anywhere."""
    assert part == ANYWHERE or part in demo.picture().parts
    demo.grips()[part].click(ray)


def curves(demo, title):
    """What a plot shows: names, x, curves."""
    (plot,) = [entry for entry in demo.plots() if entry.title == title]
    assert len(plot.names) == len(plot.colours)
    x, values = plot.read()
    assert values.shape == (len(plot.names), len(x))
    return list(plot.names), x, values
