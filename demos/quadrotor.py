"""A quadrotor that holds its place in wind that it does not see: drag the target, turn the wind, let gusts come.

Its controller was trained by the short-horizon actor-critic, in winds that differed from episode to episode.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from controllers.actor_critic import Settings as Learning
from controllers.actor_critic import make_actor
from controllers.settings import check_setting
from demos.colours import colour
from demos.frame import Button, Control, Demo, Grip, Plot, Ray, Slider
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from warp_phys.systems import Quadrotor
from warp_phys.systems.drawing import Ball, Line, Picture, Shape

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
    """The quadrotor in streaks of wind; its distance from the target."""

    says = "A drone that does not see the wind holds its place at the red ball: drag the ball, or turn the wind."
    clip = 12.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.generator = np.random.default_rng(settings.seed)
        self.gusts = settings.gusts
        self.mean, self.gust = np.array([settings.wind_x, settings.wind_z]), np.zeros(2)
        self.target = np.zeros(2)
        actor = load_weights("quadrotor", "wind", make_actor(Quadrotor(), LEARNING))
        self.simulation = Windy(actor, np.zeros(6))
        self.streaks = self.generator.uniform(-REACH, REACH, (STREAKS, 2))
        self.trace: deque[np.ndarray] = deque(maxlen=round(TRACE / Quadrotor.dt) + 1)

    def controls(self) -> Sequence[Control]:
        """The wind, gusts, and a pause."""
        return [
            Slider("wind to the right [m/s]", -8.0, 8.0, 0.1, lambda: float(self.mean[0]), lambda v: self.blow(0, v)),
            Slider("wind upwards [m/s]", -4.0, 4.0, 0.1, lambda: float(self.mean[1]), lambda v: self.blow(1, v)),
            Button("gusts on / off", self.switch),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """The distance from the target."""
        return [Plot("distance to the target [m]", ["distance"], [colour("R")], self.distances, y_range=(0.0, 2.5))]

    def grips(self) -> Mapping[str, Grip]:
        """The target can be dragged."""
        return {"goal": Grip(drag=self.drag)}

    def words(self) -> str:
        """The wind of the moment."""
        across, up = self.simulation.wind
        return f"wind now {across:.1f} m/s to the right, {up:.1f} m/s upwards"

    def switch(self) -> None:
        """Turn gusts on or off."""
        self.gusts = not self.gusts

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

    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """The distance from the target over time."""
        values = np.array(self.trace).reshape(-1, 3)
        return Quadrotor.dt * np.arange(1.0 - len(values), 1.0), values[:, 2][None]

    def picture(self) -> Picture:
        """Quadrotor and target, where it has been, and the wind."""
        shown = self.simulation.system.picture(self.simulation.between(), self.simulation.control)
        ends = np.stack([self.streaks, self.streaks - 0.06 * self.simulation.wind, np.full((STREAKS, 2), np.nan)], 1)
        been = np.array(self.trace).reshape(-1, 3)[-100:, :2]
        parts: dict[str, Shape] = {
            "air": Line(in_space(ends.reshape(-1, 2), 0.4), "#BBBBBB", 1.5),
            "path": Line(in_space(been, 0.0), "#999999", 1.5),
            "goal": Ball((self.target[0], 0.15, self.target[1]), 0.1, "#CC3311"),
        }
        parts |= {name: part for name, part in shown.parts.items() if name != "target"}
        low, high = (-REACH, -0.5, -REACH), (REACH, 0.5, REACH)
        return replace(shown, parts=parts, low=low, high=high)

    def drag(self, ray: Ray) -> None:
        """Move the target to where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None:
            self.move_target(*np.clip(place[[0, 2]], -REACH, REACH))

    def move_target(self, x: float, z: float) -> None:
        """Put the target somewhere."""
        self.target = np.array([x, z])

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: the target moves, and the wind turns."""
        return [
            (3.0, lambda: self.move_target(1.0, 0.8)),
            (6.0, lambda: self.blow(0, -6.0)),
            (9.0, lambda: self.move_target(-1.0, 0.0)),
        ]


def in_space(flat: np.ndarray, away: float) -> np.ndarray:
    """Points (N, 2) of the plane, so far behind it, shape (N, 3)."""
    return np.stack([flat[:, 0], np.full(len(flat), away), flat[:, 1]], axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("quadrotor", __doc__, QuadrotorDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
