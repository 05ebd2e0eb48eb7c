"""The weather in a rollout: how much feedback R, M, S and C bring to every step, as light that flows backward in time.

python -m demos.weather
python -m demos.weather --system cartpole --save weather.gif
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from demos.colours import colour, flow_names
from demos.frame import Button, Choice, Control, Demo, Plot, Slider
from demos.views import run
from demos.weather_numbers import FLOWS, SCENARIOS, Forecast, Settings, growth, make_controller
from demos.weights import load_weights
from warp_phys.diagnose.diagnostics import row_norms
from warp_phys.systems.drawing import ASLANT, Ball, Line, Picture, Shape, Text

LEAST, MOST = 0.1, 1e4
"""Least and largest feedback that is drawn, relative to the last step."""
LONG, TALL, APART = 6.0, 0.45, 0.9
"""Length of the time axis in the picture, height per power of ten, distance from flow to flow."""
GLOW, DIM = 0.05, 0.3
"""How much of the axis a pulse lights up, and how bright a flow's line is away from it."""
PULSE = 3.0
"""Seconds that a pulse takes from the end to the beginning."""
SPEED = 40.0
"""Steps per second by which the horizon grows while it plays."""
SEED = 0
"""Of the controllers that come along."""


class WeatherDemo(Demo):
    """A line of light per flow: its height is the feedback at each step; a pulse runs along it, backward in time."""

    says = (
        "How strongly does an error at the end reach back to earlier steps? Height is that strength, light runs back "
        "in time: move the horizon and watch R explode while M stays level."
    )
    clip = 8.0
    dark = True

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.playing, self.clock = False, 0.0
        self.forecasts: dict[str, Forecast] = {}
        self.take(settings.system)
        if settings.horizon:
            self.scrub(settings.horizon)

    @property
    def build(self) -> str:
        """The system."""
        return self.name

    def take(self, name: str) -> None:
        """Show another system, with the controller that comes along; for other seeds one is trained now."""
        self.name, scenario = name, SCENARIOS[name]
        if name not in self.forecasts:
            controller = None
            if self.settings.seed == SEED:
                controller = load_weights("weather", name, make_controller(scenario))
            self.forecasts[name] = Forecast(scenario, self.settings.samples, self.settings.seed, controller)
        self.forecast = self.forecasts[name]
        self.scrub(scenario.longest * 7 // 8)

    def controls(self) -> Sequence[Control]:
        """What can be chosen."""
        longest = max(scenario.longest for scenario in SCENARIOS.values())
        return [
            Slider("horizon", 2, longest, 1, lambda: round(self.position), self.scrub),
            Button("let the horizon grow", self.play),
            Choice("system", list(SCENARIOS), lambda: self.name, self.take),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """The feedback of every step, and how much a step stretches it."""
        inks = [colour(flow) for flow in FLOWS]
        return [
            Plot("strength of feedback", flow_names(FLOWS), inks, self.curves, "time step", (LEAST, MOST), log=True),
            Plot(
                "one step's stretch, at most", ["with the controller", "physics alone"], inks[:2], self.stretch, "step"
            ),
        ]

    def words(self) -> str:
        """How much feedback has grown."""
        grown = dict(zip(FLOWS, growth(self.adjoints), strict=True))
        scenario = self.forecast.scenario
        return (
            f"{scenario.title}, early in training. Back over {len(self.together[0])} steps R grows "
            f"{grown['R'][0]:.3g}-fold, M {grown['M'][0]:.3g}-fold, C {grown['C'][0]:.3g}-fold. "
            "The strength is |λ|: how much the loss at the end changes when the state at a step does."
        )

    def scrub(self, horizon: float) -> None:
        """Look at another horizon."""
        self.position = float(np.clip(horizon, 2, self.forecast.scenario.longest))
        self.adjoints = self.forecast.adjoints(round(self.position))
        self.together = row_norms(self.adjoints)[:, 1:]

    def play(self) -> None:
        """Let the horizon grow by itself, or hold it."""
        self.playing = not self.playing
        if self.playing and self.position >= self.forecast.scenario.longest:
            self.scrub(2)

    def advance(self, dt: float) -> None:
        """Let the pulse run, and the horizon grow."""
        self.clock = (self.clock + dt / PULSE) % 1.0
        if self.playing:
            self.scrub(self.position + SPEED * dt)
            self.playing = self.position < self.forecast.scenario.longest

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """The feedback by step, all samples together."""
        return np.arange(1.0, self.together.shape[1] + 1.0), np.where(self.together > 0.0, self.together, np.nan)

    def stretch(self) -> tuple[np.ndarray, np.ndarray]:
        """Largest singular values of the steps, with the controller and without."""
        closed, physics = self.forecast.closed, self.forecast.physics
        return np.arange(float(len(closed))), np.stack([closed, physics])

    def picture(self) -> Picture:
        """The lines of light, the pulses on them, and the system where the pulses are."""
        horizon, longest = self.together.shape[1], self.forecast.scenario.longest
        steps = np.arange(1, horizon + 1)
        at = max(1, round(horizon * (1.0 - self.clock)))
        parts: dict[str, Shape] = {}
        for power in range(round(np.log10(LEAST)), round(np.log10(MOST)) + 1):
            z = TALL * power
            grid = np.array([[0.0, APART * len(FLOWS), z], [LONG, APART * len(FLOWS), z]])
            parts[f"line {power}"] = Line(grid, "#555555", 1.0)
            parts[f"number {power}"] = Text((-0.35, APART * len(FLOWS), z), f"{10.0**power:g}×", "#AAAAAA")
        for row, flow in enumerate(FLOWS):
            y = APART * (len(FLOWS) - 1 - row)
            # no light where nothing arrives
            values = np.where(self.together[row] > 0.0, np.clip(self.together[row], LEAST, MOST), np.nan)
            points = np.stack([LONG * steps / longest, np.full(horizon, y), TALL * np.log10(values)], axis=1)
            ink = np.array([int(colour(flow)[i : i + 2], 16) / 255.0 for i in (1, 3, 5)])
            near = np.exp(-(((steps - at) / (GLOW * longest)) ** 2))[:, None]
            bright = ink * (DIM + (1.0 - DIM) * near) + 0.6 * near * (1.0 - ink)
            parts[f"floor {flow}"] = Line(np.array([[0.0, y, 0.0], [LONG, y, 0.0]]), "#3A3A3A", 1.0)
            parts[f"light {flow}"] = Line(points, bright, 5.0)
            arrives = np.isfinite(values[at - 1])
            size = 0.05 + 0.03 * np.log10(values[at - 1] / LEAST) if arrives else 0.0
            parts[f"pulse {flow}"] = Ball(points[at - 1] if arrives else points[-1], size, colour(flow))
            parts[f"name {flow}"] = Text((LONG + 0.3, y, 0.0), flow, colour(flow))
        parts["time"] = Text((0.5 * LONG, -0.6, TALL * np.log10(LEAST)), "time →, light runs ←", "#AAAAAA")
        low = (-0.6, -0.8, TALL * np.log10(LEAST) - 0.1)
        return Picture(parts, low, (LONG + 0.5, APART * len(FLOWS), TALL * np.log10(MOST) + 0.1), view=ASLANT)

    def script(self) -> Sequence[tuple[float, Callable[[], Any]]]:
        """In a file: the horizon grows."""
        return [(0.0, lambda: self.scrub(32)), (0.5, self.play)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("weather", __doc__, WeatherDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
