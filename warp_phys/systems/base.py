"""What a system is: a frozen dataclass of parameters plus Warp functions, and what the engine makes of them."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import as_structs, check_array, for_all_streams, numpy_type, parameter_rows, real_type
from warp_phys.core.checks import check_device, check_flag, plain_number, range_of, within
from warp_phys.core.rows import row_functions
from warp_phys.errors import shown
from warp_phys.systems import losses
from warp_phys.systems.drawing import Picture, sketch
from warp_phys.systems.losses import When
from warp_phys.systems.structure import structure_of

Parameters = Mapping[str, Any]

MOST_PARTS = 1024
"""Most poles, agents or grid points of a system: a kernel holds them all in the memory of one thread, several times."""


class Simulator(Protocol):
    """What a rollout needs of a system: sizes, a step and its vector-Jacobian product, on rows of Warp arrays.

    A rollout passes `parameters` only where it has some: a simulator without physical parameters may leave them out.

    A simulator without physical parameters may offer more. If `takes_flows` is true, `step_vjp` is given the adjoints
    of all flows at once, with an axis of flows before the others. If `inner_states` is a number above zero, a rollout
    gives `step` an array `inner` (inner states, batch, D) to be filled with states within the step, and hands it to
    `step_vjp` again.
    """

    @property
    def state_size(self) -> int:
        """Number D of state components."""

    @property
    def control_size(self) -> int:
        """Number K of control components."""

    def step(self, x: wp.array, c: wp.array, y: wp.array, parameters: wp.array | None = None) -> None:
        """Write y = S(x, c); x and y (batch, D), c (batch, K)."""

    def step_vjp(
        self,
        x: wp.array,
        c: wp.array,
        adj_y: wp.array,
        adj_x: wp.array,
        adj_c: wp.array,
        parameters: wp.array | None = None,
        adj_parameters: wp.array | None = None,
    ) -> None:
        """Write adj_x = (∂S/∂x)ᵀ adj_y and adj_c = (∂S/∂c)ᵀ adj_y."""


class SystemTypes(NamedTuple):
    """Types of a system's Warp functions in one precision."""

    real: type
    """Scalar type, wp.float32 or wp.float64."""
    State: Any
    """Vector of the D state components."""
    Control: Any
    """Vector of the K control components."""
    Parameters: Any
    """Struct of the physical parameters."""
    state_size: int
    control_size: int
    Input: Any = None
    """Vector of the E inputs, where the system has some."""


class SystemFunctions(NamedTuple):
    """A system's Warp functions in one precision."""

    step: Any
    """`step(x: State, c: Control, p: Parameters) -> State`; `step(x, c, w: Input, p)` where the system has inputs."""
    cost: Any
    """`cost(x: State, p: Parameters) -> real`, the pointwise cost of one sample at one time; or `cost(x, w, p)`, with
    the inputs of the step that has led to x."""
    lanes: str = ""
    """If given, C++ that stands for the step on a CPU, see `native_physics.lanes_of`."""


@functools.cache
def _parameter_struct(name: str, names: tuple[str, ...], real: type) -> Any:
    return wp.struct(type(f"{name}Parameters", (), {"__annotations__": dict.fromkeys(names, real)}))


@functools.cache
def _types(structure: "System", real: type) -> SystemTypes:
    State = row_functions(structure.state_size, real).vector
    Control = row_functions(structure.control_size, real).vector
    struct = _parameter_struct(type(structure).__name__, structure.parameter_names, real)
    Input = row_functions(structure.input_size, real).vector if structure.inputs else None
    return SystemTypes(real, State, Control, struct, structure.state_size, structure.control_size, Input)


@dataclass(frozen=True)
class System(ABC):
    """A physical system x_{n+1} = S(x_n, c_n; p), batched over rows, differentiable in x, c and p.

    A subclass is a frozen dataclass. Fields annotated `float` are physical parameters, one at least: they may differ
    from sample to sample and have gradients. All other fields shape the kernels. It names its components in `states`
    and `controls`, and gives `functions`, `sample` and, to be drawn, `picture`.
    """

    inputs: ClassVar[tuple[str, ...]] = ()
    """Names, with units, of what is given to every step from outside: then the Warp functions are
    `step(x, c, w, p)` and `cost(x, p)`, or `cost(x, w, p)` with the inputs of the step that has led to x."""

    positive: ClassVar[tuple[str, ...]] = ()
    """Physical parameters that must be positive, as dt must be."""

    not_negative: ClassVar[tuple[str, ...]] = ()
    """Physical parameters that must not be negative."""

    time_average: ClassVar[bool] = True
    """Whether the loss averages the pointwise cost over the chosen times (else it sums over them)."""

    @property
    @abstractmethod
    def states(self) -> tuple[str, ...]:
        """Names of the state components with their units."""

    @property
    @abstractmethod
    def controls(self) -> tuple[str, ...]:
        """Names of the control components with their units."""

    @abstractmethod
    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions in one precision; asked of `structure` only: no physical parameters."""

    @abstractmethod
    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return random initial states, shape (batch, D); the same seed gives the same states in either precision."""

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return what a state, shape (D,), looks like, with the control that acts on it, shape (K,).

        Optional: only what draws asks for it. Every front end draws the same shapes.

        Raises:
            NotImplementedError: The system has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be drawn: give it a method picture(state, control=None) that returns "
            "shapes, as in docs/extending.md"
        )

    def sketch(self, axes: Any) -> Callable[..., Sequence[Any]]:
        """Return a function (state, control=None) that draws on matplotlib `axes` and returns the artists.

        Raises:
            NotImplementedError: The system has no `picture`.
        """
        if type(self).picture is System.picture:
            self.picture(np.zeros(self.state_size))
        return sketch(axes, self.picture)

    @property
    def state_size(self) -> int:
        """Number D of state components."""
        return self._sizes[0]

    @property
    def control_size(self) -> int:
        """Number K of control components."""
        return self._sizes[1]

    @functools.cached_property
    def _sizes(self) -> tuple[int, int]:
        return len(self.states), len(self.controls)

    @property
    def input_size(self) -> int:
        """Number of the system's own inputs."""
        return len(self.inputs)

    @property
    def cost_reads_inputs(self) -> bool:
        """Whether the pointwise cost takes inputs."""
        return bool(self.inputs) and len(self.structure.functions(wp.float32).cost.input_types) == 3

    # What of a row is what: all of it is the state, unless it is that of an `Extended` system.

    @property
    def own_size(self) -> int:
        """Numbers of the state in a row."""
        return self.state_size

    @property
    def own_controls(self) -> int:
        """Numbers of what the controller returns that are controls."""
        return self.control_size

    @property
    def stands_twice(self) -> bool:
        """Whether a row holds the state twice, see `warp_phys.systems.hybrid`."""
        return False

    @property
    def remembering_size(self) -> int:
        """Numbers of a row up to the end of a controller's memory."""
        return self.state_size

    @property
    def written_size(self) -> int:
        """Numbers of a row that a step writes; what stands behind them is given."""
        return self.state_size

    @functools.cached_property
    def _columns(self) -> tuple[str, str]:
        """What the columns of states and controls mean, for messages."""
        return ", ".join(self.states), ", ".join(self.controls)

    @functools.cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the physical parameters, in the order of the parameter struct."""
        names = tuple(field.name for field in fields(self) if field.type in (float, "float"))
        if not names:
            raise TypeError(
                f"{type(self).__name__} needs a physical parameter, a field annotated float: dt, for instance"
            )
        return names

    @functools.cached_property
    def structure(self) -> "System":
        """This system without its physical parameters: what kernels are made from, and their cache key."""
        return structure_of(self)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the fields alone: what is derived from them is found again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def range_of(self, name: str) -> str:
        """Return what a physical parameter must be: "finite", "positive" or "not negative" too."""
        if name == "dt" or name in self.positive:
            return "positive"
        return "not negative" if name in self.not_negative else "finite"

    def check_numbers(self) -> None:
        """Raise a TypeError or ValueError if a physical parameter is not a finite number, or not in its range."""
        for name in self.parameter_names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise TypeError(
                    f"{name} must be a number, got {shown(value)}; numbers per sample go to a rollout or an array"
                )
            number, wanted = plain_number(value), self.range_of(name)
            if number is None or not (math.isfinite(number) and within(wanted, number)):
                raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
            object.__setattr__(self, name, number)

    def types(self, real: type) -> SystemTypes:
        """Return the types of the Warp functions in one precision."""
        return _types(self.structure, real)

    def parameter_array(
        self, values: Parameters | None = None, device: Any = None, dtype: Any = np.float32, requires_grad: bool = False
    ) -> wp.array:
        """Return physical parameters for `step` and its kin: a struct array of length 1 or batch.

        Args:
            values: A number, or one number per sample, for some of the parameters; the system's own for the others.
                Zeros for all make an array to write adjoints to.
            device: Warp device.
            dtype: float32 or float64.
            requires_grad: Whether a tape shall find their adjoints.

        Raises:
            TypeError, ValueError: Something else than numbers, an unknown name, lengths that differ, numbers that are
                not finite or not in their range; zeros for all are.

        >>> from warp_phys import CartPole
        >>> CartPole().parameter_array({"pole_mass": [0.1, 0.2]}, device="cpu").shape
        (2,)
        """
        real, place = real_type(dtype), check_device(device)
        check_flag("requires_grad", requires_grad)
        names, values = self.parameter_names, {} if values is None else values
        given = parameter_rows(names, [getattr(self, name) for name in names], values)
        with np.errstate(over="ignore"):
            rows = given.astype(numpy_type(real))
        for name, column in zip(names, rows.T, strict=True):
            if not np.isfinite(column).all() or (rows.any() and not within(range_of(self, name), column).all()):
                raise ValueError(f"parameter {name} must be {range_of(self, name)}, got {shown(values.get(name))}")
        return as_structs(
            wp.array(rows, dtype=real, device=place, requires_grad=requires_grad), self.types(real).Parameters
        )

    def step(self, x: wp.array, c: wp.array, y: wp.array, parameters: wp.array | None = None) -> None:
        """Write y = S(x, c), one time step of every row.

        Runs on the arrays' device and its current stream, is recorded by an active `wp.Tape`, and changes no setting of
        the process. Its first call loads a kernel and places the system's own parameters on the device; from then on
        it allocates nothing, does not wait, and can be captured in a graph; keep the system as long as a graph of it.

        Args:
            x: States, shape (batch, D), float32 or float64, any strides.
            c: Controls, shape (batch, K).
            y: Next states, shape (batch, D), written; not the memory of x if a tape records.
            parameters: From `parameter_array`, length 1 or batch; the system's own if None.

        Raises:
            TypeError, ValueError: An array of another type, precision, shape or device.
        """
        x, c, y, p = self._check_step(x, c, y, "y", parameters)
        kernel = kernels.step_kernel(self.structure, x.dtype)
        wp.launch(kernel, dim=len(x), inputs=[x, c, p], outputs=[y], device=x.device)

    def step_vjp(
        self,
        x: wp.array,
        c: wp.array,
        adj_y: wp.array,
        adj_x: wp.array,
        adj_c: wp.array,
        parameters: wp.array | None = None,
        adj_parameters: wp.array | None = None,
    ) -> None:
        """Write adj_x = (∂S/∂x)ᵀ adj_y and adj_c = (∂S/∂c)ᵀ adj_y, and likewise for the physical parameters if asked.

        What `step` says of itself holds here, but for the tape: no tape records it.

        Args:
            x: States at which the step is linearised, shape (batch, D).
            c: Controls at which the step is linearised, shape (batch, K).
            adj_y: Adjoint of the next states, shape (batch, D).
            adj_x: Written, shape (batch, D).
            adj_c: Written, shape (batch, K).
            parameters: As in `step`.
            adj_parameters: Written if given: an array (batch,) of the parameter struct, one adjoint per sample.

        Raises:
            TypeError, ValueError: An array of another type, precision, shape or device.
        """
        x, c, adj_y, p = self._check_step(x, c, adj_y, "adj_y", parameters)
        check_array("adj_x", adj_x, x.shape, x)
        check_array("adj_c", adj_c, c.shape, x)
        adj_p = self._no_structs(x) if adj_parameters is None else adj_parameters
        if adj_parameters is not None:
            self.check_parameters(adj_parameters, x, len(x), "adj_parameters")
            if len(adj_parameters) != len(x):
                raise ValueError(
                    f"adj_parameters must have shape ({len(x)},), one adjoint per sample, got {adj_p.shape}"
                )
        kernel = kernels.step_vjp_kernel(self.structure, x.dtype)
        inputs, outputs = [x, c, p, adj_y], [adj_x, adj_c, adj_p]
        wp.launch(kernel, dim=len(x), inputs=inputs, outputs=outputs, device=x.device, record_tape=False)

    def trajectory(self, states: wp.array, controls: wp.array, parameters: wp.array | None = None) -> None:
        """Write states[1:] from states[0] and given controls, in one launch.

        Args:
            states: Shape (steps + 1, batch, D); row 0 is read.
            controls: Shape (steps, batch, K).
            parameters: As in `step`.
        """
        self._refuse_inputs()
        check_array("states", states, (-1, -1, self.state_size), columns=self._columns[0])
        expected = (states.shape[0] - 1, states.shape[1], self.control_size)
        check_array("controls", controls, expected, states, self._columns[1])
        p = self.check_parameters(parameters, states, states.shape[1])
        kernel = kernels.trajectory_kernel(self.structure, states.dtype)
        inputs = [controls, p, states]
        wp.launch(kernel, dim=states.shape[1], inputs=inputs, device=states.device, record_tape=False)

    def loss(
        self,
        states: Any,
        controls: Any = None,
        when: When = "final",
        control_cost: float = 0.0,
        parameters: Parameters | None = None,
        inputs: Any = None,
    ) -> Any:
        """Return the loss of a trajectory: the pointwise cost over samples and the chosen times, plus a control cost.

        Args:
            states: Shape (steps + 1, batch, D): torch (the result is attached to autograd), Warp (recorded by an active
                tape), numpy or any DLPack array.
            controls: Shape (steps, batch, K); needed only with a control cost.
            when: "final" (the last state), "every" (states 1 … steps), or the chosen steps themselves.
            control_cost: Factor of the mean squared control.
            parameters: Physical parameters as for `parameter_array`, where the cost depends on them.
            inputs: Where the cost reads inputs, those of the steps, shape (steps, E), (steps, 1, E) or (steps, batch,
                E): the cost of state n reads those of step n − 1, which has led to it.

        Returns:
            A scalar: torch tensor, Warp array of one element, or numpy number.

        Raises:
            ValueError, TypeError: Wrong shapes, times that are not there, a control cost without controls.
        """
        given = {} if parameters is None else parameters
        return losses.loss(self, states, controls, when, control_cost, given, inputs)

    def draw(self, axes: Any, state: np.ndarray, control: np.ndarray | None = None) -> Sequence[Any]:
        """Draw one state, shape (D,), on matplotlib `axes`; return the artists."""
        return self.sketch(axes)(state, control)

    def with_parameters(self, values: Mapping[str, float]) -> "System":
        """Return this system with other numbers."""
        return replace(self, **values)

    def check_parameters(
        self, parameters: wp.array | None, like: wp.array, batch: int, name: str = "parameters"
    ) -> wp.array:
        """Return `parameters`, or the system's own on the device and in the precision of `like`."""
        if parameters is None:
            return self.own_parameters(like.dtype, str(like.device))
        struct = self.types(like.dtype).Parameters
        if not isinstance(parameters, wp.array) or parameters.dtype is not struct:
            raise TypeError(f"{name} must come from {type(self).__name__}.parameter_array(dtype={like.dtype.__name__})")
        if len(parameters) not in (1, batch):
            raise ValueError(f"{name} must have length 1 or {batch} (the batch), got {len(parameters)}")
        if parameters.device != like.device:
            raise ValueError(f"{name} must be on device {like.device}, got {parameters.device}")
        return parameters

    def own_parameters(self, real: type, device: str) -> wp.array:
        """Return the system's own parameters on a device, shape (1,); made once, so that a step allocates nothing."""
        numbers = tuple(getattr(self, name) for name in self.parameter_names)
        known = self._parameter_arrays.get((real, device))
        if known is None or known[0] != numbers:
            known = numbers, for_all_streams(self.parameter_array(device=device, dtype=real))
            self._parameter_arrays[real, device] = known
        return known[1]

    @functools.cached_property
    def _parameter_arrays(self) -> dict[tuple[type, str], tuple[tuple[float, ...], wp.array]]:
        return {}

    def _check_step(self, x, c, y, y_name, parameters):
        self._refuse_inputs()
        check_array("x", x, (-1, self.state_size), columns=self._columns[0])
        check_array("c", c, (len(x), self.control_size), x, self._columns[1])
        check_array(y_name, y, x.shape, x)
        return x, c, y, self.check_parameters(parameters, x, len(x))

    def _refuse_inputs(self) -> None:
        if self.inputs:
            raise TypeError(
                f"{type(self).__name__} has inputs ({', '.join(self.inputs)}): unroll it by a Rollout, "
                "rollout(x0, inputs=w), or step rows [state, inputs] of warp_phys.systems.Extended"
            )

    def _no_structs(self, like: wp.array) -> wp.array:
        return _empty_structs(self.types(like.dtype).Parameters, str(like.device))


@functools.cache
def _empty_structs(struct: Any, device: str) -> wp.array:
    """Return the array of length 0 that tells a kernel not to write parameter adjoints."""
    return wp.empty(0, dtype=struct, device=device)
