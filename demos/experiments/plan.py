"""What is to be run: one `Training` with a folder of its own for every run, and how far each has come."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from controllers.checkpoint import CHECKPOINT, CONFIG, RECORD, save_json
from controllers.config import read_config
from controllers.settings import Training, check_resume
from demos.experiments.published import EXPERIMENTS
from warp_phys.flow import NAMED

FLOW_ORDER = tuple(NAMED)
CLIPS = ("none", "value", "norm")
"""Order of flows and of clipping modes in tables and figures."""
OUTCOME = "outcome.json"
"""File in a run's folder that says how the run ended."""
FINISHED, DIVERGED, FAILED, BEGUN, WAITING = "finished", "diverged", "failed", "begun", "to do"
SHARED = ("epochs", "train_states", "test_states")
"""Settings that all runs in one output folder have in common, or its tables would compare what cannot be compared."""


class State(NamedTuple):
    """How far a run has come."""

    word: str
    """finished, diverged, failed (for another reason), begun, or to do."""
    epochs: int = 0
    """Epochs on record."""
    reason: str = ""
    """Why it did not reach its end."""

    @property
    def counts(self) -> bool:
        """Whether this is a result: a run that diverged has one, of infinite loss."""
        return self.word in (FINISHED, DIVERGED)


def level_text(level: float) -> str:
    """A level in words, to the last digit: folders and tables must tell any two apart.

    >>> level_text(4.0), level_text(0.001), level_text(0.1234567)
    ('4', '0.001', '0.1234567')
    """
    return repr(float(level)).removesuffix(".0")


@dataclass(frozen=True)
class Run:
    """One training of an experiment, and its folder."""

    experiment: str
    level: float
    settings: Training

    @property
    def name(self) -> str:
        """Readable and unique: experiment/level/flow/clipping/seed.

        >>> Run("cartpole", 4, EXPERIMENTS["cartpole"].training(4, flow="C")).name
        'cartpole/poles-4/combined/clip-none/seed-0'
        """
        settings, label = self.settings, EXPERIMENTS[self.experiment].label
        order = "-shuffled" if settings.shuffle else ""
        level = f"{label}-{level_text(self.level)}"
        return f"{self.experiment}/{level}/{settings.flow}/clip-{settings.clip}/seed-{settings.seed}{order}"

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return Path(self.settings.out)

    @property
    def kernels(self) -> tuple[Any, ...]:
        """What decides which kernels it needs: counts, not numbers; the flow is data."""
        settings = self.settings
        counts = tuple(value for value in settings.parameters.values() if not isinstance(value, float))
        return settings.system, counts, settings.network, settings.hidden, settings.activation, settings.precision

    def state(self) -> State:
        """How far it has come, from its files.

        Raises:
            ValueError: Its outcome is not in a form that this program writes.
        """
        epochs = recorded_epochs(self.folder)
        path = self.folder / OUTCOME
        if path.exists():
            try:
                state = State(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                raise ValueError(f"out: {path} is not an outcome that this program wrote; delete it") from None
            if state.word != FINISHED or epochs == state.epochs == self.settings.epochs:
                return state
        return State(BEGUN, epochs) if (self.folder / CHECKPOINT).exists() else State(WAITING)

    def conclude(self, state: State) -> None:
        """Leave word of its end."""
        save_json(self.folder / OUTCOME, state._asdict())

    def check(self) -> None:
        """Raise ValueError where its folder holds a run with other settings, or something else."""
        if not (self.folder / CONFIG).exists():
            # a run that failed before it began has left word of that alone
            left = [name for name in (CHECKPOINT, RECORD) if (self.folder / name).exists()]
            if left:
                raise ValueError(f"out: {self.folder} has {', '.join(left)} and no {CONFIG}; delete or complete it")
            return
        saved = read_settings(self.folder)
        try:
            check_resume({entry.name: getattr(saved, entry.name) for entry in fields(saved)}, self.settings)
        except ValueError as error:
            raise ValueError(f"out: {self.folder}: {error}; choose another out, or delete that folder") from None


def recorded_epochs(folder: Path) -> int:
    """Epochs in the record of a run, 0 where there is none."""
    path = folder / RECORD
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def read_settings(folder: Path) -> Training:
    """Read the settings of the run in `folder`.

    Raises:
        ValueError: The file there is not one of ours.
    """
    path = folder / CONFIG
    try:
        return replace(Training(**(read_config(path) | {"device": "cpu"})), out=str(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"out: {path} does not hold the settings of a run: {error}") from None


def make_plan(
    out: str | Path,
    levels: Mapping[str, Sequence[float]],
    flows: Iterable[str],
    clips: Iterable[str],
    seeds: Iterable[int],
    **changes: Any,
) -> list[Run]:
    """All runs of a choice, ordered so that every experiment begins early and each seed is done before the next.

    Args:
        out: Folder that gets one folder per run.
        levels: Levels of each experiment, by its name.
        flows: Flows by name or letter.
        clips: Clipping modes.
        seeds: Seeds.
        changes: Other fields of `Training`, the same for all runs.

    Raises:
        ValueError, TypeError: No training can be made of these.

    >>> [run.name for run in make_plan("", {"quantum": [3]}, "RC", ["none"], [0])]  # doctest: +NORMALIZE_WHITESPACE
    ['quantum/target-3/regular/clip-none/seed-0', 'quantum/target-3/combined/clip-none/seed-0']
    """
    deepest = max((len(values) for values in levels.values()), default=0)
    runs: dict[str, Run] = {}
    for seed, clip, rank, flow, name in itertools.product(seeds, clips, range(deepest), flows, levels):
        if rank < len(levels[name]):
            level = levels[name][rank]
            settings = EXPERIMENTS[name].training(level, flow=flow, clip=clip, seed=seed, out="", **changes)
            run = Run(name, level, settings)
            runs[run.name] = replace(run, settings=replace(settings, out=str(Path(out) / run.name)))
    return list(runs.values())


def find_runs(out: str | Path) -> list[Run]:
    """All runs that have been begun in a folder, in the order of their experiments and levels.

    Raises:
        ValueError: A run's settings cannot be read, or do not belong to its folder's name.
    """
    runs = []
    for path in Path(out).glob(f"*/*/*/*/*/{CONFIG}"):
        if path.relative_to(out).parts[0] not in EXPERIMENTS:
            continue
        settings = read_settings(path.parent)
        name = path.relative_to(out).parts[0]
        run = Run(name, EXPERIMENTS[name].level_of(settings), settings)
        if Path(out) / run.name != path.parent:
            raise ValueError(f"out: {path.parent} holds the run {run.name}; move it there, or out of {out}")
        runs.append(run)
    flows = list(dict.fromkeys(FLOW_ORDER + tuple(run.settings.flow for run in runs)))

    def place(run: Run) -> tuple[Any, ...]:
        experiment, settings = EXPERIMENTS[run.experiment], run.settings
        # The harder the later: known levels as published, others behind them.
        known = experiment.levels.index(run.level) if run.level in experiment.levels else len(experiment.levels)
        names = list(EXPERIMENTS)
        return (
            names.index(run.experiment),
            known,
            run.level,
            settings.shuffle,
            flows.index(settings.flow),
            CLIPS.index(settings.clip),
            settings.seed,
        )

    return sorted(runs, key=place)


def check_plan(out: str | Path, plan: Sequence[Run]) -> None:
    """Raise ValueError where the output folder holds runs that do not go together with the planned ones."""
    for run in plan:
        run.check()
    if not plan:
        raise ValueError("the choice of experiments, levels, flows, clipping and seeds leaves no run")
    wanted = plan[0].settings
    for run in find_runs(out):
        for name in SHARED:
            was, now = getattr(run.settings, name), getattr(wanted, name)
            if was != now:
                raise ValueError(
                    f"out: the runs in {out} have {name} {was} ({run.name}), these would have {now}; "
                    f"choose another out for them"
                )
