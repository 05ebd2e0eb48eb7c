"""Any torch module read as a row program, by `torch.export`, and held against the module itself.

The exported graph is run on tensors that hold no numbers but where numbers come from: sample, node, place. So layout
is torch's own business (views, transposes, slices, concatenations, whatever they do to the batch dimension), and what
is left are the operations on numbers, each of which must take its operands from one sample.
"""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import Seeds, Trajectory
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch.chain import PRECISIONS, Planned, has_hooks
from warp_phys.interop.torch.contract import Examination, is_close, is_compiled, state_of
from warp_phys.interop.torch.dense import as_array
from warp_phys.programs.network import Network
from warp_phys.programs.program import Builder, Dense

TRIED = 9
"""States at which a program is held against its module."""

BATCH = 3
"""Samples of the tensors that stand for a batch of any size."""

LONGEST = 4096
"""Most numbers of a node that is no dense layer's."""

PLACES, NODES = 1 << 24, 1 << 20
"""Numbers of a node, and nodes, in the code of an entry: (sample + 1) · NODES · PLACES + node · PLACES + place."""


class Unreadable(Exception):
    """A module is no row program; the message says why, in one sentence."""


def read_program(module: torch.nn.Module, inputs: int, like: torch.Tensor) -> Planned:
    """Return a module (B, D) → (B, K) as a program.

    Args:
        module: The module; it is evaluated, not changed.
        inputs: Numbers D of a state.
        like: A tensor of its precision, on its device.

    Raises:
        Unreadable: It is none; the message says in one sentence what stands in the way.
    """
    exported = _export(module, torch.zeros((5, inputs), dtype=like.dtype, device=like.device))
    try:
        return _Reader(exported, module, inputs, like.dtype).read()
    except Unreadable:
        raise
    except Exception as error:  # an operation with arguments that its rule does not know
        first = str(error).strip().partition("\n")[0]
        raise Unreadable(f"it cannot be read: {first[:160]}") from None


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


def read_and_check(module: torch.nn.Module, system: Any) -> Planned:
    """Return a module as a program that gives the module's own controls and derivatives with a system.

    Raises:
        Unreadable: As `read_program`; or there is none that does.
    """
    _refuse(module)
    like = next((p for p in module.parameters()), torch.zeros(()))
    if like.dtype not in PRECISIONS:
        raise Unreadable(f"its numbers are {like.dtype}")
    before = state_of(module, outside=True)
    x = torch.as_tensor(system.sample(TRIED, seed=0, dtype=str(like.dtype).removeprefix("torch.")))
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
    unused = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if unused:
        raise Unreadable(f"it does not use its parameter {unused[0]}, which then has no gradient")
    if state_of(module, outside=True) != before:
        raise Unreadable("calls change it")
    try:
        _check_numbers(read, found, system)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"no code can be made of it: {str(error).strip()[:160]}") from None
    return read


def _check_numbers(read: Planned, found: Any, system: Any) -> None:
    """Raise `Unreadable` unless one fused step gives the controls and adjoints that autograd gives."""
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
    expected = found.here.adjoints(seed)
    pairs = [(controls[0], found.here.output.detach()), *zip([lam[0], *updates.values()], expected, strict=True)]
    scale = torch.stack([e.abs().max() for e in expected if e.numel()]).max()
    for i, (got, wanted) in enumerate(pairs):
        if not is_close(got, wanted, scale if i else None):
            raise Unreadable("what was read of it gives other numbers than it gives itself")


def _export(module: torch.nn.Module, example: torch.Tensor) -> Any:
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=2)
            return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise Unreadable(f"torch.export cannot read it: {first[:160]}") from None


class _Reader:
    """Runs an exported graph on places, and builds the program of what it computes."""

    def __init__(self, exported: Any, module: torch.nn.Module, inputs: int, dtype: torch.dtype):
        self.exported, self.module, self.dtype = exported, module, dtype
        self.build = Builder(inputs)
        self.tensors: list[torch.Tensor] = []  # by slot
        self.slots: dict[int, int] = {}

    def read(self) -> Planned:
        """Return the program."""
        environment: dict[Any, Any] = {}
        output: Any = None
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                environment[node] = self._placeholder(node)
            elif node.op == "call_function":
                arguments = torch.fx.map_arg(node.args, environment.__getitem__)
                options = torch.fx.map_arg(node.kwargs, environment.__getitem__)
                environment[node] = self._call(node, arguments, options)
            elif node.op == "output":
                output = torch.fx.map_arg(node.args[0], environment.__getitem__)
            else:
                raise Unreadable(f"it contains {node.op} {node.target}, which is no operation on rows")
        if not isinstance(output, (tuple, list)) or len(output) != 1 or not isinstance(output[0], torch.Tensor):
            raise Unreadable("it does not return one tensor alone")
        if output[0].ndim != 2:
            raise Unreadable(f"what it returns has {output[0].ndim} dimensions")
        entries, sample = self._of_samples(output[0])
        if sample is not None and not (sample == torch.arange(1, BATCH + 1)[:, None]).all():
            raise Unreadable("it returns its rows in another order")
        program = self.build.finish(self.build.gather(entries))
        tensors = [None if slot < 0 else self.tensors[slot] for slot in program.read]
        if not any(program.nodes[i].operation == "dense" for i in program.readers):
            raise Unreadable("it has no dense layer, so that there is nothing to gain")
        return Planned(program, tuple(tensors), is_chain=False)

    def _placeholder(self, node: Any) -> Any:
        signature = self.exported.graph_signature
        name = node.name
        if name in signature.user_inputs:
            rows, size = BATCH, self.build.nodes[0].size
            sample = torch.arange(1, rows + 1)[:, None] * NODES * PLACES
            return sample + torch.arange(size)
        if name in signature.inputs_to_parameters:
            tensor: Any = self.module.get_parameter(signature.inputs_to_parameters[name])
        elif name in signature.inputs_to_buffers:
            tensor = self.module.get_buffer(signature.inputs_to_buffers[name])
        else:
            target = signature.inputs_to_lifted_tensor_constants.get(name)
            tensor = self.exported.constants.get(target)
            if not isinstance(tensor, torch.Tensor):
                raise Unreadable(f"it takes {name}, which is no tensor")
            return self._constant(tensor.detach())
        if not tensor.is_floating_point():
            return self._constant(tensor.detach())
        if tensor.dtype != self.dtype or not tensor.is_contiguous():
            raise Unreadable(f"{name} is not contiguous, or of another precision")
        return self._tensor(tensor)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the places of a tensor that kernels read: in a node that stands for its slot, made when it is used."""
        if id(tensor) not in self.slots:
            self.slots[id(tensor)] = self.build.slot(tensor.numel())
            self.tensors.append(tensor)
        return -1 - (self.slots[id(tensor)] * PLACES + torch.arange(tensor.numel()).reshape(tensor.shape))

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > LONGEST:
            raise Unreadable("it holds a large tensor that is neither parameter nor buffer")
        node = self.build.add("constant", (), tensor.numel(), tuple(float(v) for v in tensor.flatten().tolist()))
        return (node * PLACES + torch.arange(tensor.numel())).reshape(tensor.shape)

    # --- places

    def _of_samples(self, code: torch.Tensor) -> tuple[list[tuple[int, int]], torch.Tensor | None]:
        """Return the entries of the first sample, and for each place of `code` its sample; None for no samples.

        Raises:
            Unreadable: Samples do not take the same places.
        """
        flat = code.flatten()
        if flat.numel() > 64 * LONGEST:
            raise Unreadable("it has too many numbers between its layers")
        flat = self._loaded(flat)
        sample = flat // (NODES * PLACES)
        rest = flat % (NODES * PLACES)
        if (sample == 0).all():
            return [(v // PLACES, v % PLACES) for v in rest.tolist()], None
        if (sample == 0).any():
            raise Unreadable("it joins what is the same for all rows with rows in one tensor")
        parts = [rest[sample == b] for b in range(1, BATCH + 1)]
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise Unreadable("its rows do not all take the same way, or depend on each other")
        return [(v // PLACES, v % PLACES) for v in parts[0].tolist()], sample.reshape(code.shape)

    def _loaded(self, flat: torch.Tensor) -> torch.Tensor:
        """Return places in which numbers of tensors have become numbers of nodes that load them."""
        if not (flat < 0).any():
            return flat
        flat = flat.clone()
        wanted = -1 - flat[flat < 0]
        for slot in sorted(set((wanted // PLACES).tolist())):
            places = sorted(set((wanted[wanted // PLACES == slot] % PLACES).tolist()))
            if len(places) > LONGEST:
                raise Unreadable("it computes with a large tensor of weights, other than as a dense layer's")
            node = self.build.add("load", (), len(places), (slot, tuple(places)))
            for k, place in enumerate(places):
                flat[flat == -1 - (slot * PLACES + place)] = node * PLACES + k
        return flat

    def _spread(self, node: int, sample: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
        """Return the places of a new node whose numbers stand, sample by sample, where `sample` says."""
        if sample is None:
            return (node * PLACES + torch.arange(math.prod(shape))).reshape(tuple(shape))
        flat, code = sample.flatten(), torch.empty(sample.numel(), dtype=torch.long)
        for b in range(1, BATCH + 1):
            own = flat == b
            code[own] = b * NODES * PLACES + node * PLACES + torch.arange(int(own.sum()))
        return code.reshape(tuple(shape))

    # --- operations

    def _call(self, node: Any, arguments: tuple, options: dict) -> Any:
        target = node.target
        if target in SYMBOLIC:
            return target(*arguments, **options)
        name = str(target).removeprefix("aten.")
        base = name.partition(".")[0]
        if base in ("view", "_unsafe_view"):  # strides of places are not those of numbers
            return arguments[0].reshape(arguments[1])
        if base in LAYOUT:
            return target(*arguments, **options)
        if base in SAME:
            return arguments[0]
        rule = RULES.get(base)
        if rule is None:
            raise Unreadable(f"it uses {name}, which is no operation of row programs")
        self._check_type(node, base)
        return rule(self, *arguments, **options)

    def _check_type(self, node: Any, base: str) -> None:
        """Raise `Unreadable` where numbers would be rounded, or truth values counted, by torch's rules for types."""
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if not isinstance(value, torch.Tensor) or value.dtype == self.dtype:
                continue
            if value.dtype != torch.bool or base not in TRUTH:
                raise Unreadable(f"its {base} gives numbers of type {value.dtype}")

    def elementwise(self, operation: str, operands: Sequence[Any], *numbers: float) -> torch.Tensor:
        """Return the places of an operation on operands that are broadcast: tensors of places, or numbers."""
        shape = torch.broadcast_shapes(*(o.shape for o in operands if isinstance(o, torch.Tensor)))
        spread = [self._number(o, shape) if not isinstance(o, torch.Tensor) else o.expand(shape) for o in operands]
        nodes, samples = self.together(spread)
        made = self.build.add(operation, nodes, self.build.nodes[nodes[0]].size, tuple(map(float, numbers)))
        return self._spread(made, samples, shape)

    def _number(self, value: Any, shape: Sequence[int]) -> torch.Tensor:
        return self._constant(torch.tensor(float(value), dtype=torch.float64)).expand(shape)

    def together(self, codes: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], torch.Tensor | None]:
        """Return nodes with the numbers of tensors of one shape, place by place; and the sample of each place."""
        sample = None
        for code in codes:
            loaded = self._loaded(code.flatten())
            own = (loaded // (NODES * PLACES)).reshape(code.shape)
            if (own > 0).any():
                if (own == 0).any() or (sample is not None and not torch.equal(own, sample)):
                    raise Unreadable("its rows depend on each other, or on their number")
                sample = own
        if sample is None:
            return tuple(self.build.gather(self._of_samples(code)[0]) for code in codes), None
        nodes = []
        for code in codes:
            loaded = self._loaded(code.flatten())
            if (loaded // (NODES * PLACES) == 0).all():  # the same for all samples: taken at the places of each
                parts = [loaded[sample.flatten() == b] for b in range(1, BATCH + 1)]
                if any(not torch.equal(part, parts[0]) for part in parts[1:]):
                    raise Unreadable("its rows have numbers of their own")
                entries = [(v // PLACES, v % PLACES) for v in parts[0].tolist()]
            else:
                entries = self._of_samples(loaded.reshape(code.shape))[0]
            nodes.append(self.build.gather(entries))
        if any(self.build.nodes[n].size > LONGEST for n in nodes):
            raise Unreadable("it has too many numbers between its layers")
        return tuple(nodes), sample

    def reduced(self, operation: str, code: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
        """Return the places of a reduction over dimensions, which become 1."""
        dims = [d % code.ndim for d in dims]
        others = [d for d in range(code.ndim) if d not in dims]
        moved = code.permute(*others, *dims)
        shape = [code.shape[d] for d in others]
        length = math.prod(code.shape[d] for d in dims)
        entries, sample = self._of_samples(moved.reshape(-1, length))
        x = self.build.gather(entries)
        if sample is not None:
            if not (sample == sample[:, :1]).all():
                raise Unreadable("it reduces over the batch")
            sample = sample[:, 0]
        made = self.build.add(operation, (x,), len(entries) // length, (length,))
        kept = [1 if d in dims else code.shape[d] for d in range(code.ndim)]
        return self._spread(made, sample, shape).reshape(kept)

    def dense(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, flipped: bool) -> torch.Tensor:
        """Return the places of x Wᵀ + b, over the last dimension of x; W x for flipped weights."""
        slot, size = self._slot_of(weight)
        outputs, window = weight.shape if not flipped else weight.shape[::-1]
        biases = -1 if bias is None else self._slot_of(bias)[0]
        if size != outputs * window or (bias is not None and bias.shape != (outputs,)):
            raise Unreadable("it uses a part of a tensor of weights as a layer's")
        lead = x.shape[:-1]
        entries, sample = self._of_samples(x.reshape(-1, window))
        if sample is not None and not (sample == sample[:, :1]).all():
            raise Unreadable("a layer runs over the batch")
        positions = len(entries) // window
        numbers = Dense(positions, window, window, outputs, slot, biases, flipped, channels=window)
        made = self.build.add("dense", (self.build.gather(entries),), positions * outputs, tuple(numbers))
        return self._spread(made, None if sample is None else sample[:, :1].expand(-1, outputs), (*lead, outputs))

    def _slot_of(self, code: torch.Tensor) -> tuple[int, int]:
        """Return the slot whose tensor these places are, in order, and how many numbers it has."""
        flat = -1 - code.flatten()
        slot = int(flat[0]) // PLACES if len(flat) else -1
        if slot < 0 or (flat != slot * PLACES + torch.arange(len(flat))).any():
            raise Unreadable("a layer's weights are computed, or a part of something")
        return slot, self.build.slots[slot]

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the places of a (…, M, K) times b (…, K, N)."""
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        m, inner, n = a.shape[-2], a.shape[-1], b.shape[-1]
        a, b = a.expand(*lead, m, inner).reshape(-1, m, inner), b.expand(*lead, inner, n).reshape(-1, inner, n)
        (first, of_first), (second, of_second) = self._of_samples(a), self._of_samples(b)
        if of_first is None or of_second is None:
            raise Unreadable("it multiplies rows by a matrix that is no layer's")
        owner = of_first[:, :1, :1]
        if not (of_first == owner).all() or not (of_second == owner).all():
            raise Unreadable("it multiplies rows with each other")
        groups = len(first) // (m * inner)
        nodes = self.build.gather(first), self.build.gather(second)
        made = self.build.add("product", nodes, groups * m * n, (groups, m, inner, n))
        return self._spread(made, owner.expand(-1, m, n), (*lead, m, n))


def _binary(operation: str) -> Callable:
    def rule(reader: _Reader, a: Any, b: Any, alpha: float = 1) -> Any:
        if alpha != 1:
            b = reader.elementwise("scale", [b], alpha) if isinstance(b, torch.Tensor) else b * alpha
        if not isinstance(b, torch.Tensor) and isinstance(a, torch.Tensor):
            if operation == "add":
                return reader.elementwise("shift", [a], b)
            if operation == "subtract":
                return reader.elementwise("shift", [a], -b)
            if operation == "multiply":
                return reader.elementwise("scale", [a], b)
            if operation == "divide":
                return reader.elementwise("scale", [a], 1.0 / b)
        return reader.elementwise(operation, [a, b])

    return rule


def _unary(operation: str, *numbers: float) -> Callable:
    return lambda reader, a: reader.elementwise(operation, [a], *numbers)


def _rsub(reader: _Reader, a: Any, b: Any, alpha: float = 1) -> Any:
    if isinstance(b, torch.Tensor):
        return _binary("subtract")(reader, b, a, alpha)
    return reader.elementwise("shift", [reader.elementwise("scale", [a], -alpha)], b)


def _power(reader: _Reader, a: Any, n: Any) -> Any:
    if isinstance(n, torch.Tensor) or not isinstance(a, torch.Tensor) or n == 0:
        raise Unreadable("it raises to a power that is computed, or zero")
    if n == 1:
        return a
    special = {2: "square", 0.5: "root", -1: "reciprocal", -0.5: "reciprocal root"}
    return reader.elementwise(special[n], [a]) if n in special else reader.elementwise("power", [a], n)


def _clamp(reader: _Reader, a: Any, least: Any = None, most: Any = None) -> Any:
    if isinstance(least, torch.Tensor) or isinstance(most, torch.Tensor):
        if least is not None:
            a = reader.elementwise("maximum", [a, least], 1.0, 0.0)
        return a if most is None else reader.elementwise("minimum", [a, most], 1.0, 0.0)
    return reader.elementwise("clamp", [a], -math.inf if least is None else least, math.inf if most is None else most)


def _elu(reader: _Reader, a: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    if scale != 1 or input_scale != 1:
        raise Unreadable("it uses elu with scales")
    return reader.elementwise("elu", [a], alpha)


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


def _mish(reader: _Reader, a: Any) -> Any:
    soft = reader.elementwise("softplus", [a], 1.0, 20.0)
    return reader.elementwise("multiply", [a, reader.elementwise("tanh", [soft])])


def _mean(reader: _Reader, a: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    dims = [dims] if isinstance(dims, int) else dims
    total = _sum(reader, a, dims, keepdim)
    count = math.prod(a.shape[d] for d in (dims or range(a.ndim)))
    return reader.elementwise("scale", [total], 1.0 / count)


def _sum(reader: _Reader, a: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    dims = list(range(a.ndim)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else list(dims)
    total = reader.reduced("sum", a, dims)
    return total if keepdim else total.squeeze(tuple(d % a.ndim for d in dims))


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


def _rms_norm(reader: _Reader, a: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
    y = _normalise(reader, a, len(shape), torch.finfo(reader.dtype).eps if eps is None else eps, centre=False)
    return y if weight is None else reader.elementwise("multiply", [y, weight])


def _softmax(reader: _Reader, a: Any, dim: int, dtype: Any = None) -> Any:
    raised = reader.elementwise(
        "exponential", [reader.elementwise("subtract", [a, reader.reduced("largest", a, [dim])])]
    )
    return reader.elementwise("divide", [raised, reader.reduced("sum", raised, [dim])])


def _attention(
    reader: _Reader, q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False,
    scale: Any = None, **options: Any,
) -> Any:  # fmt: skip
    if mask is not None or dropout or causal or options.get("enable_gqa"):
        raise Unreadable("it uses attention with a mask or dropout")
    scores = reader.product(q, k.transpose(-2, -1))
    scores = reader.elementwise("scale", [scores], 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return reader.product(_softmax(reader, scores, -1), v)


def _linear(reader: _Reader, x: Any, weight: Any, bias: Any = None) -> Any:
    return reader.dense(x, weight, bias, flipped=False)


def _matmul(reader: _Reader, a: Any, b: Any) -> Any:
    if b.ndim == 2 and (b < 0).all():
        return reader.dense(a, *_weights(reader, b))
    if a.ndim >= 2 and b.ndim >= 2:
        return reader.product(a, b)
    raise Unreadable("it multiplies with a vector")


def _weights(reader: _Reader, b: torch.Tensor) -> tuple[Any, None, bool]:
    """Return the arguments of `dense` for a matrix b (window, outputs): a tensor, or one transposed."""
    try:
        reader._slot_of(b.T)
        return b.T, None, False
    except Unreadable:
        return b, None, True


def _addmm(reader: _Reader, bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise Unreadable("it uses addmm with factors")
    weight, _, flipped = _weights(reader, b)
    return reader.dense(a, weight, bias, flipped)


def _gru_cell(reader: _Reader, x: Any, h: Any, wi: Any, wh: Any, bi: Any = None, bh: Any = None) -> Any:
    def add(operation: str, *operands: Any) -> Any:
        return reader.elementwise(operation, list(operands))

    a, b = _linear(reader, x, wi, bi).chunk(3, 1), _linear(reader, h, wh, bh).chunk(3, 1)
    reset, update = (add("sigmoid", add("add", a[i], b[i])) for i in range(2))
    fresh = add("tanh", add("add", a[2], add("multiply", reset, b[2])))
    return add("add", fresh, add("multiply", update, add("subtract", h, fresh)))


def _lstm_cell(reader: _Reader, x: Any, state: Any, wi: Any, wh: Any, bi: Any = None, bh: Any = None) -> Any:
    def add(operation: str, *operands: Any) -> Any:
        return reader.elementwise(operation, list(operands))

    h, c = state
    gates = add("add", _linear(reader, x, wi, bi), _linear(reader, h, wh, bh)).chunk(4, 1)
    enter, forget, out = (add("sigmoid", gates[i]) for i in (0, 1, 3))
    c = add("add", add("multiply", forget, c), add("multiply", enter, add("tanh", gates[2])))
    return add("multiply", out, add("tanh", c)), c


def _dropout(reader: _Reader, a: Any, p: float, train: bool) -> Any:
    if train and p > 0.0:
        raise Unreadable("it uses dropout in training")
    return a


def _to(reader: _Reader, a: Any, *arguments: Any, dtype: Any = None, **_options: Any) -> Any:
    wanted = {dtype, *(v for v in arguments if isinstance(v, torch.dtype))} - {None}
    if wanted - {reader.dtype, torch.bool}:
        raise Unreadable(f"it converts numbers to {wanted.pop()}")
    return a


def _where(reader: _Reader, which: Any, a: Any, b: Any) -> Any:
    return reader.elementwise("choose", [which, a, b])


def _compare(operation: str, swapped: bool = False) -> Callable:
    return lambda reader, a, b: reader.elementwise(operation, [b, a] if swapped else [a, b])


SYMBOLIC = {
    operator.mul, operator.add, operator.sub, operator.floordiv, operator.getitem, torch.sym_max, torch.sym_min,
    torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default,
}  # fmt: skip
"""Functions on sizes and on lists."""

LAYOUT = set(
    "reshape permute transpose t slice select unsqueeze squeeze expand expand_as flatten unflatten movedim "
    "split split_with_sizes chunk unbind flip roll narrow repeat repeat_interleave tile cat stack numpy_T mT".split()
)
"""Operations that move numbers, as torch itself does."""

TRUTH = {"gt", "ge", "lt", "le", "eq", "where"}
"""Operations that may give truth values."""

SAME = {"clone", "contiguous", "alias", "lift_fresh_copy"}
"""Operations that give back their argument, as far as numbers go."""

RULES: dict[str, Callable] = {
    "add": _binary("add"), "sub": _binary("subtract"), "mul": _binary("multiply"), "div": _binary("divide"),
    "rsub": _rsub, "neg": _unary("negate"), "reciprocal": _unary("reciprocal"), "sqrt": _unary("root"),
    "rsqrt": _unary("reciprocal root"), "square": _unary("square"), "pow": _power, "sin": _unary("sine"),
    "cos": _unary("cosine"), "tan": _unary("tangent"), "atan": _unary("arctangent"), "exp": _unary("exponential"),
    "log": _unary("logarithm"), "asin": _unary("arcsine"), "acos": _unary("arccosine"),
    "sinh": _unary("hyperbolic sine"), "cosh": _unary("hyperbolic cosine"), "expm1": _unary("exponential less one"),
    "log1p": _unary("logarithm of one more"), "atan2": lambda r, a, b: r.elementwise("angle", [a, b]),
    "erf": _unary("error function", 2.0 / math.sqrt(math.pi)), "tanh": _unary("tanh"),
    "sigmoid": _unary("sigmoid"), "relu": _unary("relu"), "silu": _unary("silu"), "abs": _unary("absolute"),
    "sign": _unary("sign"), "elu": _elu, "gelu": _gelu, "mish": _mish,
    "leaky_relu": lambda r, a, slope=0.01: r.elementwise("leaky relu", [a], slope),
    "softplus": lambda r, a, beta=1, threshold=20: r.elementwise("softplus", [a], beta, threshold),
    "hardtanh": lambda r, a, low=-1, high=1: r.elementwise("hardtanh", [a], low, high),
    "clamp": _clamp, "clamp_min": _clamp,
    "clamp_max": lambda r, a, high: _clamp(r, a, None, high),
    "maximum": lambda r, a, b: r.elementwise("maximum", [a, b], 0.5, 0.5),
    "minimum": lambda r, a, b: r.elementwise("minimum", [a, b], 0.5, 0.5),
    "gt": _compare("greater"), "ge": _compare("greater or equal"), "lt": _compare("greater", True),
    "le": _compare("greater or equal", True), "eq": _compare("equal"), "where": _where,
    "mean": _mean, "sum": _sum, "softmax": _softmax, "_softmax": lambda r, a, dim, _half: _softmax(r, a, dim),
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "scaled_dot_product_attention": _attention,
    "linear": _linear, "addmm": _addmm, "mm": _matmul, "matmul": _matmul, "bmm": _matmul,
    "dropout": _dropout, "to": _to, "_to_copy": _to, "type_as": _to, "detach": _unary("stop"),
    "gru_cell": _gru_cell, "lstm_cell": _lstm_cell,
}  # fmt: skip
"""What each operation of torch becomes, by its name."""
