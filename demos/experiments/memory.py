"""A cart-pole whose controller sees positions only: what memory is worth, and which path it learns through."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from controllers.settings import derive_seeds
from demos.experiments.study import Line, Panel, Point, Study, Trial
from warp_phys import COMBINED, MODIFIED, REGULAR, CartPole, Combined, Flow
from warp_phys.interop.torch import Rollout, Update


class Task(NamedTuple):
    """A swing-up from hanging."""

    title: str
    system: CartPole
    steps: int
    """Time steps of an unrolling."""
    held: int
    """How many of the last states the loss looks at."""
    force: float | None
    """Largest force [N], if there is one."""
    epochs: int
    failed: float
    """A run that ends above this test loss has failed."""

    @property
    def times(self) -> tuple[int, ...]:
        """Steps at which the loss looks."""
        return tuple(range(self.steps - self.held + 1, self.steps + 1))


TASKS = {
    "hold": Task("one pole, to be held", CartPole(poles=1, dt=0.02), 150, 50, 10.0, 300, failed=0.05),
    "poles-4": Task("4 poles at the end", CartPole(poles=4, dt=0.01), 100, 1, None, 200, failed=0.02),
}
"""Three seconds of which the last one shall be spent upright; and the published swing-up of four poles."""
STATES, BATCH = 256, 8
"""Training states, as many test states, and states of a minibatch."""
RATE = 1e-3
"""Learning rate of Adam; the norm of an update is clipped to 1."""
UPRIGHT = 0.9
"""A pole is up where the cosine of its angle is above this, 26 degrees."""


def positions_of(x: torch.Tensor) -> torch.Tensor:
    """Return what the controller sees of states (B, 2 P + 2): the cart's position, sines and cosines of P angles."""
    return torch.cat([x[:, :1], x[:, 2::2].sin(), x[:, 2::2].cos()], dim=1)


def state_of(x: torch.Tensor) -> torch.Tensor:
    """Return the same and all velocities."""
    return torch.cat([positions_of(x), x[:, 1::2]], dim=1)


class Controller(torch.nn.Module):
    """A controller with numbers that it remembers, and a force that may be bounded."""

    memory: int = 0
    """Numbers H that are remembered."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.poles, self.force = task.system.poles, task.force

    def bounded(self, output: torch.Tensor) -> torch.Tensor:
        """Return the force that an output stands for."""
        return output if self.force is None else self.force * torch.tanh(output)


class Dense(Controller):
    """Two hidden layers, no memory."""

    def __init__(self, task: Task, velocities: bool = False, width: int = 64) -> None:
        super().__init__(task)
        self.see = state_of if velocities else positions_of
        seen = (3 if velocities else 2) * self.poles + (2 if velocities else 1)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(seen, width), torch.nn.Tanh(),
            torch.nn.Linear(width, width), torch.nn.Tanh(),
            torch.nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the force, (B, 1), at states (B, D)."""
        return self.bounded(self.layers(self.see(x)))


class GRU(Controller):
    """A gated recurrent unit that sees positions."""

    def __init__(self, task: Task, width: int = 32) -> None:
        super().__init__(task)
        self.memory = width
        self.cell, self.last = torch.nn.GRUCell(2 * self.poles + 1, width), torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the force, (B, 1), and what is remembered, (B, H)."""
        h = self.cell(positions_of(x), h)
        return self.bounded(self.last(h)), h


class LSTM(Controller):
    """A long short-term memory that sees positions; its two states are one memory."""

    def __init__(self, task: Task, width: int = 32) -> None:
        super().__init__(task)
        self.memory, self.width = 2 * width, width
        self.cell, self.last = torch.nn.LSTMCell(2 * self.poles + 1, width), torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the force, (B, 1), and what is remembered, (B, 2 H)."""
        h, c = self.cell(positions_of(x), (h[:, : self.width], h[:, self.width :]))
        return self.bounded(self.last(h)), torch.cat([h, c], dim=1)


NETWORKS: dict[str, Callable[[Task], Controller]] = {
    "gru": GRU,
    "lstm": LSTM,
    "mlp": Dense,
    "velocities": lambda task: Dense(task, velocities=True),
}
"""The controllers by name."""

FORGETFUL = Flow(1.0, 0.0, memory=0.0)
"""M that cuts the memory's path too, γ = 0."""
FLOWS: dict[str, Flow | Combined] = {
    "regular": REGULAR,
    "modified": MODIFIED,
    "combined": COMBINED,
    "modified-memory-0": FORGETFUL,
    "combined-memory-0": Combined(base=FORGETFUL),
}
"""The flows by the names of their folders."""


def make_trial(panel: str, flow: str, epochs: int, seed: int) -> Trial:
    """One training; panels are called network-task."""
    network, _, name = panel.partition("-")
    task = TASKS[name]

    def train(stop: Callable[[], bool], progress: Callable[[Point], None]) -> bool:
        seeds, before = derive_seeds(seed), time.process_time()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.weights)
            controller = NETWORKS[network](task)
        rollout = Rollout(task.system, controller, task.steps, FLOWS[flow], backend="fused", memory=controller.memory)
        optimiser = torch.optim.Adam(controller.parameters(), lr=RATE, fused=True)
        update = Update(rollout, optimiser, when=task.times, clip="norm", clip_at=1.0)
        states, test_states = (torch.as_tensor(task.system.sample(STATES, seed=own)) for own in seeds[1:3])
        for _ in range(epochs):
            if len(update.minibatches(states.unflatten(0, (-1, BATCH)), stop)) < STATES // BATCH:
                return False
            with torch.no_grad():
                reached = rollout(test_states)[0]
            loss = float(task.system.loss(reached, when=task.times))
            progress(Point(loss, share_held(reached, task.held), time.process_time() - before))
        return True

    return Trial(panel, flow, seed, epochs, train)


def share_held(states: torch.Tensor, held: int) -> float:
    """Return the share of trajectories, shape (T + 1, B, D), whose poles are up in all of the last `held` states."""
    return float((states[-held:, :, 2::2].cos().amin(dim=(0, 2)) > UPRIGHT).float().mean())


_ALL, _PUBLISHED = tuple(FLOWS), ("regular", "modified", "combined")
_PANELS = {
    "gru-hold": ("GRU", _ALL),
    "mlp-hold": ("MLP", _PUBLISHED),
    "lstm-hold": ("LSTM", _PUBLISHED),
    "velocities-hold": ("MLP that sees velocities", _PUBLISHED),
    "gru-poles-4": ("GRU", _ALL),
    "mlp-poles-4": ("MLP", _PUBLISHED),
}


def _panel(name: str, title: str, lines: tuple[str, ...]) -> Panel:
    task = TASKS[name.partition("-")[2]]
    return Panel(f"{title}, {task.title}", lines, task.epochs, reached=0.1, failed=task.failed)


STUDY = Study(
    title="Cart-poles of which positions are seen",
    panels={name: _panel(name, *entry) for name, entry in _PANELS.items()},
    lines={
        "regular": Line("R", "#D55E00", (0, (5, 1.5))),
        "modified": Line("M, γ = 1", "#0072B2", (0, (5, 1.5, 1, 1.5))),
        "combined": Line("C, γ = 1", "#009E73", "-"),
        "modified-memory-0": Line("M, γ = 0", "#56B4E9", (0, (1, 1.2))),
        "combined-memory-0": Line("C, γ = 0", "#E69F00", (0, (9, 2))),
    },
    make=make_trial,
    share="pole up",
)
