"""PPO of stable-baselines3 on the project's own vector environments."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from controllers.actor_critic import Observer
from demos.experiments.comparison.tasks import Task
from warp_phys.interop.gymnasium import SystemVectorEnv
from warp_phys.interop.torch import Rollout

ENVIRONMENTS = 64
"""Environments side by side, as the other methods have them."""
RATE = 1e-3
"""Learning rate of Adam."""


class Environments(VecEnv):
    """A `SystemVectorEnv` as stable-baselines3 asks for it: what is observed is what an actor of the task sees.

    Beyond the task's limits an episode is cut off, as windows are, and what would have followed is estimated.

    Args:
        task: The task.
        count: Environments.
        seed: Seed of their initial states.
    """

    def __init__(self, task: Task, count: int, seed: int) -> None:
        self.envs = SystemVectorEnv(
            task.system, count, max_episode_steps=task.steps, autoreset_mode="DISABLED",
            action_scale=task.bound, control_cost=task.control_cost,
        )  # fmt: skip
        self.limits = np.array(task.limits)
        self.observer, self.own_seed = Observer(task.system.states, task.observe), seed
        space = Box(-np.inf, np.inf, (self.observer.size,), np.float32)
        super().__init__(count, space, self.envs.single_action_space)

    def observe(self, states: np.ndarray) -> np.ndarray:
        """Chosen columns, angles as sine and cosine."""
        return self.observer.raw(torch.from_numpy(states)).numpy()

    def reset(self) -> np.ndarray:
        """Begin all episodes."""
        return self.observe(self.envs.reset(seed=self.own_seed)[0])

    def step_async(self, actions: np.ndarray) -> None:
        """Take up the actions."""
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step all environments; those that end have begun anew, and their last observation is in the info."""
        states, rewards, terminated, truncated, _ = self.envs.step(self.actions)
        if self.limits.size:
            truncated |= (np.abs(states) > self.limits).any(axis=1)
        ended = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i, last in zip(np.flatnonzero(ended), self.observe(states[ended]), strict=True):
            infos[i] = {"terminal_observation": last, "TimeLimit.truncated": bool(not terminated[i])}
        if ended.any():
            states, _ = self.envs.reset(options={"reset_mask": ended})
        return self.observe(states), rewards.astype(np.float32), ended, infos

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute, one for each environment."""
        return [getattr(self.envs, attr_name, None)] * len(self._chosen(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Environments of a vector share their attributes."""
        raise NotImplementedError(f"{attr_name} cannot be set for single environments")

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list[Any]:
        """Environments of a vector have no methods of their own."""
        raise NotImplementedError(f"{method_name} cannot be called for single environments")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Nothing is wrapped."""
        return [False] * len(self._chosen(indices))

    def _chosen(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))


class Policy(torch.nn.Module):
    """The policy without its noise, as a controller: states (B, D) to controls (B, K)."""

    def __init__(self, task: Task, model: PPO, normalised: VecNormalize, observer: Observer) -> None:
        super().__init__()
        self.policy, self.observer, self.bound = model.policy, observer, task.bound
        self.normalised = normalised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return controls."""
        seen = self.normalised.normalize_obs(self.observer.raw(x.detach()).numpy())
        assert isinstance(seen, np.ndarray)
        actions = self.policy._predict(torch.from_numpy(seen.astype(np.float32)), deterministic=True)
        return self.bound * actions.clamp(-1.0, 1.0)


class Proximal:
    """PPO, as its users set it up: observations and rewards normalised, networks of 64-64."""

    def __init__(self, task: Task, seed: int) -> None:
        own = Environments(task, ENVIRONMENTS, seed)
        self.environments = VecNormalize(own, gamma=0.99)
        self.model = PPO(
            "MlpPolicy", self.environments, n_steps=task.window, batch_size=ENVIRONMENTS * task.window // 4,
            learning_rate=RATE, policy_kwargs={"net_arch": [64, 64]}, seed=seed, device="cpu",
        )  # fmt: skip
        policy = Policy(task, self.model, self.environments, own.observer)
        self.rollout = Rollout(task.system, policy, task.steps, "stopped", backend="general")

    @property
    def env_steps(self) -> int:
        """Time steps of environments so far."""
        return self.model.num_timesteps

    def step(self) -> None:
        """Play a window in all environments, and learn from it."""
        self.model.learn(self.model.n_steps * ENVIRONMENTS, reset_num_timesteps=False)

    @torch.no_grad()
    def play(self, initial_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and controls of whole episodes, without noise."""
        return self.rollout(initial_states)
