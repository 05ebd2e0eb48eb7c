"""Swing-up of a cart with poles, trained side by side with the gradient (R) and a form of the combined update (C).

    python -m demos.swingup

C is the form of the combined update that fails least, "either"; see docs/results.md. Leaves in `out`: curves.png,
swingup.gif, summary.txt, and the record of each training as regular.csv and either.csv.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import multiprocessing
import os
import signal
import sys
import textwrap
import time
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from matplotlib.figure import Figure

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags, stop_on_signals
from controllers.progress import Progress
from controllers.record import Record, write_record
from controllers.settings import Training, check_setting
from controllers.training import train
from demos.animation import Scene, has_display, write_gif
from demos.colours import colour
from demos.outputs import check_folder
from warp_phys import Diverged, quiet
from warp_phys.interop.torch import Rollout

FLOWS = ("regular", "either")
"""The gradient, R, and C where M may agree with R or with a running average of it."""

STARTS = 64
"""Starts of which the film shows the hardest."""


@dataclass(frozen=True)
class Swingup:
    """Settings of the demo."""

    poles: int = 4
    """Poles on the cart."""
    epochs: int = 300
    """Epochs of each training."""
    seed: int = 0
    """Seed of the weights and of the states, the same for both trainings."""
    frames: int = 76
    """Pictures in the animation, 25 of them per second."""
    out: str = "out"
    """Folder for what the demo makes; its earlier files are replaced."""
    open: bool = True
    """Open the animation at the end where there is a display."""

    def __post_init__(self) -> None:
        """Check the settings of the demo; those of the trainings are checked by `Training`."""
        check_setting("frames", self.frames, int, at_least=2, below=self.training(FLOWS[0]).steps + 2)
        check_folder("out", self.out)

    def training(self, flow: str) -> Training:
        """The training with this flow; it keeps its files to itself, the demo writes its own."""
        parameters = {"poles": self.poles, "dt": 0.01}
        return Training(parameters=parameters, flow=flow, epochs=self.epochs, seed=self.seed, out="")


class Outcome(NamedTuple):
    """What a training sends home at its end."""

    records: list[Record]
    states: np.ndarray
    """From all starts, shape (steps + 1, starts, D)."""
    controls: np.ndarray
    """Likewise, shape (steps, starts, K)."""


def train_apart(settings: Training, starts: np.ndarray, stop: Any, home: Connection) -> None:
    """Body of a training process: sends every record home, then an `Outcome`, or the message of what went wrong."""
    torch.set_num_threads(1)
    quiet()
    parent = os.getppid()

    def asked() -> bool:
        # A parent that was killed cannot ask any more, but its children get another parent.
        return stop.is_set() or os.getppid() != parent

    try:
        trained = train(settings, stop=asked, progress=home.send)
        if trained.finished:
            with torch.no_grad():
                rollout = Rollout(settings.make_system(), trained.controller, settings.steps, device=settings.device)
                states, controls = rollout(starts)
            home.send(Outcome(trained.records, states.cpu().numpy(), controls.cpu().numpy()))
    except Diverged as error:
        home.send(f"the training with flow {settings.flow} diverged: {error}")
    except BrokenPipeError:
        pass


def train_both(settings: Swingup) -> dict[str, Outcome] | int:
    """Train with both flows at once, in a process each; returns an exit status where that came to nothing."""
    context = multiprocessing.get_context("spawn")
    starts = settings.training(FLOWS[0]).make_system().sample(STARTS, seed=settings.seed)
    stopping, homes, processes = context.Event(), {}, []
    with stop_on_signals() as (stop, received):
        # Children inherit an ignored Ctrl-C, which a terminal sends to them as well; they listen to `stopping` instead.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for flow in FLOWS:
            home, away = context.Pipe(duplex=False)
            process = context.Process(
                target=train_apart, args=(settings.training(flow), starts, stopping, away), daemon=True
            )
            process.start()
            away.close()
            homes[home] = flow
            processes.append(process)
        signal.signal(signal.SIGINT, handler)
        try:
            outcome = collect(homes, stop, settings.epochs)
        finally:
            stopping.set()
            for process in processes:
                process.join(10)
                process.terminate()
    if isinstance(outcome, str):
        print(f"The demo ends: {outcome}", file=sys.stderr)
        return 1
    if received:
        print("Stopped: both trainings have ended, nothing was written.", file=sys.stderr)
        return 128 + received[0]
    return outcome


def collect(homes: Mapping[Connection, str], stop: Any, epochs: int) -> dict[str, Outcome] | str:
    """Gather what the trainings send until both are done, one fails (its message is returned) or `stop` is set."""
    outcomes: dict[str, Outcome] = {}
    open_homes = dict(homes)
    print("Training with R and with C; the first start compiles for some seconds …", file=sys.stderr, flush=True)
    shown = {flow: Progress(epochs, name=flow, position=line) for line, flow in enumerate(homes.values())}
    try:
        while open_homes and not stop.is_set():
            for home in cast(list[Connection], wait(list(open_homes), timeout=0.2)):
                flow = open_homes[home]
                try:
                    message: Any = home.recv()
                except EOFError:
                    del open_homes[home]
                    if flow not in outcomes and not stop.is_set():
                        return f"the training with flow {flow} ended early"
                    continue
                if isinstance(message, str):
                    return message
                if isinstance(message, Outcome):
                    outcomes[flow] = message
                else:
                    shown[flow](message)
    finally:
        for progress in reversed(shown.values()):
            progress.close()
    return outcomes


def final_loss(records: Sequence[Record]) -> float:
    """Median test loss over the last tenth of the epochs, as it is published."""
    return float(np.median([record.test_loss for record in records[-max(1, len(records) // 10) :]]))


def summarise(settings: Swingup, outcomes: Mapping[str, Outcome], seconds: float) -> str:
    """The result in one paragraph."""
    regular, combined = (final_loss(outcomes[flow].records) for flow in FLOWS)
    last = max(1, settings.epochs // 10)
    low, high = sorted((regular, combined))
    if high < 1.1 * low:
        verdict = "The two end about level"
    else:
        winner, loser = ("C", "R") if combined < regular else ("R", "C")
        verdict = f"{winner} ends {high / low:.1f} times lower than {loser}"
    text = (
        f"Swing-up of {settings.poles} pole{'s' if settings.poles > 1 else ''} on a cart, trained through "
        f"{settings.training(FLOWS[0]).steps} simulated steps from the same initial weights, once with the gradient "
        f"(R) and once with the combined update (C, either): seed {settings.seed}, {settings.epochs} epochs each, "
        f"{seconds:.0f} s in all. Final test loss, the median of the last {last} epochs (0: all poles upright, 2: all "
        f"hanging): R {regular:.6g}, C {combined:.6g}. {verdict}. This is one seed; other seeds end elsewhere. The "
        f"film shows, of {STARTS} starts, the one from which one of the two ends worst."
    )
    return textwrap.fill(text, 100) + "\n"


def hardest(system: Any, outcomes: Mapping[str, Outcome]) -> int:
    """The start from which one of the two ends worst, whichever it is."""
    costs = [
        [float(system.loss(o.states[:, [b]], o.controls[:, [b]], when="final")) for b in range(o.states.shape[1])]
        for o in outcomes.values()
    ]
    return int(np.max(costs, axis=0).argmax())


def plot_curves(path: Path, settings: Swingup, outcomes: Mapping[str, Outcome]) -> None:
    """Draw the test loss of both trainings."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for flow, letter in zip(FLOWS, "RC", strict=True):
        losses = [record.test_loss for record in outcomes[flow].records]
        axes.plot(range(1, len(losses) + 1), losses, color=colour(flow), linewidth=1, label=f"{letter} {flow}")
    title = f"Swing-up of {settings.poles} poles, seed {settings.seed}"
    axes.set(yscale="log", xlabel="epoch", ylabel="test loss", title=title)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_results(settings: Swingup, outcomes: Mapping[str, Outcome], seconds: float) -> str:
    """Write all files of the demo; returns the summary."""
    out = Path(settings.out)
    system, scenes = settings.training(FLOWS[0]).make_system(), []
    start = hardest(system, outcomes)
    for flow, letter in zip(FLOWS, "RC", strict=True):
        outcome = outcomes[flow]
        write_record(out / f"{flow}.csv", outcome.records)
        title = f"{letter} {flow}, test loss {final_loss(outcome.records):.2g}"
        scenes.append(Scene(title, colour(flow), outcome.states[:, start], outcome.controls[:, start]))
    plot_curves(out / "curves.png", settings, outcomes)
    write_gif(out / "swingup.gif", system, scenes, settings.frames)
    summary = summarise(settings, outcomes, seconds)
    with atomic_write(out / "summary.txt") as file:
        file.write(summary.encode())
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    parser = Parser(prog="python -m demos.swingup", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add_flags(parser, Swingup)
    try:
        settings = Swingup(**vars(parser.parse_args(arguments)))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    quiet()
    start = time.perf_counter()
    outcomes = train_both(settings)
    if isinstance(outcomes, int):
        return outcomes
    with parser.answering():
        print("\n" + write_results(settings, outcomes, time.perf_counter() - start))
    animation = (Path(settings.out) / "swingup.gif").resolve()
    print(f"Animation: {animation}\nCurves:    {animation.with_name('curves.png')}")
    if settings.open and has_display():
        webbrowser.open(animation.as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
