"""The comparison as a study: its panels are tasks, once without clipping and once with; its time is processor time."""

import functools
import time
from collections.abc import Callable

import torch

from demos.experiments.comparison.forecasts import foretold
from demos.experiments.comparison.methods import METHODS, Learner
from demos.experiments.comparison.tasks import EPISODES, TASKS, TEST_SEED, Task
from demos.experiments.study import Line, Panel, Point, Study, Trial
from warp_phys.interop.torch import pointwise_cost

CLIPPED = "-norm"
"""Ending of the panels whose updates are clipped by their norm."""
MILESTONES = tuple(50_000 * 2**n for n in range(5))
"""Steps of the environments at which there are further tests: methods differ in how many they take in a second."""
SECONDS = 15
"""Processor time of a run, unless another is asked for."""


def examine(task: Task, learner: Learner) -> tuple[float, float]:
    """Return the mean cost of the test episodes, and the share of them that were solved.

    Raises:
        Diverged: A state is not finite.
    """
    states, controls = learner.play(torch.as_tensor(task.system.sample(EPISODES, seed=TEST_SEED)))
    loss = task.system.loss(states, controls, when="every", control_cost=task.control_cost)
    costs = pointwise_cost(task.system, states, range(1, len(states)), {})
    return float(loss), float(task.solved(states, costs).double().mean())


@functools.cache
def compile_for(task: str, method: str) -> None:
    """Have every kernel of a method compiled, so that no run's time has it."""
    learner = METHODS[method].make(TASKS[task], False, 0)
    for _ in range(2):
        learner.step()
    examine(TASKS[task], learner)


def train(
    task: str, method: str, clip: bool, seed: int, seconds: int,
    stop: Callable[[], bool], progress: Callable[[Point], None],
) -> bool:  # fmt: skip
    """Train for so many seconds of processor time, with a test after each, which does not count."""
    compile_for(task, method)
    learner, used = METHODS[method].make(TASKS[task], clip, seed), 0.0
    milestones = list(MILESTONES)
    for second in range(1, seconds + 1):
        while used < second:
            if stop():
                return False
            before = time.process_time()
            learner.step()
            used += time.process_time() - before
            if milestones and learner.env_steps >= milestones[0]:
                progress(Point(*examine(TASKS[task], learner), used, milestones.pop(0), between=1.0))
        progress(Point(*examine(TASKS[task], learner), used, learner.env_steps))
    return True


def make_trial(panel: str, line: str, seconds: int, seed: int) -> Trial:
    """One run."""
    task, clip = panel.removesuffix(CLIPPED), panel.endswith(CLIPPED)

    def run(stop: Callable[[], bool], progress: Callable[[Point], None]) -> bool:
        return train(task, line, clip, seed, seconds, stop, progress)

    return Trial(panel, line, seed, seconds, run, METHODS[line].needs)


def _panels() -> dict[str, Panel]:
    panels = {}
    for clip in (False, True):
        for name, task in TASKS.items():
            lines = tuple(line for line, method in METHODS.items() if method.where(task) and (method.clips or not clip))
            title = task.title + (", norm clipped" if clip else "")
            panels[name + CLIPPED * clip] = Panel(title, lines, SECONDS, task.reached, task.failed)
    return panels


def _lines() -> dict[str, Line]:
    colours = {
        "regular": "#D55E00", "modified": "#0072B2", "combined": "#009E73", "either": "#882255", "limit": "#E69F00",
        "combined-limit": "#56B4E9", "decay": "#999999", "truncation": "#000000", "impact": "#CC79A7",
        "windows-regular": "#D55E00", "windows-combined": "#009E73", "ppo": "#332288",
    }  # fmt: skip
    dashes = {"plain": "-", "gated": "-", "cut": (0, (5, 1.5)), "none": (0, (1, 1.2))}
    return {name: Line(method.title, colours[name], dashes[method.kind]) for name, method in METHODS.items()}


STUDY = Study(
    title="Ways of training",
    panels=_panels(),
    lines=_lines(),
    make=make_trial,
    share="solved",
    unit="second",
    at_steps=(MILESTONES[0], MILESTONES[3]),
    window=1,
    note=foretold,
)
