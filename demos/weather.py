"""The weather in a rollout: scrub its horizon and see how much feedback R, M, S and C bring to every step.

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demos.colours import colour
from demos.frame import Demo
from demos.views import run
from demos.weather_numbers import FLOWS, SCENARIOS, Forecast, Settings, growth
from demos.widgets import button, choice, slider
from warp_phys.diagnose.diagnostics import row_norms
from warp_phys.flow import resolve

LOWEST, HIGHEST = 0.1, 20.0
"""The chart of |λ_n|, relative to the last step."""
STYLES = {"R": "-", "M": "-", "S": "", "C": (0, (4, 2))}
SPEED = 40.0
"""Steps per second by which the horizon grows while it plays."""


class Chart:
    """Draws the feedback of one horizon above, and how much one step stretches it below; knows of no widget.

    Args:
        above: Axes of |λ_n|.
        below: Axes of the singular values.
    """

    def __init__(self, above: Axes, below: Axes) -> None:
        self.above, self.below = above, below
        self.lines: dict[str, Any] = {}
        self.told = ""

    def begin(self, forecast: Forecast) -> None:
        """Draw what does not change with the horizon."""
        scenario, longest = forecast.scenario, forecast.scenario.longest
        self.told = f"{scenario.title}, after {scenario.epochs} epochs of training over {scenario.steps} steps with C"
        for axes in (self.above, self.below):
            axes.clear()
            axes.set(xlim=(0, longest * 1.02))
        for letter in reversed(FLOWS):
            ink, label = colour(letter), f"{letter} {resolve(letter).name}"
            marker, width = ("o", 0.0) if letter == "S" else ("", 2.2)
            (line,) = self.above.plot([], [], color=ink, linestyle=STYLES[letter], marker=marker, linewidth=width)
            line.set_label(label)
            self.lines[letter] = line
        self.above.axhline(1.0, color="0.8", linewidth=0.8, zorder=0)
        self.above.set(yscale="log", ylim=(LOWEST, HIGHEST), ylabel="|λₙ|, relative to the last step")
        handles = [self.lines[letter] for letter in FLOWS]
        self.above.legend(handles=handles, loc="lower left", ncols=4, fontsize=8.5, frameon=False)
        self.off = self.above.text(
            0.985, 0.96, "", transform=self.above.transAxes, ha="right", va="top", color=colour("R"), fontweight="bold"
        )
        steps = np.arange(longest)
        self.below.plot(steps, forecast.closed, color=colour("R"), linewidth=1.2, label="with the controller")
        self.below.plot(steps, forecast.physics, color=colour("M"), linewidth=1.8, label="physics alone")
        self.end = self.below.axvline(0, color="0.4", linewidth=1)
        self.below.set(xlabel="time step n", ylabel="largest stretch\nof a step")
        self.below.legend(loc="upper right", fontsize=8, ncols=2, bbox_to_anchor=(1.0, 1.34), frameon=False)

    def show(self, adjoints: np.ndarray) -> None:
        """Draw the feedback of one horizon; `adjoints` as from `Forecast.adjoints`."""
        horizon = adjoints.shape[1] - 1
        steps, together = np.arange(1, horizon + 1), row_norms(adjoints)
        grown = dict(zip(FLOWS, growth(adjoints), strict=True))
        for i, letter in enumerate(FLOWS):
            # a step that receives nothing has no place on a logarithmic axis
            values = np.where(together[i, 1:] > 0.0, together[i, 1:], np.nan)
            self.lines[letter].set_data(steps, values)
        self.end.set_xdata([horizon, horizon])
        together_r, together_m = grown["R"][0], grown["M"][0]
        out = together[0, 1:].max() > HIGHEST
        self.off.set_text(f"↑ R leaves the chart: {together[0, 1:].max():.3g}" if out else "")
        self.above.set_title(
            f"{self.told}\nhorizon {horizon}: back to step 1, R grows {together_r:.3g}-fold, worst sample "
            f"{grown['R'][1]:.3g}; M {together_m:.3g}, worst {grown['M'][1]:.3g}"
        )


class WeatherDemo(Demo):
    """The chart, a slider for the horizon, a choice of systems."""

    size = (10.0, 6.0)
    clip = 7.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.settings, self.names = settings, list(SCENARIOS)
        self.playing, self.position = False, float(settings.horizon)
        self.forecasts: dict[str, Forecast] = {}
        self.chart = Chart(figure.add_axes((0.08, 0.4, 0.73, 0.5)), figure.add_axes((0.08, 0.17, 0.73, 0.15)))
        self.slider: Any = None
        self.widgets = [
            choice(
                figure,
                (0.84, 0.7, 0.14, 0.14),
                "system",
                self.names,
                self.names.index(settings.system),
                lambda number: self.take(self.names[number]),
            ),
            button(figure, (0.84, 0.6, 0.14, 0.06), "play / pause", self.play),
        ]
        self.take(settings.system)

    def take(self, name: str) -> None:
        """Show another system; its controller is trained when it is first asked for."""
        if name not in self.forecasts:
            print(f"Training a controller for {SCENARIOS[name].title} …", file=sys.stderr, flush=True)
            self.forecasts[name] = Forecast(SCENARIOS[name], self.settings.samples, self.settings.seed)
        self.forecast = self.forecasts[name]
        longest = self.forecast.scenario.longest
        self.chart.begin(self.forecast)
        self.position = min(self.position, longest)
        if self.slider is not None:
            self.figure.delaxes(self.slider.ax)
            self.slider.disconnect_events()
        box, limits = (0.13, 0.03, 0.62, 0.03), (2, longest)
        self.slider = slider(self.figure, box, "horizon", limits, int(self.position), self.scrub, "%d", 1)
        self.scrub(self.position)

    def scrub(self, horizon: float) -> None:
        """Look at another horizon."""
        if not self.playing:
            self.position = float(horizon)
        self.chart.show(self.forecast.adjoints(round(horizon)))
        self.refresh()

    def play(self) -> None:
        """Let the horizon grow by itself, or hold it."""
        self.playing = not self.playing
        if self.playing and self.position >= self.forecast.scenario.longest:
            self.position = 2.0

    def advance(self, dt: float) -> None:
        """Let the horizon grow."""
        if self.playing:
            longest = self.forecast.scenario.longest
            self.position = min(self.position + SPEED * dt, longest)
            if round(self.position) != self.slider.val:
                self.slider.set_val(round(self.position))
            self.playing = self.position < longest

    def draw(self) -> None:
        """Nothing moves but what `scrub` has drawn already."""

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: the horizon grows."""
        return [(0.5, self.play)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("weather", __doc__, WeatherDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
