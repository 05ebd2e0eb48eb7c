"""Training shared by several processes: each takes its rows of every minibatch, sums are made over all.

Started as `torchrun --nproc-per-node 2 -m controllers …`, or inside any program that has set up torch.distributed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=5)
"""For how long a process waits for the others; compiling kernels must fit in. One that was killed is noticed at once,
since its connections close; only a machine that is gone without a word takes as long."""


class RanksLost(RuntimeError):
    """Another process of the same training has ended, or cannot be reached."""


class Ranks:
    """This process's place among those that train together; one process alone where torch.distributed is not set up.

    Every method that exchanges something raises `RanksLost` where another process has ended.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.weight = 1.0
        """The part of the rows that were shared last that is this process's."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def check(self, part: int, test_states: int) -> None:
        """Raise ValueError where a rank would have nothing to do, for which the others would wait."""
        if min(part, test_states) < self.world:
            raise ValueError(
                f"batch / accumulate and test_states must be at least the number of ranks ({self.world}), "
                f"got {part} and {test_states}"
            )

    def share(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This process's part of the rows, which lie along a dimension."""
        if self.world == 1:
            return rows
        count = rows.shape[dim]
        rows = rows[(slice(None),) * dim + (slice(self.rank, None, self.world),)]
        self.weight = rows.shape[dim] / count
        return rows

    def sum(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the processes, in place."""
        self._exchange(dist.all_reduce, tensor)

    def average(self, tensor: torch.Tensor) -> None:
        """Make means over this process's rows those over all rows that were shared last, in place."""
        if self.world > 1:
            tensor *= self.weight
            self.sum(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says yes: all leave the loop at the same minibatch, or some would wait for ever."""
        if self.world == 1:
            return flag
        flags = torch.tensor([float(flag)], device=device)
        self.sum(flags)
        return bool(flags.item())

    def wait(self) -> None:
        """Wait for all processes."""
        self._exchange(dist.barrier)

    def _exchange(self, collective: Callable[..., Any], *tensors: torch.Tensor) -> None:
        if self.world == 1:
            return
        try:
            collective(*tensors)
        except RuntimeError as error:
            raise RanksLost(
                f"rank {self.rank} of {self.world} has lost the others: one of them has ended, or cannot be reached"
            ) from error


@contextmanager
def launched_ranks(device: str) -> Iterator[str]:
    """Set up torch.distributed where torchrun started this process; yields the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    on_cuda = device.startswith("cuda")
    if on_cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()
