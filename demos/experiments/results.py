"""What the runs in a folder came to: their records, and the statistics over seeds and clipping modes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from controllers.checkpoint import RECORD
from controllers.record import Record
from demos.experiments.plan import CLIPS, DIVERGED, Run, State, find_runs

LAST = 10
"""The final test loss is the median over one epoch in so many, the last ones: one epoch's loss is a matter of luck."""


@dataclass(frozen=True)
class Result:
    """One run as far as it has come."""

    run: Run
    state: State
    rows: tuple[str, ...]
    """Lines of its record, without the header and without line ends."""
    test_losses: np.ndarray
    """Test loss after each epoch."""

    @property
    def final(self) -> float:
        """Median test loss of the last tenth of the epochs; infinite for a run that diverged."""
        if self.state.word == DIVERGED or not self.rows:
            return math.inf
        median = float(np.median(self.test_losses[-max(1, len(self.rows) // LAST) :]))
        return median if math.isfinite(median) else math.inf

    @property
    def best(self) -> np.ndarray:
        """Lowest test loss so far, after each epoch."""
        return np.fmin.accumulate(self.test_losses)


def load_results(out: str | Path) -> list[Result]:
    """Read all runs of a folder.

    Raises:
        ValueError: A file is not what this program writes.
    """
    return [load_result(run) for run in find_runs(out)]


def load_result(run: Run) -> Result:
    """Read one run."""
    state, path = run.state(), run.folder / RECORD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.splitlines()
    if lines and lines[0] != ",".join(Record._fields):
        raise ValueError(f"out: {path} has other columns than {', '.join(Record._fields)}")
    column, rows = Record._fields.index("test_loss"), [line.split(",") for line in lines[1:]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(Record._fields):
            raise ValueError(
                f"out: {path} is damaged: line {number + 1} has {len(row)} of {len(Record._fields)} numbers"
            )
    if text and not text.endswith("\n"):
        raise ValueError(f"out: {path} is damaged: its last line has no end")
    try:
        losses = np.array([float(row[column]) for row in rows])
    except ValueError as error:
        raise ValueError(f"out: {path} is damaged: {error}") from None
    return Result(run, state, tuple(lines[1:]), losses)


class Group(NamedTuple):
    """Runs that differ in their seeds, and in their clipping where `clip` is "all"."""

    experiment: str
    level: float
    shuffle: bool
    flow: str
    clip: str
    results: tuple[Result, ...]
    """Those that count: finished, or diverged."""
    unfinished: int
    """Number of those that do not count yet."""

    @property
    def diverged(self) -> int:
        """Number of runs that left the finite numbers."""
        return sum(result.state.word == DIVERGED for result in self.results)

    @property
    def finals(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the final test losses."""
        return quartiles([result.final for result in self.results])

    @property
    def best(self) -> float:
        """Median of the lowest test losses."""
        return quartiles([float(result.best[-1]) if result.rows else math.inf for result in self.results])[1]


def group_results(results: Sequence[Result]) -> list[Group]:
    """Groups in the order of the results: each clipping mode, and "all" where there are several."""
    found: dict[tuple[str, float, bool, str], list[Result]] = {}
    for result in results:
        run = result.run
        found.setdefault((run.experiment, run.level, run.settings.shuffle, run.settings.flow), []).append(result)
    groups = []
    for key, members in found.items():
        present = {member.run.settings.clip for member in members}
        clips = [clip for clip in CLIPS if clip in present]
        for clip in [*clips, "all"] if len(clips) > 1 else clips:
            own = [member for member in members if clip in (member.run.settings.clip, "all")]
            counted = tuple(member for member in own if member.state.counts)
            groups.append(Group(*key, clip, counted, len(own) - len(counted)))
    return groups


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated linearly; infinity is a value like any other.

    >>> quartiles([1.0, 2.0, 3.0, math.inf])
    (1.75, 2.5, inf)
    >>> quartiles([])
    (nan, nan, nan)
    """
    lower, median, upper = quartile_curves(np.array(list(values), dtype=float)[:, None])[:, 0]
    return float(lower), float(median), float(upper)


def quartile_curves(curves: np.ndarray) -> np.ndarray:
    """Quartiles over the rows of `curves`, shape (runs, points), as three rows.

    nan counts as infinity. numpy's own interpolation would make nan of two infinite neighbours.
    """
    count = len(curves)
    if not count:
        return np.full((3, *curves.shape[1:]), np.nan)
    ordered = np.sort(np.where(np.isnan(curves), np.inf, curves), axis=0)
    rows = []
    for share in (0.25, 0.5, 0.75):
        place = share * (count - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        part = place - math.floor(place)
        between = np.isfinite(above) & (part > 0)
        gap = np.where(between, above, 0.0) - np.where(between, below, 0.0)
        rows.append(np.where(between, below + part * gap, above if part > 0 else below))
    return np.stack(rows)
