"""A race: the same initial weights trained live with several flows, side by side; learning curves grow."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from controllers.settings import check_setting
from demos.colours import colour, flow_names, tinted
from demos.frame import Button, Choice, Control, Demo, Plot, Slider
from demos.race_training import DONE, FLOWS, PREPARING, Race
from demos.views import run
from warp_phys.systems import CartPole
from warp_phys.systems.drawing import ASLANT, Picture, Shape, Text, moved

REACH, APART = 1.6, 1.5
"""Metres to either side of the carts that are seen, and from one to the next."""
FREE = 0.7
"""Metres that a cart is seen to go before its lane follows."""
SLOWLY, REST = 0.5, 0.8
"""Speed at which a ride is shown, and seconds for which its end stays."""
FILMED = 4.0
"""Epochs per second in a file."""
LEAST = 1e-3
"""Test loss at the bottom of the curves' axis."""
PATIENCE = 120.0
"""Seconds to wait for the thread in the end; it may be compiling."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    poles: int = 4
    """Poles on the carts at the start, 1 to 4."""
    learning_rate: float = 1e-3
    """Learning rate of Adam at the start."""
    epochs: int = 1000
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
    """A lane for the cart of each flow, learning curves beside them."""

    says = (
        "Five networks with the same first weights learn to swing up poles; only the backward pass differs. Watch "
        "whose curve falls: press restart for other weights."
    )
    clip = 30.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.poles, self.rate, self.epochs = settings.poles, settings.learning_rate, settings.epochs
        self.seed = settings.seed - 1
        self.race: Race | None = None
        self.ended: list[Race] = []
        self.restart()

    @property
    def build(self) -> int:
        """The number of poles."""
        return self.poles

    def controls(self) -> Sequence[Control]:
        """What can be chosen."""
        return [
            Button("restart with other weights", self.restart),
            Choice("poles", list("1234"), lambda: str(self.poles), lambda count: self.restart(int(count))),
            Slider("log10 of the rate", -4.0, -1.5, 0.1, lambda: round(float(np.log10(self.rate)), 1), self.set_rate),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """Learning curves."""
        title = "test loss; 0: all upright, 2: all hanging"
        inks = [colour(flow) for flow in FLOWS]
        return [Plot(title, flow_names(FLOWS), inks, self.curves, "epoch", (LEAST, 2.0), log=True)]

    def restart(self, poles: int = 0) -> None:
        """Begin a new race, with new initial weights."""
        if self.race:
            self.race.stop()
            self.ended.append(self.race)
        self.poles, self.seed = poles or self.poles, self.seed + 1
        self.race = Race(self.poles, self.rate, self.seed, self.epochs)
        self.clock = 0.0
        self.rides: list[Any] = [None] * len(FLOWS)
        self.race.start()

    def pause(self) -> None:
        """Let the trainings rest, or go on; the carts go on showing what was learned."""
        assert self.race
        self.race.pause(not self.race.paused)

    def set_rate(self, power: float) -> None:
        """Set the learning rate of all, from their next epoch on."""
        self.rate = 10.0**power
        if self.race:
            self.race.rate = self.rate

    def advance(self, dt: float) -> None:
        """Let the carts ride; a new round shows what was learned meanwhile, by all alike."""
        assert self.race
        if self.race.error is not None:
            raise self.race.error
        self.clock += dt
        seconds = 1.0 / SLOWLY + REST
        if self.clock >= seconds or not any(self.rides):
            self.clock %= seconds
            self.rides = [lane.ride for lane in self.race.lanes.values()]

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Test losses by epoch, nan where a training has not come to yet."""
        assert self.race
        losses = [lane.losses for lane in self.race.lanes.values()]
        longest = max(map(len, losses))
        rows = np.full((len(FLOWS), longest), np.nan)
        for row, values in zip(rows, losses, strict=True):
            row[: len(values)] = values
        return np.arange(1.0, longest + 1.0), rows

    def picture(self) -> Picture:
        """All carts at the same moment of their rides, one behind the other."""
        assert self.race
        system = CartPole(poles=self.poles)
        rest = np.zeros(system.state_size)
        rest[2::2] = np.pi + np.linspace(-0.3, 0.3, self.poles)
        parts: dict[str, Shape] = {}
        for row, (flow, ride, lane) in enumerate(zip(FLOWS, self.rides, self.race.lanes.values(), strict=True)):
            state, control = rest, np.zeros(1)
            if ride is not None:
                step = min(int(self.clock * SLOWLY / system.dt), len(ride.controls))
                state, control = ride.states[step], ride.controls[min(step, len(ride.controls) - 1)]
            away = APART * (len(FLOWS) - 1 - row)
            x = float(state[0])
            own = tinted(system.picture(state, control).parts, colour(flow), ("cart", "force"))
            own = moved(own, (np.clip(x, -FREE, FREE) - x, away, 0.0))
            loss = f" {lane.losses[-1]:.2g}" if lane.losses else ""
            own["name"] = Text((-REACH, away, 0.22), flow + loss, colour(flow))
            parts |= {f"{flow} {name}": part for name, part in own.items()}
        low, high = (-REACH - 0.3, -0.4, -1.2), (REACH, APART * (len(FLOWS) - 1), 1.2)
        return Picture(parts, low, high, view=ASLANT)

    def settle(self, time: float) -> None:
        """In a file the curves grow at a pace of their own, whatever the machine's."""
        assert self.race
        while self.race.is_alive() and not self.race.paused and self.race.finished_epochs() < FILMED * time + 1:
            self.race.join(0.01)

    def words(self) -> str:
        """What the trainings are at."""
        assert self.race
        if self.race.state == PREPARING:
            return "preparing; the first race with these poles compiles its kernels …"
        lost = [flow for flow, lane in self.race.lanes.items() if lane.diverged]
        epoch = max(len(lane.losses) for lane in self.race.lanes.values())
        words = f"{self.poles} pole{'s' if self.poles > 1 else ''}, epoch {epoch}, rate {self.rate:.1e}"
        words += ", done" if self.race.state == DONE else ", paused" if self.race.paused else ""
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
