"""Runs spread over processes; a run that was interrupted goes on from its checkpoint."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import warp

from controllers.checkpoint import CHECKPOINT
from controllers.record import Record
from controllers.training import train
from demos.experiments.plan import BEGUN, DIVERGED, FAILED, FINISHED, OUTCOME, Run, State, recorded_epochs
from warp_phys import Diverged

PATIENCE = 60.0
"""Seconds that a process gets to save its run when asked to stop."""


class Listener(Protocol):
    """Is told what happens to the runs."""

    def begun(self, run: Run) -> None:
        """A process has taken up a run."""

    def recorded(self, run: Run, record: Record) -> None:
        """A run has finished an epoch."""

    def ended(self, run: Run, state: State) -> None:
        """A run has ended: finished, diverged, failed, or stopped on request."""

    def waited(self) -> None:
        """Some time has passed."""


def perform(run: Run, stop: Callable[[], bool], progress: Callable[[Record], None]) -> State:
    """Train one run, from its checkpoint if it has one, and leave word in its folder of how it ended.

    A divergence is a result and ends the run for good. Any other failure is told, and the run is tried again the next
    time.
    """
    begun = (run.folder / CHECKPOINT).exists()
    try:
        (run.folder / OUTCOME).unlink(missing_ok=True)
        trained = train(run.settings, resume=begun, overwrite=not begun, stop=stop, progress=progress, graph=True)
        if not trained.finished:
            return State(BEGUN, len(trained.records))
        state = State(FINISHED, len(trained.records))
        run.conclude(state)
    except Diverged as error:
        state = State(DIVERGED, recorded_epochs(run.folder), str(error))
        run.conclude(state)
    except Exception as error:
        state = State(FAILED, recorded_epochs(run.folder), f"{type(error).__name__}: {error}")
        # Where the disk is full, for one, no word can be left; the run then counts as begun.
        try:
            run.conclude(state)
        except OSError:
            pass
    return state


def serve(home: Connection, out: str) -> None:
    """Body of a process: performs the runs that it is sent until it is sent None, or nobody is there any more."""
    # One to the whole group reaches the program too, which then asks to stop: nothing is lost.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    warp.config.log_level = warp.LOG_ERROR

    def tell(message: Any) -> None:
        try:
            home.send(message)
        except OSError:
            pass

    with locked(Path(out) / ".processes", shared=True):
        while True:
            try:
                run = home.recv()
            except (EOFError, OSError):
                return
            if run is None:
                return
            # Whatever comes during a run, be it None or the end of the connection, asks to stop.
            tell(perform(run, stop=home.poll, progress=tell))


@dataclass
class Worker:
    """A process and what it is at."""

    process: BaseProcess
    connection: Connection
    run: Run | None = None
    recorded: bool = False


def run_all(
    runs: Sequence[Run], out: str | Path, processes: int, listener: Listener, stop: threading.Event
) -> dict[str, State]:
    """Perform runs in processes of their own, each with one thread; returns how each run ended that was taken up.

    The first run that needs some kernels compiles them while others wait that need the same. When `stop` is set, all
    processes save what they are at and end.
    """
    left, ended = list(runs), dict[str, State]()
    workers: list[Worker] = []
    try:
        while not stop.is_set():
            left = assign(left, workers, processes, out, listener)
            busy = {worker.connection: worker for worker in workers if worker.run}
            if not busy:
                break
            for connection in cast(list[Connection], wait(list(busy), timeout=0.2)):
                worker = busy[connection]
                state = receive(worker, listener, stop)
                if state and worker.run:
                    ended[worker.run.name] = state
                    listener.ended(worker.run, state)
                    worker.run = None
                    if not worker.process.is_alive():
                        workers.remove(worker)
            listener.waited()
    finally:
        dismiss(workers, ended)
    return ended


def assign(left: list[Run], workers: list[Worker], processes: int, out: str | Path, listener: Listener) -> list[Run]:
    """Give a run to every idle process, starting processes as needed; returns the runs that are left.

    A run waits while another one compiles its kernels, that is until it has recorded an epoch.
    """
    left = list(left)
    while True:
        compiling = {worker.run.kernels for worker in workers if worker.run and not worker.recorded}
        ready = next((run for run in left if run.kernels not in compiling), None)
        idle = next((worker for worker in workers if not worker.run), None)
        if ready is None or (idle is None and len(workers) >= processes):
            return left
        if idle is None:
            idle = hire(out)
            workers.append(idle)
        left.remove(ready)
        idle.run, idle.recorded = ready, False
        listener.begun(ready)
        try:
            idle.connection.send(ready)
        except OSError:
            # It has ended; `receive` finds that out.
            pass


def hire(out: str | Path) -> Worker:
    """Start a process."""
    context = multiprocessing.get_context("spawn")
    home, away = context.Pipe()
    process = context.Process(target=serve, args=(away, str(out)), daemon=True)
    # Children inherit an ignored Ctrl-C, which a terminal sends to them as well; they listen to their connection.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        process.start()
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
    away.close()
    return Worker(process, home)


def receive(worker: Worker, listener: Listener, stop: threading.Event) -> State | None:
    """Take one message of a process; returns how its run ended, if it did."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(PATIENCE)
        worker.process.kill()
        worker.process.join()
        epochs, status = recorded_epochs(cast(Run, worker.run).folder), worker.process.exitcode
        # A signal to the whole group ends a process that has not begun to serve: it was stopped, it has not failed.
        if stop.is_set() and status == -signal.SIGTERM:
            return State(BEGUN, epochs)
        return State(FAILED, epochs, f"its process ended with status {status}")
    if isinstance(message, State):
        return message
    worker.recorded = True
    listener.recorded(cast(Run, worker.run), message)
    return None


def dismiss(workers: Sequence[Worker], ended: dict[str, State]) -> None:
    """Have all processes save and end; what ends in these moments is noted too."""
    for worker in workers:
        try:
            worker.connection.send(None)
        except OSError:
            pass
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        while worker.connection.poll(max(0.0, deadline - time.monotonic())):
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, State) and worker.run:
                ended[worker.run.name] = message
        worker.process.join(max(0.1, deadline - time.monotonic()))
        # Files are renamed into place, so this breaks none.
        worker.process.kill()
        worker.process.join()
        worker.connection.close()


@contextmanager
def locked(path: Path, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock on a file, created if need be, that the system releases whatever becomes of this process.

    Args:
        path: The file; it stays, empty.
        shared: Several may hold it together.
        patience: Seconds for which to wait.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if os.name != "posix":
        yield
        return
    import fcntl  # noqa: PLC0415, exists on POSIX systems only

    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with open(path, "a+b") as file:  # a shared lock on a network file system needs a file that can be read
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
