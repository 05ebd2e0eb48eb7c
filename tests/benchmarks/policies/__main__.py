"""Policies of one's own on a cart with one pole: this engine, JAX as its users write it and torch eager, in turns.

    python -m tests.benchmarks.policies
    python -m tests.benchmarks.policies --policy "layer norm" attention --batch 8

An update is the loss at the end of 100 steps and its gradient by the flow, without an optimiser. Writes policies.md to
`out`. Status 1 where contestants disagree.
"""

import math
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controllers.commandline import Parser, add_flags
from tests.benchmarks.cases import Case, make_case
from tests.benchmarks.contestants import Candidate
from tests.benchmarks.policies.weights import POLICIES
from tests.benchmarks.processes import Failed, Worker, has_jax
from tests.benchmarks.settings import Settings
from tests.benchmarks.statistics import median, paired_ratio
from tests.benchmarks.tables import markdown_table, number
from tests.benchmarks.turns import Entry, Say, disagreement, fastest_of, take_turns

CONTESTANTS = ("fused", "general", "jax", "torch")
HEADER = (
    "policy", "flow", "batch", "fused ms", "CPU ms", "general ms", "JAX ms", "torch ms", "general / fused",
    "JAX / fused", "torch / fused", "JAX / fused, CPU", "note",
)  # fmt: skip
FIRST_HEADER = ("policy", "flow", "batch", "cold [s]", "warm [s]", "JAX [s]", "note")
STEPS, POLES = 100, 1


@dataclass(frozen=True)
class Chosen:
    """Which policies are measured, and for how long."""

    policy: tuple[str, ...] = tuple(POLICIES)
    """Policies, by name."""
    flow: tuple[str, ...] = ("R", "C")
    """Flows, by letter."""
    batch: tuple[int, ...] = (8, 256)
    """Batch sizes."""
    contestants: tuple[str, ...] = CONTESTANTS
    """Who takes part, of fused, general, jax and torch; updates are compared with those of the first one."""
    repeats: int = 11
    """Rounds of a case."""
    seconds: float = 10.0
    """Time after which no new round of a case begins, once there are three."""
    out: str = "out/benchmarks"
    """Folder of the table."""

    def __post_init__(self) -> None:
        """Check what the other settings do not."""
        for name, choices in (("policy", tuple(POLICIES)), ("contestants", CONTESTANTS)):
            for value in getattr(self, name):
                if value not in choices:
                    raise ValueError(f"{name} must be of {', '.join(choices)}, got {value!r}")

    @property
    def settings(self) -> Settings:
        """Those that the other benchmarks share."""
        return Settings(
            flow=self.flow,
            batch=self.batch,
            contestants=self.contestants,
            repeats=self.repeats,
            seconds=self.seconds,
        )


@dataclass
class Result:
    """A policy in a case."""

    policy: str
    case: Case
    cold_s: float = math.nan
    """First update with an empty kernel cache, reading and compiling included [s]; of a policy's first case only."""
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """A line of the table."""
        times = {name: entry.ms for name, entry in self.entries.items()}
        fused = times.get("fused", [])
        milliseconds = [number(median(times.get(name, []))) for name in CONTESTANTS]
        ratios = [number(paired_ratio(times.get(name, []), fused)) for name in CONTESTANTS[1:]]
        # of processor time: what others do on the core does not show
        cpu = {name: entry.cpu_ms for name, entry in self.entries.items()}
        ratios.append(number(paired_ratio(cpu.get("jax", []), cpu.get("fused", []))))
        milliseconds.insert(1, number(median(cpu.get("fused", []))))
        return [*self._case(), *milliseconds, *ratios, "; ".join(self.notes)]

    def first_cells(self) -> list[str]:
        """A line of the table of first updates."""
        found = [self.entries[name].first_s if name in self.entries else math.nan for name in ("fused", "jax")]
        return [*self._case(), *(number(value, 2) for value in (self.cold_s, *found)), ""]

    def _case(self) -> list[str]:
        return [self.policy, self.case.flow, str(self.case.batch)]


def candidates(contestant: str, policy: str, flow: str, kernels: str) -> list[Candidate]:
    """Return the programs of a contestant, of which the fastest one counts; they share a folder of kernels."""
    if contestant == "torch":
        return [Candidate("policies.eager", {"policy": policy})]
    if contestant == "jax":
        calls, platform = (1, 2) if flow == "C" else (1,), {"JAX_PLATFORMS": "cpu"}
        return [Candidate("policies.jax_peer", {"policy": policy, "calls": count}, platform) for count in calls]
    options = {"policy": policy, "backend": contestant}
    return [Candidate("policies.engine", options, {"WARP_CACHE_PATH": kernels})]


def measure(policy: str, case: Case, settings: Settings, kernels: str, cold: bool) -> Result:
    """Measure all contestants of a case; first, where it is asked for, an update before which there are no kernels."""
    result = Result(policy, case)
    try:
        for contestant in settings.contestants:
            if contestant == "jax" and not has_jax():
                result.notes.append("JAX is not installed")
                continue
            programs = candidates(contestant, policy, case.flow, kernels)
            try:
                if cold and contestant == "fused":
                    with Worker(programs[0], case, settings.pinned, 0.0) as worker:
                        result.cold_s = worker.ask("first", updates=1)["first_s"]
                result.entries[contestant] = fastest_of(contestant, programs, case, settings)
            except Failed as error:
                result.notes.append(f"{contestant}: {error}")
        entries = list(result.entries.values())
        take_turns(entries, settings)
        result.notes += filter(None, (entry.failure or disagreement(entry, entries[0]) for entry in entries))
        return result
    finally:
        for entry in result.entries.values():
            entry.worker.close()


def tables(results: Sequence[Result]) -> str:
    """Both tables as Markdown."""
    first = [result.first_cells() for result in results if math.isfinite(result.cold_s)]
    updates = markdown_table(HEADER, [result.cells() for result in results], 3)
    return f"{updates}\nFirst update:\n\n{markdown_table(FIRST_HEADER, first, 3)}"


def run(chosen: Chosen, say: Say) -> list[Result]:
    """Measure all cases, and write the tables after each."""
    results: list[Result] = []
    file = Path(chosen.out) / "policies.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    for policy in chosen.policy:
        with tempfile.TemporaryDirectory(prefix="benchmark-kernels-") as kernels:
            cases = [(batch, flow) for batch in chosen.batch for flow in chosen.flow]
            for batch, flow in cases:
                case = make_case("cartpole", flow, batch, poles=POLES, steps=STEPS)
                results.append(measure(policy, case, chosen.settings, kernels, (batch, flow) == cases[0]))
                say("  ".join(results[-1].cells()))
                file.write_text(tables(results), encoding="utf-8")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    texts = (__doc__ or "").partition("\n")
    parser = Parser(
        prog="python -m tests.benchmarks.policies",
        description=texts[0] + texts[2],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, Chosen)
    try:
        chosen = Chosen(**vars(parser.parse_args(arguments)))
        _ = chosen.settings
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    results = run(chosen, lambda text: print(text, file=sys.stderr, flush=True))
    print(tables(results))
    return int(any(note.startswith("WRONG") for result in results for note in result.notes))


if __name__ == "__main__":
    sys.exit(main())
