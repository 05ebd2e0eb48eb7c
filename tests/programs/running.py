"""Runs a row program on a CPU, without a system: controls, adjoints of the states, gradients of its tensors."""

import functools

import numpy as np
import torch
import warp as wp

from warp_phys.core.arrays import CACHE_LINE
from warp_phys.interop.torch.dense import as_array
from warp_phys.programs import block_plan
from warp_phys.programs import native_kernels as native
from warp_phys.programs.block_network import BlockLinearisation, BlockNetwork
from warp_phys.programs.layout import layout_of
from warp_phys.programs.network import address_array
from warp_phys.programs.program import SAMPLES


@functools.cache
def _kernel(program, real):
    """Evaluate, pull and contract all rows, block by block as the engine's own kernels do."""
    evaluate, pull, contract = (f(program, real) for f in (native._evaluate, native._pull, native._contract))
    row, out = layout_of(program).row, layout_of(program).output

    @wp.kernel(module="unique", module_options=native.module_options())
    def run(
        packed: wp.array[real],
        transposed: wp.array[real],
        states: wp.array3d[real],
        seeds: wp.array2d[real],
        rows: wp.array[real],
        deltas: wp.array[real],
        controls: wp.array2d[real],
        adj_x: wp.array2d[real],
        gradients: wp.array[real],
    ):
        batch = states.shape[1]
        for block in range((batch + SAMPLES - 1) // SAMPLES):
            first = block * SAMPLES
            count = wp.min(SAMPLES, batch - first)
            evaluate(packed, states, batch, 0, first, count, rows, 0)
            for s in range(count):
                for k in range(seeds.shape[1]):
                    controls[first + s, k] = rows[s * row + out + k]
                    deltas[s * row + out + k] = seeds[first + s, k]
            pull(packed, transposed, rows, 0, deltas, 0, count, 1)
            for s in range(count):
                for k in range(adj_x.shape[1]):
                    adj_x[first + s, k] = deltas[s * row + k]
            contract(rows, 0, deltas, 0, count, gradients, 0)

    return run


def run_program(read, x, seeds):
    """Return controls (B, K), adjoints of x (B, D), and the gradient of each tensor by its id."""
    program, real = read.plan, wp.dtype_from_torch(x.dtype)
    layout = layout_of(program)
    room = lambda *shape: torch.zeros(shape, dtype=x.dtype)  # noqa: E731
    packed, transposed = room(layout.packed[-1]), room(max(1, layout.transposed[-1]))
    tensors = [None if t is None else t.detach() for t in read.tensors]
    sources = address_array([[0 if t is None else t.data_ptr() for t in tensors]])
    wp.launch(native.pack_kernel(program, real), 1, [sources, as_array(packed), as_array(transposed)], device="cpu")
    controls, adj_x, gradients = room(len(x), program.outputs), room(*x.shape), room(layout.packed[-1])
    # what nobody has written yet must not be read either
    rows, deltas = room(SAMPLES * layout.row).fill_(float("nan")), room(SAMPLES * layout.row)
    arrays = (packed, transposed, x[None].contiguous(), seeds.contiguous(), rows, deltas, controls, adj_x, gradients)
    wp.launch(_kernel(program, real), 1, [as_array(a) for a in arrays], device="cpu")
    found = {id(t): torch.zeros_like(t) for t in read.tensors if t is not None}
    targets = address_array([[0 if t is None else found[id(t)].data_ptr() for t in read.tensors]])
    inputs = [as_array(packed), as_array(transposed), targets, as_array(gradients)]
    wp.launch(native.unpack_kernel(program, real), 1, inputs, device="cpu")
    return controls, adj_x, found


GUARD = 64
"""Numbers on either side of an array that must stay what they are."""


class Guarded:
    """Arrays between nans, which nothing may write, and which would show up in any sum; aligned as Warp's are."""

    def __init__(self, dtype):
        self.dtype, self.real, self.all = dtype, wp.dtype_from_numpy(dtype), []

    def values(self, values):
        """Return these numbers as an array."""
        values = np.asarray(values, self.dtype)
        whole = np.full(values.size + 3 * GUARD, np.nan, self.dtype)
        whole = whole[-whole.ctypes.data % CACHE_LINE // whole.itemsize :][: values.size + 2 * GUARD]
        whole[GUARD : GUARD + values.size] = values.ravel()
        inner = whole[GUARD : GUARD + values.size].reshape(values.shape)
        self.all.append(whole)
        return wp.array(ptr=inner.ctypes.data, shape=inner.shape, dtype=self.real, device="cpu", copy=False)

    def array(self, _name, shape, _dtype, _device):
        """Return an array of a workspace, in which nothing has been written."""
        return self.values(np.full(shape, np.nan))

    def check(self):
        assert all(np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all() for whole in self.all)


def run_in_blocks(read, x, seeds):
    """Return the same from the kernels of CUDA; around every array is nan, and in scratch."""
    guarded = Guarded(x.numpy().dtype)
    network = BlockNetwork(read.plan, guarded.real, "cpu")
    program = network.own
    network._array = lambda name, length: guarded.array(name, (length,), None, None)
    tensors = {id(t): t for t in read.tensors if t is not None}
    starts = dict(zip(tensors, np.cumsum([0, *(t.numel() for t in tensors.values())]).tolist(), strict=False))
    copies = {name: guarded.values(t.detach().numpy()) for name, t in tensors.items()}
    addresses = [0 if t is None else copies[id(t)].ptr for t in read.tensors]
    offsets = [-1 if t is None else starts[id(t)] for t in read.tensors]
    linear = BlockLinearisation(network, addresses, offsets, guarded.values(x), guarded)
    places = block_plan.places(program)
    nodes = linear._rows.numpy().reshape(-1, block_plan.max_numbers(program), block_plan.SAMPLES)
    out = nodes[:, places[len(program.nodes) - 1] :][:, : program.outputs].swapaxes(1, 2).reshape(-1, program.outputs)
    adj_x, jacobian = guarded.values(np.zeros(x.shape)), guarded.values(np.zeros((len(x), program.outputs, x.shape[1])))
    gradient = guarded.values(np.zeros(sum(t.numel() for t in tensors.values())))
    linear.pull(guarded.values(seeds), adj_x)
    linear.contract(guarded.values(seeds[None]), [gradient])
    linear.jacobian(jacobian)
    guarded.check()
    controls, adj_x, gradient, jacobian = map(
        torch.tensor, (out[: len(x)], *(a.numpy() for a in (adj_x, gradient, jacobian)))
    )
    assert relative(torch.einsum("nk,nkd->nd", seeds, jacobian), adj_x) < 1e-4 or not adj_x.any()
    found = {n: gradient[starts[n] : starts[n] + t.numel()].view(t.shape) for n, t in tensors.items()}
    return controls, adj_x, found


def relative(new, old):
    """Return the largest difference, by the largest number of what was expected."""
    return float((new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-30))
