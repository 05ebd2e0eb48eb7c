"""Training shared by several processes: each takes its rows of every minibatch, sums are made over all.

Started as `torchrun --nproc-per-node 2 -m controllers …`, or inside any program that has set up torch.distributed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Ranks:
    """This process's place among those that train together; one process alone where torch.distributed is not set up."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1

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

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's part of the rows."""
        return rows if self.world == 1 else rows[self.rank :: self.world]

    def sum(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says yes: all leave the loop at the same minibatch, or some would wait for ever."""
        if self.world == 1:
            return flag
        flags = torch.tensor([float(flag)], device=device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


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
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
