"""Several ranks on this machine: bytes and times of what they exchange, and of an update that they share.

    python -m tests.benchmarks.ranks --world 1 2 4

Prints a table. Times are wall clock, medians; ranks that share cores take turns on them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import warp as wp

from controllers.ranks import Ranks
from controllers.settings import Training
from controllers.training import Loop

SIZES = (1_000, 100_000, 1_000_000)
"""Numbers in an exchange, float32."""
FLOWS = ("R", "C", "averaged")
REPEATS = 11


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Ranks on this machine.")
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2, 4], help="Numbers of ranks.")
    parser.add_argument("--batch", type=int, default=256, help="Rows of an update, shared by all.")
    given = parser.parse_args()
    print("| ranks | what | bytes given to the sum by each rank | ms |\n| ---: | --- | ---: | ---: |")
    for world in given.world:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_take_part, (world, given.batch, folder), nprocs=world)


def _take_part(rank: int, world: int, batch: int, folder: str) -> None:
    torch.set_num_threads(1)
    wp.config.log_level = wp.LOG_WARNING
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    ranks = Ranks()

    def tell(what: str, size: int, milliseconds: float) -> None:
        if ranks.leads:
            print(f"| {world} | {what} | {size} | {milliseconds:.3f} |", flush=True)

    for count in SIZES if world > 1 else ():
        numbers = torch.zeros(count)
        tell("sum", numbers.nbytes, _median(ranks, lambda numbers=numbers: ranks.sum(numbers)))
    for flow in FLOWS:
        loop = Loop(Training(flow=flow, batch=batch, train_states=batch, test_states=batch, epochs=1, out=""))
        states, given = loop.train_states[None], []
        if world > 1:
            reduce = loop.rollout.reduce
            loop.rollout.reduce = lambda updates, reduce=reduce, given=given: (
                given.append(updates.nbytes),
                reduce(updates),
            )
        took = _median(ranks, lambda loop=loop, states=states: _update(loop, states, ranks))
        tell(f"update {flow}", given[-1] if given else 0, took)
    dist.destroy_process_group()


def _update(loop: Loop, states: torch.Tensor, ranks: Ranks) -> None:
    loop.minibatch = 0
    loop.update(states, lambda: ranks.any(False, torch.device("cpu")))


def _median(ranks: Ranks, work: Callable[[], object]) -> float:
    """Return the median time of some work [ms]; the first two times do not count."""
    times = []
    for _ in range(REPEATS + 2):
        ranks.wait()
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
