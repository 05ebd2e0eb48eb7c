"""Newton inside this engine: a Newton model and solver as a `Simulator`, its physics with our flows."""

from collections.abc import Callable, Sequence
from typing import Any

import newton
import numpy as np
import warp as wp

from warp_phys.core.arrays import check_array, numpy_type, real_type, shape_message
from warp_phys.core.checks import check_device, check_flag, check_number, check_seed
from warp_phys.core.gate import active_tape, paused
from warp_phys.engine import row_kernels
from warp_phys.errors import NotRepeatable, check_choice, check_count, shown
from warp_phys.interop.newton.inertia import make_featherstone
from warp_phys.interop.newton.layout import (
    TARGETS,
    check_bodies,
    check_particles,
    read_layout,
    read_steering,
    world_count,
)
from warp_phys.interop.newton.substeps import Substeps
from warp_phys.interop.newton.watch import Watch

DIFFERENTIABLE = (newton.solvers.SolverFeatherstone, newton.solvers.SolverSemiImplicit)


class NewtonSystem:
    """One control step of a Newton model: x' = S(x, c), `substeps` steps of a solver for all worlds at once.

    A sample is a world, so the batch is the model's number of worlds. A row of states holds, with SolverFeatherstone,
    a world's `joint_q` then `joint_qd`; with SolverSemiImplicit its `body_q` then `body_qd`; with either its
    `particle_q` then `particle_qd`. A row of controls holds joint forces or targets; they act during all substeps.

    Only states are kept, those between substeps too. `step_vjp` computes a substep again just before its backward
    pass, once for all flows, since the solvers keep work buffers that the next substep overwrites. Both verbs are
    recorded once as a graph and replayed.
    Arrays of the model are read at replay, so numbers written into them count from the next step on, masses too;
    arrays that are replaced are noticed, and the graphs recorded again. An array that the solver does not read, written
    on a CPU, is an error. What is not noticed needs `refresh`: see docs/newton.md. Backward passes leave zeros in the
    adjoints of the model's own arrays.

    Args:
        model: Made by `ModelBuilder.finalize(requires_grad=True)`, the same articulations in every world.
        solver: SolverFeatherstone or SolverSemiImplicit, as a class or made for this model.
        dt: Time of one control step [s].
        substeps: Solver steps per control step, each of dt / substeps.
        control: What a control is: "joint_f" (forces), "joint_target_q" or "joint_target_qd" (targets of drives).
        joints: Names of the joints of one world that are steered; None: all but fixed and free ones.
        gain: What controls are multiplied by, a number or one per control.
        contacts: Whether contacts are found before every substep. Their points and normals count as constants in the
            backward pass; positions and velocities of the bodies do not.
        graph: Whether to replay graphs; without, every launch is a call of Python.
        keep: Whether a rollout keeps the states between the substeps, steps · (substeps − 1) · worlds · D numbers; else
            its backward pass computes them again.

    Raises:
        TypeError, ValueError: A model, solver or control that has no gradients or does not fit.

    >>> import newton
    >>> rod = newton.ModelBuilder()
    >>> link = rod.add_link(mass=1.0, inertia=wp.mat33(np.eye(3) / 10), com=wp.vec3(0.0, 0.0, -0.5))
    >>> rod.add_articulation([rod.add_joint_revolute(-1, link, axis=(0.0, 1.0, 0.0), label="hinge")])
    >>> system = NewtonSystem.from_builder(rod, worlds=3, dt=0.01, device="cpu")
    >>> system, system.states, system.controls
    (NewtonSystem(3 worlds, SolverFeatherstone), ('hinge [rad]', 'hinge rate [rad/s]'), ('hinge torque [N·m]',))
    """

    dtype = np.float32
    """The precision in which Newton computes."""

    takes_flows = True
    """Whether `step_vjp` takes the adjoints of several flows at once."""

    def __init__(
        self,
        model: newton.Model,
        solver: Any = newton.solvers.SolverFeatherstone,
        *,
        dt: float = 1.0 / 60.0,
        substeps: int = 1,
        control: str = "joint_f",
        joints: Sequence[str] | None = None,
        gain: float | Sequence[float] = 1.0,
        contacts: bool = False,
        graph: bool = True,
        keep: bool = True,
    ):
        _check_model(model)
        self.solver = _make_solver(solver, model)
        check_number("dt", dt, positive=True)
        check_flag("contacts", contacts)
        self.model, self._dt, self._substeps = model, float(dt), check_count("substeps", substeps)
        self.device, self.worlds = model.device, world_count(model)
        check_choice("control", control, tuple(TARGETS))
        self._check_model()
        layout = read_layout(model, self.worlds, isinstance(self.solver, newton.solvers.SolverFeatherstone))
        steering = read_steering(model, self.worlds, control, joints, gain)
        self.states, self.controls = layout.names, steering.names
        self._work = Substeps(model, self.solver, layout, steering, self.dt, self.substeps, self.worlds, contacts)
        self._watch = Watch(model, self.solver, contacts)
        self._graphs: dict[tuple, tuple[Any, list[Any]]] = {}
        self._kept: list[Any] = []
        self._use_graphs, self._keep = check_flag("graph", graph), check_flag("keep", keep)

    @classmethod
    def from_builder(
        cls, builder: newton.ModelBuilder, worlds: int, *, ground: bool = False, device: Any = None, **options: Any
    ) -> "NewtonSystem":
        """Return a system of copies of one world.

        Args:
            builder: One world, from code, `add_urdf` or `add_mjcf`.
            worlds: How many copies, the batch size.
            ground: Whether to add a ground plane, with the builder's default shape material.
            device: Warp device.
            **options: As for the constructor.
        """
        if not isinstance(builder, newton.ModelBuilder):
            raise TypeError(f"builder must be a newton.ModelBuilder, got {shown(builder)}")
        check_flag("ground", ground)
        scene = newton.ModelBuilder(up_axis=builder.up_axis)
        scene.replicate(builder, check_count("worlds", worlds))
        if ground:
            scene.add_ground_plane(cfg=builder.default_shape_cfg)
        return cls(scene.finalize(device=check_device(device), requires_grad=True), **options)

    @property
    def dt(self) -> float:
        """Time of one control step [s]; another one needs another system."""
        return self._dt

    @property
    def substeps(self) -> int:
        """Solver steps per control step."""
        return self._substeps

    @property
    def state_size(self) -> int:
        """Number D of state components."""
        return len(self.states)

    @property
    def control_size(self) -> int:
        """Number K of control components."""
        return len(self.controls)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.worlds} worlds, {type(self.solver).__name__})"

    @property
    def inner_states(self) -> int:
        """Number of states between the substeps that a rollout keeps for its backward pass."""
        return self.substeps - 1 if self._keep else 0

    def step(self, x: wp.array, c: wp.array, y: wp.array, *, inner: wp.array | None = None) -> None:
        """Write y = S(x, c), one control step of every world; recorded by an active `wp.Tape`.

        Args:
            x: States, shape (worlds, D), float32, any strides.
            c: Controls, shape (worlds, K).
            y: Next states, shape (worlds, D), written.
            inner: States between the substeps, shape (substeps − 1, worlds, D), written if given.

        Raises:
            TypeError, ValueError: An array of another type, precision, shape or device.
            ValueError: An array of the model was written that the solver does not read, or replaced by one that does
                not fit.
        """
        self._check(x, c, y, "y")
        self._check_inner(inner, x)
        self._notice()
        tape = active_tape()
        with paused(tape):
            work = self._work
            wp.copy(work.rows[0], x)
            wp.copy(work.c, c)
            self._replay(("step",), work.forward)
            wp.copy(y, work.rows[-1])
            if inner is not None:
                wp.copy(inner, work.inner)
        if tape is not None and y.grad is not None:
            arrays = [array for array in (x, c, y) if array.grad is not None]
            tape.record_func(lambda: self._pull(x, c, y), arrays)

    def step_vjp(
        self,
        x: wp.array,
        c: wp.array,
        adj_y: wp.array,
        adj_x: wp.array,
        adj_c: wp.array,
        *,
        y: wp.array | None = None,
        inner: wp.array | None = None,
    ) -> None:
        """Write adj_x = (∂S/∂x)ᵀ adj_y and adj_c = (∂S/∂c)ᵀ adj_y.

        The adjoints of several flows are found at once, from one linearisation, if they are given with an axis before
        the others: adj_y (flows, worlds, D), adj_x (flows, worlds, D), adj_c (flows, worlds, K).

        Args:
            x: States at which the step is linearised, shape (worlds, D), float32, any strides.
            c: Controls at which the step is linearised, shape (worlds, K).
            adj_y: Adjoint of the next states, shape (worlds, D).
            adj_x: Written, shape (worlds, D).
            adj_c: Written, shape (worlds, K).
            y: The next states that `step` found, shape (worlds, D), to compare with what is found again.
            inner: The states between the substeps that `step` found; without, they are computed again.

        Raises:
            NotRepeatable: The next states are not y, beyond rounding: the model has been changed since. Not within a
                graph that the caller records.
            TypeError, ValueError: An array of another type, precision, shape or device; what `step` raises.
            ValueError: A kernel of the solver has been compiled without a backward pass.
        """
        flows = adj_y.shape[:-2] if isinstance(adj_y, wp.array) else ()
        self._check(x, c, adj_y, "adj_y", flows)
        check_array("adj_x", adj_x, (*flows, *x.shape), x)
        check_array("adj_c", adj_c, (*flows, *c.shape), x)
        if y is not None:
            check_array("y", y, x.shape, x)
        self._check_inner(inner, x)
        self._notice()
        with paused(active_tape()):
            work, count = self._work, flows[0] if flows else 1
            adj, adj_c_found = work.flow_adjoints(count)
            wp.copy(work.rows[0], x)
            wp.copy(work.c, c)
            wp.copy(adj if flows else adj[0], adj_y)
            if y is not None:
                wp.copy(work.y, y)
            if inner is not None:
                wp.copy(work.inner, inner)
            again = inner is None and self.substeps > 1
            self._replay(("step_vjp", count, again), lambda: work.backward(count, again))
            if y is not None and not self.device.is_capturing:
                _check_repeated(work.apart.numpy())
            wp.copy(adj_x, adj if flows else adj[0])
            wp.copy(adj_c, adj_c_found if flows else adj_c_found[0])

    def refresh(self) -> None:
        """Derive all that has been derived from the model again, and record graphs anew at the next steps.

        For what is not noticed: on a GPU, the contents of the few arrays that the host reads. A graph that a caller has
        recorded keeps what it points to.

        Raises:
            ValueError: The model or the solver's settings do not fit any more.
        """
        _make_solver(self.solver, self.model)  # its settings may have changed
        self._check_model()
        if self.device.is_cuda and not self.device.is_capturing:
            wp.synchronize_device(self.device)  # a graph may still run
        if self._kept:
            work = self._work
            held = work.given, work.pipeline, work.contacts, work.spares
            self._kept.append((dict(vars(self.solver)), self._watch.held, *held))
        self.solver.notify_model_changed(newton.ModelFlags.ALL)
        self._work.read()
        self._graphs.clear()
        self._watch.take()

    def initial_states(self) -> np.ndarray:
        """Return the states that the model was built with, shape (worlds, D)."""
        return self._work.initial_rows()

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32, spread: float = 0.1) -> np.ndarray:
        """Return the initial states with normal noise on all numbers, quaternions made unit again, shape (batch, D).

        With SolverSemiImplicit the noise is on the joints, from which the poses of the bodies follow.

        Args:
            batch: Number of states; row i starts from world i mod `worlds`.
            seed: Of the noise.
            dtype: float32 or float64.
            spread: Standard deviation of the noise, in each number's unit.
        """
        check_count("batch", batch)
        check_seed(seed)
        check_number("spread", spread, least=0.0)
        rows = [self._work.sample(np.random.default_rng([seed, n]), spread) for n in range(-(-batch // self.worlds))]
        return np.concatenate(rows)[:batch].astype(numpy_type(real_type(dtype)))

    def _check_model(self) -> None:
        """Raise if the solver would silently go wrong with the model."""
        if isinstance(self.solver, newton.solvers.SolverFeatherstone):
            check_bodies(self.model)
        else:
            check_particles(self.model, self.worlds)

    def _notice(self) -> None:
        """Refresh if the model or the solver's settings have been changed in a way that graphs do not see."""
        if self._watch.changed():
            self.refresh()

    def _check(self, x: Any, c: Any, y: Any, y_name: str, flows: tuple[int, ...] = ()) -> None:
        """Raise if an argument of `step` or `step_vjp` does not fit; `flows` stand before the axes of y."""
        check_array("x", x, (-1, self.state_size), columns=", ".join(self.states))
        if x.dtype is not wp.float32:
            raise TypeError(f"x must hold float32, in which Newton computes, got {x.dtype.__name__}")
        if x.device != self.device:
            raise ValueError(f"x must be on device {self.device} as the model is, got {x.device}")
        if len(x) != self.worlds:
            shape = shape_message("x", (self.worlds, self.state_size), x.shape)
            raise ValueError(f"{shape}: one row per world of the model; build a model with {len(x)} worlds")
        check_array("c", c, (self.worlds, self.control_size), x, ", ".join(self.controls))
        check_array(y_name, y, (*flows[-1:], *x.shape), x)

    def _check_inner(self, inner: Any, x: wp.array) -> None:
        """Raise if an array of states between the substeps does not fit."""
        if inner is not None:
            check_array("inner", inner, (self.substeps - 1, *x.shape), x)

    def _replay(self, key: tuple, work: Callable[[], list[Any]]) -> None:
        """Do work on the arrays that `Substeps` owns, as a graph from the second time on.

        What `work` returns holds memory that a graph points to.
        """
        if not self._use_graphs:
            work()
        elif self.device.is_capturing:  # an outer graph records the launches themselves
            self._kept += work()
        elif key in self._graphs:
            wp.capture_launch(self._graphs[key][0])
        else:
            work()  # loads modules and allocates what is allocated once
            # torch's current stream may be the default one, on which CUDA records no graphs
            stream = wp.Stream(self.device) if self.device.is_cuda else None
            with wp.ScopedStream(stream), wp.ScopedCapture(self.device) as capture:
                kept = work()
            self._graphs[key] = capture.graph, kept

    def _pull(self, x: wp.array, c: wp.array, y: wp.array) -> None:
        """Add to the adjoints of x and c what y's passes on, and zero y's: one entry of a tape."""
        adj_x, adj_c = wp.empty_like(self._work.y), wp.empty_like(self._work.c)
        self.step_vjp(x, c, y.grad, adj_x, adj_c, y=y)
        y.grad.zero_()
        for array, update in ((x, adj_x), (c, adj_c)):
            if array.grad is not None:
                kernel, inputs = row_kernels.add_rows_kernel(wp.float32), [update, array.grad]
                wp.launch(kernel, dim=update.shape, inputs=inputs, device=self.device, record_tape=False)


def _check_repeated(apart: np.ndarray) -> None:
    """Raise if a step has not been repeated: how far its samples are from what was found before, 0 within rounding."""
    if apart.any():
        samples = np.flatnonzero(apart)
        shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
        raise NotRepeatable(
            f"the backward pass finds other next states than the forward pass did, for {len(samples)} sample(s): "
            f"{shown}; they differ by up to {apart.max():.1e} of a row's largest number. Has the model been changed in "
            "between (gravity, masses, targets), or states or controls been overwritten? Run the backward pass before"
        )


def _check_model(model: Any) -> None:
    """Raise if a model has no gradients."""
    if not isinstance(model, newton.Model):
        raise TypeError(f"model must be a newton.Model, got {type(model).__name__}; a builder goes to from_builder")
    if not model.requires_grad:
        raise ValueError("model has no gradients: make it with ModelBuilder.finalize(requires_grad=True)")
    if not wp.config.enable_backward:
        raise ValueError(
            "wp.config.enable_backward is False, so that kernels have no backward pass: set it to True before Newton "
            "is imported"
        )


def _make_solver(solver: Any, model: newton.Model) -> Any:
    """Return a solver for the model, or raise if it has no gradients."""
    kind = solver if isinstance(solver, type) else type(solver)
    if not issubclass(kind, DIFFERENTIABLE):
        known = " or ".join(known.__name__ for known in DIFFERENTIABLE)
        raise ValueError(f"solver must be {known}, whose steps have gradients, got {kind.__name__}")
    if isinstance(solver, type):
        return make_featherstone(model) if solver is newton.solvers.SolverFeatherstone else solver(model)
    if solver.model is not model:
        raise ValueError("solver must have been made for this model, it was made for another one")
    interval = getattr(solver, "update_mass_matrix_interval", 1)
    if interval != 1:
        raise ValueError(
            f"solver must have update_mass_matrix_interval 1, got {interval}: with a mass matrix of an earlier step "
            "the step is no function of its arguments"
        )
    return solver
