"""Loss, updates, rotation and optimisation paths of R, M, S and C over a plane of two parameters.

    python -m demos.landscape --save landscape.png
    python -m demos.landscape --start 2.5,2 --start -1,-3

Opens a window unless it is told to save; prints what is measured either way. docs/landscape.md says what one sees.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import warp
from matplotlib.figure import Figure

from controllers.checkpoint import atomic_write
from controllers.commandline import Parser, add_flags
from demos.animation import has_display
from demos.landscape_numbers import DEFAULT_STARTS, Settings, Start, compute, summarise
from demos.landscape_picture import draw, save


def read_start(text: str) -> Start:
    """Read a start such as "2.5,-1".

    >>> read_start("2.5,-1")
    Start(theta1=2.5, theta2=-1.0)
    """
    try:
        start = Start(*(float(number) for number in text.split(",")))
    except (TypeError, ValueError):
        raise ValueError(f"start must be two numbers such as 2.5,-1, got {text!r}") from None
    if not np.isfinite(start).all():
        raise ValueError(f"start must be finite, got {text!r}")
    return start


def parse(arguments: Sequence[str]) -> tuple[Parser, Settings]:
    """Read a command line; exits with status 2 and one line where it makes no sense."""
    parser = Parser(
        prog="python -m demos.landscape", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add_flags(parser, Settings)
    shown = " ".join(f"{start.theta1:g},{start.theta2:g}" for start in DEFAULT_STARTS)
    text = f"Where an optimisation starts, θ1,θ2; may be given again and again (default: {shown})."
    parser.add_argument("--start", action="append", metavar="A,B", help=text)
    # "--start -1,2" in two words looks like two flags to argparse, "--start=-1,2" does not
    words = iter(arguments)
    joined = [f"{word}={next(words, '')}" if word == "--start" else word for word in words]
    given = vars(parser.parse_args(joined))
    starts = given.pop("start")
    try:
        if starts:
            given["starts"] = [read_start(start) for start in starts]
        settings = Settings(**given)
        settings.landscape()
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return parser, settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    warp.config.log_level = warp.LOG_WARNING
    parser, settings = parse(sys.argv[1:] if arguments is None else arguments)
    if not settings.save and not has_display():
        parser.error("there is no display to open a window on; give --save FILE.png")
    found = compute(settings)
    print(summarise(settings, found), end="", flush=True)
    layout: dict[str, Any] = {"figsize": (12.5, 12.2), "layout": "constrained"}
    if settings.save:
        figure, path = Figure(**layout), Path(settings.save)
        draw(figure, settings, found)
        with parser.answering(), atomic_write(path) as file:
            save(figure, file, path.suffix[1:].lower())
        print(f"Picture: {path.resolve()}")
    else:
        from matplotlib import pyplot as plt  # noqa: PLC0415, it looks for a display as soon as it is imported

        draw(plt.figure(**layout), settings, found)
        plt.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
