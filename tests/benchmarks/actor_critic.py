"""The short-horizon actor-critic: how fast its training step is, and whether it solves its tasks.

    python -m tests.benchmarks.actor_critic
    python -m tests.benchmarks.actor_critic --solve swing-up quadrotor --seeds 0 1 2 3 4

A step has 64 environments of 32 steps each, actor and critic, both Adam's; against the same written in torch as its
users write it, in turns within this process, by processor time. A task is solved where at least 95 % of 256 fresh
episodes of 500 steps end well. Status 1 where the two compute something else, or a seed does not solve its task.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import warp

from controllers.actor_critic import ActorCritic, Settings
from demos.quadrotor import LEARNING
from tests.benchmarks import eager
from tests.benchmarks.cases import make_case
from tests.benchmarks.statistics import median, paired_ratio, relative_difference
from warp_phys import Quadrotor

SWING_UP = Settings(
    parameters={"dt": 0.02},
    state_cost=(0.05, 0.02, 0.0, 0.02),
    bound=20.0,
    limits=(10.0, 20.0, 1000.0, 20.0),
    scatter=(0.0, 0.0, np.pi, 0.0),
    updates=600,
)
"""A cart with one pole, for 500 steps of 0.02 s: up from hanging, and in the middle. It is trained from any angle."""
LAST = 100
"""Steps at the end of an episode that tell whether it ended well."""


def upright(states: torch.Tensor) -> torch.Tensor:
    """Whether the pole stood, shape (B,): mean of 1 − cos θ below 0.05."""
    return (1.0 - states[-LAST:, :, 2].cos()).mean(dim=0) < 0.05


def hovering(states: torch.Tensor) -> torch.Tensor:
    """Whether the quadrotor was where it shall be, shape (B,): mean distance below its arm."""
    return states[-LAST:, :, :2].square().sum(dim=2).sqrt().mean(dim=0) < Quadrotor.arm


TASKS: dict[str, tuple[Settings, Callable[[torch.Tensor], torch.Tensor]]] = {
    "swing-up": (SWING_UP, upright),
    "quadrotor": (LEARNING, hovering),
}


class Eager:
    """The same training on a cart with one pole, in torch as its users write it, from a learner's initial numbers."""

    def __init__(self, learner: ActorCritic):
        self.settings, self.learner = learner.settings, learner
        dt, length = learner.system.dt, learner.settings.horizon
        self.move, _ = eager.cartpole(replace(make_case("cartpole", "R", 1, poles=1, steps=length), dt=dt))
        self.actor, self.critic, self.target = learner.actor, learner.critic, learner.target
        self.actor_optimiser = torch.optim.Adam(self.actor.parameters(), lr=self.settings.rate, betas=(0.7, 0.95))
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), lr=1e-3, betas=(0.7, 0.95))
        self.x, self.weights = learner.states, torch.tensor(self.settings.state_cost)

    def unroll(self, flow: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unroll a window; return the actor's loss, states and costs."""
        x, states, costs, total = self.x, [self.x], [], 0.0
        for n in range(self.settings.horizon):
            x = self.move(x, self.actor(x.detach() if flow == "M" else x))
            cost = 1.0 - x[:, 2].cos() + (x.square() * self.weights).sum(dim=1)
            total = total + self.settings.discount**n * cost.mean()
            states.append(x)
            costs.append(cost)
        value = self.target(self.learner.observer(x)).mean()
        loss = (1.0 - self.settings.discount) * total + self.settings.discount**self.settings.horizon * value
        return loss, torch.stack(states).detach(), torch.stack(costs).detach()

    def gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the update in the actor's gradients; return states and costs. C unrolls twice."""
        found, parameters = [], list(self.actor.parameters())
        for flow in {"regular": "R", "modified": "M", "combined": "MR"}[self.settings.flow]:
            loss, states, costs = self.unroll(flow)
            found.append(torch.autograd.grad(loss, parameters))
        for p, m, r in zip(parameters, found[0], found[-1], strict=True):
            p.grad = m if len(found) == 1 else torch.where(m.sign() == r.sign(), m, 0.0)
        return states, costs

    def step(self) -> None:
        """Unroll a window, take a step with the actor and several with the critic; environments go on."""
        s = self.settings
        states, costs = self.gradient()
        torch.nn.utils.clip_grad_norm_(self.actor.parameters(), s.clip)
        self.actor_optimiser.step()
        with torch.no_grad():
            features = self.learner.observer(states.flatten(0, 1))
            values = self.target(features).view(states.shape[:2])
            targets, following = [], values[-1]
            for n in reversed(range(len(costs))):
                ahead = (1.0 - s.trace) * values[n + 1] + s.trace * following
                following = (1.0 - s.discount) * costs[n] + s.discount * ahead
                targets.append(following)
        rows, goals = features[: -s.environments], torch.stack(targets[::-1]).flatten()
        for _ in range(s.critic_epochs):
            for chosen in torch.randperm(len(goals)).chunk(s.critic_minibatches):
                self.critic_optimiser.zero_grad()
                torch.nn.functional.mse_loss(self.critic(rows[chosen])[:, 0], goals[chosen]).backward()
                self.critic_optimiser.step()
        with torch.no_grad():
            for mine, its in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                mine.lerp_(its, s.target_rate)
            self.learner.take_up(states[1:])
            self.learner.updates += 1
            self.x, anew = self.learner.reset(states[-1], self.learner.ages + s.horizon, 0)
            self.learner.ages = torch.where(anew, 0, self.learner.ages + s.horizon)


def difference(settings: Settings) -> float:
    """Return how far the actor's second update is from that of torch, as a share of its norm."""
    own, peer = ActorCritic(settings), ActorCritic(settings)
    for learner in (own, peer):
        learner.step()
    Eager(peer).gradient()
    own.step()  # which clips
    gradients = [[p.grad.numpy() for p in learner.actor.parameters()] for learner in (own, peer)]
    norm = float(np.sqrt(sum(np.square(part).sum() for part in gradients[1])))
    clipped = [part * min(1.0, settings.clip / norm) for part in gradients[1]]
    return relative_difference(gradients[0], clipped)


def compare(flow: str, rounds: int, steps: int) -> bool:
    """Print milliseconds of a training step, of both, and their ratio; return whether they compute the same."""
    settings = replace(SWING_UP, flow=flow)
    error = difference(settings)
    own, peer = ActorCritic(settings, graph=True), Eager(ActorCritic(settings))
    times = np.array([[milliseconds(each.step, steps) for each in (own, peer)] for _ in range(rounds + 1)])[1:].T
    print(
        f"{flow}, {settings.environments} environments × {settings.horizon} steps: {median(times[0]):.2f} ms, torch "
        f"{median(times[1]):.2f} ms, torch by this {paired_ratio(times[1], times[0]):.2f} (processor time, median of "
        f"{rounds} rounds); updates differ by {error:.1e}",
        flush=True,
    )
    return error < 1e-3


def milliseconds(call: Callable[[], object], times: int) -> float:
    """Return the processor time of a call, the mean over some."""
    begin = time.process_time()
    for _ in range(times):
        call()
    return 1e3 * (time.process_time() - begin) / times


def solve(task: str, flow: str, seed: int) -> bool:
    """Train once, print how it went; return whether the task is solved."""
    settings, ended_well = TASKS[task]
    begin, wall = time.process_time(), time.perf_counter()
    learner = ActorCritic(replace(settings, seed=seed, flow=flow or settings.flow), graph=True)
    for _ in range(settings.updates):
        learner.step()
    begin, wall = time.process_time() - begin, time.perf_counter() - wall
    states, costs = learner.evaluate()
    share = ended_well(states).float().mean().item()
    print(
        f"{task}, {learner.settings.flow}, seed {seed}: {100 * share:.1f} % of the episodes end well, cost of a step "
        f"{costs.mean():.4f}, in the last {LAST} {costs[-LAST:].mean():.4f}; {settings.updates} updates, "
        f"{begin:.0f} s of processor time, {wall:.0f} s in all",
        flush=True,
    )
    return share >= 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.actor_critic", description=__doc__)
    parser.add_argument("--solve", nargs="+", choices=list(TASKS), default=[], help="Tasks to train for, not to time.")
    parser.add_argument("--flow", nargs="+", default=[], help="Flows; R, M and C to time, a task's own to solve it.")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=5, help="Training steps in a turn.")
    given = parser.parse_args(arguments)
    warp.config.log_level = warp.LOG_WARNING
    torch.set_num_threads(1)
    if not given.solve:
        flows = given.flow or ["regular", "modified", "combined"]
        agree = [compare(flow, given.rounds, given.steps) for flow in flows]
        return int(not all(agree))
    runs = [(task, flow, seed) for task in given.solve for flow in given.flow or [""] for seed in given.seeds]
    solved = [solve(*run) for run in runs]
    print(f"{sum(solved)} of {len(solved)} solved")
    return int(not all(solved))


if __name__ == "__main__":
    sys.exit(main())
