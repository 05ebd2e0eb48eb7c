"""Gradients of two parameters of a cart with one pole, and of a network's weights: this engine and JAX, in turns.

    python -m tests.benchmarks.parameters

64 samples, 50 steps, layers of 64 and 64. Status 1 where contestants disagree.
"""

import sys
import tempfile

from tests.benchmarks.cases import make_case
from tests.benchmarks.contestants import Candidate
from tests.benchmarks.settings import Settings
from tests.benchmarks.statistics import median, paired_ratio
from tests.benchmarks.tables import markdown_table, number
from tests.benchmarks.turns import Entry, disagreement, fastest_of, take_turns

CONTESTANTS = ("fused", "general", "jax")
HEADER = ("parameters", "flow", "fused ms", "general ms", "JAX ms", "JAX / fused", "JAX / fused, CPU", "note")
BATCH, STEPS = 64, 50


def candidates(contestant: str, flow: str, per_sample: bool, kernels: str) -> list[Candidate]:
    """Return the programs of a contestant, of which the fastest one counts; they share a folder of kernels."""
    if contestant != "jax":
        options = {"backend": contestant, "per_sample": per_sample}
        return [Candidate("parameters.engine", options, {"WARP_CACHE_PATH": kernels})]
    calls, platform = (1, 2) if flow == "C" else (1,), {"JAX_PLATFORMS": "cpu"}
    return [Candidate("parameters.jax_peer", {"per_sample": per_sample, "calls": count}, platform) for count in calls]


def measure(flow: str, per_sample: bool, settings: Settings, kernels: str) -> list[str]:
    """Measure all contestants; return a line of the table."""
    case, entries = make_case("cartpole", flow, BATCH, poles=1, steps=STEPS), list[Entry]()
    try:
        for contestant in CONTESTANTS:
            programs = candidates(contestant, flow, per_sample, kernels)
            entries.append(fastest_of(contestant, programs, case, settings))
        take_turns(entries, settings)
        fused, _, jax = entries
        notes = [entry.failure or disagreement(entry, fused) for entry in entries]
        times = [number(median(entry.ms)) for entry in entries]
        ratios = [number(paired_ratio(jax.ms, fused.ms)), number(paired_ratio(jax.cpu_ms, fused.cpu_ms))]
        return ["one per sample" if per_sample else "one set", flow, *times, *ratios, "; ".join(filter(None, notes))]
    finally:
        for entry in entries:
            entry.worker.close()


def run(settings: Settings, kernels: str) -> list[list[str]]:
    """Return the lines of the table."""
    return [measure(flow, each, settings, kernels) for flow in settings.flow for each in (False, True)]


def main() -> int:
    """Run the program; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="benchmark-kernels-") as kernels:
        lines = run(Settings(flow=("R", "C"), seconds=10.0), kernels)
    print(markdown_table(HEADER, lines, 2))
    return int(any("WRONG" in line[-1] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
