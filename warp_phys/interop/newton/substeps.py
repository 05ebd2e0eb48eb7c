"""The substeps of Newton's solvers on rows, forward and backward: the work that graphs replay."""

from collections.abc import Sequence
from typing import Any

import newton
import numpy as np
import warp as wp

from warp_phys.interop.newton.kernels import (
    adj_steer,
    collect_rows,
    compare_rows,
    restore_wrenches,
    spread_rows,
    steer,
)
from warp_phys.interop.newton.layout import Layout, Steering, flat, read_layout

OVERWRITES = "body_f_ext[child] = f_ext"
"""The line of Newton's kernel that makes `Substeps._mend` necessary."""
REPEATS = {True: 64.0 * 2.0**-23, False: 1e-4}
"""How far from each other a step and its repetition may be, by the row's largest number, on a CPU and on a GPU, whose
sums come in any order."""


class Substeps:
    """What the graphs work on: rows that are owned, and Newton's states and controls."""

    def __init__(
        self,
        model: newton.Model,
        solver: Any,
        layout: Layout,
        steering: Steering,
        dt: float,
        substeps: int,
        worlds: int,
        contacts: bool,
    ):
        self.model: Any = model  # its arrays may be None
        self.solver, self.layout, self.steering = solver, layout, steering
        self.dt, self.worlds, self.device = dt / substeps, worlds, model.device
        self.reduced = any(field.name == "joint_q" for field in layout.fields)
        shape, controls = (worlds, len(layout.names)), (worlds, len(steering.names))
        self.block = wp.zeros((substeps + 1, *shape), dtype=wp.float32, device=self.device)
        self.rows = [self.block[n] for n in range(substeps + 1)]
        self.y = wp.zeros(shape, dtype=wp.float32, device=self.device)
        self.apart = wp.zeros(worlds, dtype=wp.float32, device=self.device)
        self.c = wp.zeros(controls, dtype=wp.float32, device=self.device)
        self.adjoints: dict[int, tuple[wp.array, wp.array]] = {}
        self.plain = tuple(model.state(requires_grad=False) for _ in range(2))
        self.taped = tuple(model.state(requires_grad=True) for _ in range(2))
        self.control = model.control(requires_grad=True)
        self.with_contacts = contacts
        self.read()

    def read(self) -> None:
        """Read from the model what is not read at each replay: its arrays of controls, and what collides."""
        # the numbers of the controls that are not steered; written into the model, they count from the next step on
        pairs = [(own, getattr(self.model, name, None)) for name, own in vars(self.control).items()]
        self.given = [(own, given) for own, given in pairs if isinstance(own, wp.array) and isinstance(given, wp.array)]
        self.pipeline = newton.CollisionPipeline(self.model, requires_grad=False) if self.with_contacts else None
        self.contacts: Any = None if self.pipeline is None else self.pipeline.contacts()
        self.spares: dict[int, wp.array] = {}

    def forward(self) -> list[wp.Tape]:
        """Write rows[1:] from rows[0] and c; return what holds memory that a graph of this points to."""
        self._steer()
        return [self._advance(n) for n in range(len(self.rows) - 1)]

    @property
    def inner(self) -> wp.array:
        """The states between the substeps, shape (substeps − 1, worlds, D)."""
        return self.block[1:-1]

    def flow_adjoints(self, flows: int) -> tuple[wp.array, wp.array]:
        """Return room for adjoints of states and of controls, shapes (flows, worlds, D) and (flows, worlds, K)."""
        if flows not in self.adjoints:
            shapes = (flows, *self.y.shape), (flows, *self.c.shape)
            adj, adj_c = (wp.zeros(shape, dtype=wp.float32, device=self.device) for shape in shapes)
            self.adjoints[flows] = adj, adj_c
        return self.adjoints[flows]

    def backward(self, flows: int, again: bool) -> list[wp.Tape]:
        """Replace adjoints of the next states by those of rows[0], and write those of c, see `flow_adjoints`.

        Substep by substep, the last first: each is computed once more, on a tape, which then runs backward for every
        flow. Its next states come to rows[-1], and how far they are from y to apart. The states between the substeps
        are found `again`, or are there.
        Returns what holds memory that a graph of this points to.
        """
        self._steer()
        kept = [self._advance(n) for n in range(len(self.rows) - 2)] if again else []
        adj, adj_c = self.flow_adjoints(flows)
        adj_c.zero_()
        source, target = self.taped
        adj_control = getattr(self.control, self.steering.target).grad
        steering = [flat(adj_control), self.steering.places, self.steering.gain, self.steering.width]
        for n in reversed(range(len(self.rows) - 1)):
            self._spread(self.rows[n], source)
            self._prepare(source)
            with wp.Tape() as tape:
                self.solver.step(source, target, self.control, self.contacts, self.dt)
            _check_kernels(tape)
            if n == len(self.rows) - 2:
                self._collect(target, self.rows[-1])
                inputs = [self.y, self.rows[-1], REPEATS[self.device.is_cpu]]
                self._launch(compare_rows, (self.worlds,), inputs, self.apart)
            self._prune(tape, target)
            written = self._written(tape) if flows > 1 else []
            self._mend(tape, target)
            for array, spare in written:
                wp.copy(spare, array)
            for f in range(flows):
                for array, spare in written if f else ():
                    wp.copy(array, spare)
                self._spread(adj[f], target, adjoint=True)
                tape.backward()
                self._collect(source, adj[f], adjoint=True)
                self._launch(adj_steer, self.c.shape, steering, adj_c[f])
                tape.zero()  # the next backward pass starts from zeros
            kept.append(tape)
        return kept

    def _mend(self, tape: wp.Tape, target: Any) -> None:
        """Have a tape restore the bodies' wrenches before a kernel that has overwritten them runs backward.

        `eval_rigid_tau` of Newton 1.8 replaces each wrench by one at another point, with the other sign. Warp reads
        arrays as they are when a tape runs backward, so that the derivative by the lever arm would be wrong: for
        contacts, and for forces on free joints. Running backward the kernel replaces them again, for the next flow.
        """
        inputs = [target.body_q_com, target.body_solve_origin] if self.reduced else []

        def restore() -> None:
            self._launch(restore_wrenches, (self.model.body_count,), inputs, target.body_f_ext)

        for i, launch in enumerate(tape.launches):
            kernel = None if callable(launch) else launch[0]
            if kernel is not None and kernel.key == "eval_rigid_tau" and OVERWRITES in kernel.adj.source:
                tape.launches.insert(i + 1, restore)
                return

    def _written(self, tape: wp.Tape) -> list[tuple[wp.array, wp.array]]:
        """Return what a tape's launches write, each with an array of the same kind to keep it in.

        A kernel that adds to an array adds to it again when it runs backward, so that forces would be others for the
        next flow. The solver's own matrices are only ever assigned.
        """
        own = [value for value in vars(self.solver).values() if isinstance(value, wp.array)]
        written: dict[int, tuple[wp.array, wp.array]] = {}
        for array in (array for launch in tape.launches if not callable(launch) for array in launch[4]):
            if not isinstance(array, wp.array) or not array.size or any(_overlap(array, other) for other in own):
                continue
            if array.ptr not in self.spares:
                self.spares[array.ptr] = wp.empty_like(array, requires_grad=False)
            written[array.ptr] = array, self.spares[array.ptr]
        return list(written.values())

    def _prune(self, tape: wp.Tape, target: Any) -> None:
        """Take the last launches from a tape whose results lead to no number of a row: they have no adjoints.

        With SolverFeatherstone these are the poses of bodies that hang on no free joint.
        """
        wanted = [getattr(target, field.name) for field in self.layout.fields]
        kept: list[Any] = []
        while tape.launches and not callable(tape.launches[-1]):
            launch = tape.launches.pop()
            arrays = [value for value in (*launch[3], *launch[4]) if isinstance(value, wp.array)]
            if any(_overlap(array, other) for array in launch[4] for other in wanted):
                wanted += arrays
                kept.append(launch)
        tape.launches += reversed(kept)

    def _advance(self, n: int) -> wp.Tape:
        """Write rows[n + 1] from rows[n]."""
        source, target = self.plain
        self._spread(self.rows[n], source)
        self._prepare(source)
        with wp.Tape() as tape:  # not run backward; it keeps alive what the solver allocates
            self.solver.step(source, target, self.control, self.contacts, self.dt)
        self._collect(target, self.rows[n + 1])
        return tape

    def _prepare(self, state: Any) -> None:
        """Clear a state's forces and find its contacts."""
        state.clear_forces()
        if self.pipeline is not None:
            if self.reduced:
                newton.eval_fk(self.model, state.joint_q, state.joint_qd, state)
            self.pipeline.collide(state, self.contacts)

    def _steer(self) -> None:
        """Write what all substeps share: controls, and what a solver has derived from masses."""
        self.solver.notify_model_changed(newton.ModelFlags.BODY_INERTIAL_PROPERTIES)  # two launches, replayed
        for own, given in self.given:
            wp.copy(own, given)
        numbers = flat(getattr(self.control, self.steering.target))
        inputs = [self.c, self.steering.places, self.steering.gain, self.steering.width]
        self._launch(steer, self.c.shape, inputs, numbers)

    def _spread(self, rows: wp.array, state: newton.State, adjoint: bool = False) -> None:
        """Write a state, or its adjoint, from rows."""
        for field in self.layout.fields:
            array = getattr(state, field.name)
            numbers = flat(array.grad if adjoint else array)
            self._launch(spread_rows, (self.worlds, field.width), [rows, field.offset, field.width], numbers)

    def _collect(self, state: newton.State, rows: wp.array, adjoint: bool = False) -> None:
        """Write rows from a state, or from its adjoint."""
        for field in self.layout.fields:
            array = getattr(state, field.name)
            numbers = flat(array.grad if adjoint else array)
            self._launch(collect_rows, (self.worlds, field.width), [numbers, field.offset, field.width], rows)

    def _launch(self, kernel: Any, dim: Sequence[int], inputs: list[Any], output: wp.array) -> None:
        wp.launch(kernel, dim=dim, inputs=inputs, outputs=[output], device=self.device, record_tape=False)

    def initial_rows(self) -> np.ndarray:
        """Return the states that the model was built with, shape (worlds, D)."""
        return _rows(self.model, self.layout, self.worlds)

    def sample(self, generator: np.random.Generator, spread: float) -> np.ndarray:
        """Return the initial states with noise, shape (worlds, D): on the joints, where there are joints."""
        layout = read_layout(self.model, self.worlds, self.reduced or bool(self.model.joint_count))
        rows = _rows(self.model, layout, self.worlds)
        rows = rows + spread * generator.standard_normal(rows.shape)
        for start in layout.quaternions:
            rows[:, start : start + 4] /= np.linalg.norm(rows[:, start : start + 4], axis=1, keepdims=True)
        if layout.fields == self.layout.fields:
            return rows
        state: Any = self.model.state(requires_grad=False)
        for field in layout.fields:
            part = rows[:, field.offset : field.offset + field.width].astype(np.float32)
            flat(getattr(state, field.name)).assign(part.ravel())
        newton.eval_fk(self.model, state.joint_q, state.joint_qd, state)
        return _rows(state, self.layout, self.worlds)


def _rows(holder: Any, layout: Layout, worlds: int) -> np.ndarray:
    """Return the arrays of a state, or of a model, as rows."""
    return np.concatenate([getattr(holder, f.name).numpy().reshape(worlds, -1) for f in layout.fields], axis=1)


def _overlap(one: Any, other: Any) -> bool:
    """Whether two arrays share memory; what is no array has none."""
    if not isinstance(one, wp.array) or not isinstance(other, wp.array) or not one.size or not other.size:
        return False
    return one.ptr < other.ptr + other.capacity and other.ptr < one.ptr + one.capacity


def _check_kernels(tape: wp.Tape) -> None:
    """Raise a ValueError if a kernel on a tape has no backward pass."""
    for launch in tape.launches:
        kernel = None if callable(launch) else launch[0]
        if kernel is not None and not {**kernel.module.options, **kernel.options}["enable_backward"]:
            raise ValueError(
                f"kernel {kernel.key} of {kernel.module.name} has been compiled without a backward pass: set "
                "wp.config.enable_backward, or the module's option of that name, to True before Newton is imported"
            )
