"""One display for all runs: how many runs and epochs are done, and how long the rest will take."""

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TextIO

from controllers.record import Record
from demos.experiments.plan import BEGUN, DIVERGED, FAILED, Run, State


class Left(NamedTuple):
    """Time that is left."""

    seconds: float
    whole: bool
    """False where some experiment has not been timed yet, so that it will be more."""


class Clock:
    """Estimates the time left, from the time per epoch of each kind of run, and from what a run takes besides.

    Args:
        runs: All runs that are not done yet, with the epochs that they have on record.
        processes: How many go on at the same time.
    """

    def __init__(self, runs: Iterable[tuple[Run, int]], processes: int) -> None:
        self.processes = processes
        self.left = {run.name: (run, run.settings.epochs - epochs) for run, epochs in runs}
        # Sums of seconds and epochs, by experiment, level and flow, and by the beginnings of that.
        self.spent: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.last: dict[str, float | None] = {}
        self.trained: dict[str, float] = {}
        self.started: dict[str, float] = {}
        self.besides = [0.0, 0.0]

    def begun(self, run: Run, now: float) -> None:
        """A run was taken up."""
        self.started[run.name], self.last[run.name], self.trained[run.name] = now, None, 0.0

    def recorded(self, run: Run, record: Record) -> None:
        """A run has finished an epoch; its first one is not timed, since kernels may be compiled in it."""
        before = self.last[run.name]
        if before is not None:
            for key in self.keys(run):
                self.spent[key][0] += record.seconds - before
                self.spent[key][1] += 1
            self.trained[run.name] += record.seconds - before
        self.last[run.name] = record.seconds
        self.left[run.name] = (run, run.settings.epochs - record.epoch)

    def ended(self, run: Run, now: float) -> None:
        """A run is over, whatever its end."""
        self.left.pop(run.name, None)
        self.besides[0] += max(0.0, now - self.started.pop(run.name, now) - self.trained.get(run.name, 0.0))
        self.besides[1] += 1

    def estimate(self) -> Left | None:
        """Time left; None while nothing is known."""
        besides = self.besides[0] / self.besides[1] if self.besides[1] else 0.0
        lengths, whole = [], True
        for run, epochs in self.left.values():
            key = next((key for key in self.keys(run) if self.spent[key][1]), None)
            if key is None:
                whole = False
                continue
            seconds, count = self.spent[key]
            lengths.append(epochs * seconds / count + besides)
        if not lengths:
            return None if self.left else Left(0.0, True)
        return Left(max(sum(lengths) / self.processes, *lengths), whole)

    @staticmethod
    def keys(run: Run) -> Sequence[tuple]:
        """The kinds that a run belongs to, the closest first."""
        kind = (run.experiment, run.level, run.settings.flow)
        return kind, kind[:2], kind[:1]


class Display:
    """Progress on standard error: a line that is refreshed in a terminal, a line now and then elsewhere.

    Args:
        runs: All runs of the plan, with their states.
        processes: How many go on at the same time.
        stream: Where to write; standard error by default.
        every: Seconds between two lines where the stream is no terminal.
        now: Tells the time.
    """

    def __init__(
        self,
        runs: Sequence[tuple[Run, State]],
        processes: int,
        stream: TextIO | None = None,
        every: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.every, self.now = stream or sys.stderr, every, now
        self.terminal = self.stream.isatty()
        self.states = {run.name: state for run, state in runs}
        self.epochs = {run.name: run.settings.epochs for run, _ in runs}
        self.clock = Clock([(run, state.epochs) for run, state in runs if not state.counts], processes)
        self.running: set[str] = set()
        self.shown = float("-inf")

    def begun(self, run: Run) -> None:
        """A process has taken up a run."""
        self.running.add(run.name)
        self.states[run.name] = State(BEGUN, self.states[run.name].epochs)
        self.clock.begun(run, self.now())

    def recorded(self, run: Run, record: Record) -> None:
        """A run has finished an epoch."""
        self.states[run.name] = self.states[run.name]._replace(epochs=record.epoch)
        self.clock.recorded(run, record)
        self.waited()

    def ended(self, run: Run, state: State) -> None:
        """A run has ended; what went wrong gets a line of its own."""
        self.running.discard(run.name)
        self.states[run.name] = state
        self.clock.ended(run, self.now())
        if state.word in (DIVERGED, FAILED):
            self.say(f"{run.name} {state.word} after {state.epochs} epochs: {state.reason}")
        self.waited()

    def waited(self) -> None:
        """Show how things are, unless that was done a moment ago."""
        now = self.now()
        if now - self.shown >= (0.2 if self.terminal else self.every):
            self.show(now)

    def show(self, now: float) -> None:
        """Show how things are."""
        self.shown = now
        line = self.line()
        if self.terminal:
            # A line that wraps cannot be replaced.
            self.stream.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """Write a line of its own."""
        self.stream.write(f"\r\x1b[K{text}\n" if self.terminal else text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Show how things are at the end, and end the line."""
        self.show(self.now())
        if self.terminal:
            self.stream.write("\n")

    def line(self) -> str:
        """How things are, in a line."""
        states = self.states.values()
        done, words = sum(state.counts for state in states), [state.word for state in states]
        # A run that diverged has no epochs left.
        epochs = sum(self.epochs[name] if state.counts else state.epochs for name, state in self.states.items())
        total = sum(self.epochs.values())
        filled = 20 * epochs // max(1, total)
        parts = ["█" * filled + "░" * (20 - filled)] if self.terminal else []
        parts += [f"runs {done}/{len(words)}", f"epochs {epochs}/{total}", f"{len(self.running)} running"]
        parts += [f"{words.count(word)} {word}" for word in (DIVERGED, FAILED) if word in words]
        left = self.clock.estimate()
        if left is None:
            parts.append("timing the first runs")
        elif left.seconds:
            parts.append(f"{'about' if left.whole else 'more than'} {describe_time(left.seconds)} left")
        return "  ".join(parts)


def describe_time(seconds: float) -> str:
    """A time in words, as precise as an estimate can be.

    >>> [describe_time(seconds) for seconds in (8, 95, 4000, 40000)]
    ['8 s', '1 min 35 s', '1 h 07 min', '11 h']
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    if minutes < 60:
        return f"{round(seconds / 60)} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours < 10 else f"{round(seconds / 3600)} h"
