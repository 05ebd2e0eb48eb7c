"""What a controller is given over time besides the state: a clock, noise, a reference."""

from collections.abc import Callable, Sequence

import numpy as np

from warp_phys.errors import shown

Draw = Callable[[np.random.Generator, int, int, float, int], np.ndarray]
"""From a generator, samples, time steps, an amplitude and a period to numbers that can be of shape (samples, steps)."""


def clock(_draw: np.random.Generator, _samples: int, steps: int, _amplitude: float, _period: int) -> np.ndarray:
    """Return the share of the time steps that is over."""
    return np.arange(steps) / steps


def noise(draw: np.random.Generator, samples: int, steps: int, _amplitude: float, _period: int) -> np.ndarray:
    """Return standard normal numbers."""
    return draw.standard_normal((samples, steps))


def sine(draw: np.random.Generator, samples: int, steps: int, amplitude: float, period: int) -> np.ndarray:
    """Return sine waves, each of a phase of its own."""
    phases = draw.uniform(0.0, 2.0 * np.pi, (samples, 1))
    return amplitude * np.sin(2.0 * np.pi * np.arange(steps) / period + phases)


def levels(draw: np.random.Generator, samples: int, steps: int, amplitude: float, period: int) -> np.ndarray:
    """Return levels between plus and minus the amplitude, each held for a period."""
    held = draw.uniform(-amplitude, amplitude, (samples, -(-steps // period)))
    return np.repeat(held, period, axis=1)[:, :steps]


SIGNALS: dict[str, Draw] = {"clock": clock, "noise": noise, "sine": sine, "steps": levels}
REFERENCES = ("sine", "steps")
"""Those that a component of the state shall follow."""


def check_signals(names: Sequence[str], track: str) -> None:
    """Raise TypeError or ValueError where names are not distinct ones of `SIGNALS`, or a reference is followed by none.

    >>> check_signals(["clock", "sine"], track="")
    Traceback (most recent call last):
        ...
    ValueError: track must name the component of the state that shall follow the reference sine, got ''
    """
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"inputs must be a sequence of names, such as ('clock',), got {shown(names)}")
    for name in names:
        if not isinstance(name, str) or name not in SIGNALS or list(names).count(name) > 1:
            raise ValueError(f"inputs must name each once, of {', '.join(SIGNALS)}, got {shown(name)}")
    if not isinstance(track, str):
        raise TypeError(f"track must be text, the name of a component of the state, got {shown(track)}")
    references = [name for name in names if name in REFERENCES]
    if len(references) > 1:
        raise ValueError(f"inputs may have one reference, got {' and '.join(references)}")
    if references and not track:
        raise ValueError(
            f"track must name the component of the state that shall follow the reference {references[0]}, got ''"
        )
    if track and not references:
        raise ValueError(f"track needs a reference among inputs, {' or '.join(REFERENCES)}, got track {track!r}")


def draw_signals(
    names: Sequence[str], draw: np.random.Generator, samples: int, steps: int, amplitude: float, period: int
) -> np.ndarray:
    """Return inputs of shape (samples, steps, inputs); a reference comes first, since a tracking system reads it.

    >>> draw_signals(["clock", "steps"], np.random.default_rng(0), 2, 4, 1.0, 2)[0].round(2).tolist()
    [[0.27, 0.0], [0.27, 0.25], [-0.46, 0.5], [-0.46, 0.75]]
    """
    order = sorted(names, key=lambda name: name not in REFERENCES)
    drawn = [SIGNALS[name](draw, samples, steps, amplitude, period) for name in order]
    inputs = np.empty((samples, steps, len(drawn)))
    for i, signal in enumerate(drawn):
        inputs[:, :, i] = signal
    return inputs
