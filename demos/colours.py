"""One colour per flow in every picture, from the Okabe–Ito palette, which colour-blind people can tell apart."""

from typing import Any

from warp_phys.flow import resolve

COLOURS = {
    "regular": "#D55E00",  # vermillion
    "modified": "#0072B2",  # blue
    "stopped": "#999999",  # grey
    "controller": "#CC79A7",  # reddish purple
    "combined": "#009E73",  # bluish green
    "geometric": "#E69F00",  # orange
    "minmod": "#56B4E9",  # sky blue
    "averaged": "#000000",
    "either": "#882255",  # wine, of Paul Tol's
}

POLES = ("#332288", "#AA4499", "#999933", "#88CCEE")
"""Colours of poles on a cart, in Paul Tol's palette; none of them is that of a flow which is drawn beside them."""


def colour(flow: Any) -> str:
    """Colour of a flow, given by name, by letter or as a value; black for a flow without a name of its own.

    >>> colour("C")
    '#009E73'
    """
    return COLOURS.get(resolve(flow).name, "#000000")
