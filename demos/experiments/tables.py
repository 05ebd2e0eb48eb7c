"""Results as tables: every epoch of every run, one line per run, and a summary for tools and for readers."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from controllers.checkpoint import atomic_write
from controllers.record import Record
from demos.experiments.plan import FAILED, FLOW_ORDER, SHARED, Run, level_text
from demos.experiments.published import EXPERIMENTS
from demos.experiments.results import LAST, Group, Result, group_results
from warp_phys.flow import resolve

IDENTITY = ("experiment", "level", "flow", "clip", "seed", "shuffle")
"""Columns that say which run a line belongs to."""
EPOCHS, RUNS, SUMMARY, READABLE = "epochs.csv", "runs.csv", "summary.csv", "summary.md"


def write_tables(out: str | Path, results: Sequence[Result]) -> list[Path]:
    """Write all tables into a folder; returns their paths."""
    folder, groups = Path(out), group_results(results)
    write_epochs(folder / EPOCHS, results)
    write_csv(folder / RUNS, [*IDENTITY, *RUN_COLUMNS], (run_line(result) for result in results))
    write_csv(folder / SUMMARY, SUMMARY_COLUMNS, (summary_line(group) for group in groups))
    with atomic_write(folder / READABLE) as file:
        file.write(summarise(results).encode())
    return [folder / name for name in (EPOCHS, RUNS, SUMMARY, READABLE)]


def identity(run: Run) -> list[Any]:
    """Values of the columns that name a run."""
    settings = run.settings
    return [run.experiment, level_text(run.level), settings.flow, settings.clip, settings.seed, int(settings.shuffle)]


def write_epochs(path: Path, results: Iterable[Result]) -> None:
    """Write every epoch of every run, unfinished ones included, with all digits of the records."""
    with atomic_write(path) as file:
        file.write((",".join([*IDENTITY, *Record._fields, "best_test_loss"]) + "\n").encode())
        for result in results:
            prefix = ",".join(map(str, identity(result.run)))
            for row, best in zip(result.rows, result.best.tolist(), strict=True):
                file.write(f"{prefix},{row},{best!r}\n".encode())


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table of comma separated values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


RUN_COLUMNS = ("state", "epochs", "final_test_loss", "best_test_loss", "seconds", "reason")


def run_line(result: Result) -> list[Any]:
    """One run: a final test loss has it once it counts."""
    seconds = result.rows[-1].split(",")[Record._fields.index("seconds")] if result.rows else ""
    final = number(result.final, 6) if result.state.counts else ""
    best = number(result.best[-1], 6) if result.rows else ""
    state = result.state
    return [*identity(result.run), state.word, len(result.rows), final, best, seconds, state.reason]


SUMMARY_COLUMNS = (
    "experiment",
    "level",
    "shuffle",
    "flow",
    "clip",
    "runs",
    "diverged",
    "unfinished",
    "final_lower_quartile",
    "final_median",
    "final_upper_quartile",
    "best_median",
)


def summary_line(group: Group) -> list[Any]:
    """One group of runs; no numbers where none of them counts."""
    numbers = [number(value, 6) if group.results else "" for value in (*group.finals, group.best)]
    key = [group.experiment, level_text(group.level), int(group.shuffle), group.flow, group.clip]
    return [*key, len(group.results), group.diverged, group.unfinished, *numbers]


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, "inf" for infinity.

    >>> number(0.0065923), number(97.345), number(math.inf), number(128.4)
    ('0.00659', '97.3', 'inf', '128')
    """
    return f"{value:.{digits}g}"


def summarise(results: Sequence[Result]) -> str:
    """The summary in Markdown: a section per experiment, its medians in one table, all numbers in another."""
    if not results:
        return "No runs yet.\n"
    settings = results[0].run.settings
    sizes = ", ".join(f"{getattr(settings, name)} {name.replace('_', ' ')}" for name in SHARED)
    last = max(1, settings.epochs // LAST)
    epochs = "epoch" if last == 1 else f"{last} epochs"
    parts = [
        f"Every run: {sizes}. Its final test loss is the median of the last {epochs};\n"
        "that of a run that diverged counts as infinite. “Best”: the lowest test loss of a run, the median over runs.\n"
        "Medians and quartiles are over seeds, and over clipping modes where clipping is “all”.\n"
    ]
    for shuffle in (False, True):
        for name in EXPERIMENTS:
            own = [result for result in results if result.run.experiment == name]
            own = [result for result in own if result.run.settings.shuffle == shuffle]
            if own:
                parts.append(section(name, shuffle, own))
    return "\n".join(parts)


def section(name: str, shuffle: bool, results: Sequence[Result]) -> str:
    """The summary of one experiment."""
    experiment, groups = EXPERIMENTS[name], group_results(results)
    title = experiment.title + (", batches shuffled" if shuffle else "")
    lines = [f"## {title}", "", f"Test loss: {experiment.loss}.", "", *medians(experiment.label, groups), ""]
    header = [experiment.label, "flow", "clipping", "runs", "diverged", "lower quartile", "median", "upper quartile"]
    lines += table([*header, "best"], (detail(group) for group in groups if group.results))
    waiting = [result for result in results if not result.state.counts]
    if waiting:
        lines += ["", f"Not counted, since not finished: {len(waiting)} of {len(results)} runs."]
        failed = [result for result in waiting if result.state.word == FAILED]
        lines += ["", *(f"- failed: {result.run.name}: {result.state.reason}" for result in failed)] if failed else []
    return "\n".join(lines) + "\n"


def medians(label: str, groups: Sequence[Group]) -> list[str]:
    """A table of medians over all runs: a line per level, a column per flow, the lowest of a line in bold."""
    flows = [flow for flow in FLOW_ORDER if any(group.flow == flow for group in groups)]
    lines = []
    for level in dict.fromkeys(group.level for group in groups):
        # The last group of a flow is the widest one.
        widest = {group.flow: group for group in groups if group.level == level and group.results}
        values = {flow: group.finals[1] for flow, group in widest.items()}
        texts = {flow: number(value) for flow, value in values.items()}
        lowest = number(min(values.values(), default=math.inf))
        # Flows that are level as printed are all in bold, or none where that is all of them.
        bold = [flow for flow, text in texts.items() if text == lowest and lowest not in ("inf", "nan")]
        bold = bold if len(bold) < len(texts) else []
        cells = [f"**{texts[flow]}**" if flow in bold else texts.get(flow, "–") for flow in flows]
        counts = {len(group.results) for group in widest.values()} or {0}
        runs = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        lines.append([level_text(level), *cells, runs])
    return table([label, *map(flow_title, flows), "runs each"], lines)


def detail(group: Group) -> list[str]:
    """One line of the table of all numbers."""
    numbers = [number(value) for value in (*group.finals, group.best)]
    return [
        level_text(group.level),
        flow_title(group.flow),
        group.clip,
        str(len(group.results)),
        str(group.diverged),
        *numbers,
    ]


def flow_title(flow: str) -> str:
    """A flow's letter and name, or its name alone.

    >>> flow_title("combined"), flow_title("minmod")
    ('C combined', 'minmod')
    """
    return f"{resolve(flow).letter} {flow}".strip()


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '| --- | --- |', '| 1 | 2 |']
    """
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]
