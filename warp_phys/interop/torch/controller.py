"""Any torch module as the controller of a rollout."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import warp as wp

from warp_phys.engine.layers import Dense, Workspace
from warp_phys.engine.phases import Linearisation
from warp_phys.errors import shown
from warp_phys.interop.torch.chain import (
    ACTIVATIONS,
    PRECISIONS,
    READ,
    Planned,
    are_hooks_everywhere,
    has_hooks,
    has_more,
    is_sequential,
    read_plan,
)
from warp_phys.interop.torch.combine import has_own_hooks, number_of_hooks, places_of, size_of
from warp_phys.interop.torch.contract import (
    Examination,
    Found,
    check_shape,
    refuse_lazy,
)
from warp_phys.interop.torch.dense import DenseLinearisation, as_array
from warp_phys.interop.torch.leaves import plainly_saved
from warp_phys.interop.torch.linearisation import TorchLinearisation, controls_of
from warp_phys.interop.torch.program import Unreadable, read_and_check
from warp_phys.interop.torch.rows import blame
from warp_phys.interop.torch.state import Key, Snapshot
from warp_phys.programs.block_network import BlockLinearisation, BlockNetwork
from warp_phys.programs.network import Network

PROGRAMS = 4
"""Row programs that are kept of a module, by its state: training and evaluation, say."""

PASSES = 3
"""Passes with gradients after which a module is read as a row program: a few seconds that one pass is not worth."""

BATCHES = 64
"""Sizes of batches of which the passes are counted."""

MOST_READS = 16
"""A module that has to be read more often than this changes too often to be compiled."""


class TorchController:
    """A `torch.nn.Module` (B, D) → (B, K) behind the `Controller` protocol; arrays are exchanged without copies."""

    def __init__(self, module: torch.nn.Module, inputs: int, system: Any = None, at_once: bool = False):
        self.module, self.inputs, self.system, self.at_once = module, inputs, system, at_once
        self._programs: dict[Key, Planned | str] = {}
        """The module as a row program, or why it is none, by its state."""
        self._reads, self._ready, self._is_program = 0, at_once, False
        self._runs: tuple[Planned | None, dict[int, int]] = None, {}
        """A program, and the passes that it has run, by their batch."""
        self.by_hand = True
        """Whether dense layers are linearised by hand rather than by autograd; the numbers are the same."""
        self._dense: Dense | None = None
        self._key: tuple | None = None
        self._seen: tuple[Snapshot | None, list[Any], Key | None] = None, [], None
        self._linears: tuple[list[torch.nn.Linear], str] | None = None
        self._network: Network | None = None
        self._blocks: BlockNetwork | None = None
        self._planned: tuple[tuple | None, Planned | None] = None, None
        self._unused: tuple[Planned | None, list[int]] = None, []
        self.examination = Examination(module)
        """What is known of a module that is no chain of the engine's layers."""
        self._differentiates = False  # whether the module itself uses autograd

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory."""
        empty = {**dict.fromkeys(("_dense", "_key", "_linears", "_network", "_blocks")), "_planned": (None, None)}
        empty |= {"_unused": (None, []), "_seen": (None, [], None)}
        own = {"examination": Examination(self.module), "_differentiates": self._differentiates}
        own |= {"system": self.system, "at_once": self.at_once, "_programs": {}}
        own |= {"_reads": 0, "_ready": self.at_once, "_runs": (None, {}), "_is_program": False}
        return {"module": self.module, "inputs": self.inputs, "by_hand": self.by_hand, **own, **empty}

    def signature(self) -> tuple:
        """What must not change between a forward pass and its backward pass, values apart."""
        kinds = tuple(map(type, self.module._modules.values()))
        return kinds, [(id(p), p.data_ptr(), p.requires_grad) for p in self.module.parameters()]

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that require gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def unused(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters that no adjoint of the controls reaches, where a row program tells."""
        planned = self.planned()
        if planned is None:
            return []
        trainable = self.trainable
        if planned is not self._unused[0]:
            pairs = zip(planned.tensors, planned.plan.reached(), strict=True)
            used = {id(tensor) for tensor, is_reached in pairs if is_reached}
            self._unused = planned, [i for i, p in enumerate(trainable) if id(p) not in used]
        return [trainable[i] for i in self._unused[1]]

    @property
    def multiply_adds(self) -> int:
        """Number of parameters: exact for dense layers, a lower bound for convolutions."""
        return size_of(self.module.parameters())

    def evaluator(self, states: wp.array, controls: wp.array) -> Callable[[int], None]:
        """Return a function that writes controls[n] = N(states[n]), shapes (steps + 1, B, D) and (steps, B, K)."""
        x, c = wp.to_torch(states).unbind(), wp.to_torch(controls).unbind()
        return lambda n: self._evaluate(x[n], c[n])

    def _evaluate(self, x: torch.Tensor, c: torch.Tensor) -> None:
        output = self._controls(x)
        check_shape(output, c.shape)  # copy_ would broadcast it
        c.copy_(output)

    def _controls(self, x: torch.Tensor) -> torch.Tensor:
        """Return the controls without a graph, whether or not the module makes one for itself on the way."""
        if not self._differentiates:
            try:
                with torch.no_grad():
                    return controls_of(self.module, x)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            self._differentiates = True
        return TorchLinearisation(self.module, (), x).output.detach()

    def is_known(self) -> bool:
        """Whether the module is a chain of the engine's layers or a program, in a pass that begins: all is known."""
        self._ready = self.at_once or self.examination.passes >= PASSES
        planned = self.planned()
        self._is_program = planned is not None and not planned.is_chain
        return planned is not None or self.dense() is not None

    def program_key(self) -> Key | None:
        """Return what tells a program from what is read of the module later; None where it is run as none."""
        return self._program_fingerprint() if self._is_program else None

    def is_due(self, batch: int, always: bool, planned: Planned | None = None) -> bool:
        """Whether a program, that of now if none is given, is held against its module in a pass of so many rows.

        At its first pass of that batch, the second, the fourth and so on.
        """
        planned = planned or self.planned()
        if planned is None or planned.is_chain:
            return False
        if planned is not self._runs[0]:
            self._runs = planned, {}
        runs = self._runs[1]
        if batch not in runs and len(runs) >= BATCHES:
            runs.clear()
        runs[batch] = count = runs.get(batch, 0) + 1
        return always or count & (count - 1) == 0

    def examine(self, x0: torch.Tensor, controls: int, steps: int, always: bool = False, cut: bool = True) -> Found:
        """Return what the controls depend on and how they are differentiated, before some steps from x0 (batch, D)."""
        return self.examination.begin(self.trainable, x0, controls, steps, always, cut)

    def linearise(self, x: wp.array, workspace: Workspace, fused: bool = False) -> Linearisation:
        """Return the module linearised at the rows x (N, D); if `fused`, on CUDA, by the kernels of its program."""
        if fused and not self._on_cpu():
            network, tensors = self.blocks()
            return ProgramLinearisation(network, addresses_of(tensors), self.offsets(tensors), x, workspace)
        if self.by_hand and self.dense() is not None:
            assert self._linears is not None
            return DenseLinearisation(*self._linears, wp.to_torch(x), self.trainable)
        return TorchLinearisation(self.module, self.trainable, wp.to_torch(x))

    def fits(self, system: Any) -> bool:
        """Whether the module is layers that the fused kernels express."""
        if not hasattr(system, "functions"):
            return False
        planned = self.planned()
        return planned is not None and planned.plan.outputs == system.control_size

    def unroll(
        self, system: Any, states: wp.array, controls: wp.array, parameters: wp.array, keep: bool = False
    ) -> Any:
        """Write states[1:] and controls from states[0] in one kernel.

        Returns:
            On a CPU, if `keep` asks for them, the activations, which `sweep` takes.
        """
        if self._on_cpu():
            return self._packed_network()[0].unroll(system, states, controls, parameters, keep)
        network, tensors = self.blocks()
        network.unroll(addresses_of(tensors), system, states, controls, parameters)
        return None

    def sweeps(self, system: Any) -> bool:
        """Whether `sweep` can run the whole backward pass: where `fits` holds, on a CPU."""
        return self._on_cpu() and self.fits(system)

    def sweep(
        self, system: Any, trajectory: Any, seeds: Any, gates: wp.array, adj_x: wp.array, gradients: Sequence[Any],
        workspace: Workspace, adj_p: wp.array | None = None, adj_inputs: wp.array | None = None,
    ) -> None:  # fmt: skip
        """Run all flows backward in one kernel, see `Network.sweep`; add the updates to the flat `gradients`."""
        network, tensors = self._packed_network()
        packed = network.sweep(system, trajectory, seeds, gates, adj_x, workspace, adj_p, adj_inputs)
        network.unpack(packed, self.targets(tensors, gradients))

    def targets(self, tensors: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor]) -> list[list[int]]:
        """Return where the gradients of weights and biases go in flat tensors, one per flow: addresses, or 0."""
        starts = self.offsets(tensors)
        return [[0 if n < 0 else g.data_ptr() + n * g.element_size() for n in starts] for g in gradients]

    def offsets(self, tensors: Sequence[torch.Tensor | None]) -> list[int]:
        """Return where the gradients of tensors begin in a flat one of all that is trained; −1 for one that is not."""
        trainable = self.trainable
        starts = {id(p): place.start for p, place in zip(trainable, places_of(trainable), strict=True)}
        return [starts.get(id(tensor), -1) for tensor in tensors]

    def fingerprint(self) -> tuple | Key | None:
        """What the plan of the module depends on, and the addresses of its parameters; None if there can be no plan.

        Far cheaper than reading the plan again.
        """
        if self._chain() is not None:
            return self._planned[0]
        return self._program_fingerprint()

    def _program_fingerprint(self) -> Key | None:
        ready = self._ready if self._on_cpu() else self.at_once
        if not ready or self._reads > MOST_READS or not hasattr(self.system, "functions"):
            return None
        if are_hooks_everywhere():
            return None
        snapshot, before, key = self._seen
        if snapshot is None or not snapshot.is_current():
            snapshot, key = Snapshot(self.module, outside=True), None
        memory = [
            *((p.data_ptr(), p.shape, p.stride(), p.dtype, has_own_hooks(p)) for p in snapshot.parameters),
            *(b.data_ptr() for b in snapshot.buffers),
        ]
        if key is None or memory != before:
            key = Key((snapshot.state, tuple(memory)))
        self._seen = snapshot, memory, key
        return key

    def _chain_fingerprint(self) -> tuple | None:
        if not is_sequential(self.module):
            return None
        parts: list[Any] = [type(self.module)]
        for layer in self.module._modules.values():
            if has_hooks(layer):
                return None
            assert layer is not None
            parts += [id(layer), type(layer)]
            parts += [getattr(layer, name) for name in READ.get(type(layer), ())]
            for p in layer._parameters.values():
                if p is not None:
                    parts += [id(p), p.data_ptr(), p.shape, p.stride(), p.dtype, p.requires_grad, number_of_hooks(p)]
        return tuple(parts)

    def planned(self) -> Planned | None:
        """Return what `read_plan` reads; read again only where the fingerprint has changed."""
        return self._chain() or self._program()

    def _chain(self) -> Planned | None:
        """Return the module as a chain of the engine's layers, read again where something about it has changed."""
        fingerprint = self._chain_fingerprint()
        if fingerprint is None:
            return None
        if fingerprint != self._planned[0]:
            self._planned = fingerprint, read_plan(self.module, self.inputs)
        return self._planned[1]

    def _program(self) -> Planned | None:
        """Return the module as a row program, read again where something about it has changed.

        Code is made of it where it is used again and again, or where that is asked for.
        """
        key = self._program_fingerprint()
        if key is None:
            return None
        if key not in self._programs:
            if len(self._programs) >= PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            self._reads += 1
            try:
                with plainly_saved():
                    self._programs[key] = read_and_check(self.module, self.system, blocks=not self._on_cpu())
            except Unreadable as reason:
                self._programs[key] = str(reason)
        found = self._programs[key]
        return None if isinstance(found, str) else found

    @property
    def why_general(self) -> str | None:
        """Why the module is neither a chain of the engine's layers nor a row program, in one sentence, if known."""
        if self._reads > MOST_READS:
            return "it has changed too often to be read as a row program each time"
        if are_hooks_everywhere():
            return "there are hooks on all modules of the process, which a program would not call"
        key = self._program_fingerprint()
        found = None if key is None else self._programs.get(key)
        return found if isinstance(found, str) else None

    def _on_cpu(self) -> bool:
        parameter = next(self.module.parameters(), None)
        return parameter is None or parameter.device.type == "cpu"

    def _packed_network(self) -> tuple[Network, tuple[torch.Tensor | None, ...]]:
        """Return the module as a network that has read its weights, and their tensors."""
        network, tensors = self.network()
        network.pack(addresses_of(tensors))
        return network, tensors

    def network(self) -> tuple[Network, tuple[torch.Tensor | None, ...]]:
        """Return the module as a network, and the tensors of its weights and biases in turn; `fits` must hold."""
        planned = self.planned()
        assert planned is not None
        plan, tensors, _ = planned
        real = wp.dtype_from_torch(tensors[0].dtype)  # type: ignore[union-attr]
        wanted, network = (plan, real, torch.get_num_threads()), self._network
        if network is None or (network.plan, network.real, network.threads) != wanted:
            network = self._network = Network(*wanted)
        return network, tensors

    def blocks(self) -> tuple[BlockNetwork, tuple[torch.Tensor | None, ...]]:
        """Return the same for CUDA."""
        planned = self.planned()
        assert planned is not None
        plan, tensors, _ = planned
        first: Any = tensors[0]
        wanted, network = (plan, wp.dtype_from_torch(first.dtype), wp.device_from_torch(first.device)), self._blocks
        if network is None or (network.program, network.real, network.device) != wanted:
            network = self._blocks = BlockNetwork(*wanted)
        return network, tensors

    def held(self) -> list[Any]:
        """Return what a captured graph goes on using of this controller's, and must keep alive."""
        return [self.dense(), None if self._on_cpu() or self.planned() is None else self.blocks()[0]]

    def dense(self) -> Dense | None:
        """Return the module as `Dense` layers over the same memory, or None if it is something else."""
        layers = _dense_layers(self.module)
        if layers is None:
            self._key = self._dense = self._linears = None
            return None
        linears, activation = layers
        tensors = [t for layer in linears for t in (layer.weight, layer.bias)]
        key = (activation, *((t.data_ptr(), t.shape) for t in tensors))
        if key != self._key:
            sizes = (linears[0].in_features, *(layer.out_features for layer in linears))
            arrays = [as_array(t.detach()) for t in tensors]
            self._dense, self._key = Dense(sizes, activation, arrays), key
        self._linears = layers  # other layers may hold the same memory
        return self._dense


class ProgramLinearisation(BlockLinearisation):
    """A program linearised on CUDA, whose gradients are flat tensors."""

    def contract(self, mu: wp.array, gradients: Sequence[torch.Tensor]) -> None:
        """Add Σ (∂N/∂θ)ᵀ mu[f] over the rows of each flow f to the flat tensor gradients[f]."""
        super().contract(mu, [as_array(gradient) for gradient in gradients])


def addresses_of(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    """Return the addresses of tensors; 0 for one that is not there."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _dense_layers(module: torch.nn.Module) -> tuple[list[torch.nn.Linear], str] | None:
    """Return the linear layers and the activation between them, or None for any other module."""
    if not is_sequential(module):
        return None
    layers = list(module._modules.values())  # children() would leave out an activation that is used twice
    linears, between = [layer for layer in layers[::2] if _is_plain_linear(layer)], layers[1::2]
    if len(linears) != len(layers[::2]) or len(linears) != len(between) + 1 or any(has_hooks(x) for x in layers):
        return None
    names = {ACTIVATIONS.get(type(layer), "") for layer in between} or {"identity"}
    if len(names) != 1 or "" in names or any(getattr(layer, "alpha", 1.0) != 1.0 for layer in between):
        return None
    return linears, names.pop()


def _is_plain_linear(layer: torch.nn.Module | None) -> TypeGuard[torch.nn.Linear]:
    if type(layer) is not torch.nn.Linear or layer.bias is None or has_more(layer):
        return False
    if not isinstance(layer.weight, torch.nn.Parameter) or not isinstance(layer.bias, torch.nn.Parameter):
        return False
    return layer.weight.is_contiguous() and layer.weight.dtype in PRECISIONS


def _device(device: Any) -> torch.device:
    """Return a device of torch's, or raise a TypeError or ValueError that says what was given."""
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device must be the name of a device or a torch.device, got {shown(device)}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one that torch knows, such as 'cpu' or 'cuda:0', got {device!r}") from None


def precision_and_device(controller: torch.nn.Module, device: Any) -> tuple[torch.dtype, torch.device]:
    """Return the one precision and device of a module's parameters, or raise; of its buffers if it has none."""
    refuse_lazy(controller)
    parameters: list[torch.Tensor] = list(controller.parameters())
    parameters = parameters or [b for b in controller.buffers() if b.is_floating_point()]
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1:
        raise ValueError(
            blame(
                controller,
                f"controller must have its parameters in one precision on one device, got {sorted(map(str, kinds))}",
            )
        )
    place = _device("cpu" if device is None else device)
    dtype, own = kinds.pop() if kinds else (torch.get_default_dtype(), place)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(blame(controller, f"controller must have float32 or float64 parameters, got {dtype}"))
    wanted = own if device is None else place
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if wanted != own:
        raise ValueError(
            f"device is {wanted}, but the controller's parameters are on {own}: use controller.to('{wanted}')"
        )
    return dtype, own
