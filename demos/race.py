"""A race: the same initial weights trained live with R, M, S and C, side by side; learning curves grow below."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from controllers.settings import check_setting
from demos.colours import POLES, colour
from demos.frame import Demo
from demos.race_training import DONE, FLOWS, PREPARING, Race
from demos.views import run
from demos.widgets import button, choice, slider
from warp_phys.flow import resolve
from warp_phys.systems import CartPole

REACH = 1.4
"""Metres to either side of the cart that are drawn."""
SLOWLY, REST = 0.5, 0.8
"""Speed at which a ride is shown, and seconds for which its end stays."""
SHORTEST = 40
"""Epochs that the curves have room for at first."""
FILMED = 4.0
"""Epochs per second in a file."""
PATIENCE = 120.0
"""Seconds to wait for the thread in the end; it may be compiling."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    poles: int = 2
    """Poles on the carts at the start, 1 to 4."""
    learning_rate: float = 1e-3
    """Learning rate of Adam at the start."""
    epochs: int = 2000
    """Where the race ends."""
    seed: int = 0
    """Seed of the first race; a restart takes the next one."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_setting("poles", self.poles, int, at_least=1, below=5)
        check_setting("learning_rate", self.learning_rate, float, at_least=1e-5, below=1.0)
        check_setting("epochs", self.epochs, int, at_least=1)
        check_setting("seed", self.seed, int, at_least=0)


class RaceDemo(Demo):
    """Four carts in a row, learning curves below, choices at the right."""

    size = (11.0, 6.4)
    clip = 30.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.poles, self.rate, self.epochs = settings.poles, settings.learning_rate, settings.epochs
        self.seed = settings.seed - 1
        self.worlds = [figure.add_axes((0.02 + 0.245 * i, 0.53, 0.225, 0.4)) for i in range(len(FLOWS))]
        self.curves = figure.add_axes((0.07, 0.09, 0.68, 0.36))
        self.curves.set(yscale="log", ylim=(1e-4, 3.0), xlabel="epoch", ylabel="test loss")
        self.curves.set_title("Test loss (0: all poles upright, 2: all hanging)")
        self.lines = [self.curves.plot([], [], color=colour(flow), linewidth=1.4)[0] for flow in FLOWS]
        self.curves.legend(self.lines, [f"{flow} {resolve(flow).name}" for flow in FLOWS], loc="lower left")
        self.note = self.curves.text(0.98, 0.95, "", ha="right", va="top", transform=self.curves.transAxes, fontsize=9)
        self.widgets = [
            choice(
                figure,
                (0.79, 0.26, 0.08, 0.19),
                "poles",
                ["1", "2", "3", "4"],
                self.poles - 1,
                lambda number: self.restart(number + 1),
            ),
            button(figure, (0.89, 0.4, 0.09, 0.05), "pause", self.pause),
            button(figure, (0.89, 0.33, 0.09, 0.05), "restart", self.restart),
            slider(
                figure, (0.845, 0.13, 0.09, 0.03), "rate", (-4, -1.5), np.log10(self.rate), self.set_rate, "10^%.1f"
            ),
        ]
        self.race: Race | None = None
        self.ended: list[Race] = []
        self.restart()

    def restart(self, poles: int = 0) -> None:
        """Begin a new race, with new initial weights."""
        if self.race:
            self.race.stop()
            self.ended.append(self.race)
        self.poles, self.seed = poles or self.poles, self.seed + 1
        self.race = Race(self.poles, self.rate, self.seed, self.epochs)
        self.clock = 0.0
        self.rides: list[Any] = [None] * len(FLOWS)
        self.sketches, self.moving = [], [*self.lines, self.note]
        rest = np.zeros(2 + 2 * self.poles)
        rest[2::2] = np.pi
        for axes, flow in zip(self.worlds, FLOWS, strict=True):
            axes.clear()
            sketch = CartPole(poles=self.poles).sketch(axes)
            artists = sketch(rest, np.zeros(1))
            artists[0].set_color(colour(flow))
            artists[1 + self.poles].set_color(colour(flow))
            for line, ink in zip(artists[1 : 1 + self.poles], POLES, strict=False):
                line.set_color(ink)
            axes.set(xticks=(), xlabel="")
            axes.set_title(f"{flow} {resolve(flow).name}", color=colour(flow), weight="bold")
            for spine in axes.spines.values():
                spine.set(color=colour(flow), linewidth=2)
            self.sketches.append(sketch)
            self.moving += artists
        for artist in self.moving:
            artist.set_animated(True)
        self.curves.set_xlim(0, SHORTEST)
        self.refresh()
        self.race.start()

    def pause(self) -> None:
        """Let the trainings rest, or go on; the carts go on showing what was learned."""
        assert self.race
        self.race.pause(not self.race.paused)

    def set_rate(self, power: float) -> None:
        """Set the learning rate of all four, from their next epoch on."""
        self.rate = 10.0**power
        if self.race:
            self.race.rate = self.rate

    def advance(self, dt: float) -> None:
        """Let the carts ride; a new round shows what was learned meanwhile, by all four alike."""
        assert self.race
        if self.race.error is not None:
            raise self.race.error
        self.clock += dt
        seconds = 1.0 / SLOWLY + REST
        if self.clock >= seconds or not any(self.rides):
            self.clock %= seconds
            self.rides = [lane.ride for lane in self.race.lanes.values()]

    def draw(self) -> None:
        """Move carts and curves."""
        assert self.race
        for axes, sketch, ride in zip(self.worlds, self.sketches, self.rides, strict=True):
            if ride is not None:
                step = min(int(self.clock * SLOWLY / 0.01), len(ride.controls))
                sketch(ride.states[step], ride.controls[min(step, len(ride.controls) - 1)])
            middle = 0.5 * sum(axes.get_xlim())
            axes.set_xlim(middle - REACH, middle + REACH)
        longest = 0
        for line, lane in zip(self.lines, self.race.lanes.values(), strict=True):
            losses = lane.losses
            line.set_data(np.arange(1, len(losses) + 1), losses)
            longest = max(longest, len(losses))
        if longest > self.curves.get_xlim()[1]:
            self.curves.set_xlim(0, 2 * self.curves.get_xlim()[1])
            self.refresh()
        self.note.set_text(self.describe(longest))

    def settle(self, time: float) -> None:
        """In a file the curves grow at a pace of their own, whatever the machine's."""
        assert self.race
        while self.race.is_alive() and not self.race.paused and self.race.finished_epochs() < FILMED * time + 1:
            self.race.join(0.01)

    def describe(self, epoch: int) -> str:
        """What the trainings are at."""
        assert self.race
        lost = [flow for flow, lane in self.race.lanes.items() if lane.diverged]
        words = f"{self.poles} pole{'s' if self.poles > 1 else ''}, epoch {epoch}, rate {self.rate:.1e}"
        if self.race.state == PREPARING:
            words = "preparing; the first race with these poles compiles its kernels …"
        elif self.race.state == DONE:
            words += ", done"
        elif self.race.paused:
            words += ", paused"
        return words + (f"; diverged: {', '.join(lost)}" if lost else "")

    def close(self) -> None:
        """End all trainings."""
        assert self.race
        for race in (self.race, *self.ended):
            race.stop()
        for race in (self.race, *self.ended):
            race.join(PATIENCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("race", __doc__, RaceDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
