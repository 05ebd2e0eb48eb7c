"""The environments, and their names in Gymnasium's registry."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from warp_phys.core.checks import check_flag, numbers_of
from warp_phys.interop.gymnasium.base import (
    RENDER_MODES,
    BatchEnv,
    Camera,
    check_render_mode,
    frames_per_second,
)
from warp_phys.interop.gymnasium.episodes import (
    DIVERGENCE_REWARD,
    Stepper,
    Task,
    check_options,
    draw_state,
    given_states,
    resolve_system,
)
from warp_phys.systems import System


class SystemEnv(gymnasium.Env):
    """One system as a Gymnasium environment.

    Observation: the state x, shape (D,). Action: the control over `action_scale`, shape (K,), in [−1, 1]; it is not
    clipped. An episode begins with the system's own `sample`, or with `reset(options={"state": …})`. Reward of a step
    x → x' under the control c: −cost(x') − control_cost · mean of c². `info["cost"]` is cost(x'). An episode terminates
    where x' or its reward is not finite: the observation then is the state before, the reward `divergence_reward`.
    Gymnasium's `TimeLimit`, which `gymnasium.make` puts around it, truncates it.

    Args:
        system: A `System`, or the name of one (see `SYSTEMS`).
        action_scale: Control that the action 1 stands for, in the control's unit.
        control_cost: Factor of the mean squared control in the reward.
        divergence_reward: Reward of a step that leaves the finite numbers.
        dtype: float32 or float64.
        device: Where the system is stepped; observations are numpy arrays anyway.
        render_mode: None, or "rgb_array": pictures by the system's own drawing, with matplotlib.
        **parameters: Fields of the system, where it is given by name.

    Raises:
        TypeError, ValueError: Settings that do not fit; see the message.
    """

    metadata: dict[str, Any] = {"render_modes": RENDER_MODES, "render_fps": 30}  # noqa: RUF012, as Gymnasium has it

    def __init__(
        self,
        system: System | str,
        action_scale: float = 1.0,
        control_cost: float = 0.0,
        divergence_reward: float = DIVERGENCE_REWARD,
        dtype: Any = "float32",
        device: Any = "cpu",
        render_mode: str | None = None,
        **parameters: Any,
    ):
        system = resolve_system(system, parameters)
        self.task = Task(system, action_scale, control_cost, divergence_reward, dtype, device)
        self.observation_space, self.action_space = self.task.spaces()
        self.render_mode = check_render_mode(render_mode, system)
        self.metadata = {**self.metadata, "render_fps": frames_per_second(system)}
        self._stepper = Stepper(self.task, 1)
        self._state: np.ndarray | None = None
        self._control: np.ndarray | None = None
        self._camera = Camera(system)

    @property
    def system(self) -> System:
        """The system."""
        return self.task.system

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode, in the state `options["state"]` if given; return the observation and an empty info."""
        chosen, given = check_options(options, "state"), None
        if "state" in chosen:  # checked first: a reset that fails changes nothing
            given = given_states(chosen["state"], self.task, (self.system.state_size,), "state")
        super().reset(seed=seed)
        self._state = draw_state(self.task, self.np_random) if given is None else given
        self._control = None
        return self._state.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move one time step on; return observation, reward, terminated, truncated (always False), info."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        controls = self.task.controls(numbers_of("action", action)[None], 1)
        states, costs, rewards, diverged = self._stepper.step(self._state[None], controls)
        self._state, self._control = states[0], controls[0]
        return self._state.copy(), float(rewards[0]), bool(diverged[0]), False, {"cost": float(costs[0])}

    def render(self) -> np.ndarray | None:
        """Return a picture, shape (height, width, 3), uint8; None without a render mode."""
        if self.render_mode is None:
            return None
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset before render")
        return self._camera.picture(self._state, self._control)


class SystemVectorEnv(BatchEnv):
    """Many environments of one system, stepped by one launch; each is what `SystemEnv` is, under a time limit.

    Environment i, seeded with seed + i, does what a `SystemEnv` with that seed does. `reset` accepts the options
    "reset_mask" (booleans: which environments) and "states" (initial states, shape (num_envs, D)).

    Args:
        system: A `System`, or the name of one (see `SYSTEMS`).
        num_envs: Number of environments.
        max_episode_steps: Steps after which an episode is truncated; None never does.
        autoreset_mode: An `AutoresetMode`, or its name: NEXT_STEP (the step after an episode's end resets), SAME_STEP
            (its last step does; `info["final_obs"]` and `info["final_info"]` tell how it ended), or DISABLED.
        action_scale: Control that the action 1 stands for, in the control's unit.
        control_cost: Factor of the mean squared control in the reward.
        divergence_reward: Reward of a step that leaves the finite numbers.
        dtype: float32 or float64.
        device: Where the system is stepped; observations are numpy arrays anyway.
        render_mode: None, or "rgb_array".
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
        **parameters: Any,
    ):
        system = resolve_system(system, parameters)
        task = Task(system, action_scale, control_cost, divergence_reward, dtype, device)
        super().__init__(task, num_envs, max_episode_steps, autoreset_mode, render_mode)
        self._stepper = Stepper(task, self.num_envs)
        self._states = np.zeros((self.num_envs, system.state_size), task.dtype)
        self._controls: np.ndarray | None = None

    def reset(  # type: ignore[override]
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin the episodes of all environments, or of those in `options["reset_mask"]`.

        Args:
            seed: A number s (environment i gets s + i), a number or None for each, or None: the generators go on.
            options: "reset_mask" and "states", see the class.

        Returns:
            The observations of all environments, shape (num_envs, D), and an empty info.
        """
        chosen = check_options(options, "reset_mask", "states")
        given = chosen.get("states")  # checked first: a reset that fails changes nothing
        given = None if given is None else given_states(given, self.task, self._states.shape, "states")
        mask = self._episodes.reset(seed, chosen)
        self._states[mask] = self._episodes.draw(mask) if given is None else given[mask]
        self._controls = None
        return self._states.copy(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Move all environments one time step on, or reset those that this is due for.

        Args:
            actions: Shape (num_envs, K).

        Returns:
            Observations (num_envs, D), rewards, terminations and truncations (num_envs,), info.

        Raises:
            ValueError: Actions of another shape.
            ResetNeeded: Autoreset is disabled, and an environment has ended.
        """
        controls, resetting = self.task.controls(actions, self.num_envs), self._episodes.resetting()
        self._states, costs, rewards, diverged = self._stepper.step(self._states, controls)
        self._controls, rewards[resetting] = controls, 0.0
        terminated, truncated, fresh = self._episodes.advance(resetting, diverged)
        ended = fresh & ~resetting
        info = _masked("cost", costs, ~resetting & ~ended)
        if ended.any():
            info |= _masked("final_obs", _as_objects(self._states.copy(), ended), ended)
            info |= _masked("final_info", _masked("cost", costs, ended), ended)
        if fresh.any():
            self._states[fresh] = self._episodes.draw(fresh)
        return self._states.copy(), rewards, terminated, truncated, info

    def _shown(self) -> tuple[np.ndarray, np.ndarray | None]:
        return self._states, self._controls


def _masked(key: str, values: Any, mask: np.ndarray) -> dict[str, Any]:
    """Return an entry of a vector environment's info and its mask; nothing where no environment has it."""
    if not mask.any():
        return {}
    if isinstance(values, np.ndarray) and values.dtype != object:
        values = np.where(mask, values, 0)
    return {key: values, f"_{key}": mask.copy()}


def _as_objects(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the rows of a mask as an array of arrays, None elsewhere: how Gymnasium hands out final observations."""
    objects = np.full(len(rows), None, dtype=object)
    for i in np.flatnonzero(mask):
        objects[i] = rows[i]
    return objects


def make_vector_env(
    system: System | str, num_envs: int = 1, differentiable: bool = False, **settings: Any
) -> "SystemVectorEnv | Any":
    """Return a `SystemVectorEnv`, or with `differentiable` a `DifferentiableVectorEnv`; what `make_vec` calls."""
    if not check_flag("differentiable", differentiable):
        return SystemVectorEnv(system, num_envs, **settings)
    from warp_phys.interop.gymnasium.differentiable import DifferentiableVectorEnv  # noqa: PLC0415, only this one needs torch

    return DifferentiableVectorEnv(system, num_envs, **settings)


HERE = "warp_phys.interop.gymnasium"

TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "warp_phys/CartPole-v0": ("cartpole", 100, {"action_scale": 30.0}),
    "warp_phys/Repulsion-v0": ("repulsion", 60, {"action_scale": 1.0}),
    "warp_phys/Quantum-v0": ("quantum", 128, {"action_scale": 10.0}),
    "warp_phys/Polynomial-v0": ("polynomial", 4, {}),
    "warp_phys/Pendulum-v0": ("pendulum", 200, {"action_scale": 30.0}),
    "warp_phys/Quadrotor-v0": ("quadrotor", 100, {"action_scale": 2.0}),
    "warp_phys/Hopper-v0": ("hopper", 200, {"action_scale": 2.0}),
    "warp_phys/LinearQuadratic-v0": ("linear_quadratic", 100, {}),
}
"""What is registered: the system, a horizon (that of its publication, where there is one), other settings."""


def register() -> None:
    """Register the environments with Gymnasium, unless they are; importing the package does so."""
    for name, (system, steps, settings) in TASKS.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                name,
                entry_point=f"{HERE}:SystemEnv",
                vector_entry_point=f"{HERE}:make_vector_env",
                max_episode_steps=steps,
                kwargs={"system": system, **settings},
            )
