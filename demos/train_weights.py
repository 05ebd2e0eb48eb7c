"""Train the controllers that come with the demos; from a fixed seed, in minutes.

    python -m demos.train_weights                  # all
    python -m demos.train_weights cartpole --only 1-C 2-C

Where a demo shows a task of some seconds, its controllers are those of the published experiments. Where somebody may
watch for minutes they are trained so that they last: a pool of states is unrolled, the controller updated, and the ends
of the unrolling become the next starts, but for some that start afresh.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warp

from controllers.actor_critic import Settings as Learning
from controllers.actor_critic import learn
from controllers.checkpoint import CONTROLLER
from controllers.commandline import Parser
from controllers.exporting import load_controller
from controllers.settings import Training, check_setting
from controllers.training import train
from demos import cartpole, herd, quadrotor, quantum, weather_numbers
from demos.experiments.plan import find_runs
from demos.experiments.published import EXPERIMENTS
from demos.outputs import check_folder
from demos.weather_numbers import SCENARIOS, Scenario
from demos.weights import FOLDER, load_arrays, save_weights
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout
from warp_phys.systems import Quantum, System

CLIP = 1.0
"""Largest norm of an update."""


Tell = Callable[[str, float], Any]
Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def quiet(_done: str, _loss: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Lasting:
    """A training that goes on where the last unrolling ended."""

    system: System
    """What is steered."""
    make: Callable[[], torch.nn.Module]
    """Makes the network."""
    fresh: Callable[[System, int, np.random.Generator], np.ndarray]
    """Draws initial states, (B, D)."""
    tame: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """From the ends of an unrolling (B, D) to the next starts, and which of them are fit to go on from (B,)."""
    steps: int
    updates: int
    rate: float
    batch: int = 32
    afresh: float = 0.4
    """Share of the pool that starts afresh after every update."""
    cost: Cost | None = None
    """Loss of states (steps + 1, B, D) and controls (steps, B, K); that of the system at every time if None."""


@dataclass(frozen=True)
class Task:
    """One controller to train."""

    demo: str
    """Demo whose file gets the weights."""
    key: str
    """Name of the controller in that file."""
    flow: str
    """Flow to train with."""
    training: Training | Lasting | Learning | Scenario
    """How: as published, so that it lasts, by the actor-critic, or early in its training, for the weather."""


def fresh_carts(system: System, count: int, generator: np.random.Generator) -> np.ndarray:
    """Carts whose poles are about together: half of them nearly at rest, hanging or upright, half of them anyhow."""
    states = generator.uniform(-1.0, 1.0, (count, system.state_size))
    spread = generator.choice([0.02, 0.1, 0.4], (count, 1))
    at_rest = generator.choice([0.0, np.pi], (count, 1)) + generator.uniform(-0.4, 0.4, (count, 1))
    anyhow = generator.uniform(-np.pi, np.pi, (count, 1))
    calm = generator.random((count, 1)) < 0.5
    rates = np.where(calm, 0.5, 4.0) * generator.uniform(-1.0, 1.0, (count, 1))
    states[:, 2::2] = np.where(calm, at_rest, anyhow) + spread * states[:, 2::2]
    states[:, 3::2] = rates + 2.0 * spread * states[:, 3::2]
    return states


def tame_carts(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Carts and poles that are not too fast."""
    fit = (np.abs(states[:, 1]) < 10.0) & (np.abs(states[:, 3::2]) < 20.0).all(axis=1)
    return states, fit


def cart_cost(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """The system's loss, and a cost of speed: of the cart's, and of the pole's, since whirling round is a trap."""
    loss = cartpole.make_system(1).loss(states, when="every")
    return loss + 0.01 * states[..., 1].square().mean() + 0.002 * states[..., 3::2].square().mean()


def fresh_herds(system: System, count: int, generator: np.random.Generator) -> np.ndarray:
    """The system's own initial states around any place up to 4 m from the target, the dogs nearer or farther."""
    states = system.sample(count, seed=int(generator.integers(2**31)), dtype=np.float64).reshape(count, -1, 4)
    dogs = herd.SYSTEM.drivers
    states[:, :dogs, :2] *= generator.uniform(0.5, 1.5, (count, dogs, 1))
    angle, radius = generator.uniform(0.0, 2.0 * np.pi, count), generator.uniform(0.0, 4.0, count)
    states[:, :, :2] += np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, None]
    return states.reshape(count, -1)


def tame_herds(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Herds that have not scattered."""
    return states, (np.abs(states) < 12.0).all(axis=1)


def herd_cost(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """The sheep's mean distance from the target, not its square: else one that is lost outweighs all others."""
    agents = states[1:].reshape(len(controls), states.shape[1], -1, 4)
    return (agents[:, :, herd.SYSTEM.drivers :, :2].square().sum(dim=3) + 0.5**2).sqrt().mean()


def fresh_waves(system: System, count: int, generator: np.random.Generator) -> np.ndarray:
    """Random superpositions of eigenstates 1 to 5, mostly of the first two."""
    assert isinstance(system, Quantum)
    scale = np.array([1.0, 1.0, 0.3, 0.3, 0.3])
    amplitudes = (generator.standard_normal((count, 5)) + 1j * generator.standard_normal((count, 5))) * scale
    psi = amplitudes @ np.stack([system.eigenstate(number) for number in range(1, 6)])
    psi /= np.linalg.norm(psi, axis=1, keepdims=True)
    return np.stack([psi.real, psi.imag], axis=2).reshape(count, -1)


def tame_waves(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All of them, their norm made 1 again."""
    return states / np.linalg.norm(states, axis=1, keepdims=True), np.isfinite(states).all(axis=1)


def tasks() -> list[Task]:
    """All controllers that come with the demos."""
    found = []
    for flow in cartpole.FLOWS:
        one = cartpole.make_system(1)
        make = partial(cartpole.make_controller, 1)
        look = Lasting(one, make, fresh_carts, tame_carts, steps=100, updates=1500, rate=3e-3, cost=cart_cost)
        found.append(Task("cartpole", f"1-{flow}", flow, look))
        for poles in range(2, cartpole.MOST_POLES + 1):
            published = EXPERIMENTS["cartpole"].training(poles, flow=flow, out="")
            found.append(Task("cartpole", f"{poles}-{flow}", flow, published))
    look = Lasting(
        herd.SYSTEM,
        herd.Policy,
        fresh_herds,
        tame_herds,
        steps=120,
        updates=3000,
        rate=2e-3,
        cost=herd_cost,
    )
    found.append(Task("herd", herd.FLOW, herd.FLOW, look))
    found.append(Task("quadrotor", "wind", quadrotor.LEARNING.flow, quadrotor.LEARNING))
    for target in quantum.TARGETS:
        well = quantum.make_system(target)
        look = Lasting(
            well,
            quantum.make_controller,
            fresh_waves,
            tame_waves,
            steps=128,
            updates=8000,
            rate=1e-3,
            batch=8,
            afresh=0.5,
        )
        found.append(Task("quantum", str(target), "C", look))
    found += [Task("weather", name, "C", scenario) for name, scenario in SCENARIOS.items()]
    return sorted(found, key=lambda task: task.demo)


def make_controller(
    task: Task, runs: str = "", epochs: int = 0, updates: int = 0, tell: Tell = quiet
) -> torch.nn.Module:
    """Train the controller of a task; the same on every run.

    Args:
        task: What to train.
        runs: Folder of `demos.paper` from which a run that is finished is taken, not trained again.
        epochs: Number of epochs of a published training, in place of its own.
        updates: Number of updates of a lasting training, in place of its own.
        tell: Told now and then what is done, in words, and a loss.
    """
    if isinstance(task.training, Scenario):
        return weather_numbers.train(task.training, seed=0)
    if isinstance(task.training, Lasting):
        return train_lasting(task.training, task.flow, updates, tell)
    if isinstance(task.training, Learning):
        learning = replace(task.training, updates=updates or task.training.updates)
        return learn(learning, progress=lambda record: tell(f"update {record.update}", record.cost)).actor
    settings = replace(task.training, epochs=epochs or task.training.epochs)
    taken = finished_run(settings, runs) if runs and not epochs else None
    if taken is not None:
        return taken
    return train(settings, progress=lambda record: tell(f"epoch {record.epoch}", record.test_loss)).controller


def finished_run(settings: Training, runs: str) -> torch.nn.Module | None:
    """The controller of a finished run of `demos.paper` with these settings, None where there is none."""
    for run in find_runs(runs):
        if replace(run.settings, out="") == settings and (run.folder / CONTROLLER).exists():
            return load_controller(run.folder)[0]
    return None


def train_lasting(task: Lasting, flow: str, updates: int = 0, tell: Tell = quiet) -> torch.nn.Module:
    """Train a controller so that it lasts.

    Args:
        task: How.
        flow: The flow to train with.
        updates: Number of updates in place of the task's own.
        tell: Told now and then how many updates are done, and the mean loss since it was told last.
    """
    controller = task.make()
    updates = updates or task.updates
    rollout = Rollout(task.system, controller, steps=task.steps, flow=resolve(flow), on_divergence="mask")
    optimiser = torch.optim.Adam(controller.parameters(), lr=task.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    generator = np.random.default_rng(0)
    pool, losses = task.fresh(task.system, task.batch, generator), []
    for done in range(1, updates + 1):
        states, controls = rollout(pool.astype(np.float32))
        loss = task.cost(states, controls) if task.cost else task.system.loss(states, when="every")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controller.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        ends, fit = task.tame(states[-1].detach().numpy().astype(float))
        afresh = ~fit | ~np.isfinite(ends).all(axis=1) | (generator.random(task.batch) < task.afresh)
        pool = np.where(afresh[:, None], task.fresh(task.system, task.batch, generator), ends)
        if done % max(1, updates // 10) == 0:
            tell(f"update {done}", float(np.mean(losses)))
            losses = []
    return controller


class Teller:
    """Prints how a training gets on, not more often than every two seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.start, self.last = name, time.perf_counter(), -math.inf

    def __call__(self, done: str, loss: float) -> None:
        """Print it."""
        now = time.perf_counter()
        if now - self.last > 2.0:
            self.last = now
            print(f"{self.name}: {done}, loss {loss:.4g}, {now - self.start:.0f} s", flush=True)


def check(given: Namespace, demos: Collection[str]) -> None:
    """Raise ValueError where numbers, runs or the files of these demos are not such that a training could end well."""
    for name in ("epochs", "updates"):
        if getattr(given, name) is not None:
            check_setting(name, getattr(given, name), int, at_least=1)
    if given.runs and not find_runs(given.runs):
        raise ValueError(f"runs must name a folder with runs of demos.paper, got {given.runs!r}, which holds none")
    check_folder("out", given.out)
    for demo in sorted(demos):
        load_arrays(demo, given.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    known = tasks()
    demos = list(dict.fromkeys(task.demo for task in known))
    parser = Parser(prog="python -m demos.train_weights", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "demos", nargs="*", metavar="DEMO", help=f"Whose controllers: {', '.join(demos)} (default: all)."
    )
    parser.add_argument("--only", nargs="+", metavar="KEY", help="Only these of them, such as 1-C for the cart-pole.")
    parser.add_argument("--epochs", type=int, help="Epochs of each published training (default: 1000).")
    parser.add_argument("--updates", type=int, help="Updates of each other training (default: its own number).")
    parser.add_argument("--runs", default="", help="Take finished published runs from this folder of demos.paper.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="Folder for the weights (default: where demos look).")
    given = parser.parse_args(arguments)
    chosen = [task for task in known if task.demo in (given.demos or demos) and task.key in (given.only or [task.key])]
    unknown = set(given.only or ()) - {task.key for task in chosen}
    if not chosen or unknown or not set(given.demos) <= set(demos):
        parser.error(f"nothing to train; the controllers are {', '.join(f'{task.demo} {task.key}' for task in known)}")
    try:
        check(given, {task.demo for task in chosen})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    warp.config.log_level = warp.LOG_WARNING
    torch.set_num_threads(1)
    for task in chosen:
        tell = Teller(f"{task.demo} {task.key}")
        with parser.answering(f"the training of {task.demo} {task.key}"):
            controller = make_controller(task, given.runs, given.epochs or 0, given.updates or 0, tell)
            path = save_weights(task.demo, {task.key: controller}, given.out)
    print(f"Weights: {path.parent.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
