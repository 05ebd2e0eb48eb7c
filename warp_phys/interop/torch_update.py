"""A whole update in one call: forward, loss, backward, combination, clipping and a step of Adam, without autograd."""

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import warp as wp
from torch.optim import optimizer as optimisers

from warp_phys.errors import check_choice
from warp_phys.flow import Combined
from warp_phys.interop.torch_dense import as_array
from warp_phys.interop.torch_direct import DirectPass
from warp_phys.interop.torch_rollout import Rollout
from warp_phys.systems.losses import chosen_times
from warp_phys.update_kernels import CLIPPING, GROUP, RULES, TENSOR, finish_kernel


class Update:
    """A minibatch's update of a rollout's controller: `update(x0)` returns the loss and takes the optimiser's step.

    It does what `rollout.value_and_grad`, clipping and `optimiser.step()` do one after the other, and leaves what they
    leave: weights, the optimiser's state, the clipped update in the `.grad` of the parameters, `rollout.report`. Where
    the fused backend runs on a CPU, the flow's rule is one of the engine's and the optimiser is a plain `Adam` or
    `AdamW` over the controller's parameters, all of it is a handful of recorded launches, which read and write the
    optimiser's own tensors. Learning rates may change from call to call.

    Two threads must not be in updates of one rollout at the same time.

    Args:
        rollout: The rollout; its flow, steps and `observe` may change from call to call.
        optimiser: Any optimiser of the controller's parameters.
        when: "final", "every", or the chosen steps, see `System.loss`.
        control_cost: Factor of the mean squared control.
        clip: "none"; "value" clips each component of the update to [−clip_at, clip_at], "norm" the norm of all.
        clip_at: The limit.

    Raises:
        TypeError, ValueError: Arguments that do not fit.

    >>> from warp_phys import CartPole
    >>> nn, system = torch.nn, CartPole(poles=1)
    >>> module = nn.Sequential(nn.Linear(system.state_size, 8), nn.Tanh(), nn.Linear(8, system.control_size))
    >>> update = Update(Rollout(system, module, steps=10), torch.optim.Adam(module.parameters()))
    >>> losses = [update(system.sample(4, seed=0)) for _ in range(2)]
    >>> bool(losses[1] < losses[0]), update.is_recorded
    (True, True)
    """

    def __init__(
        self,
        rollout: Rollout,
        optimiser: torch.optim.Optimizer,
        when: str | Sequence[int] = "final",
        control_cost: float = 0.0,
        clip: str = "none",
        clip_at: float = 1.0,
    ):
        for name, value, kind in (("rollout", rollout, Rollout), ("optimiser", optimiser, torch.optim.Optimizer)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        chosen_times(when, rollout.steps)
        if not (clip_at > 0.0 and math.isfinite(clip_at)):
            raise ValueError(f"clip_at must be a positive number, got {clip_at!r}")
        self.rollout, self.optimiser = rollout, optimiser
        self.when, self.control_cost = when if isinstance(when, str) else tuple(when), float(control_cost)
        self.clip, self.clip_at = check_choice("clip", clip, tuple(CLIPPING)), float(clip_at)
        self.is_recorded = False
        """Whether the last call ran as recorded launches."""
        self._ends: weakref.WeakKeyDictionary[DirectPass, _End] = weakref.WeakKeyDictionary()

    def __call__(self, x0: Any) -> torch.Tensor:
        """Take one step; return the loss before it, a tensor of no dimensions, detached.

        Args:
            x0: Initial states, shape (batch, D): torch, numpy or any DLPack array.

        Raises:
            TypeError, ValueError: As `Rollout.value_and_grad`.
            Diverged: A state is not finite, and the rollout's `on_divergence` is "raise"; no weight has changed.
        """
        x0 = self.rollout.initial_states(x0)
        direct = self.rollout.direct_pass(len(x0), self.when, self.control_cost)
        end = None if direct is None or self.rollout.reduce is not None else self._end(direct)
        self.is_recorded = direct is not None and end is not None and self._run(x0, direct, end)
        if not self.is_recorded:
            return self._step_by_step(x0)
        return end.loss.clone()  # type: ignore[union-attr]

    def _run(self, x0: torch.Tensor, direct: DirectPass, end: "_End") -> bool:
        """Run the recorded launches; return whether all states were finite, else nothing has changed."""
        with torch.no_grad():
            direct.begin(x0)
            update = torch.empty_like(direct.grad)
            base, other = direct.updates[direct.parts[0]], direct.updates[direct.parts[-1]]
            end.addresses[:] = base.data_ptr(), other.data_ptr(), update.data_ptr()
            direct.launch()
            end.launch.launch()
            if not end.status[0]:
                return False
            torch.autograd.graph.increment_version((direct.grad, *direct.trainable))
            self.rollout.report = direct.report(update)
        self.optimiser._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look for
        return True

    def _step_by_step(self, x0: torch.Tensor) -> torch.Tensor:
        loss = self.rollout.value_and_grad(x0, self.when, self.control_cost)
        clip_gradients(gradients_of(self.rollout.controller.parameters()), self.clip, self.clip_at)
        self.optimiser.step()
        return loss

    def _end(self, direct: DirectPass) -> "_End | None":
        """Return the recorded end of an update with the optimiser's numbers as they are now, or None."""
        flow = self.rollout.flow
        rule = flow.rule if isinstance(flow, Combined) else None
        groups, memory = _groups(self.optimiser), _memory(self.optimiser, direct.trainable)
        if groups is None or memory is None or (rule is not None and rule not in RULES):
            return None
        end = self._ends.get(direct)
        if end is None or end.memory != memory or len(end.groups) != len(groups):
            if not _is_plain(self.optimiser, direct.trainable):
                return None
            end = self._ends[direct] = self._record(direct, rule, memory, groups)
        if end.numbers != groups:
            end.groups[:] = groups
            end.numbers[:] = groups
        return end

    def _record(self, direct: DirectPass, rule: Any, memory: list, groups: list) -> "_End":
        """Record the launch."""
        addresses = wp.zeros(3, dtype=wp.uint64, device="cpu")
        tensors = wp.array(np.array(memory, dtype=np.uint64).reshape(-1, TENSOR), dtype=wp.uint64, device="cpu")
        sizes = [0, *(parameter.numel() for parameter in direct.trainable)]
        starts = wp.array(np.cumsum(sizes), dtype=wp.int32, device="cpu")
        numbers = wp.array(np.array(groups).reshape(-1, GROUP), dtype=wp.float64, device="cpu")
        status, loss = wp.zeros(1, dtype=wp.int32, device="cpu"), torch.zeros(1, dtype=direct.grad.dtype)
        trajectory = [as_array(tensor) for tensor in (direct.states, direct.controls, direct.costs)]
        inputs = [
            *trajectory, direct.per_sample, direct.control_weight, addresses, CLIPPING[self.clip], self.clip_at,
            tensors, starts, numbers,
        ]  # fmt: skip
        outputs = [status, as_array(loss), as_array(direct.grad)]
        kernel = finish_kernel(rule, wp.dtype_from_torch(direct.grad.dtype))
        launch = wp.launch(kernel, 1, inputs, outputs, device="cpu", record_tape=False, record_cmd=True)
        held = (*inputs, *outputs)  # a recorded launch does not keep its arrays alive
        return _End(launch, memory, addresses.numpy(), list(groups), numbers.numpy(), status.numpy(), loss[0], held)


class _End(NamedTuple):
    """The recorded launch that ends an update, and views of what it reads and writes."""

    launch: Any
    memory: list[tuple[int, ...]]
    """Addresses of every trained tensor and of its state, and its group."""
    addresses: np.ndarray
    """Of the updates of base and other, and of the combined update."""
    numbers: list[tuple[float, ...]]
    """What stands in `groups`."""
    groups: np.ndarray
    """Learning rate and so on of every group, shape (groups, GROUP)."""
    status: np.ndarray
    loss: torch.Tensor
    held: tuple


def _groups(optimiser: torch.optim.Optimizer) -> list[tuple[float, ...]] | None:
    """Return the numbers of all groups of parameters, or None if the optimiser does more than Adam's plain step."""
    if type(optimiser) not in (torch.optim.Adam, torch.optim.AdamW) or _has_hooks(optimiser):
        return None
    numbers = []
    for group in optimiser.param_groups:
        if group["amsgrad"] or group["maximize"] or group["differentiable"]:
            return None
        decay, decoupled = group["weight_decay"], group["decoupled_weight_decay"]
        numbers.append((float(group["lr"]), *map(float, group["betas"]), group["eps"], decay, float(decoupled)))
    return numbers


def _has_hooks(optimiser: torch.optim.Optimizer) -> bool:
    """Whether a step does more than the class says; a learning-rate scheduler only notes that it was taken."""
    own = vars(optimiser).get("step")
    hooks = (
        optimiser._optimizer_step_pre_hooks, optimiser._optimizer_step_post_hooks,
        optimisers._global_optimizer_pre_hooks, optimisers._global_optimizer_post_hooks,
    )  # fmt: skip
    return any(hooks) or not (own is None or hasattr(own, "_wrapped_by_lr_sched"))


def _memory(optimiser: torch.optim.Optimizer, trainable: Sequence[torch.Tensor]) -> list[tuple[int, ...]] | None:
    """Return the addresses of every trained parameter, of its state, and its group; None where there is no state yet.

    None, too, if the optimiser trains anything else, or not all of them.
    """
    rows, state = {}, optimiser.state
    for i, group in enumerate(optimiser.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            own = state.get(parameter)
            if not own:
                return None
            tensors = parameter, own["exp_avg"], own["exp_avg_sq"], own["step"]
            rows[parameter] = (*[tensor.data_ptr() for tensor in tensors], i)
    if len(rows) != len(trainable):
        return None
    try:
        return [rows[parameter] for parameter in trainable]
    except KeyError:
        return None


def _is_plain(optimiser: torch.optim.Optimizer, trainable: Sequence[torch.Tensor]) -> bool:
    """Whether the optimiser's state lies in memory as the kernel reads it."""
    for parameter in trainable:
        own = optimiser.state[parameter]
        for tensor in (own["exp_avg"], own["exp_avg_sq"]):
            if tensor.dtype != parameter.dtype or tensor.shape != parameter.shape or not tensor.is_contiguous():
                return False
        step = own["step"]
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != parameter.device:
            return False
    return True


def gradients_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the `.grad` of all parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_gradients(gradients: Sequence[torch.Tensor], clip: str, limit: float) -> None:
    """Clip in place: "value" each component to [−limit, limit], "norm" the norm of all together to at most limit."""
    if clip == "value":
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
    elif clip == "norm" and gradients:
        norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        for gradient in gradients:
            gradient.mul_((limit / norm).clamp(max=1))
