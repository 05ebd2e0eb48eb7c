"""The methods of the comparison, each as something that trains an actor step by step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from controllers.actor_critic import ActorCritic, begin_anew, make_actor
from demos.experiments.comparison.tasks import Task
from warp_phys import COMBINED, MODIFIED, REGULAR, Combined, Flow
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout, Update
from warp_phys.rollout import Backend

BATCH = 64
"""Episodes of an update, and environments side by side."""
RATE, ACTOR_RATE = 1e-2, 3e-3
"""Learning rates of Adam through whole episodes, and of the actor through windows."""
BACKEND: Backend = "fused"
"""How rollouts run."""
CLIP_AT = 1.0
"""Norm to which updates are clipped in the panels that clip."""
LIMIT = 0.3
"""The limit κ of the controller's feedback."""


class Learner(Protocol):
    """Trains an actor."""

    @property
    def env_steps(self) -> int:
        """Time steps of environments so far."""

    def step(self) -> None:
        """Take one update, or a few."""

    def play(self, initial_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (T + 1, B, D) and controls (T, B, K) of whole episodes, without noise."""


class Episodes:
    """Backpropagation through whole episodes: fresh initial states, the mean cost of all steps, Adam.

    Args:
        task: The task.
        flow: A function of the task that returns the flow.
        clip: Whether the norm of an update is clipped.
        seed: Seed of weights and initial states.
    """

    def __init__(self, task: Task, flow: Flow | Combined, clip: bool, seed: int) -> None:
        self.task, self.env_steps = task, 0
        self.actor = make_actor(task.system, task.settings(seed), seed)
        self.rollout = Rollout(task.system, self.actor, task.steps, flow, backend=BACKEND)
        self.optimiser = torch.optim.Adam(self.actor.parameters(), lr=RATE, fused=True)
        self.clip = clip
        self.update = Update(
            self.rollout, self.optimiser, when="every", control_cost=task.control_cost,
            clip="norm" if clip else "none", clip_at=CLIP_AT,
        )  # fmt: skip
        self.seeds = np.random.SeedSequence(seed)

    def initial_states(self) -> torch.Tensor:
        """Draw the initial states of the next update, shape (BATCH, D)."""
        self.env_steps += BATCH * self.task.steps
        (child,) = self.seeds.spawn(1)
        return torch.as_tensor(self.task.system.sample(BATCH, seed=int(child.generate_state(1)[0])))

    def step(self) -> None:
        """Take one update."""
        self.update(self.initial_states())

    @torch.no_grad()
    def play(self, initial_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and controls of whole episodes."""
        return self.rollout(initial_states)


class CutAtImpact(Episodes):
    """The same, where no feedback crosses a step through stiff contact: gates of single samples, made by each pass."""

    def step(self) -> None:
        """Take one update."""
        states, controls = self.rollout(self.initial_states())
        loss = self.task.system.loss(states, controls, when="every", control_cost=self.task.control_cost)
        assert self.task.impact is not None
        gate: Any = (~self.task.impact(states[:-1].detach())).numpy()
        self.rollout.flow = Flow(gate, gate)
        self.optimiser.zero_grad()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.actor.parameters(), CLIP_AT)
        self.optimiser.step()


class Windows:
    """The short-horizon actor-critic."""

    def __init__(self, task: Task, flow: Flow | Combined, clip: bool, seed: int) -> None:
        settings = task.settings(
            seed, environments=BATCH, rate=ACTOR_RATE, clip=CLIP_AT if clip else 0.0, backend=BACKEND
        )
        reset = begin_anew(task.system, task.steps, task.limits)
        self.task, self.env_steps = task, 0
        self.learner = ActorCritic(settings, task.system, flow=flow, reset=reset)

    def step(self) -> None:
        """Unroll one window; a step of the actor, and some of the critic."""
        self.learner.step()
        self.env_steps += BATCH * self.task.window

    @torch.no_grad()
    def play(self, initial_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and controls of whole episodes."""
        rollout = self.learner.rollout
        rollout.steps, rollout.on_divergence = self.task.steps, "raise"
        try:
            return rollout(initial_states)
        finally:
            rollout.steps, rollout.on_divergence = self.task.window, "mask"


class Method(NamedTuple):
    """How a controller is trained."""

    title: str
    kind: str
    """What it does about feedback: "plain", "gated" (the controller's path is), "cut" (short in time) or "none"."""
    make: Callable[[Task, bool, int], Learner]
    """Makes a learner of task, whether to clip, and seed."""
    where: Callable[[Task], bool] = lambda _task: True
    """The tasks that it is for."""
    clips: bool = True
    """Whether clipping is a choice of its own."""
    needs: tuple[str, str] | None = None
    """An optional library that it needs, and the extra of this project that brings it."""


def _episodes(flow: Callable[[Task], Flow | Combined]) -> Callable[[Task, bool, int], Learner]:
    return lambda task, clip, seed: Episodes(task, flow(task), clip, seed)


def _windows(flow: Flow | Combined) -> Callable[[Task, bool, int], Learner]:
    return lambda task, clip, seed: Windows(task, flow, clip, seed)


def _ppo(task: Task, _clip: bool, seed: int) -> Learner:
    from demos.experiments.comparison.ppo import Proximal  # noqa: PLC0415, an optional library, and slow to import

    return Proximal(task, seed)


def decaying(task: Task) -> Flow:
    """A flow whose feedback falls to 1/e over a window's length, on both paths.

    >>> from demos.experiments.comparison.tasks import TASKS
    >>> decaying(TASKS["quadrotor"]).name
    'physics 0.960789, controller 0.960789'
    """
    gate = math.exp(-1.0 / task.window)
    return Flow(gate, gate)


METHODS = {
    "regular": Method("R", "plain", _episodes(lambda _: REGULAR)),
    "modified": Method("M", "gated", _episodes(lambda _: MODIFIED)),
    "combined": Method("C", "gated", _episodes(lambda _: COMBINED)),
    "either": Method("either", "gated", _episodes(lambda _: resolve("either"))),
    "limit": Method(f"limit {LIMIT}", "gated", _episodes(lambda _: Flow(limit=LIMIT))),
    "combined-limit": Method(f"C over limit {LIMIT}", "gated", _episodes(lambda _: Combined(other=Flow(limit=LIMIT)))),
    "decay": Method("decay", "cut", _episodes(decaying)),
    "truncation": Method("truncation", "cut", _episodes(lambda task: Flow(window=task.window))),
    "impact": Method(
        "cut at impact", "cut", lambda task, clip, seed: CutAtImpact(task, REGULAR, clip, seed),
        where=lambda task: task.impact is not None,
    ),
    "windows-regular": Method("SHAC with R", "cut", _windows(REGULAR)),
    "windows-combined": Method("SHAC with C", "cut", _windows(COMBINED)),
    "ppo": Method("PPO", "none", _ppo, clips=False, needs=("stable_baselines3", "reinforcement")),
}  # fmt: skip
"""The methods by the names of their folders."""
