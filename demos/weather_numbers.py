"""The numbers of the weather demo: a controller early in its training, and its feedback for every horizon."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from controllers.networks import make_network
from controllers.settings import check_setting
from warp_phys.diagnose.diagnostics import largest_singular_value, row_norms
from warp_phys.diagnose.feedback import StepJacobians, retrace
from warp_phys.flow import MODIFIED, REGULAR, STOPPED, combine, linear_parts, resolve
from warp_phys.interop.torch import Rollout, jacobians, pointwise_cost
from warp_phys.systems import CartPole, Quantum, System
from warp_phys.systems.losses import When

FLOWS = ("R", "M", "S", "C")
PLAIN = (REGULAR, MODIFIED, STOPPED)
BATCH = 8


@dataclass(frozen=True)
class Scenario:
    """A system and how its controller has been trained so far, with C."""

    title: str
    """Name in words."""
    system: System
    """What is steered."""
    steps: int
    """Horizon of the training."""
    when: When
    """When the loss of the training counts; the feedback shown is that of the cost at the end of the horizon."""
    epochs: int
    """Epochs that the training has had."""
    longest: int
    """Longest horizon that can be looked at."""


SCENARIOS = {
    "quantum": Scenario("a particle in a well", Quantum(points=16, target=3), 128, "every", 2, 384),
    "cartpole": Scenario("a cart with four poles", CartPole(poles=4, dt=0.01), 100, "final", 10, 120),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    system: str = "quantum"
    """Which system: quantum or cartpole."""
    horizon: int = 0
    """Horizon at the start; 0: seven eighths of the longest."""
    samples: int = 16
    """Initial states that are looked at."""
    seed: int = 0
    """Seed of weights and states."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if self.system not in SCENARIOS:
            raise ValueError(f"system must be one of {', '.join(SCENARIOS)}, got {self.system!r}")
        if self.horizon != 0:
            check_setting("horizon", self.horizon, int, at_least=2, below=SCENARIOS[self.system].longest + 1)
        check_setting("samples", self.samples, int, at_least=1)
        check_setting("seed", self.seed, int, at_least=0)


class Forecast:
    """One unrolling over the longest horizon, which serves all shorter ones.

    A trajectory does not depend on where it is cut off, so its Jacobians and the derivatives of the cost at all its
    states are found once; a horizon then takes one recursion of small matrices.

    Args:
        scenario: The system, and how far one looks.
        samples: Number of initial states.
        seed: Their seed.
        controller: As the scenario has trained it; with None it is trained now.
    """

    def __init__(self, scenario: Scenario, samples: int, seed: int, controller: torch.nn.Module | None = None) -> None:
        self.scenario = scenario
        if controller is None:
            controller = train(scenario, seed)
        rollout = Rollout(scenario.system, controller, scenario.longest)
        x0 = scenario.system.sample(samples, seed=seed + 1)
        self.jacobians = StepJacobians(*(array.astype(np.float64) for array in jacobians(rollout, x0)))
        states = rollout(x0)[0].detach().requires_grad_()
        self.states = states.detach().numpy()
        """The trajectories, shape (longest + 1, samples, D)."""
        costs = pointwise_cost(scenario.system, states, range(scenario.longest + 1), {})
        (slopes,) = torch.autograd.grad(costs.sum(), states)
        self.slopes = slopes.double().numpy()
        """Derivative of the cost at every state, shape (longest + 1, samples, D)."""
        self.physics, self.closed = (
            np.median(largest_singular_value(matrices), axis=1)
            for matrices in (self.jacobians.physics, self.jacobians.closed_loop)
        )

    def adjoints(self, horizon: int) -> np.ndarray:
        """|λ_n| for a cost at the end of the horizon, by `FLOWS`, over that of the last step in all samples together.

        Args:
            horizon: Number of steps T.

        Returns:
            Shape (flows, T + 1, samples).
        """
        seeds = np.zeros_like(self.slopes[: horizon + 1])
        seeds[-1] = self.slopes[horizon]
        found = retrace(self.jacobians, seeds, None, PLAIN).adjoints
        rows = []
        for flow in map(resolve, FLOWS):
            parts = [found[PLAIN.index(part)] for part in linear_parts(flow)]
            rows.append(row_norms(combine(flow, parts)))
        return np.stack(rows) / row_norms(seeds[-1].reshape(1, -1))


def make_controller(scenario: Scenario, seed: int = 0) -> torch.nn.Module:
    """The controller of a scenario before it is trained."""
    return make_network("auto", scenario.system, (100, 100), "tanh", "glorot", seed)


def train(scenario: Scenario, seed: int) -> torch.nn.Module:
    """Train a controller with C from the start, for the scenario's epochs."""
    system, controller = scenario.system, make_controller(scenario, seed)
    rollout = Rollout(system, controller, scenario.steps, "combined")
    optimiser = torch.optim.Adam(controller.parameters(), lr=1e-3)
    states = system.sample(256, seed=seed)
    for _ in range(scenario.epochs):
        for batch in np.split(states, len(states) // BATCH):
            rollout.value_and_grad(batch, when=scenario.when)
            optimiser.step()
    return controller


def growth(adjoints: np.ndarray) -> Sequence[Any]:
    """Return how much larger each flow's feedback at step 1 is than at the last one, all samples and the worst.

    Args:
        adjoints: From `Forecast.adjoints`.

    Returns:
        One pair per flow.
    """
    together = row_norms(adjoints)
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.max(adjoints[:, 1] / adjoints[:, -1], axis=1)
    return list(zip(together[:, 1] / together[:, -1], worst, strict=True))
