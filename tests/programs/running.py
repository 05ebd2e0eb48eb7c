"""Runs a row program on a CPU, without a system: controls, adjoints of the states, gradients of its tensors."""

import functools

import torch
import warp as wp

from warp_phys.interop.torch.dense import as_array
from warp_phys.programs import native_kernels as native
from warp_phys.programs.layout import layout_of
from warp_phys.programs.network import address_array
from warp_phys.programs.plan import SAMPLES


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


def relative(new, old):
    """Return the largest difference, by the largest number of what was expected."""
    return float((new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-30))
