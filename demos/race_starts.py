"""Who falls first in the race: its trainings from many starts, without a picture; prints a table.

    python -m demos.race_starts --starts 20

A curve has fallen where the test loss is below 0.1 for the first time.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import warp

from controllers.commandline import Parser, add_flags
from controllers.settings import check_setting
from demos import race
from demos.race_training import FLOWS, Race

FALLEN = 0.1


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    starts: int = 20
    """Races, with seeds from 0."""
    poles: int = race.Settings.poles
    """Poles on the carts."""
    learning_rate: float = race.Settings.learning_rate
    """Learning rate of Adam."""
    epochs: int = 400
    """Where a race ends if nobody has fallen."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_setting("starts", self.starts, int, at_least=1)
        race.Settings(self.poles, self.learning_rate, self.epochs)


def first_to_fall(losses: Mapping[str, Sequence[float]]) -> tuple[str, int]:
    """Return the flow whose curve falls first and the epoch in which it does; "nobody" where none does.

    >>> first_to_fall({"R": [1.0, 0.5, 0.3], "C": [1.2, 0.09, 0.2]})
    ('C', 2)
    """
    falls = [(epoch, flow) for flow, values in losses.items() for epoch, loss in enumerate(values, 1) if loss < FALLEN]
    return (min(falls)[1], min(falls)[0]) if falls else ("nobody", 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the races; returns the exit status."""
    warp.config.log_level = warp.LOG_WARNING
    parser = Parser(prog="python -m demos.race_starts", description=(__doc__ or "").partition("\n")[0])
    add_flags(parser, Settings)
    try:
        settings = Settings(**vars(parser.parse_args(arguments)))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    winners: Counter[str] = Counter()
    for seed in range(settings.starts):
        one = Race(settings.poles, settings.learning_rate, seed, settings.epochs)
        one.over = lambda lanes: first_to_fall({flow: lane.losses[-1:] for flow, lane in lanes.items()})[1] > 0
        one.train()
        losses = {flow: lane.losses for flow, lane in one.lanes.items()}
        winner, epoch = first_to_fall(losses)
        winners[winner] += 1
        latest = ", ".join(f"{flow} {losses[flow][-1]:.2g}" if losses[flow] else f"{flow} lost" for flow in FLOWS)
        print(f"start {seed}: first below {FALLEN:g}: {winner}, epoch {epoch}; then {latest}", flush=True)
    print("First to fall: " + ", ".join(f"{name} {count}" for name, count in winners.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
