"""The benchmarks: this engine, JAX and torch in turns, every one in a process of its own.

    python -m tests.benchmarks --system cartpole --batch 8
    python -m tests.benchmarks --scaling horizon poles
    python -m tests.benchmarks --quick

Writes results.md and results.csv, or scaling-*.md and scaling-*.csv, to `out`. Status 1 where contestants disagree,
or where the quick mode finds a regression.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from controllers.commandline import Parser, add_flags
from tests.benchmarks import quick
from tests.benchmarks.scaling import measure_scaling
from tests.benchmarks.settings import Settings
from tests.benchmarks.tables import Row, csv_table, markdown_row, results_table
from tests.benchmarks.turns import CoreRate, measure_case


def parse(arguments: Sequence[str] | None) -> tuple[Settings, str]:
    """Read a command line: the settings, and "table", "quick" or "quick_update"."""
    texts = (__doc__ or "").partition("\n")
    parser = Parser(
        prog="python -m tests.benchmarks",
        description=texts[0] + texts[2],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, Settings)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="Compare a few ratios with those that are expected.")
    mode.add_argument("--quick-update", action="store_true", help="Expect from now on what these ratios are now.")
    given = vars(parser.parse_args(arguments))
    modes = {name: given.pop(name) for name in ("quick", "quick_update")}
    action = next((name for name, chosen in modes.items() if chosen), "table")
    try:
        settings = Settings(**given)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return settings, action


def measure_table(settings: Settings, rate: CoreRate, say: Callable[[str], None]) -> list[Row]:
    """Measure all cases, and write the tables after each."""
    rows: list[Row] = []
    for case in settings.cases():
        found = measure_case(case, settings, rate, say)
        rows += found
        for row in found:
            say("  " + "  ".join(markdown_row(row, rate.best)[3:]))
        write(settings, "results", results_table(rows, rate.best), csv_table(rows, rate.best), rate)
    return rows


def write(settings: Settings, name: str, markdown: str, table: str, rate: CoreRate) -> None:
    """Write one result as Markdown and CSV."""
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    rates = ", ".join(f"{library} {gflops:.0f}" for library, gflops in rate.gflops.items())
    (folder / f"{name}.md").write_text(f"{markdown}\nMatrix rate of the core [GFLOP/s]: {rates}.\n", encoding="utf-8")
    (folder / f"{name}.csv").write_text(table, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    settings, action = parse(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rate = CoreRate(settings.device, settings.pinned)
    try:
        if action != "table":
            return quick.run(settings, rate, action == "quick_update", say)
        rows: list[Row] = []
        for kind in settings.scaling:
            found, markdown, table = measure_scaling(kind, settings, rate, say)
            write(settings, f"scaling-{kind}", markdown, table, rate)
            print(markdown)
            rows += found
        if not settings.scaling:
            rows = measure_table(settings, rate, say)
            print(results_table(rows, rate.best))
        print(f"Matrix rate of the core: {rate.best:.0f} GFLOP/s. Tables in {settings.out}.")
        return int(any(row.note.startswith("WRONG") for row in rows))
    except KeyboardInterrupt:
        say("Stopped; what was finished is written.")
        return 130
    finally:
        rate.close()


if __name__ == "__main__":
    sys.exit(main())
