"""Vector environments whose observations and rewards are torch tensors, differentiable with a flow of one's choice."""

from collections.abc import Sequence
from typing import Any

from warp_phys.interop.extras import require

require("torch", "torch")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402

from warp_phys.core.arrays import shape_message  # noqa: E402
from warp_phys.core.checks import numbers_of  # noqa: E402
from warp_phys.flow import Combined, Flow, FlowName, resolve  # noqa: E402
from warp_phys.interop.gymnasium.attached import Attached  # noqa: E402
from warp_phys.interop.gymnasium.base import BatchEnv  # noqa: E402
from warp_phys.interop.gymnasium.episodes import DIVERGENCE_REWARD, Task, check_options, resolve_system  # noqa: E402
from warp_phys.interop.torch.dense import as_array, check_dense  # noqa: E402
from warp_phys.interop.torch.loss import pointwise_cost, refuse_second_derivative, torch_stream  # noqa: E402
from warp_phys.systems import System  # noqa: E402

PHYSICS, CONTROLLER = 0, 1
"""Columns of a flow's gates."""


class DifferentiableVectorEnv(BatchEnv):
    """`SystemVectorEnv` in torch: observations and rewards are tensors that autograd follows back to the actions.

    Feedback travels back in time through the states. Where an episode begins it ends: a sampled state has no history.
    `flow` weights it as in a rollout, in front of the simulator and in what the policy observes; the weights are read
    when the backward pass runs, so one recorded episode gives every flow (`backward(retain_graph=True)`, assign `flow`,
    again). Rewards depend on the states themselves: with a policy that acts on observations, and rewards alone in the
    loss, the gradient of −(sum of rewards) / (steps · environments) is that of a `Rollout` with
    `loss(when="every")`, for systems whose loss averages over time.

    A learned value of a state, at the end of an episode or where a horizon is cut, wants the state and not what the
    policy observes of it, which `flow` gates: `info["final_obs"]`, in every autoreset mode at the step that ends an
    episode, and `states`, at any time, are attached to autograd and not gated.

    Observations, rewards and flags are tensors that refuse to be turned into numpy arrays where that would cut a
    gradient; see docs/gymnasium.md for the wrappers of Gymnasium that fit.

    What has been recorded is kept until it is let go: call `detach` after a backward pass that does not end with the
    episodes, as for a short horizon.

    Args:
        system: A `System`, or the name of one (see `SYSTEMS`).
        num_envs: Number of environments.
        max_episode_steps: Steps after which an episode is truncated; None never does.
        autoreset_mode: As for `SystemVectorEnv`; `info["final_obs"]` is one tensor here, zero where not ended, and is
            there in all modes.
        action_scale: Control that the action 1 stands for, in the control's unit.
        control_cost: Factor of the mean squared control in the reward.
        divergence_reward: Reward, without gradient, of a step that leaves the finite numbers.
        dtype: float32 or float64.
        device: Where system and tensors live.
        render_mode: None, or "rgb_array".
        flow: A name, a letter or a `Flow`; a combined flow is made from two backward passes.
        **parameters: Fields of the system, where it is given by name.

    Raises:
        TypeError, ValueError: Settings that do not fit; see the message.
    """

    def __init__(
        self,
        system: System | str,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        action_scale: float = 1.0,
        control_cost: float = 0.0,
        divergence_reward: float = DIVERGENCE_REWARD,
        dtype: Any = "float32",
        device: Any = "cpu",
        render_mode: str | None = None,
        flow: FlowName | Flow = "regular",
        **parameters: Any,
    ):
        system = resolve_system(system, parameters)
        task = Task(system, action_scale, control_cost, divergence_reward, dtype, device)
        super().__init__(task, num_envs, max_episode_steps, autoreset_mode, render_mode)
        real = torch.float64 if self.task.dtype is np.float64 else torch.float32
        self._make: dict[str, Any] = {"dtype": real, "device": torch.device(self.task.device)}
        self._states = torch.zeros((self.num_envs, system.state_size), **self._make)
        self._controls: torch.Tensor | None = None
        self.flow = flow

    @property
    def flow(self) -> Flow:
        """The flow of the next backward passes, also of what has been recorded already; a name will do."""
        return self._flow

    @flow.setter
    def flow(self, flow: FlowName | Flow) -> None:
        chosen, steps = resolve(flow), self._episodes.max_episode_steps
        if isinstance(chosen, Combined):
            raise ValueError(
                f"flow {chosen.name!r} is made from two: run the backward pass with {chosen.base.name!r} and with "
                f"{chosen.other.name!r}, and combine the two updates with its rule, "
                f"{getattr(chosen.rule, '__name__', chosen.rule)}"
            )
        if steps is None and chosen.window is not None:
            raise ValueError("a flow with a window needs max_episode_steps")
        self._flow, self._gates = chosen, torch.as_tensor(_table(chosen, steps), **self._make)

    @property
    def states(self) -> torch.Tensor:
        """The present states, shape (num_envs, D), attached to autograd and not gated by the flow.

        After an episode's end they are its last ones; with SAME_STEP they are the next one's first, and the last ones
        are `info["final_obs"]`. `detach` takes their history.
        """
        self._episodes.check_begun("asking for states")
        return self._states.clone()  # what is written into it stays there

    def reset(  # type: ignore[override]
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Begin the episodes of all environments, or of those in `options["reset_mask"]`, as `SystemVectorEnv.reset`.

        `options["states"]` may be a tensor with a history: then gradients reach it.
        """
        chosen = check_options(options, "reset_mask", "states")
        given = chosen.get("states")  # checked first: a reset that fails changes nothing
        given = None if given is None else self._given(given)
        if isinstance(chosen.get("reset_mask"), torch.Tensor):
            chosen = {**chosen, "reset_mask": chosen["reset_mask"].cpu().numpy()}
        mask = self._episodes.reset(seed, chosen)
        fresh = self._drawn(mask) if given is None else given
        self._states = self._replaced(self._states, fresh, mask)
        self._controls = None
        return self._observation(), {}

    def step(self, actions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Move all environments one time step on, or reset those that this is due for.

        Args:
            actions: Tensor (num_envs, K), in the environment's precision and on its device.

        Returns:
            Observations (num_envs, D), rewards (num_envs,), both attached to autograd, terminations and truncations,
            boolean tensors (num_envs,), and info. Where an episode has ended, `info["final_obs"]` is its last state,
            attached and not gated, and zero elsewhere; `info["_final_obs"]` tells where.

        Raises:
            TypeError, ValueError: Actions that do not fit.
            ResetNeeded: Autoreset is disabled, and an environment has ended.
        """
        controls, resetting = self._checked(actions) * self.task.action_scale, self._episodes.resetting()
        gated = _Gate.apply(self._states, self, PHYSICS, self._steps())
        following, costs, rewards, diverged = self._moved(_Step.apply(gated, controls, self.system), controls)
        if resetting.any():
            rewards = torch.where(self._flags(resetting), 0.0, rewards)
        terminated, truncated, fresh = self._episodes.advance(resetting, diverged)
        info = self._info(costs.detach(), resetting, fresh & ~resetting)
        info |= self._entry("final_obs", following, terminated | truncated)
        self._states, self._controls = following, controls.detach()
        if fresh.any():
            self._states = self._replaced(following, self._drawn(fresh), fresh)
        over, cut = (self._flags(mask).as_subclass(Attached) for mask in (terminated, truncated))
        return self._observation(), rewards.as_subclass(Attached), over, cut, info

    def detach(self) -> torch.Tensor:
        """Forget how the present states came about; return the observations, without history."""
        self._states = self._states.detach()
        return self._observation()

    def _shown(self) -> tuple[np.ndarray, np.ndarray | None]:
        return self._states.detach().cpu().numpy(), None if self._controls is None else self._controls.cpu().numpy()

    def _steps(self) -> torch.Tensor:
        """Return each environment's row in the table of gates."""
        return torch.as_tensor(np.minimum(self._episodes.elapsed, len(self._gates) - 1), device=self._make["device"])

    def _observation(self) -> torch.Tensor:
        return _Gate.apply(self._states, self, CONTROLLER, self._steps()).as_subclass(Attached)

    def _flags(self, mask: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(mask, device=self._make["device"])

    def _drawn(self, mask: np.ndarray) -> torch.Tensor:
        """Return states of which the rows of a mask are newly drawn."""
        rows = torch.zeros_like(self._states)
        rows[self._flags(mask)] = torch.as_tensor(self._episodes.draw(mask), **self._make)
        return rows

    def _replaced(self, states: torch.Tensor, fresh: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
        """Return states with other rows where the mask says so; the history ends there."""
        if mask.all():
            return fresh  # so that nothing holds the old episodes' memory
        return torch.where(self._flags(mask)[:, None], fresh, states)

    def _moved(
        self, following: torch.Tensor, controls: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
        """Return states, costs, rewards and which rows diverged; those stay where they were and have no gradient."""
        costs, rewards = self._costs_and_rewards(following, controls)
        fine = torch.isfinite(following).all(dim=1) & torch.isfinite(rewards)
        if not fine.all():
            # not only the rewards are replaced: a zero adjoint times an infinite slope would be nan
            following = torch.where(fine[:, None], following, self._states.detach())
            costs, rewards = self._costs_and_rewards(following, torch.where(fine[:, None], controls, 0.0))
            rewards = torch.where(fine, rewards, self.task.divergence_reward)
        return following, costs, rewards, ~fine.cpu().numpy()

    def _costs_and_rewards(self, states: torch.Tensor, controls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        costs = pointwise_cost(self.system, states[None], (0,), {})[0]
        weight = self.task.control_cost
        return costs, -costs - weight * controls.square().mean(dim=1) if weight else -costs

    def _info(self, costs: torch.Tensor, resetting: np.ndarray, ended: np.ndarray) -> dict[str, Any]:
        info = self._entry("cost", costs, ~resetting & ~ended)
        if ended.any():
            info |= {"final_info": self._entry("cost", costs, ended), "_final_info": self._flags(ended)}
        return info

    def _entry(self, key: str, values: torch.Tensor, mask: np.ndarray) -> dict[str, Any]:
        """Return an entry of the info and its mask; nothing where no environment has it."""
        if not mask.any():
            return {}
        flags = self._flags(mask)
        return {key: torch.where(flags.view(-1, *(1,) * (values.ndim - 1)), values, 0.0), f"_{key}": flags}

    def _checked(self, actions: Any) -> torch.Tensor:
        if not isinstance(actions, torch.Tensor):
            raise TypeError(
                f"actions must be a torch tensor, got {type(actions).__name__}: numpy has no gradients, and neither "
                "have wrappers that compute with it; scale actions by action_scale, clip them with torch.clamp"
            )
        check_dense("actions", actions)
        shape = (self.num_envs, self.system.control_size)
        if tuple(actions.shape) != shape:
            raise ValueError(shape_message("actions", shape, actions.shape, ", ".join(self.system.controls)))
        if actions.dtype != self._states.dtype:
            raise TypeError(f"actions must hold {self._states.dtype} as the states do, got {actions.dtype}")
        if actions.device != self._states.device:
            raise ValueError(f"actions must be on device {self._states.device}, got {actions.device}")
        return actions

    def _given(self, states: Any) -> torch.Tensor:
        if not isinstance(states, torch.Tensor):
            states = np.array(numbers_of("options['states']", states), np.float64)
        elif states.is_complex() or states.dtype == torch.bool or states.is_meta:
            raise TypeError(f"options['states'] must hold real numbers, got {states.dtype} on {states.device}")
        else:
            check_dense("options['states']", states)
        states = torch.as_tensor(states, **self._make)
        if states.shape != self._states.shape:
            columns = ", ".join(self.system.states)
            raise ValueError(shape_message("options['states']", tuple(self._states.shape), states.shape, columns))
        if not torch.isfinite(states).all():
            raise ValueError("options['states'] must be finite")
        return states


def _table(flow: Flow, steps: int | None) -> np.ndarray:
    """Return the gates by the steps that an episode has behind it, shape (steps + 1, 2): its last state is seen too.

    Without a time limit all steps have the gates of one, shape (1, 2).
    """
    if steps is None:
        return flow.gates(1)
    gates = flow.gates(steps)
    last: Any = [gate[-1] if isinstance(gate, tuple) else gate for gate in (flow.physics, flow.controller)]
    if flow.window is not None and steps % flow.window == 0:
        last = [0.0, 0.0]
    return np.vstack([gates, last])


class _Gate(torch.autograd.Function):
    """The identity; backward the adjoint is multiplied by the gates that the environment's flow has at that moment."""

    @staticmethod
    def forward(ctx, x, env, column, steps):
        ctx.env, ctx.column, ctx.steps = env, column, steps
        return x.clone()

    @staticmethod
    def backward(ctx, adj):
        weight = ctx.env._gates[ctx.steps, ctx.column][:, None]
        return (
            torch.where(weight == 0.0, 0.0, weight * adj),
            None,
            None,
            None,
        )  # zero is a cut: what it stops may be inf


class _Step(torch.autograd.Function):
    """x' = S(x, c)."""

    @staticmethod
    def forward(ctx, x, c, system):
        x, c = x.detach().contiguous(), c.detach().contiguous()
        y = torch.empty_like(x)
        with torch_stream(x.device):
            system.step(as_array(x), as_array(c), as_array(y))
        ctx.system = system
        ctx.save_for_backward(x, c)
        return y

    @staticmethod
    def backward(ctx, adj_y):
        refuse_second_derivative()
        x, c = ctx.saved_tensors
        adj_x, adj_c = torch.empty_like(x), torch.empty_like(c)
        with torch_stream(x.device):
            arrays = [as_array(tensor) for tensor in (x, c, adj_y.contiguous(), adj_x, adj_c)]
            ctx.system.step_vjp(*arrays)
        asked = (adj_y != 0.0).any(dim=1, keepdim=True)  # where nothing is asked an infinite slope does not matter
        return torch.where(asked, adj_x, 0.0), torch.where(asked, adj_c, 0.0), None
