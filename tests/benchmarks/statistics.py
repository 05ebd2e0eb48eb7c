"""Numbers from many measurements: medians, ratios pair by pair, exponents."""

from collections.abc import Sequence

import numpy as np


def median(values: Sequence[float]) -> float:
    """The median; nan of nothing."""
    return float(np.median(values)) if len(values) else float("nan")


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; nan of nothing."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the ratios within each round, of the rounds that both took part in: what slows a round slows both.

    >>> paired_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    2.0
    """
    return median([a / b for a, b in zip(times, reference, strict=False)])


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log cost against log size; nan of fewer than two points.

    >>> round(exponent([1, 10, 100], [3.0, 30.0, 300.0]), 6)
    1.0
    """
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def relative_difference(values: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Norm of the difference of lists of arrays, by the norm of the second; infinite if anything is not finite."""
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in arrays]) for arrays in (values, reference))
    difference = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    return difference if np.isfinite(difference) else float("inf")
