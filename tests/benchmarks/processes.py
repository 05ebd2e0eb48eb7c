"""The parent's side of a contestant's process."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.benchmarks.cases import Case
from tests.benchmarks.contestants import Candidate, full_environment

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A contestant's process ended, or said that it cannot."""


class Worker:
    """A process that runs one program, pinned to one core; it ends when it is closed.

    Args:
        candidate: What it runs.
        case: What is to be updated; None for the matrix rate.
        core: Number of the core, or None for no pinning.
        memory_limit: Bytes of memory that it may have; 0 for no limit.

    Raises:
        Failed: It could not be made ready.
    """

    def __init__(self, candidate: Candidate, case: Case | None, core: int | None, memory_limit: float):
        self.candidate = candidate
        # Warp keeps compiled kernels: a folder that is new shows what compiling takes, as others have to do it too.
        self.kernels = tempfile.TemporaryDirectory(prefix="benchmark-kernels-")
        order = {
            "module": candidate.module,
            "options": dict(candidate.options),
            "case": None if case is None else case.as_dict(),
            "core": core,
            "memory_limit": memory_limit,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=full_environment({"WARP_CACHE_PATH": self.kernels.name, **candidate.environment}),
            start_new_session=True,  # Ctrl-C is the parent's
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Put a question, and wait for the answer; see `worker.Work`.

        Raises:
            Failed: There is no answer.
        """
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading finds out why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise Failed(f"its process ended with status {status}, perhaps for want of memory")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(str(answer["error"]).splitlines()[0])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.kernels.cleanup()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def has_jax() -> bool:
    """Whether JAX is installed."""
    return importlib.util.find_spec("jax") is not None


def default_core() -> int | None:
    """The last core that this process may use: the first one has most of the system's own work."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def default_memory_limit() -> float:
    """Four fifths of the memory that is free now [bytes]; 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    found: Mapping[str, str] = dict(line.split(":", 1) for line in lines)
    return 0.8 * 1024 * float(found["MemAvailable"].split()[0])
