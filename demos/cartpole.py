"""A cart with poles to touch: drag the cart, kick a pole, switch flow and number of poles, watch it recover."""

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
from demos.colours import POLES, colour
from demos.frame import Demo
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from demos.widgets import button, choice
from warp_phys.flow import resolve
from warp_phys.systems import CartPole

FLOWS = ("R", "M", "S", "C")
MOST_POLES = 4
REACH = 2.6
"""Metres to either side of the middle that are drawn."""
GAIN = 15.0
"""Force for an output of 1 [N]."""
FREE = 1.8
"""Metres that the cart may go from the middle of the picture before the picture follows."""
TRACE = 6.0
"""Seconds of the traces."""
EPISODE = 2.5
"""Seconds after which several poles hang again, so that they can swing up once more."""
GRIP, DRAG, HOLD = 80.0, 16.0, 120.0
"""The hand at the cart: a spring [N/m], its damping [N s/m], its greatest force [N]."""
KICK = 5.0
"""What a click adds to a pole's rate [rad/s]."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    poles: int = 1
    """Poles on the cart at the start, 1 to 4."""
    flow: str = "C"
    """Flow with which the first controller was trained: R, M, S or C."""
    seed: int = 0
    """Seed of the initial states."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_setting("poles", self.poles, int, at_least=1, below=MOST_POLES + 1)
        if self.flow not in FLOWS:
            raise ValueError(f"flow must be one of {', '.join(FLOWS)}, got {self.flow!r}")
        check_setting("seed", self.seed, int, at_least=0)


def make_system(poles: int) -> CartPole:
    """The cart of the demo; several poles are stepped as published, one pole in longer steps."""
    return CartPole(poles=poles, dt=0.02 if poles == 1 else 0.01)


class Policy(torch.nn.Module):
    """Force on a cart with one pole: a dense network of the cart's speed, the pole's sine and cosine, and its rate.

    It does not see where the cart is, nor how often the pole has turned round, so it does the same everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(SimpleNamespace(state_size=4, control_size=1), hidden=(64, 64), seed=0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Forces (B, 1) at states (B, 4)."""
        speed, angle, rate = states[:, 1:2], states[:, 2:3], states[:, 3:4]
        return GAIN * self.network(torch.cat([0.3 * speed, angle.sin(), angle.cos(), 0.2 * rate], dim=1))


def make_controller(poles: int) -> torch.nn.Module:
    """The network of the demo, before it is trained: for several poles that of the published experiment."""
    return Policy() if poles == 1 else MLP(make_system(poles), seed=0)


class CartPoleDemo(Demo):
    """The cart, traces of angles and force below, choices at the right."""

    size = (10.0, 6.4)
    clip = 9.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.flow, self.poles, self.steering = settings.flow, settings.poles, True
        self.generator = np.random.default_rng(settings.seed)
        self.hand: float | None = None
        """Where the hand that holds the cart is [m]."""
        self.world = figure.add_axes((0.05, 0.4, 0.74, 0.54))
        self.angles = figure.add_axes((0.085, 0.245, 0.705, 0.11))
        self.forces = figure.add_axes((0.085, 0.075, 0.705, 0.11))
        self.widgets = [
            choice(
                figure,
                (0.82, 0.66, 0.16, 0.24),
                "controller trained with",
                [f"{letter} {resolve(letter).name}" for letter in FLOWS],
                FLOWS.index(self.flow),
                lambda number: self.choose(flow=FLOWS[number]),
                [colour(letter) for letter in FLOWS],
            ),
            choice(
                figure,
                (0.82, 0.36, 0.16, 0.22),
                "poles",
                [str(count) for count in range(1, MOST_POLES + 1)],
                self.poles - 1,
                lambda number: self.choose(poles=number + 1),
            ),
            button(figure, (0.82, 0.25, 0.16, 0.05), "hang down", self.hang),
            button(figure, (0.82, 0.185, 0.16, 0.05), "stand up", self.stand),
            button(figure, (0.82, 0.12, 0.16, 0.05), "controller on / off", self.switch),
            button(figure, (0.82, 0.055, 0.16, 0.05), "pause / go on", self.pause),
        ]
        self.build()
        self.hang()

    def build(self) -> None:
        """Draw the world of the chosen number of poles."""
        for axes in (self.world, self.angles, self.forces):
            axes.clear()
        system = make_system(self.poles)
        self.sketch = system.sketch(self.world)
        self.simulation = Simulation(system, self.load(), np.zeros(system.state_size))
        artists = self.sketch(self.simulation.state, np.zeros(1))
        self.cart, pole_lines, self.push = artists[0], artists[1 : 1 + self.poles], artists[1 + self.poles]
        for line, ink in zip(pole_lines, POLES, strict=False):
            line.set_color(ink)
        self.lines = [self.angles.plot([], [], color=line.get_color(), linewidth=1.2)[0] for line in pole_lines]
        (self.force_line,) = self.forces.plot([], [], linewidth=1.2)
        self.angles.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        self.forces.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        self.angles.set(xlim=(-TRACE, 0), ylim=(-190, 190), yticks=(-180, 0, 180), ylabel="angle [°]", xticklabels=())
        self.forces.set(xlim=(-TRACE, 0), ylim=(-100, 100), xlabel="time [s]", ylabel="force [N]")
        (self.grip,) = self.world.plot([], [], "o-", color="0.4", linewidth=1, markersize=5, zorder=6)
        # marks on the rail, a metre apart, move with the picture; numbers would have to be drawn anew each time
        self.world.set(ylim=(-1.25, 1.25), xticks=(), xlabel="")
        self.moving = [*artists, *self.lines, self.force_line, self.grip]
        for artist in self.moving:
            artist.set_animated(True)
        self.dress()

    def load(self) -> Any:
        """The controller of the chosen flow and number of poles."""
        return load_weights("cartpole", f"{self.poles}-{self.flow}", make_controller(self.poles))

    def dress(self) -> None:
        """Give cart and title the colour of the flow."""
        ink = colour(self.flow) if self.steering else "0.55"
        self.cart.set_color(ink)
        self.push.set_color(ink)
        self.force_line.set_color(ink)
        who = f"trained with {self.flow}" if self.steering else "controller switched off"
        title = f"{who}: drag the cart, click beside a pole to kick it"
        if self.poles > 1:
            title += f" (every {EPISODE:g} s they hang again)"
        self.world.set_title(title, color=ink, fontweight="bold")
        self.refresh()

    def choose(self, flow: str | None = None, poles: int | None = None) -> None:
        """Take another controller; another number of poles starts anew."""
        self.flow = flow or self.flow
        if poles and poles != self.poles:
            self.poles = poles
            self.build()
            self.hang()
        else:
            self.simulation.controller = self.load()
            self.dress()

    def begin(self, state: np.ndarray) -> None:
        """Start anew from a state."""
        self.simulation.state = state.astype(np.float32)
        self.simulation.previous = self.simulation.state.copy()
        self.middle, self.hand, self.age = 0.0, None, 0.0
        self.trace: deque[tuple[float, ...]] = deque(maxlen=round(TRACE / make_system(self.poles).dt) + 1)
        self.refresh()

    def hang(self) -> None:
        """Let all poles hang, nearly at rest."""
        state = np.zeros(self.simulation.system.state_size)
        state[2::2] = np.pi + self.generator.uniform(-0.3, 0.3, self.poles)
        trace = getattr(self, "trace", ())
        self.begin(state)
        self.trace.extend(entry for entry in trace if len(entry) == 1 + self.poles)
        self.trace.append((np.nan,) * (1 + self.poles))

    def stand(self) -> None:
        """Put all poles upright, nearly."""
        state = np.zeros(self.simulation.system.state_size)
        state[2::2] = self.generator.uniform(-0.02, 0.02, self.poles)
        self.begin(state)

    def switch(self) -> None:
        """Switch the controller off, or on again."""
        self.steering = not self.steering
        self.dress()

    def pause(self) -> None:
        """Hold the time, or let it go on."""
        self.paused = not self.paused

    def kick(self, pole: int, rate: float) -> None:
        """Add to the rate of a pole."""
        self.simulation.state[3 + 2 * pole] += rate

    def act(self) -> np.ndarray | None:
        """The force of this step: that of the hand, of the controller (None), or none at all."""
        x, v = self.simulation.state[:2]
        if self.hand is not None:
            return np.array([np.clip(GRIP * (self.hand - x) - DRAG * v, -HOLD, HOLD)])
        return None if self.steering else np.zeros(1)

    def advance(self, dt: float) -> None:
        """Step the physics, remember the traces."""
        self.simulation.advance(dt, self.remember)
        self.age += dt
        if self.poles > 1 and self.age > EPISODE and self.steering and self.hand is None:
            self.hang()

    def remember(self) -> np.ndarray | None:
        """Note the state before a step; returns its force as `act` does."""
        angles = np.degrees((self.simulation.state[2::2] + np.pi) % (2.0 * np.pi) - np.pi)
        self.trace.append((float(self.simulation.control[0]), *angles))
        return self.act()

    def draw(self) -> None:
        """Move cart, poles and traces; the picture follows a cart that leaves it."""
        state = self.simulation.between()
        self.sketch(state, self.simulation.control)
        self.middle = float(np.clip(self.middle, state[0] - FREE, state[0] + FREE))
        self.world.set_xlim(self.middle - REACH, self.middle + REACH)
        held = self.hand is not None
        self.grip.set_data([self.hand, state[0]] if held else [], [0.0, 0.0] if held else [])
        if not self.trace:
            return
        values = np.array(self.trace)
        times = make_system(self.poles).dt * np.arange(1 - len(values), 1)
        self.force_line.set_data(times, values[:, 0])
        for line, angles in zip(self.lines, values[:, 1:].T, strict=True):
            # no stroke across the picture where an angle passes ±180°
            jumps = np.abs(np.diff(angles, prepend=angles[0])) > 180
            line.set_data(times, np.where(jumps, np.nan, angles))

    def press(self, event: Any) -> None:
        """Grab the cart, or kick the pole beside which was clicked."""
        if event.inaxes is not self.world or event.xdata is None:
            return
        state, mouse = self.simulation.state, np.array([event.xdata, event.ydata])
        if abs(mouse[0] - state[0]) < 0.3 and abs(mouse[1]) < 0.2:
            self.hand = float(mouse[0])
            return
        offsets = [nearest_offset(mouse - [state[0], 0.0], angle) for angle in state[2::2]]
        pole = int(np.argmin(np.hypot(*np.transpose(offsets))))
        # positive rates turn clockwise; the pole is pushed away from the mouse
        along = np.array([np.cos(state[2 + 2 * pole]), -np.sin(state[2 + 2 * pole])])
        self.kick(pole, -KICK if offsets[pole] @ along > 0 else KICK)

    def drag(self, event: Any) -> None:
        """Move the hand that holds the cart."""
        if self.hand is not None and event.inaxes is self.world:
            self.hand = float(event.xdata)

    def release(self, event: Any) -> None:
        """Let the cart go."""
        self.hand = None

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: a kick, a pull at the cart."""
        return [
            (3.0, lambda: self.kick(0, KICK)),
            (5.5, lambda: setattr(self, "hand", self.simulation.state[0] + 0.8)),
            (6.2, lambda: setattr(self, "hand", None)),
        ]


def nearest_offset(mouse: np.ndarray, angle: float, length: float = 1.0) -> np.ndarray:
    """Vector to the mouse from the nearest point of a pole at this angle, both seen from the cart."""
    pole = np.array([np.sin(angle), np.cos(angle)])
    return mouse - np.clip(mouse @ pole, 0.0, length) * pole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("cartpole", __doc__, CartPoleDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
