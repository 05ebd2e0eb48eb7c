"""Train the controllers that come with the demos; from a fixed seed, in minutes.

    python -m demos.train_weights                  # all
    python -m demos.train_weights cartpole --only 1-C 2-C

Unlike the published experiments these trainings go on where the last unrolling ended: a pool of states is unrolled,
the controller updated, and the ends become the next starts, but for some that start afresh. So a controller learns to
go on for as long as somebody watches.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warp

from controllers.commandline import Parser
from demos import cartpole, herd, quantum
from demos.weights import FOLDER, save_weights
from warp_phys.interop.torch import Rollout
from warp_phys.systems import CartPole, Quantum, System

CLIP = 1.0
"""Largest norm of an update."""


@dataclass(frozen=True)
class Task:
    """One controller to train."""

    demo: str
    """Demo whose file gets the weights."""
    key: str
    """Name of the controller in that file."""
    flow: str
    """Flow to train with."""
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
    afresh: float = 0.3
    """Share of the pool that starts afresh after every update."""
    batch: int = 32
    when: str | Sequence[int] = "every"
    """Times at which the loss looks at the states."""
    control_cost: float = 0.0
    extra: Callable[[torch.Tensor], Any] | None = None
    """Further cost, of states (steps + 1, B, D)."""


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


def fresh_hanging_carts(system: System, count: int, generator: np.random.Generator) -> np.ndarray:
    """The system's own initial states, all poles hanging, some of them closer together and slower than others."""
    states = system.sample(count, seed=int(generator.integers(2**31)), dtype=np.float64)
    rest = np.zeros(system.state_size)
    rest[2::2] = np.pi
    return rest + generator.uniform(0.1, 1.0, (count, 1)) * (states - rest)


def tame_carts(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles back into their range; carts and poles that are not too fast."""
    fit = (np.abs(states[:, 1]) < 10.0) & (np.abs(states[:, 3::2]) < 20.0).all(axis=1)
    return cartpole.seen(states), fit


def cart_cost(states: torch.Tensor) -> torch.Tensor:
    """Cost of a cart's speed."""
    return 0.01 * states[..., 1].square().mean()


def fresh_herds(system: System, count: int, generator: np.random.Generator) -> np.ndarray:
    """The system's own initial states around any place, so that the target is up to 5 m away."""
    states = system.sample(count, seed=int(generator.integers(2**31)), dtype=np.float64).reshape(count, -1, 4)
    angle, radius = generator.uniform(0.0, 2.0 * np.pi, count), generator.uniform(0.0, 4.0, count)
    states[:, :, :2] += np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, None]
    return states.reshape(count, -1)


def tame_herds(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Herds that have not scattered."""
    return states, (np.abs(states) < 12.0).all(axis=1)


def herd_cost(states: torch.Tensor) -> torch.Tensor:
    """Cost of dogs that run away: squared distance beyond 5 m from the target."""
    dogs = states[..., : 4 * herd.SYSTEM.drivers].unflatten(-1, (-1, 4))[..., :2]
    return 0.1 * (dogs.square().sum(dim=-1) - 25.0).clamp(min=0.0).mean()


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
    for poles in range(1, cartpole.MOST_POLES + 1):
        for flow in cartpole.FLOWS:
            system: System = CartPole(poles=poles, dt=cartpole.DT)
            found.append(
                Task(
                    "cartpole",
                    f"{poles}-{flow}",
                    flow,
                    system,
                    partial(cartpole.make_controller, poles),
                    fresh_carts if poles == 1 else fresh_hanging_carts,
                    tame_carts,
                    steps=100 if poles == 1 else 75,
                    updates=5000 if poles == 1 else 3000,
                    rate=3e-3,
                    # several equal poles cannot be held together for long: they learn to swing up, and to hold a while
                    afresh=0.4 if poles == 1 else 0.9,
                    when="every" if poles == 1 else range(45, 76),
                    extra=cart_cost,
                )
            )
    for flow in herd.FLOWS:
        found.append(
            Task(
                "herd",
                flow,
                flow,
                herd.SYSTEM,
                herd.make_controller,
                fresh_herds,
                tame_herds,
                steps=90,
                updates=3000,
                rate=2e-3,
                control_cost=0.003,
                extra=herd_cost,
            )
        )
    for target in quantum.TARGETS:
        found.append(
            Task(
                "quantum",
                str(target),
                "C",
                quantum.make_system(target),
                quantum.make_controller,
                fresh_waves,
                tame_waves,
                steps=128,
                updates=8000,
                rate=1e-3,
                batch=8,
                afresh=0.5,
            )
        )
    return found


def train(task: Task, updates: int = 0, tell: Callable[[int, float], Any] | None = None) -> torch.nn.Module:
    """Train one controller; the same on every run.

    Args:
        task: What to train.
        updates: Number of updates in place of the task's own.
        tell: Told now and then how many updates are done, and the mean loss since it was told last.
    """
    updates = updates or task.updates
    controller = task.make()
    rollout = Rollout(task.system, controller, steps=task.steps, flow=task.flow, on_divergence="mask")
    optimiser = torch.optim.Adam(controller.parameters(), lr=task.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    generator = np.random.default_rng(0)
    pool, losses = task.fresh(task.system, task.batch, generator), []
    for done in range(1, updates + 1):
        states, controls = rollout(pool.astype(np.float32))
        loss = task.system.loss(states, controls, when=task.when, control_cost=task.control_cost)
        if task.extra:
            loss = loss + task.extra(states)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controller.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        ends, fit = task.tame(states[-1].detach().numpy().astype(float))
        afresh = ~fit | ~np.isfinite(ends).all(axis=1) | (generator.random(task.batch) < task.afresh)
        pool = np.where(afresh[:, None], task.fresh(task.system, task.batch, generator), ends)
        if tell and (done % max(1, updates // 10) == 0):
            tell(done, float(np.mean(losses)))
            losses = []
    return controller


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    known = tasks()
    demos = list(dict.fromkeys(task.demo for task in known))
    parser = Parser(prog="python -m demos.train_weights", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "demos", nargs="*", metavar="DEMO", help=f"Whose controllers: {', '.join(demos)} (default: all)."
    )
    parser.add_argument("--only", nargs="+", metavar="KEY", help="Only these of them, such as 1-C for the cart-pole.")
    parser.add_argument("--updates", type=int, default=0, help="Updates of each training (default: its own number).")
    parser.add_argument("--out", type=Path, default=FOLDER, help="Folder for the weights (default: where demos look).")
    given = parser.parse_args(arguments)
    chosen = [task for task in known if task.demo in (given.demos or demos) and task.key in (given.only or [task.key])]
    if not chosen or not set(given.demos) <= set(demos):
        parser.error(f"nothing to train; the controllers are {', '.join(f'{task.demo} {task.key}' for task in known)}")
    if given.updates < 0:
        parser.error(f"updates must be at least 1, or 0 for each training's own number, got {given.updates}")
    warp.config.log_level = warp.LOG_WARNING
    torch.set_num_threads(1)
    for task in chosen:
        start = time.perf_counter()

        def tell(done: int, loss: float, name: str = f"{task.demo} {task.key}", start: float = start) -> None:
            print(f"{name}: {done} updates, mean loss {loss:.4g}, {time.perf_counter() - start:.0f} s", flush=True)

        path = save_weights(task.demo, {task.key: train(task, given.updates, tell)}, given.out)
    print(f"Weights: {path.parent.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
