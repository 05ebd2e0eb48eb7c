"""The backward pass of an unrolling in three phases, for any number of flows at once.

1. Linearise: the controller's input Jacobians at all rows of a chunk of the trajectory, one batched pass.
2. Sweep: the adjoints from the last step to the first, for all flows in one launch.
3. Contract: Σ_n (∂N/∂θ)ᵀ μ_n, one batched vector-Jacobian product per flow.

The trajectory is stored; everything else is recomputed in chunks, from the last time steps to the first, so that memory
over the horizon is the trajectory alone. `docs/mathematics.md` derives it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import as_structs
from warp_phys.core.checks import check_repeated
from warp_phys.core.flow_gates import are_single
from warp_phys.engine import row_kernels
from warp_phys.engine.layers import Workspace
from warp_phys.errors import NotRepeatable
from warp_phys.flow import Flow
from warp_phys.programs import native_kernels
from warp_phys.programs.program import SAMPLES
from warp_phys.systems.base import Simulator, System
from warp_phys.systems.extended import row_sizes
from warp_phys.systems.hybrid import gates_of_rows

CHUNK_ROWS = 2048
"""Rows (time steps × samples) that are linearised together: the activations of 100 units take 0.8 MB."""

ROW_COST, PASS_COST, STEP_COST = 3e3, 1.5e6, 7e6
"""Multiply-adds that take the time of what a backward pass through a controller does with a row besides its products,
of one more such pass, and of one more step that is walked; see `parallel_in_time`."""


class Linearisation(Protocol):
    """A controller linearised at N rows of states."""

    def jacobian(self, out: wp.array) -> None:
        """Write ∂N/∂x, shape (N, K, D)."""

    def pull(self, mu: wp.array, adj_x: wp.array) -> None:
        """Write adj_x = (∂N/∂x)ᵀ mu, shapes (N, D) and (N, K)."""

    def contract(self, mu: wp.array, gradients: Sequence[Any]) -> None:
        """Add Σ (∂N/∂θ)ᵀ mu[f] over the rows of each flow f to gradients[f]; mu has shape (flows, N, K)."""


class Controller(Protocol):
    """What a rollout needs of a controller c = N(x; θ)."""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one evaluation of one row; decides between ways that give the same numbers."""

    def evaluator(self, states: wp.array, controls: wp.array) -> Callable[[int], None]:
        """Return a function that writes controls[n] = N(states[n]), shapes (steps + 1, B, D) and (steps, B, K)."""

    def linearise(self, x: wp.array, workspace: Workspace, fused: bool = False) -> Linearisation:
        """Return the controller linearised at x (N, D); if `fused`, by kernels of its own where it has such."""

    def fits(self, system: Any) -> bool:
        """Whether `unroll` can run the whole forward unrolling with this system as one kernel."""

    def unroll(self, system: Any, states: wp.array, controls: wp.array, parameters: Any, keep: bool = False) -> Any:
        """Write states[1:] and controls from states[0]; if `keep`, return what a backward pass could use, or None."""

    def sweeps(self, system: Any) -> bool:
        """Whether `sweep` can run the whole backward pass with this system as one kernel."""

    def sweep(
        self, system: Any, trajectory: Any, seeds: Any, gates: wp.array, adj_x: wp.array, gradients: Sequence[Any],
        workspace: Workspace, adj_p: wp.array | None = None, adj_inputs: wp.array | None = None,
    ) -> None:  # fmt: skip
        """Write λ_0 to adj_x (flows, batch, D), and add each flow's update of θ to its entry of gradients.

        If adj_p is given, write the adjoints of each sample's physical parameters to it, shape (flows, batch, P); if
        adj_inputs is, those of what is given to every step, shape (flows, steps, batch, E).
        """


class WarpController(Controller, Protocol):
    """What a rollout in pure Warp needs besides: parameters θ as Warp arrays, and arrays for their gradients."""

    @property
    def parameters(self) -> Sequence[wp.array]:
        """The parameters."""

    def gradients(self, workspace: Workspace, name: str) -> Sequence[wp.array]:
        """Return zeroed arrays, one per parameter, as `Linearisation.contract` takes them for one flow."""


class Trajectory(NamedTuple):
    """An unrolling: all that a backward pass needs."""

    states: wp.array
    """x_0 … x_T, shape (steps + 1, batch, D)."""
    controls: wp.array
    """c_0 … c_{T−1}, shape (steps, batch, K)."""
    parameters: wp.array | None
    """Physical parameters, a struct array of length 1 or batch; None for a simulator that has none."""
    kept: Any = None
    """What the controller kept of its forward pass for `Controller.sweep`, or the simulator's inner states, or None."""


class Seeds(NamedTuple):
    """Where a backward pass starts: the explicit derivatives of the loss."""

    states: wp.array
    """∂L/∂x_n, shape (steps + 1, batch, D)."""
    controls: wp.array
    """∂L/∂c_n, shape (steps, batch, K)."""


class Adjoints(NamedTuple):
    """What a backward pass leaves besides the controller's gradients; one entry per flow."""

    x0: wp.array
    """λ_0, shape (flows, batch, D)."""
    parameters: wp.array | None
    """Adjoints of the physical parameters of each sample, shape (flows, batch, number of parameters), or None."""
    inputs: wp.array | None = None
    """Adjoints of what is given to every step, shape (flows, steps, batch, E), or None."""


def forward(
    system: Simulator,
    controller: Controller,
    states: wp.array,
    controls: wp.array,
    parameters: wp.array | None,
    fused: bool,
    keep: bool = False,
) -> Any:
    """Unroll: write states[1:] and controls from states[0]; in one kernel if `fused`, else step by step.

    Returns:
        What the controller kept for a backward pass if `keep` allows it, or the simulator (its inner states, shape
        (steps, inner states, batch, D)), for `Trajectory.kept`.
    """
    if fused:
        return controller.unroll(system, states, controls, parameters, keep)
    inner = _inner_states(system, states) if keep else None
    control, advance = controller.evaluator(states, controls), _stepper(system, states, controls, parameters, inner)
    for n in range(controls.shape[0]):
        control(n)
        advance(n)
    return inner


def _inner_states(system: Any, states: wp.array) -> wp.array | None:
    """Return room for the states within each step, where a simulator has such and wants them back."""
    count = getattr(system, "inner_states", 0)
    if not count:
        return None
    rows, batch, size = states.shape
    return wp.empty((rows - 1, count, batch, size), dtype=states.dtype, device=states.device)


def _stepper(
    system: Simulator, states: wp.array, controls: wp.array, parameters: wp.array | None, inner: wp.array | None
) -> Callable[[int], None]:
    """Return a function that takes time step n; on a CPU it is a recorded launch, with little Python in it."""
    if inner is not None:
        stepping: Any = system
        return lambda n: stepping.step(states[n], controls[n], states[n + 1], inner=inner[n])
    if not isinstance(system, System) or not wp.get_device(states.device).is_cpu:
        own = () if parameters is None else (parameters,)
        return lambda n: system.step(states[n], controls[n], states[n + 1], *own)
    kernel, blocks = native_kernels.steps_kernel(system.structure, states.dtype), -(-states.shape[1] // SAMPLES)
    inputs = [states, controls, parameters, 0, 1]
    launch = wp.launch(kernel, blocks, inputs, device="cpu", record_tape=False, record_cmd=True)

    def advance(n: int) -> None:
        launch.set_param_at_index(3, n)
        launch.launch()

    return advance


def flow_gates(flows: Sequence[Flow], steps: int) -> np.ndarray:
    """Return α and β of all flows and steps, shape (flows, steps, 2)."""
    return np.stack([flow.gates(steps) for flow in flows])


def check_gates(flows: Sequence[Flow], steps: int) -> None:
    """Raise a ValueError if a flow's gates are given for another number of steps."""
    for flow in flows:
        flow.check(steps)


def all_gates(flows: Sequence[Flow], steps: int, batch: int, system: Any) -> np.ndarray:
    """Return the gates of all flows as kernels take them, see `kernels.sweep_kernel`.

    Shape (flows, steps, 2); where a system's rows hold more than its state, or gates are those of single samples or
    components, or limited, (flows, steps, N), see `flow_gates`.

    Raises:
        ValueError: Gates are given for other numbers of steps, samples or components.
    """
    size, _ = row_sizes(system)
    twice = getattr(system, "stands_twice", False)
    if size == system.state_size and not twice and all(flow.is_plain for flow in flows):
        return flow_gates(flows, steps)
    rows = [flow.all_gates(steps, batch, size // 2 if twice else size) for flow in flows]
    rows = list(map(gates_of_rows, rows)) if twice else rows
    samples = max(row.shape[1] for row in rows)
    return np.stack([np.broadcast_to(row, (steps, samples, row.shape[2])).reshape(steps, -1) for row in rows])


def open_gates(gates: np.ndarray, system: Any, want_inputs: bool) -> np.ndarray:
    """Return at which steps of which flows adjoints go back through the controller, shape (flows, steps)."""
    if not are_single(gates):
        return gates[:, :, 1] != 0.0
    own, remembering = row_sizes(system)
    records = gates.reshape(*gates.shape[:2], -1, 2 * own + 2)
    controller = records[..., own : 2 * own + (remembering > own)]
    return want_inputs | (controller != 0.0).any(axis=(2, 3))


def parallel_in_time(controller: Controller, trajectory: Trajectory, is_open: np.ndarray) -> bool:
    """Whether to form the controller's Jacobians, or to pull adjoints through it step by step.

    The Jacobians cost one backward pass per control component over all rows, chunk by chunk; walking costs an
    evaluation of each step, and a pass for each flow whose gate is open there. Both give the same numbers but for
    rounding. So the choice is made by counts, at costs that were measured once, and by no timing: the same rollout has
    the same bits each time.
    """
    steps, batch, controls = trajectory.controls.shape
    step = batch * (controller.multiply_adds + ROW_COST)
    chunks = steps * batch / min(CHUNK_ROWS, max(1, CHUNK_ROWS // batch) * batch)
    jacobians = controls * (steps * step + chunks * PASS_COST)
    walk = is_open.any(axis=0).sum() * (step + STEP_COST) + is_open.sum() * (step + PASS_COST)
    return not is_open.any() or bool(jacobians <= walk)


def backward(
    system: Simulator,
    controller: Controller,
    trajectory: Trajectory,
    seeds: Seeds,
    gates: np.ndarray,
    gates_array: wp.array,
    gradients: Sequence[Any],
    workspace: Workspace,
    want_parameters: bool = False,
    want_inputs: bool = False,
    parallel: bool | None = None,
    check: Any = None,
    fused: bool = False,
    whole: bool = False,
    simulator: "Retreat | None" = None,
) -> Adjoints:
    """Run all flows backward; add each flow's update of θ to its entry of `gradients`.

    Args:
        system: The simulator.
        controller: The controller.
        trajectory: What the forward pass left.
        seeds: ∂L/∂x_n and ∂L/∂c_n.
        gates: The flows' gates (`all_gates`), as numpy: which parts of the work are needed at all.
        gates_array: The same on the device: the numbers that the sweep uses.
        gradients: One accumulator per flow, as `Linearisation.contract` takes it.
        workspace: Keeps the intermediate arrays.
        want_parameters: Whether to find the adjoints of the physical parameters.
        want_inputs: Whether to find those of what is given to every step.
        parallel: Whether to linearise in parallel; None decides by `parallel_in_time`.
        check: Called with the linearisation and the stored controls (N, K) of every chunk, if given.
        fused: Whether to run everything in one kernel, where the controller can; else the controller's share in kernels
            of its own, where it has such.
        whole: Whether to linearise the controller at one step of the whole batch at a time, and to pull each flow's
            adjoint through it once, for states and parameters together (`pull_and_contract`).
        simulator: How a simulator that is no `System` is run backward, see `Retreat`; in the simplest way if None.

    Returns:
        The adjoints of x_0, of the physical parameters and of the inputs, where these are wanted.
    """
    steps, batch, _ = trajectory.controls.shape
    flows = len(gates)
    real, device = trajectory.states.dtype, trajectory.states.device
    lam = workspace.array("lambda", (flows, batch, trajectory.states.shape[2]), real, device)
    adj_p = None
    if want_parameters:
        count = len(system.parameter_names)  # type: ignore[attr-defined]
        adj_p = workspace.array("adj_p", (flows, batch, count), real, device)
    adj_inputs = None
    if want_inputs:
        shape = (flows, steps, batch, system.state_size - system.written_size)  # type: ignore[attr-defined]
        adj_inputs = workspace.array("adj_inputs", shape, real, device)
    if fused and controller.sweeps(system):
        controller.sweep(system, trajectory, seeds, gates_array, lam, gradients, workspace, adj_p, adj_inputs)
        return Adjoints(lam, adj_p, adj_inputs)
    for f in range(flows):
        wp.copy(lam[f], seeds.states[steps])
    is_open = open_gates(gates, system, want_inputs)
    if parallel is None:
        parallel = not whole and parallel_in_time(controller, trajectory, is_open)
    pass_ = _Pass(
        system, controller, is_open, gates_array, gradients, workspace, parallel, check, whole, simulator, fused
    )
    if adj_p is not None:
        adj_p.zero_()
    # a simulator may have just so many samples
    size = CHUNK_ROWS if isinstance(system, System) and not whole else batch
    for low in range(0, batch, size):
        block = slice(low, min(low + size, batch))
        # one if the samples come in blocks: then rows are contiguous
        length = 1 if whole else max(1, CHUNK_ROWS // batch)
        for last in range(steps, 0, -length):
            pass_.chunk(trajectory, seeds, lam, adj_p, adj_inputs, block, range(max(0, last - length), last))
    return Adjoints(lam, adj_p, adj_inputs)


class Retreat:
    """How a simulator is run backward step by step, and whether it is still the one of the forward pass.

    A simulator may compute its step from more than its arguments: a global number, weights that are trained, noise.
    Where those have changed since the forward pass, its vector-Jacobian product is that of another trajectory. A step
    is therefore computed again and compared: at `steps`, or at all of them if that costs nothing, since the simulator's
    `step_vjp` takes the states that it should find as `y`.

    Args:
        system: The simulator.
        steps: At which steps to compare; None stands for all.
        compare: Whether to compare at all: it waits for the device.
        but: Samples that are not compared: others stand in for them.
    """

    def __init__(
        self, system: Simulator, steps: Sequence[int] | None = (), compare: bool = True, but: Sequence[int] = ()
    ):
        self.system, self.steps, self.but = system, steps, list(but)
        self.compares = compare and not isinstance(system, System)  # which computes from its arguments alone
        product = getattr(system, "wrapped", system).step_vjp
        self.takes_result = self.compares and "y" in inspect.signature(product).parameters
        self._spare: wp.array | None = None

    def __call__(
        self, n: int, f: int, x: wp.array, c: wp.array, y: wp.array, arguments: tuple, inner: wp.array | None = None
    ) -> None:
        """Call `step_vjp` for step n and flow f, with all of its other arguments; inner states if there are some.

        Raises:
            NotRepeatable: The simulator finds other next states than y.
        """
        options = {} if inner is None else {"inner": inner}
        if not self.compares or f > 0 or (not self.takes_result and self.steps is not None and n not in self.steps):
            self.product(f, x, c, arguments, options)
            return
        try:
            if self.but:
                y = self._with_own(x, c, y)
            if self.takes_result:
                self.product(f, x, c, arguments, {**options, "y": y})
                return
            self._compare(x, c, y)
        except NotRepeatable as error:
            raise NotRepeatable(f"in time step {n} {error}") from None
        self.product(f, x, c, arguments, options)

    def product(self, f: int, x: wp.array, c: wp.array, arguments: tuple, options: dict[str, Any]) -> None:
        """Call `step_vjp` for flow f."""
        self.system.step_vjp(x, c, *arguments, **options)

    def _compare(self, x: wp.array, c: wp.array, y: wp.array) -> None:
        check_repeated(type(self.system).__name__, self._step(x, c, y).numpy(), y.numpy())

    def _step(self, x: wp.array, c: wp.array, like: wp.array) -> wp.array:
        if self._spare is None:
            self._spare = wp.empty_like(like)
        if hasattr(self.system, "wrapped"):
            wp.copy(self._spare, like)  # a step does not write what is given
        self.system.step(x, c, self._spare)
        return self._spare

    def _with_own(self, x: wp.array, c: wp.array, y: wp.array) -> wp.array:
        """Return the next states with those that the simulator finds now for the samples that are not compared."""
        values = y.numpy().copy()
        values[self.but] = self._step(x, c, y).numpy()[self.but]
        return wp.array(values, dtype=y.dtype, device=y.device)


class _Pass:
    """One backward pass: what its chunks share."""

    def __init__(
        self, system, controller, is_open, gates_array, gradients, workspace, parallel, check, whole, simulator, fused
    ):  # fmt: skip
        self.whole, self.simulator, self.fused = whole, simulator or Retreat(system), fused
        self.system, self.controller, self.gradients, self.workspace = system, controller, gradients, workspace
        self.is_open, self.gates_array, self.flows = is_open, gates_array, len(is_open)
        self.single = are_single(gates_array)
        self.parallel, self.check = parallel, check

    def chunk(
        self, trajectory: Trajectory, seeds: Seeds, lam: wp.array, adj_p, adj_inputs, block: slice, steps: range
    ) -> None:
        """Linearise, sweep and contract `steps` of the samples `block`; advance lam, shape (flows, batch, D)."""
        span = slice(steps.start, steps.stop)
        # a block that is not the whole batch has one time step a chunk, so its rows are contiguous either way
        states, controls = _part(trajectory.states, span, block), _part(trajectory.controls, span, block)
        rows = states.shape[0] * states.shape[1]
        linear = self.controller.linearise(_flat(states, rows), self.workspace, self.fused)
        if self.check is not None:
            self.check(linear, _flat(controls, rows))
        mu = self._array("mu", (self.flows, *controls.shape), controls)
        p = trajectory.parameters
        local = Trajectory(states, controls, p if p is None or len(p) == 1 else p[block])
        local_seeds = Seeds(_part(seeds.states, span, block), _part(seeds.controls, span, block))
        everyone = slice(0, len(lam))
        own = _part(lam, everyone, block)
        own_p = None if adj_p is None else _part(adj_p, everyone, block)
        own_inputs = None if adj_inputs is None else adj_inputs[:, span, block]
        gates = self._gates_of(block, trajectory.states.shape[1])
        jacobian = self._jacobian(local, linear, steps) if self.parallel else None
        if jacobian is not None and isinstance(self.system, System):
            self._sweep(local, local_seeds, jacobian, own, mu, own_p, own_inputs, gates, steps)
        else:
            following = _part(trajectory.states, slice(steps.start + 1, steps.stop + 1), block)
            kept = trajectory.kept if getattr(self.system, "inner_states", 0) else None
            inner = None if kept is None else kept[span]
            behind = following, inner
            self._walk(local, local_seeds, behind, linear, jacobian, own, mu, own_p, own_inputs, gates, steps)
        if not self.whole:
            linear.contract(mu.reshape((self.flows, rows, mu.shape[3])), self.gradients)

    def _gates_of(self, block: slice, batch: int) -> wp.array:
        """Return the gates of a block of samples, where each has its own."""
        gates, (first, last) = self.gates_array, (block.start, block.stop)
        width = 2 * row_sizes(self.system)[0] + 2
        if not self.single or gates.shape[2] == width or last - first == batch:
            return gates
        return gates[:, :, first * width : last * width]

    def _jacobian(self, local: Trajectory, linear: Linearisation, steps: range) -> wp.array:
        """Return the controller's Jacobians at a chunk's rows, shape (steps, batch, K, D); empty where none is needed.

        It is at hand until the next chunk.
        """
        count, batch, size = local.controls.shape
        columns = local.states.shape[2]
        if not self.is_open[:, steps.start : steps.stop].any():
            return self._array("jacobian", (0, 0, 0, 0), local.states)
        jacobian = self._array("jacobian", (count, batch, size, columns), local.states)
        linear.jacobian(jacobian.reshape((count * batch, size, columns)))
        return jacobian

    def _sweep(
        self, local: Trajectory, seeds: Seeds, jacobian: wp.array, lam, mu, adj_p, adj_inputs, gates, steps: range
    ) -> None:
        """Phase 2 in one launch for all flows."""
        count, batch, _ = local.controls.shape
        real, device, states = lam.dtype, lam.device, local.states
        struct = self.system.types(real).Parameters
        shape = (self.flows, count, batch) if adj_p is not None else (0, 0, 0)
        per_step = self._array("adj_p per step", (*shape, len(self.system.parameter_names)), states)
        inputs = [states, local.controls, local.parameters, jacobian, seeds.states, seeds.controls, gates]
        inputs += [steps.start, count, lam]
        no_inputs = self._array("no adj_inputs", (0, 0, 0, 0), states) if adj_inputs is None else adj_inputs
        outputs = [mu, as_structs(per_step, struct), no_inputs]
        kernel = kernels.sweep_kernel(self.system.structure, real, self.single)
        dim = (self.flows, batch)
        wp.launch(kernel, dim=dim, inputs=inputs, outputs=outputs, device=device, record_tape=False)
        if adj_p is not None:
            kernel, inputs = row_kernels.sum_over_time_kernel(real), [per_step, adj_p]
            wp.launch(kernel, dim=adj_p.shape, inputs=inputs, device=device, record_tape=False)

    def _walk(
        self, local: Trajectory, seeds: Seeds, behind: tuple[wp.array, wp.array | None], linear: Linearisation,
        jacobian: wp.array | None, lam, mu, adj_p, adj_inputs, gates: wp.array, steps: range,
    ) -> None:  # fmt: skip
        """Phase 2 step by step, through the two verbs of a `Simulator` and the controller's own pull, or its Jacobians.

        `behind` are the states behind each step and those within it, `linear` is the controller at all of them.
        A simulator that `takes_flows` is given the adjoints of all flows at once.
        """
        following, inner = behind
        flows, batch, _ = lam.shape
        real, device = lam.dtype, lam.device
        dx, pulled = self._array("dx", lam.shape, lam), self._array("pulled", lam.shape, lam)
        dc = self._array("dc", (flows, batch, mu.shape[3]), lam)
        extra = None
        if adj_p is not None:
            extra = self._array("adj_p of a step", (batch, adj_p.shape[2]), lam)
        launch = functools.partial(wp.launch, device=device, record_tape=False)
        add_rows, sum_rows = row_kernels.add_rows_kernel(real), row_kernels.sum_rows_kernel(real)
        if self.single:
            gate_single = row_kernels.gate_single_kernel(*row_sizes(self.system), lam.shape[2], real)
            no_inputs = self._array("no adj_inputs of a step", (0, 0, 0), lam)
        pull_rows = row_kernels.pull_rows_kernel(real)
        gate_rows, own_p = row_kernels.gate_rows_kernel(real), [] if adj_p is None else [adj_p[f] for f in range(flows)]
        arguments: tuple = ()
        if local.parameters is not None:
            structs = None if extra is None else as_structs(extra, self.system.types(real).Parameters)
            arguments = local.parameters, structs
        found = [(lam[f], dx[f], dc[f], *arguments) for f in range(flows)]
        together = getattr(self.system, "takes_flows", False)
        for n in reversed(range(len(steps))):
            x, c, at = local.states[n], local.controls[n], steps.start + n
            y, own_inner = following[n], None if inner is None else inner[n]
            if together:
                self.simulator(at, 0, x, c, y, (lam, dx, dc), own_inner)
            for f in range(flows):
                if not together:
                    self.simulator(at, f, x, c, y, found[f], own_inner)
                if extra is not None:
                    launch(add_rows, dim=extra.shape, inputs=[extra, own_p[f]])
                launch(sum_rows, dim=(batch, mu.shape[3]), inputs=[found[f][2], seeds.controls[n], mu[f, n]])
            if jacobian is None:
                self._pull(linear if len(steps) == 1 else None, x, mu[:, n], pulled, self.is_open[:, at])
            elif len(jacobian):
                launch(pull_rows, dim=lam.shape, inputs=[jacobian[n], mu[:, n], pulled])
            inputs = [dx, pulled, seeds.states[n], gates, at, lam]
            if self.single:
                given = no_inputs if adj_inputs is None else adj_inputs[:, n]
                launch(gate_single, dim=(flows, batch), inputs=[*inputs, given])
            else:
                launch(gate_rows, dim=lam.shape, inputs=inputs)

    def _pull(self, linear: Any, x: wp.array, mu: wp.array, pulled: wp.array, is_open: np.ndarray) -> None:
        """Pull the adjoints mu (flows, batch, K) of one step's controls through the controller where its gate is open.

        The controller is linearised at x anew, unless `linear` is just that.
        """
        if self.whole:
            linear.pull_and_contract(mu, pulled, self.gradients, is_open.tolist())
            return
        for f in np.flatnonzero(is_open).tolist():
            linear = linear or self.controller.linearise(x, self.workspace, self.fused)
            linear.pull(mu[f], pulled[f])

    def _array(self, name: str, shape: Sequence[int], like: wp.array) -> wp.array:
        return self.workspace.array(name, shape, like.dtype, like.device)


def _part(array: wp.array, span: slice, block: slice) -> wp.array:
    """Return array[span, block]; where that is all of it, the array itself, for a slice costs as much as a launch."""
    if (span.start, span.stop, block.start, block.stop) == (0, array.shape[0], 0, array.shape[1]):
        return array
    return array[span, block]


def _flat(array: wp.array, rows: int) -> wp.array:
    """Return an array (steps, batch, columns) as rows (steps · batch, columns), without a copy."""
    if array.is_contiguous:
        return array.reshape((rows, array.shape[-1]))
    return array[0]  # a single time step of a block of samples
