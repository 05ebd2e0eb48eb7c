"""Functions and vector fields over a plane: Jacobians by differences, rotation, curves on which a function vanishes.

Whatever is asked for is asked of many points at once: a field is called with all of them in one array.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from warp_phys.core.checks import check_number, numbers_of
from warp_phys.errors import check_count, shown

Field = Callable[[np.ndarray], np.ndarray]
"""A function of points (N, 2): numbers (N,), or vectors (…, N, 2)."""

MOST_CELLS = 20_000
"""Most squares along an axis: of all corners at once the function is asked."""
BISECTIONS = 53
"""Halvings that take an interval of floats to rounding."""


def check_points(name: str, value: Any, finite: bool = True) -> np.ndarray:
    """Return points of the plane as an array (N, 2) of float64.

    Raises:
        TypeError: They are no numbers.
        ValueError: Another shape, no point at all, or a number that is not finite.
    """
    try:
        points = numbers_of(name, value).astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers of shape (count, 2), got {type(value).__name__}") from None
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"{name} must have shape (count, 2) with at least one point, got {points.shape}")
    if finite and not np.isfinite(points).all():
        wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))[:8].tolist()
        raise ValueError(f"{name} must be finite, rows {wrong} are not")
    return points


def jacobian(field: Field, points: Any, step: float = 1e-5, cut: Any = False) -> np.ndarray:
    """Return the Jacobians ∂u_i/∂θ_j of a vector field by central differences, in one call of the field.

    Args:
        field: Maps points (N, 2) to vectors (…, N, 2).
        points: Where, shape (N, 2).
        step: Distance of the differences to either side.
        cut: Whether components of the field are cut to 0 in places, as those of combined updates are. Then the Jacobian
            is nan where a component is 0 at some of a point's four neighbours and not at others: it may jump there.
            Jumps from one other value to another are not seen. One truth value, or one for each of several fields, of
            the shape of their dimensions (…).

    Returns:
        Shape (…, N, 2, 2), float64; the last index is j.

    Raises:
        TypeError, ValueError: `points` have another shape or are not finite, `step` is not positive.

    >>> jacobian(lambda points: points @ np.array([[1.0, 3.0], [2.0, 4.0]]), [[0.5, 0.0]]).round(6)
    array([[[1., 2.],
            [3., 4.]]])
    """
    points = check_points("points", points)
    check_number("step", step, positive=True)
    offsets = step * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    around = points + offsets[:, None]
    # the distance that is left of 2 step after rounding
    width = [around[0, :, 0] - around[1, :, 0], around[2, :, 1] - around[3, :, 1]]
    values = np.asarray(field(around.reshape(-1, 2)), dtype=np.float64)
    values = values.reshape(*values.shape[:-2], 4, len(points), 2)
    with np.errstate(invalid="ignore", over="ignore"):
        columns = [(values[..., 2 * j, :, :] - values[..., 2 * j + 1, :, :]) / width[j][:, None] for j in range(2)]
    result = np.stack(columns, axis=-1)
    if np.any(cut):
        zero = values == 0.0
        jumps = (zero.any(axis=-3) & ~zero.all(axis=-3)).any(axis=-1)
        result[jumps & np.asarray(cut)[..., None]] = np.nan
    return result


def rotation(jacobians: np.ndarray) -> np.ndarray:
    """Return the antisymmetric part ½ (∂u1/∂θ2 − ∂u2/∂θ1) of Jacobians (…, 2, 2): 0 for a gradient field.

    It is minus one half of the curl, so positive where the field turns clockwise.

    >>> float(rotation(np.array([[0.0, 1.0], [-1.0, 0.0]])))
    1.0
    """
    return 0.5 * (jacobians[..., 0, 1] - jacobians[..., 1, 0])


def rotation_share(jacobians: np.ndarray) -> np.ndarray:
    """Return the antisymmetric part of Jacobians (…, 2, 2) relative to the whole, with the sign of `rotation`.

    The ratio of Frobenius norms: 0 for a gradient field, 1 or −1 for nothing but rotation, whatever the field's size;
    0 where the Jacobian vanishes.

    >>> float(rotation_share(np.array([[1.0, 1.0], [-1.0, 1.0]])).__round__(6))
    0.707107
    """
    largest = np.abs(jacobians).max(axis=(-2, -1))
    scaled = jacobians / np.where(largest > 0.0, largest, 1.0)[..., None, None]
    norm = np.sqrt(np.square(scaled).sum(axis=(-2, -1)))
    return np.sqrt(2.0) * rotation(scaled) / np.where(norm > 0.0, norm, 1.0)


def zero_curves(function: Field, bounds: tuple[float, float] = (-4.0, 4.0), cells: int = 400) -> np.ndarray:
    """Return the curves on which a continuous function vanishes, as short segments.

    The square bounds × bounds is divided into cells² squares. On every edge at whose ends the signs differ the zero is
    found by bisection, all edges at once; the zeros on the edges of one square are joined. So the ends of the segments
    lie on the curve to rounding; what crosses an edge twice goes unseen.

    Args:
        function: Maps points (N, 2) to numbers (N,).
        bounds: Least and largest coordinate, for both axes.
        cells: Squares along each axis, at most 20 000.

    Returns:
        Shape (segments, 2, 2): segment, end, coordinate.

    Raises:
        TypeError, ValueError: `bounds` do not ascend, `cells` is no positive integer.

    >>> segments = zero_curves(lambda points: (points**2).sum(axis=1) - 1.0, bounds=(-2.0, 2.0), cells=40)
    >>> bool(abs(np.hypot(*segments.reshape(-1, 2).T) - 1.0).max() < 1e-15)
    True
    """
    low, high = check_bounds(bounds)
    axis = np.linspace(low, high, check_count("cells", cells, most=MOST_CELLS) + 1)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    positive = _positive(function, grid.reshape(-1, 2)).reshape(grid.shape[:2])
    along_x = np.argwhere(positive[1:] != positive[:-1])
    along_y = np.argwhere(positive[:, 1:] != positive[:, :-1])
    starts = np.concatenate([along_x, along_y])
    if len(starts) == 0:
        return np.empty((0, 2, 2))
    ends = np.concatenate([along_x + np.array([1, 0]), along_y + np.array([0, 1])])
    zeros = _bisect(function, grid[tuple(starts.T)], grid[tuple(ends.T)], positive[tuple(starts.T)])
    numbers = [np.full(positive.shape, -1), np.full(positive.shape, -1)]
    numbers[0][tuple(along_x.T)] = np.arange(len(along_x))
    numbers[1][tuple(along_y.T)] = np.arange(len(along_x), len(starts))
    return zeros[_join(function, grid, positive, *numbers)]


def check_bounds(bounds: Any) -> tuple[float, float]:
    """Return the least and the largest coordinate, or raise a TypeError or ValueError that names them."""
    try:
        low, high = (float(bound) for bound in numbers_of("bounds", bounds))
    except (TypeError, ValueError):
        raise TypeError(f"bounds must be two numbers, got {shown(bounds)}") from None
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"bounds must be finite and ascend, got {shown(bounds)}")
    return low, high


def _positive(function: Field, points: np.ndarray) -> np.ndarray:
    return np.asarray(function(points)) > 0.0


def _bisect(function: Field, low: np.ndarray, high: np.ndarray, positive_low: np.ndarray) -> np.ndarray:
    """Return a point (N, 2) between `low` and `high` at which the function changes its sign."""
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        same = (_positive(function, middle) == positive_low)[:, None]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return 0.5 * (low + high)


def _join(
    function: Field, grid: np.ndarray, positive: np.ndarray, along_x: np.ndarray, along_y: np.ndarray
) -> np.ndarray:
    """Return the pairs of zeros that are joined within a square, shape (segments, 2).

    `along_x` and `along_y` hold the number of the zero on the edge that starts at a grid point, −1 where there is none.
    """
    edges = np.stack([along_x[:-1, :-1], along_y[1:, :-1], along_x[:-1, 1:], along_y[:-1, :-1]], axis=-1)
    count = (edges >= 0).sum(axis=-1)
    two = edges[count == 2]
    pairs = [two[two >= 0].reshape(-1, 2)]
    crossed = np.argwhere(count == 4)
    if len(crossed):
        # all four edges: the sign in the middle says which corners are joined, and the curves go round the others
        corner = tuple(crossed.T)
        middle = 0.5 * (grid[corner] + grid[tuple((crossed + 1).T)])
        joined = (_positive(function, middle) == positive[corner])[:, None]
        bottom, right, top, left = edges[corner].T
        first = np.where(joined, np.stack([bottom, right], axis=1), np.stack([bottom, left], axis=1))
        second = np.where(joined, np.stack([top, left], axis=1), np.stack([top, right], axis=1))
        pairs += [first, second]
    return np.concatenate(pairs)
