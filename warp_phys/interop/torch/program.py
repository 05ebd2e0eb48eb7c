"""Any torch module read as a row program, and held against the module itself.

It is called once, on tensors of places (`programs.reading`): layout is torch's own business, and each operation on
numbers becomes one of the table.
"""

import builtins
import contextlib
import functools
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import warp as wp
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import Seeds, Trajectory
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch.chain import PRECISIONS, Planned, has_hooks
from warp_phys.interop.torch.combine import split
from warp_phys.interop.torch.contract import Examination, is_close, is_compiled, state_of
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.loss import torch_stream
from warp_phys.programs.block_network import BlockLinearisation, BlockNetwork
from warp_phys.programs.network import Network
from warp_phys.programs.reading import ALIKE, IN_SAMPLE, Reading, Unreadable, explained

TRIED = 9
"""States at which a program is held against its module."""

BATCHES = (3, 2, 4, 5, 7, 8, 16, 31, 64, 100, 257, 1000, 4096, 65537, 10**6 + 3, 2**31 + 11, 2**40 + 15)
"""Samples of the batch with which a module is read, and other sizes, which must lead the same way."""


def read_program(module: torch.nn.Module, inputs: int, like: torch.Tensor) -> Planned:
    """Return a module (B, D) → (B, K) as a program.

    Args:
        module: The module; it is evaluated, not changed.
        inputs: Numbers D of a state.
        like: A tensor of its precision, on its device.

    Raises:
        Unreadable: It is none; the message says in one sentence what stands in the way.
    """
    with explained("it cannot be read"):  # an operation with arguments that its rule does not know
        return _Reader(module, inputs, like).read()


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
    before = state_of(module, outside=True)
    x = torch.as_tensor(system.sample(TRIED, seed=0, dtype=str(like.dtype).removeprefix("torch."))).to(like.device)
    try:
        found = Examination(module).begin(
            [p for p in module.parameters() if p.requires_grad], x, system.control_size, 1, always=True
        )
    except (NotRepeatable, ValueError, TypeError, RuntimeError) as error:
        raise Unreadable(f"it cannot be tried out: {error}") from None
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
    read = read_program(module, system.state_size, like)
    if read.plan.outputs != system.control_size:
        raise Unreadable(f"it returns {read.plan.outputs} numbers")
    held = {id(tensor) for tensor, reached in zip(read.tensors, read.plan.reached(), strict=True) if reached}
    trained = [p for p in module.parameters() if p.requires_grad]
    if trained and not any(id(p) in held for p in trained):
        raise Unreadable("it uses none of its parameters")
    if state_of(module, outside=True) != before:
        raise Unreadable("calls change it")
    with explained("no code can be made of it"), torch_stream(like.device):
        _check_numbers(found, (_run_in_blocks if blocks else _run)(read, found, system))
    return read


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


_LENGTHS = threading.Lock()
"""Held while `len` is another function, which other threads see: for them it gives what it always does."""


@contextlib.contextmanager
def _shown_lengths() -> Iterator[None]:
    """Have `len(x)` give what `x.shape[0]` is, a `_Length` perhaps; Python's own makes a plain number of it."""
    with _LENGTHS:
        own = builtins.len
        builtins.len = lambda of: of.shape[0] if isinstance(of, torch.Tensor) and of.ndim else own(of)
        try:
            yield
        finally:
            builtins.len = own


class _Length(int):
    """A length that grows with the batch, its value here; what goes by its size is refused if other batches differ."""

    def __new__(cls, values: Sequence[int]) -> "_Length":
        """Return the length whose values at `BATCHES` are given."""
        made = super().__new__(cls, values[0])
        made.values = tuple(values)
        return made

    values: tuple[int, ...]

    def _with(self, operation: Callable, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        others = other.values if isinstance(other, _Length) else [other] * len(self.values)
        return [operation(a, b) for a, b in zip(self.values, others, strict=True)]

    def _refused(self, *_others: Any) -> Any:
        raise Unreadable("it computes with the number of its rows")

    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __float__ = _refused
    __hash__ = int.__hash__


def _made(operation: Callable) -> Callable:
    """Return an operation on lengths that gives one."""

    def method(length: _Length, other: Any) -> Any:
        values = length._with(operation, other)
        return values if values is NotImplemented else _Length(values)

    return method


def _decided(operation: Callable) -> Callable:
    """Return a comparison of lengths."""

    def method(length: _Length, other: Any) -> Any:
        is_same = isinstance(other, int) and int(length) == int(other) and len(set(length.values)) == len(BATCHES)
        if is_same and operation in (operator.eq, operator.ne):
            return operation is operator.eq  # perhaps that of a tensor of zeros that was made for a batch
        answers = length._with(operation, other)
        if answers is NotImplemented:
            return answers
        if len(set(answers)) > 1:
            raise Unreadable("which way it takes depends on the number of its rows")
        return answers[0]

    return method


for _operation in ("add", "sub", "mul", "floordiv", "mod"):
    _function = getattr(operator, _operation)
    setattr(_Length, f"__{_operation}__", _made(_function))
    setattr(_Length, f"__r{_operation}__", _made(lambda a, b, f=_function: f(b, a)))
for _operation in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Length, f"__{_operation}__", _decided(getattr(operator, _operation)))


class _Memory:
    """What tensors that are views of each other share: numbers that are known, or places."""

    def __init__(self, data: Any, is_known: bool, is_own: bool = True):
        self.data, self.is_known, self.is_own = data, is_known, is_own
        """None where nothing may be read. Own memory may be written to: that of parameters and of states may not."""


class _Traced(torch.Tensor):
    """A tensor of a module that is being read."""

    memory: _Memory
    region: int
    """Region without gradients in which it was made, or 0."""

    @staticmethod
    def __new__(cls, memory: _Memory, view: torch.Tensor, dtype: torch.dtype, device: Any, region: int) -> "_Traced":
        """Return the view of a memory that a tensor on that memory, or in its place, has."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, view.shape, strides=view.stride(), storage_offset=view.storage_offset(), dtype=dtype, device=device
        )
        made.memory, made.region = memory, region
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_arguments: Any, **_options: Any) -> Any:  # type: ignore[override]
        """Refuse what no reader sees."""
        raise Unreadable(f"it uses {_base(func)} outside of what is read")

    def held(self) -> torch.Tensor:
        """Return the numbers, or places, that it shows."""
        if self.memory.data is None:
            raise Unreadable("it uses the second result of an operation of which only the first can be read")
        return self.memory.data.as_strided(self.size(), self.stride(), self.storage_offset())


@functools.cache
def _decompositions() -> dict[Any, Callable]:
    """Return how torch writes operations in terms of others, but for those that there are rules for."""
    known = {*RULES, *LAYOUT, *SAME, *CREATED}
    table = torch._decomp._core_aten_decompositions_post_autograd()
    more = [torch.ops.aten._adaptive_avg_pool2d]
    table |= torch._decomp.get_decompositions(more)
    return {op: rule for op, rule in table.items() if not {_name(op), _base(op)} & known}


def _name(target: Any) -> str:
    """Return the name of an operation without its namespace."""
    return str(target).removeprefix("aten.")


def _base(target: Any) -> str:
    """Return the name of an operation without namespace and overload."""
    return _name(target).partition(".")[0]


def _on_tensors(method: Callable) -> Any:
    """Return a method of `Reading` on arrays of places as one on tensors of them."""

    def on_tensors(reader: "_Reader", *arguments: Any) -> torch.Tensor:
        taken = _pytree.tree_map_only(torch.Tensor, lambda v: v.numpy(force=True), arguments)
        return torch.from_numpy(method(reader.reading, *taken))

    return on_tensors


class _Functions(TorchFunctionMode):
    """Shows a reader what torch's functions are called with, parameters too, and shows lengths that grow as such."""

    def __init__(self, reader: "_Reader"):
        super().__init__()
        self.reader = reader

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        reader = self.reader
        if func is torch._C._set_grad_enabled:
            reader.set_gradients(args[0])
            return func(*args)
        with torch._C._DisableTorchDispatch():  # what it does for that is not the module's
            args, options = _pytree.tree_map_only(torch.Tensor, reader.traced, (args, kwargs or {}))
            if func in _SHAPES and isinstance(args[0], _Traced):
                return _SHAPES[func](torch.Size(reader.lengths(args[0])), *args[1:], **options)
        return func(*args, **options)


class _Reader(TorchDispatchMode):
    """Runs a module on places, and builds the program of what it computes.

    Operations come as torch's own functions call them, before any of them is differentiated or taken apart.
    """

    def __init__(self, module: torch.nn.Module, inputs: int, like: torch.Tensor):
        super().__init__()
        self.module, self.inputs, self.dtype, self.device = module, inputs, like.dtype, like.device
        self.reading = Reading(inputs, BATCHES[0])
        self.given: tuple = ()
        """The arguments of the operation whose rule is at work."""
        self._module_tensors = {id(t) for t in (*module.parameters(), *module.buffers())}
        self._outside: dict[int, tuple[torch.Tensor, _Traced]] = {}
        self._region = self._regions = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that torch need not keep its compiler away, which would import it, for a second."""
        return False

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

    def read(self) -> Planned:
        """Return the program."""
        states = torch.from_numpy(self.reading.states())
        x = self._made(states, self.dtype, _Memory(states, is_known=False, is_own=False))
        # what autograd would see of it comes as it is: nothing is differentiated here
        with torch._C._AutoDispatchBelowAutograd(), _shown_lengths(), self, _Functions(self):
            output = self.module(x)
        if not isinstance(output, torch.Tensor):
            raise Unreadable("it does not return one tensor alone")
        output = self.traced(output)
        if output.ndim != 2:
            raise Unreadable(f"what it returns has {output.ndim} dimensions")
        if output.memory.is_known:
            raise Unreadable("it reads no parameter")
        program, tensors = self.reading.finish(output.held().numpy())
        if not program.readers:
            raise Unreadable("it reads no parameter")
        return Planned(program, tensors, is_chain=False)

    # --- tensors

    def traced(self, tensor: Any) -> Any:
        """Return a tensor as one that is read; parameters, buffers and what else comes from outside too."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return tensor  # one of those that are read is inside
        if not isinstance(tensor, _Traced):
            if id(tensor) not in self._outside:
                self._outside[id(tensor)] = tensor, self._from_outside(tensor)
            tensor = self._outside[id(tensor)][1]
        if self._region and tensor.region != self._region and not tensor.memory.is_known:
            stopped = self.elementwise("stop", [tensor.held()])  # a copy: what is written to it would be lost
            return self._made(stopped, tensor.dtype, _Memory(stopped, is_known=False, is_own=False))
        return tensor

    def _from_outside(self, tensor: torch.Tensor) -> _Traced:
        data, is_place = tensor.detach(), id(tensor) in self._module_tensors and tensor.is_floating_point()
        if is_place:
            if tensor.dtype != self.dtype or not tensor.is_contiguous():
                raise Unreadable(f"a tensor of shape {tuple(tensor.shape)} is not contiguous, or of another precision")
            data = torch.from_numpy(self.reading.tensor(tensor, tensor.shape))
        return self._made(data, tensor.dtype, _Memory(data, not is_place, is_own=False), region=0)

    def _made(
        self, held: torch.Tensor, dtype: torch.dtype, memory: _Memory | None = None, region: int | None = None
    ) -> _Traced:
        """Return what stands in `held`: places in memory of its own, unless another one is given."""
        region = self._region if region is None else region
        return _Traced(memory or _Memory(held, is_known=False), held, dtype, self.device, region)

    def _unreadable(self, like: torch.Tensor) -> _Traced:
        """Return a result of which nothing is known but its kind."""
        return self._made(like, like.dtype, _Memory(None, is_known=False))

    def set_gradients(self, are_enabled: bool) -> None:
        """Begin or end a region without gradients."""
        self._regions += 1
        self._region = 0 if are_enabled else self._regions

    def lengths(self, tensor: _Traced) -> list[int]:
        """Return the shape of a tensor; lengths along which samples change are of the kind that grows with them."""
        shape = list(tensor.size())
        if tensor.memory.is_known or tensor.memory.data is None or not tensor.numel():
            return shape
        held = tensor.held()
        sample = torch.where(held < 0, 0, held >> IN_SAMPLE)
        for axis, length in enumerate(shape):
            grows = length % BATCHES[0] == 0 and bool((sample != sample.narrow(axis, 0, 1)).any())
            shape[axis] = _Length([length // BATCHES[0] * batch for batch in BATCHES]) if grows else length
        return shape

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Do an operation of torch."""
        return self._call(func, *_pytree.tree_map_only(torch.Tensor, self.traced, (args, kwargs or {})))

    def _call(self, func: Any, arguments: tuple, options: dict) -> Any:  # noqa: PLR0911, a kind of operation each
        base = _base(func)
        if base in CREATED:  # of its shape and type alone
            first = arguments[0]
            arguments = torch.empty(first.size(), dtype=first.dtype, device=self.device), *arguments[1:]
        given = [value for value in _pytree.tree_leaves((arguments, options)) if isinstance(value, _Traced)]
        if func._schema.is_mutable:
            return self._write(func, base, arguments, options)
        if all(value.memory.is_known for value in given):
            return self._evaluate(func, arguments, options)
        if base in INDEXING:
            return self._indexed(func, base, arguments, options)
        rule = RULES.get(_name(func)) or RULES.get(base)
        if rule is None and base not in LAYOUT | SAME:
            return self._taken_apart(func, base, arguments, options)
        like = _pytree.tree_map_only(_Traced, _without_numbers, (arguments, options))
        like, self.given = func(*like[0], **like[1]), arguments
        if rule is None and any(value.memory.data is None for value in given):
            return _pytree.tree_map_only(torch.Tensor, self._unreadable, like)
        arguments, options = self._as_places((arguments, options))
        if rule is None:
            return self._moved(func, arguments, options, like, given)
        results, several = rule(self, *arguments, **options), isinstance(like, (tuple, list))
        likes = like if several else [like]
        found = [self._result(t, of, base) for t, of in zip(results if several else [results], likes, strict=False)]
        found += map(self._unreadable, likes[len(found) :])
        return type(like)(found) if type(like) in (tuple, list) else tuple(found) if several else found[0]

    def _result(self, places: torch.Tensor, like: torch.Tensor, base: str) -> _Traced:
        """Return the result of a rule, in memory like torch's own.

        Raises:
            Unreadable: Torch would round numbers, or count truth values, by its rules for types.
        """
        if like.dtype != self.dtype and (like.dtype != torch.bool or base not in TRUTH):
            raise Unreadable(f"its {base} gives numbers of type {like.dtype}")
        held = torch.empty_strided(like.shape, like.stride(), dtype=torch.int64)
        if places.shape != held.shape:
            raise Unreadable(f"its {base} gives another shape than is known of it")
        return self._made(held.copy_(places), like.dtype)

    def _moved(self, func: Any, arguments: tuple, options: dict, like: Any, given: list[_Traced]) -> Any:
        """Return what a function that moves numbers makes of places."""
        dtypes = [of.dtype for of in _pytree.tree_leaves(like) if isinstance(of, torch.Tensor)]
        return self._wrapped(func(*arguments, **options), given, iter(dtypes))

    def _wrapped(self, result: Any, given: list[_Traced], dtypes: Any = None) -> Any:
        """Return plain tensors as those that are read: views of what was given, or, of their own, places or numbers."""
        known = {value.memory.data.untyped_storage().data_ptr(): value.memory for value in given}

        def wrap(plain: torch.Tensor) -> _Traced:
            dtype = plain.dtype if dtypes is None else next(dtypes)
            memory = known.get(plain.untyped_storage().data_ptr()) if plain.numel() else None
            if memory is None:
                plain = plain if dtypes is None else self.joined(plain)
                memory = _Memory(plain, is_known=dtypes is None)
            return self._made(plain, dtype, memory)

        return _pytree.tree_map_only(torch.Tensor, wrap, result)

    def _evaluate(self, func: Any, arguments: tuple, options: dict) -> Any:
        """Return what an operation gives on numbers that are known."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unreadable(f"it draws random numbers, by {_base(func)}")
        given = [value for value in _pytree.tree_leaves((arguments, options)) if isinstance(value, _Traced)]
        arguments, options = _pytree.tree_map_only(_Traced, _Traced.held, (arguments, options))
        result = func(*arguments, **options)
        if "empty" in _base(func):
            result.zero_()  # what nobody writes to does not matter
        if _base(func).startswith("lift"):  # made by the module of numbers in its code
            return self._made(result, result.dtype, _Memory(result, is_known=True))
        return self._wrapped(result, given)

    def _indexed(self, func: Any, base: str, arguments: tuple, options: dict) -> Any:
        """Return the places that are chosen by numbers that are known."""
        where = 2 if base in ("index_select", "gather") else 1
        if base == "index_put" and arguments[3:] and arguments[3]:
            raise Unreadable("it adds to numbers by their place")
        chosen = [v for v in _pytree.tree_leaves(arguments[where]) if isinstance(v, _Traced)]
        if not all(value.memory.is_known for value in chosen):
            raise Unreadable(f"its {base} picks numbers by what it computes")
        taken: list[Any] = [self._as_places(value) for value in arguments]
        taken[where] = _pytree.tree_map_only(_Traced, _Traced.held, arguments[where])
        dtype = arguments[0].dtype
        return self._made(self.joined(func(*taken, **options)), dtype)

    def _taken_apart(self, func: Any, base: str, arguments: tuple, options: dict) -> Any:
        """Return what an operation gives that torch writes in terms of others."""
        rule = _decompositions().get(func, func.decompose)
        with self:
            result = rule(*arguments, **options)
        if result is NotImplemented:
            if base in ("_local_scalar_dense", "equal", "nonzero"):
                raise Unreadable("what it does depends on numbers that it computes")
            raise Unreadable(f"it uses {base}, which is no operation of row programs")
        return result

    def _write(self, func: Any, base: str, arguments: tuple, options: dict) -> Any:
        """Do an operation in place: that of the same name without it, whose result is written."""
        target, packet = arguments[0], getattr(torch.ops.aten, base[:-1], None)
        twin = getattr(packet, func._overloadname, None) if base.endswith("_") else None
        if twin is None or not isinstance(target, _Traced):
            raise Unreadable(f"it writes to tensors by {base}, which is no operation of row programs")
        if not target.memory.is_own:
            raise Unreadable("it writes to its input, to parameters, or, without gradients, to what has them")
        result = self._call(twin, arguments, options)
        if result.memory is target.memory:  # squeeze_ and the like: the same numbers in another shape
            with torch._C._DisableTorchDispatch():
                target.data = result
            return target
        if result.size() != target.size():
            raise Unreadable(f"its {base} changes the shape of a tensor")
        memory = target.memory
        if memory.is_known and result.memory.is_known:
            target.held().copy_(result.held())
            return target
        if memory.is_known:
            memory.data, memory.is_known = _in_order_of(memory.data, self.constant(memory.data)), False
        target.held().copy_(self._as_places(result))
        memory.data.copy_(self.joined(memory.data))
        return target

    def _as_places(self, value: Any) -> Any:
        return _pytree.tree_map_only(
            _Traced, lambda v: self.constant(v.held()) if v.memory.is_known else v.held(), value
        )


_SHAPES: dict[Any, Callable] = {
    torch.Tensor.shape.__get__: lambda lengths: lengths,  # type: ignore[attr-defined]
    torch.Tensor.size: lambda lengths, dim=None: lengths if dim is None else lengths[dim],
    torch.Tensor.numel: lambda lengths: functools.reduce(operator.mul, lengths, 1),
}
"""Functions that give lengths, by what they make of all of them."""


def _without_numbers(tensor: _Traced) -> torch.Tensor:
    """Return a tensor of this kind that tells what torch makes of it.

    It holds zeros: for one that holds nothing torch runs code of its compiler's, which takes a second to import.
    """
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device).zero_()


def _in_order_of(like: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return places in memory that has the strides of another tensor."""
    return torch.empty_strided(like.shape, like.stride(), dtype=torch.int64).copy_(places)


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
    y = _binary("divide")(reader, a, b)
    return y if rounding_mode is None else reader.elementwise("floor" if rounding_mode == "floor" else "truncated", [y])


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


def _layer_norm(
    reader: _Reader, a: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, _c=True
) -> Any:
    y = _normalise(reader, a, len(shape), eps, centre=True)
    y = y if weight is None else reader.elementwise("multiply", [y, weight])
    return y if bias is None else reader.elementwise("add", [y, bias])


def _group_norm(
    reader: _Reader, a: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, _c=True
) -> Any:
    y = _normalise(reader, a.reshape(a.shape[0], groups, -1), 1, eps, centre=True).reshape(a.shape)
    shape = (-1, *[1] * (a.ndim - 2))
    y = y if weight is None else reader.elementwise("multiply", [y, weight.reshape(shape)])
    return y if bias is None else reader.elementwise("add", [y, bias.reshape(shape)])


def _batch_norm(
    reader: _Reader, a: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> Any:
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
    reader: _Reader, q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False,
    scale: Any = None, **options: Any,
) -> Any:  # fmt: skip
    if dropout or options.get("enable_gqa"):
        raise Unreadable("it uses attention with dropout, or with groups of queries")
    scores = reader.product(q, k.transpose(-2, -1))
    scores = reader.elementwise("scale", [scores], 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        mask = reader.constant(torch.ones(q.shape[-2], k.shape[-2]).tril().log())
    if mask is not None:
        given = dict(enumerate(reader.given)).get(3)
        if given is not None and given.dtype == torch.bool:
            mask = reader.elementwise("choose", [mask, 0.0, -math.inf])
        scores = reader.elementwise("add", [scores, mask])
    return reader.product(_softmax(reader, scores, -1), v)


def _linear(reader: _Reader, x: Any, weight: Any, bias: Any = None) -> Any:
    return reader.dense(x, weight, bias)


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
    parts = (c, beta), (_matmul(reader, a, b), alpha)
    return reader.elementwise("add", [v if f == 1 else reader.elementwise("scale", [v], f) for v, f in parts])


def _bilinear(reader: _Reader, a: Any, b: Any, weight: Any, bias: Any = None) -> Any:
    pairs = reader.elementwise("multiply", [a[..., :, None], b[..., None, :]])
    return reader.dense(pairs.flatten(-2), weight.flatten(1), bias)


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


def _pad(reader: _Reader, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant":  # codes are whole numbers, exact in double precision
        return reader.joined(torch.nn.functional.pad(x, pad, value=int(reader.constant(value or 0.0))))
    return torch.nn.functional.pad(x.double(), pad, mode).long()


def _dropout(reader: _Reader, a: Any, p: float, train: bool) -> Any:
    if train and p > 0.0:
        raise Unreadable("it uses dropout in training")
    return a


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
    "view _unsafe_view reshape permute transpose t slice select unsqueeze squeeze expand expand_as flatten unflatten "
    "movedim numpy_T mT split split_with_sizes chunk unbind flip roll narrow repeat repeat_interleave tile cat stack "
    "select_scatter slice_scatter unfold diagonal".split()
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

SAME = {"clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh", "lift"}
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
    "elu": _elu, "gelu": _gelu, "hardsigmoid": _hard_sigmoid,
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
    "layer_norm": _layer_norm, "group_norm": _group_norm, "_native_batch_norm_legit_no_training": _batch_norm,
    "scaled_dot_product_attention": _attention, "linear": _linear, "mm": _matmul, "matmul": _matmul, "bmm": _matmul,
    "mv": _matmul, "dot": _matmul, "addmm": _add_product, "addmv": _add_product, "baddbmm": _add_product,
    "bilinear": _bilinear, "convolution": _convolution, "max_pool2d_with_indices": _max_pool, "avg_pool1d": _mean_pool,
    "avg_pool2d": _mean_pool, "pad": _pad, "dropout": _dropout, "to": _to, "_to_copy": _to, "type_as": _to,
    "detach": _unary("stop"), "copy": lambda r, a, b: b.expand(a.shape),
    "fill": lambda r, a, value: (value if isinstance(value, torch.Tensor) else r.constant(value)).expand(a.shape),
}  # fmt: skip
"""What each operation of torch becomes, by its name."""
