"""What becomes of the sheep after the target is dragged: many drags of the herd's demo, without a picture.

    python -m demos.herd_drags --drags 100

The dogs gather the sheep for 8 s; then the target is dragged somewhere within 4 m, and they have 12 s to bring them
there.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import warp

from controllers.commandline import Parser, add_flags
from controllers.settings import check_setting
from demos import herd
from demos.weights import load_weights
from warp_phys.interop.torch import Rollout

GATHER, FOLLOW, LAST = 8.0, 12.0, 4.0
"""Seconds before the drag, after it, and of these the last over which the sheep's distance is averaged."""
NEAR = 1.0
"""Mean distance from the target at which the sheep have arrived [m]."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    drags: int = 100
    """Drags, each of another herd."""
    seed: int = 0
    """Seed of the herds and of the drags."""

    def __post_init__(self) -> None:
        """Check every setting."""
        herd.Settings(self.seed)
        check_setting("drags", self.drags, int, at_least=1)


def run_drags(controller: torch.nn.Module, drags: int, seed: int) -> np.ndarray:
    """Return the sheep's mean distance from the target at every step after a drag, shape (steps + 1, drags)."""
    system, generator = herd.SYSTEM, np.random.default_rng(seed)

    def unroll(states: np.ndarray, seconds: float) -> np.ndarray:
        with torch.no_grad():
            found = Rollout(system, controller, round(seconds / system.dt), on_divergence="mask")(states)[0]
        return found.numpy().reshape(len(found), drags, -1, 4)

    gathered = unroll(system.sample(drags, seed=seed), GATHER)[-1].copy()
    radius, angle = herd.DRAG * np.sqrt(generator.random(drags)), generator.uniform(0.0, 2.0 * np.pi, drags)
    gathered[:, :, :2] -= np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, None]
    after = unroll(gathered.reshape(drags, -1), FOLLOW)
    return np.hypot(after[:, :, system.drivers :, 0], after[:, :, system.drivers :, 1]).mean(axis=2)


def summarise(distances: np.ndarray) -> str:
    """The numbers in words."""
    last = distances[-round(LAST / herd.SYSTEM.dt) :].mean(axis=0)
    near = distances < NEAR
    first = herd.SYSTEM.dt * near.argmax(axis=0)[near.any(axis=0)]
    return (
        f"{distances.shape[1]} drags within {herd.DRAG:g} m; the sheep begin {np.median(distances[0]):.2f} m away in "
        f"the median.\nWithin {NEAR:g} m at some time: {near.any(axis=0).mean():.0%}"
        + (f", in the median after {np.median(first):.1f} s" if len(first) else "")
        + f".\nDistance over the last {LAST:g} of {FOLLOW:g} s: median {np.median(last):.2f} m, nine tenths below "
        f"{np.quantile(last, 0.9):.2f} m, at most {last.max():.2f} m; within {NEAR:g} m: "
        f"{(last < NEAR).mean():.0%}; nearer than at the drag: {(last < distances[0]).mean():.0%}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    warp.config.log_level = warp.LOG_WARNING
    parser = Parser(prog="python -m demos.herd_drags", description=(__doc__ or "").partition("\n")[0])
    add_flags(parser, Settings)
    try:
        settings = Settings(**vars(parser.parse_args(arguments)))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    controller = load_weights("herd", herd.FLOW, herd.Policy())
    print(summarise(run_drags(controller, settings.drags, settings.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
