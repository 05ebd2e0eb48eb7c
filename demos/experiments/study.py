"""Studies of short trainings: panels with a line per method, some seeds each, as files, a table and a figure."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from controllers.checkpoint import atomic_write
from demos.experiments.figures import finish, make_bins, thin
from demos.experiments.results import LAST, quartile_curves, quartiles
from demos.experiments.tables import number, table
from warp_phys import Diverged

WINDOW = 20
"""A run has reached a loss when the median of so many epochs is below it: one epoch's loss is a matter of luck."""


class Point(NamedTuple):
    """One epoch of a run."""

    test_loss: float
    share: float = math.nan
    """Share of the test states from which the task was done, where the study counts them."""
    seconds: float = 0.0
    """Time spent in training so far [s]."""


class Trial(NamedTuple):
    """One run."""

    panel: str
    line: str
    seed: int
    epochs: int
    train: Callable[[Callable[[], bool], Callable[[Point], None]], bool]
    """`train(stop, progress)` calls `progress` after every epoch; returns False where `stop` has ended it before its
    last."""

    @property
    def name(self) -> str:
        """Readable and unique; the path of its file but for the ending."""
        return f"{self.panel}/{self.line}/seed-{self.seed}"


class Panel(NamedTuple):
    """A task, or a kind of network at it."""

    title: str
    lines: tuple[str, ...]
    """Names of the methods."""
    epochs: int
    reached: float
    """The test loss to which runs are timed."""
    failed: float
    """A run that ends above this has failed."""


class Line(NamedTuple):
    """How a method is called and drawn."""

    title: str
    colour: str
    dashes: Any


@dataclass(frozen=True)
class Study:
    """What is compared."""

    title: str
    panels: Mapping[str, Panel]
    """Panels by the names of their folders."""
    lines: Mapping[str, Line]
    """Methods by the names of their folders."""
    make: Callable[[str, str, int, int], Trial]
    """Makes a trial of panel, line, epochs and seed."""
    share: str = ""
    """What the share of test states counts, if it does."""

    def plan(self, seeds: Sequence[int], panels: Sequence[str] = (), epochs: int = 0) -> list[Trial]:
        """All trials of a choice, each seed done before the next.

        Args:
            seeds: Seeds.
            panels: Names of panels; all of them if empty.
            epochs: Epochs of every run; those of the panel if 0.

        Raises:
            ValueError: There is no such panel.
        """
        for name in panels:
            if name not in self.panels:
                raise ValueError(f"panel must be one of {', '.join(self.panels)}, got {name!r}")
        return [
            self.make(name, line, epochs or self.panels[name].epochs, seed)
            for seed in seeds
            for name in panels or self.panels
            for line in self.panels[name].lines
        ]


@dataclass(frozen=True)
class Outcome:
    """A run that is done."""

    trial: Trial
    points: tuple[Point, ...]
    diverged: bool = field(default=False)
    """Whether it left the finite numbers: then its loss is infinite from there on."""

    @property
    def losses(self) -> np.ndarray:
        """Test losses of all epochs, shape (epochs,)."""
        losses = np.full(self.trial.epochs, np.inf)
        losses[: len(self.points)] = [point.test_loss for point in self.points]
        return losses

    @property
    def final(self) -> float:
        """Median test loss of the last tenth of the epochs; infinite for a run that diverged."""
        return quartiles(self.losses[-max(1, self.trial.epochs // LAST) :])[1]

    @property
    def share(self) -> float:
        """Median share of the last tenth of the epochs; 0 for a run that diverged."""
        shares = [point.share for point in self.points[-max(1, self.trial.epochs // LAST) :]]
        return 0.0 if self.diverged else float(np.median(shares))

    def reached(self, loss: float) -> float:
        """Epoch at which the median of the last `WINDOW` epochs is first below a loss; infinite if never."""
        losses = self.losses
        for epoch in range(WINDOW, len(losses) + 1):
            if quartiles(losses[epoch - WINDOW : epoch])[1] < loss:
                return epoch
        return math.inf


COLUMNS = ("epoch", *Point._fields)


def path_of(out: Path, trial: Trial) -> Path:
    """File of a run."""
    return out / f"{trial.name}.csv"


def perform(trial: Trial, out: Path, stop: Callable[[], bool]) -> bool:
    """Train and write the run's file; returns whether it was done. A run that was stopped leaves nothing."""
    points: list[Point] = []
    diverged = False
    try:
        if not trial.train(stop, points.append):
            return False
    except Diverged:
        diverged = True
    lines = [",".join(COLUMNS)]
    lines += [",".join(map(repr, (epoch, *point))) for epoch, point in enumerate(points, 1)]
    lines += ["diverged"] if diverged else []
    with atomic_write(path_of(out, trial)) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return True


def load(trial: Trial, out: Path) -> Outcome | None:
    """Read a run, None where it is not done.

    Raises:
        ValueError: Its file holds another number of epochs, or something else.
    """
    path = path_of(out, trial)
    if not path.exists():
        return None
    header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    diverged = lines[-1:] == ["diverged"]
    try:
        if header != ",".join(COLUMNS):
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        points = tuple(Point(*map(float, line.split(",")[1:])) for line in lines[: len(lines) - diverged])
    except (ValueError, TypeError) as error:
        raise ValueError(f"out: {path} is not what this program wrote: {error}") from None
    if len(points) != trial.epochs and not (diverged and len(points) < trial.epochs):
        raise ValueError(
            f"out: {path} holds {len(points)} epochs, the run shall have {trial.epochs}; choose another out"
        )
    return Outcome(trial, points, diverged)


def load_all(study: Study, out: Path, epochs: int = 0) -> list[Outcome]:
    """Read all runs of a study that are done, whichever call they are of, in the order of panels, lines and seeds.

    Raises:
        ValueError: As `load`, where they shall have `epochs`, or those of their panels if 0.
    """
    found = []
    for name, panel in study.panels.items():
        for line in panel.lines:
            seeds = sorted(int(path.stem.partition("-")[2]) for path in out.glob(f"{name}/{line}/seed-*.csv"))
            found += [load(study.make(name, line, epochs or panel.epochs, seed), out) for seed in seeds]
    return [outcome for outcome in found if outcome is not None]


def groups(study: Study, outcomes: Sequence[Outcome]) -> Iterator[tuple[str, dict[str, list[Outcome]]]]:
    """The runs of each panel, by line, both in the order of the study."""
    for name, panel in study.panels.items():
        own = {line: [o for o in outcomes if (o.trial.panel, o.trial.line) == (name, line)] for line in panel.lines}
        if any(own.values()):
            yield name, {line: runs for line, runs in own.items() if runs}


def summarise(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A table per panel in Markdown."""
    parts = [
        f"# {study.title}\n\nThe final test loss of a run is the median of its last tenth of epochs; it has reached a "
        f"loss when the median\nof {WINDOW} epochs is below it.\n"
    ]
    for name, lines in groups(study, outcomes):
        panel = study.panels[name]
        seeds = sorted({outcome.trial.seed for runs in lines.values() for outcome in runs})
        epochs = max(outcome.trial.epochs for runs in lines.values() for outcome in runs)
        header = ["method", *map(str, seeds), "median", f"above {panel.failed:g}", f"epoch below {panel.reached:g}"]
        rows = []
        for line, runs in lines.items():
            finals = {run.trial.seed: run.final for run in runs}
            failed = sum(not final <= panel.failed for final in finals.values())
            cells = [number(finals[seed]) if seed in finals else "–" for seed in seeds]
            reached = quartiles([run.reached(panel.reached) for run in runs])[1]
            row = [study.lines[line].title, *cells, number(quartiles(finals.values())[1])]
            row += [f"{failed} of {len(runs)}", f"{reached:g}" if math.isfinite(reached) else "–"]
            rows.append(row + ([f"{quartiles([run.share for run in runs])[1]:.0%}"] if study.share else []))
        header += [study.share] if study.share else []
        parts.append("\n".join([f"## {panel.title}, {epochs} epochs", "", *table(header, rows), ""]))
    return "\n".join(parts)


def write_results(study: Study, outcomes: Sequence[Outcome], out: Path, name: str) -> list[Path]:
    """Write all epochs, a line per run, the tables, and the figure; returns their paths."""
    paths = [out / f"{name}{ending}" for ending in ("-epochs.csv", "-runs.csv", ".md", ".png")]
    with atomic_write(paths[0]) as file:
        file.write((",".join(["panel", "method", "seed", *COLUMNS]) + "\n").encode())
        for outcome in outcomes:
            own = ",".join(map(str, outcome.trial[:3]))
            for epoch, point in enumerate(outcome.points, 1):
                file.write((f"{own}," + ",".join(map(repr, (epoch, *point))) + "\n").encode())
    columns = ["panel", "method", "seed", "epochs", "diverged", "final_test_loss", "epoch_reached", "final_share"]
    rows: list[list[Any]] = []
    for outcome in outcomes:
        numbers = [number(value, 6) for value in (outcome.final, outcome.reached(_panel(study, outcome).reached))]
        share = number(outcome.share, 6) if study.share else ""
        seconds = number(outcome.points[-1].seconds, 6) if outcome.points else ""
        rows.append([*outcome.trial[:3], len(outcome.points), int(outcome.diverged), *numbers, share, seconds])
    with atomic_write(paths[1]) as file:
        file.write("\n".join(",".join(map(str, row)) for row in ([*columns, "seconds"], *rows)).encode() + b"\n")
    with atomic_write(paths[2]) as file:
        file.write(summarise(study, outcomes).encode())
    with atomic_write(paths[3]) as file:
        draw(study, outcomes).savefig(file, format="png", dpi=200)
    return paths


def _panel(study: Study, outcome: Outcome) -> Panel:
    return study.panels[outcome.trial.panel]


def draw(study: Study, outcomes: Sequence[Outcome]) -> Figure:
    """Draw the test loss against epochs: a panel each, per line a median and a band between the quartiles."""
    found = list(groups(study, outcomes))
    columns = min(2, max(1, len(found)))
    rows = max(1, -(-len(found) // columns))
    used = [line for line in study.lines if any(line in lines for _, lines in found)]
    width = 4.4 * columns if columns > 1 else 5.6
    ncols = min(len(used), int(width / 2.6)) or 1
    height = 0.6 + 2.8 * rows + 0.2 * -(-len(used) // ncols)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, lines) in zip(panels, found, strict=False):
        for line, runs in lines.items():
            points, bins = make_bins(max(run.trial.epochs for run in runs))
            curves = quartile_curves(np.stack([thin(run.losses, bins) for run in runs]))
            lower, median, upper = np.minimum(curves, 1e30)  # what is infinite is beyond the upper edge
            _, colour, dashes = study.lines[line]
            axes.fill_between(points, lower, upper, color=colour, alpha=0.14, lw=0)
            axes.plot(points, median, color=colour, linestyle=dashes, linewidth=1.6)
        finish(axes, study.panels[name].title)
        axes.set(xlabel="epoch", ylabel="test loss")
    for axes in panels[len(found) :]:
        axes.remove()
    handles = [
        Line2D([], [], label=title, color=colour, linestyle=dashes, linewidth=1.6)
        for title, colour, dashes in (study.lines[line] for line in used)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3, fontsize=9)
    counts = [len(runs) for _, lines in found for runs in lines.values()] or [0]
    figure.suptitle(f"{study.title}: median and quartiles of {_span(counts)} seeds", fontsize=10)
    return figure


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
