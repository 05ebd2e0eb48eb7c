"""Results as tables: Markdown to read, CSV to reckon with."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.cases import Case
from tests.benchmarks.contestants import LABELS
from tests.benchmarks.operations import operations
from tests.benchmarks.statistics import median, paired_ratio, quartiles

COLUMNS = (
    "system", "sizes", "steps", "flow", "batch", "contestant", "choice", "rounds", "ms_per_update", "ms_lower_quartile",
    "ms_upper_quartile", "cpu_ms_per_update", "ratio_to_first", "first_call_s", "peak_memory_mb", "gflops",
    "core_gflops", "fraction_of_core", "note",
)  # fmt: skip
HEADER = (
    "system", "flow", "batch", "contestant", "ms per update", "quartiles", "CPU ms", "ratio", "first call [s]",
    "memory [MB]", "of matrix rate", "note",
)  # fmt: skip
WORDS = 3 + 1
"""Columns of the header that hold words and whole numbers; numbers follow, and the note."""


@dataclass(frozen=True)
class Row:
    """What was measured of a contestant in a case."""

    case: Case
    contestant: str
    choice: str = ""
    """The contestant's own choice where it had one."""
    ms: tuple[float, ...] = ()
    """Wall time of an update in each round [ms]."""
    cpu_ms: tuple[float, ...] = ()
    """Processor time of an update in each round [ms]."""
    reference_ms: tuple[float, ...] = ()
    """Wall time of the first contestant in the same rounds [ms]."""
    first_s: float = math.nan
    memory_mb: float = math.nan
    note: str = ""

    @property
    def ratio(self) -> float:
        """Time by that of the first contestant, median over the rounds."""
        return paired_ratio(self.ms, self.reference_ms)

    @property
    def gflops(self) -> float:
        """Matrix operations that an update needs, by its time."""
        return operations(self.case) / median(self.ms) / 1e6


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent; a dash for none.

    >>> number(1.23456), number(0.01234), number(12345.6), number(float("nan"))
    ('1.23', '0.0123', '12346', '–')
    """
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def sizes_in_words(case: Case) -> str:
    """The system's sizes.

    >>> from tests.benchmarks.cases import make_case
    >>> sizes_in_words(make_case("repulsion", "R", 8))
    'drivers 2, evaders 4'
    """
    return ", ".join(f"{name} {value}" for name, value in case.sizes.items() if name != "target")


def markdown_row(row: Row, core_gflops: float) -> list[str]:
    """The cells of a row."""
    low, high = quartiles(row.ms)
    note = f"**{row.note}**" if row.note.startswith("WRONG") else row.note
    fraction = 100 * row.gflops / core_gflops
    return [
        f"{row.case.system}, {sizes_in_words(row.case)}",
        row.case.flow,
        str(row.case.batch),
        LABELS[row.contestant],
        number(median(row.ms)),
        f"{number(low)} – {number(high)}" if row.ms else "–",
        number(median(row.cpu_ms)),
        number(row.ratio),
        number(row.first_s, 2),
        number(row.memory_mb),
        f"{fraction:.1f} %" if math.isfinite(fraction) else "–",
        "; ".join(part for part in (row.choice, note) if part),
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Return a Markdown table; `words` columns at its left are aligned to the left, the last one too.

    >>> print(markdown_table(["who", "ms", "note"], [["a", "1.5", "x | y"]], 1), end="")
    | who | ms | note |
    | --- | ---: | --- |
    | a | 1.5 | x \\| y |
    """
    rules = ["---"] * words + ["---:"] * (len(header) - words - 1) + ["---"]
    lines = [header, rules, *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results_table(rows: Sequence[Row], core_gflops: float) -> str:
    """All rows as Markdown."""
    return markdown_table(HEADER, [markdown_row(row, core_gflops) for row in rows], WORDS)


def csv_table(rows: Sequence[Row], core_gflops: float) -> str:
    """All rows as CSV, numbers in full."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        case = row.case
        what = [case.system, sizes_in_words(case), case.steps, case.flow, case.batch, row.contestant, row.choice]
        times = [len(row.ms), median(row.ms), *quartiles(row.ms), median(row.cpu_ms), row.ratio]
        rates = [row.first_s, row.memory_mb, row.gflops, core_gflops, row.gflops / core_gflops]
        writer.writerow([*what, *[f"{value:.6g}" for value in times + rates], row.note])
    return file.getvalue()
