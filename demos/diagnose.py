"""Why gradients explode: a controller trained for some epochs, its diagnosis as a table and a picture.

    python -m demos.diagnose --save diagnosis.png
    python -m demos.diagnose --poles 2 --steps 200 --epochs 0

Opens a window unless it is told to save; docs/diagnostics.md says what one sees.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import warp
from matplotlib.figure import Figure

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags
from controllers.settings import check_setting
from demos.animation import has_display
from demos.diagnostics_picture import draw
from demos.landscape_picture import save
from demos.outputs import PICTURES, check_file
from demos.weather_numbers import Scenario, train
from warp_phys.diagnose.diagnostics import Diagnosis
from warp_phys.interop.torch import Rollout, diagnose
from warp_phys.systems import CartPole


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    poles: int = 4
    """Poles on the cart."""
    steps: int = 100
    """Horizon, of the training and of the diagnosis."""
    epochs: int = 10
    """Epochs of training with C, of 32 updates each; 0 looks at fresh weights."""
    samples: int = 64
    """Initial states of the diagnosis."""
    probes: int = 16
    """Probes for the rotation of the updates, at least 3; 0 leaves it out."""
    seed: int = 0
    """Seed of weights and states."""
    save: str = ""
    """Write the picture to this file in place of opening a window."""

    def __post_init__(self) -> None:
        """Check every setting."""
        for name, least in (("poles", 1), ("steps", 2), ("epochs", 0), ("samples", 1), ("probes", 0), ("seed", 0)):
            check_setting(name, getattr(self, name), int, at_least=least)
        if self.probes in (1, 2):
            raise ValueError(f"probes must be 0, or at least 3 for a standard error, got {self.probes}")
        if self.save:
            check_file("save", self.save, PICTURES)


def compute(settings: Settings) -> Diagnosis:
    """Train and diagnose."""
    system = CartPole(poles=settings.poles, dt=0.01)
    scenario = Scenario("cart-pole", system, settings.steps, "final", settings.epochs, settings.steps)
    rollout = Rollout(system, train(scenario, settings.seed), settings.steps, "combined")
    x0 = system.sample(settings.samples, seed=settings.seed + 1)
    return diagnose(rollout, x0, probes=settings.probes, seed=settings.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    warp.config.log_level = warp.LOG_WARNING
    description = (__doc__ or "").partition("\n")[0]
    parser = Parser(prog="python -m demos.diagnose", description=description, allow_abbrev=False)
    add_flags(parser, Settings)
    try:
        settings = Settings(**vars(parser.parse_args(arguments)))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if not settings.save and not has_display():
        parser.error("there is no display to open a window on; give --save FILE.png")
    with parser.answering():
        found = compute(settings)
    print(found, flush=True)
    if settings.save:
        figure, path = Figure(figsize=(12.0, 6.8), layout="constrained"), Path(settings.save)
        draw(figure, found)
        with parser.answering(), atomic_write(path) as file:
            save(figure, file, path.suffix[1:].lower())
        print(f"Picture: {path.resolve()}")
    else:
        from matplotlib import pyplot as plt  # noqa: PLC0415, it looks for a display as soon as it is imported

        draw(plt.figure(figsize=(12.0, 6.8), layout="constrained"), found)
        plt.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
