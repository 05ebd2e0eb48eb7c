"""How the gradient flows through a torch rollout: feedback, Jacobians, agreement of M and R, rotation of updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import warp as wp

from warp_phys.core.checks import check_function, check_seed
from warp_phys.diagnose.diagnostics import Diagnosis, Layer, path_norms, spectra
from warp_phys.diagnose.feedback import StepJacobians, step_jacobians, trace
from warp_phys.diagnose.rotation import Rotation, difference_step, draw_probes, estimate
from warp_phys.engine.layers import Workspace
from warp_phys.engine.phases import Seeds, Trajectory, all_gates, backward
from warp_phys.errors import check_count
from warp_phys.flow import (
    MODIFIED,
    REGULAR,
    Combined,
    Flow,
    FlowLike,
    FlowName,
    agreement,
    combine,
    cosine,
    linear_parts,
    norm,
    parts_of,
    refuse_memory,
    refuse_whole,
    resolve_all,
)
from warp_phys.interop.torch.combine import places_of, size_of, split
from warp_phys.interop.torch.contract import PassCheck
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.hybrid import Hybrid
from warp_phys.interop.torch.loss import rows_of_parameters, torch_stream
from warp_phys.interop.torch.rollout import Rollout
from warp_phys.systems.base import System
from warp_phys.systems.losses import When

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PUBLISHED: tuple[FlowName, ...] = ("regular", "modified", "stopped", "combined")


def diagnose(
    rollout: Rollout,
    x0: Any,
    flows: FlowLike | Sequence[FlowLike] = PUBLISHED,
    when: When = "final",
    control_cost: float = 0.0,
    loss: Loss | None = None,
    parameters: Mapping[str, Any] | None = None,
    samples: int = 8,
    probes: int = 0,
    seed: int = 0,
    inputs: Any = None,
    memory: Any = None,
) -> Diagnosis:
    """Return how feedback travels back through a rollout, for any flows, from one forward pass.

    Nothing that training uses is touched: no gradient, no sum behind one, no report. `print` shows the result as a
    table that ends in words: whether R explodes, and through which path.

    Args:
        rollout: The rollout; its own flow does not matter.
        x0: Initial states, shape (batch, D): torch, numpy or any DLPack array.
        flows: A flow or several; R and M are added if they are not among them.
        when: As in `System.loss`.
        control_cost: As in `System.loss`.
        loss: A function of states and controls that takes the place of `System.loss`.
        parameters: Physical parameters by name, a number or one per sample each.
        samples: For how many samples the Jacobians are formed, the first ones: steps · D² numbers each.
        probes: If not 0, the rotation of the updates is estimated as well, with 2 further unrollings per probe; see
            `rotation`.
        seed: Seed of the probes.
        inputs: What controller and system are given at every step, as for a call of the rollout.
        memory: What the controller remembers at first, likewise. Feedback is measured in state and memory together.

    Returns:
        The measures, without those samples that diverged if the rollout masks them.

    Raises:
        TypeError, ValueError: Arguments that do not fit, as a call of the rollout and `System.loss` raise them.
        Diverged: A state is not finite, and the rollout's `on_divergence` is "raise".
    """
    _check(rollout, loss, seed)
    _refuse_hybrid(rollout)
    wanted = _flows(flows)
    wanted += tuple(flow for flow in (REGULAR, MODIFIED) if flow not in wanted)
    plain, count = parts_of(wanted), check_count("samples", samples)
    probes = check_count("probes", probes, 0)
    objective = _objective(rollout, when, control_cost, loss, parameters, inputs)
    unrolled = _unroll(rollout, x0, objective, parameters, (inputs, memory))
    with torch_stream(rollout.device), torch.autocast(rollout.device.type, enabled=False):
        updates = _updates(rollout, unrolled, plain)
        place = rollout._inner, rollout._adapter, unrolled.trajectory
        feedback = trace(*place, unrolled.seeds, plain)
        measured = spectra(step_jacobians(*place, count))
        combined = _combined(updates, plain, wanted)
        contributions = _contributions(
            rollout, unrolled.trajectory, feedback.controls, updates, combined, plain, wanted
        )
    turning: Mapping[str, Rotation] = {}
    if probes:
        turning = rotation(
            rollout, x0, wanted, when, control_cost, loss, parameters, probes, seed, None, inputs, memory
        )
    return Diagnosis(
        _title(rollout, unrolled, f"loss at {when}" if loss is None else "a loss of its own"), wanted, unrolled.loss,
        *path_norms(feedback, plain, wanted), measured, contributions,
        _layers(rollout, combined, wanted), turning,
    )  # fmt: skip


def rotation(
    rollout: Rollout,
    x0: Any,
    flows: FlowLike | Sequence[FlowLike] = PUBLISHED,
    when: When = "final",
    control_cost: float = 0.0,
    loss: Loss | None = None,
    parameters: Mapping[str, Any] | None = None,
    probes: int = 16,
    seed: int = 0,
    step: float | None = None,
    inputs: Any = None,
    memory: Any = None,
) -> dict[str, Rotation]:
    """Return the rotation of the flows' updates as fields over θ, the trained parameters of the controller.

    The products of a field's Jacobian with random probes are central differences of its update, all flows together: two
    unrollings per probe. Where the simulator is a `System` they are computed in float64 on a copy of the controller,
    whatever its precision. A combined field is differentiated by the chain rule, its rule exactly, so that components
    that change between kept and cut make no jump. R is a gradient field: what is found for it is the error of the
    differences.

    Args:
        rollout: The rollout; it and its controller are left as they are.
        x0: As in `diagnose`.
        flows: A flow or several.
        when: As in `System.loss`.
        control_cost: As in `System.loss`.
        loss: A function of states and controls that takes the place of `System.loss`.
        parameters: As in `diagnose`.
        probes: Number of probes, at least 3; as many as there are parameters form the Jacobian itself.
        seed: Seed of the probes.
        step: Distance of the differences to either side in θ; see `warp_phys.diagnose.rotation.difference_step`.
        inputs: As in `diagnose`.
        memory: As in `diagnose`.

    Returns:
        A `Rotation` by the flow's name.

    Raises:
        TypeError, ValueError: As in `diagnose`; a controller without trained parameters.
        Diverged: As in `diagnose`.
    """
    _check(rollout, loss, seed)
    _refuse_hybrid(rollout)
    wanted, plain = _flows(flows), parts_of(_flows(flows))
    if not wanted:
        raise ValueError("flows must name at least one flow, got none")
    rollout._given(rollout.initial_states(x0), inputs, memory)
    own = _apart(rollout)
    trained = own._adapter.trainable
    if not trained:
        raise ValueError("controller must have parameters that require gradients, it has none")
    start = x0 if isinstance(x0, np.ndarray) else rollout.initial_states(x0).to(own.dtype)
    beside = [None if a is None else rollout.as_tensor(a).to(own.dtype) for a in (inputs, memory)]
    objective = _objective(own, when, control_cost, loss, parameters, inputs)
    theta = torch.cat([p.detach().flatten() for p in trained])

    def updates(point: torch.Tensor) -> torch.Tensor:
        for parameter, part in zip(trained, split(point, trained), strict=True):
            parameter.data.copy_(part)
        with torch_stream(own.device), torch.autocast(own.device.type, enabled=False):
            return _updates(own, _unroll(own, start, objective, parameters, beside), plain)

    directions = draw_probes(len(theta), probes, seed)
    slopes = _slopes(updates(theta), plain, wanted)
    distance = difference_step(theta.double().cpu().numpy(), step, torch.finfo(own.dtype).eps)
    products = []
    for direction in directions:
        v = torch.as_tensor(direction, dtype=own.dtype, device=own.device)
        h = distance / float(v.norm())
        change = (updates(theta + h * v) - updates(theta - h * v)) / (2.0 * h)
        products.append((slopes * change).sum(dim=1).double().cpu().numpy())
    found = [estimate(directions, rows) for rows in np.stack(products, axis=1)]
    return {flow.name: one for flow, one in zip(wanted, found, strict=True)}


def jacobians(
    rollout: Rollout,
    x0: Any,
    parameters: Mapping[str, Any] | None = None,
    samples: int | None = None,
    inputs: Any = None,
    memory: Any = None,
) -> StepJacobians:
    """Return the Jacobians of every step of an unrolling: of the simulator, of the controller, of the closed loop.

    Args:
        rollout: The rollout.
        x0: As in `diagnose`.
        parameters: As in `diagnose`.
        samples: For how many samples, the first ones; all if None.
        inputs: As in `diagnose`.
        memory: As in `diagnose`: then states are [x | h], controls [c | h'].

    Returns:
        Numpy arrays in the precision of the rollout, without samples that diverged if the rollout masks them. Those of
        a long unrolling serve all shorter ones, see `warp_phys.diagnose.feedback.retrace`.

    Raises:
        TypeError, ValueError: As a call of the rollout does.
        Diverged: A state is not finite, and the rollout's `on_divergence` is "raise".
    """
    _check(rollout, None, 0)
    _refuse_hybrid(rollout)
    count = None if samples is None else check_count("samples", samples)
    trajectory = _unroll(rollout, x0, None, parameters, (inputs, memory)).trajectory
    with torch_stream(rollout.device), torch.autocast(rollout.device.type, enabled=False):
        return step_jacobians(rollout._inner, rollout._adapter, trajectory, count)


class _Unrolled(NamedTuple):
    """One forward pass and the explicit derivatives of its loss, without samples that were masked."""

    trajectory: Trajectory
    seeds: Seeds
    loss: float


def _check(rollout: Any, loss: Any, seed: Any) -> None:
    """Raise a TypeError or ValueError for arguments that are no rollout, no loss, no seed."""
    if not isinstance(rollout, Rollout):
        raise TypeError(f"rollout must be a warp_phys.interop.torch.Rollout, got {type(rollout).__name__}")
    check_function("loss", loss, "states and controls")
    check_seed(seed)


def _flows(flows: FlowLike | Sequence[FlowLike]) -> tuple[Flow | Combined, ...]:
    resolved = tuple(dict.fromkeys(resolve_all(flows)))
    refuse_memory(*resolved)
    refuse_whole("a diagnosis says what each component and each step gives to an update", *resolved)
    return resolved


def _refuse_hybrid(rollout: Rollout) -> None:
    if isinstance(rollout.system, Hybrid):
        raise ValueError(
            "a Hybrid is not diagnosed: which feedback is that of its module is not told from that of the controller. "
            "Its report has the norms of M and R, and their agreement"
        )


def _objective(
    rollout: Rollout, when: Any, control_cost: float, loss: Loss | None, parameters: Any, inputs: Any
) -> Loss:
    """Return the loss as a function of states and controls."""
    if loss is not None:
        return loss
    if not isinstance(rollout.system, System):
        raise ValueError(f"loss must be given, {type(rollout.system).__name__} has none of its own")
    system = rollout.system
    reads = rollout.as_tensor(inputs, "inputs") if system.cost_reads_inputs and inputs is not None else None

    def objective(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
        given = None if reads is None else reads.to(states.dtype)
        return system.loss(states, controls, when, control_cost, parameters, given)

    return objective


def _unroll(
    rollout: Rollout,
    x0: Any,
    objective: Loss | None,
    parameters: Mapping[str, Any] | None,
    beside: Sequence[Any] = (None, None),
) -> _Unrolled:
    """Unroll, and differentiate the loss by the trajectory; without a loss those derivatives are 0."""
    x0 = rollout.initial_states(x0)
    rows = rows_of_parameters(rollout.system, parameters, x0)
    given = rollout._given(x0, *beside)
    found, _ = rollout._look(x0, None, beside=given)
    if found is not None and found.whole:
        raise ValueError(
            "for a diagnosis the rows of a controller must be differentiable apart from each other: this one couples "
            "them, fits one batch size only, or has hooks on its gradients or a backward pass that is not linear"
        )
    states, controls, masked, kept = rollout._forward(x0, rows, keep=True, beside=given)
    value, seeds = torch.zeros(()), (torch.zeros_like(states), torch.zeros_like(controls))
    if objective is not None:
        value, seeds = _derivatives(lambda *rows: objective(*rollout._own_parts(*rows)[:2]), states, controls)
    tensors = [tensor.detach() for tensor in (states, controls, *seeds)]
    if len(masked):
        healthy = [b for b in range(len(x0)) if b not in set(masked.tolist())]
        tensors = [tensor[:, healthy] for tensor in tensors]
        rows = rows if rows is None or len(rows) == 1 else rows[healthy]
    with torch_stream(rollout.device):
        arrays = [as_array(tensor.contiguous()) for tensor in tensors]
        trajectory = Trajectory(arrays[0], arrays[1], rollout._structs(rows, tensors[0]), kept)
    return _Unrolled(trajectory, Seeds(arrays[2], arrays[3]), float(value))


def _derivatives(
    objective: Loss, states: torch.Tensor, controls: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return a loss and its explicit derivatives by states and controls."""
    arguments = states.requires_grad_(), controls.requires_grad_()
    with torch.enable_grad():
        value = objective(*arguments)
        if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
            raise ValueError("loss must be a scalar tensor that depends on the states or the controls")
        by_states, by_controls = torch.autograd.grad(value, arguments, allow_unused=True, materialize_grads=True)
    return value.detach(), (by_states, by_controls)


def _updates(rollout: Rollout, unrolled: _Unrolled, plain: Sequence[Flow]) -> torch.Tensor:
    """Return the updates of plain flows as training finds them, shape (flows, parameters)."""
    steps, batch, _ = unrolled.trajectory.controls.shape
    gates = all_gates(plain, steps, batch, rollout._inner)
    gates_array = wp.array(gates, dtype=unrolled.trajectory.states.dtype, device=unrolled.trajectory.states.device)
    updates = torch.zeros((len(plain), size_of(rollout._adapter.trainable)), dtype=rollout.dtype, device=rollout.device)
    backward(
        rollout._inner, rollout._adapter, unrolled.trajectory, unrolled.seeds, gates, gates_array, list(updates),
        Workspace(), check=PassCheck(), fused=rollout.backend == "fused",
    )  # fmt: skip
    if rollout.reduce is not None:
        rollout.reduce(updates)
    return updates


def _combined(updates: torch.Tensor, plain: Sequence[Flow], flows: Sequence[Flow | Combined]) -> torch.Tensor:
    """Return the updates of all flows from those of the plain ones, shape (flows, parameters)."""
    rows = []
    for flow in flows:
        rows.append(combine(flow, [updates[plain.index(part)] for part in linear_parts(flow)]))
    return torch.stack(rows)


def _slopes(base: torch.Tensor, plain: Sequence[Flow], flows: Sequence[Flow | Combined]) -> torch.Tensor:
    """Return the derivatives of all flows' updates by those of the plain ones, at the updates `base` (plain, P).

    Rules are elementwise, so they are numbers for each component: shape (flows, plain, P).
    """
    slopes = torch.zeros((len(flows), *base.shape), dtype=base.dtype, device=base.device)
    for slope, flow in zip(slopes, flows, strict=True):
        places = [plain.index(part) for part in linear_parts(flow)]
        if isinstance(flow, Combined):
            parts = [base[i].clone().requires_grad_() for i in places]
            with torch.enable_grad():
                total = flow.apply(*parts).sum()
            for i, grad in zip(places, torch.autograd.grad(total, parts, materialize_grads=True), strict=True):
                slope[i] += grad.nan_to_num(0.0)  # a root at 0, where both updates are 0
        else:
            slope[places[0]] = 1.0
    return slopes


def _contributions(
    rollout: Rollout,
    trajectory: Trajectory,
    mu: np.ndarray,
    updates: torch.Tensor,
    combined: torch.Tensor,
    plain: Sequence[Flow],
    flows: Sequence[Flow | Combined],
) -> np.ndarray | None:
    """Return the norm of what each time step gives to the updates of the flows, shape (flows, steps).

    What a step gives to a combined flow is what it gives to the base flow, times what the rule makes of each component
    of the base flow's sum: so they add up to the combined update.
    """
    if updates.shape[1] == 0:
        return None
    bases = [linear_parts(flow)[0] for flow in flows]
    needed = list(dict.fromkeys(bases))
    places = [needed.index(base) for base in bases]
    adjoints = torch.as_tensor(mu[[plain.index(base) for base in needed]].swapaxes(0, 1), device=updates.device)
    own = updates[[plain.index(base) for base in bases]]
    weights = torch.where(own == 0.0, 0.0, combined / own)
    weights[[not isinstance(flow, Combined) for flow in flows]] = 1.0
    given, norms, workspace = updates.new_zeros((len(needed), updates.shape[1])), [], Workspace()
    for states, adjoint in zip(wp.to_torch(trajectory.states), adjoints, strict=False):
        linear = rollout._adapter.linearise(as_array(states), workspace)
        linear.contract(as_array(adjoint.contiguous()), list(given.zero_()))
        norms.append((given[places] * weights).double().norm(dim=1))
    return torch.stack(norms, dim=1).cpu().numpy()


def _layers(rollout: Rollout, updates: torch.Tensor, flows: Sequence[Flow | Combined]) -> tuple[Layer, ...]:
    """Return M and R of every trained parameter, and of all together."""
    trained = [(name, p) for name, p in rollout.controller.named_parameters() if p.requires_grad]
    if not trained:
        return ()
    rows = updates.double().cpu().numpy()
    out, names = [], [name for name, _ in trained]
    for name, part in zip([*names, "all"], [*places_of(p for _, p in trained), slice(None)], strict=True):
        own = rows[:, part]
        of_modified, of_regular = (own[flows.index(flow)] for flow in (MODIFIED, REGULAR))
        norms = {flow.name: norm(row) for flow, row in zip(flows, own, strict=True)}
        measures = cosine(of_modified, of_regular), agreement(of_modified, of_regular)
        out.append(Layer(name, own.shape[1], *measures, norms))
    return tuple(out)


def _apart(rollout: Rollout) -> Rollout:
    """Return a rollout over a copy of the controller, in float64 where the simulator can."""
    controller = copy.deepcopy(rollout.controller)
    if isinstance(rollout.system, System):
        controller = controller.double()
    backend, reduce = rollout._backend, rollout.reduce
    return type(rollout)(
        rollout.system, controller, rollout.steps, rollout.flow, None, backend, rollout.on_divergence, reduce,
        memory=rollout.memory_size, inputs=rollout._inputs_known,
    )  # fmt: skip


def _title(rollout: Rollout, unrolled: _Unrolled, of_loss: str) -> str:
    steps, batch, _ = unrolled.trajectory.controls.shape
    system, dtype = type(rollout.system).__name__, str(rollout.dtype).removeprefix("torch.")
    return f"{system}, {steps} steps, {batch} samples, {dtype}, {of_loss}"
