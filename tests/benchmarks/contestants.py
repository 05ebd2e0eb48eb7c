"""Who takes part: each contestant is a program in a process of its own, with its own environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.cases import Case

TUNED_XLA = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=10000000"
"""XLA compiles whole loops over time as one function."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
"""The C library keeps memory that is freed: no page faults at every update."""
INNER = 8
"""Updates of one call for the smallest batches, of this engine's fused backend and of JAX tuned by hand."""
DROPPED = ("OPENBLAS_CORETYPE", "XLA_FLAGS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
"""Variables of the caller that would favour or hinder someone."""


@dataclass(frozen=True)
class Candidate:
    """A program to start: the module under `tests.benchmarks` with a class `Program`, and what it is given."""

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def inner(self) -> int:
        """Updates that the program does in one go."""
        return int(self.options.get("inner", 1))

    @property
    def label(self) -> str:
        """The candidate's own choices, in words."""
        named = {"variant": "{}", "inner": "{} updates a call", "by_hand": "forces differentiated by hand"}
        return ", ".join(text.format(self.options[name]) for name, text in named.items() if name in self.options)


LABELS: Mapping[str, str] = {
    "auto": "this engine, as it chooses",
    "fused": "this engine, fused",
    "general": "this engine, general",
    "jax": "JAX as written",
    "jax-tuned": "JAX tuned by hand",
    "torch": "torch eager",
}
NEEDS_JAX = ("jax", "jax-tuned")


def candidates(contestant: str, case: Case) -> list[Candidate]:
    """Return the programs of a contestant, of which the fastest one counts."""
    if contestant in ("auto", "fused", "general"):
        several = case.batch <= INNER and contestant != "general"
        return [Candidate("engine", {"backend": contestant, **({"inner": INNER} if several else {})})]
    if contestant == "torch":
        return [Candidate("eager")]
    platform = {"JAX_PLATFORMS": "cpu" if case.device == "cpu" else "cuda"}
    if contestant == "jax":
        return [Candidate("jax_peer.program", {}, platform)]
    environment = {**platform, **KEEP_MEMORY, **({"XLA_FLAGS": TUNED_XLA} if case.device == "cpu" else {})}
    options: dict[str, Any] = {}
    if case.batch <= INNER:
        options["inner"] = INNER
    if case.system == "repulsion":
        options["by_hand"] = True
    variants = ("plain", "shared", "deferred") if case.flow == "C" else ("plain", "deferred")
    return [Candidate("jax_peer.program", {"variant": variant, **options}, environment) for variant in variants]


def full_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what would distort, one thread everywhere, and what a program needs."""
    # torch.set_num_threads(1), as `controllers` has it, is what OMP_NUM_THREADS comes to
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **threads, **extra}
