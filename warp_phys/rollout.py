"""Rollouts in pure Warp: a controller and a system unrolled, as one entry of a caller's tape."""

import functools
import weakref
from typing import Any

import numpy as np
import warp as wp

from warp_phys import row_kernels
from warp_phys.adjoint import active_tape, paused
from warp_phys.arrays import alias, check_array, numpy_type, parameter_numbers, shape_message
from warp_phys.checks import check_instance
from warp_phys.errors import Diverged, check_choice, check_count
from warp_phys.flow import COMBINED, Combined, Flow, agree, linear_parts, refuse_memory, resolve
from warp_phys.layers import Workspace
from warp_phys.phases import Controller, Seeds, Trajectory, WarpController, backward, flow_gates, forward
from warp_phys.systems.base import Simulator, System

BACKENDS = ("auto", "fused", "general")


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
        flow: A name, a letter, a `Flow` or a `Combined` with the rule `agree`.
        on_divergence: "raise" checks the trajectory after the forward pass, and waits for the device to do so;
            "ignore" does not (inside a captured graph it must not).
        backend: "fused" (one kernel), "general" (step by step) or "auto": fused where it is possible, on a CPU.

    Raises:
        TypeError, ValueError: Arguments that do not fit; see the message.
    """

    def __init__(
        self,
        system: Simulator,
        controller: WarpController,
        steps: int,
        flow: str | Flow | Combined = "combined",
        on_divergence: str = "raise",
        backend: str = "auto",
    ):
        self._system, self._controller, self._steps = system, controller, check_count("steps", steps)
        check_sizes(system, controller)
        _check_controller(controller)
        self.on_divergence = check_choice("on_divergence", on_divergence, ("raise", "ignore"))
        first = controller.parameters[0]
        self.real, self.device = first.dtype, first.device
        self.backend = choose_backend(backend, system, controller, wp.get_device(self.device).is_cuda)
        self._workspace = Workspace()
        self._gates_arrays: dict[int, wp.array] = {}
        self.flow = flow

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
    def flow(self, flow: str | Flow | Combined) -> None:
        flow = resolve(flow)
        refuse_memory(flow)
        if isinstance(flow, Combined) and flow.rule is not agree:
            raise ValueError(f"in pure Warp the rule of a combined flow must be agree, got {flow.rule!r}")
        self._flow = flow
        gates = flow_gates(linear_parts(flow), self.steps).astype(numpy_type(self.real))
        if len(gates) in self._gates_arrays:  # in place: a captured graph reads the numbers from here
            self._gates_arrays[len(gates)].assign(gates)
        else:
            self._gates_arrays[len(gates)] = wp.array(gates, dtype=self.real, device=self.device)

    def __call__(self, x0: wp.array, parameters: wp.array | None = None) -> tuple[wp.array, wp.array]:
        """Return states (steps + 1, batch, D) and controls (steps, batch, K), recorded by an active tape.

        Args:
            x0: Initial states, shape (batch, D), of the controller's precision and on its device.
            parameters: From `System.parameter_array`; the system's own if None.

        Raises:
            TypeError, ValueError: x0 does not fit.
            Diverged: A state is not finite.
        """
        x0 = check_x0(self.system, x0, self.real, self.device)
        tape = active_tape()
        make = functools.partial(wp.empty, dtype=self.real, device=self.device, requires_grad=tape is not None)
        states = make((self.steps + 1, len(x0), self.system.state_size))
        controls = make((self.steps, len(x0), self.system.control_size))
        if isinstance(self.system, System):
            parameters = self.system.check_parameters(parameters, x0, len(x0))
        with paused(tape):
            wp.copy(states[0], x0)
            forward(self.system, self.controller, states, controls, parameters, self.backend == "fused")
        if self.on_divergence == "raise":
            finite = np.isfinite(states.numpy()).all(axis=2)
            if not finite.all():
                raise Diverged(int(np.argmin(finite.all(axis=1))), np.flatnonzero(~finite.all(axis=0)).tolist())
        if tape is not None:
            self._record(tape, x0, Trajectory(states, controls, parameters))
        return states, controls

    def _record(self, tape: wp.Tape, x0: wp.array, trajectory: Trajectory) -> None:
        """Put the backward pass on the tape as one entry."""
        arrays = [trajectory.states, trajectory.controls, *(p for p in self.controller.parameters if p.requires_grad)]
        if x0.requires_grad:
            arrays.append(x0)
        numbers = _numbers(trajectory)
        if numbers is not None:
            arrays.append(numbers)
        # the sums of M and R hang on the tape as adjoints of carriers, so that tape.zero() zeroes them too; those of
        # the published combination always, since the flow may become that one later
        known = {COMBINED, self.flow} if isinstance(self.flow, Combined) else {COMBINED}
        arrays += [c for flow in known for p in self.controller.parameters for c in _sums(p, flow)]
        tape.record_func(lambda: self._run_backward(x0, trajectory, known), arrays)

    def _run_backward(self, x0: wp.array, trajectory: Trajectory, known: set[Combined]) -> None:
        """Add this pass's updates to the adjoints of parameters, of x0 and of the physical parameters."""
        if isinstance(self.flow, Combined) and self.flow not in known:
            raise RuntimeError(f"the tape was recorded before the flow became {self.flow.name}: record it again")
        work, flows = self._workspace, len(linear_parts(self.flow))
        gradients = [self.controller.gradients(work, f"gradient of flow {f}, ") for f in range(flows)]
        seeds = Seeds(trajectory.states.grad, trajectory.controls.grad)
        numbers = _numbers(trajectory)
        # all gates count as open here: a graph that is captured now may be replayed with others
        gates = np.ones((flows, self.steps, 2)), self._gates_arrays[flows]
        adjoints = backward(
            self.system,
            self.controller,
            trajectory,
            seeds,
            *gates,
            gradients,
            work,
            want_parameters=numbers is not None,
            fused=self.backend == "fused",
        )
        for i, parameter in enumerate(self.controller.parameters):
            if parameter.requires_grad:
                sums = [c.grad for c in _sums(parameter, self.flow)] if isinstance(self.flow, Combined) else []
                self._accumulate([gradient[i] for gradient in gradients], sums, parameter.grad)
        if x0.requires_grad:
            self._accumulate([adjoints.x0[f] for f in range(flows)], [], x0.grad)
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

    def _accumulate(self, updates: list[wp.array], sums: list[wp.array], grad: wp.array) -> None:
        """Add one pass's update to `grad`; for a combined flow the change of the combination of the sums."""
        rows = [_as_rows(array) for array in [*updates, *sums, grad]]
        if len(updates) == 1:
            kernel = row_kernels.add_rows_kernel(self.real)
        else:
            zeros = self._workspace.array("no sums", rows[0].shape, self.real, self.device)
            rows = rows if sums else [*rows[:2], zeros, zeros, rows[-1]]
            kernel = row_kernels.combine_kernel(self.real, bool(sums))
        wp.launch(kernel, dim=rows[0].shape, inputs=rows, device=self.device, record_tape=False)


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
            f"controller must have {lacking[0]} (see warp_phys.phases.WarpController), {type(controller).__name__} has "
            "not; for a torch.nn.Module use warp_phys.interop.torch.Rollout"
        )


def choose_backend(backend: str, system: Any, controller: Controller, cuda: bool) -> str:
    """Return "fused" or "general".

    Raises:
        ValueError: The name is unknown, or the fused kernel cannot express this controller with this system.
    """
    check_choice("backend", backend, BACKENDS)
    fits = controller.fits(system)
    if backend == "fused" and not fits:
        raise ValueError(
            "backend 'fused' needs a System and a controller of layers that the engine has; use 'general' or 'auto'"
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
