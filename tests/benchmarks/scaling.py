"""Cost against one size of the problem, and the exponent of its growth."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from tests.benchmarks.cases import PUBLISHED, Case, make_case
from tests.benchmarks.contestants import LABELS
from tests.benchmarks.settings import Settings
from tests.benchmarks.statistics import exponent, median
from tests.benchmarks.tables import Row, csv_table, markdown_table, number
from tests.benchmarks.turns import CoreRate, measure_case

HORIZONS = (10, 100, 1000, 10_000, 100_000)
POLES = (1, 2, 4, 8, 16, 32, 64)
POINTS = (16, 32, 64, 128, 256, 512, 1024)
AGENTS = ((2, 4), (4, 8), (8, 16), (16, 32), (32, 128))
BATCH, BATCH_FACTOR, MOST_BATCH = 8, 4, 4**12
"""Batch of a scaling against something else; growth and end of a scaling against the batch."""
CONTESTANTS = ("auto", "jax")
"""Who takes part where nobody was chosen: some sizes are too large for the fused backend."""


class Point(NamedTuple):
    """One case of a scaling."""

    size: int
    """What the cost is fitted against."""
    label: str
    case: Case


def points(kind: str, settings: Settings) -> Iterator[Point]:
    """Give the cases of a scaling, small ones first; the batch grows until the caller has enough."""
    system, flow, device = settings.system[0], settings.flow[-1], settings.device
    batch = settings.batch[0] if len(settings.batch) == 1 else BATCH
    match kind:
        case "horizon":
            for steps in HORIZONS:
                yield Point(steps, f"{steps} steps", make_case(system, flow, batch, device, steps=steps))
        case "poles":
            for poles in POLES:
                yield Point(poles, f"{poles} poles", make_case("cartpole", flow, batch, device, poles=poles))
        case "points":
            for count in POINTS:
                case = make_case("quantum", flow, batch, device, points=count)
                # dt / dx² stays: a finer grid alone would make the step stiff, and float32 too coarse to compare
                finer = (PUBLISHED["quantum"].sizes["points"] + 1) / (count + 1)
                yield Point(count, f"{count} points", replace(case, dt=case.dt * finer**2))
        case "agents":
            for drivers, evaders in AGENTS:
                case = make_case("repulsion", flow, batch, device, drivers=drivers, evaders=evaders)
                yield Point(drivers + evaders, f"{drivers} × {evaders} agents", case)
        case _:
            for count in itertools.takewhile(lambda n: n <= MOST_BATCH, (BATCH_FACTOR**i for i in itertools.count())):
                yield Point(count, f"batch {count}", make_case(system, flow, count, device))


def measure_scaling(
    kind: str, settings: Settings, rate: CoreRate, say: Callable[[str], None]
) -> tuple[list[Row], str, str]:
    """Measure a scaling; return its rows, and tables in Markdown and CSV.

    A contestant that fails at one size is not tried at larger ones; where none is left, the scaling ends. That is how
    the batch finds the limit of the memory.
    """
    names = settings.contestants if settings.contestants != Settings.contestants else CONTESTANTS
    measured: list[tuple[Point, Row]] = []
    for point in points(kind, settings):
        found = measure_case(point.case, replace(settings, contestants=names), rate, say)
        measured += [(point, row) for row in found]
        for row in found:
            say(f"  {LABELS[row.contestant]}: {number(median(row.ms))} ms {row.note}")
        names = tuple(row.contestant for row in found if row.ms)
        if not names:
            break
    rows = [row for _, row in measured]
    return rows, scaling_table(measured), csv_table(rows, rate.best)


def scaling_table(measured: Sequence[tuple[Point, Row]]) -> str:
    """A line per size, times and memory of every contestant; the exponents in the last line."""
    contestants = list(dict.fromkeys(row.contestant for _, row in measured))
    header, last = ["size"], ["exponent of the time"]
    for name in contestants:
        own = [(point.size, median(row.ms)) for point, row in measured if row.contestant == name and row.ms]
        header += [f"{LABELS[name]} [ms]", "[MB]"]
        last += [number(exponent(*zip(*own, strict=True)), 2) if len(own) > 1 else "–", ""]
    lines = []
    for point in dict.fromkeys(point.label for point, _ in measured):
        here = {row.contestant: row for at, row in measured if at.label == point}
        line, notes = [point], []
        for name in contestants:
            row = here.get(name)
            line += ["–", "–"] if row is None else [number(median(row.ms)), number(row.memory_mb)]
            notes += [f"{LABELS[name]}: {row.note}"] if row is not None and row.note else []
        lines.append([*line, "; ".join(notes)])
    return markdown_table([*header, "note"], [*lines, [*last, ""]], 1)
