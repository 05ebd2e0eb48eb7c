"""Any torch module read as a row program, and held against the module itself.

It is run on tensors that keep beside each number its place (`programs.reading`): layout is torch's own business, and
each operation on numbers becomes one of the table. `torch.export` would do the same, but takes longer to import than
everything else takes here.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import warp as wp
from torch._decomp import decomposition_table
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import Seeds, Trajectory
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch.chain import PRECISIONS, Planned, has_hooks
from warp_phys.interop.torch.combine import split
from warp_phys.interop.torch.contract import Examination, is_close, is_compiled
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.leaves import nodes_of
from warp_phys.interop.torch.loss import torch_stream
from warp_phys.interop.torch.state import state_of
from warp_phys.programs.block_network import BlockLinearisation, BlockNetwork
from warp_phys.programs.network import Network
from warp_phys.programs.reading import ALIKE, Reading, Unreadable, explained

TRIED = 9
"""States at which a program is held against its module."""

BATCH = 3
"""Samples of the tensors that stand for a batch of any size."""

KNOWN, LOST = -(1 << 62), -(1 << 62) + 1
"""In the memory of places: of a number that nothing of the module leads to; of one that no program has."""


_TENSOR: Any = torch.Tensor
BEHIND = (_TENSOR.data.__set__, _TENSOR.apply_, _TENSOR.map_, _TENSOR.map2_, _TENSOR.data_ptr)
"""What goes to a tensor's memory, past all that torch reports."""

WITHOUT_ADJOINT = {"sinc", "special_entr"}
"""What torch decomposes into operations whose adjoints are nan where its own is not."""

_READING = threading.Lock()
"""A module that is read has other tensors meanwhile: one reader at a time."""


def read_program(module: torch.nn.Module, inputs: int, like: torch.Tensor) -> Planned:
    """Return a module (B, D) → (B, K) as a program.

    Args:
        module: The module; it is evaluated, not changed.
        inputs: Numbers D of a state.
        like: A tensor of its precision, on its device.

    Raises:
        Unreadable: It is none; the message says in one sentence what stands in the way.
    """
    with explained("it cannot be read"), _READING:
        return _Reader(inputs, like.dtype).read(module)


def _refuse(module: torch.nn.Module) -> None:
    """Raise `Unreadable` for a module that does more than its forward says."""
    if is_compiled(module):
        raise Unreadable("it is compiled already")
    for part in module.modules():
        kind = type(part)
        if has_hooks(part):
            raise Unreadable("it has hooks, which a program would not call")
        if kind.__module__.startswith(("torch.nn.parallel", "torch.distributed")):
            raise Unreadable(f"a {kind.__name__} does more than to compute")


def read_and_check(module: torch.nn.Module, system: Any, blocks: bool) -> Planned:
    """Return a module as a program that gives the module's own controls and derivatives with a system.

    Args:
        module: The module.
        system: The system.
        blocks: Whether it is to run in blocks of threads, as on CUDA.

    Raises:
        Unreadable: As `read_program`; or there is none that does.
    """
    _refuse(module)
    like = next((p for p in module.parameters()), torch.zeros(()))
    if like.dtype not in PRECISIONS:
        raise Unreadable(f"its numbers are {like.dtype}")
    before = _state_between_calls(module)
    x = torch.as_tensor(system.sample(TRIED, seed=0, dtype=str(like.dtype).removeprefix("torch."))).to(like.device)
    try:
        found = Examination(module).begin(
            [p for p in module.parameters() if p.requires_grad], x, system.control_size, 1, always=True
        )
    except (NotRepeatable, ValueError, TypeError, RuntimeError) as error:
        raise Unreadable(f"it cannot be tried out: {error}") from None
    if any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes_of(found.here.output)):
        raise Unreadable("it has an autograd.Function, whose backward pass is its own")
    if found.whole:
        raise Unreadable("its rows cannot be differentiated apart, or hooks see its gradients")
    try:
        alone = found.at(x[:1]).output.detach()
    except Exception:
        raise Unreadable("it does not take one row alone") from None
    if not is_close(alone, found.here.output[:1].detach()):
        raise Unreadable("one row alone goes another way")
    if len(found.leaves) > sum(p.requires_grad for p in module.parameters()):
        raise Unreadable("it depends on tensors that are no parameters of it")
    found.at(x[:BATCH])  # what it keeps by the size of a batch, it keeps before it is read
    if _state_between_calls(module) != before:
        raise Unreadable("calls change it")
    read = read_program(module, system.state_size, like)
    if read.plan.outputs != system.control_size:
        raise Unreadable(f"it returns {read.plan.outputs} numbers")
    held = {id(tensor) for tensor, reached in zip(read.tensors, read.plan.reached(), strict=True) if reached}
    trained = [p for p in module.parameters() if p.requires_grad]
    if trained and not any(id(p) in held for p in trained):
        raise Unreadable("it uses none of its parameters")
    if _state_between_calls(module) != before:
        raise Unreadable("calls change it")
    with explained("no code can be made of it"), torch_stream(like.device):
        _check_numbers(found, (_run_in_blocks if blocks else _run)(read, found, system))
    return read


def _state_between_calls(module: torch.nn.Module) -> Any:
    """Return what no call may change: the numbers of buffers too, by how often they were written to."""
    written = [(id(buffer), 0 if buffer.is_inference() else buffer._version) for buffer in module.buffers()]
    return state_of(module, outside=True), written


def _run_in_blocks(read: Planned, found: Any, system: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return what `_run` returns, by the kernels of CUDA."""
    x, seed = found.here.x.detach(), found.seed
    states, controls = x.new_zeros((2, *x.shape)), x.new_zeros((1, *seed.shape))
    states[0] = x
    x_array, c_array = as_array(states), as_array(controls)
    network = BlockNetwork(read.plan, x_array.dtype, x_array.device)
    addresses = [0 if t is None else t.data_ptr() for t in read.tensors]
    network.unroll(addresses, system, x_array, c_array, system.check_parameters(None, x_array, len(x)))
    places, size = {}, 0
    for leaf in found.leaves:
        places[id(leaf)] = size
        size += leaf.numel()
    offsets = [places.get(id(t), -1) for t in read.tensors]
    linear = BlockLinearisation(network, addresses, offsets, x_array[0], Workspace())
    lam, gradient = torch.zeros_like(x), x.new_zeros(size)
    linear.pull(as_array(seed), as_array(lam))
    linear.contract(as_array(seed[None]), [as_array(gradient)])
    return controls[0], lam, split(gradient, found.leaves)


def _run(read: Planned, found: Any, system: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return controls, adjoints of the states and gradients of all leaves from one fused step there and back."""
    x, seed = found.here.x.detach(), found.seed
    network = Network(read.plan, wp.dtype_from_torch(x.dtype))
    network.pack([0 if t is None else t.data_ptr() for t in read.tensors])
    states, controls = torch.zeros((2, *x.shape), dtype=x.dtype), torch.zeros((1, *seed.shape), dtype=x.dtype)
    states[0] = x
    arrays = [as_array(t) for t in (states, controls, torch.zeros_like(states), seed[None].clone())]
    own = system.check_parameters(None, arrays[0], len(x))
    kept = network.unroll(system, arrays[0], arrays[1], own, keep=True)
    lam, workspace = torch.zeros((1, *x.shape), dtype=x.dtype), Workspace()
    gates = as_array(torch.ones((1, 1, 2), dtype=x.dtype))
    trajectory = Trajectory(arrays[0], arrays[1], own, kept)
    packed = network.sweep(system, trajectory, Seeds(arrays[2], arrays[3]), gates, as_array(lam), workspace)
    updates = {id(leaf): torch.zeros_like(leaf) for leaf in found.leaves}
    targets = [updates[id(t)].data_ptr() if id(t) in updates else 0 for t in read.tensors]
    network.unpack(packed, [targets])
    return controls[0], lam[0], list(updates.values())


def _check_numbers(found: Any, numbers: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> None:
    """Raise `Unreadable` unless the numbers that a program gave are the controls and adjoints that autograd gives."""
    controls, adj_x, updates = numbers
    expected = found.here.adjoints(found.seed)
    pairs = [(controls, found.here.output.detach()), *zip([adj_x, *updates], expected, strict=True)]
    scale = torch.stack([e.abs().max() for e in expected if e.numel()]).max()
    for i, (got, wanted) in enumerate(pairs):
        if not is_close(got, wanted, scale if i else None):
            raise Unreadable("what was read of it gives other numbers than it gives itself")


def _name(target: Any) -> str:
    """Return the name of an operation without its namespace."""
    return str(target).partition(".")[2]


def _base(target: Any) -> str:
    """Return the name of an operation without namespace and overload."""
    return _name(target).partition(".")[0]


class _Followed(torch.Tensor):
    """A tensor that a reader follows: what torch does with it goes to the reader. It has no memory of its own."""

    value: torch.Tensor
    """What torch gives on example states, with the memory that it shares with others."""
    reader: "_Reader"

    @staticmethod
    def __new__(cls, value, reader):
        like = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        followed = torch.Tensor._make_wrapper_subclass(cls, value.shape, device=value.device, **like)
        followed.value, followed.reader = value, reader
        return followed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            if func in BEHIND:
                raise Unreadable(f"it uses the memory of a tensor, by {func.__name__}")
            with torch._C.DisableTorchFunctionSubclass():  # results are no subclass by themselves
                return func(*args, **(kwargs or {}))
        except Exception as error:  # of what torch does not report, such as numpy()
            for followed in _pytree.tree_leaves((args, kwargs)):
                if isinstance(followed, _Followed):
                    followed.reader.failed = error
            raise

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        followed = next(v for v in _pytree.tree_leaves((args, kwargs)) if isinstance(v, _Followed))
        return followed.reader.called(func, args, kwargs or {})


class _Follow(TorchDispatchMode):
    """Has a reader see all that torch does, what it makes of nothing too."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.reader.called(func, args, kwargs or {})


def _on_tensors(method: Callable) -> Any:
    """Return a method of `Reading` on arrays of places as one on tensors of them."""

    def on_tensors(reader: "_Reader", *arguments: Any) -> torch.Tensor:
        taken = _pytree.tree_map_only(torch.Tensor, lambda v: v.numpy(force=True), arguments)
        return torch.from_numpy(method(reader.reading, *taken))

    return on_tensors


@contextlib.contextmanager
def _in_place_of(module: torch.nn.Module, others: dict[int, torch.Tensor]) -> Iterator[None]:
    """Have a module find others for its parameters and buffers, by their identity; then all attributes are as before.

    `torch.func.functional_call` would leave recurrent networks with other attributes than they had.
    """
    parts = list(module.modules())
    dicts = [content for part in parts for content in (vars(part), part._parameters, part._buffers)]
    before = [dict(content) for content in dicts]
    try:
        for part in parts:
            for content in (part._parameters, part._buffers):
                swapped: dict[str, Any] = {name: others[id(t)] for name, t in content.items() if t is not None}
                content.update(swapped)
        yield
    finally:
        for content, own in zip(dicts, before, strict=True):
            content.clear()
            content.update(own)


class _Reader:
    """Runs a module on tensors that are followed, and builds the program of what it computes.

    Each memory that torch has for numbers has one of places beside it, so that views, and writes through them, are
    torch's own business. A place is `KNOWN` where neither states nor tensors of the module lead to the number.
    """

    def __init__(self, inputs: int, dtype: torch.dtype):
        self.dtype = dtype
        self.reading = Reading(inputs, BATCH)
        self._follow = _Follow(self)
        self._places: dict[int, torch.Tensor] = {}
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """What is followed, by the identity of its value; also tensors from outside, with their copies."""
        self.failed: Exception | None = None
        """What stood in the way, though the module caught it to go another way."""
        self._apart: set[int] = set()
        """Memory of what is seen outside of autograd, and of copies that stand for it there."""

    constant = _on_tensors(Reading.constant)
    joined = _on_tensors(Reading.joined)
    elementwise = _on_tensors(Reading.elementwise)
    arithmetic = _on_tensors(Reading.arithmetic)
    power = _on_tensors(Reading.power)
    reduced = _on_tensors(Reading.reduced)
    total = _on_tensors(Reading.total)
    largest = _on_tensors(Reading.largest)
    smallest = _on_tensors(Reading.smallest)
    dense = _on_tensors(Reading.dense)
    product = _on_tensors(Reading.product)

    def read(self, module: torch.nn.Module) -> Planned:
        """Return the program of a module."""
        named = [*module.named_parameters(), *module.named_buffers()]
        followed = {id(tensor): self._own(name, tensor) for name, tensor in named}
        self._memory = {tensor.untyped_storage().data_ptr() for _, tensor in named if tensor.numel()}
        states = self.reading.states()
        x = self._with_places(torch.zeros(states.shape, dtype=self.dtype), torch.from_numpy(states))
        with _in_place_of(module, followed), torch.enable_grad(), self._follow:
            output: Any = module(x)
        if self.failed is not None:
            raise self.failed
        if not isinstance(output, torch.Tensor):
            raise Unreadable("it does not return one tensor alone")
        if output.ndim != 2:
            raise Unreadable(f"what it returns has {output.ndim} dimensions")
        program, tensors = self.reading.finish(self._places_of(self._value(output)).numpy())
        if not program.readers:
            raise Unreadable("it reads no parameter")
        return Planned(program, tensors, is_chain=False)

    def _own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stands for a parameter or buffer."""
        value = tensor.detach().cpu().clone()  # calls may write to it
        self._kept[id(tensor)] = tensor, value
        if not tensor.is_floating_point():
            return self._followed(value)
        if tensor.dtype != self.dtype or not tensor.is_contiguous():
            raise Unreadable(f"{name} is not contiguous, or of another precision")
        return self._with_places(value, torch.from_numpy(self.reading.tensor(tensor, tensor.shape)))

    # --- values and places

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the numbers of a tensor; of one from outside a copy, for it may be written to."""
        if isinstance(tensor, _Followed):
            return tensor.value
        if id(tensor) not in self._kept:
            if tensor.untyped_storage().data_ptr() in self._memory:
                raise Unreadable("it reads its parameters or buffers as other tensors")
            self._kept[id(tensor)] = tensor, tensor.detach().cpu().clone()
        return self._kept[id(tensor)][1]

    def _followed(self, value: torch.Tensor) -> torch.Tensor:
        """Return what follows a tensor of numbers: always the same."""
        if id(value) not in self._kept:
            self._kept[id(value)] = _Followed(value, self), value
        return self._kept[id(value)][0]

    def _with_places(self, value: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Follow numbers, which have these places."""
        storage = value.untyped_storage()
        key, length = storage._cdata, storage.nbytes() // value.element_size()
        if key not in self._places:
            self._places[key] = torch.full((length,), KNOWN)
        if places.shape != value.shape:
            raise Unreadable(f"places {tuple(places.shape)} are no numbers {tuple(value.shape)}")
        self._beside(value).copy_(places)
        return self._followed(value)

    def _beside(self, value: torch.Tensor) -> torch.Tensor:
        """Return the memory of places beside that of numbers; there must be one."""
        places = self._places[value.untyped_storage()._cdata]
        return places.as_strided(value.shape, value.stride(), value.storage_offset())

    def _is_known(self, value: torch.Tensor) -> bool:
        """Whether neither states nor tensors of the module lead to any of these numbers."""
        return value.untyped_storage()._cdata not in self._places or bool((self._beside(value) == KNOWN).all())

    def _places_of(self, value: torch.Tensor) -> torch.Tensor:
        """Return the places of numbers, those of known ones as constants of the program."""
        if self._is_known(value):
            return self.constant(value)
        places = self._beside(value)
        if (places == LOST).any():
            raise Unreadable("it uses what an operation gives beside its numbers")
        known = places == KNOWN
        return self.joined(torch.where(known, self.constant(value), places) if known.any() else places.contiguous())

    # --- what torch does

    def called(self, function: Any, arguments: tuple, options: dict) -> Any:
        """Return what an operation gives: numbers of its own, and places."""
        try:
            return self._called(function, arguments, options)
        except Exception as error:
            self.failed = error
            raise

    def _called(self, function: Any, arguments: tuple, options: dict) -> Any:  # noqa: PLR0911, a kind each
        base, tags = _base(function), function.tags
        if torch.Tag.nondeterministic_seeded in tags and base not in RULES:
            raise Unreadable(f"it draws random numbers, by {base}")
        taken, more = _pytree.tree_map_only(torch.Tensor, self._value, (arguments, options))
        if torch.Tag.inplace_view in tags:
            return self._reshape(function, arguments, taken)
        tensors = [v for v in _pytree.tree_leaves((taken, more)) if isinstance(v, torch.Tensor)]
        if base in CREATED or all(map(self._is_known, tensors)):
            made = function(*taken, **more)
            if "empty" in base:
                made.zero_()  # what nobody writes to does not matter
            return _pytree.tree_map_only(torch.Tensor, self._followed, made)
        if base.startswith("_assert"):
            return None
        if function._schema.is_mutable:
            return self._write(function, arguments, options)
        if function.is_view:
            return self._viewed(function(*taken, **more), taken[0].dtype, base)
        rule = RULES.get(_name(function)) or RULES.get(base)
        if rule is None and base not in {*INDEXING, *LAYOUT, *SAME}:
            return self._decomposed(function, arguments, options)
        made = function(*taken, **more)
        if base in INDEXING:
            places = self._indexed(function, taken, more)
        else:
            taken, more = _pytree.tree_map_only(torch.Tensor, self._places_of, (taken, more))
            if base in LAYOUT:
                places = _pytree.tree_map_only(torch.Tensor, self.joined, function(*taken, **more))
            else:
                places = taken[0] if rule is None else rule(self, *taken, **more)
        return self._made(made, places, base)

    def _viewed(self, made: Any, dtype: torch.dtype, base: str) -> Any:
        """Follow views of numbers of a type."""
        if isinstance(made, torch.Tensor) and made.dtype != dtype:
            raise Unreadable(f"it takes the bits of its numbers for {made.dtype}")
        is_stopped = base == "detach" or not torch.is_grad_enabled()
        return _pytree.tree_map_only(torch.Tensor, self._stopped if is_stopped else self._followed, made)

    def _made(self, made: Any, places: Any, base: str) -> Any:
        """Follow what an operation has made; of several tensors those that have places."""
        if not isinstance(made, torch.Tensor):
            places = (*places, *[None] * (len(made) - len(places)))
            return type(made)(self._made(m, p, base) for m, p in zip(made, places, strict=True))
        if places is None:
            return self._with_places(made, torch.full(made.shape, LOST))
        if made.dtype != self.dtype and (made.dtype != torch.bool or base not in TRUTH):
            raise Unreadable(f"its {base} gives numbers of type {made.dtype}")
        followed = self._with_places(made, places)
        return followed if torch.is_grad_enabled() else self._stopped(made)

    def _stopped(self, value: torch.Tensor) -> torch.Tensor:
        """Follow numbers outside of autograd: what adjoints would lead back from has a memory of its own."""
        if not value.is_floating_point() or self._is_known(value) or not self._moves(value):
            return self._followed(value)
        copy = value.clone()
        self._apart |= {v.untyped_storage()._cdata for v in (value, copy)}
        return self._with_places(copy, self.elementwise("stop", [self._places_of(value)]))

    def _moves(self, value: torch.Tensor) -> bool:
        return self.reading.moves(self._places_of(value).numpy())

    def _write(self, function: Any, arguments: tuple, options: dict) -> Any:
        """Write in place what the operation that does not would give."""
        target, base = arguments[0], _base(function)
        value = self._value(target)
        if not base.endswith("_") or not isinstance(target, _Followed):
            raise Unreadable(f"it writes to a tensor that is given, by {base}")
        if value.untyped_storage()._cdata in self._apart or (not torch.is_grad_enabled() and self._moves(value)):
            raise Unreadable(f"it writes to a tensor outside of autograd, by {base}")
        with self._follow:
            if base == "copy_":
                made = torch.ops.aten.clone(arguments[1])
            else:
                made = getattr(getattr(torch.ops.aten, base[:-1]), function._overloadname)(*arguments, **options)
        source = self._value(made)
        places = self._places_of(source).expand(value.shape)
        if value.dtype != source.dtype and not self._is_known(source):
            raise Unreadable(f"its {base} gives numbers of type {value.dtype}")
        value.copy_(source)
        self._with_places(value, places)
        return target

    def _reshape(self, function: Any, arguments: tuple, taken: tuple) -> Any:
        """Move the numbers of a tensor in place: its own and, without dispatch, those that it says it has."""
        if _base(function).removesuffix("_") not in LAYOUT:
            raise Unreadable(f"it changes the size of a tensor in place, by {_base(function)}")
        function(*taken)
        with torch._C._DisableTorchDispatch():
            function(*arguments)
        return arguments[0]

    def _decomposed(self, function: Any, arguments: tuple, options: dict) -> Any:
        """Return what an operation gives that torch writes in terms of others."""
        if _base(function) == "_local_scalar_dense":
            raise Unreadable("it takes a number out of a tensor that it computes")
        written = decomposition_table.get(function)
        if written is None or _base(function) in WITHOUT_ADJOINT:
            raise Unreadable(f"it uses {_base(function)}, which is no operation of row programs")
        with self._follow:
            return written(*arguments, **options)

    def _indexed(self, function: Any, taken: tuple, more: dict) -> torch.Tensor:
        """Return the places that are chosen by numbers that are known."""
        base = _base(function)
        where = 2 if base in ("index_select", "gather") else 1
        if base == "index_put" and taken[3:] and taken[3]:
            raise Unreadable("it adds to numbers by their place")
        chosen = [v for v in _pytree.tree_leaves(taken[where]) if isinstance(v, torch.Tensor)]
        if not all(map(self._is_known, chosen)):
            raise Unreadable(f"its {base} picks numbers by what it computes")
        places = [
            v if i == where else _pytree.tree_map_only(torch.Tensor, self._places_of, v) for i, v in enumerate(taken)
        ]
        return self.joined(function(*places, **more))


def _binary(operation: str) -> Callable:
    def rule(reader: _Reader, a: Any, b: Any, alpha: float = 1) -> Any:
        if alpha != 1:
            b = reader.elementwise("scale", [b], alpha) if isinstance(b, torch.Tensor) else b * alpha
        return reader.arithmetic(operation, a, b)

    return rule


def _unary(operation: str, *numbers: float) -> Callable:
    return lambda reader, a: reader.elementwise(operation, [a], *numbers)


def _power(reader: _Reader, a: Any, n: Any) -> Any:
    if isinstance(n, torch.Tensor) or not isinstance(a, torch.Tensor):
        return reader.elementwise("raise", [a, n])
    if n == 0:
        return reader.elementwise("shift", [reader.elementwise("scale", [reader.elementwise("sign", [a])], 0.0)], 1.0)
    return reader.power(a, n)


def _rounded_quotient(reader: _Reader, a: Any, b: Any, rounding_mode: Any = None) -> Any:
    if rounding_mode == "floor":  # as torch: of what is left without the remainder, a whole number but for rounding
        rest = _of_two("remainder")(reader, a, b)
        whole = _binary("divide")(reader, _binary("subtract")(reader, a, rest), b)
        return reader.elementwise("floor", [reader.elementwise("shift", [whole], 0.5)])
    y = _binary("divide")(reader, a, b)
    return y if rounding_mode is None else reader.elementwise("truncated", [y])


def _clamp(reader: _Reader, a: Any, least: Any = None, most: Any = None) -> Any:
    if isinstance(least, torch.Tensor) or isinstance(most, torch.Tensor):
        if least is not None:
            a = reader.elementwise("maximum", [a, least], 1.0, 0.0)
        return a if most is None else reader.elementwise("minimum", [a, most], 1.0, 0.0)
    return reader.elementwise("clamp", [a], -math.inf if least is None else least, math.inf if most is None else most)


def _elu(reader: _Reader, a: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    if input_scale == 1:
        return reader.elementwise("scale", [reader.elementwise("elu", [a], alpha)], scale)
    below = reader.elementwise("elu", [reader.elementwise("scale", [a], input_scale)], alpha)
    y = reader.elementwise("choose", [reader.elementwise("greater", [a, 0.0]), a, below])
    return reader.elementwise("scale", [y], scale)


def _hard_sigmoid(reader: _Reader, a: Any) -> Any:
    shifted = reader.elementwise("hardtanh", [reader.elementwise("shift", [a], 3.0)], 0.0, 6.0)
    return reader.elementwise("scale", [shifted], 1.0 / 6.0)


def _gelu(reader: _Reader, a: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        scaled = reader.elementwise("scale", [a], math.sqrt(0.5))
        cumulative = reader.elementwise("error function", [scaled], 2.0 / math.sqrt(math.pi))
    else:
        cube = reader.elementwise(
            "scale", [reader.elementwise("multiply", [reader.elementwise("square", [a]), a])], 0.044715
        )
        inner = reader.elementwise("scale", [reader.elementwise("add", [a, cube])], math.sqrt(2.0 / math.pi))
        cumulative = reader.elementwise("tanh", [inner])
    half = reader.elementwise("scale", [reader.elementwise("shift", [cumulative], 1.0)], 0.5)
    return reader.elementwise("multiply", [a, half])


def _mean(reader: _Reader, a: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    dims = [dims] if isinstance(dims, int) else dims
    total = _sum(reader, a, dims, keepdim)
    count = math.prod(a.shape[d] for d in (dims or range(a.ndim)))
    return reader.elementwise("scale", [total], 1.0 / count)


def _over(a: Any, dims: Any) -> list[int]:
    """Return dimensions as a list; all of them where none are given."""
    dims = [dims] if isinstance(dims, int) else list(dims or range(a.ndim))
    return [d % a.ndim for d in dims]


def _over_all(find: Callable) -> Callable:
    """Return the rule of a reduction over given dimensions, or all of them."""

    def rule(reader: _Reader, a: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        y = find(reader, a, _over(a, dims))
        return y if keepdim else y.squeeze(_over(a, dims))

    return rule


_sum, _largest, _smallest = _over_all(_Reader.total), _over_all(_Reader.largest), _over_all(_Reader.smallest)


def _pairwise(operation: str, *numbers: float) -> Callable:
    """Return the rule of an operation on all numbers along a dimension, two by two; without the place of the result."""

    def rule(reader: _Reader, a: Any, dim: Any = None, keepdim: bool = False) -> Any:
        a = a.flatten() if dim is None else a.movedim(dim, -1)
        while a.shape[-1] > 1:
            pairs = a.shape[-1] // 2 * 2
            made = reader.elementwise(operation, [a[..., 0:pairs:2], a[..., 1:pairs:2]], *numbers)
            a = torch.cat([made, a[..., pairs:]], -1)
        return a.movedim(-1, dim) if keepdim and dim is not None else a[..., 0]

    return rule


def _variance(reader: _Reader, a: Any, dims: Any = None, correction: Any = 1, keepdim: bool = False) -> Any:
    apart = reader.elementwise("subtract", [a, _mean(reader, a, _over(a, dims), True)])
    total = _sum(reader, reader.elementwise("square", [apart]), dims, keepdim)
    count = math.prod(a.shape[d] for d in _over(a, dims)) - (1 if correction is None else correction)
    return reader.elementwise("scale", [total], 1.0 / count)


def _deviation(reader: _Reader, *arguments: Any, **options: Any) -> Any:
    return reader.elementwise("length", [_variance(reader, *arguments, **options)])


def _norm(reader: _Reader, a: Any, ord: Any = 2, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if ord == 2:
        return reader.elementwise("length", [_sum(reader, reader.elementwise("square", [a]), dims, keepdim)])
    sizes = reader.elementwise("absolute", [a])
    if ord in (1, math.inf):
        return (_sum if ord == 1 else _largest)(reader, sizes, dims, keepdim)
    raise Unreadable(f"it uses a norm of order {ord}")


def _cumulated(reader: _Reader, a: Any, dim: int, dtype: Any = None) -> Any:
    a = a.movedim(dim, -1)
    sums = [a[..., 0]]
    for k in range(1, a.shape[-1]):
        sums.append(reader.elementwise("add", [sums[-1], a[..., k]]))
    return torch.stack(sums, -1).movedim(-1, dim)


def _normalise(reader: _Reader, a: Any, dims: int, eps: float, centre: bool) -> Any:
    over = list(range(a.ndim - dims, a.ndim))
    if centre:
        a = reader.elementwise("subtract", [a, _mean(reader, a, over, True)])
    variance = _mean(reader, reader.elementwise("square", [a]), over, True)
    factor = reader.elementwise("reciprocal root", [reader.elementwise("shift", [variance], eps)])
    return reader.elementwise("multiply", [a, factor])


def _layer_norm(reader: _Reader, a: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    y = _normalise(reader, a, len(shape), eps, centre=True)
    y = y if weight is None else reader.elementwise("multiply", [y, weight])
    return (y if bias is None else reader.elementwise("add", [y, bias]),)


def _group_norm(
    reader: _Reader, a: Any, weight: Any, bias: Any, _batch: int, _channels: int, _size: int, groups: int, eps: float
) -> Any:
    y = _normalise(reader, a.reshape(a.shape[0], groups, -1), 1, eps, centre=True).reshape(a.shape)
    shape = (-1, *[1] * (a.ndim - 2))
    y = y if weight is None else reader.elementwise("multiply", [y, weight.reshape(shape)])
    return (y if bias is None else reader.elementwise("add", [y, bias.reshape(shape)]),)


def _batch_norm(
    reader: _Reader, a: Any, weight: Any, bias: Any, mean: Any, variance: Any, train: bool, _momentum: float,
    eps: float,
) -> Any:  # fmt: skip
    if train:
        raise Unreadable("it takes statistics of the batch")
    shape = (-1, *[1] * (a.ndim - 2))
    factor = reader.elementwise("reciprocal root", [reader.elementwise("shift", [variance], eps)])
    factor = factor if weight is None else reader.elementwise("multiply", [factor, weight])
    apart = reader.elementwise("subtract", [a, mean.reshape(shape)])
    y = reader.elementwise("multiply", [apart, factor.reshape(shape)])
    return (y if bias is None else reader.elementwise("add", [y, bias.reshape(shape)]),)


def _softmax(reader: _Reader, a: Any, dim: int, dtype: Any = None) -> Any:
    raised = reader.elementwise(
        "exponential", [reader.elementwise("subtract", [a, reader.reduced("largest", a, [dim])])]
    )
    return reader.elementwise("divide", [raised, reader.reduced("sum", raised, [dim])])


def _log_softmax(reader: _Reader, a: Any, dim: int, dtype: Any = None) -> Any:
    apart = reader.elementwise("subtract", [a, reader.reduced("largest", a, [dim])])
    total = reader.reduced("sum", reader.elementwise("exponential", [apart]), [dim])
    return reader.elementwise("subtract", [apart, reader.elementwise("logarithm", [total])])


def _log_sum_exp(reader: _Reader, a: Any, dims: Any, keepdim: bool = False) -> Any:
    most = reader.reduced("largest", a, _over(a, dims))
    apart = reader.elementwise("exponential", [reader.elementwise("subtract", [a, most])])
    total = reader.elementwise("logarithm", [reader.reduced("sum", apart, _over(a, dims))])
    y = reader.elementwise("add", [total, reader.elementwise("stop", [most])])
    return y if keepdim else y.squeeze(_over(a, dims))


def _attention(
    reader: _Reader, q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *, attn_mask: Any = None,
    scale: Any = None,
) -> Any:  # fmt: skip
    if dropout:
        raise Unreadable("it uses attention with dropout")
    scores = reader.product(q, k.transpose(-2, -1))
    scores = reader.elementwise("scale", [scores], 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        attn_mask = reader.constant(torch.ones(q.shape[-2], k.shape[-2]).tril().log())
    if attn_mask is not None:
        scores = reader.elementwise("add", [scores, attn_mask])
    return (reader.product(_softmax(reader, scores, -1), v),)


def _matmul(reader: _Reader, a: Any, b: Any) -> Any:
    if a.ndim == 1:
        return _matmul(reader, a[None], b).squeeze(0 if b.ndim == 1 else -2)
    if b.ndim == 1:
        return _matmul(reader, a, b[:, None]).squeeze(-1)
    if (a < 0).all() and not (b < 0).all():
        return _matmul(reader, b.mT, a.mT).mT
    flat = b.flatten(0, -3) if b.ndim > 2 else b[None]
    if (b < 0).all() and torch.equal(flat, flat[:1].expand_as(flat)) and a.ndim >= b.ndim:
        return reader.dense(a, flat[0].T)
    return reader.product(a, b)


def _add_product(reader: _Reader, c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if alpha == beta == c.ndim == 1 and (b < 0).all():
        return reader.dense(a, b.T, c)
    parts = (c, beta), (_matmul(reader, a, b), alpha)
    return reader.elementwise("add", [v if f == 1 else reader.elementwise("scale", [v], f) for v, f in parts])


def _bilinear(reader: _Reader, a: Any, weight: Any, b: Any, *expanded: Any) -> Any:
    """What torch makes of a bilinear layer, but for its biases."""
    if [*map(list, expanded[:4])] != [[1, 3], [0], [1, 2], [2, 3]]:
        raise Unreadable("it uses a product of three tensors")
    pairs = reader.elementwise("multiply", [a[..., :, None], b[..., None, :]])
    return reader.dense(pairs.flatten(-2), weight.flatten(1))


def _convolution(
    reader: _Reader, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    _output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    if transposed:
        raise Unreadable("it uses a transposed convolution")
    kernel = weight.shape[2:]
    windows = _windows(x, kernel, stride, padding, dilation, reader.constant(0.0))
    parts = windows.movedim(1, len(kernel) + 1).chunk(groups, len(kernel) + 1)
    weights = weight.flatten(1).chunk(groups)
    biases = [None] * groups if bias is None or groups > 1 else [bias]
    made = [reader.dense(p.flatten(-1 - len(kernel)), w, b) for p, w, b in zip(parts, weights, biases, strict=True)]
    y = torch.cat(made, -1)
    return (y if bias is None or groups == 1 else reader.elementwise("add", [y, bias])).movedim(-1, 1)


def _windows(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, filling: Any) -> Any:
    """Return the windows of x (batch, channels, *grid) as (batch, channels, *positions, *kernel)."""
    for k, size in enumerate(kernel):
        pad, step, apart = (v[k % len(v)] for v in (padding, stride, dilation))
        shape = [pad if d == k + 2 else size for d, size in enumerate(x.shape)]
        edge = filling.expand(shape)
        x = torch.cat([edge, x, edge], k + 2).unfold(k + 2, (size - 1) * apart + 1, step)[..., ::apart]
    return x


def _max_pool(
    reader: _Reader,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    dilation: Any = (1,),
    ceil: bool = False,
) -> Any:
    if ceil:
        raise Unreadable("it pools over windows that are not whole")
    least = reader.constant(-math.inf)
    windows = reader.joined(_windows(x, kernel, stride or kernel, padding, dilation, least))
    return (_pairwise("maximum", 1.0, 0.0)(reader, windows.flatten(-len(kernel)), -1),)


def _mean_pool(
    reader: _Reader, x: Any, kernel: Any, stride: Any = (), padding: Any = (0,), ceil: bool = False,
    counts_padding: bool = True, divisor: Any = None,
) -> Any:  # fmt: skip
    if ceil or divisor or (any(padding) and not counts_padding):
        raise Unreadable("it pools over windows that are not whole")
    windows = _windows(x, kernel, stride or kernel, padding, (1,), reader.constant(0.0))
    return _mean(reader, reader.joined(windows).flatten(-len(kernel)), -1)


def _pad(reader: _Reader, x: Any, pad: Any, value: float = 0) -> Any:
    # codes are whole numbers, exact in double precision
    return reader.joined(torch.nn.functional.pad(x, pad, value=int(reader.constant(value))))


def _pad_like(mode: str) -> Callable:
    """Return the rule of a padding by numbers of the tensor itself."""
    return lambda reader, x, pad: torch.nn.functional.pad(x.double(), pad, mode).long()


def _to(reader: _Reader, a: Any, *arguments: Any, dtype: Any = None, **_options: Any) -> Any:
    wanted = {dtype, *(v for v in arguments if isinstance(v, torch.dtype))} - {None}
    if wanted - {reader.dtype, torch.bool}:
        raise Unreadable(f"it converts numbers to {wanted.pop()}")
    return _not(reader, _not(reader, a)) if torch.bool in wanted else a


def _not(reader: _Reader, a: Any) -> Any:
    return reader.elementwise("equal", [a, 0.0])


def _differ(reader: _Reader, a: Any, b: Any) -> Any:
    return _not(reader, reader.elementwise("equal", [a, b]))


def _of_two(operation: str, swapped: bool = False) -> Callable:
    return lambda reader, a, b: reader.elementwise(operation, [b, a] if swapped else [a, b])


LAYOUT = set(
    "reshape permute transpose t slice select unsqueeze squeeze expand expand_as flatten unflatten movedim numpy_T mT "
    "split split_with_sizes chunk unbind flip roll narrow repeat repeat_interleave tile cat stack select_scatter "
    "slice_scatter unfold diagonal".split()
)
"""Operations that move numbers, as torch itself does."""

INDEXING = {"index", "index_select", "gather", "embedding", "index_put"}
"""Those that move numbers to where others say."""

CREATED = set("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split())
"""Operations that take shape and type of their argument alone."""

TRUTH = set(
    "gt ge lt le eq ne where logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not "
    "bitwise_xor any all _to_copy to".split()
)
"""Operations that may give truth values."""

SAME = {"clone", "alias", "lift_fresh_copy", "lift_fresh", "lift"}
"""Operations that give back their argument, as far as numbers go."""

RULES: dict[str, Callable] = {name: _unary(*operation) for name, operation in ALIKE.items()} | {
    "add": _binary("add"), "sub": _binary("subtract"), "mul": _binary("multiply"), "div": _binary("divide"),
    "div.Tensor_mode": _rounded_quotient, "rsub": lambda r, a, b, alpha=1: _binary("subtract")(r, b, a, alpha),
    "reciprocal": _unary("reciprocal"), "pow": _power,
    "log2": lambda r, a: r.elementwise("scale", [r.elementwise("logarithm", [a])], 1.0 / math.log(2.0)),
    "log10": lambda r, a: r.elementwise("scale", [r.elementwise("logarithm", [a])], 1.0 / math.log(10.0)),
    "exp2": lambda r, a: r.elementwise("exponential", [r.elementwise("scale", [a], math.log(2.0))]),
    "atan2": lambda r, a, b: r.elementwise("angle", [a, b]), "remainder": _of_two("remainder"),
    "fmod": _of_two("remainder towards zero"), "floor": _unary("floor"), "ceil": _unary("ceiling"),
    "trunc": _unary("truncated"), "round": _unary("rounded"),
    "sigmoid": _unary("sigmoid"), "relu": _unary("relu"), "silu": _unary("silu"),
    "elu": _elu, "celu": lambda r, a, alpha=1.0: _elu(r, a, alpha, 1.0, 1.0 / alpha),
    "gelu": _gelu, "hardsigmoid": _hard_sigmoid,
    "hardswish": lambda r, a: r.elementwise("multiply", [a, _hard_sigmoid(r, a)]),
    "leaky_relu": lambda r, a, slope=0.01: r.elementwise("leaky relu", [a], slope),
    "softplus": lambda r, a, beta=1, threshold=20: r.elementwise("softplus", [a], beta, threshold),
    "hardtanh": lambda r, a, low=-1, high=1: r.elementwise("hardtanh", [a], low, high),
    "clamp": _clamp, "clamp_min": _clamp,
    "clamp_max": lambda r, a, high: _clamp(r, a, None, high),
    "maximum": lambda r, a, b: r.elementwise("maximum", [a, b], 0.5, 0.5),
    "minimum": lambda r, a, b: r.elementwise("minimum", [a, b], 0.5, 0.5),
    "gt": _of_two("greater"), "ge": _of_two("greater or equal"), "lt": _of_two("greater", True),
    "le": _of_two("greater or equal", True), "eq": _of_two("equal"),
    "ne": _differ, "bitwise_xor": _differ, "logical_xor": lambda r, a, b: _differ(r, _not(r, a), _not(r, b)),
    "logical_not": _not, "bitwise_not": _not, "logical_and": _of_two("both"), "bitwise_and": _of_two("both"),
    "logical_or": _of_two("either"), "bitwise_or": _of_two("either"),
    "where": lambda r, which, a, b: r.elementwise("choose", [which, a, b]),
    "any": _pairwise("either"), "all": _pairwise("both"), "prod": _pairwise("multiply"),
    "max.dim": lambda r, *a: (_pairwise("maximum", 1.0, 0.0)(r, *a),),
    "min.dim": lambda r, *a: (_pairwise("minimum", 1.0, 0.0)(r, *a),), "amax": _largest, "amin": _smallest,
    "var.correction": _variance, "std.correction": _deviation, "linalg_vector_norm": _norm,
    "cumsum": _cumulated, "mean": _mean, "sum": _sum, "logsumexp": _log_sum_exp,
    "softmax": _softmax, "_softmax": lambda r, a, dim, _half: _softmax(r, a, dim),
    "log_softmax": _log_softmax, "_log_softmax": lambda r, a, dim, _half: _log_softmax(r, a, dim),
    "native_layer_norm": _layer_norm, "native_group_norm": _group_norm, "native_batch_norm": _batch_norm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention, "mm": _matmul, "matmul": _matmul, "bmm": _matmul,
    "mv": _matmul, "dot": _matmul, "addmm": _add_product, "addmv": _add_product, "baddbmm": _add_product,
    "_trilinear": _bilinear, "convolution": _convolution, "max_pool2d_with_indices": _max_pool,
    "avg_pool1d": _mean_pool, "avg_pool2d": _mean_pool, "constant_pad_nd": _pad,
    "_unsafe_view": lambda r, a, shape: a.reshape(shape), "_to_copy": _to,
    **{f"reflection_pad{n}d": _pad_like("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _pad_like("replicate") for n in (1, 2, 3)},
    "zero": lambda r, a: r.constant(0.0).expand(a.shape),
    "fill": lambda r, a, value: (value if isinstance(value, torch.Tensor) else r.constant(value)).expand(a.shape),
}  # fmt: skip
"""What each operation of torch becomes, by its name."""
