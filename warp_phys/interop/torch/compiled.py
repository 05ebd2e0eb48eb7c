"""Rollouts and losses in code that torch compiles: each is one opaque node of its graph.

Outside compiled code `torch.Rollout` and `loss` do the same with less overhead.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from warp_phys.interop.torch.contract import check_repeated_controls
from warp_phys.interop.torch.loss import costs_at, costs_vjp
from warp_phys.interop.torch.node import Sources
from warp_phys.interop.torch.ops import autograd_inside, known_of, system_of
from warp_phys.interop.torch.rows import Beside

_ROLLOUTS: Any = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def name_of_rollout(rollout: Any) -> str:
    """Return a new name for a rollout; it does not keep the rollout alive."""
    name = f"rollout {next(_NUMBERS)}"
    _ROLLOUTS[name] = rollout
    return name


def _rollout_of(name: str) -> Any:
    rollout = _ROLLOUTS.get(name)
    if rollout is None:
        raise RuntimeError("the rollout in compiled code is no more: keep it until the backward pass is done")
    return rollout


@torch.library.custom_op("warp_phys::unroll", mutates_args=())
def unroll(
    x0: torch.Tensor,
    rows: torch.Tensor | None,
    inputs: torch.Tensor | None,
    memory: torch.Tensor | None,
    parameters: Sequence[torch.Tensor],
    frozen: Sequence[torch.Tensor],
    steps: int,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows of states and of controls, and which samples are masked, of a `Rollout` known by a name.

    The parameters are those of its controller, trained and frozen: they are arguments so that torch knows what the
    result depends on, and notices a change between forward and backward.
    """
    rollout, x0 = _rollout_of(name), x0.detach()
    x0 = rollout.initial_states(x0)
    beside = rollout._given(x0, inputs, memory).detach()
    found, trains = None, any(p.requires_grad for p in rollout.trained.parameters())
    if trains:
        with autograd_inside():
            found, sources = rollout._look(x0, None, cut=False, beside=beside)
        if rollout._adapter.examination.others or sources.system:
            raise ValueError(
                "in compiled code controller and system must depend on no tensors that require gradients besides the "
                "controller's own parameters: make them parameters of the module, or leave the rollout out of the "
                "compiled code"
            )
    states, controls, masked, _ = rollout._forward(x0, rows, keep=False, beside=beside)
    if trains:
        with autograd_inside():
            rollout._look_after(found, states[0], controls, masked)
    mask = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    mask[masked] = True
    return states, controls, mask


@unroll.register_fake
def _(x0, rows, inputs, memory, parameters, frozen, steps, name):
    system = _rollout_of(name)._inner
    states = x0.new_empty((steps + 1, x0.shape[0], system.state_size))
    controls = x0.new_empty((steps, x0.shape[0], system.control_size))
    return states, controls, x0.new_empty((x0.shape[0],), dtype=torch.bool)


@torch.library.custom_op("warp_phys::unroll_vjp", mutates_args=())
def _unroll_vjp(
    states: torch.Tensor,
    controls: torch.Tensor,
    mask: torch.Tensor,
    given: Sequence[torch.Tensor | None],
    parameters: Sequence[torch.Tensor],
    frozen: Sequence[torch.Tensor],
    adj_states: torch.Tensor,
    adj_controls: torch.Tensor,
    wanted: Sequence[bool],
    name: str,
) -> list[torch.Tensor]:
    """Return the adjoints of x0 and of what is given, and the update of each parameter.

    Physical parameters' rows, inputs and memory are given; the adjoints of what is not wanted are empty.
    """
    rollout = _rollout_of(name)
    masked, seeds = torch.nonzero(mask).flatten(), (adj_states, adj_controls)
    trainable = rollout._adapter.trainable  # the parameters themselves: the sums of M and R belong to them
    rows, beside = given[0], Beside(*given[1:])
    x0 = states[0, :, : rollout.system.state_size]
    with autograd_inside():
        found, _ = rollout._look(x0, None, cut=False, beside=beside)
        if found is None:  # and no node of autograd's has kept what the forward pass ran
            with torch.autocast(states.device.type, enabled=False):
                check_repeated_controls(rollout._adapter.module, states[0, ~mask], controls[0, ~mask])
        adjoints, grads = rollout._backward(
            states, controls, rows, masked, None, Sources(trainable), seeds, (True, *wanted), found=found, beside=beside
        )
    kept = [a if a is not None and is_wanted else None for a, is_wanted in zip(adjoints, (True, *wanted), strict=True)]
    # an operator returns tensors: a parameter that is not used has a gradient here, of zeros
    pairs = zip(trainable, grads, strict=True)
    updates = [torch.zeros_like(p) if grad is None else grad.clone() for p, grad in pairs]
    return [*(states.new_empty((0, 0)) if a is None else a.clone() for a in kept), *updates]


@_unroll_vjp.register_fake
def _(states, controls, mask, given, parameters, frozen, adj_states, adj_controls, wanted, name):
    x0 = states.new_empty((states.shape[1], _rollout_of(name).system.state_size))
    pairs = zip(given, wanted, strict=True)
    adjoints = (t.new_empty(t.shape) if is_wanted else states.new_empty((0, 0)) for t, is_wanted in pairs)
    return [x0, *adjoints, *(p.new_empty(p.shape) for p in parameters)]


def _keep_unrolling(ctx, inputs, output):
    _, *given, parameters, frozen, _, ctx.name = inputs
    ctx.trained = len(parameters)
    ctx.save_for_backward(*output, *given, *parameters, *frozen)


def _pull_unrolling(ctx, adj_states, adj_controls, _adj_mask):
    states, controls, mask, *given = ctx.saved_tensors
    given, parameters = given[:3], given[3:]
    parameters, frozen = parameters[: ctx.trained], parameters[ctx.trained :]
    wanted = [t is not None and needed for t, needed in zip(given, ctx.needs_input_grad[1:4], strict=True)]
    seeds = (
        torch.zeros_like(like) if adj is None else adj for adj, like in ((adj_states, states), (adj_controls, controls))
    )
    adj_x0, *found = torch.ops.warp_phys.unroll_vjp(
        states, controls, mask, given, parameters, frozen, *seeds, wanted, ctx.name
    )
    own = [adjoint if is_wanted else None for adjoint, is_wanted in zip(found, wanted, strict=False)]
    return adj_x0, *own, found[3:], [None] * len(frozen), None, None


unroll.register_autograd(_pull_unrolling, setup_context=_keep_unrolling)


@torch.library.custom_op("warp_phys::cost", mutates_args=())
def cost(states: torch.Tensor, rows: torch.Tensor | None, times: Sequence[int], name: str) -> torch.Tensor:
    """Return the pointwise cost of a system known by a name, at chosen times, shape (times, batch)."""
    return costs_at(system_of(name), states, tuple(times), rows)


@cost.register_fake
def _(states, rows, times, name):
    return states.new_empty((len(times), states.shape[1]))


@torch.library.custom_op("warp_phys::cost_vjp", mutates_args=())
def _cost_vjp(
    states: torch.Tensor,
    rows: torch.Tensor | None,
    times: Sequence[int],
    adj_costs: torch.Tensor,
    want_rows: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the adjoints of the states and of the rows; of no rows if they are not wanted."""
    adj_states, adj_rows = costs_vjp(system_of(name), states, tuple(times), rows, adj_costs, want_rows)
    return adj_states, states.new_empty((0, 0)) if adj_rows is None else adj_rows


@_cost_vjp.register_fake
def _(states, rows, times, adj_costs, want_rows, name):
    return states.new_empty(states.shape), states.new_empty(rows.shape if want_rows else (0, 0))


def _keep_cost(ctx, inputs, output):
    states, rows, ctx.times, ctx.name = inputs
    ctx.known = known_of(ctx.name)
    ctx.save_for_backward(states, rows)


def _pull_cost(ctx, adj_costs):
    states, rows = ctx.saved_tensors
    want_rows = rows is not None and ctx.needs_input_grad[1]
    product = torch.ops.warp_phys.cost_vjp
    adj_states, adj_rows = product(states, rows, ctx.times, adj_costs, want_rows, ctx.name)
    return adj_states, adj_rows if want_rows else None, None, None


cost.register_autograd(_pull_cost, setup_context=_keep_cost)
