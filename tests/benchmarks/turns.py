"""A case, measured: all contestants in turns, A B C A B C …, so that what disturbs one disturbs all."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.benchmarks.cases import Case
from tests.benchmarks.contestants import LABELS, NEEDS_JAX, Candidate, candidates
from tests.benchmarks.matrix_rate import LIBRARIES
from tests.benchmarks.processes import Failed, Worker, default_memory_limit, has_jax
from tests.benchmarks.settings import Settings
from tests.benchmarks.statistics import relative_difference
from tests.benchmarks.tables import Row

TURN_SECONDS = 0.1
"""A turn has as many updates as fit into this, one at least: long against the change of processes."""
PROBES = 5
"""Turns by which the fastest of a contestant's candidates is chosen."""
SLOW_MS = 1e3
"""An update that takes longer is probed once."""
LEAST_ROUNDS = 3
TOLERANCE = 1e-3
"""Largest difference of loss and update between contestants, by norm."""
UNDECIDED = 0.01
"""Largest share of C's components that are zero for one contestant only: where M or R is nearly zero, rounding decides
whether their signs agree. They are left out of the norms."""

Say = Callable[[str], None]


@dataclass
class Entry:
    """A contestant in its process, and its times."""

    contestant: str
    worker: Worker
    first_s: float
    memory_mb: float
    updates: int
    """Updates in a turn."""
    probe_ms: float
    """Shortest time of an update so far."""
    arrays: list[np.ndarray]
    """Loss and update at the initial weights."""
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    failure: str = ""

    def take_turn(self) -> None:
        """Measure once more."""
        answer = self.worker.ask("turn", updates=self.updates)
        self.ms.append(answer["ms"])
        self.cpu_ms.append(answer["cpu_ms"])


class CoreRate:
    """The core's matrix rate: the best that any library has reached so far in this run."""

    def __init__(self, device: str, core: int | None):
        self.gflops: dict[str, float] = {}
        self.workers: dict[str, Worker] = {}
        for library in LIBRARIES[device.partition(":")[0]]:
            if library == "xla" and not has_jax():
                continue
            candidate = Candidate("matrix_rate", {"library": library}, {"JAX_PLATFORMS": "cpu"})
            with contextlib.suppress(Failed):
                self.workers[library] = Worker(candidate, None, core, 0.0)

    def measure(self, times: int = 1) -> None:
        """Measure every library a number of times, in turns."""
        for _ in range(times):
            for library, worker in self.workers.items():
                found = worker.ask("rate")["gflops"]
                self.gflops[library] = max(found, self.gflops.get(library, 0.0))

    @property
    def best(self) -> float:
        """The rate in GFLOP/s; nan where no library could be measured."""
        return max(self.gflops.values(), default=math.nan)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers.values():
            worker.close()


def measure_case(case: Case, settings: Settings, rate: CoreRate, say: Say) -> list[Row]:
    """Measure all contestants of a case; those that cannot take part have a row that says why."""
    entries: list[Entry] = []
    failures: dict[str, str] = {}
    say(f"{case.name}:")
    try:
        for contestant in settings.contestants:
            if contestant in NEEDS_JAX and not has_jax():
                failures[contestant] = "JAX is not installed"
                continue
            say(f"  {LABELS[contestant]} …")
            try:
                entries.append(fastest(contestant, case, settings))
            except Failed as error:
                failures[contestant] = str(error)
        rate.measure(2)
        take_turns(entries, settings)
        rate.measure(2)
        return make_rows(case, settings.contestants, entries, failures)
    finally:
        for entry in entries:
            entry.worker.close()


def fastest(contestant: str, case: Case, settings: Settings) -> Entry:
    """Start a contestant's candidates one after the other, and keep the fastest one.

    Raises:
        Failed: None could be started.
    """
    return fastest_of(contestant, candidates(contestant, case), case, settings)


def fastest_of(contestant: str, programs: Sequence[Candidate], case: Case, settings: Settings) -> Entry:
    """Do the same with candidates that are given."""
    entries: list[Entry] = []
    reason = ""
    for candidate in programs:
        try:
            entries.append(start(contestant, candidate, case, settings))
        except Failed as error:
            reason = str(error)
            continue
        entries.sort(key=lambda entry: entry.probe_ms)
        for slower in entries[1:]:
            slower.worker.close()
        del entries[1:]
    if not entries:
        raise Failed(reason)
    return entries[0]


def start(contestant: str, candidate: Candidate, case: Case, settings: Settings) -> Entry:
    """Start a candidate: first call, loss and update, a few turns to see how long one takes."""
    worker = Worker(candidate, case, settings.pinned, settings.memory_bytes or default_memory_limit())
    try:
        first_s = worker.ask("first", updates=candidate.inner)["first_s"]
        memory_mb = worker.ask("memory")["memory_mb"]
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            file = Path(folder) / "update.npz"
            worker.ask("check", file=str(file))
            with np.load(file) as saved:
                arrays = [saved[name] for name in saved.files]
        once = worker.ask("turn", updates=candidate.inner)
        updates = candidate.inner * max(1, round(1e3 * TURN_SECONDS / (once["ms"] * candidate.inner)))
        slow = once["ms"] > SLOW_MS
        probes = [once] if slow else [worker.ask("turn", updates=updates) for _ in range(PROBES)]
    except BaseException:
        worker.close()
        raise
    # These do not take turns: on a CPU its own time tells less of what else the machine does.
    probe_ms = min(probe["cpu_ms" if case.device == "cpu" else "ms"] for probe in probes)
    return Entry(contestant, worker, first_s, memory_mb, updates, probe_ms, arrays)


def take_turns(entries: Sequence[Entry], settings: Settings) -> None:
    """Let all have their turns: `repeats` rounds, or as many as the time allows, three at least.

    An update that would use up a third of the time by itself is measured once.
    """
    end = time.monotonic() + settings.seconds
    for turn in range(settings.repeats):
        if turn >= LEAST_ROUNDS and time.monotonic() > end:
            return
        for entry in entries:
            slow = entry.probe_ms * 1e-3 * LEAST_ROUNDS > settings.seconds
            if entry.failure or (slow and turn > 0):
                continue
            try:
                entry.take_turn()
            except Failed as error:
                entry.failure = str(error)


def make_rows(case: Case, contestants: Sequence[str], entries: Sequence[Entry], failures: dict[str, str]) -> list[Row]:
    """Return a row for every contestant; the first one that took part is what the others are compared with."""
    found = {entry.contestant: entry for entry in entries}
    rows = []
    for contestant in contestants:
        if contestant not in found:
            rows.append(Row(case, contestant, note=failures.get(contestant, "")))
            continue
        entry, reference = found[contestant], entries[0]
        rows.append(
            Row(
                case,
                contestant,
                choice=entry.worker.candidate.label if contestant == "jax-tuned" else "",
                ms=tuple(entry.ms),
                cpu_ms=tuple(entry.cpu_ms),
                reference_ms=tuple(reference.ms),
                first_s=entry.first_s,
                memory_mb=entry.memory_mb,
                note=entry.failure or disagreement(entry, reference),
            )
        )
    return rows


def disagreement(entry: Entry, reference: Entry) -> str:
    """Say how far loss and update are from those of the reference, if too far."""
    loss = relative_difference(entry.arrays[:1], reference.arrays[:1])
    own, other = (np.concatenate([array.ravel() for array in each.arrays[1:]]) for each in (entry, reference))
    decided = (own == 0) == (other == 0)
    if 1 - decided.mean() > UNDECIDED:
        decided[:] = True
    update = relative_difference([own[decided]], [other[decided]])
    if max(loss, update) <= TOLERANCE:
        return ""
    return f"WRONG: differs from {LABELS[reference.contestant]}, loss by {loss:.1e}, update by {update:.1e}"
