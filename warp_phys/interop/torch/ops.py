"""The step of a system as a custom operator of torch, for `torch.compile` and `torch.func`.

Operators take tensors, numbers and text, so systems are known to them by a name.
"""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from warp_phys.core.arrays import as_structs, shape_message
from warp_phys.core.kernel_cache import start_warp
from warp_phys.interop.torch.dense import as_array, check_dense
from warp_phys.interop.torch.loss import in_transform, rows_of_parameters, structs_of, torch_stream
from warp_phys.rollout import check_sizes
from warp_phys.systems.base import Simulator, System


class _Known:
    """A name, and the system that it stands for. All equal systems hold it, so it lasts as long as the last of them."""

    def __init__(self, name: str, system: Simulator):
        self.name, self.system = name, system


_KNOWN: Any = weakref.WeakValueDictionary()
"""By name."""
_EQUAL: Any = weakref.WeakValueDictionary()
"""Of systems that can be told equal, by the system."""
_NUMBERS = itertools.count()


class Step:
    """y = S(x, c; p) as a function of torch tensors, differentiable once in reverse mode.

    A custom operator: it stays whole inside `torch.compile`, and `torch.func.vmap`, `grad` and `vjp` go through it.

    Args:
        system: A `System`, or anything with `step` and `step_vjp` (see `Simulator`). Compiled code does not
            keep it alive.

    Raises:
        TypeError: The system lacks a verb.

    >>> from warp_phys import CartPole
    >>> Step(CartPole())(torch.zeros(8, 4), torch.ones(8, 1)).shape
    torch.Size([8, 4])
    """

    def __init__(self, system: Simulator):
        check_sizes(system, object())
        start_warp()
        self.system = system
        self._name = name_of(system)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the name, which belongs to this process."""
        return {"system": self.system}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find a name in this process."""
        self.__init__(state["system"])  # type: ignore[misc]

    def __call__(self, x: torch.Tensor, c: torch.Tensor, parameters: Mapping[str, Any] | None = None) -> torch.Tensor:
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
        rows = rows_of_parameters(self.system, parameters, x)
        if torch.compiler.is_compiling() or not in_transform():
            return torch.ops.warp_phys.step(x, c, rows, self._name)
        return _StepInTransform.apply(x, c, rows, self._name)


def _check(name: str, tensor: Any, shape: Sequence[int], like: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.ndim != 2 or tensor.shape[1] != shape[1] or shape[0] not in (-1, tensor.shape[0]):
        raise ValueError(shape_message(name, shape, tensor.shape))
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must hold torch.float32 or torch.float64, got {tensor.dtype}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must hold {like.dtype} as x does, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on device {like.device} as x is, got {tensor.device}")


def system_of(name: str) -> Any:
    """Return the system of a name.

    Raises:
        RuntimeError: No object holds it any more.
    """
    return known_of(name).system


def known_of(name: str) -> _Known:
    """Return a name with its system; whoever keeps it keeps the system."""
    known = _KNOWN.get(name)
    if known is None:
        raise RuntimeError("the system in compiled code is no more: keep it until the backward pass is done")
    return known


def name_of(system: Any) -> str:
    """Return the name of a system, the same one for equal systems; it does not keep the system alive.

    It is left on the object too, where code that torch compiles finds it.
    """
    known, own = getattr(system, "_torch_known", None), isinstance(system, System)
    # a copy, or one from another process, may bear a name too
    if known is not None and _KNOWN.get(known.name) is known:
        if known.system is system or (own and known.system == system):
            return known.name
    known = _EQUAL.get(system) if own else None
    if known is None:
        # a copy has no name, so that it is not in a circle with what it stands for
        known = _Known(f"{type(system).__name__} {next(_NUMBERS)}", copy.copy(system) if own else system)
        _KNOWN[known.name] = known
        if own:
            known = _EQUAL.setdefault(known.system, known)
    try:
        object.__setattr__(system, "_torch_known", known)
        object.__setattr__(system, "_torch_name", known.name)
    except AttributeError:
        raise TypeError(
            f"system must be able to bear a name for torch's operators, {type(system).__name__} has slots"
        ) from None
    return known.name


@contextlib.contextmanager
def autograd_inside() -> Iterator[None]:
    """Have autograd record in the body of an operator, where torch leaves it out: a module or a function is there."""
    c, keys = torch._C, torch._C.DispatchKey
    excluded = c._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(keys, name))
    with c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded):
        yield


@torch.library.custom_op("warp_phys::step", mutates_args=())
def _step(x: torch.Tensor, c: torch.Tensor, rows: torch.Tensor | None, name: str) -> torch.Tensor:
    system, y = system_of(name), x.new_empty(x.shape)
    arrays = [as_array(tensor.detach().contiguous()) for tensor in (x, c)]
    with torch_stream(x.device):
        system.step(*arrays, as_array(y), *_structs(system, rows, x))
    return y


@_step.register_fake
def _(x, c, rows, name):
    return x.new_empty(x.shape)


@torch.library.custom_op("warp_phys::step_vjp", mutates_args=())
def _step_vjp(
    x: torch.Tensor, c: torch.Tensor, rows: torch.Tensor | None, adj_y: torch.Tensor, want_rows: bool, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the adjoints of x, of c and of each sample's physical parameters; of none if they are not wanted."""
    system = system_of(name)
    adj_x, adj_c = x.new_empty(x.shape), c.new_empty(c.shape)
    adj_rows = x.new_empty(_shape_of_rows(x, rows, want_rows))
    arrays = [as_array(tensor.detach().contiguous()) for tensor in (x, c, adj_y)]
    own = _structs(system, rows, x)
    if want_rows and isinstance(system, System):
        own += (as_structs(as_array(adj_rows), system.types(arrays[0].dtype).Parameters),)
    with torch_stream(x.device), autograd_inside():
        system.step_vjp(*arrays, as_array(adj_x), as_array(adj_c), *own)
    return adj_x, adj_c, adj_rows


@_step_vjp.register_fake
def _(x, c, rows, adj_y, want_rows, name):
    return x.new_empty(x.shape), c.new_empty(c.shape), x.new_empty(_shape_of_rows(x, rows, want_rows))


def _shape_of_rows(x, rows, want_rows):
    return (x.shape[0], rows.shape[1]) if want_rows else (0, 0)


def _structs(system: Any, rows: torch.Tensor | None, like: torch.Tensor) -> tuple:
    """Return the physical parameters as `step` takes them, or nothing for the system's own."""
    if rows is None or not isinstance(system, System):
        return ()
    return (structs_of(system, rows, like),)


def _keep(ctx, inputs, output):
    x, c, rows, ctx.name = inputs
    ctx.known = known_of(ctx.name)  # the system may be needed by nobody else when the backward pass comes
    ctx.save_for_backward(x, c, rows)


def _pull(ctx, adj_y):
    x, c, rows = ctx.saved_tensors
    want_rows = rows is not None and ctx.needs_input_grad[2]
    product: Any = torch.ops.warp_phys.step_vjp
    if not torch.compiler.is_compiling() and in_transform():
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
