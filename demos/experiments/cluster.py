"""Runs as jobs of a cluster, by submitit: the same files, the same results, and a run goes on from its checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import warp

from controllers.checkpoint import RECORD
from controllers.commandline import stop_on_signals
from controllers.record import Record, read_record
from demos.experiments.plan import BEGUN, FAILED, Run, State, recorded_epochs
from demos.experiments.pool import PATIENCE, Listener, locked, perform
from warp_phys.interop.extras import require

CLUSTERS = ("slurm", "local")
"""Where jobs run: on machines that SLURM has; on this one."""
POLL = 1.0
"""Seconds between two looks at jobs and records."""


class Job:
    """One run as a job. A job that is preempted or out of time is queued again, and the run goes on."""

    def __init__(self, run: Run, out: str):
        self.run, self.out = run, out

    def __call__(self) -> State:
        """Perform the run where it is not done, and no other job is at it."""
        torch.set_num_threads(1)
        warp.config.log_level = warp.LOG_ERROR
        state = self.run.state()
        if state.counts:
            return state
        try:
            with (
                stop_on_signals() as (stop, _),
                locked(Path(self.out) / ".processes", shared=True, patience=PATIENCE),
                locked(self.run.folder / ".job"),
            ):
                return perform(self.run, stop.is_set, lambda record: None)
        except BlockingIOError:
            return State(BEGUN, state.epochs, "another job is at this run")

    def checkpoint(self) -> Any:
        """Return what is queued in its place."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Return options of jobs, given as name=value.

    Raises:
        ValueError: One has no name or no value.

    >>> read_options(["slurm_partition=gpu", "timeout_min=60"])
    {'slurm_partition': 'gpu', 'timeout_min': 60}
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"cluster-options must be name=value, such as timeout_min=60, got {text!r}")
        options[name] = int(value) if value.removeprefix("-").isdecimal() else value
    return options


def run_on_cluster(
    runs: Sequence[Run],
    out: str | Path,
    cluster: str,
    at_once: int,
    options: Mapping[str, Any],
    listener: Listener,
    stop: threading.Event,
) -> dict[str, State]:
    """Perform runs as jobs, and wait for them; returns how each run ended that was taken up.

    When `stop` is set, jobs are asked to save what they are at and end. Where this process is killed, they go on; the
    same command then leaves alone what is done, and tells of what they are at that it has begun.

    Args:
        runs: The runs.
        out: The folder, which all machines see.
        cluster: One of `CLUSTERS`.
        at_once: How many jobs may run at the same time on SLURM; 0 for as many as there is room for.
        options: Given to submitit's executor: timeout_min, slurm_partition, …
        listener: Is told what happens.
        stop: Asks to stop.

    Raises:
        ImportError: submitit is not installed.
        ValueError: submitit does not know an option, or there is no SLURM.
    """
    require("submitit", "cluster")
    import submitit  # noqa: PLC0415, only here

    own: dict[str, Any] = {"name": "warp_phys", "cpus_per_task": 1, "timeout_min": 24 * 60}
    if cluster == "slurm" and at_once:
        own["slurm_array_parallelism"] = at_once
    try:
        executor = submitit.AutoExecutor(folder=Path(out) / ".jobs", cluster=cluster)
        executor.update_parameters(**own | dict(options))
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"cluster {cluster}: {error}") from error
    left, ended, told = list(runs), dict[str, State](), dict[str, int]()
    width = len(left) if cluster == "slurm" else max(1, at_once)
    jobs: list[tuple[Run, Any]] = []
    try:
        while (left or jobs) and not stop.is_set():
            batch, left = left[: width - len(jobs)], left[width - len(jobs) :]
            if batch:
                with executor.batch():
                    submitted = [executor.submit(Job(run, str(out))) for run in batch]
                jobs += zip(batch, submitted, strict=True)
                for run in batch:
                    listener.begun(run)
            jobs = _look(jobs, ended, told, listener)
            listener.waited()
            stop.wait(POLL if jobs else 0.0)
    finally:
        _dismiss(jobs, cluster, ended, listener)
    return ended


def _look(
    jobs: list[tuple[Run, Any]], ended: dict[str, State], told: dict[str, int], listener: Listener
) -> list[tuple[Run, Any]]:
    """Tell what has happened; return the jobs that are not done."""
    left = []
    for run, job in jobs:
        for record in _records_since(run, told):
            listener.recorded(run, record)
        if not job.done():
            left.append((run, job))
            continue
        ended[run.name] = state = _state_of(run, job)
        listener.ended(run, state)
    return left


def _records_since(run: Run, told: dict[str, int]) -> list[Record]:
    """Return the last epoch on record, if it has not been told."""
    epochs = recorded_epochs(run.folder)
    if epochs <= told.get(run.name, 0):
        return []
    told[run.name] = epochs
    row = read_record(run.folder / RECORD)[-1]
    return [Record(int(row["epoch"]), *(float(row[name]) for name in Record._fields[1:]))]


def _state_of(run: Run, job: Any) -> State:
    """Return how a job has ended."""
    try:
        return job.result()
    except Exception as error:  # whatever the job or its machine has raised
        # submitit gives the job's traceback, and then where the logs are
        lines = str(error).partition("You can check full logs")[0].splitlines()
        said = [line for line in lines if line.strip(" -")] or [type(error).__name__]
        return State(FAILED, recorded_epochs(run.folder), f"job {job.job_id}: {said[-1]}")


def _dismiss(jobs: Sequence[tuple[Run, Any]], cluster: str, ended: dict[str, State], listener: Listener) -> None:
    """Have jobs save and end."""
    for _, job in jobs:
        if cluster == "local":  # cancel would send SIGINT, which does nothing where the caller ignores that
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
        else:
            job.cancel(check=False)
    deadline = time.monotonic() + PATIENCE
    for run, job in jobs:
        while not job.done() and time.monotonic() < deadline:
            time.sleep(0.1)
        state = run.state()
        ended[run.name] = state
        listener.ended(run, state)
