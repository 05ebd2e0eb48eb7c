"""A cart with poles to touch: drag the cart or a pole, switch flow and number of poles, watch it recover."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from controllers import MLP
from controllers.settings import check_setting
from demos.colours import colour, flow_names, letter_of, tinted
from demos.frame import Button, Choice, Control, Demo, Grip, Plot, Ray
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from warp_phys.systems import CartPole
from warp_phys.systems.cartpole import POLE_COLOURS
from warp_phys.systems.drawing import Line, Picture

FLOWS = ("R", "M", "S", "C")
MOST_POLES = 4
REACH = 2.3
"""Metres to either side of the middle that are drawn."""
GAIN = 15.0
"""Force for an output of 1 [N]."""
FREE = 1.5
"""Metres that the cart may go from the middle of the picture before the picture follows."""
HASTE = 2.0
"""How soon the picture has the cart in its middle again [1/s]."""
TRACE = 6.0
"""Seconds of the traces."""
EPISODE = 2.5
"""Seconds after which several poles hang again, so that they can swing up once more."""
GRIP, DRAG, HOLD = 80.0, 16.0, 120.0
"""The hand at the cart: a spring [N/m], its damping [N s/m], its greatest force [N]."""
KICK = 5.0
"""What a click adds to a pole's rate [rad/s]."""
STIFF, DAMPING = 150.0, 20.0
"""The hand at a pole: a spring [1/s²], its damping [1/s]."""


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
    """The cart, traces of angles and force."""

    says = "A trained network balances this pole: drag the cart or a pole with the mouse, and watch it recover."
    clip = 9.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.flow, self.poles, self.steering = settings.flow, settings.poles, True
        self.generator = np.random.default_rng(settings.seed)
        self.hand: float | None = None
        """Where the hand that holds the cart is [m]."""
        self.pulled: tuple[int, float] | None = None
        """The pole that is held, and the angle to which it is pulled [rad]."""
        self.make()

    @property
    def build(self) -> int:
        """The number of poles."""
        return self.poles

    def make(self) -> None:
        """Begin with the chosen number of poles."""
        system = make_system(self.poles)
        self.simulation = Simulation(system, self.load(), np.zeros(system.state_size))
        self.trace: deque[tuple[float, ...]] = deque(maxlen=round(TRACE / system.dt) + 1)
        self.hang()

    def load(self) -> Any:
        """The controller of the chosen flow and number of poles."""
        return load_weights("cartpole", f"{self.poles}-{self.flow}", make_controller(self.poles))

    def controls(self) -> Sequence[Control]:
        """What can be chosen."""
        counts = [str(count) for count in range(1, MOST_POLES + 1)]
        return [
            Choice(
                "trained with",
                flow_names(FLOWS),
                lambda: flow_names(self.flow)[0],
                lambda name: self.choose(letter_of(name)),
            ),
            Choice("poles", counts, lambda: str(self.poles), lambda count: self.choose(poles=int(count))),
            Button("kick a pole", lambda: self.kick(int(self.generator.integers(self.poles)), self.some_kick())),
            Button("hang down", self.hang),
            Button("stand up", self.stand),
            Button("controller on / off", self.switch),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """Angles and force of the last seconds."""
        names = [f"pole {number + 1}" for number in range(self.poles)]
        return [
            Plot("angle [°], 0 is upright", names, POLE_COLOURS[: self.poles], self.angles, y_range=(-190.0, 190.0)),
            Plot("force [N]", ["force"], [colour(self.flow)], self.forces, y_range=(-110.0, 110.0)),
        ]

    def grips(self) -> Mapping[str, Grip]:
        """The cart can be dragged, the poles as well; a click kicks a pole."""
        grips = {"cart": Grip(drag=self.drag, release=self.release)}
        for pole in range(self.poles):
            grips[f"pole {pole + 1}"] = Grip(
                drag=lambda ray, pole=pole: self.pull(pole, ray),  # type: ignore[misc]
                release=self.release,
                click=lambda ray, pole=pole: self.hit(pole, ray),  # type: ignore[misc]
            )
        return grips

    def words(self) -> str:
        """Who steers."""
        who = f"steered by a network trained with {self.flow}" if self.steering else "controller switched off"
        return who + (f"; several poles hang again every {EPISODE:g} s" if self.poles > 1 else "")

    def choose(self, flow: str | None = None, poles: int | None = None) -> None:
        """Take another controller; another number of poles starts anew."""
        self.flow = flow or self.flow
        if poles and poles != self.poles:
            self.poles = poles
            self.make()
        else:
            self.simulation.controller = self.load()

    def take(self, name: str) -> None:
        """Take the controller that was trained with the flow of this name."""
        self.choose(flow=letter_of(name))

    def begin(self, state: np.ndarray) -> None:
        """Start anew from a state."""
        self.simulation.state = state.astype(np.float32)
        self.simulation.previous = self.simulation.state.copy()
        self.middle, self.age = 0.0, 0.0
        self.trace.append((np.nan,) * (1 + self.poles))
        self.release()

    def hang(self) -> None:
        """Let all poles hang, nearly at rest."""
        state = np.zeros(self.simulation.system.state_size)
        state[2::2] = np.pi + self.generator.uniform(-0.3, 0.3, self.poles)
        self.begin(state)

    def stand(self) -> None:
        """Put all poles upright, nearly."""
        state = np.zeros(self.simulation.system.state_size)
        state[2::2] = self.generator.uniform(-0.02, 0.02, self.poles)
        self.begin(state)

    def switch(self) -> None:
        """Switch the controller off, or on again."""
        self.steering = not self.steering

    def some_kick(self) -> float:
        """A kick to either side."""
        return float(self.generator.choice([-KICK, KICK]))

    def kick(self, pole: int, rate: float) -> None:
        """Add to the rate of a pole."""
        self.simulation.state[3 + 2 * pole] += rate

    def drag(self, ray: Ray) -> None:
        """Hold the cart where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None:
            self.hand = float(place[0])

    def pull(self, pole: int, ray: Ray) -> None:
        """Pull a pole to where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None and pole < self.poles:  # else it was there when the event was sent
            self.pulled = pole, float(np.arctan2(place[0] - self.simulation.state[0], place[2]))

    def hit(self, pole: int, ray: Ray) -> None:
        """Kick a pole away from where it was clicked."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None and pole < self.poles:
            x, angle = self.simulation.state[0], self.simulation.state[2 + 2 * pole]
            # positive rates turn clockwise
            beside = (place[0] - x) * np.cos(angle) - place[2] * np.sin(angle)
            self.kick(pole, -KICK if beside > 0.0 else KICK)

    def release(self) -> None:
        """Let cart and poles go."""
        self.hand = self.pulled = None

    def act(self) -> np.ndarray | None:
        """The force of this step: that of the hand, of the controller (None), or none at all."""
        state = self.simulation.state
        if self.pulled is not None:
            pole, goal = self.pulled
            offset = (goal - state[2 + 2 * pole] + np.pi) % (2.0 * np.pi) - np.pi
            state[3 + 2 * pole] += (STIFF * offset - DAMPING * state[3 + 2 * pole]) * make_system(self.poles).dt
        if self.hand is not None:
            return np.array([np.clip(GRIP * (self.hand - state[0]) - DRAG * state[1], -HOLD, HOLD)])
        return None if self.steering else np.zeros(1)

    def advance(self, dt: float) -> None:
        """Step the physics, remember the traces."""
        self.simulation.advance(dt, self.remember)
        self.age += dt
        x = float(self.simulation.state[0])
        if self.hand is None and self.pulled is None:
            self.middle += (x - self.middle) * min(1.0, HASTE * dt)
        self.middle = float(np.clip(self.middle, x - FREE, x + FREE))
        if self.poles > 1 and self.age > EPISODE and self.steering and self.hand is None and self.pulled is None:
            self.hang()

    def remember(self) -> np.ndarray | None:
        """Note the state before a step; returns its force as `act` does."""
        angles = np.degrees((self.simulation.state[2::2] + np.pi) % (2.0 * np.pi) - np.pi)
        self.trace.append((float(self.simulation.control[0]), *angles))
        return self.act()

    def times(self) -> np.ndarray:
        """Times of the traces, 0 is now."""
        return make_system(self.poles).dt * np.arange(1 - len(self.trace), 1)

    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """The poles' angles over time, with a gap where one passes ±180°."""
        angles = np.array(self.trace)[:, 1:].T
        jumps = np.abs(np.diff(angles, prepend=angles[:, :1], axis=1)) > 180.0
        return self.times(), np.where(jumps, np.nan, angles)

    def forces(self) -> tuple[np.ndarray, np.ndarray]:
        """The force over time."""
        return self.times(), np.array(self.trace)[:, :1].T

    def picture(self) -> Picture:
        """Cart and poles; what is seen follows a cart that leaves it."""
        state = self.simulation.between()
        shown = self.simulation.system.picture(state, self.simulation.control)
        ink = colour(self.flow) if self.steering else "#8C8C8C"
        parts = tinted(shown.parts, ink, ("cart", "force"))
        x = float(state[0])
        held = np.array([[x if self.hand is None else self.hand, -0.25, 0.0], [x, -0.25, 0.0]])
        parts["hand"] = Line(held if self.hand is not None else held[:0], "#666666", 3.0)
        low, high = (self.middle - REACH, -0.5, -1.2), (self.middle + REACH, 0.3, 1.2)
        return replace(shown, parts=parts, low=low, high=high, labels=("", ""))

    def script(self) -> Sequence[tuple[float, Callable[[], Any]]]:
        """In a file: a kick, a pull at the cart."""
        return [
            (3.0, lambda: self.kick(0, KICK)),
            (5.5, lambda: setattr(self, "hand", self.simulation.state[0] + 0.8)),
            (6.2, self.release),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("cartpole", __doc__, CartPoleDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
