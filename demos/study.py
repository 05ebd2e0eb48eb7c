"""Studies beyond the publication: memory (positions only, with a GRU), rules (a better rule than C), compare.

    python -m demos.study memory
    python -m demos.study rules --panel cartpole cartpole-shuffled --seeds 5
    python -m demos.study compare --panel quadrotor chain --method regular combined ppo --seconds 15

Leaves in `out` a file per run, all epochs and all runs as tables, a summary to read, and figures. Runs follow each
other in one process. Stopped or killed, the same command goes on after the last run that was finished. The runs of
compare, flows beside decays, truncation, an actor-critic and PPO, have equal processor time in place of epochs.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import warp

from controllers.commandline import Parser, add_flags, stop_on_signals
from controllers.settings import check_setting
from demos.experiments import memory, rules
from demos.experiments.comparison.study import STUDY as COMPARISON
from demos.experiments.pool import locked
from demos.experiments.published import parse_seeds
from demos.experiments.study import Study, Trial, load, load_all, perform, write_results, write_runs
from demos.outputs import check_folder
from warp_phys.interop.extras import require

STUDIES: dict[str, Study] = {"memory": memory.STUDY, "rules": rules.STUDY, "compare": COMPARISON}
"""The studies by name."""


@dataclass(frozen=True)
class Settings:
    """What is to be run of a study."""

    panel: tuple[str, ...] = ()
    """Panels of the study, by name; all of them if not given."""
    method: tuple[str, ...] = ()
    """Methods of the study, by the names of their folders; all of them if not given."""
    seeds: str = "5"
    """A number of seeds, or a list such as 0,4 or, for a single one, 7, with its comma."""
    epochs: int = 0
    """Epochs of every run; 0 for those of the study."""
    seconds: int = 0
    """Processor time of every run [s], in a study that has seconds in place of epochs; 0 for that of the study."""
    out: str = "study"
    """Folder for all results; runs that are there are not run again."""

    def __post_init__(self) -> None:
        """Check what the plan does not."""
        for name in ("epochs", "seconds"):
            check_setting(name, getattr(self, name), int, at_least=0)
        if not self.out:
            raise ValueError("out must name a folder, got an empty name")

    def plan(self, study: str) -> list[Trial]:
        """All runs of a study that are asked for."""
        return STUDIES[study].plan(parse_seeds(self.seeds), self.panel, self.length(study), self.method)

    def length(self, study: str) -> int:
        """Epochs or seconds of every run, 0 for those of the study."""
        has = STUDIES[study].unit + "s"
        other = "epochs" if has == "seconds" else "seconds"
        if getattr(self, other):
            raise ValueError(f"{other} must be left out: the runs of {study} are so many {has}, give these")
        return self.epochs or self.seconds


def parse(arguments: Sequence[str] | None) -> tuple[str, Settings, bool]:
    """Read a command line: the study, the settings, and whether the plan is only to be listed."""
    texts = (__doc__ or "").partition("\n")
    parser = Parser(
        prog="python -m demos.study",
        description=texts[0] + texts[2],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=list(STUDIES), help="Which study.")
    add_flags(parser, Settings)
    parser.add_argument("--list", action="store_true", help="Only print the plan, with what is done.")
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    study, only_list = given.pop("study"), given.pop("list")
    try:
        settings = Settings(**given | {name: tuple(given.get(name, ())) for name in ("panel", "method")})
        settings.plan(study)
        if not only_list:
            check_folder("out", settings.out)
        return study, settings, only_list
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def run(study: str, settings: Settings) -> int:
    """Run the plan and write its results; returns the exit status."""
    out, plan = Path(settings.out) / study, settings.plan(study)
    torch.set_num_threads(1)
    warp.config.log_level = warp.LOG_ERROR
    with stop_on_signals() as (stop, received), locked(out / ".command"):
        left = [trial for trial in plan if load(trial, out) is None]
        for module, extra in {trial.needs for trial in left if trial.needs}:
            require(module, extra)
        for number, trial in enumerate(left, 1):
            print(f"{number} of {len(left)}: {trial.name}", file=sys.stderr, flush=True)
            if not perform(trial, out, stop.is_set):
                words = " ".join(map(shlex.quote, sys.argv[1:]))
                print(f"Stopped; to go on:\n    python -m demos.study {words}", file=sys.stderr)
                return 128 + received[0] if received else 0
            found = load_all(STUDIES[study], out, settings.length(study))
            write_runs(STUDIES[study], found, Path(settings.out) / f"{study}-runs.csv")
        found = load_all(STUDIES[study], out, settings.length(study))
        print("\n".join(map(str, write_results(STUDIES[study], found, Path(settings.out), study))))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    0 done, 2 a mistake in the arguments, 130 and 143 stopped by SIGINT and SIGTERM, with all finished runs saved.
    """
    study, settings, only_list = parse(arguments)
    try:
        if not only_list:
            return run(study, settings)
        for trial in settings.plan(study):
            outcome = load(trial, Path(settings.out) / study)
            state = "to do" if outcome is None else "diverged" if outcome.diverged else "finished"
            print(f"{state:8}  {trial.epochs:5}  {trial.name}")
        return 0
    except BlockingIOError:
        print(f"python -m demos.study: error: out: another call is at work in {settings.out}", file=sys.stderr)
    except (OSError, ValueError, ImportError) as error:
        print(f"python -m demos.study: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
