"""What a run of the benchmarks measures; its command line is derived from this."""

from dataclasses import dataclass

from controllers.settings import check_device, check_setting
from tests.benchmarks.cases import FLOWS, PUBLISHED, Case, make_case
from tests.benchmarks.contestants import LABELS
from tests.benchmarks.processes import default_core

SCALINGS = ("horizon", "poles", "points", "agents", "batch")


@dataclass(frozen=True)
class Settings:
    """Which contestants meet in which cases, and for how long.

    Raises:
        ValueError, TypeError: A setting cannot be met; the message names it.
    """

    system: tuple[str, ...] = tuple(PUBLISHED)
    """Systems."""
    flow: tuple[str, ...] = FLOWS
    """Flows, by letter."""
    batch: tuple[int, ...] = (1, 8, 64, 256, 4096)
    """Batch sizes."""
    contestants: tuple[str, ...] = ("fused", "general", "jax", "jax-tuned", "torch")
    """Who takes part, also auto (this engine, as it chooses); all others are compared with the first one."""
    scaling: tuple[str, ...] = ()
    """Instead of the table, cost against horizon, poles, points, agents, batch."""
    repeats: int = 21
    """Rounds of a case."""
    seconds: float = 60.0
    """Time after which no new round of a case begins, once there are three."""
    core: int = -1
    """Core to which every process is pinned; -1 for the last one."""
    memory_limit: float = 0.0
    """Memory that each process may have [GB]; 0 for four fifths of what is free as it starts."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    out: str = "out/benchmarks"
    """Folder of the tables."""

    def __post_init__(self) -> None:
        """Check every setting."""
        known = {"system": tuple(PUBLISHED), "flow": FLOWS, "contestants": tuple(LABELS), "scaling": SCALINGS}
        for name in (*known, "batch"):  # hashable, and each value once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name, choices in known.items():
            for value in getattr(self, name):
                if value not in choices:
                    raise ValueError(f"{name} must be of {', '.join(choices)}, got {value!r}")
        for name in ("system", "flow", "batch", "contestants"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have a value")
        for batch in self.batch:
            check_setting("batch", batch, int, at_least=1)
        check_setting("repeats", self.repeats, int, at_least=1)
        check_setting("core", self.core, int, at_least=-1)
        check_setting("seconds", self.seconds, float, at_least=0)
        check_setting("memory_limit", self.memory_limit, float, at_least=0)
        check_device(self.device)

    @property
    def pinned(self) -> int | None:
        """Number of the core; None where processes cannot be pinned."""
        default = default_core()
        return default if self.core < 0 or default is None else self.core

    @property
    def memory_bytes(self) -> float:
        """The limit in bytes; 0 for the default."""
        return 1e9 * self.memory_limit

    def cases(self) -> list[Case]:
        """The lines of the table."""
        return [
            make_case(system, flow, batch, self.device)
            for system in self.system
            for batch in self.batch
            for flow in self.flow
        ]
