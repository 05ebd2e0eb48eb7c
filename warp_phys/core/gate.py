"""The adjoint-override layer: what reaches an array when a `wp.Tape` runs backward.

A gate is the identity forward; backward it multiplies the adjoint by a weight that is read on the device at that
moment. With two gates per step, one in front of the simulator and one in front of the controller, one recorded tape (or
captured graph) gives every flow: assign the weights, run it backward, and again.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import warp as wp

from warp_phys.core.arrays import alias
from warp_phys.core.checks import check_number
from warp_phys.core.gate_kernels import gate_kernel
from warp_phys.core.kernel_cache import start_warp
from warp_phys.core.rows import REAL_TYPES


def active_tape() -> wp.Tape | None:
    """Return the tape that is recording, if any."""
    start_warp()
    return wp._src.context.runtime.tape  # type: ignore[attr-defined]  # Warp has no public name for it


@contextmanager
def paused(tape: wp.Tape | None) -> Iterator[None]:
    """Keep a tape from recording; Warp has no public switch for it."""
    if tape is None:
        yield
        return
    tape.__exit__(None, None, None)
    try:
        yield
    finally:
        tape.__enter__()


def gate(x: wp.array, weight: Any) -> wp.array:
    """Return another view of `x`, same memory, own adjoint, through which only `weight` times the adjoint reaches `x`.

    Call it inside a `wp.Tape`, after x has been written and before it is used; use the view in place of x. The view's
    adjoint is zeroed once it has been passed on (as Warp does with the arrays that a kernel writes), so that a tape can
    run backward again.

    Args:
        x: Array of floats, vectors or matrices of up to four dimensions, with `requires_grad=True`.
        weight: A number, or a Warp array of one number, or of one number per row of x, float32 or float64 as x, on its
            device. An array is read when the tape runs backward: change it in place to change the flow.

    Raises:
        RuntimeError: No tape is recording.
        TypeError: x is no float array, or the weight is no number or of another precision.
        ValueError: x has no adjoint, or the weight is not finite or has another length or device.

    >>> x = wp.array([1.0, 2.0], dtype=float, device="cpu", requires_grad=True)
    >>> with wp.Tape() as tape:
    ...     y = gate(x, 0.5)
    >>> tape.backward(grads={y: wp.array([2.0, 2.0], dtype=float, device="cpu")})
    >>> x.grad.numpy()
    array([1., 1.], dtype=float32)
    """
    tape = active_tape()
    if tape is None:
        raise RuntimeError("gate must be called inside a wp.Tape: outside it nothing runs backward")
    real = _check(x)
    weight = _weight_array(weight, x, real)
    # Warp wants an adjoint to have the strides of its array
    view = _view(x, wp.zeros(x.shape, dtype=x.dtype, device=x.device, strides=x.strides))
    # the kernel works on scalars: a vector or matrix component is one more dimension
    adj_view, adj_x = _scalars(view.grad, real), _scalars(x.grad, real)
    kernel = gate_kernel(adj_x.ndim, real)

    def backward():
        inputs, outputs = [weight, adj_view], [adj_x, adj_view]
        wp.launch(kernel, adj_x.shape, inputs=inputs, outputs=outputs, device=adj_x.device, record_tape=False)

    tape.record_func(backward, [x, view])
    return view


def _check(x: Any) -> type:
    """Return the scalar type of x, or raise what `gate` documents."""
    if not isinstance(x, wp.array):
        raise TypeError(f"x must be a warp array, got {type(x).__name__}")
    real = getattr(x.dtype, "_wp_scalar_type_", x.dtype)
    if real not in REAL_TYPES.values():
        raise TypeError(f"x must hold float32 or float64, or vectors or matrices of them, got {x.dtype}")
    if x.grad is None:
        raise ValueError("x has no adjoint: make it with requires_grad=True")
    return real


def _weight_array(weight: Any, x: wp.array, real: type) -> wp.array:
    if not isinstance(weight, wp.array):
        check_number("weight", weight)
        return wp.full(1, float(weight), dtype=real, device=x.device)
    if weight.dtype is not real:
        raise TypeError(f"weight must hold {real.__name__} as x does, got {weight.dtype.__name__}")
    if weight.ndim != 1 or len(weight) not in (1, x.shape[0]):
        raise ValueError(f"weight must have shape (1,) or ({x.shape[0]},), one per row of x, got {weight.shape}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on device {x.device}, got {weight.device}")
    return weight


def _view(x: wp.array, grad: wp.array) -> wp.array:
    """Return a view of x with another adjoint."""
    view = alias(x, x.dtype, x.shape, x.strides)
    view.grad = grad
    return view


def _scalars(array: wp.array, real: type) -> wp.array:
    """Return an array as scalars, its vector or matrix components as trailing dimensions; at most four dimensions."""
    inner = getattr(array.dtype, "_shape_", ())
    size = wp.types.type_size_in_bytes(real)
    strides, shape = list(array.strides), list(array.shape)
    for i, length in enumerate(inner):
        strides.append(size * math.prod(inner[i + 1 :]))
        shape.append(length)
    if len(shape) > 4:
        raise TypeError(
            f"x must have at most four dimensions, components of vectors and matrices included, got {len(shape)}"
        )
    return alias(array, real, shape, strides)
