"""Two dogs herd four sheep to a target: drag the target anywhere, or take over a dog with the mouse."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from controllers import MLP
from controllers.settings import check_setting
from demos.colours import colour
from demos.frame import Demo
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from demos.widgets import button, choice
from warp_phys.flow import resolve
from warp_phys.systems import Repulsion

FLOWS = ("R", "M", "S", "C")
SYSTEM = Repulsion(drivers=2, evaders=4, dt=4.0 / 60.0)
REACH, ROOM, HASTE = 6.5, 1.15, 2.0
"""Metres to either side of the middle that are drawn at least; more where agents need it; how soon [1/s]."""
TRACE = 20.0
"""Seconds of the trace."""
BOUNDS = ((-8.0, 0.0), (-3.0, 3.0))
"""Least and largest c_radial and c_turn of the controllers [1/s²]."""
LOST = 40.0
"""Distance from the target at which a dog counts as lost [m]."""
GRAB = 0.7
"""How near to a dog or to the target a click must be [m]."""
PULL, BRAKE, STRONGEST = 12.0, 5.0, 60.0
"""A dog led by the mouse: acceleration per distance [1/s²], per speed [1/s], and at most [m/s²]."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    flow: str = "C"
    """Flow with which the first controller was trained: R, M, S or C."""
    seed: int = 0
    """Seed of the initial states."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if self.flow not in FLOWS:
            raise ValueError(f"flow must be one of {', '.join(FLOWS)}, got {self.flow!r}")
        check_setting("seed", self.seed, int, at_least=0)


class Policy(torch.nn.Module):
    """Controls of the dogs: those of a dense network, within bounds in which no dog runs away.

    A dog's c_radial is negative: it is drawn to where ρ = 0, four times as far from the target as the flock's centre,
    in the same direction. That is behind the sheep, from where it frightens them to the target.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = SimpleNamespace(state_size=SYSTEM.state_size, control_size=SYSTEM.control_size)
        self.network = MLP(sizes, hidden=(64, 64), seed=0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Controls (B, K) at states (B, D)."""
        least, most = (torch.tensor(pair).to(states).repeat(SYSTEM.drivers) for pair in zip(*BOUNDS, strict=True))
        return least + (most - least) * torch.sigmoid(2.0 * self.network(0.25 * states))


def lead(state: np.ndarray, control: np.ndarray, dog: int, mouse: np.ndarray) -> np.ndarray:
    """A control that drives one dog to the mouse and leaves the others what they had.

    A dog's acceleration by its control is c_radial ρ + c_turn ρ^⊥ with ρ as in `Repulsion`, so any acceleration has its
    control, but where ρ is 0.
    """
    agents = state.reshape(-1, 4)
    rho = agents[dog, :2] - agents[SYSTEM.drivers :, :2].sum(axis=0)
    wanted = PULL * (mouse - agents[dog, :2]) - BRAKE * agents[dog, 2:]
    wanted *= min(1.0, STRONGEST / max(float(np.hypot(*wanted)), 1e-9))
    control = control.copy()
    turned = np.array([-rho[1], rho[0]])
    control[2 * dog : 2 * dog + 2] = np.array([wanted @ rho, wanted @ turned]) / max(float(rho @ rho), 0.01)
    return control


class HerdDemo(Demo):
    """The plane at the left, the sheep's distances and the choices at the right.

    The model's dogs measure from the target, and their controllers were trained so: the simulation has the target at
    its origin. A target that is dragged shifts everybody's coordinates the other way; on the screen it is the target
    that moves.
    """

    size = (10.0, 6.4)
    clip = 12.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.flow, self.draws = settings.flow, np.random.SeedSequence(settings.seed)
        self.held: int | None = None
        """The dog that is led, or −1 for the target, or None."""
        self.mouse = np.zeros(2)
        """Where the mouse is in the world [m]."""
        self.target, self.reach = np.zeros(2), REACH
        """Where the target is in the world [m]."""
        self.world = figure.add_axes((0.02, 0.04, 0.58, 0.89))
        self.sketch = SYSTEM.sketch(self.world)
        self.world.set(xticks=(), yticks=(), xlabel="", ylabel="")
        self.world.set_aspect("equal", adjustable="box")
        self.distances = figure.add_axes((0.68, 0.55, 0.3, 0.36))
        self.distances.set(
            xlim=(-TRACE, 0), ylim=(0, 7), xticks=(-20, -10, 0), xlabel="time [s]", ylabel="distance to the target [m]"
        )
        self.simulation = Simulation(SYSTEM, self.load(), np.zeros(SYSTEM.state_size))
        artists = self.sketch(self.simulation.state, np.zeros(SYSTEM.control_size))
        self.dogs, self.sheep, self.pushes = artists[0], artists[1], artists[2:]
        self.cross = self.world.lines[0]
        self.lines = [self.distances.plot([], [], color="0.6", linewidth=0.8)[0] for _ in range(SYSTEM.evaders)]
        (self.mean,) = self.distances.plot([], [], linewidth=2, label="mean of the sheep")
        (self.leash,) = self.world.plot([], [], color="0.4", linewidth=1, linestyle=":", zorder=6)
        self.moving = [self.cross, self.dogs, self.sheep, *self.pushes, self.leash, *self.lines, self.mean]
        self.widgets = [
            choice(
                figure,
                (0.68, 0.16, 0.17, 0.24),
                "dogs trained with",
                [f"{letter} {resolve(letter).name}" for letter in FLOWS],
                FLOWS.index(self.flow),
                lambda number: self.choose(FLOWS[number]),
                [colour(letter) for letter in FLOWS],
            ),
            button(figure, (0.87, 0.345, 0.11, 0.05), "new start", self.begin),
            button(figure, (0.87, 0.275, 0.11, 0.05), "pause", self.pause),
        ]
        figure.text(0.68, 0.06, "drag × : moves the target\ndrag ▲ : leads a dog by the mouse", fontsize=9, color="0.3")
        self.begin()
        self.dress()

    def load(self) -> Any:
        """The controller of the chosen flow."""
        return load_weights("herd", self.flow, Policy())

    def choose(self, flow: str) -> None:
        """Take the dogs that were trained with another flow."""
        self.flow = flow
        self.simulation.controller = self.load()
        self.dress()

    def dress(self) -> None:
        """Give dogs and title the colour of the flow."""
        ink = colour(self.flow)
        for artist in (self.dogs, *self.pushes, self.mean):
            artist.set_color(ink)
        self.world.set_title(
            f"Dogs (▲) frighten the sheep (●) to the target (×): {self.flow}", color=ink, weight="bold"
        )
        self.distances.legend(handles=[self.mean], loc="upper left", frameon=False)
        self.refresh()

    def begin(self) -> None:
        """Start anew, at the place where the target is."""
        seed = int(self.draws.spawn(1)[0].generate_state(1)[0])
        self.simulation.state = SYSTEM.sample(1, seed=seed)[0]
        self.simulation.previous = self.simulation.state.copy()
        self.trace: deque[np.ndarray] = deque(maxlen=round(TRACE / SYSTEM.dt) + 1)

    def pause(self) -> None:
        """Hold the time, or let it go on."""
        self.paused = not self.paused

    def move_target(self, place: np.ndarray) -> None:
        """Put the target somewhere in the world; nobody else moves there."""
        shift = np.zeros((SYSTEM.drivers + SYSTEM.evaders, 4), np.float32)
        shift[:, :2] = place - self.target
        self.simulation.state -= shift.reshape(-1)
        self.simulation.previous -= shift.reshape(-1)
        self.target = np.asarray(place, float)

    def positions(self) -> np.ndarray:
        """Positions of dogs and sheep in the world, shape (agents, 2)."""
        return self.simulation.state.reshape(-1, 4)[:, :2] + self.target

    def act(self) -> np.ndarray | None:
        """The control of this step; None: the controller's."""
        sheep = self.simulation.state.reshape(-1, 4)[SYSTEM.drivers :, :2]
        self.trace.append(np.hypot(*sheep.T))
        if self.held is None or self.held < 0:
            return None
        return lead(self.simulation.state, self.simulation.decide(), self.held, self.mouse - self.target)

    def advance(self, dt: float) -> None:
        """Step the physics; where a dog has left for good, all start anew."""
        self.simulation.advance(dt, self.act)
        wanted = max(REACH, ROOM * float(np.abs(self.positions()).max()))
        self.reach += (wanted - self.reach) * min(1.0, HASTE * dt)
        if self.held is None and np.abs(self.simulation.state).max() > LOST:
            self.begin()

    def look(self) -> None:
        """Set the part of the world that is seen; the axes' own coordinates start at the target."""
        left, low = -self.reach - self.target
        self.world.set(xlim=(left, left + 2.0 * self.reach), ylim=(low, low + 2.0 * self.reach))

    def draw(self) -> None:
        """Move everything."""
        state = self.simulation.between()
        self.sketch(state, self.simulation.control)
        self.look()
        led = self.held is not None and self.held >= 0
        ends = np.stack([state.reshape(-1, 4)[self.held, :2], self.mouse - self.target]) if led else np.zeros((0, 2))
        self.leash.set_data(*ends.T)
        if self.trace:
            values = np.array(self.trace)
            times = SYSTEM.dt * np.arange(1 - len(values), 1)
            for line, distances in zip(self.lines, values.T, strict=True):
                line.set_data(times, distances)
            self.mean.set_data(times, values.mean(axis=1))

    def press(self, event: Any) -> None:
        """Take hold of a dog or of the target, whichever is nearer."""
        if event.inaxes is not self.world:
            return
        self.mouse = np.array([event.xdata, event.ydata]) + self.target
        places = np.concatenate([self.positions()[: SYSTEM.drivers], self.target[None]])
        distances = np.hypot(*(places - self.mouse).T)
        nearest = int(distances.argmin())
        if distances[nearest] < GRAB:
            self.held = nearest if nearest < SYSTEM.drivers else -1

    def drag(self, event: Any) -> None:
        """Move what is held."""
        if self.held is None or event.inaxes is not self.world:
            return
        self.mouse = np.array([event.xdata, event.ydata]) + self.target
        if self.held < 0:
            self.move_target(self.mouse)
            # the axes' coordinates follow at once, so that the next event is read in them
            self.look()

    def release(self, event: Any) -> None:
        """Let go."""
        self.held = None

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: the target moves on, twice."""
        places = [(4.0, (1.5, 1.0)), (8.0, (0.0, -1.0))]
        return [(time, lambda place=place: self.move_target(np.array(place))) for time, place in places]  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("herd", __doc__, HerdDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
