"""The tasks of the comparison: a system, an episode, and what counts as solved."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from controllers.actor_critic import Settings
from demos.experiments.comparison.windy import WindyQuadrotor
from warp_phys.systems import SYSTEMS, CartPole, Hopper, Pendulum, Quantum, Repulsion, System

EPISODES = 256
"""Test episodes; their loss is the mean cost of their steps."""
TEST_SEED = 2**31 - 1
"""Seed of the initial states of the tests, for all runs."""


class LeaningChain(Pendulum):
    """Two links on a cart that lean: to be held upright, not swung up."""

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return states as of a `Pendulum`, but up to 0.4 rad from upright, shape (batch, 6)."""
        states = super().sample(batch, seed, dtype)
        states[:, 2::2] = (states[:, 2::2] - np.pi) * (0.4 / (np.pi / 6.0))
        return states


class Task(NamedTuple):
    """Episodes of one length from the system's own initial states, and the cost of every step."""

    title: str
    system: System
    steps: int
    """Time steps of an episode."""
    window: int
    """Time steps of a short window, a divisor of `steps`."""
    bound: float
    """Largest control, of either sign."""
    solved: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From the states (T + 1, B, D) of episodes, and their costs (T, B), to whether each was solved, (B,)."""
    reached: float
    """The test loss to which runs are timed."""
    failed: float
    """A run that ends above this test loss has failed."""
    control_cost: float = 0.0
    observe: tuple[str, ...] = ()
    """Components of the state that the controller sees; all if empty."""
    limits: tuple[float, ...] = ()
    """Magnitudes of the state beyond which windows do not go on; none if empty."""
    impact: Callable[[torch.Tensor], torch.Tensor] | None = None
    """From states (T, B, D) to whether a step from there is one through stiff contact, (T, B)."""

    def settings(self, seed: int, **changes: Any) -> Settings:
        """Settings of an actor of this task, and of the training through windows."""
        name = next(name for name, kind in SYSTEMS.items() if isinstance(self.system, kind))
        return Settings(
            system=name, seed=seed, bound=self.bound, control_cost=self.control_cost, observe=self.observe,
            horizon=self.window, episode=self.steps, schedule="constant", **changes,
        )  # fmt: skip


def _near(reach: float, columns: tuple[int, ...], target: tuple[float, ...]) -> Callable[..., torch.Tensor]:
    """Solved where the mean distance from a place over the last quarter is below `reach`."""

    def solved(states: torch.Tensor, _costs: torch.Tensor) -> torch.Tensor:
        last = states[-(len(states) // 4) :][..., list(columns)]
        return torch.linalg.vector_norm(last - last.new_tensor(target), dim=2).mean(dim=0) < reach

    return solved


def _cheap(cost: float) -> Callable[..., torch.Tensor]:
    """Solved where the mean cost of the last tenth is below `cost`."""

    def solved(_states: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
        return costs[-max(1, len(costs) // 10) :].mean(dim=0) < cost

    return solved


def impact_of(hopper: Hopper) -> Callable[[torch.Tensor], torch.Tensor]:
    """Where the floor pushes back with more than twice the weight: a landing, not rest.

    >>> still, falling = [0.0, 0.1, 0, 0, 0, 0], [0.0, 0.05, 0, 0, -1.0, 0]
    >>> impact_of(Hopper())(torch.tensor([[still, falling]]))
    tensor([[False,  True]])
    """

    def impact(states: torch.Tensor) -> torch.Tensor:
        depth = hopper.softness * torch.nn.functional.softplus((hopper.radius - states[..., 1]) / hopper.softness)
        push = hopper.stiffness * depth * (1.0 - hopper.damping * torch.tanh(states[..., 4]))
        return push > 2.0 * hopper.mass * hopper.gravity

    return impact


def _hop(stiffness: float, steps: int) -> Task:
    """One second to roll to a place at half a metre and to rest there."""
    hopper = Hopper(stiffness=stiffness, dt=1.0 / steps)
    return Task(
        f"hopper, stiffness {stiffness:g}", hopper, steps, steps // 8, 2.0,
        _near(hopper.radius, (0,), (hopper.target,)), reached=0.22, failed=0.22, impact=impact_of(hopper),
    )  # fmt: skip


_QUADROTOR = WindyQuadrotor()
TASKS = {
    "quadrotor": Task(
        "quadrotor in unseen wind", _QUADROTOR, 200, 25, 2.0, _near(_QUADROTOR.arm, (0, 1), (0.0, 0.0)),
        reached=0.2, failed=0.2, observe=("x", "z", "pitch", "x velocity", "z velocity", "pitch rate"),
        limits=(4.0, 4.0, 3.0, 10.0, 10.0, 20.0, 100.0, 100.0),
    ),
    "hopper-200": _hop(200.0, 200),
    "hopper-2000": _hop(2000.0, 200),
    "hopper-20000": _hop(20000.0, 400),
    "chain": Task("leaning chain of two links", LeaningChain(), 200, 25, 40.0, _cheap(0.1), reached=0.5, failed=0.5),
    "poles-4": Task("four poles, 100 steps", CartPole(poles=4), 100, 25, 30.0, _cheap(0.1), reached=0.8, failed=0.8),
    "poles-4-long": Task(
        "four poles, 500 steps", CartPole(poles=4), 500, 25, 30.0, _cheap(0.1), reached=0.5, failed=0.5
    ),
    "repulsion": Task(
        "guidance by repulsion", Repulsion(), 60, 20, 5.0, _cheap(0.1), reached=1.0, failed=1.0, control_cost=0.001
    ),
    "quantum": Task("quantum, target 3", Quantum(), 128, 32, 10.0, _cheap(0.1), reached=60.0, failed=60.0),
}  # fmt: skip
"""The tasks by the names of their panels."""
