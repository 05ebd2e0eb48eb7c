"""A network trained with R, M, S and C in Newton: on its cart with two poles, on its ant, or on a hopper.

    python -m demos.newton_control --save newton.png
    python -m demos.newton_control --task ant --flows RMC --save ant.png
    python -m demos.newton_control --task hopper --flows RMC --save hopper.png

An episode of the ant or the hopper has 240 steps. The picture shows the losses, and what the networks do in the end.

Needs Newton, `pip install "warp_phys[newton]"`. Opens a window unless it is told to save; prints the losses either way.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt("newton")

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import warp
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags
from controllers.networks import MLP
from demos.colours import colour
from demos.newton_tasks import TASKS, Task, segments
from demos.outputs import PICTURES, check_file
from demos.swingup import has_display
from warp_phys.errors import check_choice, check_count
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout

POSES = 12
"""Poses of a rollout that are drawn."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    task: str = "cartpole"
    """What is trained: cartpole (two poles in a chain are kept upright), ant or hopper (it goes towards +x)."""
    flows: str = "RMSC"
    """Letters of the flows that are trained with, one after the other, from the same weights."""
    updates: int = 100
    """Updates of each training."""
    worlds: int = 16
    """Samples of an update, each a world of the model."""
    steps: int = 0
    """Control steps of a rollout; 0: as many as suit the task."""
    rate: float = 0.003
    """Learning rate of Adam."""
    seed: int = 0
    """Seed of the weights and of the initial states."""
    save: str = ""
    """File for the picture (.png, .pdf or .svg); without, a window opens."""

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice("task", self.task, tuple(TASKS))
        check_count("updates", self.updates)
        check_count("worlds", self.worlds)
        for name in ("steps", "seed"):
            check_count(name, getattr(self, name), least=0)
        for letter in self.flows:
            resolve(letter)
        if not self.flows:
            raise ValueError("flows must name at least one flow, got none")
        if not self.rate > 0.0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        if self.save:
            check_file("save", self.save, PICTURES)


class Curve(NamedTuple):
    """A training."""

    losses: list[float]
    """Loss over the test states, before the first update and after every update."""
    seconds: float
    """Wall-clock time of an update, the median."""
    poses: list[np.ndarray]
    """What the first world of the tests looks like along its last rollout, see `segments`."""


class Policy(torch.nn.Module):
    """A network on what a task shows of the states."""

    def __init__(self, task: Task, system: Any, seed: int):
        super().__init__()
        self.observe, self.bounded = task.observe, task.bounded
        seen = task.observe(torch.zeros(1, system.state_size)).shape[1]
        sizes = SimpleNamespace(state_size=seen, control_size=system.control_size)
        self.network = MLP(sizes, hidden=(64, 64), init="zero-last", seed=seed)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return controls, shape (B, K)."""
        controls = self.network(self.observe(states))
        return controls.tanh() if self.bounded else controls


def train(task: Task, system: Any, settings: Settings, flow: str) -> Curve:
    """Train a network with one flow; the loss is the mean cost of all states of a rollout."""
    network = Policy(task, system, settings.seed)
    rollout = Rollout(system, network, settings.steps or task.steps, flow=resolve(flow))
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate)
    test = task.start(system, np.random.default_rng([settings.seed, 0]))
    losses, seconds = [], []
    for update in range(settings.updates + 1):
        with torch.no_grad():
            states, controls = rollout(test)
            losses.append(float(task.cost(states, controls)))
        if update == settings.updates:
            break
        start = time.perf_counter()
        optimiser.zero_grad()
        task.cost(*rollout(task.start(system, np.random.default_rng([settings.seed, update + 1])))).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        seconds.append(time.perf_counter() - start)
    poses = [segments(system, states[n].numpy()) for n in range(0, len(states), max(1, len(states) // POSES))]
    return Curve(losses, float(np.median(seconds)), poses)


def draw(figure: Any, settings: Settings, curves: Mapping[str, Curve]) -> None:
    """Draw the losses over the updates, and below them each flow's poses along one rollout, if it has capsules."""
    everything = np.concatenate([pose for curve in curves.values() for pose in curve.poses])
    strips = curves if len(everything) else {}
    heights = [3, 2] if strips else [1]
    grid = figure.add_gridspec(len(heights), max(1, len(strips)), height_ratios=heights)
    axes = figure.add_subplot(grid[0, :])
    for i, (letter, curve) in enumerate(curves.items()):
        dashes = (0, (6, 2 * i))  # curves may lie on each other
        axes.plot(curve.losses, color=colour(letter), label=f"{letter} {resolve(letter).name}", linestyle=dashes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = f"{TASKS[settings.task].title}, seed {settings.seed}"
    axes.set(xlabel="update", ylabel="test loss", title=title)
    axes.legend()
    if not strips:
        return
    left, right = everything[:, [0, 2]].min() - 0.5, everything[:, [0, 2]].max() + 0.5
    for i, (letter, curve) in enumerate(strips.items()):
        strip = figure.add_subplot(grid[1, i])
        for n, pose in enumerate(curve.poses):
            for x, z, to_x, to_z, radius in pose:
                strip.add_patch(_capsule((x, z), (to_x, to_z), radius, colour(letter), (n + 1) / len(curve.poses)))
        strip.axhline(0.0, color="black", linewidth=0.8)
        strip.set(xlim=(left, right), ylim=(-0.1, everything[:, [1, 3]].max() + 0.2), aspect="equal", yticks=[])
        strip.set(title=letter, xlabel="x [m], the later the darker")


def _capsule(one: tuple[float, float], other: tuple[float, float], radius: float, shade: str, alpha: float) -> Polygon:
    """Return the outline of a capsule."""
    turn = np.arctan2(other[1] - one[1], other[0] - one[0])
    angles = turn + np.linspace(np.pi / 2.0, 3.0 * np.pi / 2.0, 12)
    halves = [
        np.add(end, radius * np.stack([np.cos(a), np.sin(a)], 1)) for end, a in ((one, angles), (other, angles + np.pi))
    ]
    return Polygon(np.concatenate(halves), facecolor=shade, edgecolor="none", alpha=alpha)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    warp.config.log_level = warp.LOG_WARNING
    parser = Parser(prog="python -m demos.newton_control", description=(__doc__ or "").partition("\n")[0])
    add_flags(parser, Settings)
    try:
        settings = Settings(**vars(parser.parse_args(arguments)))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if not settings.save and not has_display():
        parser.error("there is no display to open a window on; give --save FILE.png")
    torch.set_num_threads(1)  # the networks are small
    task = TASKS[settings.task]
    system = task.build(settings.worlds)
    steps = settings.steps or task.steps
    print(f"{system}, {steps} steps, {settings.updates} updates, seed {settings.seed}", flush=True)
    curves = {}
    for letter in settings.flows:
        with parser.answering(f"the training with {letter}"):
            curves[letter] = curve = train(task, system, settings, letter)
        best = min(curve.losses)
        print(
            f"{letter} {resolve(letter).name:<9} test loss {curve.losses[0]:.4f} → {curve.losses[-1]:.4f}, best "
            f"{best:.4f}, {curve.seconds:.2f} s per update",
            flush=True,
        )
    layout: dict[str, Any] = {"figsize": (7, 4.2 + 1.1 * len(curves)), "layout": "constrained"}
    if settings.save:
        figure, path = Figure(**layout), Path(settings.save)
        draw(figure, settings, curves)
        with parser.answering(), atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=110)
        print(f"Picture: {path.resolve()}")
    else:
        from matplotlib import pyplot as plt  # noqa: PLC0415, it looks for a display as soon as it is imported

        draw(plt.figure(**layout), settings, curves)
        plt.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
