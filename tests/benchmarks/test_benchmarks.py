"""The benchmarks' own code, without timing: cases, operation counts, statistics, turns, tables, guards."""

import csv
import dataclasses
import doctest
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import quick
from tests.benchmarks.__main__ import parse
from tests.benchmarks.cases import FLOWS, PUBLISHED, make_batches, make_case, make_weights, state_size
from tests.benchmarks.contestants import DROPPED, Candidate, candidates, full_environment
from tests.benchmarks.engine import make_controller
from tests.benchmarks.operations import multiply_adds, operations
from tests.benchmarks.processes import Failed, Worker
from tests.benchmarks.scaling import Point, points, scaling_table
from tests.benchmarks.settings import SCALINGS, Settings
from tests.benchmarks.statistics import exponent, median, paired_ratio, quartiles, relative_difference
from tests.benchmarks.tables import COLUMNS, HEADER, Row, csv_table, markdown_row, number, results_table
from tests.benchmarks.turns import Entry, disagreement, make_rows, take_turns
from warp_phys.interop.torch.chain import read_plan
from warp_phys.systems import SYSTEMS

SMALL = {"cartpole": {"poles": 1}, "repulsion": {"drivers": 1, "evaders": 2}, "quantum": {"points": 16}}
DOCTESTED = ("cases", "instructions", "operations", "quick", "statistics", "tables")


def systems_and_sizes():
    return [(name, sizes) for name in PUBLISHED for sizes in ({}, SMALL[name])]


@pytest.mark.parametrize("name", DOCTESTED)
def test_doctests(name):
    results = doctest.testmod(importlib.import_module(f"tests.benchmarks.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(("name", "sizes"), systems_and_sizes())
def test_cases_fit_the_engine(name, sizes):
    """Sizes, batches and the count of multiply-adds are those of the engine's own systems and controllers."""
    case = make_case(name, "R", 8, **sizes)
    system = SYSTEMS[name](**case.sizes, dt=case.dt)
    controller = make_controller(system, case)
    assert state_size(case) == system.state_size
    assert len(make_batches(case)) == 32
    assert all(batch.shape == (8, system.state_size) and batch.dtype == np.float32 for batch in make_batches(case))
    shapes = [tuple(parameter.shape) for parameter in controller.parameters()]
    assert [array.shape[::-1] for array in make_weights(case)] == shapes
    assert multiply_adds(case)[0] == read_plan(controller, system.state_size).plan.multiply_adds


def test_operations_by_flow():
    counts = {flow: operations(make_case("cartpole", flow, 8)) for flow in FLOWS}
    m, m1, n = 10 * 100 + 100 * 100 + 100, 10 * 100, 8 * 100
    assert counts == {"R": 6 * m * n, "M": (6 * m - 2 * m1) * n, "C": (10 * m - 2 * m1) * n}


def test_a_longer_horizon_is_the_same_time():
    case = make_case("cartpole", "R", 8, steps=10_000)
    assert case.steps * case.dt == pytest.approx(1.0)


def test_statistics():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert math.isnan(median([]))
    assert quartiles([0.0, 1.0, 2.0, 3.0, 4.0]) == (1.0, 3.0)
    # a disturbance that lasts through a round does not change the ratio; rounds of one alone do not count
    assert paired_ratio([2.0, 200.0, 2.0], [1.0, 100.0]) == 2.0
    assert exponent([1, 10, 100], [5.0, 50.0 * 10, 500.0 * 100]) == pytest.approx(2.0)
    assert math.isnan(exponent([1], [1.0]))
    assert relative_difference([np.array([3.0, 4.0])], [np.array([3.0, 3.0])]) == pytest.approx(1 / math.sqrt(18))
    assert relative_difference([np.array([math.nan])], [np.array([1.0])]) == math.inf


class FakeWorker:
    """Answers without work, and writes down who was asked."""

    def __init__(self, name, log, fails_after=99):
        self.name, self.log, self.fails_after = name, log, fails_after
        self.candidate = Candidate("fake")

    def ask(self, do, updates):
        self.log.append(self.name)
        if self.log.count(self.name) > self.fails_after:
            raise Failed("out of memory")
        return {"ms": 2.0 if self.name == "b" else 1.0, "cpu_ms": 0.5}


def entry(contestant, name, log, probe_ms=1.0, **options):
    return Entry(contestant, FakeWorker(name, log, **options), 1.5, 20.0, 10, probe_ms, [np.array(1.0), np.ones(3)])


def test_turns_alternate():
    log = []
    entries = [entry("fused", "a", log), entry("jax", "b", log), entry("torch", "c", log, probe_ms=1e6)]
    take_turns(entries, Settings(repeats=4))
    assert "".join(log) == "abcababab"  # an update that takes too long is measured once
    rows = make_rows(make_case("cartpole", "R", 8), ("fused", "jax", "general", "torch"), entries, {"general": "why"})
    assert [row.note for row in rows] == ["", "", "why", ""]
    assert [row.ratio for row in rows[:2]] == [1.0, 2.0]
    assert rows[0].gflops == pytest.approx(operations(rows[0].case) * 1e-6)


def test_time_ends_the_rounds_and_failures_are_told():
    log = []
    entries = [entry("fused", "a", log, probe_ms=0.0), entry("jax", "b", log, probe_ms=0.0, fails_after=1)]
    take_turns(entries, Settings(repeats=50, seconds=0.0))
    assert "".join(log) == "ababa"
    assert [len(entry.ms) for entry in entries] == [3, 1]
    assert entries[1].failure == "out of memory"


def test_contestants_that_differ_are_told_loudly():
    good, bad = entry("fused", "a", []), entry("jax", "b", [])
    assert disagreement(bad, good) == ""
    bad.arrays = [np.array(1.0), np.array([1.0, 1.0, 1.01])]
    note = disagreement(bad, good)
    bad.arrays, good.arrays = ([np.array(1.0), np.arange(1000) >= zeros] for zeros in (1, 5))
    assert disagreement(bad, good) == ""  # rounding decided a few signs
    good.arrays = [np.array(1.0), np.arange(1000) >= 50]
    assert disagreement(bad, good)
    assert note.startswith("WRONG: differs from this engine, fused")
    row = Row(make_case("cartpole", "R", 8), "jax", ms=(1.0,), reference_ms=(1.0,), note=note)
    assert markdown_row(row, 100.0)[-1] == f"**{note}**"


def test_tables():
    case = make_case("cartpole", "R", 8)
    rows = [
        Row(
            case, "fused", ms=(1.0, 2.0, 3.0), cpu_ms=(1.0,), reference_ms=(1.0, 2.0, 3.0), first_s=2.0, memory_mb=30.0
        ),
        Row(case, "jax", note="JAX is not installed"),
    ]
    lines = results_table(rows, 100.0).splitlines()
    assert [line.count("|") for line in lines] == [len(HEADER) + 1] * 4
    assert "| 2.00 | 1.50 – 2.50 | 1.00 | 1.00 | 2.0 | 30.0 | 26.6 % |" in lines[2]
    assert lines[3].endswith("| JAX as written | – | – | – | – | – | – | – | JAX is not installed |")
    read = list(csv.DictReader(csv_table(rows, 100.0).splitlines()))
    assert tuple(read[0]) == COLUMNS
    assert (read[0]["ms_per_update"], read[0]["fraction_of_core"], read[1]["note"]) == (
        "2", "0.2664", "JAX is not installed",
    )  # fmt: skip
    assert number(0.0) == "0"


@pytest.mark.parametrize("kind", SCALINGS)
def test_scalings_grow(kind):
    settings = Settings(system=("cartpole",), batch=(4,))
    sizes = [point.size for point in points(kind, settings)]
    assert sizes == sorted(sizes) and len(sizes) >= 5


def test_scaling_table_fits_exponents():
    measured = []
    for poles, ms in ((1, 1.0), (10, 10.0), (100, 100.0)):
        case = make_case("cartpole", "C", 8, poles=poles)
        measured += [(Point(poles, f"{poles} poles", case), Row(case, "fused", ms=(ms,)))]
    measured += [(measured[-1][0], Row(case, "jax", note="out of memory"))]
    lines = scaling_table(measured).splitlines()
    assert lines[-1] == "| exponent of the time | 1.0 |  | – |  |  |"
    assert lines[-2] == "| 100 poles | 100 | – | – | – | JAX as written: out of memory |"


def test_the_command_line_checks():
    settings, action = parse(["--system", "quantum", "--batch", "1", "8", "--flow", "C", "--quick"])
    assert (settings.batch, settings.flow, action) == ((1, 8), ("C",), "quick")
    assert parse(["--quick-update"])[1] == "quick_update"
    assert parse([])[1] == "table"
    assert len(Settings().cases()) == 3 * 5 * 3
    for arguments in (["--system", "pendulum"], ["--batch", "0"], ["--contestants"], ["--scaling", "time"]):
        with pytest.raises(SystemExit):
            parse(arguments)


def test_nobody_is_favoured_by_the_callers_environment(monkeypatch):
    for name in DROPPED:
        monkeypatch.setenv(name, "1")
    assert not set(DROPPED) & set(full_environment({}))
    tuned = candidates("jax-tuned", make_case("repulsion", "C", 8))
    assert [candidate.label.split(",")[0] for candidate in tuned] == ["plain", "shared", "deferred"]
    assert [candidate.inner for candidate in tuned] == [8, 8, 8]
    assert candidates("jax-tuned", make_case("repulsion", "R", 64))[0].inner == 1


def test_a_worker_answers_or_says_why_not():
    with Worker(Candidate("matrix_rate", {"library": "openblas"}), None, None, 0.0) as worker:
        assert worker.ask("rate")["gflops"] > 0
        worker.process.kill()
        with pytest.raises(Failed, match="status"):
            worker.ask("rate")
    with pytest.raises(Failed, match="no_such_program"):
        Worker(Candidate("no_such_program"), None, None, 0.0)


def test_the_guard_finds_regressions():
    expected = json.loads(quick.EXPECTED.read_text())
    assert set(expected) == {make_case(system, flow, quick.BATCH).name for system, flow in quick.CASES}
    assert not any(line.startswith("REGRESSION") for line in quick.compare(expected, expected))
    worse = {name: {key: 0.4 * value for key, value in numbers.items()} for name, numbers in expected.items()}
    lines = quick.compare(worse, expected)
    assert all(line.startswith("REGRESSION") for line in lines if "instructions" not in line)
    more = quick.compare({"a": {"instructions, x": 2.0}}, {"a": {"instructions, x": 1.0}})
    assert more[0].startswith("REGRESSION")
    assert quick.compare({"a": {"fraction": 1.0}}, {})[0].startswith("new")


def test_every_setting_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Settings):
        assert f"`--{field.name.replace('_', '-')}`" in page
