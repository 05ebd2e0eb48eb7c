"""Systems with a network in their physics, as rows: what the network gives stands beside the controls.

The rows of a `HybridRows` are

    z = [x | x̂]        u = [c | r]

with the state x twice, and behind the controls c what the network gives, r. A step makes [x' | x'] of both. One program
gives u of z: the controls of x̂, and what the network gives of x and c. So what the network feeds back comes in at x,
and what the controller feeds back at x̂, where gates can tell them apart: that of the physics for the one, that of the
controller for the other (`gates_of_rows`).
"""

import functools
import linecache
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.rows import part_function, row_functions
from warp_phys.programs.trace import NATIVE
from warp_phys.systems.base import System, SystemFunctions, SystemTypes
from warp_phys.systems.drawing import Picture
from warp_phys.systems.extended import Around


def given_size(system: System, gives: str | tuple[str, ...]) -> int:
    """Return how many numbers a network gives to a step, see `HybridRows.gives`."""
    sizes = {"residual": system.state_size, "controls": system.control_size, "inputs": system.input_size}
    return sizes[gives] if isinstance(gives, str) else len(gives)


@dataclass(frozen=True)
class HybridRows(Around):
    """The rows of a system that a network has a part in."""

    physics: System
    """The system."""
    gives: str | tuple[str, ...] = "residual"
    """What the network gives: "residual", added to the next state; "controls", added to the controls; "inputs", the
    system's own; or names of physical parameters, added to those."""

    @property
    def within(self) -> System:
        """The system."""
        return self.physics

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the numbers of a row."""
        return (*self.physics.states, *(f"{name} as the controller sees it" for name in self.physics.states))

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the controls, and of what the network gives."""
        given = range(given_size(self.physics, self.gives))
        return (*self.physics.controls, *(f"given by the network {i}" for i in given))

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the system's own inputs, where they are not what the network gives."""
        return () if self.gives == "inputs" else self.physics.inputs

    @functools.cached_property
    def structure(self) -> System:
        """This system without its physical parameters."""
        return HybridRows(self.physics.structure, self.gives)

    @property
    def own_controls(self) -> int:
        """Numbers of the controls."""
        return self.physics.control_size

    @property
    def stands_twice(self) -> bool:
        """A row holds the state twice."""
        return True

    def types(self, real: type) -> SystemTypes:
        """Return the types of the Warp functions."""
        row, given = (row_functions(size, real).vector for size in (self.state_size, self.control_size))
        own = self.physics.types(real)
        return SystemTypes(real, row, given, own.Parameters, self.state_size, self.control_size, own.Input)

    def functions(self, real: type) -> SystemFunctions:
        """Return the Warp functions."""
        return _functions(self.structure, real)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return initial rows."""
        return np.tile(self.physics.sample(batch, seed, dtype), 2)

    def picture(self, state: np.ndarray, control: np.ndarray | None = None) -> Picture:
        """Return what the system looks like."""
        return self.physics.picture(state[: self.physics.state_size], control)


@functools.cache
def _functions(structure: Any, real: type) -> SystemFunctions:
    types, base = structure.types(real), structure.physics
    Row, Given, Parameters, Input = types.State, types.Control, types.Parameters, types.Input
    cost, advance = base.functions(real).cost, _advance(base, structure.gives, real)
    inner = base.types(real)
    State, Control = inner.State, inner.Control
    More = row_functions(structure.control_size - base.control_size, real).vector
    size, controls, more = base.state_size, base.control_size, structure.control_size - base.control_size

    state_of, control_of = part_function(Row, State, 0, size), part_function(Given, Control, 0, controls)
    given_of = part_function(Given, More, controls, more)

    @wp.func
    def twice(x: State):
        z = Row()
        for i in range(wp.static(size)):
            z[i] = x[i]
            z[wp.static(size) + i] = x[i]
        return z

    if structure.inputs:

        @wp.func
        def hybrid_step(z: Row, u: Given, w: Input, p: Parameters):
            return twice(advance(state_of(z), control_of(u), w, given_of(u), p))

    else:

        @wp.func
        def hybrid_step(z: Row, u: Given, p: Parameters):
            return twice(advance(state_of(z), control_of(u), given_of(u), p))

    if structure.inputs and base.cost_reads_inputs:

        @wp.func
        def hybrid_cost(z: Row, w: Input, p: Parameters):
            return cost(state_of(z), w, p)

    else:

        @wp.func
        def hybrid_cost(z: Row, p: Parameters):
            return cost(state_of(z), p)

    return SystemFunctions(hybrid_step, hybrid_cost)


def _advance(base: System, gives: str | tuple[str, ...], real: type) -> Any:
    """Return `advance(x, c, r, p)`, or `advance(x, c, w, r, p)` where the system has inputs that are not given by r."""
    types, step = base.types(real), base.functions(real).step
    State, Control, Parameters, Input = types.State, types.Control, types.Parameters, types.Input
    More = row_functions(given_size(base, gives), real).vector
    changed = _changed(base, gives, real) if isinstance(gives, tuple) else None

    if gives == "inputs":

        @wp.func
        def advance(x: State, c: Control, r: More, p: Parameters):
            return step(x, c, r, p)

    elif gives == "residual" and not base.inputs:

        @wp.func
        def advance(x: State, c: Control, r: More, p: Parameters):
            return step(x, c, p) + r

    elif gives == "residual":

        @wp.func
        def advance(x: State, c: Control, w: Input, r: More, p: Parameters):
            return step(x, c, w, p) + r

    elif gives == "controls" and not base.inputs:

        @wp.func
        def advance(x: State, c: Control, r: More, p: Parameters):
            return step(x, c + r, p)

    elif gives == "controls":

        @wp.func
        def advance(x: State, c: Control, w: Input, r: More, p: Parameters):
            return step(x, c + r, w, p)

    elif not base.inputs:

        @wp.func
        def advance(x: State, c: Control, r: More, p: Parameters):
            return step(x, c, changed(p, r))

    else:

        @wp.func
        def advance(x: State, c: Control, w: Input, r: More, p: Parameters):
            return step(x, c, w, changed(p, r))

    return advance


@functools.cache
def _changed(base: System, gives: tuple[str, ...], real: type) -> Any:
    """Return `changed(p, r)`: physical parameters, to some of which what the network gives is added."""
    # Warp makes a struct of its numbers one by one, so there is a line for each; it reads them where linecache does
    given = {name: f" + r[{i}]" for i, name in enumerate(gives)}
    numbers = ", ".join(f"p.{name}{given.get(name, '')}" for name in base.parameter_names)
    source = f"def changed(p: Parameters, r: More):\n    return Parameters({numbers})\n"
    name = f"<parameters of {base}, {gives}, {real.__name__}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    scope = {"Parameters": base.types(real).Parameters, "More": row_functions(len(gives), real).vector}
    exec(compile(source, name, "exec"), scope)
    changed = wp.func(scope["changed"])  # type: ignore[arg-type]

    def of_symbols(p: Any, r: Any) -> Any:
        more = {name: getattr(p, name) + r[i] for i, name in enumerate(gives)}
        return SimpleNamespace(**{**vars(p), **more})

    NATIVE[changed] = of_symbols
    return changed


def gates_of_rows(gates: np.ndarray) -> np.ndarray:
    """Return a flow's gates (see `Flow.all_gates`) for rows that hold the state twice, shape (…, 4 D + 2).

    Raises:
        ValueError: The flow has a limit.
    """
    size = gates.shape[-1] // 2 - 1
    physics, controller, rest = gates[..., :size], gates[..., size : 2 * size], gates[..., 2 * size :]
    refuse_limit(float(rest[..., 1].min()))
    return np.concatenate([physics, np.zeros_like(physics), physics, controller, rest], axis=-1)


def refuse_limit(limit: float | None) -> None:
    """Raise a ValueError if a flow has a limit, which a network in the physics has no part in."""
    if limit is not None and limit != np.inf:
        raise ValueError(
            "a flow with a limit is not for a Hybrid: what its network feeds back is not told from what the controller "
            "does where lengths are compared; give gates, Flow(physics, controller)"
        )
