"""The published experiments: cart-pole, repulsion and quantum control, all levels, flows, clipping modes and seeds.

    python -m demos.paper --quick
    python -m demos.paper --experiment cartpole --level poles-4 --flow R C --clip none --seeds 5

Leaves in `out` a folder per run, epochs.csv, runs.csv, summary.csv, summary.md, and a figure per experiment. Stopped or
killed, it goes on where it was when it is called again.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import os
import shlex
import sys
import threading
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controllers.commandline import Parser, add_flags, stop_on_signals
from controllers.settings import check_setting
from demos.experiments.cluster import CLUSTERS, read_options, run_on_cluster
from demos.experiments.plan import (
    BEGUN,
    DIVERGED,
    FAILED,
    FINISHED,
    WAITING,
    Run,
    State,
    check_plan,
    make_plan,
)
from demos.experiments.pool import PATIENCE, locked, run_all
from demos.experiments.progress import Display
from demos.experiments.published import EXPERIMENTS, experiment_of, parse_levels, parse_seeds
from demos.experiments.results import load_results
from demos.experiments.tables import write_tables
from demos.outputs import check_folder


@dataclass(frozen=True)
class Paper:
    """What is to be run; the defaults are the published ones."""

    experiment: tuple[str, ...] = tuple(EXPERIMENTS)
    """Experiments; without this, those that the levels name, if any."""
    level: tuple[str, ...] = ()
    """Levels, such as poles-4, cost-0.01, target-5, or their numbers for a single experiment; without this, of each
    experiment all that are published."""
    flow: tuple[str, ...] = ("regular", "modified", "stopped", "combined")
    """Gradient flows, by name or letter; also controller (N), geometric, minmod, averaged, either."""
    clip: tuple[str, ...] = ("none", "value", "norm")
    """Clipping of the update."""
    seeds: str = "3"
    """A number of seeds, or a list such as 0,4 or, for a single one, 7, with its comma."""
    shuffle: bool = False
    """Draw a new order of the training states every epoch; such runs stand beside the published ones."""
    epochs: int = 1000
    """Epochs of every run."""
    train_states: int = 256
    """Initial states to train on, a multiple of the batch of 8."""
    test_states: int = 256
    """Initial states to test on."""
    processes: int = 0
    """Runs at the same time; 0 for as many as there are cores, or on SLURM as there is room for."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    out: str = "paper"
    """Folder for all results; what is there is added to, and finished runs are not run again."""
    cluster: str = ""
    """Run as jobs: slurm; local, as jobs of this machine; without this, in processes of this program."""
    cluster_options: tuple[str, ...] = ()
    """Options of jobs, such as slurm_partition=gpu timeout_min=60."""
    svg: bool = False
    """Draw the figures as SVG too."""

    def __post_init__(self) -> None:
        """Check what no `Training` checks; take lists with commas apart."""
        for name in ("experiment", "level", "flow", "clip"):
            values = [part for text in getattr(self, name) for part in text.split(",") if part]
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        check_setting("processes", self.processes, int, at_least=0)
        if self.cluster and self.cluster not in CLUSTERS:
            raise ValueError(f"cluster must be one of {', '.join(CLUSTERS)}, got {self.cluster!r}")
        if self.cluster_options and not self.cluster:
            raise ValueError("cluster-options need a cluster")
        read_options(self.cluster_options)
        if not self.out:
            raise ValueError("out must name a folder, got an empty name")

    def plan(self) -> list[Run]:
        """All runs that are asked for."""
        return make_plan(
            self.out,
            parse_levels(self.experiment, self.level),
            self.flow,
            self.clip,
            parse_seeds(self.seeds),
            shuffle=self.shuffle,
            epochs=self.epochs,
            train_states=self.train_states,
            test_states=self.test_states,
            device=self.device,
        )

    @property
    def workers(self) -> int:
        """Number of processes."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.processes or cores

    @property
    def place(self) -> str:
        """Where the runs are, in words."""
        return f"jobs ({self.cluster})" if self.cluster else f"{self.workers} processes"


QUICK: Mapping[str, Any] = {
    "clip": ("none",),
    "seeds": "3",
    "epochs": 100,
    "train_states": 64,
    "test_states": 64,
    "out": "paper-quick",
}
"""Defaults of the quick mode: minutes rather than hours, to see that all works and where it leads."""


class RepeatableParser(Parser):
    """A parser whose flags that take several values may also be given several times."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add a flag."""
        if options.get("nargs") == "*":
            options["action"] = "extend"
        return super().add_argument(*names, **options)


ACTIONS = {
    "list": "Only print the plan, with the state of every run.",
    "tables_only": "Only make the tables again, from all runs in the folder.",
    "figures_only": "Only make the figures again, from all runs in the folder.",
}


def parse(arguments: Sequence[str] | None) -> tuple[Paper, str]:
    """Read a command line: the settings, and the action if it is not to run."""
    texts = (__doc__ or "").partition("\n")
    parser = RepeatableParser(
        prog="python -m demos.paper",
        description=texts[0] + texts[2],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, Paper)
    shown = ", ".join(
        f"{name.replace('_', '-')} {' '.join(value) if isinstance(value, tuple) else value}"
        for name, value in QUICK.items()
    )
    parser.add_argument("--quick", action="store_true", help=f"Other defaults, for a result in minutes: {shown}.")
    only = parser.add_mutually_exclusive_group()
    for name, text in ACTIONS.items():
        only.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    given = vars(parser.parse_args(arguments))
    action = next((name for name in ACTIONS if given[name]), "")
    defaults = QUICK if given.pop("quick") else {}
    given = {name: value for name, value in given.items() if name not in ACTIONS}
    if "experiment" not in given and given.get("level"):
        names = [experiment_of(level) for text in given["level"] for level in text.split(",")]
        # A bare number leaves the choice open, which `parse_levels` then complains about.
        given["experiment"] = tuple(name for name in EXPERIMENTS if name in names or None in names)
    try:
        settings = Paper(**{**defaults, **given})
        if not action:
            check_folder("out", settings.out)
        if action in ("", "list"):
            check_plan(settings.out, settings.plan())
        return settings, action
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def print_plan(runs: Sequence[tuple[Run, State]]) -> None:
    """Print every run with its state, and how many there are of each."""
    for run, state in runs:
        print(f"{state.word:8}  {state.epochs:6}/{run.settings.epochs}  {run.name}")
        if state.reason:
            print(f"          {state.reason}")
    words = [state.word for _, state in runs]
    counts = [f"{words.count(word)} {word}" for word in (FINISHED, DIVERGED, FAILED, BEGUN, WAITING) if word in words]
    print(f"{len(runs)} runs: {', '.join(counts)}")


def perform_plan(settings: Paper, stop: threading.Event) -> dict[str, State]:
    """Run what is not done yet; returns the states of all runs of the plan."""
    runs = [(run, run.state()) for run in settings.plan()]
    states = {run.name: state for run, state in runs}
    left = [run for run, state in runs if not state.counts]
    if left and not stop.is_set():
        if not settings.cluster:  # processes of a program that was killed save their runs before they end
            with locked(Path(settings.out) / ".processes", patience=PATIENCE):
                pass
        display = Display(runs, settings.workers)
        display.say(
            f"{len(left)} of {len(runs)} runs to do in {settings.place}, results in {settings.out}; "
            "the first runs compile for some seconds …"
        )
        try:
            if settings.cluster:
                options, at_once = read_options(settings.cluster_options), settings.processes
                at_once = at_once if settings.cluster == "slurm" else settings.workers
                states |= run_on_cluster(left, settings.out, settings.cluster, at_once, options, display, stop)
            else:
                states |= run_all(left, settings.out, settings.workers, display, stop)
        finally:
            display.close()
    return states


def write_results(settings: Paper, tables: bool = True, figures: bool = True) -> str:
    """Make tables and figures of all runs in the folder; returns what was made, in lines."""
    # Imported late: drawing is not needed in the processes of the runs, which import this file as well.
    from demos.experiments.figures import write_figures  # noqa: PLC0415

    out = Path(settings.out)
    results = load_results(out)
    # Someone may look at intermediate results while the runs go on.
    with locked(out / ".results", patience=PATIENCE):
        paths = write_tables(out, results) if tables else []
        paths += write_figures(out, results, settings.svg) if figures else []
    return "\n".join(map(str, paths))


def run(settings: Paper) -> int:
    """Run the plan and write its results; returns the exit status."""
    with stop_on_signals() as (stop, received), locked(Path(settings.out) / ".command"):
        states = perform_plan(settings, stop)
        if stop.is_set():
            done = sum(state.counts for state in states.values())
            words = " ".join(map(shlex.quote, sys.argv[1:]))
            print(
                f"Stopped with {done} of {len(states)} runs done; everything is saved. The same command goes on:\n"
                f"    python -m demos.paper {words}\n"
                "and with --tables-only or --figures-only it shows what there is.",
                file=sys.stderr,
            )
            return 128 + received[0] if received else 0
        print(write_results(settings))
    failed = [name for name, state in states.items() if not state.counts]
    if failed:
        print(f"Failed, and tried again the next time: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    0 done, 1 some runs failed (a run that diverged has not: that is its result), 2 a mistake in the arguments, 130 and
    143 stopped by SIGINT and SIGTERM, with all saved.
    """
    settings, action = parse(arguments)
    try:
        if action == "list":
            print_plan([(run, run.state()) for run in settings.plan()])
            return 0
        if action:
            if not Path(settings.out).is_dir():
                raise FileNotFoundError(f"out: there is no folder {settings.out}")
            print(write_results(settings, tables=action == "tables_only", figures=action == "figures_only"))
            return 0
        return run(settings)
    except BlockingIOError:
        print(f"python -m demos.paper: error: out: another call is at work in {settings.out}", file=sys.stderr)
    except (ImportError, OSError, ValueError) as error:
        print(f"python -m demos.paper: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
