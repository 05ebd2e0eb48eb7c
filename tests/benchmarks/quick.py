"""A guard against regressions in minutes, by numbers that do not depend on how fast or busy the machine is.

For a few cases: how much faster the fused backend is than the general one; the rate of the fused backend as a fraction
of the core's matrix rate, best against best; and, where the processor counts them, instructions of an update, for one
kind of processor.
"""

import json
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.cases import Case, make_case
from tests.benchmarks.contestants import candidates
from tests.benchmarks.instructions import count_instructions
from tests.benchmarks.operations import operations
from tests.benchmarks.processes import Failed, Worker
from tests.benchmarks.settings import Settings
from tests.benchmarks.turns import CoreRate, measure_case

CASES = (("cartpole", "R"), ("cartpole", "C"), ("repulsion", "C"), ("quantum", "C"))
BATCH, REPEATS = 8, 11
EXPECTED = Path(__file__).with_name("expected.json")
MARGINS = {"general_by_fused": 1.6, "fraction": 2.0, "instructions": 1.25}
"""Factors by which a number may be worse than expected. Ratios of two programs move by tens of percent between
processors and under noise, the fraction of the matrix rate more; instructions hardly, on the same kind of processor."""
LOWER_IS_BETTER = ("instructions",)
COUNTED_UPDATES = 50

Numbers = dict[str, float]


def run(settings: Settings, rate: CoreRate, update: bool, say: Callable[[str], None]) -> int:
    """Measure, then compare with what is expected, or expect it from now on; returns the exit status."""
    settings = replace(settings, contestants=("fused", "general"), repeats=REPEATS)
    measured = {}
    for system, flow in CASES:
        case = make_case(system, flow, BATCH)
        try:
            measured[case.name] = measure(case, settings, rate, say)
        except Failed as error:
            print(f"FAILED      {case.name}: {error}")
            return 1
    if update:
        EXPECTED.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        say(f"Written: {EXPECTED.name}.")
        return 0
    lines = compare(measured, json.loads(EXPECTED.read_text(encoding="utf-8")))
    for line in lines:
        print(line)
    failed = any(line.startswith("REGRESSION") for line in lines)
    print("Something became slower." if failed else "Nothing became slower.")
    return int(failed)


def measure(case: Case, settings: Settings, rate: CoreRate, say: Callable[[str], None]) -> Numbers:
    """Return the numbers of a case.

    Raises:
        Failed: A backend failed, or the two disagree.
    """
    fused, general = measure_case(case, settings, rate, say)
    if fused.note or general.note:
        raise Failed("; ".join(filter(None, (fused.note, general.note))))
    # processor time, best against best: what else runs on the core counts for neither
    gflops = operations(case) / min(fused.cpu_ms) / 1e6
    found = {"general_by_fused": general.ratio, "fraction": gflops / rate.best}
    count = instructions_per_update(case, settings)
    if count is not None:
        found[instructions_name()] = count
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def instructions_per_update(case: Case, settings: Settings) -> float | None:
    """Count the fused backend's instructions."""
    (candidate,) = candidates("fused", case)
    with Worker(candidate, case, settings.pinned, 0.0) as worker:
        worker.ask("first", updates=1)
        count = count_instructions(worker.process.pid, lambda: worker.ask("turn", updates=COUNTED_UPDATES))
    return None if count is None else count / COUNTED_UPDATES


def instructions_name() -> str:
    """The number's name: instructions of processors with longer vectors are fewer."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        flags = ""
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), "plain")
    return f"instructions, {platform.machine()} {vectors}"


def compare(measured: dict[str, Numbers], expected: dict[str, Numbers]) -> list[str]:
    """Return a line for every number that is expected or measured; those of regressions begin with that word.

    >>> compare({"a": {"fraction": 0.1}}, {"a": {"fraction": 0.3}})
    ['REGRESSION  a: fraction is 0.1, expected 0.3, may be 2 times worse']
    """
    lines = []
    for name, numbers in measured.items():
        for key, value in numbers.items():
            wanted = expected.get(name, {}).get(key)
            if wanted is None:
                lines.append(f"new         {name}: {key} is {value:g}, nothing is expected")
                continue
            kind = key.partition(",")[0]
            worse = value / wanted if kind in LOWER_IS_BETTER else wanted / value
            word = "ok" if math.isfinite(worse) and worse <= MARGINS[kind] else "REGRESSION"
            limit = f"may be {MARGINS[kind]:g} times worse"
            lines.append(f"{word:10}  {name}: {key} is {value:g}, expected {wanted:g}, {limit}")
    return lines
