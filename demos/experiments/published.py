"""The published experiments with their settings, and their levels and seeds as a command line names them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from controllers.settings import Training


@dataclass(frozen=True)
class Experiment:
    """A published experiment: a system, its settings, and the number that makes it harder.

    >>> EXPERIMENTS["cartpole"].training(4).parameters["poles"]
    4
    """

    system: str
    """Name of the physical system."""
    title: str
    """What the controller has to do."""
    varied: str
    """Setting, or parameter of the system, that the levels change."""
    levels: tuple[float, ...]
    """Published values of it, the easiest first."""
    label: str
    """The level in folder names and on the command line, as in "poles-4"."""
    caption: str
    """The level in words, a format such as "{:g} poles"."""
    loss: str
    """What the loss measures."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Published settings of the training, where they are not its defaults."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Published parameters of the system."""

    def training(self, level: float, **changes: Any) -> Training:
        """The published training at a level, with changes."""
        of_training = any(entry.name == self.varied for entry in fields(Training))
        own, of_system = ({self.varied: level}, {}) if of_training else ({}, {self.varied: level})
        parameters = dict(self.parameters) | of_system
        return Training(**{"system": self.system, **self.settings, **own, "parameters": parameters, **changes})

    def level_of(self, settings: Training) -> float:
        """The level at which `settings` are."""
        return (
            settings.parameters[self.varied] if self.varied in settings.parameters else getattr(settings, self.varied)
        )

    def describe(self, level: float) -> str:
        """The level in words: "1 pole", "control cost 0.1"."""
        text = self.caption.format(level)
        return text.removesuffix("s") if level == 1 else text


EXPERIMENTS: dict[str, Experiment] = {
    "cartpole": Experiment(
        system="cartpole",
        title="Swing-up of a cart with poles",
        varied="poles",
        levels=(1, 2, 3, 4),
        label="poles",
        caption="{:g} poles",
        loss="1 − mean cos θ at the end: 0 all poles upright, 2 all hanging",
        settings={"steps": 100, "when": "final"},
        parameters={"dt": 0.01},
    ),
    "repulsion": Experiment(
        system="repulsion",
        title="Guidance by repulsion",
        varied="control_cost",
        levels=(1.0, 0.1, 0.01, 0.001),
        label="cost",
        caption="control cost {:g}",
        loss="mean squared distance of the evaders' coordinates, plus the control cost",
        settings={"steps": 60, "when": "every"},
        parameters={"drivers": 2, "evaders": 4, "dt": 4.0 / 60.0},
    ),
    "quantum": Experiment(
        system="quantum",
        title="Quantum control",
        varied="target",
        levels=(3, 4, 5),
        label="target",
        caption="target {:g}",
        loss="sum over 128 steps of 1 − |⟨ψ, target⟩|²",
        settings={"steps": 128, "when": "every"},
        parameters={"points": 32, "dt": 1.0 / 16.0},
    ),
}
"""The experiments by name. Source: Schnell & Thuerey, ICLR 2024 (arXiv 2405.02041)."""


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds: a count, or a list with commas.

    Raises:
        ValueError: It is neither.

    >>> parse_seeds("3"), parse_seeds("0,4"), parse_seeds("7,")
    ((0, 1, 2), (0, 4), (7,))
    """
    if not re.fullmatch(r"\d+|(\d+,)+\d*", text):
        raise ValueError(f'seeds must be a count such as 3, or a list such as 0,4 or 7, (with a comma), got "{text}"')
    if "," in text:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part))
    if int(text) < 1:
        raise ValueError(f'seeds must be a count of at least 1, got {text}; the seed 0 alone is "0,"')
    return tuple(range(int(text)))


def parse_levels(experiments: Sequence[str], texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Levels of each experiment: those that the texts name, or all published ones where none is named.

    Raises:
        ValueError: An experiment is unknown; a level is none that was published of one of the experiments.

    >>> parse_levels(["cartpole", "quantum"], ["poles-4"])
    {'cartpole': (4,), 'quantum': (3, 4, 5)}
    """
    for name in experiments:
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    found: dict[str, list[float]] = {name: [] for name in experiments}
    for text in texts:
        name, number = _read_level(experiments, text)
        found[name].append(number)
    return {name: tuple(dict.fromkeys(levels)) or EXPERIMENTS[name].levels for name, levels in found.items()}


def experiment_of(level: str) -> str | None:
    """The experiment to which a level such as "poles-4" belongs, None for a bare number."""
    labels = {experiment.label: name for name, experiment in EXPERIMENTS.items()}
    return labels.get(level.partition("-")[0])


def _read_level(experiments: Sequence[str], text: str) -> tuple[str, float]:
    """The experiment and the number of a level such as "poles-4", or "4" where there is one experiment only."""
    number = text.partition("-")[2]
    name = experiment_of(text)
    if name is None and len(experiments) == 1:
        name, number = experiments[0], text
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name is None or name not in experiments or not math.isfinite(value):
        examples = ", ".join(f"{EXPERIMENTS[name].label}-{EXPERIMENTS[name].levels[-1]:g}" for name in experiments)
        raise ValueError(f"level must be such as {examples}, got {text!r}")
    experiment = EXPERIMENTS[name]
    if value not in experiment.levels:
        published = ", ".join(f"{experiment.label}-{level:g}" for level in experiment.levels)
        raise ValueError(f"level must be a published one, {published}, got {text!r}")
    return name, experiment.levels[experiment.levels.index(value)]
