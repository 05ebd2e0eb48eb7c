"""Studies of short trainings: panels with a line per method, some seeds each, as files, a table and a figure."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from controllers.checkpoint import atomic_write
from demos.experiments.figures import finish, make_bins, thin
from demos.experiments.results import LAST, quartile_curves, quartiles
from demos.experiments.tables import number, table
from warp_phys import Diverged


class Point(NamedTuple):
    """One epoch of a run."""

    test_loss: float
    share: float = math.nan
    """Share of the test states from which the task was done, where the study counts them."""
    seconds: float = 0.0
    """Time spent in training so far [s]."""
    env_steps: float = math.nan
    """Time steps of environments so far, where the study counts them."""
    between: float = 0.0
    """1 for a test at a round number of these steps, in between, which is the end of no epoch."""


class Trial(NamedTuple):
    """One run."""

    panel: str
    line: str
    seed: int
    epochs: int
    train: Callable[[Callable[[], bool], Callable[[Point], None]], bool]
    """`train(stop, progress)` calls `progress` after every epoch; returns False where `stop` has ended it before its
    last."""
    needs: tuple[str, str] | None = None
    """An optional library that it needs, and the extra of this project that brings it."""

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
    unit: Literal["epoch", "second"] = "epoch"
    """What the points of a run are apart: in place of epochs there may be seconds of processor time. Methods differ in
    what they get done in one, so such runs are also compared at equal steps of the environments."""
    at_steps: tuple[int, ...] = ()
    """Steps of the environments at which the tables have losses."""
    window: int = 20
    """A run has reached a loss when the median of so many epochs is below it: one epoch's loss is a matter of luck."""
    note: "Callable[[Sequence[Outcome], Path], str] | None" = None
    """More of the summary, of all runs; what takes long is kept in the folder."""

    def plan(
        self, seeds: Sequence[int], panels: Sequence[str] = (), epochs: int = 0, lines: Sequence[str] = ()
    ) -> list[Trial]:
        """All trials of a choice, each seed done before the next.

        Args:
            seeds: Seeds.
            panels: Names of panels; all of them if empty.
            epochs: Epochs of every run; those of the panel if 0.
            lines: Names of methods; all of them if empty.

        Raises:
            ValueError: There is no such panel, or no such method.
        """
        for name in panels:
            if name not in self.panels:
                raise ValueError(f"panel must be one of {', '.join(self.panels)}, got {name!r}")
        for name in lines:
            if name not in self.lines:
                raise ValueError(f"method must be one of {', '.join(self.lines)}, got {name!r}")
        return [
            self.make(name, line, epochs or self.panels[name].epochs, seed)
            for seed in seeds
            for name in panels or self.panels
            for line in self.panels[name].lines
            if not lines or line in lines
        ]


@dataclass(frozen=True)
class Outcome:
    """A run that is done."""

    trial: Trial
    points: tuple[Point, ...]
    diverged: bool = field(default=False)
    """Whether it left the finite numbers: then its loss is infinite from there on."""

    @property
    def ends(self) -> list[Point]:
        """The points at the ends of epochs."""
        return [point for point in self.points if not point.between]

    @property
    def losses(self) -> np.ndarray:
        """Test losses of all epochs, shape (epochs,)."""
        losses, ends = np.full(self.trial.epochs, np.inf), self.ends
        losses[: len(ends)] = [point.test_loss for point in ends]
        return losses

    @property
    def final(self) -> float:
        """Median test loss of the last tenth of the epochs; infinite for a run that diverged."""
        return quartiles(self.losses[-max(1, self.trial.epochs // LAST) :])[1]

    @property
    def share(self) -> float:
        """Median share of the last tenth of the epochs; 0 for a run that diverged."""
        shares = [point.share for point in self.ends[-max(1, self.trial.epochs // LAST) :]]
        return 0.0 if self.diverged else float(np.median(shares))

    def reached(self, loss: float, window: int) -> float:
        """Epoch at which the median of the last `window` epochs is first below a loss; infinite if never."""
        losses = self.losses
        for epoch in range(window, len(losses) + 1):
            if quartiles(losses[epoch - window : epoch])[1] < loss:
                return epoch
        return math.inf

    def at_steps(self, env_steps: float) -> float:
        """Test loss at the last point within so many steps of environments: infinite after a divergence.

        nan before the first point, and where the run came to fewer steps.
        """
        steps = [point.env_steps for point in self.points]
        count = int(np.searchsorted(steps, env_steps, side="right"))
        if count == len(steps) and steps[-1:] != [env_steps]:
            return math.inf if self.diverged else math.nan
        return self.points[count - 1].test_loss if count else math.nan


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
    outcome = Outcome(trial, points, diverged)
    epochs = len(outcome.ends)
    if epochs != trial.epochs and not (diverged and epochs < trial.epochs):
        raise ValueError(f"out: {path} holds {epochs} epochs, the run shall have {trial.epochs}; choose another out")
    return outcome


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
    unit, ended = study.unit, f"The final test loss of a run is the median of its last tenth of {study.unit}s"
    if study.window > 1:
        ended += f"; it has reached a\nloss when the median of {study.window} {unit}s is below it"
    parts = [f"# {study.title}\n\n{ended}.\n"]
    for name, lines in groups(study, outcomes):
        panel = study.panels[name]
        seeds = sorted({outcome.trial.seed for runs in lines.values() for outcome in runs})
        epochs = max(outcome.trial.epochs for runs in lines.values() for outcome in runs)
        header = ["method", *map(str, seeds), "median", f"above {panel.failed:g}", f"{unit} below {panel.reached:g}"]
        rows = []
        for line, runs in lines.items():
            finals = {run.trial.seed: run.final for run in runs}
            failed = sum(not final <= panel.failed for final in finals.values())
            cells = [number(finals[seed]) if seed in finals else "–" for seed in seeds]
            reached = quartiles([run.reached(panel.reached, study.window) for run in runs])[1]
            row = [study.lines[line].title, *cells, number(quartiles(finals.values())[1])]
            row += [f"{failed} of {len(runs)}", f"{reached:g}" if math.isfinite(reached) else "–"]
            rows.append(row + ([f"{quartiles([run.share for run in runs])[1]:.0%}"] if study.share else []))
        header += [study.share] if study.share else []
        header += [f"at {steps // 1000} k" for steps in study.at_steps]
        header += ["steps [k]"] if study.at_steps else []
        for row, runs in zip(rows, lines.values(), strict=True):
            for steps in study.at_steps:
                losses = [run.at_steps(steps) for run in runs]
                row.append("–" if np.isnan(losses).any() else number(quartiles(losses)[1]))
            if study.at_steps:
                row.append(f"{np.median([run.points[-1].env_steps if run.points else 0 for run in runs]) / 1e3:.0f}")
        parts.append("\n".join([f"## {panel.title}, {epochs} {unit}s", "", *table(header, rows), ""]))
    return "\n".join(parts)


def write_runs(study: Study, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a table with a line per run."""
    columns = ["panel", "method", "seed", "epochs", "diverged", "final_test_loss", "epoch_reached", "final_share"]
    columns += ["seconds", *(["env_steps", *(f"at_{steps}" for steps in study.at_steps)] if study.at_steps else [])]
    rows: list[list[Any]] = [columns]
    for outcome in outcomes:
        reached = outcome.reached(study.panels[outcome.trial.panel].reached, study.window)
        numbers = [number(value, 6) for value in (outcome.final, reached)]
        share = number(outcome.share, 6) if study.share else ""
        last = outcome.points[-1] if outcome.points else Point(math.inf, env_steps=0.0)
        seconds = number(last.seconds, 6) if outcome.points else ""
        rows.append([*outcome.trial[:3], len(outcome.ends), int(outcome.diverged), *numbers, share, seconds])
        if study.at_steps:
            rows[-1] += [int(last.env_steps), *(number(outcome.at_steps(steps), 6) for steps in study.at_steps)]
    with atomic_write(path) as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows).encode() + b"\n")


def write_results(study: Study, outcomes: Sequence[Outcome], out: Path, name: str) -> list[Path]:
    """Write all epochs, a line per run, the tables, and the figures; returns their paths."""
    paths = [out / f"{name}{ending}" for ending in ("-epochs.csv", "-runs.csv", ".md", ".png")]
    with atomic_write(paths[0]) as file:
        file.write((",".join(["panel", "method", "seed", *COLUMNS]) + "\n").encode())
        for outcome in outcomes:
            own = ",".join(map(str, outcome.trial[:3]))
            for epoch, point in enumerate(outcome.points, 1):
                file.write((f"{own}," + ",".join(map(repr, (epoch, *point))) + "\n").encode())
    write_runs(study, outcomes, paths[1])
    with atomic_write(paths[2]) as file:
        more = "" if study.note is None else "\n" + study.note(outcomes, out / name)
        file.write((summarise(study, outcomes) + more).encode())
    figures = {paths[3]: outcomes}
    if study.unit == "second":  # a figure per panel, which has another panel beside it, over steps
        del figures[paths.pop()]
        panels = dict.fromkeys(outcome.trial.panel for outcome in outcomes)
        figures |= {out / f"{name}-{panel}.png": [o for o in outcomes if o.trial.panel == panel] for panel in panels}
    for path, shown in figures.items():
        with atomic_write(path) as file:
            draw(study, shown).savefig(file, format="png", dpi=200 if study.unit == "epoch" else 120)
    return list(dict.fromkeys([*paths, *figures]))


def draw(study: Study, outcomes: Sequence[Outcome]) -> Figure:
    """Draw the test loss against epochs, and against steps: per line a median and a band between the quartiles."""
    found = list(groups(study, outcomes))
    over_steps = bool(study.at_steps)
    count = len(found) * (1 + over_steps)
    columns = min(2, max(1, count))
    rows = max(1, -(-count // columns))
    used = [line for line in study.lines if any(line in lines for _, lines in found)]
    width = 4.4 * columns if columns > 1 else 5.6
    ncols = min(len(used), int(width / (1.7 if over_steps else 2.6))) or 1
    height = 0.6 + 2.8 * rows + 0.2 * -(-len(used) // ncols)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    kinds = [(kind, *entry) for entry in found for kind in (("epochs", "steps") if over_steps else ("epochs",))]
    for axes, (kind, name, lines) in zip(panels, kinds, strict=False):
        for line, runs in lines.items():
            points, losses = _over_epochs(runs) if kind == "epochs" else _over_steps(runs)
            lower, median, upper = np.minimum(quartile_curves(losses), 1e30)  # what is infinite is beyond the edge
            _, colour, dashes = study.lines[line]
            axes.fill_between(points, lower, upper, color=colour, alpha=0.14, lw=0)
            axes.plot(points, median, color=colour, linestyle=dashes, linewidth=1.6)
        finish(axes, study.panels[name].title)
        axes.set(xlabel=study.unit if kind == "epochs" else "steps of environments", ylabel="test loss")
        if kind == "epochs" and study.unit == "second":
            axes.set(xscale="linear", xlabel="processor time [s]")
    for axes in panels[len(kinds) :]:
        axes.remove()
    handles = [
        Line2D([], [], label=title, color=colour, linestyle=dashes, linewidth=1.6)
        for title, colour, dashes in (study.lines[line] for line in used)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, handlelength=3, fontsize=9)
    counts = [len(runs) for _, lines in found for runs in lines.values()] or [0]
    figure.suptitle(f"{study.title}: {_span(counts)}", fontsize=10)
    return figure


def _over_epochs(runs: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Where the points of a curve are, in epochs, and the losses of each run there."""
    points, bins = make_bins(max(run.trial.epochs for run in runs))
    return points, np.stack([thin(run.losses, bins) for run in runs])


def _over_steps(runs: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """The same in steps of environments, from the first test of all to the last that all runs came to."""
    points = np.unique([point.env_steps for run in runs for point in run.points])
    losses = np.array([[run.at_steps(steps) for steps in points] for run in runs]).reshape(len(runs), -1)
    whole = ~np.isnan(losses).any(axis=0)
    return points[whole], losses[:, whole]


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    if most == 1:
        return "one seed"
    return "median and quartiles of " + (f"{most} seeds" if least == most else f"{least} to {most} seeds")
