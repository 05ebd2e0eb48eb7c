"""Custom operators of torch: what `torch.compile` and `torch.func` see of the engine is one opaque node.

Operators take tensors, numbers and text, so systems and rollouts are known to them by a name.
"""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.arrays import as_structs, shape_message
from warp_phys.interop.torch_dense import as_array
from warp_phys.interop.torch_loss import rows_of_parameters, torch_stream
from warp_phys.rollout import check_sizes
from warp_phys.systems.base import Simulator, System

_SYSTEMS: dict[str, Simulator] = {}
_ROLLOUTS: Any = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Step:
    """y = S(x, c; p) as a function of torch tensors, differentiable once in reverse mode.

    A custom operator: it stays whole inside `torch.compile`, and `torch.func.vmap`, `grad` and `vjp` go through it.

    Args:
        system: A `System`, or anything with `step` and `step_vjp` (see `Simulator`); it is kept for good.

    Raises:
        TypeError: The system lacks a verb.

    >>> from warp_phys import CartPole
    >>> Step(CartPole())(torch.zeros(8, 4), torch.ones(8, 1)).shape
    torch.Size([8, 4])
    """

    def __init__(self, system: Simulator):
        check_sizes(system, object())
        wp.init()
        self.system = system
        self._name = _name_of(system)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the name, which belongs to this process."""
        return {"system": self.system}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find a name in this process."""
        self.__init__(state["system"])  # type: ignore[misc]

    def __call__(
        self, x: torch.Tensor, c: torch.Tensor, parameters: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """Return the next states, shape (batch, D).

        Args:
            x: States, shape (batch, D), float32 or float64.
            c: Controls, shape (batch, K).
            parameters: Physical parameters by name, a number or one per sample each; tensors may require gradients.

        Raises:
            TypeError, ValueError: Arguments that do not fit.
        """
        _check("x", x, (-1, self.system.state_size), x)
        _check("c", c, (len(x), self.system.control_size), x)
        rows = rows_of_parameters(self.system, parameters or {}, x)
        if torch.compiler.is_compiling() or not _in_transform():
            return torch.ops.warp_phys.step(x, c, rows, self._name)
        return _StepInTransform.apply(x, c, rows, self._name)


def _check(name: str, tensor: Any, shape: Sequence[int], like: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2 or tensor.shape[1] != shape[1] or shape[0] not in (-1, tensor.shape[0]):
        raise ValueError(shape_message(name, shape, tensor.shape))
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must hold torch.float32 or torch.float64, got {tensor.dtype}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must hold {like.dtype} as x does, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on device {like.device} as x is, got {tensor.device}")


def _name_of(system: Simulator) -> str:
    """Return the name of a system, the same one for equal systems."""
    for name, known in _SYSTEMS.items():
        if known is system or (isinstance(system, System) and known == system):
            return name
    name = f"{type(system).__name__} {next(_NUMBERS)}"
    _SYSTEMS[name] = system
    return name


def name_of_rollout(rollout: Any) -> str:
    """Return a new name for a rollout; it does not keep the rollout alive."""
    name = f"rollout {next(_NUMBERS)}"
    _ROLLOUTS[name] = rollout
    return name


def _in_transform() -> bool:
    return torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


def refuse_transforms(what: str) -> None:
    """Raise a RuntimeError inside torch.func's vmap, grad, vjp, jvp and what is made of them."""
    if _in_transform():
        raise RuntimeError(
            f"{what} does not run inside torch.func (vmap, grad, vjp, jvp, …): call backward() or "
            "torch.autograd.grad, or unroll warp_phys.interop.torch.Step, which does"
        )


@torch.library.custom_op("warp_phys::step", mutates_args=())
def _step(x: torch.Tensor, c: torch.Tensor, rows: torch.Tensor | None, name: str) -> torch.Tensor:
    system, y = _SYSTEMS[name], x.new_empty(x.shape)
    arrays = [as_array(tensor.detach().contiguous()) for tensor in (x, c)]
    with torch_stream(x.device):
        system.step(*arrays, as_array(y), *_structs(system, rows, arrays[0]))
    return y


@_step.register_fake
def _(x, c, rows, name):
    return x.new_empty(x.shape)


@torch.library.custom_op("warp_phys::step_vjp", mutates_args=())
def _step_vjp(
    x: torch.Tensor, c: torch.Tensor, rows: torch.Tensor | None, adj_y: torch.Tensor, want_rows: bool, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the adjoints of x, of c and of each sample's physical parameters; of none if they are not wanted."""
    system = _SYSTEMS[name]
    adj_x, adj_c = x.new_empty(x.shape), c.new_empty(c.shape)
    adj_rows = x.new_empty(_shape_of_rows(x, rows, want_rows))
    arrays = [as_array(tensor.detach().contiguous()) for tensor in (x, c, adj_y)]
    own = _structs(system, rows, arrays[0])
    if want_rows and isinstance(system, System):
        own += (as_structs(as_array(adj_rows), system.types(arrays[0].dtype).Parameters),)
    with torch_stream(x.device):
        system.step_vjp(*arrays, as_array(adj_x), as_array(adj_c), *own)
    return adj_x, adj_c, adj_rows


@_step_vjp.register_fake
def _(x, c, rows, adj_y, want_rows, name):
    return x.new_empty(x.shape), c.new_empty(c.shape), x.new_empty(_shape_of_rows(x, rows, want_rows))


def _shape_of_rows(x, rows, want_rows):
    return (x.shape[0], rows.shape[1]) if want_rows else (0, 0)


def _structs(system: Any, rows: torch.Tensor | None, like: wp.array) -> tuple:
    """Return the physical parameters as `step` takes them, or nothing for the system's own."""
    if rows is None or not isinstance(system, System):
        return ()
    return (as_structs(as_array(rows.detach().contiguous()), system.types(like.dtype).Parameters),)


def _keep(ctx, inputs, output):
    x, c, rows, ctx.name = inputs
    ctx.save_for_backward(x, c, rows)


def _pull(ctx, adj_y):
    x, c, rows = ctx.saved_tensors
    want_rows = rows is not None and ctx.needs_input_grad[2]
    product = torch.ops.warp_phys.step_vjp
    if not torch.compiler.is_compiling() and _in_transform():
        product = _PullInTransform.apply
    adj_x, adj_c, per_sample = product(x, c, rows, adj_y, want_rows, ctx.name)
    adj_rows = None
    if want_rows:
        adj_rows = per_sample.sum(dim=0, keepdim=True) if rows.shape[0] == 1 else per_sample
    return adj_x, adj_c, adj_rows, None


_step.register_autograd(_pull, setup_context=_keep)


@_step_vjp.register_autograd
def _refuse(ctx, *_adjoints):
    raise RuntimeError(_SECOND)


class _StepInTransform(torch.autograd.Function):
    """The same for torch.func, whose `grad` and `vjp` do not go through custom operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, c, rows, name):
        return torch.ops.warp_phys.step(x, c, rows, name)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx, adj_y):
        return _pull(ctx, adj_y)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_FORWARD_MODE)


class _PullInTransform(torch.autograd.Function):
    """Its vector-Jacobian product, likewise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, c, rows, adj_y, want_rows, name):
        return torch.ops.warp_phys.step_vjp(x, c, rows, adj_y, want_rows, name)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_adjoints):
        raise RuntimeError(_SECOND)


_SECOND = "a step can be differentiated once: second derivatives are not supported"
_FORWARD_MODE = (
    "a step has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad): use grad, "
    "vjp or jacrev"
)


def _flattened(info, in_dims, tensors):
    """Return tensors (batch, n), some of them with one more dimension, as rows (info.batch_size · batch, n)."""
    with_batch = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]
    batch = with_batch[0].shape[1]
    # one set of parameters for all samples becomes one set per sample
    return batch, [t.expand(-1, batch, -1).reshape(-1, t.shape[2]) for t in with_batch]


def _without_rows(in_dims, x, c, rows, *more):
    given = [(t, dim) for t, dim in zip((x, c, rows, *more), in_dims, strict=False) if t is not None]
    return [t for t, _ in given], [dim for _, dim in given]


@_step.register_vmap
def _(info, in_dims, x, c, rows, name):
    tensors, dims = _without_rows(in_dims, x, c, rows)
    batch, (x, c, *own) = _flattened(info, dims, tensors)
    y = torch.ops.warp_phys.step(x, c, own[0] if own else None, name)
    return y.reshape(info.batch_size, batch, -1), 0


@_step_vjp.register_vmap
def _(info, in_dims, x, c, rows, adj_y, want_rows, name):
    tensors, dims = _without_rows(in_dims, x, c, rows, adj_y)
    batch, (x, c, *own, adj_y) = _flattened(info, dims, tensors)
    adjoints = torch.ops.warp_phys.step_vjp(x, c, own[0] if own else None, adj_y, want_rows, name)
    shaped = tuple(a.reshape(info.batch_size, batch, -1) for a in adjoints[:2])
    adj_rows = adjoints[2].reshape(info.batch_size, batch, -1) if want_rows else x.new_empty((info.batch_size, 0, 0))
    return (*shaped, adj_rows), (0, 0, 0)


@torch.library.custom_op("warp_phys::unroll", mutates_args=())
def unroll(
    x0: torch.Tensor, rows: torch.Tensor | None, parameters: Sequence[torch.Tensor], steps: int, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return states, controls, and which samples are masked, of a `Rollout` known by a name.

    The parameters are those of its controller: they are arguments so that torch knows what the result depends on.
    """
    rollout = _ROLLOUTS[name]
    states, controls, masked, _ = rollout._forward(rollout._initial_states(x0), rows, keep=False)
    mask = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    mask[masked] = True
    return states, controls, mask


@unroll.register_fake
def _(x0, rows, parameters, steps, name):
    system = _ROLLOUTS[name].system
    states = x0.new_empty((steps + 1, x0.shape[0], system.state_size))
    controls = x0.new_empty((steps, x0.shape[0], system.control_size))
    return states, controls, x0.new_empty((x0.shape[0],), dtype=torch.bool)


@torch.library.custom_op("warp_phys::unroll_vjp", mutates_args=())
def _unroll_vjp(
    states: torch.Tensor,
    controls: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor | None,
    parameters: Sequence[torch.Tensor],
    adj_states: torch.Tensor,
    adj_controls: torch.Tensor,
    want_rows: bool,
    name: str,
) -> list[torch.Tensor]:
    """Return the adjoints of x0 and of the rows (empty if not wanted), and the update of each parameter."""
    rollout = _ROLLOUTS[name]
    masked, seeds = torch.nonzero(mask).flatten(), (adj_states, adj_controls)
    trainable = rollout._adapter.trainable  # the parameters themselves: the sums of M and R belong to them
    adj_x0, adj_rows, grads = rollout._backward(
        states, controls, rows, masked, None, trainable, seeds, want_rows
    )
    adj_rows = states.new_empty((0, 0)) if adj_rows is None else adj_rows
    return [adj_x0.clone(), adj_rows.clone(), *(grad.clone() for grad in grads)]


@_unroll_vjp.register_fake
def _(states, controls, mask, rows, parameters, adj_states, adj_controls, want_rows, name):
    adj_rows = rows.new_empty(rows.shape) if want_rows else states.new_empty((0, 0))
    return [states.new_empty(states.shape[1:]), adj_rows, *(p.new_empty(p.shape) for p in parameters)]


def _keep_unrolling(ctx, inputs, output):
    _, rows, parameters, _, ctx.name = inputs
    ctx.save_for_backward(*output, rows, *parameters)


def _pull_unrolling(ctx, adj_states, adj_controls, _adj_mask):
    states, controls, mask, rows, *parameters = ctx.saved_tensors
    want_rows = rows is not None and ctx.needs_input_grad[1]
    seeds = (
        torch.zeros_like(like) if adj is None else adj
        for adj, like in ((adj_states, states), (adj_controls, controls))
    )
    adj_x0, adj_rows, *grads = torch.ops.warp_phys.unroll_vjp(
        states, controls, mask, rows, parameters, *seeds, want_rows, ctx.name
    )
    return adj_x0, adj_rows if want_rows else None, grads, None, None


unroll.register_autograd(_pull_unrolling, setup_context=_keep_unrolling)
