"""What a diagnosis says of a task before anything is compared, and whether the comparison says so too."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from controllers.checkpoint import atomic_write
from demos.experiments.comparison.methods import METHODS, Episodes
from demos.experiments.comparison.tasks import TASKS
from demos.experiments.study import Outcome
from demos.experiments.tables import number, table
from warp_phys import REGULAR
from warp_phys.interop.torch import diagnose

PILOT = 30
"""Updates along R, clipped, before the diagnosis: fresh weights hardly act, so that R and M are the same."""
SAMPLES = 64
"""Episodes of a diagnosis."""
LEVEL = 1.25
"""R has won where the best method does not end below its loss by more than this factor."""


class Forecast(NamedTuple):
    """The verdict of a diagnosis, and how much feedback grows over an episode along R and M, all samples together."""

    kind: str
    path: str
    regular: float
    modified: float

    @property
    def says(self) -> str:
        """The kind of method that should win.

        R where its feedback stays level or shrinks; what gates the controller's path where it grows through that, or
        through both; what is short in time where it grows through the physics.

        >>> Forecast("grows", "controller", 20.0, 1.0).says, Forecast("level", "", 2.0, 1.0).says
        ('gated', 'plain')
        """
        if self.kind not in ("grows", "explodes"):
            return "plain"
        return "cut" if self.path == "physics" else "gated"


def forecast(name: str, seed: int) -> Forecast:
    """Train a controller for a moment and diagnose it: the loss of the last state, from the first test states."""
    task = TASKS[name]
    learner = Episodes(task, REGULAR, clip=True, seed=seed)
    for _ in range(PILOT):
        learner.step()
    found = diagnose(learner.rollout, torch.as_tensor(task.system.sample(SAMPLES, seed=seed)), flows=("R", "M"))
    growth = [float(number) for number in found.batch_growth ** (task.steps - 1)]
    return Forecast(found.why.kind, found.why.path, *growth)


def winner(finals: dict[str, float]) -> str:
    """The kind of the best method but PPO, "plain" where R is not far behind, "" where R has not run.

    Args:
        finals: Final test losses by methods.

    >>> winner({"regular": 1.0, "modified": 0.9, "decay": 2.0}), winner({"regular": 1.0, "modified": 0.5})
    ('plain', 'gated')
    """
    finals = {method: final for method, final in finals.items() if METHODS[method].kind != "none"}
    if "regular" not in finals:
        return ""
    best = min(finals, key=lambda method: finals[method])
    return "plain" if finals["regular"] <= LEVEL * finals[best] else METHODS[best].kind


COLUMNS = ("task", "seed", *Forecast._fields)


def kept(out: Path, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Forecast]:
    """The forecasts of tasks and seeds, made where the folder's file does not have them yet."""
    path, found = out / "forecasts.csv", dict[tuple[str, int], Forecast]()
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            name, text, kind, way, *growth = line.split(",")
            found[name, int(text)] = Forecast(kind, way, *map(float, growth))
    for key in wanted:
        if key not in found:
            found[key] = forecast(*key)
            lines = [",".join(map(str, (*own, *entry))) for own, entry in found.items()]
            with atomic_write(path) as file:
                file.write("\n".join([",".join(COLUMNS), *lines]).encode() + b"\n")
    return {key: found[key] for key in wanted}


def foretold(outcomes: Sequence[Outcome], out: Path) -> str:
    """A table of verdicts and winners, run by run in panels without clipping, and how often the verdict was right."""
    own = [outcome for outcome in outcomes if outcome.trial.panel in TASKS]
    finals: dict[tuple[str, int], dict[str, float]] = {}
    for outcome in own:
        finals.setdefault((outcome.trial.panel, outcome.trial.seed), {})[outcome.trial.line] = outcome.final
    finals = {key: entry for key, entry in finals.items() if winner(entry)}
    rows, right = [], 0
    for (task, seed), said in kept(out, list(finals)).items():
        entry = finals[task, seed]
        won, best = winner(entry), min(entry, key=lambda method: entry[method])
        right += won == said.says
        verdict = " ".join(filter(None, (said.kind, said.path)))
        growth = [number(value) for value in (said.regular, said.modified)]
        rows.append([task, str(seed), verdict, *growth, said.says, METHODS[best].title, won])
    header = ["task", "seed", "verdict", "R grows", "M grows", "says", "best", "won"]
    share = f"The verdict was right in {right} of {len(rows)}.\n"
    return "\n".join(["## The verdict beforehand", "", *table(header, rows), "", share])
