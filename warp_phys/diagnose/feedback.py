"""What travels back in time: the adjoints of every step by the path they arrive on, and the Jacobians of every step.

Found from a stored trajectory through the two verbs of a `Simulator` and the linearised controller, nothing by
differences. Results are numpy arrays. `warp_phys.diagnose.diagnostics` makes figures of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type
from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import CHUNK_ROWS, Controller, Seeds, Trajectory
from warp_phys.flow import Flow
from warp_phys.systems.base import Simulator, System
from warp_phys.systems.extended import row_sizes


class Feedback(NamedTuple):
    """The adjoints of all steps, λ_n = ∂L/∂x_n + physics_n + controller_n, in the precision of the trajectory."""

    adjoints: np.ndarray
    """λ_0 … λ_T, shape (flows, steps + 1, batch, D)."""
    physics: np.ndarray
    """What reaches λ_n through the simulator, α_n (∂S/∂x)ᵀ λ_{n+1}, shape (flows, steps, batch, D)."""
    controller: np.ndarray
    """What reaches λ_n through the controller, β_n (∂N/∂x)ᵀ μ_n, within the flow's limit; of a memory by the gate γ_n.

    Shape (flows, steps, batch, D)."""
    controls: np.ndarray
    """μ_0 … μ_{T−1}, shape (flows, steps, batch, K)."""


class StepJacobians(NamedTuple):
    """Jacobians along a trajectory; the first index of each matrix is the component of what is differentiated."""

    physics: np.ndarray
    """∂S/∂x at a fixed control, shape (steps, samples, D, D)."""
    control: np.ndarray
    """∂S/∂c, shape (steps, samples, D, K)."""
    controller: np.ndarray
    """J = ∂N/∂x, shape (steps, samples, K, D)."""

    @property
    def controller_path(self) -> np.ndarray:
        """(∂S/∂c) J: what a step owes to the controller's looking at the state, shape (steps, samples, D, D)."""
        return self.control @ self.controller

    @property
    def closed_loop(self) -> np.ndarray:
        """∂S/∂x + (∂S/∂c) J, the derivative of x_{n+1} by x_n with the controller in the loop; same shape."""
        return self.physics + self.controller_path


def trace(
    system: Simulator, controller: Controller, trajectory: Trajectory, seeds: Seeds, flows: Sequence[Flow]
) -> Feedback:
    """Return the adjoints of all steps for several flows, step by step.

    Args:
        system: The simulator.
        controller: The controller, as `warp_phys.engine.phases` takes it.
        trajectory: What a forward pass left.
        seeds: ∂L/∂x_n and ∂L/∂c_n.
        flows: The flows.
    """
    jacobian = controller_jacobians(controller, trajectory)
    loss_states, loss_controls = seeds.states.numpy(), seeds.controls.numpy()
    sizes = row_sizes(system)
    return _recur(lambda n, adj: _pull(system, trajectory, n, adj), jacobian, loss_states, loss_controls, flows, *sizes)


def retrace(
    jacobians: StepJacobians,
    loss_states: np.ndarray,
    loss_controls: np.ndarray | None,
    flows: Sequence[Flow],
    own: int | None = None,
) -> Feedback:
    """Return the same from Jacobians that are there already: for another loss, other flows, or a shorter horizon.

    The trajectory up to a step does not depend on the horizon, so the Jacobians of a long one serve all shorter ones.

    Args:
        jacobians: Jacobians of at least as many steps.
        loss_states: ∂L/∂x_n, shape (steps + 1, samples, D).
        loss_controls: ∂L/∂c_n, shape (steps, samples, K); zeros if None.
        flows: The flows.
        own: How many of the components are the state, where those behind them are a controller's memory; all if None.
    """
    if loss_controls is None:
        shape = (len(loss_states) - 1, loss_states.shape[1], jacobians.control.shape[3])
        loss_controls = np.zeros(shape, loss_states.dtype)

    def pull(n: int, adj: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = adj[:, :, None, :]
        return (rows @ jacobians.physics[n])[:, :, 0], (rows @ jacobians.control[n])[:, :, 0]

    size = loss_states.shape[2]
    return _recur(pull, jacobians.controller, loss_states, loss_controls, flows, size if own is None else own, size)


def _gates_of(flow: Flow, shape: tuple[int, ...], own: int, remembering: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return α and β for all numbers of rows (steps, batch, size), zero for what is given; and the limit."""
    steps, batch, size = shape
    record = flow.all_gates(steps, batch, own)
    alpha, beta = np.zeros((2, steps, record.shape[1], size))
    alpha[:, :, :own], beta[:, :, :own] = record[:, :, :own], record[:, :, own : 2 * own]
    alpha[:, :, own:remembering], beta[:, :, own:remembering] = 1.0, record[:, :, -2:-1]
    return alpha, beta, flow.limit


def _opened(gates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values times gates; a gate of zero is a cut: what lies behind it may be infinite."""
    return np.where(gates == 0.0, 0.0, gates * values)


def _limited(physics: np.ndarray, controller: np.ndarray, limit: float) -> np.ndarray:
    """Return by how much the controller's feedback (batch, D) is scaled down, (batch, 1); 0 where it is not finite."""
    bound, length = (np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True) for part in (physics, controller))
    scale = np.where(length > limit * bound, limit * bound / np.where(length > 0.0, length, 1.0), 1.0)
    return np.where(np.isfinite(controller).all(axis=1, keepdims=True) & (limit > 0.0), scale, 0.0)


def _recur(
    pull: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
    jacobian: np.ndarray,
    loss_states: np.ndarray,
    loss_controls: np.ndarray,
    flows: Sequence[Flow],
    own: int,
    remembering: int,
) -> Feedback:
    """Run n = T − 1 … 0; `pull` gives (∂S/∂x)ᵀ λ and (∂S/∂c)ᵀ λ at step n for λ of shape (flows, batch, D)."""
    steps, real = len(loss_controls), loss_states.dtype
    gates = [_gates_of(flow, (steps, *loss_states.shape[1:]), own, remembering) for flow in flows]
    shape = (len(flows), steps, *loss_states.shape[1:])
    physics, controller = np.zeros(shape, real), np.zeros(shape, real)
    adjoints, controls = np.zeros((len(flows), *loss_states.shape), real), []
    adjoints[:, steps] = loss_states[steps]
    with np.errstate(over="ignore", invalid="ignore"):
        for n in reversed(range(steps)):
            dx, dc = pull(n, adjoints[:, n + 1])
            mu = dc + loss_controls[n]
            pulled = (mu[:, :, None, :] @ jacobian[n])[:, :, 0]
            for f, (alpha, beta, limit) in enumerate(gates):
                physics[f, n], controller[f, n] = _opened(alpha[n], dx[f]), _opened(beta[n], pulled[f])
                if limit is not None:
                    scale = _limited(physics[f, n, :, :own], controller[f, n, :, :own], limit)
                    controller[f, n, :, :own] = _opened(scale, controller[f, n, :, :own])
            adjoints[:, n] = loss_states[n] + physics[:, n] + controller[:, n]
            controls.append(mu)
    return Feedback(adjoints, physics, controller, np.stack(controls[::-1], axis=1))


def step_jacobians(
    system: Simulator, controller: Controller, trajectory: Trajectory, samples: int | None = None
) -> StepJacobians:
    """Return the Jacobians of every step, for the first samples: one launch over D rows per sample for every step.

    Args:
        system: The simulator.
        controller: The controller.
        trajectory: What a forward pass left.
        samples: For how many samples of the batch; all if None.
    """
    steps, batch, _ = trajectory.controls.shape
    count = batch if samples is None else min(samples, batch)
    if isinstance(system, System):  # any other simulator may be made for one batch size
        trajectory = first_samples(trajectory, count)
    units = np.eye(system.state_size, dtype=numpy_type(trajectory.states.dtype))
    units = np.repeat(units[:, None], trajectory.states.shape[1], axis=1)
    rows = [_pull(system, trajectory, n, units) for n in range(steps)]
    physics, control = (np.stack([row[i] for row in rows]).swapaxes(1, 2)[:, :count] for i in range(2))
    seen = slice(0, row_sizes(system)[1])  # what is given to a step has no part in feedback
    controllers = controller_jacobians(controller, trajectory)[:, :count]
    return StepJacobians(physics[:, :, seen, seen], control[:, :, seen], controllers[:, :, :, seen])


def first_samples(trajectory: Trajectory, count: int) -> Trajectory:
    """Return the first samples of a trajectory, as arrays of their own."""
    if count == trajectory.states.shape[1]:
        return trajectory
    states, controls = (array[:, :count].contiguous() for array in trajectory[:2])
    p = trajectory.parameters
    return Trajectory(states, controls, p if p is None or len(p) == 1 else p[:count])


def controller_jacobians(controller: Controller, trajectory: Trajectory) -> np.ndarray:
    """Return J = ∂N/∂x at x_0 … x_{T−1}, shape (steps, batch, K, D), in chunks of rows."""
    states, (steps, batch, controls), size = trajectory.states, trajectory.controls.shape, trajectory.states.shape[2]
    length, parts = max(1, CHUNK_ROWS // batch), []
    for first in range(0, steps, length):
        chunk = states[first : min(first + length, steps)]
        rows = chunk.shape[0] * batch
        linear = controller.linearise(chunk.reshape((rows, size)), Workspace())
        out = wp.zeros((rows, controls, size), dtype=states.dtype, device=states.device)
        linear.jacobian(out)
        parts.append(out.numpy().reshape(chunk.shape[0], batch, controls, size))
    return np.concatenate(parts)


def _pull(system: Simulator, trajectory: Trajectory, n: int, adj: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (∂S/∂x)ᵀ adj and (∂S/∂c)ᵀ adj at step n for adjoints (count, batch, D), shapes (count, batch, D or K)."""
    p = trajectory.parameters
    if isinstance(system, System) and (p is None or len(p) == 1):
        return _pull_together(system, trajectory, n, adj)
    # one batch at a time: its parameters, or the simulator itself, may be made for that size
    parts = [_pull_together(system, trajectory, n, one[None]) for one in adj]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _pull_together(system: Simulator, trajectory: Trajectory, n: int, adj: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, batch, size = adj.shape
    real, device = trajectory.states.dtype, trajectory.states.device

    def rows(values: np.ndarray) -> wp.array:
        return wp.array(np.ascontiguousarray(values), dtype=real, device=device)

    x, c = (rows(np.tile(array[n].numpy(), (count, 1))) for array in trajectory[:2])
    adj_x, adj_c = wp.zeros_like(x), wp.zeros_like(c)
    own = () if trajectory.parameters is None else (trajectory.parameters,)
    system.step_vjp(x, c, rows(adj.reshape(-1, size)), adj_x, adj_c, *own)
    return adj_x.numpy().reshape(adj.shape), adj_c.numpy().reshape(count, batch, -1)
