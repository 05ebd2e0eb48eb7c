"""Systems whose row holds more than their state: a controller's memory, and inputs that are given for every step.

A rollout with memory or inputs is one of an `Extended` system: what the controller sees is its row

    z = [x | h | v | w]

with the state x, the memory h, the inputs w of this time step, and, where the system's own cost reads inputs, those of
the step before, v. The controller returns u = [c | h'], and a step makes [x' | h' | v'] of both, with x' = S(x, c, w),
v' = w. The inputs of all steps are written into the rows before the first.
"""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.rows import part_function, row_functions
from warp_phys.systems import losses
from warp_phys.systems.base import Simulator, System, SystemFunctions, SystemTypes
from warp_phys.systems.drawing import Picture


class Around(System):
    """A system around another one, `within`, whose physical parameters it has."""

    @property
    @abstractmethod
    def within(self) -> System:
        """The system within."""

    @property
    def time_average(self) -> bool:  # type: ignore[override]
        """As the system within."""
        return self.within.time_average

    @functools.cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the physical parameters."""
        return self.within.parameter_names

    def __getattr__(self, name: str) -> Any:
        """Return a physical parameter of the system within."""
        if name.startswith("_") or name == "within" or name not in self.within.parameter_names:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.within, name)

    def range_of(self, name: str) -> str:
        """Return what a physical parameter must be, as the system within says."""
        return self.within.range_of(name)

    def parameter_array(self, *arguments: Any, **options: Any) -> wp.array:
        """Return physical parameters, those of the system within."""
        return self.within.parameter_array(*arguments, **options)

    def check_parameters(self, *arguments: Any, **options: Any) -> wp.array:
        """Return physical parameters that fit, those of the system within."""
        return self.within.check_parameters(*arguments, **options)


@dataclass(frozen=True)
class Extended(Around):
    """A system whose row holds a memory of `memory` numbers and `inputs` numbers that are given.

    Physical parameters, loss and pictures are those of the system within.
    """

    wrapped: System
    """The system within."""
    memory: int = 0
    """Numbers H that the controller remembers."""
    inputs_given: int = 0
    """Numbers E of the inputs of a step; the first of them are the system's own, if it has some."""

    @property
    def within(self) -> System:
        """The system within."""
        return self.wrapped

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the numbers of a row."""
        memory = (f"memory {i}" for i in range(self.memory))
        before = (f"{name} before" for name in self.wrapped.inputs[: self.carried_size])
        others = (f"input {i}" for i in range(len(self.wrapped.inputs), self.inputs_given))
        own = self.wrapped.inputs[: self.inputs_given]
        return (*self.wrapped.states, *memory, *before, *own, *others)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of what the controller returns."""
        return (*self.wrapped.controls, *(f"next memory {i}" for i in range(self.memory)))

    @functools.cached_property
    def structure(self) -> System:
        """This system without its physical parameters."""
        return Extended(self.wrapped.structure, self.memory, self.inputs_given)

    @property
    def own_size(self) -> int:
        """Numbers of the system's own state."""
        return self.wrapped.state_size

    @property
    def own_controls(self) -> int:
        """Numbers of the system's own controls."""
        return self.wrapped.own_controls

    @property
    def stands_twice(self) -> bool:
        """As the system within."""
        return self.wrapped.stands_twice

    @property
    def remembering_size(self) -> int:
        """Numbers of a row up to the end of the memory."""
        return self.own_size + self.memory

    @property
    def carried_size(self) -> int:
        """Numbers of a row that are the inputs of the step before."""
        return self.wrapped.input_size if self.wrapped.cost_reads_inputs else 0

    @property
    def written_size(self) -> int:
        """Numbers of a row that a step writes."""
        return self.remembering_size + self.carried_size

    def types(self, real: type) -> SystemTypes:
        """Return the types of the Warp functions."""
        row, given = (row_functions(size, real).vector for size in (self.state_size, self.control_size))
        return SystemTypes(real, row, given, self.wrapped.types(real).Parameters, self.state_size, self.control_size)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions."""
        return _functions(self.structure, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return initial rows: states of the system within, normal numbers beside them."""
        own = self.wrapped.sample(batch, seed, dtype)
        size = self.state_size - self.own_size
        more = np.random.default_rng(seed).standard_normal((len(own), size)).astype(numpy_type(real_type(dtype)))
        return np.concatenate([own, more], axis=1)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return what the system within looks like."""
        return self.wrapped.picture(state[: self.own_size], control)


@functools.cache
def _functions(structure: Any, real: type) -> SystemFunctions:
    base, own = structure.wrapped, structure.wrapped.functions(real)
    types, inner = structure.types(real), base.types(real)
    Row, Given, Parameters = types.State, types.Control, types.Parameters
    State, Control, Input = inner.State, inner.Control, row_functions(max(1, base.input_size), real).vector
    size, controls, memory = base.state_size, base.control_size, structure.memory
    carried, first_carried, first_input = structure.carried_size, structure.remembering_size, structure.written_size
    step, cost = own.step, own.cost

    state_of, control_of = part_function(Row, State, 0, size), part_function(Given, Control, 0, controls)
    input_of = part_function(Row, Input, first_input, base.input_size)
    input_before = part_function(Row, Input, first_carried, carried)

    @wp.func
    def joined(x: State, u: Given, z: Row):
        y = Row()
        for i in range(wp.static(size)):
            y[i] = x[i]
        for i in range(wp.static(memory)):
            y[wp.static(size) + i] = u[wp.static(controls) + i]
        for i in range(wp.static(carried)):
            y[wp.static(first_carried) + i] = z[wp.static(first_input) + i]
        return y

    if base.input_size:

        @wp.func
        def extended_step(z: Row, u: Given, p: Parameters):
            return joined(step(state_of(z), control_of(u), input_of(z), p), u, z)

    else:

        @wp.func
        def extended_step(z: Row, u: Given, p: Parameters):
            return joined(step(state_of(z), control_of(u), p), u, z)

    if structure.carried_size:

        @wp.func
        def extended_cost(z: Row, p: Parameters):
            return cost(state_of(z), input_before(z), p)

    else:

        @wp.func
        def extended_cost(z: Row, p: Parameters):
            return cost(state_of(z), p)

    return SystemFunctions(extended_step, extended_cost)


class ExtendedSimulator:
    """The same for a simulator that is no `System`: it steps its own part of every row.

    Args:
        wrapped: The simulator within.
        memory: Numbers H that the controller remembers.
        inputs_given: Numbers E of the inputs of a step; the simulator does not read them.
    """

    carried_size = 0
    stands_twice = False
    takes_flows, inner_states = False, 0
    """What a simulator may offer, and is not made use of here."""

    def __init__(self, wrapped: Simulator, memory: int = 0, inputs_given: int = 0):
        self.wrapped, self.memory, self.inputs_given = wrapped, memory, inputs_given
        self.own_size, self.own_controls = wrapped.state_size, wrapped.control_size
        self.remembering_size = self.written_size = self.own_size + memory
        self.state_size, self.control_size = self.written_size + inputs_given, self.own_controls + memory
        # a step takes buffers and returns them: steps in several threads, or in one another, do not share
        self._spare: list[tuple[tuple, list[wp.array]]] = []

    def __getattr__(self, name: str) -> Any:
        """Return what else the simulator has."""
        if name in ("wrapped", "_spare") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory."""
        return {**vars(self), "_spare": []}

    def step(self, x: wp.array, c: wp.array, y: wp.array, parameters: wp.array | None = None) -> None:
        """Write the next rows y, but for their inputs, which it leaves as they are."""
        with self._own(x, c) as (own_x, own_c, own_y, _dx, _dc):
            self.wrapped.step(own_x, own_c, own_y, *(() if parameters is None else (parameters,)))
            wp.copy(y[:, : self.own_size], own_y)
        if self.memory:
            wp.copy(y[:, self.own_size : self.written_size], c[:, self.own_controls :])

    def step_vjp(
        self, x: wp.array, c: wp.array, adj_y: wp.array, adj_x: wp.array, adj_c: wp.array, *more: Any, **options: Any
    ) -> None:
        """Write the adjoints of rows and of what the controller returns."""
        with self._own(x, c) as (own_x, own_c, own_y, dx, dc):
            wp.copy(own_y, adj_y[:, : self.own_size])
            if "y" in options:
                options["y"] = options["y"][:, : self.own_size].contiguous()
            self.wrapped.step_vjp(own_x, own_c, own_y, dx, dc, *more, **options)
            adj_x.zero_()
            wp.copy(adj_x[:, : self.own_size], dx)
            wp.copy(adj_c[:, : self.own_controls], dc)
        if self.memory:
            wp.copy(adj_c[:, self.own_controls :], adj_y[:, self.own_size : self.written_size])

    @contextlib.contextmanager
    def _own(self, x: wp.array, c: wp.array) -> Iterator[list[wp.array]]:
        """Lend the simulator's part of rows and controls, and room for next states and adjoints."""
        key = len(x), x.dtype, str(x.device)
        try:
            known, own = self._spare.pop()
        except IndexError:
            known, own = (), []
        if known != key:
            shapes = (self.own_size, self.own_controls, self.own_size, self.own_size, self.own_controls)
            own = [wp.zeros((len(x), n), dtype=x.dtype, device=x.device) for n in shapes]
        wp.copy(own[0], x[:, : self.own_size])
        wp.copy(own[1], c[:, : self.own_controls])
        yield own
        self._spare.append((key, own))


def row_sizes(system: Any) -> tuple[int, int]:
    """Return how many numbers of a row are the state, and how many that and a memory; of any system or simulator."""
    size = system.state_size
    return getattr(system, "own_size", size), getattr(system, "remembering_size", size)


def extended(system: Any, memory: int = 0, inputs: int = 0) -> Any:
    """Return a system or simulator whose rows hold a memory and inputs; itself where there are none."""
    if not memory and not inputs:
        return system
    return (Extended if isinstance(system, System) else ExtendedSimulator)(system, memory, inputs)


losses.EXTENDED["system"] = Extended
