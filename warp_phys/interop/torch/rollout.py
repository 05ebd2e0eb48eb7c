"""Rollouts of torch modules whose backward pass is a flow of one's choice, attached to autograd."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import warp as wp

from warp_phys.core.arrays import for_all_streams, shape_message
from warp_phys.core.checks import check_function
from warp_phys.core.kernel_cache import start_warp
from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import (
    Adjoints,
    Controller,
    Retreat,
    Seeds,
    Trajectory,
    all_gates,
    backward,
    check_gates,
    forward,
)
from warp_phys.errors import check_choice, check_count
from warp_phys.flow import (
    Combined,
    Flow,
    FlowLike,
    FlowName,
    combine,
    linear_parts,
    parts_of,
    refuse_memory,
    refuse_whole,
    resolve,
)
from warp_phys.interop.torch.combine import combined_changes, has_own_hooks, size_of, split
from warp_phys.interop.torch.compiled import name_of_rollout
from warp_phys.interop.torch.contract import (
    Found,
    PassCheck,
    RowsCoupled,
    check_repeated_controls,
    refuse_averaging,
)
from warp_phys.interop.torch.controller import TorchController, precision_and_device
from warp_phys.interop.torch.dense import as_array, check_dense, is_finite
from warp_phys.interop.torch.direct import DirectPass, Given
from warp_phys.interop.torch.hybrid import Hybrid
from warp_phys.interop.torch.leaves import Cuts, leaves_of
from warp_phys.interop.torch.loss import (
    refuse_inference,
    refuse_transforms,
    rows_of_parameters,
    structs_of,
    torch_stream,
)
from warp_phys.interop.torch.node import Sources, Unroll, freeze_diverged, owned, refuse_reentrant, without
from warp_phys.interop.torch.ops import name_of
from warp_phys.interop.torch.report import Report
from warp_phys.interop.torch.rows import (
    NOTHING,
    Beside,
    RowModule,
    adjoints_of,
    check_inputs,
    check_memory,
    fill,
    first_row,
    has_room,
    takes_inputs,
)
from warp_phys.rollout import BACKENDS, Backend, check_sizes, choose_backend
from warp_phys.systems.base import Simulator, System
from warp_phys.systems.extended import extended
from warp_phys.systems.hybrid import refuse_limit
from warp_phys.systems.losses import When, check_loss, chosen_times

_ONE_VECTOR = "x0, physical parameters, inputs and memory must have no gradient, which would be vectors of their own"

DIRECT_PASSES = 8
"""Batch sizes, horizons, losses and flows of `value_and_grad` whose memory is kept."""


class _Retreat(Retreat):
    """A simulator's way back that also finds the updates of what the simulator depends on, in flat tensors per flow."""

    def __init__(self, system: Any, steps: Any, masked: torch.Tensor, sources: Sources, updates: torch.Tensor):
        super().__init__(system, steps, but=masked.tolist())
        self._sources, self._updates = sources, updates
        self.reached: set[int] = set()
        """The leaves, by identity, that next states do depend on."""

    def product(self, f: int, x: wp.array, c: wp.array, arguments: tuple, options: dict[str, Any]) -> None:
        """Call `step_vjp` for flow f."""
        if hasattr(self.system, "leaves"):
            own, more = self._sources, {"gradient": self._updates[f], "reached": self.reached}
            options = {**options, "leaves": own.system, "cuts": own.cuts_of_system, **more}
        super().product(f, x, c, arguments, options)


class Rollout:
    """x_{n+1} = S(x_n, N(x_n)) for n = 0 … steps − 1, differentiable with the flow of one's choice.

    `loss.backward()` leaves the flow's update in the `.grad` of the controller's parameters. Several backward passes
    before one optimiser step add up as they should, for a combined flow M and R apart.

    Args:
        system: A `System`, a `Hybrid`, or anything with `step` and `step_vjp` (see `Simulator`).
        controller: Any module that maps states (B, D) to controls (B, K) row by row, the same way each time, and leaves
            its input as it is. With inputs it is called with (x, w), with a memory with (x, h), with both with
            (x, w, h); one with a memory returns (c, h').
        steps: Number of time steps T.
        flow: A name, a letter, a `Flow` or a `Combined`.
        device: "cpu", "cuda", "cuda:1", …; that of the controller's parameters if None.
        backend: "fused" (in kernels of their own: chains of the engine's layers, and any module that `program`
            reads as a row program), "general" (any module) or "auto": on CUDA general; on a CPU fused where it can be,
            programs from the fourth pass with gradients on, since making code of one takes some seconds. See
            `why_general`.
        on_divergence: "raise" raises `Diverged`; "mask" freezes the samples that diverge in their last finite state,
            gives them no say in the gradients and names them in `report.diverged`.
        check: How often a controller and a simulator that are not the engine's own are tried out: "auto" (at the first,
            second, fourth, … pass and whenever something about them has changed) or "always"; see docs/contract.md.
        reduce: Called with the flows' updates, shape (flows, parameters), before they are compared: sums them in place
            over ranks, for instance `torch.distributed.all_reduce`.
        memory: Numbers H that the controller remembers from step to step.
        inputs: Numbers E of the inputs of a step, for a controller that takes some; None if the first call says so.

    Raises:
        TypeError, ValueError: Arguments that do not fit; the message names the argument, what came, what is expected.
    """

    def __init__(
        self,
        system: Simulator,
        controller: torch.nn.Module,
        steps: int,
        flow: FlowLike = "combined",
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        on_divergence: Literal["raise", "mask"] = "raise",
        reduce: Callable[[torch.Tensor], Any] | None = None,
        check: Literal["auto", "always"] = "auto",
        memory: int = 0,
        inputs: int | None = None,
    ):
        if not isinstance(controller, torch.nn.Module):
            raise TypeError(f"controller must be a torch.nn.Module, got {type(controller).__name__}")
        start_warp()
        self._system, self._controller = system, controller
        # what kernels know of the system, and all that is trained
        self._physics: Any = system.rows if isinstance(system, Hybrid) else system
        self.trained: torch.nn.Module = controller
        """What is trained: the controller, with a `Hybrid` also the module in its physics."""
        if isinstance(system, Hybrid):
            self.trained = torch.nn.ModuleDict({"controller": controller, "physics": system.module})
        self._steps = check_count("steps", steps)
        self.flow = flow
        self.observe: Sequence[FlowName | Flow] = ()
        """Further flows that ride along in backward passes, for the report only."""
        self.report = Report()
        """Numbers of the last backward pass."""
        self.on_divergence = check_choice("on_divergence", on_divergence, ("raise", "mask"))
        check_function("reduce", reduce, "the updates, shape (flows, parameters)")
        self.reduce = reduce
        self.check = check_choice("check", check, ("auto", "always"))
        self._passes = 0
        self._has_others = False
        self.memory_size = check_count("memory", memory, least=0)
        """Numbers H that the controller remembers."""
        self._takes_inputs = takes_inputs(controller, self.memory_size)
        has_rows = self._takes_inputs or self.memory_size or self._own_inputs or isinstance(system, Hybrid)
        check_sizes(system, object() if has_rows else controller)
        # a backward pass takes a workspace and returns it: passes in several threads, or in one another, do not share
        self._workspaces: list[Workspace] = []
        self._gates: dict[tuple, tuple[np.ndarray, wp.array]] = {}
        self._direct: dict[tuple, DirectPass] = {}
        self._name_system()
        self._name = name_of_rollout(self)
        self.dtype, self.device = precision_and_device(self.trained, device)
        self._backend = check_choice("backend", backend, BACKENDS)
        self._inputs_known: int | None = None
        self._known: tuple[Any, TorchController] | None = None
        if inputs is not None or not (self._takes_inputs or self._own_inputs):
            self._set_inputs(0 if inputs is None else check_count("inputs", inputs, least=0))

    def _set_inputs(self, size: int) -> None:
        """Take up how many numbers the inputs of a step have: from then on rows are known."""
        own = self._own_inputs
        if size < len(own):
            raise ValueError(
                f"{type(self._system).__name__} has inputs ({', '.join(own)}): give them to each call, "
                f"inputs of shape (steps, batch, E) with E at least {len(own)}, got E = {size}"
            )
        if self._takes_inputs and not size:
            raise ValueError("the controller takes inputs: give them to each call, rollout(x0, inputs=w)")
        inner, module = extended(self._physics, self.memory_size, size), self._controller
        if inner is not self._system:
            sees = self._takes_inputs or size > len(own) or (size > 0 and has_room(self._controller, self.memory_size))
            network = self._system.network if isinstance(self._system, Hybrid) else None
            module = RowModule(self._controller, inner, sees, network)
        adapter = TorchController(module, inner.state_size, inner, at_once=self._backend == "fused")
        check_sizes(inner, adapter.dense() or module)
        choose_backend(self._backend, inner, adapter, self.device.type == "cuda")
        self._known, self._inputs_known = (inner, adapter), size

    @property
    def _own_inputs(self) -> tuple[str, ...]:
        """What the system itself is given at every step."""
        return self._physics.inputs if isinstance(self._physics, System) else ()

    @property
    def _adapter(self) -> TorchController:
        """The controller of rows."""
        return self._of_rows()[1]

    @property
    def _inner(self) -> Any:
        """The system of rows."""
        return self._of_rows()[0]

    def _of_rows(self) -> tuple[Any, TorchController]:
        if self._known is None:
            raise ValueError(
                "how many numbers the inputs of a step have is known from the first call on: "
                "give Rollout(…, inputs=E) to say so before"
            )
        return self._known

    @property
    def system(self) -> Simulator:
        """The system; another one needs another rollout."""
        return self._system

    @property
    def controller(self) -> torch.nn.Module:
        """The controller; another one needs another rollout."""
        return self._controller

    @property
    def steps(self) -> int:
        """Number of time steps T of the next calls; another number may be assigned."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        steps = check_count("steps", steps)
        check_gates(linear_parts(self.flow), steps)
        self._steps = steps

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory, so that copies and pickles are possible."""
        return {**vars(self), "_workspaces": [], "_gates": {}, "_direct": {}, "report": Report()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy a name of its own."""
        vars(self).update(state)
        self._name_system()
        self._name = name_of_rollout(self)

    def _name_system(self) -> None:
        """Give the system a name for losses in compiled code."""
        system = self._system.system if isinstance(self._system, Hybrid) else self._system
        if isinstance(system, System):
            name_of(system)

    @property
    def flow(self) -> Flow | Combined:
        """The flow of the next backward passes; a name or a letter may be assigned."""
        return self._flow

    @flow.setter
    def flow(self, flow: FlowLike) -> None:
        flow = resolve(flow)
        check_gates(linear_parts(flow), self.steps)
        for part in linear_parts(flow) if isinstance(self._system, Hybrid) else ():
            refuse_limit(part.limit)
        self._flow = flow

    @property
    def why_general(self) -> str | None:
        """Why passes, forward and backward, are not fused, in one sentence; None where they are."""
        if self.backend == "fused":
            return "on CUDA the backward pass is not fused yet" if self.device.type == "cuda" else None
        if not isinstance(self._physics, System):
            return f"{type(self.system).__name__} is no System, whose physics kernels contain"
        if self.device.type == "cuda" or self._backend == "general":
            return f"the backend is {self._backend!r}, on {self.device.type}"
        return self._adapter.why_general or "the module has not been used often enough to be compiled"

    @property
    def backend(self) -> str:
        """How passes run, forward and backward: "fused" or "general"; on CUDA the forward pass, see `why_general`."""
        return choose_backend(self._backend, self._inner, self._adapter, self.device.type == "cuda")

    # a memory that begins at zeros gives three too; to a type checker it says so by memory=torch.zeros(batch, H)
    @overload
    def __call__(
        self, x0: Any, parameters: Mapping[str, Any] | None = None, inputs: Any = None, memory: None = None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def __call__(
        self, x0: Any, parameters: Mapping[str, Any] | None = None, inputs: Any = None, *, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def __call__(
        self, x0: Any, parameters: Mapping[str, Any] | None = None, inputs: Any = None, memory: Any = None
    ) -> Any:
        """Return states (steps + 1, batch, D) and controls (steps, batch, K), attached to autograd.

        With a memory, also what is remembered, (steps + 1, batch, H): its last entry, detached or not, is where the
        next rollout goes on.

        Args:
            x0: Initial states, shape (batch, D): torch, numpy or any DLPack array.
            parameters: Physical parameters by name, a number or one per sample each; tensors may require gradients.
                A combined flow compares sums over the batch if all are numbers, else it compares sample by sample.
            inputs: What controller and system are given at every step besides the state (a reference, a command,
                noise, a clock): shape (steps, E), (steps, 1, E) or (steps, batch, E). A system's own inputs come first.
                A tensor may require gradients; a combined flow compares it as it does x0.
            memory: What the controller remembers at first, shape (batch, H); zeros if None.

        Raises:
            TypeError, ValueError: An argument does not fit; the flow has a memory, and gradients are asked for.
            Diverged: A state is not finite, and `on_divergence` is "raise".
        """
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                refuse_memory(self._flow)
            return self._own_parts(*self._as_operator(x0, parameters, inputs, memory))
        refuse_transforms("a rollout")
        x0 = self.initial_states(x0)
        beside = self._given(x0, inputs, memory)
        rows = rows_of_parameters(self.system, parameters, x0)
        return self._own_parts(*self._unroll(x0, rows, beside)[0])

    def _own_parts(self, states: torch.Tensor, controls: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return states, controls and, if there is one, the memory, of rows and of what the controller returns."""
        if self._inner is self._system:
            return states, controls
        size, end = self._inner.own_size, self._inner.remembering_size
        own = states[:, :, : self._system.state_size], controls[:, :, : self._inner.own_controls]
        return (*own, states[:, :, size:end]) if self.memory_size else own

    def _given(self, x0: torch.Tensor, inputs: Any, memory: Any) -> Beside:
        """Return what a call is given besides x0 and physical parameters, or raise an error that says what is wrong."""
        if memory is not None:
            if not self.memory_size:
                raise ValueError("memory is given to a rollout without one: Rollout(…, memory=H)")
            memory = check_memory(self.as_tensor(memory, "memory"), x0, self.memory_size)
        if inputs is not None:
            known = self._inputs_known or None
            inputs = check_inputs("inputs", self.as_tensor(inputs, "inputs"), x0, self.steps, known)
        size = 0 if inputs is None else inputs.shape[2]
        if self._inputs_known is None:
            self._set_inputs(size)
            self._try_inputs(x0, Beside(inputs, memory))
        if size != self._inputs_known:
            raise ValueError(
                f"this rollout has inputs of {self._inputs_known} numbers a step, got "
                + (f"{size}" if size else "none: give rollout(x0, inputs=w)")
            )
        return Beside(inputs, memory)

    def _try_inputs(self, x0: torch.Tensor, beside: Beside) -> None:
        """Call the controller once with inputs of a size that nobody has named; forget it if it does not take them."""
        row = first_row(x0, beside, self._inner)
        try:
            with torch.no_grad(), torch_stream(self.device), torch.autocast(self.device.type, enabled=False):
                self._adapter.module(row)
        except Exception as error:
            size, self._known, self._inputs_known = self._inputs_known, None, None
            raise ValueError(f"the controller does not take inputs of {size} numbers a step: {error}") from error

    def _unroll(
        self,
        x0: torch.Tensor,
        rows: torch.Tensor | None,
        beside: Beside = NOTHING,
        flow: Flow | Combined | None = None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]:
        """Return rows and controls, attached to autograd where that is at work, and the leaves behind them.

        Without a `flow` the backward pass is by that which the rollout has when it runs.
        """
        if not torch.is_grad_enabled():
            return self._forward(x0, rows, keep=False, beside=beside)[:2], ()
        found, sources = self._look(x0, rows, beside=beside, flow=flow)
        given = [tensor for tensor in (x0, rows, *beside) if tensor is not None and tensor.requires_grad]
        if not given and not sources.leaves:
            return self._forward(x0, rows, keep=False, beside=beside)[:2], ()
        refuse_memory(flow or self._flow)
        refuse_averaging(self.trained, flow or self._flow, self.reduce)
        if given:
            refuse_whole(_ONE_VECTOR, flow or self._flow)
        if sources.combined:
            refuse_reentrant(*given)
        if sources.apart:
            x0, rows, beside = x0.detach(), None if rows is None else rows.detach(), beside.detach()
        return Unroll.apply(self, flow, sources, found, x0, rows, *beside, *sources.inputs), sources.origins

    def _look(
        self,
        x0: torch.Tensor,
        rows: torch.Tensor | None,
        cut: bool = True,
        beside: Beside = NOTHING,
        flow: Flow | Combined | None = None,
    ) -> tuple[Found | None, Sources]:
        """Return what a look at the controller finds before a pass from x0, and all that the pass depends on."""
        found, own, cuts, of_system, is_known = None, (), {}, None, self._adapter.is_known()
        if not is_known or hasattr(self.system, "leaves"):
            with torch_stream(self.device), torch.autocast(self.device.type, enabled=False):
                self._check_place()
                if not is_known:
                    size, always = self._inner.control_size, self.check == "always"
                    row = first_row(x0, beside, self._inner)
                    found = self._adapter.examine(row, size, self.steps, always, cut)
                    cuts = {} if found.cuts is None else found.cuts.of(found.leaves)
                if hasattr(self.system, "leaves"):
                    of_system = Cuts()
                    own = self.system.leaves(x0, x0.new_zeros((len(x0), self.system.control_size)), of_system)
                    cuts = {**cuts, **of_system.of(own)}
        controller = self._adapter.trainable if found is None else found.leaves
        combined = isinstance(flow or self._flow, Combined)
        histories = (x0, rows, *beside) if combined else (None,) * 4
        sources = Sources(controller, own, histories, cuts, combined)
        self._has_others = len(sources.leaves) > len(self._adapter.trainable)
        sources.cuts_of_system = of_system if of_system is not None and of_system.pairs else None
        sources.check()
        return found, sources

    def _look_after(self, found: Found | None, x0: torch.Tensor, controls: torch.Tensor, masked: torch.Tensor) -> None:
        """Look at the controller after the forward pass that `found` was found for; raise if it has changed."""
        with torch_stream(self.device), torch.autocast(self.device.type, enabled=False):
            if found is not None:
                self._adapter.examination.end(found)
            elif not len(masked) and self._adapter.is_due(len(x0), self.check == "always"):
                check_repeated_controls(self._adapter.module, x0, controls[0])

    def is_tried(self, direct: DirectPass) -> bool:
        """Whether a direct pass is held against the module this time."""
        return self._adapter.is_due(direct.states.shape[1], self.check == "always", direct.planned)

    def try_out(self, direct: DirectPass) -> None:
        """Raise `NotRepeatable` if the module gives other controls than the direct pass that has been launched."""
        with torch.autocast(self.device.type, enabled=False):
            check_repeated_controls(self._adapter.module, direct.states[0], direct.controls[0])

    def _as_operator(
        self, x0: Any, parameters: Mapping[str, Any] | None, inputs: Any, memory: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same as one opaque node of a graph that torch compiles; what it is given is checked when that runs."""
        given = (x0, inputs, memory)  # numbers in any precision and on any device, as dynamo may hand them on
        x0, inputs, memory = (
            v if v is None or isinstance(v, torch.Tensor) else torch.as_tensor(v).to(self.device, self.dtype)
            for v in given
        )
        if inputs is not None and inputs.ndim == 2:
            inputs = inputs[:, None]
        _ = self._inner  # or an error that says what is not known yet
        rows = rows_of_parameters(self.system, parameters, x0)
        refuse_averaging(self.trained, self._flow, self.reduce)
        if torch.is_grad_enabled() and isinstance(self._flow, Combined):
            if any(value is not None and value.requires_grad for value in (x0, rows, inputs, memory)):
                raise ValueError(
                    "what a rollout is given must have no gradient in compiled code with a combined flow: it would be "
                    "combined before the updates that it leads to are. Detach x0, parameters, inputs and memory, "
                    "unroll the whole horizon in one rollout, or leave the rollout out of the compiled code"
                )
        trainable = self._adapter.trainable
        frozen = [p for p in self.trained.parameters() if not p.requires_grad]
        states, controls, _ = torch.ops.warp_phys.unroll(
            x0, rows, inputs, memory, trainable, frozen, self._steps, self._name
        )
        return states, controls

    def value_and_grad(
        self,
        x0: Any,
        when: When = "final",
        control_cost: float = 0.0,
        parameters: Mapping[str, Any] | None = None,
        inputs: Any = None,
        memory: Any = None,
    ) -> torch.Tensor:
        """Return the loss of `System.loss`, and leave the flow's update in the `.grad` of the controller's parameters.

        The numbers are those of `loss = system.loss(*rollout(x0), …)` and `loss.backward()` after clearing the
        gradients; what the gradients held is replaced. On the fused backend there is no graph of autograd in between
        and all memory is kept from one call to the next, the gradients' too, which makes an update much cheaper.

        Two threads must not be in this method of one rollout at the same time: they would share that memory.

        Args:
            x0: Initial states, shape (batch, D): torch, numpy or any DLPack array.
            when: "final", "every", or the chosen steps.
            control_cost: Factor of the mean squared control.
            parameters: Physical parameters, as for a call; the cost has them too. Those that require gradients get
                them as the weights do; only where they have a history there is a graph of autograd.
            inputs: As for a call; the cost has them too, where it reads inputs. Where they require gradients there is a
                graph of autograd, as where the memory does.
            memory: As for a call.

        Returns:
            The loss, a tensor of no dimensions, detached.

        Raises:
            TypeError, ValueError: As a call of the rollout and `System.loss` do.
            Diverged: A state is not finite, and `on_divergence` is "raise".
            RuntimeError: In `torch.inference_mode`.
        """
        refuse_memory(self._flow)
        return self._value_and_grad(self._flow, x0, when, control_cost, parameters, (inputs, memory))

    def _value_and_grad(
        self,
        flow: Flow | Combined,
        x0: Any,
        when: When,
        control_cost: float,
        parameters: Any,
        beside: tuple[Any, Any] = (None, None),
    ) -> torch.Tensor:
        """Do that by a flow without a memory."""
        refuse_inference("value_and_grad")
        when = check_loss(self.system, when, self.steps, control_cost)
        x0 = self.initial_states(x0)
        given, start = Given(self.system, parameters, x0) if parameters else None, self._given(x0, *beside)
        if given is not None and given.leaves:
            refuse_whole(_ONE_VECTOR, flow)
        direct = None if start.requires_grad else self.direct_pass(flow, len(x0), when, control_cost, given)
        if direct is None or (given is not None and not direct.take_parameters(given)):
            return self._value_and_grad_by_graph(flow, x0, when, control_cost, parameters, start)
        self._has_others = False
        with torch.no_grad():
            direct.begin(x0, start)
            direct.launch()
            if not is_finite(direct.states):
                if self.on_divergence == "raise":
                    freeze_diverged(direct.states, direct.controls, self.on_divergence)
                return self._value_and_grad_by_graph(flow, x0, when, control_cost, parameters, start)
            if self.is_tried(direct):
                self.try_out(direct)
            loss = direct.loss()
            if self.reduce is not None:
                self.reduce(direct.updates)
            self.report = direct.leave()
        return loss

    def direct_pass(
        self, flow: Flow | Combined, batch: int, when: When, control_cost: float, given: Given | None = None
    ) -> DirectPass | None:
        """Return the memory of a pass, kept as long as nothing changes but numbers; None where it is not possible."""
        fingerprint = self._adapter.fingerprint() if self.device.type == "cpu" else None
        if fingerprint is None or (given is not None and not given.are_plain):
            return None
        if given is not None and given.leaves and self.reduce is not None:
            return None  # autograd decides which of them it sums over ranks
        when, control_cost = when if isinstance(when, str) else tuple(when), float(control_cost)
        threads = torch.get_num_threads()
        own = None if given is None else given.key
        key = (self.steps, batch, flow, tuple(self.observe), when, control_cost, threads, own, fingerprint)
        found = self._direct.get(key)
        if found is None:
            self._check_place()
            if not isinstance(self._physics, System) or self.backend != "fused":
                return None
            if any(map(has_own_hooks, self._adapter.trainable)):
                return None
            weights = {id(parameter) for parameter in self.trained.parameters()}
            if given is not None and any(id(leaf) in weights for _, leaf in given.leaves):
                return None
            times, shape = chosen_times(when, self.steps), (self.steps, batch)
            if len(self._direct) >= DIRECT_PASSES:
                self._direct.pop(next(iter(self._direct)))
            found = self._direct[key] = DirectPass(
                self._inner, self._adapter, shape, flow, self.running_flows(flow), times, control_cost, self.dtype,
                given,
            )  # fmt: skip
        return found

    def _value_and_grad_by_graph(
        self,
        flow: Flow | Combined,
        x0: torch.Tensor,
        when: When,
        control_cost: float,
        parameters: Mapping[str, Any] | None,
        beside: Beside = NOTHING,
    ) -> torch.Tensor:
        """Do the same for any backend."""
        _clear_gradients(self.trained.parameters())
        own = {"parameters": parameters} if parameters else {}  # a foreign system's loss takes none
        with torch.enable_grad():
            rows = rows_of_parameters(self.system, parameters, x0)
            unrolled, leaves = self._unroll(x0.detach(), rows, beside, flow)
            states, controls, *_ = self._own_parts(*unrolled)
            for tensor in (rows, *beside):
                _clear_gradients(() if tensor is None else leaves_of(tensor))
            _clear_gradients(leaves)
            if getattr(self.system, "cost_reads_inputs", False):
                own["inputs"] = beside.inputs  # type: ignore[assignment]
            loss = self.system.loss(states, controls, when=when, control_cost=control_cost, **own)  # type: ignore[attr-defined]
            if loss.requires_grad:
                loss.backward()
        return loss.detach()

    def initial_states(self, x0: Any, check_finite: bool = True) -> torch.Tensor:
        """Return x0 as a tensor that fits, or raise; without `check_finite` whatever its numbers are."""
        x0 = self.as_tensor(x0)
        if x0.ndim != 2 or x0.shape[1] != self.system.state_size or len(x0) == 0:
            columns = ", ".join(getattr(self.system, "states", ()))
            message = shape_message("x0", (-1, self.system.state_size), x0.shape)
            raise ValueError(f"{message} for {self.system}" + (f"; its columns are {columns}" if columns else ""))
        if x0.dtype != self.dtype:
            raise TypeError(f"x0 must hold {self.dtype} as the controller does, got {x0.dtype}")
        if x0.device != self.device:
            raise ValueError(f"x0 must be on device {self.device} as the controller is, got {x0.device}")
        if check_finite and not is_finite(x0):
            bad = torch.nonzero(~torch.isfinite(x0).all(dim=1)).flatten().tolist()
            raise ValueError(f"x0 must be finite, rows {bad[:8]} are not")
        return x0

    def as_tensor(self, x0: Any, name: str = "x0") -> torch.Tensor:
        """Return numpy or DLPack data as a tensor: numpy in the controller's precision and on its device."""
        if isinstance(x0, torch.Tensor):
            check_dense(name, x0)
            return x0
        if isinstance(x0, (np.ndarray, list, tuple)):
            try:
                array = np.asarray(x0)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(f"{name} must be rows of one length: {error}") from None
            if array.dtype.kind != "f":
                raise TypeError(f"{name} must hold floating-point numbers, got {array.dtype}")
            # torch takes neither another byte order nor strides below zero.
            array = np.ascontiguousarray(array, np.float64 if self.dtype == torch.float64 else np.float32)
            return torch.as_tensor(array).to(self.device)
        if hasattr(x0, "__dlpack__"):
            try:
                return torch.from_dlpack(x0)
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                raise TypeError(f"{name} must be an array of numbers that torch can take: {error}") from None
        raise TypeError(f"{name} must be a torch, numpy or DLPack array, got {type(x0).__name__}")

    def _structs(self, rows: torch.Tensor | None, like: torch.Tensor) -> wp.array | None:
        return structs_of(self._physics, rows, like) if isinstance(self._physics, System) else None

    def _forward(
        self, x0: torch.Tensor, rows: torch.Tensor | None, keep: bool, beside: Beside = NOTHING
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return rows, controls, the samples that were masked, and what the controller kept for a backward pass."""
        states = x0.new_empty((self.steps + 1, len(x0), self._inner.state_size))
        controls = x0.new_empty((self.steps, len(x0), self._inner.control_size))
        if self._inner is self._system:
            states[0] = x0.detach()
        else:
            fill(states, x0.detach(), beside.detach(), self._inner)
        self._check_place()
        with torch.no_grad(), torch_stream(self.device), torch.autocast(self.device.type, enabled=False):
            arrays = as_array(states), as_array(controls)
            p, fused = self._structs(rows, states), self.backend == "fused"
            kept = forward(self._inner, self._adapter, *arrays, p, fused, keep)
        masked = freeze_diverged(states, controls, self.on_divergence)
        return states, controls, masked, None if len(masked) else kept

    def _check_place(self) -> None:
        """Raise a ValueError if the controller has been converted or moved."""
        first = next(self.trained.parameters(), None)
        if first is not None and (first.dtype, first.device) != (self.dtype, self.device):
            raise ValueError(
                f"controller is now {first.dtype} on {first.device}, the rollout was made for {self.dtype} on "
                f"{self.device}: make another rollout"
            )

    def _backward(
        self,
        states: torch.Tensor,
        controls: torch.Tensor,
        rows: torch.Tensor | None,
        masked: torch.Tensor,
        kept: torch.Tensor | None,
        sources: Sources,
        seeds: tuple[torch.Tensor | None, torch.Tensor | None],
        wanted: Sequence[bool],
        must_train: bool = False,
        found: Found | None = None,
        flow: Flow | Combined | None = None,
        alone: bool = False,
        beside: Beside = NOTHING,
    ) -> tuple[tuple[torch.Tensor | None, ...], list[torch.Tensor | None]]:
        """Run the flows backward; return the gradients of x0, parameter rows, inputs and memory, and of the leaves.

        `wanted` says which of the first four are asked for. Of the leaves, those of `sources`, None stands for the
        gradient of one that the controls do not depend on.
        `must_train` says that the last ones are all that is asked for: where there can be none, that is an error.
        `found` is what the forward pass found out about the controller; `flow` is the rollout's own if None. It runs
        `alone` where nothing but its gradients shall be left of the pass.
        """
        try:
            workspace = self._workspaces.pop()
        except IndexError:  # the first pass, or one within or beside another
            workspace = Workspace()
        flow = flow or self._flow
        flows = parts_of([flow]) if alone else self.running_flows(flow)
        seeds_ = [owned(seed, like, masked) for seed, like in zip(seeds, (states, controls), strict=True)]
        states, controls = without(states, masked, dim=1), without(controls, masked, dim=1)
        if rows is not None and len(rows) > 1:
            rows = without(rows, masked, dim=0)
        like: Any = {"dtype": self.dtype, "device": self.device}
        updates = torch.zeros((len(flows), sources.size), **like)
        of_controller = size_of(sources.controller)
        of_system = torch.zeros((len(flows), size_of(sources.system)), **like)
        want_rows, want_inputs = (wanted[i] or sources.histories[i] is not None for i in (1, 2))
        with torch_stream(self.device), torch.autocast(self.device.type, enabled=False):
            arrays = [as_array(tensor) for tensor in (states.detach(), controls.detach(), *seeds_)]
            trajectory = Trajectory(arrays[0], arrays[1], self._structs(rows, states), kept)
            adjoints, check, simulator = self._run_backward(
                flows, trajectory, Seeds(arrays[2], arrays[3]), masked, sources, found,
                (updates[:, :of_controller], of_system), workspace, want_rows, want_inputs,
            )  # fmt: skip
            if must_train and self.reduce is None:  # with it another rank may know of what there is to train
                check.finish()
            adj_x0 = wp.to_torch(adjoints.x0).clone()
            adj_rows, adj_inputs = (
                None if array is None else wp.to_torch(array).clone()
                for array in (adjoints.parameters, adjoints.inputs)
            )
        self._workspaces.append(workspace)
        if adj_rows is not None and rows is not None and len(rows) == 1:
            adj_rows = adj_rows.sum(dim=1, keepdim=True)
        own = [adj_x0, adj_rows, None, None]
        if self._inner is not self._system:
            own[0], own[2], own[3] = adjoints_of(adj_x0, adj_inputs, beside, self._inner)
        for f, part in enumerate(flows if sources.has_others else ()):
            sources.add(updates[f], sources.system, split(of_system[f], sources.system))
            sources.follow(updates[f], part, [None if a is None else a[f] for a in own])
        used = [flows.index(part) for part in linear_parts(flow)]
        changes = split(updates[0], sources.leaves)
        if not alone:
            if self.reduce is not None:
                self.reduce(updates)
            if isinstance(flow, Combined):
                changes = combined_changes(flow, sources.leaves, *updates[used])
            count = len(sources.controller)
            self.report = Report(flows, updates[:, :of_controller], tuple(changes[:count]), tuple(masked.tolist()))
        through = {id(leaf) for leaf in sources.controller if check.includes(leaf)} | simulator.reached
        reached = [self.reduce is not None or sources.elsewhere(leaf) or id(leaf) in through for leaf in sources.leaves]
        if sources.combined:  # autograd has nothing to do with what stands for a tensor
            reached = [r and id(leaf) not in sources.cuts for r, leaf in zip(reached, sources.leaves, strict=True)]
        grads = [change if depends else None for change, depends in zip(changes, reached, strict=True)]
        if isinstance(flow, Combined) and flow.whole:
            own = [None] * 4  # of which none is asked for
        return tuple(None if a is None else combine(flow, a[used]) for a in own), grads

    def _run_backward(
        self,
        flows: tuple[Flow, ...],
        trajectory: Trajectory,
        seeds: Seeds,
        masked: torch.Tensor,
        sources: Sources,
        found: Found | None,
        updates: tuple[torch.Tensor, torch.Tensor],
        workspace: Workspace,
        want_rows: bool,
        want_inputs: bool,
    ) -> tuple[Adjoints, PassCheck, _Retreat]:
        """Run the flows backward, once more step by step where rows turn out to be coupled, as they may not be at x0.

        Returns:
            The adjoints; what has looked at controller and simulator. `updates`, of controller and system, are written.
        """
        gates, gates_array = self._gates_of(flows, *trajectory.controls.shape[:2])
        steps, controller = self._compared_steps(len(gates[0])), found or self._adapter
        coupled, fused = False, found is None and self.backend == "fused"
        unused = self._adapter.unused() if fused else ()
        while True:
            check = PassCheck(found, masked, unused)
            simulator = _Retreat(self._inner, steps, masked, sources, updates[1])
            try:
                adjoints = backward(
                    self._inner, cast(Controller, controller), trajectory, seeds, gates, gates_array, list(updates[0]),
                    workspace, want_rows, want_inputs, check=check, fused=fused,
                    whole=found is not None and found.whole, simulator=simulator,
                )  # fmt: skip
            except RowsCoupled:
                assert found is not None
                found.whole = coupled = True
                for update in updates:
                    update.zero_()
                continue
            if coupled:
                self._adapter.examination.coupled = True
            return adjoints, check, simulator

    def _compared_steps(self, steps: int) -> Sequence[int] | None:
        """Return at which steps a simulator is asked whether it has changed since the forward pass; None for all."""
        self._passes += 1
        if self.check == "always" or self._passes & (self._passes - 1) == 0:
            return None
        return (0, self._passes % steps, steps - 1)

    def running_flows(self, flow: Flow | Combined) -> tuple[Flow, ...]:
        """Return the flows that a backward pass by a flow runs: its own, and what `observe` adds."""
        return parts_of([flow, *map(resolve, self.observe)])

    def _gates_of(self, flows: tuple[Flow, ...], steps: int, batch: int) -> tuple[np.ndarray, wp.array]:
        """Return the gates of flows, see `phases.all_gates`, as numpy and on the device."""
        key = (flows, steps, batch)
        if key not in self._gates:
            if len(self._gates) >= DIRECT_PASSES:
                self._gates.pop(next(iter(self._gates)))
            gates = all_gates(flows, steps, batch, self._inner)
            array = wp.array(gates, dtype=wp.dtype_from_torch(self.dtype), device=str(self.device))
            self._gates[key] = gates, for_all_streams(array)
        return self._gates[key]


def _clear_gradients(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None
