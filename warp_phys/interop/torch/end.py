"""The recorded launch that ends an update: loss, combination, clipping and a step of the optimiser."""

from typing import Any, NamedTuple

import numpy as np
import torch
import warp as wp

from warp_phys.flow import Combined, Flow, memory_in
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.direct import DirectPass
from warp_phys.programs.update_kernels import CLIPPING, GROUP, TENSOR, finish_kernel


class End(NamedTuple):
    """The launch, and views of what it reads and writes."""

    launch: Any
    graph: Any
    """All launches of the update in one graph, or None."""
    memory: list[tuple[int, ...]]
    """Addresses of every trained tensor and of its state, and its group."""
    mean: torch.Tensor | None
    """The average, where the flow has a memory."""
    addresses: np.ndarray
    """Of the updates of base and other, of the combined update, and of the average where the flow has a memory."""
    numbers: list[tuple[float, ...]]
    """What stands in `groups`."""
    groups: np.ndarray
    """Learning rate and so on of every group, shape (groups, GROUP)."""
    status: np.ndarray
    """1 where the last update was finite and is done, 0 where nothing has changed."""
    loss: np.ndarray
    held: tuple

    def aim(self, direct: DirectPass, update: torch.Tensor) -> None:
        """Combine the updates where they now are, into `update`."""
        base, other = direct.updates[direct.parts[0]], direct.updates[direct.parts[-1]]
        self.addresses[:3] = base.data_ptr(), other.data_ptr(), update.data_ptr()

    def run(self, direct: DirectPass) -> None:
        """Run the pass, and this launch after it."""
        if self.graph is None:
            direct.launch()
            self.launch.launch()
        else:
            wp.capture_launch(self.graph)


def record_end(
    direct: DirectPass,
    flow: Flow | Combined,
    mean: torch.Tensor | None,
    memory: list,
    groups: list,
    clipping: tuple[str, float],
    graph: bool,
) -> End:
    """Record the launch that ends the updates of a pass.

    Args:
        direct: The pass.
        flow: The flow; the rule of a combined one has a kernel.
        mean: The average, where the flow has a memory.
        memory: As `memory_of` returns it.
        groups: As `numbers_of` returns it.
        clipping: Kind and limit.
        graph: Whether to make a graph of pass and end.
    """
    addresses = wp.zeros(4, dtype=wp.uint64, device="cpu")
    if mean is not None:
        addresses.numpy()[3] = mean.data_ptr()
    tensors = wp.array(np.array(memory, dtype=np.uint64).reshape(-1, TENSOR), dtype=wp.uint64, device="cpu")
    sizes = [0, *(parameter.numel() for parameter in direct.trainable)]
    starts = wp.array(np.cumsum(sizes), dtype=wp.int32, device="cpu")
    numbers = wp.array(np.array(groups).reshape(-1, GROUP), dtype=wp.float64, device="cpu")
    status, loss = wp.zeros(1, dtype=wp.int32, device="cpu"), torch.zeros(1, dtype=direct.grad.dtype)
    trajectory = [as_array(tensor) for tensor in (direct.states, direct.controls, direct.costs)]
    kind, limit = clipping
    inputs = [
        *trajectory, direct.per_sample, direct.control_weight, addresses, memory_in(flow), CLIPPING[kind], limit,
        tensors, starts, numbers,
    ]  # fmt: skip
    outputs = [status, as_array(loss), as_array(direct.grad)]
    rule = flow.rule if isinstance(flow, Combined) else None
    either = isinstance(flow, Combined) and flow.either
    kernel = finish_kernel(rule, mean is not None, either, wp.dtype_from_torch(direct.grad.dtype))
    launch = wp.launch(kernel, 1, inputs, outputs, device="cpu", record_tape=False, record_cmd=True)
    held = (*inputs, *outputs, mean)  # a recorded launch does not keep its arrays alive
    whole = direct.capture(launch) if graph else None
    views = addresses.numpy(), list(groups), numbers.numpy(), status.numpy(), loss.numpy()
    return End(launch, whole, memory, mean, *views, held)
