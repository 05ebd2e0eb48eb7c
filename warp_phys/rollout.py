"""Rollouts in pure Warp: a controller and a system unrolled, as one entry of a caller's tape."""

import functools
import weakref
from typing import Any, Literal, get_args

import numpy as np
import warp as wp

from warp_phys.core.arrays import alias, check_array, numpy_type, parameter_numbers, shape_message
from warp_phys.core.checks import check_instance
from warp_phys.core.gate import active_tape, paused
from warp_phys.engine import row_kernels
from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import (
    Adjoints,
    Controller,
    Retreat,
    Seeds,
    Trajectory,
    WarpController,
    all_gates,
    backward,
    check_gates,
    forward,
)
from warp_phys.errors import Diverged, check_choice, check_count
from warp_phys.flow import COMBINED, Combined, Flow, FlowLike, linear_parts, refuse_memory, refuse_whole, resolve
from warp_phys.programs.rules import RULES
from warp_phys.systems.base import Simulator, System
from warp_phys.systems.extended import extended, row_sizes

Backend = Literal["auto", "fused", "general"]
BACKENDS: tuple[str, ...] = get_args(Backend)


class Rollout:
    """x_{n+1} = S(x_n, N(x_n)) for n = 0 … steps − 1, with the flow of one's choice as its adjoint.

    Called inside a `wp.Tape`, the three phases of the backward pass become one entry of that tape: `tape.backward` adds
    the flow's update to the `.grad` of the controller's parameters, λ_0 to that of x0, and likewise for physical
    parameters made with `requires_grad=True`. Several backward passes add up, for M and R apart where the flow is
    combined, until `tape.zero()`.

    Args:
        system: A `System`, or anything with `step` and `step_vjp` (see `Simulator`).
        controller: A Warp controller, for instance `layers.Dense`.
        steps: Number of time steps T.
        flow: A name, a letter, a `Flow` or a `Combined` with one of the rules `agree`, `geometric`, `minmod`.
        on_divergence: "raise" checks the trajectory after the forward pass, and waits for the device to do so;
            "ignore" does not (inside a captured graph it must not).
        backend: "fused" (one kernel), "general" (step by step) or "auto": fused where it is possible, on a CPU.
        check: Whether a backward pass looks if weights, physical parameters and a simulator that is not the engine's
            are those of the forward pass: "auto" on a CPU, "always" on CUDA too, where it waits for the device. Inside
            a captured graph nothing can be looked at.
        memory: Numbers H that the controller remembers from step to step.
        inputs: Numbers E that are given to every step, those of a system that has inputs first. With memory or inputs
            the controller takes rows [x | h | w] of D + H + E numbers and returns [c | h'], K + H (of a system whose
            cost reads its own inputs [x | h | v | w], with the inputs v of the step before).

    Raises:
        TypeError, ValueError: Arguments that do not fit; see the message.
    """

    def __init__(
        self,
        system: Simulator,
        controller: WarpController,
        steps: int,
        flow: FlowLike = "combined",
        on_divergence: Literal["raise", "ignore"] = "raise",
        backend: Backend = "auto",
        check: Literal["auto", "always"] = "auto",
        memory: int = 0,
        inputs: int = 0,
    ):
        self._system, self._controller, self._steps = system, controller, check_count("steps", steps)
        self._sizes = check_count("memory", memory, least=0), check_count("inputs", inputs, least=0)
        own = getattr(system, "inputs", ())
        if inputs < len(own):
            raise ValueError(f"inputs must be at least {len(own)} for {system} ({', '.join(own)}), got {inputs}")
        self._rows = extended(system, *self._sizes)
        check_sizes(self._rows, controller)
        _check_controller(controller)
        self.on_divergence = check_choice("on_divergence", on_divergence, ("raise", "ignore"))
        self.check = check_choice("check", check, ("auto", "always"))
        first = controller.parameters[0]
        self.real, self.device = first.dtype, first.device
        self.backend = choose_backend(backend, self._rows, controller, wp.get_device(self.device).is_cuda)
        self._workspace = Workspace()
        self._gates_arrays: dict[tuple[int, ...], wp.array] = {}
        self._views: list[tuple[wp.array, np.ndarray]] = []
        self.flow = flow

    def __reduce__(self):  # arrays of Warp cannot be copied; those that are kept hold nothing that lasts
        made = self._system, self._controller, self._steps, self._flow, self.on_divergence, self.backend, self.check
        return type(self), (*made, *self._sizes)

    @property
    def system(self) -> Simulator:
        """The system; another one needs another rollout."""
        return self._system

    @property
    def controller(self) -> WarpController:
        """The controller; another one needs another rollout."""
        return self._controller

    @property
    def steps(self) -> int:
        """Number of time steps T; another number needs another rollout."""
        return self._steps

    @property
    def flow(self) -> Flow | Combined:
        """The flow; assign another between backward passes of one recorded tape.

        A captured graph follows changes from one plain flow to another, since it reads the gates from the device. It
        was captured for one flow or for two, so it does not follow a change between a plain and a combined flow.
        """
        return self._flow

    @flow.setter
    def flow(self, flow: FlowLike) -> None:
        flow = resolve(flow)
        refuse_memory(flow)
        refuse_whole("in pure Warp it must be elementwise", flow)
        if isinstance(flow, Combined) and flow.rule not in RULES:
            names = ", ".join(rule.__name__ for rule in RULES)
            raise ValueError(f"in pure Warp the rule of a combined flow must be one of {names}, got {flow.rule!r}")
        check_gates(linear_parts(flow), self.steps)
        self._flow = flow
        kind = self._kind
        for key, array in list(self._gates_arrays.items()):
            if key[:2] == kind:  # in place: a captured graph reads the numbers from here
                try:
                    array.assign(self._numbers_of_gates(key[2]))
                except ValueError:  # gates of single samples, for another batch
                    del self._gates_arrays[key]

    @property
    def _kind(self) -> tuple[int, bool]:
        """Number of flows that a backward pass runs, and whether samples may have gates of their own."""
        parts = linear_parts(self._flow)
        return len(parts), not all(part.is_plain for part in parts)

    def _numbers_of_gates(self, batch: int) -> np.ndarray:
        gates = all_gates(linear_parts(self._flow), self.steps, batch, self._rows)
        if self._kind[1]:  # each sample its own, so that arrays of one kind have one shape
            flows, steps, width = gates.shape
            size = 2 * row_sizes(self._rows)[0] + 2
            own = np.broadcast_to(gates.reshape(flows, steps, width // size, size), (flows, steps, batch, size))
            gates = own.reshape(flows, steps, batch * size)
        return gates.astype(numpy_type(self.real))

    def _gates(self, batch: int) -> wp.array:
        """Return the gates of the flow on the device, for so many samples."""
        flows, apart = self._kind
        key = flows, apart, batch if apart else 1
        if key not in self._gates_arrays:
            gates = self._numbers_of_gates(batch)
            self._gates_arrays[key] = wp.array(gates, dtype=self.real, device=self.device)
        return self._gates_arrays[key]

    def __call__(
        self,
        x0: wp.array,
        parameters: wp.array | None = None,
        inputs: wp.array | None = None,
        memory: wp.array | None = None,
    ) -> tuple[wp.array, ...]:
        """Return states (steps + 1, batch, D) and controls (steps, batch, K), recorded by an active tape.

        With a memory, also what is remembered, (steps + 1, batch, H).

        Args:
            x0: Initial states, shape (batch, D), of the controller's precision and on its device.
            parameters: From `System.parameter_array`; the system's own if None.
            inputs: What is given to every step, shape (steps, batch, E) or (steps, 1, E).
            memory: What the controller remembers at first, shape (batch, H); zeros if None.

        Raises:
            TypeError, ValueError: x0 does not fit; the flow is combined, and x0 the result of something on the tape.
            Diverged: A state is not finite.
        """
        x0 = check_x0(self.system, x0, self.real, self.device)
        self._check_beside(x0, inputs, memory)
        tape, starts = active_tape(), [x0, *(array for array in (inputs, memory) if array is not None)]
        has_history = tape is not None and any(array.requires_grad and _has_history(tape, array) for array in starts)
        if has_history and isinstance(self.flow, Combined):
            raise ValueError(_HISTORY)
        make = functools.partial(wp.empty, dtype=self.real, device=self.device, requires_grad=tape is not None)
        states = make((self.steps + 1, len(x0), self._rows.state_size))
        controls = make((self.steps, len(x0), self._rows.control_size))
        given = parameters
        if isinstance(self.system, System):
            parameters = self.system.check_parameters(parameters, x0, len(x0))
        with paused(tape):
            self._fill(states, x0, inputs, memory)
            keep = tape is not None and not isinstance(self.system, System)  # the inner states of a simulator
            kept = forward(self._rows, self.controller, states, controls, parameters, self.backend == "fused", keep)
        if self.on_divergence == "raise":
            finite = np.isfinite(states.numpy()).all(axis=2)
            if not finite.all():
                raise Diverged(int(np.argmin(finite.all(axis=1))), np.flatnonzero(~finite.all(axis=0)).tolist())
        if tape is not None:
            self._record(tape, (x0, inputs, memory), Trajectory(states, controls, parameters, kept), given, has_history)
        if self._rows is self._system:
            return states, controls
        size, end = self._rows.own_size, self._rows.remembering_size
        own = states[:, :, :size], controls[:, :, : self._rows.own_controls]
        return (*own, states[:, :, size:end]) if end > size else own

    def _check_beside(self, x0: wp.array, inputs: wp.array | None, memory: wp.array | None) -> None:
        """Raise a TypeError or ValueError if inputs or memory do not fit."""
        remembered, given = self._sizes
        if (inputs is None) != (given == 0):
            raise ValueError(
                f"this rollout has inputs of {given} numbers a step, got {'none' if inputs is None else 'some'}"
            )
        if inputs is not None:
            check_array("inputs", inputs, (self.steps, -1, given), x0)
            if inputs.shape[1] not in (1, len(x0)):
                raise ValueError(shape_message("inputs", (self.steps, f"1 or {len(x0)}", given), inputs.shape))
        if memory is not None:
            check_array("memory", memory, (len(x0), remembered), x0)

    def _fill(self, states: wp.array, x0: wp.array, inputs: wp.array | None, memory: wp.array | None) -> None:
        """Write what a trajectory starts from, and the inputs of all its steps."""
        if self._rows is self._system:
            wp.copy(states[0], x0)
            return
        size, end, written = self._rows.own_size, self._rows.remembering_size, self._rows.written_size
        states[0].zero_()
        states[self.steps].zero_()
        wp.copy(states[0, :, :size], x0)
        if memory is not None:
            wp.copy(states[0, :, size:end], memory)
        if inputs is not None:
            for b in range(len(x0)) if inputs.shape[1] == 1 else [slice(None)]:
                part = slice(b, b + 1) if isinstance(b, int) else b
                wp.copy(states[: self.steps, part, written:], inputs)
                if written > end:
                    wp.copy(states[0, part, end:written], inputs[0, :, : written - end])

    def _record(
        self, tape: wp.Tape, starts: tuple[wp.array | None, ...], trajectory: Trajectory, given: wp.array | None,
        has_history: bool,
    ) -> None:  # fmt: skip
        """Put the backward pass on the tape as one entry."""
        arrays = [trajectory.states, trajectory.controls, *(p for p in self.controller.parameters if p.requires_grad)]
        for start in starts:
            if start is not None and start.requires_grad:
                arrays.append(start)
                _STARTS.setdefault(tape, set()).add(start)
        numbers = _numbers(trajectory)
        if numbers is not None:
            arrays.append(numbers)
        # the sums of M and R hang on the tape as adjoints of carriers, so that tape.zero() zeroes them too; those of
        # the published combination always, since the flow may become that one later
        known = {COMBINED, self.flow} if isinstance(self.flow, Combined) else {COMBINED}
        arrays += [c for flow in known for p in self.controller.parameters for c in _sums(p, flow)]
        given = None if given is None else parameter_numbers(given)
        before = self._numbers_now(given)

        def backward() -> None:
            if has_history and isinstance(self.flow, Combined):
                raise RuntimeError(_HISTORY)
            self._check_numbers(before, self._numbers_now(given))
            self._run_backward(starts, trajectory, known)

        tape.record_func(backward, arrays)

    @property
    def _looks(self) -> bool:
        """Whether numbers can be looked at now."""
        device = wp.get_device(self.device)
        return not device.is_capturing and (device.is_cpu or self.check == "always")

    def _numbers_now(self, numbers: wp.array | None) -> list[bytes] | None:
        """Return all weights and given physical parameters as bytes, or None where they cannot be looked at."""
        if not self._looks:
            return None
        arrays = [*self.controller.parameters, *([] if numbers is None else [numbers])]
        if not wp.get_device(self.device).is_cpu:
            return [array.numpy().tobytes() for array in arrays]
        if [id(array) for array, _ in self._views] != [id(array) for array in arrays]:
            self._views = [(array, array.numpy()) for array in arrays]  # the arrays' own memory
        return [view.tobytes() for _, view in self._views]

    def _check_numbers(self, before: list[bytes] | None, now: list[bytes] | None) -> None:
        """Raise a RuntimeError if weights or physical parameters have changed."""
        if before is None or now is None or before == now:
            return
        i = [old == new for old, new in zip(before, now, strict=True)].index(False)
        what = f"parameter {i} of the controller" if i < len(self.controller.parameters) else "a physical parameter"
        raise RuntimeError(
            f"{what} has been modified since the forward pass: call the rollout again before the backward pass"
        )

    def _run_backward(self, starts: tuple[wp.array | None, ...], trajectory: Trajectory, known: set[Combined]) -> None:
        """Add this pass's updates to the adjoints of parameters, x0, inputs, memory and the physical parameters."""
        if isinstance(self.flow, Combined) and self.flow not in known:
            raise RuntimeError(f"the tape was recorded before the flow became {self.flow.name}: record it again")
        work, flows = self._workspace, len(linear_parts(self.flow))
        gradients = [self.controller.gradients(work, f"gradient of flow {f}, ") for f in range(flows)]
        seeds = Seeds(trajectory.states.grad, trajectory.controls.grad)
        numbers = _numbers(trajectory)
        # all gates count as open here: a graph that is captured now may be replayed with others
        gates_array = self._gates(trajectory.states.shape[1])
        gates = np.ones(gates_array.shape), gates_array
        x0, inputs, memory = starts
        adjoints = backward(
            self._rows,
            self.controller,
            trajectory,
            seeds,
            *gates,
            gradients,
            work,
            want_parameters=numbers is not None,
            want_inputs=inputs is not None and inputs.requires_grad,
            fused=self.backend == "fused",
            simulator=Retreat(self._rows, None, compare=self._looks),
        )
        for i, parameter in enumerate(self.controller.parameters):
            if parameter.requires_grad:
                sums = [c.grad for c in _sums(parameter, self.flow)] if isinstance(self.flow, Combined) else []
                self._accumulate([gradient[i] for gradient in gradients], sums, parameter.grad)
        own, end = row_sizes(self._rows)
        for start, part in ((x0, slice(0, own)), (memory, slice(own, end))):
            if start is not None and start.requires_grad:
                self._accumulate([adjoints.x0[f][:, part] for f in range(flows)], [], start.grad)
        if adjoints.inputs is not None and inputs is not None:
            self._accumulate_inputs(adjoints, inputs.grad)
        if numbers is not None and adjoints.parameters is not None:
            self._accumulate_parameters(adjoints.parameters, numbers.grad)
        trajectory.states.grad.zero_()
        trajectory.controls.grad.zero_()

    def _accumulate_parameters(self, per_sample: wp.array, grad: wp.array) -> None:
        """Add the adjoints (flows, batch, P) of the physical parameters to `grad`, (1, P) or (batch, P)."""
        flows, batch, size = per_sample.shape
        if len(grad) == 1:
            total = self._workspace.array("sum of adj_p", (flows, 1, size), self.real, self.device)
            total.zero_()
            kernel, inputs = (
                row_kernels.sum_over_time_kernel(self.real),
                [per_sample.reshape((flows, batch, 1, size)), total],
            )
            wp.launch(kernel, dim=total.shape, inputs=inputs, device=self.device, record_tape=False)
            per_sample = total
        self._accumulate([per_sample[f] for f in range(flows)], [], grad)

    def _accumulate_inputs(self, adjoints: Adjoints, grad: wp.array) -> None:
        """Add the adjoints of inputs (flows, steps, batch, E) to `grad`, (steps, batch, E) or (steps, 1, E)."""
        per_sample: Any = adjoints.inputs
        flows, steps, batch, size = per_sample.shape
        written, end = self._rows.written_size, self._rows.remembering_size
        if written > end:
            kernel = row_kernels.add_rows_kernel(self.real)
            for f in range(flows):
                rows = [adjoints.x0[f][:, end:written], per_sample[f, 0][:, : written - end]]
                wp.launch(kernel, dim=rows[0].shape, inputs=rows, device=self.device, record_tape=False)
        if grad.shape[1] != batch:
            total = self._workspace.array("sum of adj_inputs", (flows, steps, size), self.real, self.device)
            total.zero_()
            kernel, inputs = row_kernels.sum_over_time_kernel(self.real), [per_sample.transpose((0, 2, 1, 3)), total]
            wp.launch(kernel, dim=total.shape, inputs=inputs, device=self.device, record_tape=False)
            per_sample = total
        shape = steps * grad.shape[1], size
        self._accumulate([per_sample[f].reshape(shape) for f in range(flows)], [], grad.reshape(shape))

    def _accumulate(self, updates: list[wp.array], sums: list[wp.array], grad: wp.array) -> None:
        """Add one pass's update to `grad`; for a combined flow the change of the combination of the sums."""
        rows = [_as_rows(array) for array in [*updates, *sums, grad]]
        if len(updates) == 1:
            kernel = row_kernels.add_rows_kernel(self.real)
        else:
            zeros = self._workspace.array("no sums", rows[0].shape, self.real, self.device)
            rows = rows if sums else [*rows[:2], zeros, zeros, rows[-1]]
            assert isinstance(self.flow, Combined)
            kernel = row_kernels.combine_kernel(self.flow.rule, self.real, bool(sums))
        wp.launch(kernel, dim=rows[0].shape, inputs=rows, device=self.device, record_tape=False)


_STARTS: Any = weakref.WeakKeyDictionary()
"""The initial states of rollouts, by the tape that recorded them."""

_HISTORY = (
    "x0 must not be the result of something on the tape where the flow is combined: its adjoint would be combined "
    "before the updates that it leads to are. Unroll the whole horizon in one rollout, start from a copy of x0 made "
    "outside the tape, or run the tape with each of the linear flows and combine the sums by the flow's rule"
)


def _has_history(tape: wp.Tape, x0: wp.array) -> bool:
    """Whether a tape has recorded how x0 came about, as far as it can tell what is written and what only read."""
    outputs = [array for launch in tape.launches if not callable(launch) for array in launch[4]]
    known = _STARTS.get(tape, ())
    recorded = [array for array in tape.gradients if array not in known]
    return any(isinstance(array, wp.array) and _overlap(array, x0) for array in (*outputs, *recorded))


def _overlap(a: wp.array, b: wp.array) -> bool:
    """Whether two arrays may share memory."""
    (first, last), (start, stop) = map(_extent, (a, b))
    return a.device == b.device and first < stop and start < last


def _extent(array: wp.array) -> tuple[int, int]:
    """Return the addresses between which the numbers of an array lie."""
    if array.ptr is None or array.size == 0:
        return 0, 0
    reach = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    return array.ptr + min(0, reach), array.ptr + max(0, reach) + wp.types.type_size_in_bytes(array.dtype)


_SUMS: Any = weakref.WeakKeyDictionary()


def _sums(parameter: wp.array, flow: Combined) -> tuple[wp.array, wp.array]:
    """Return two arrays whose adjoints are the sums of the base and of the other flow for a parameter so far.

    They belong to the parameter, as its adjoint does: all rollouts of a controller, on any tape, add to the same sums.
    """
    by_flow = _SUMS.setdefault(parameter, {})
    if flow not in by_flow:
        make = {"dtype": parameter.dtype, "device": parameter.device, "requires_grad": True}
        by_flow[flow] = wp.zeros(parameter.shape, **make), wp.zeros(parameter.shape, **make)
    return by_flow[flow]


def _numbers(trajectory: Trajectory) -> wp.array | None:
    """Return the physical parameters as numbers if they have an adjoint, else None."""
    if trajectory.parameters is None:
        return None
    numbers = parameter_numbers(trajectory.parameters)
    return None if numbers is None or numbers.grad is None else numbers


def _as_rows(array: wp.array) -> wp.array:
    """Return an array of one or two dimensions as one of two, without a copy."""
    if array.ndim == 2:
        return array
    return alias(array, array.dtype, (1, len(array)), (array.strides[0] * len(array), array.strides[0]))


def check_sizes(system: Any, controller: Any) -> None:
    """Raise a ValueError or TypeError if a system and a controller do not fit together."""
    for name, value in (("system", system), ("controller", controller)):
        check_instance(name, value)
    for verb in ("step", "step_vjp", "state_size", "control_size"):
        if not hasattr(system, verb):
            raise TypeError(
                f"system must have {verb} (see warp_phys.systems.Simulator), {type(system).__name__} has not"
            )
    for size in ("state_size", "control_size"):
        if getattr(controller, size, getattr(system, size)) != getattr(system, size):
            got = getattr(controller, size)
            raise ValueError(f"controller has {size} {got}, {system} needs {getattr(system, size)}")


def _check_controller(controller: Any) -> None:
    """Raise a TypeError if this is no Warp controller."""
    lacking = [verb for verb in ("evaluator", "linearise", "fits", "gradients") if not hasattr(controller, verb)]
    if lacking:
        raise TypeError(
            f"controller must have {lacking[0]} (see warp_phys.engine.phases.WarpController), "
            f"{type(controller).__name__} has not; for a torch.nn.Module use warp_phys.interop.torch.Rollout"
        )


def choose_backend(backend: Backend, system: Any, controller: Controller, cuda: bool) -> Literal["fused", "general"]:
    """Return "fused" or "general".

    Raises:
        ValueError: The name is unknown, or the fused kernel cannot express this controller with this system.
    """
    check_choice("backend", backend, BACKENDS)
    fits = controller.fits(system)
    if backend == "fused" and not fits:
        reason = getattr(controller, "why_general", None)
        raise ValueError(
            "backend 'fused' needs a System and a controller of layers that the engine has, or that is a row program"
            + (f"; this one is neither: {reason}" if reason else "")
            + "; use 'general' or 'auto'"
        )
    if backend == "auto":
        return "fused" if fits and not cuda else "general"
    return backend


def check_x0(system: Any, x0: Any, real: type, device: Any) -> wp.array:
    """Return x0 if it is a Warp array of rows that fits, else raise a TypeError or ValueError that says why not."""
    columns = ", ".join(getattr(system, "states", ()))
    x0 = check_array("x0", x0, (-1, system.state_size), columns=columns)
    if len(x0) == 0:
        raise ValueError(shape_message("x0", (-1, system.state_size), x0.shape, columns))
    if x0.dtype is not real:
        raise TypeError(f"x0 must hold {real.__name__} as the controller does, got {x0.dtype.__name__}")
    if x0.device != device:
        raise ValueError(f"x0 must be on device {device} as the controller is, got {x0.device}")
    return x0
