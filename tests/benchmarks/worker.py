"""A contestant's process: does what its parent asks over a pipe, a line of JSON each way.

Its first argument describes what to run. It writes one line when it is ready, then answers `{"do": name, …}`.
"""

import importlib
import json
import os
import resource
import sys
import time
from typing import Any, TextIO

MEGABYTE = 1e6


def main() -> None:
    """Set the process up, then answer until the pipe ends."""
    order = json.loads(sys.argv[1])
    # Libraries may print; answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare(order)
    try:
        work = Work(order)
        send(answers, {"ready": True})
        for line in sys.stdin:
            send(answers, work.answer(json.loads(line)))
    except Exception as error:  # whatever it is, the table shall say it
        send(answers, {"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from error


def prepare(order: dict[str, Any]) -> None:
    """Pin the process to its core, and see that it is the first to go where memory runs out."""
    if order["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {order["core"]})
    if os.path.exists("/proc/self/oom_score_adj"):
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    if order["memory_limit"] > 0:
        limit = int(order["memory_limit"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def send(answers: TextIO, message: dict[str, Any]) -> None:
    """Write one answer."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


class Work:
    """What the process is there for: a program, or the matrix rate."""

    def __init__(self, order: dict[str, Any]):
        # Only here: importing numpy before the process is pinned would start threads on all cores.
        module = importlib.import_module(f"tests.benchmarks.{order['module']}")
        case = order["case"]
        if case is not None:
            case = importlib.import_module("tests.benchmarks.cases").Case(**case)
        self.device = "cpu" if case is None else case.device
        self.before = self.memory()
        start = time.perf_counter()
        self.program = module.Program(*(() if case is None else (case,)), **order["options"])
        self.setup_s = time.perf_counter() - start

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do what a question asks."""
        match question["do"]:
            case "check":
                return self.check(question["file"])
            case "first":
                return self.first(question["updates"])
            case "turn":
                return self.turn(question["updates"])
            case "rate":
                return {"gflops": self.program.rate()}
            case _:
                return {"memory_mb": (self.memory() - self.before) / MEGABYTE}

    def check(self, file: str) -> dict[str, Any]:
        """Write loss and update of the initial weights to a file."""
        import numpy as np

        loss, update = self.program.loss_and_update()
        np.savez(file, np.array(loss), *update)
        return {"loss": loss}

    def first(self, updates: int) -> dict[str, Any]:
        """Time the first call: everything from the program's making to the end of its first updates."""
        start = time.perf_counter()
        self.program.start()
        self.program.run(updates)
        return {"first_s": self.setup_s + time.perf_counter() - start}

    def turn(self, updates: int) -> dict[str, Any]:
        """Time updates from the initial weights: the same work each time."""
        self.program.start()
        wall, cpu = time.perf_counter(), time.process_time()
        self.program.run(updates)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"ms": 1e3 * wall / updates, "cpu_ms": 1e3 * cpu / updates}

    def memory(self) -> float:
        """Largest memory so far [bytes]: resident on a CPU, in use on a GPU."""
        if self.device == "cpu":
            return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        import torch

        free, total = torch.cuda.mem_get_info()
        return float(total - free)


if __name__ == "__main__":
    main()
