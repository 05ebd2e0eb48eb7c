"""A quadrotor that holds its place in wind that it does not see: drag the target, turn the wind, let gusts come.

Its controller was trained by the short-horizon actor-critic, in winds that differed from episode to episode.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from controllers.actor_critic import Settings as Learning
from controllers.actor_critic import make_actor
from controllers.settings import check_setting
from demos.colours import colour
from demos.frame import Demo
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from demos.widgets import button, slider
from warp_phys.systems import Quadrotor

LEARNING = Learning(
    system="quadrotor",
    randomise=("wind_x:-8:8", "wind_z:-4:4"),
    bound=2.0,
    limits=(4.0, 4.0, 3.0, 10.0, 10.0, 20.0),
    rate=2e-3,
    updates=500,
)
"""How the controller was trained."""
REACH = 2.2
"""Metres to either side of the middle that are drawn."""
FARTHEST = 1.5
"""Distance of the target at which the controller takes it for [m]: farther ones lie beyond what it was trained for."""
GUST = 2.0
"""Standard deviation of the gusts about the wind [m/s]."""
CALM = 0.7
"""Time over which a gust dies away [s]."""
TRACE = 10.0
"""Seconds of the trace."""
STREAKS = 40
"""Lines that show the wind."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    wind_x: float = 4.0
    """Speed of the wind to the right at the start [m/s], at most 8."""
    wind_z: float = 0.0
    """Speed of the wind upwards at the start [m/s], at most 4."""
    gusts: bool = True
    """Whether there are gusts."""
    seed: int = 0
    """Seed of the gusts."""

    def __post_init__(self) -> None:
        """Check every setting."""
        for name, most in (("wind_x", 8.0), ("wind_z", 4.0)):
            check_setting(name, getattr(self, name), float, at_least=-most, below=most + 1e-9)
        check_setting("seed", self.seed, int, at_least=0)


class Windy(Simulation):
    """The quadrotor in wind that changes from step to step."""

    system: Quadrotor

    def __init__(self, controller: torch.nn.Module, state: np.ndarray) -> None:
        super().__init__(Quadrotor(), controller, state)
        self.wind = np.zeros(2)

    def step(self, control: np.ndarray | None = None) -> None:
        """One time step in the wind of the moment: drag is linear in it, so what it adds to the speed is known."""
        super().step(control)
        push = self.system.dt * self.system.drag / self.system.mass * self.wind
        self.state[3:5] += push
        self.state[0:2] += self.system.dt * push


class QuadrotorDemo(Demo):
    """The plane at the left; distance from the target, wind and choices at the right."""

    size = (10.0, 6.4)
    clip = 12.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.generator = np.random.default_rng(settings.seed)
        self.gusts = settings.gusts
        self.mean, self.gust = np.array([settings.wind_x, settings.wind_z]), np.zeros(2)
        self.target, self.held = np.zeros(2), False
        self.world = figure.add_axes((0.05, 0.08, 0.56, 0.85))
        self.distances = figure.add_axes((0.7, 0.62, 0.28, 0.29))
        self.distances.set(xlim=(-TRACE, 0), ylim=(0, 2.5), xlabel="time [s]", ylabel="distance to the target [m]")
        actor = load_weights("quadrotor", "wind", make_actor(Quadrotor(), LEARNING))
        self.simulation = Windy(actor, np.zeros(6))
        self.streaks = self.generator.uniform(-REACH, REACH, (STREAKS, 2))
        (self.air,) = self.world.plot([], [], color="0.75", linewidth=1, zorder=0)
        self.sketch = self.simulation.system.sketch(self.world)
        self.body, *self.thrusts = self.sketch(self.simulation.state, np.zeros(2))
        self.cross = self.world.lines[1]
        self.cross.set(markersize=14, color="0.15")
        (self.path,) = self.world.plot([], [], color="0.6", linewidth=0.8, zorder=2)
        (self.line,) = self.distances.plot([], [], color=colour("R"), linewidth=1.5)
        self.moving = [self.air, self.path, self.cross, self.body, *self.thrusts, self.line]
        self.widgets = self.make_widgets(figure)
        self.trace: deque[np.ndarray] = deque(maxlen=round(TRACE / Quadrotor.dt) + 1)
        self.world.set_title("In wind that it does not see: drag the target")

    def make_widgets(self, figure: Figure) -> list[Any]:
        """Buttons, and sliders for the wind."""
        return [
            button(figure, (0.7, 0.4, 0.13, 0.06), "gusts on / off", self.switch),
            button(figure, (0.85, 0.4, 0.13, 0.06), "pause", self.pause),
            slider(
                figure, (0.76, 0.28, 0.17, 0.03), "wind →", (-8.0, 8.0), self.mean[0],
                lambda value: self.blow(0, value), "%.1f m/s",
            ),
            slider(
                figure, (0.76, 0.22, 0.17, 0.03), "wind ↑", (-4.0, 4.0), self.mean[1],
                lambda value: self.blow(1, value), "%.1f m/s",
            ),
        ]  # fmt: skip

    def switch(self) -> None:
        """Turn gusts on or off."""
        self.gusts = not self.gusts

    def pause(self) -> None:
        """Hold the time, or let it go on."""
        self.paused = not self.paused

    def blow(self, component: int, speed: float) -> None:
        """Change the mean wind."""
        self.mean[component] = speed

    def act(self) -> np.ndarray:
        """The thrusts of this step; the controller takes the target for the origin, and for no farther than it knows.

        The wind goes on, too: a mean, and gusts that die away as new ones come.
        """
        state = self.simulation.state.copy()
        offset = state[:2] - self.target
        self.trace.append(np.array([*state[:2], np.hypot(*offset)]))
        state[:2] = offset * min(1.0, FARTHEST / max(float(np.hypot(*offset)), 1e-9))
        keep = np.exp(-Quadrotor.dt / CALM)
        fresh = self.generator.standard_normal(2) * GUST * self.gusts
        self.gust = keep * self.gust + np.sqrt(1.0 - keep**2) * fresh
        self.simulation.wind = self.mean + self.gust
        with torch.no_grad():
            return self.simulation.controller(torch.from_numpy(state[None]))[0].numpy()

    def advance(self, dt: float) -> None:
        """Step physics and wind."""
        self.simulation.advance(dt, self.act)
        self.streaks += dt * self.simulation.wind
        self.streaks = (self.streaks + REACH) % (2.0 * REACH) - REACH

    def draw(self) -> None:
        """Move everything."""
        self.sketch(self.simulation.between(), self.simulation.control)
        self.world.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH))
        self.cross.set_data(*self.target[:, None])
        ends = np.stack([self.streaks, self.streaks - 0.06 * self.simulation.wind, np.full((STREAKS, 2), np.nan)], 1)
        self.air.set_data(*ends.reshape(-1, 2).T)
        if self.trace:
            x, z, distance = np.array(self.trace).T
            self.path.set_data(x[-100:], z[-100:])
            self.line.set_data(Quadrotor.dt * np.arange(1 - len(x), 1), distance)

    def press(self, event: Any) -> None:
        """Take hold of the target."""
        if event.inaxes is self.world and event.xdata is not None:
            self.held = True
            self.drag(event)

    def drag(self, event: Any) -> None:
        """Move the target."""
        if self.held and event.inaxes is self.world:
            self.target = np.clip([event.xdata, event.ydata], -REACH, REACH)

    def release(self, event: Any) -> None:
        """Let go."""
        self.held = False

    def move_target(self, x: float, z: float) -> None:
        """Put the target somewhere."""
        self.target = np.array([x, z])

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: the target moves, and the wind turns."""
        return [
            (3.0, lambda: self.move_target(1.0, 0.8)),
            (6.0, lambda: self.widgets[2].set_val(-6.0)),
            (9.0, lambda: self.move_target(-1.0, 0.0)),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("quadrotor", __doc__, QuadrotorDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
