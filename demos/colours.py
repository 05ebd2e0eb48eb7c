"""One colour per flow in every picture, from the Okabe–Ito palette, which colour-blind people can tell apart."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from warp_phys.flow import resolve
from warp_phys.systems.drawing import Shape

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


def colour(flow: Any) -> str:
    """Colour of a flow, given by name, by letter or as a value; black for a flow without a name of its own.

    >>> colour("C")
    '#009E73'
    """
    return COLOURS.get(resolve(flow).name, "#000000")


def flow_names(letters: Iterable[str]) -> list[str]:
    """Names of flows as choices show them; one without a letter has its name alone.

    >>> flow_names(["R", "C", "either"])
    ['R regular', 'C combined', 'either']
    """
    return [f"{letter} {resolve(letter).name}" if len(letter) == 1 else letter for letter in letters]


def letter_of(name: str) -> str:
    """The letter of a flow of which a choice shows this name."""
    return name.partition(" ")[0]


def tinted(parts: Mapping[str, Shape], ink: str, names: Collection[str]) -> dict[str, Shape]:
    """The parts of a picture, those of these names in another colour."""
    ink_for: dict[str, Any] = {name: {"colour": ink} for name in names}
    return {name: replace(part, **ink_for.get(name, {})) for name, part in parts.items()}
