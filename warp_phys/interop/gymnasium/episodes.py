"""What the Gymnasium environments share: the task that a system is given, its step on numpy rows, its episodes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import warp as wp
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

from warp_phys.core import kernels
from warp_phys.core.arrays import numpy_type, real_type, shape_message
from warp_phys.core.checks import check_device, check_number, check_seed, numbers_of
from warp_phys.errors import check_choice, check_count, shown
from warp_phys.systems import SYSTEMS, System
from warp_phys.systems.losses import chosen_array

DIVERGENCE_REWARD = -1000.0
"""Reward of a step that leaves the finite numbers: below what a whole episode of the published tasks costs."""


@dataclass(frozen=True)
class Task:
    """A system and what an agent is asked to do with it."""

    system: System
    action_scale: float = 1.0
    """Control that the action 1 stands for, in the control's unit."""
    control_cost: float = 0.0
    """Factor of the mean squared control in the reward."""
    divergence_reward: float = DIVERGENCE_REWARD
    """Reward of a step that leaves the finite numbers."""
    dtype: Any = np.float32
    """Precision of states, observations and actions, float32 or float64."""
    device: Any = "cpu"
    """Where the system is stepped."""

    def __post_init__(self):
        check_number("action_scale", self.action_scale, positive=True)
        check_number("control_cost", self.control_cost, least=0.0)
        check_number("divergence_reward", self.divergence_reward)
        object.__setattr__(self, "dtype", numpy_type(real_type(self.dtype)))
        object.__setattr__(self, "device", check_device(self.device).alias)

    def spaces(self) -> tuple[Box, Box]:
        """Return the spaces of the observations, which have no bounds, and of the actions, [−1, 1]."""
        observations = Box(-np.inf, np.inf, (self.system.state_size,), self.dtype)
        return observations, Box(-1.0, 1.0, (self.system.control_size,), self.dtype)

    def controls(self, actions: Any, count: int) -> np.ndarray:
        """Return the controls that actions stand for, shape (count, K); they are not clipped.

        Raises:
            TypeError, ValueError: No numbers, or of another shape.
        """
        with np.errstate(over="ignore"):
            actions = numbers_of("actions", actions).astype(self.dtype)
        if actions.shape != (count, self.system.control_size):
            raise ValueError(
                shape_message(
                    "actions", (count, self.system.control_size), actions.shape, ", ".join(self.system.controls)
                )
            )
        with np.errstate(over="ignore"):  # what overflows diverges, and terminates
            return actions * self.dtype(self.action_scale)

    def efforts(self, controls: np.ndarray) -> np.ndarray:
        """Return control_cost · mean of squared controls, shape (count,), float64."""
        if not self.control_cost:
            return np.zeros(len(controls))
        with np.errstate(over="ignore"):
            return self.control_cost * np.square(controls, dtype=np.float64).mean(axis=1)


def resolve_system(system: System | str, parameters: Mapping[str, Any]) -> System:
    """Return a system, or make the one of this name with these parameters.

    Raises:
        TypeError, ValueError: An unknown name or parameter, or parameters for a system that has its own already.
    """
    if isinstance(system, System):
        if parameters:
            raise TypeError(
                f"{', '.join(parameters)}: unknown settings; the parameters of {system} are its own already"
            )
        return system
    return SYSTEMS[check_choice("system", system, tuple(SYSTEMS))](**parameters)


class Stepper:
    """Steps a system on numpy rows; its Warp arrays are made once."""

    def __init__(self, task: Task, count: int):
        system, real = task.system, real_type(task.dtype)
        make = {"dtype": real, "device": task.device}
        self.task, self.system = task, system
        self.x, self.y = (wp.zeros((count, system.state_size), **make) for _ in range(2))
        self.c, self.costs = wp.zeros((count, system.control_size), **make), wp.zeros((1, count), **make)
        self.now, self.p = chosen_array((0,), str(self.x.device)), system.check_parameters(None, self.x, count)
        self.cost_kernel = kernels.cost_kernel(system.structure, real)
        self.y_at_time_0 = self.y.reshape((1, *self.y.shape))

    def __reduce__(self):  # arrays of Warp cannot be copied, and hold nothing from one step to the next
        return Stepper, (self.task, len(self.x))

    def step(self, states: np.ndarray, controls: np.ndarray) -> "Outcome":
        """Move rows one time step on; those that diverge stay where they were."""
        _write(self.x, states)
        _write(self.c, controls)
        self.system.step(self.x, self.c, self.y)
        following, costs = np.array(self.y.numpy()), self._costs()  # copies: on a CPU it is the arrays' own memory
        rewards = -costs - self.task.efforts(controls)
        diverged = ~(np.isfinite(following).all(axis=1) & np.isfinite(rewards))
        if diverged.any():
            following[diverged], rewards[diverged] = states[diverged], self.task.divergence_reward
            _write(self.y, following)
            costs = self._costs()
        return Outcome(following, costs, rewards, diverged)

    def _costs(self) -> np.ndarray:
        inputs, dim, device = [self.y_at_time_0, self.now, self.p], self.costs.shape, self.y.device
        wp.launch(self.cost_kernel, dim=dim, inputs=inputs, outputs=[self.costs], device=device, record_tape=False)
        return self.costs.numpy()[0].astype(np.float64)


class Outcome(NamedTuple):
    """What a step gives, a row per environment."""

    states: np.ndarray
    costs: np.ndarray
    """Pointwise costs of the states, float64."""
    rewards: np.ndarray
    """−cost − control_cost · mean of squared controls, float64; that of divergence where it happened."""
    diverged: np.ndarray


class Episodes:
    """Seeds, lengths and ends of the episodes of several environments, each with a generator of its own."""

    def __init__(self, task: Task, count: int, max_episode_steps: int | None, autoreset_mode: AutoresetMode | str):
        self.task, self.count = task, check_count("num_envs", count)
        if max_episode_steps is not None:
            max_episode_steps = check_count("max_episode_steps", max_episode_steps)
        self.max_episode_steps, self.mode = max_episode_steps, resolve_mode(autoreset_mode)
        self.generators, self.seeds = map(list, zip(*(seeding.np_random() for _ in range(count)), strict=True))
        self.elapsed = np.zeros(count, dtype=int)
        """Steps of the running episodes."""
        self.ended = np.zeros(count, dtype=bool)
        """Episodes that have ended and were not reset yet."""
        self.begun = np.zeros(count, dtype=bool)
        """Environments that have been reset at all."""

    def reset(self, seed: int | Sequence[int | None] | None, options: Mapping[str, Any]) -> np.ndarray:
        """Seed and begin the episodes of the environments that `options` choose; return their mask.

        Raises:
            TypeError, ValueError: Not one seed per environment; a mask that is none.
        """
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else check_seed(seed) + i for i in range(self.count)]
        elif isinstance(seed, (str, bytes)) or not isinstance(seed, Iterable):
            raise TypeError(f"seed must be a number or {self.count} numbers, got {shown(seed)}")
        else:
            seeds = [None if own is None else check_seed(own) for own in seed]
        if len(seeds) != self.count:
            raise ValueError(f"seed must be a number or {self.count} numbers, one per environment, got {len(seeds)}")
        mask = options.get("reset_mask")
        mask = np.ones(self.count, dtype=bool) if mask is None else _check_mask(mask, self.count)
        for i, own in enumerate(seeds):
            if mask[i] and own is not None:
                self.generators[i], self.seeds[i] = seeding.np_random(own)
        self.elapsed[mask], self.ended[mask], self.begun[mask] = 0, False, True
        return mask

    def draw(self, mask: np.ndarray) -> np.ndarray:
        """Return initial states for the environments of a mask, shape (number of them, D): the system's samples."""
        rows = [draw_state(self.task, self.generators[i]) for i in np.flatnonzero(mask)]
        return np.stack(rows) if rows else np.empty((0, self.task.system.state_size), self.task.dtype)

    def check_begun(self, what: str) -> None:
        """Raise ResetNeeded if an environment has never been reset."""
        if not self.begun.all():
            raise ResetNeeded(f"call reset before {what}")

    def resetting(self) -> np.ndarray:
        """Return the mask of the environments that the next step resets instead of moving them on.

        Raises:
            ResetNeeded: An episode has not begun, or has ended and the caller has to reset it.
        """
        self.check_begun("the first step")
        if self.mode is AutoresetMode.DISABLED and self.ended.any():
            raise ResetNeeded(
                f"environments {np.flatnonzero(self.ended).tolist()[:8]} have ended, and autoreset is disabled: "
                "call reset(options={'reset_mask': terminations | truncations})"
            )
        return self.ended.copy() if self.mode is AutoresetMode.NEXT_STEP else np.zeros(self.count, dtype=bool)

    def advance(self, resetting: np.ndarray, diverged: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count a step; return terminations, truncations, and which environments begin anew within this step."""
        self.elapsed = np.where(resetting, 0, self.elapsed + 1)
        terminated, truncated = diverged & ~resetting, np.zeros(self.count, dtype=bool)
        if self.max_episode_steps is not None:
            truncated = (self.elapsed >= self.max_episode_steps) & ~resetting
        self.ended = terminated | truncated
        fresh = resetting
        if self.mode is AutoresetMode.SAME_STEP:
            fresh = self.ended
            self.elapsed[fresh], self.ended = 0, np.zeros(self.count, dtype=bool)
        return terminated, truncated, fresh


def draw_state(task: Task, generator: np.random.Generator) -> np.ndarray:
    """Return one of the system's own initial states, shape (D,), whose seed comes from a generator."""
    return task.system.sample(1, seed=int(generator.integers(2**63)), dtype=task.dtype)[0]


def check_options(options: Mapping[str, Any] | None, *known: str) -> Mapping[str, Any]:
    """Return reset's options, none for None.

    Raises:
        TypeError, ValueError: They are no mapping, or have other keys than the known ones.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping, got {type(options).__name__}")
    for name in options:
        check_choice("a key of options", name, known)
    return options


def given_states(value: Any, task: Task, shape: Sequence[int], name: str) -> np.ndarray:
    """Return initial states from reset's options.

    Raises:
        ValueError: Another shape, or numbers that are not finite.
    """
    name = f"options[{name!r}]"
    with np.errstate(over="ignore"):
        states = np.array(numbers_of(name, value), task.dtype)
    if states.shape != tuple(shape):
        raise ValueError(shape_message(name, tuple(shape), states.shape, ", ".join(task.system.states)))
    if not np.isfinite(states).all():
        raise ValueError(f"{name} must be finite")
    return states


def resolve_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """Return an autoreset mode, given itself, its name or its value.

    >>> resolve_mode("SAME_STEP") is resolve_mode("SameStep") is AutoresetMode.SAME_STEP
    True
    """
    if isinstance(mode, AutoresetMode):
        return mode
    names = {text: known for known in AutoresetMode for text in (known.name, known.value)}
    return names[check_choice("autoreset_mode", mode, tuple(names))]


def _check_mask(mask: Any, count: int) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must hold booleans, got {mask.dtype}")
    if mask.shape != (count,):
        raise ValueError(f"options['reset_mask'] must have shape ({count},), got {mask.shape}")
    return mask


def _write(array: wp.array, values: np.ndarray) -> None:
    """Assign to a Warp array, on a CPU without its detours."""
    if array.device.is_cpu:  # type: ignore[union-attr]
        array.numpy()[...] = values
    else:
        array.assign(values)
