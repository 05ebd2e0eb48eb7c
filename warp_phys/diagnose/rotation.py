"""How much a vector field rotates, in any number of dimensions, from random probes of its Jacobian.

A field u(θ) is a gradient field only if its Jacobian Q = ∂u/∂θ is symmetric. Its rotation is the relative size of the
antisymmetric part A = (Q − Qᵀ) / 2 beside the symmetric part S = (Q + Qᵀ) / 2:

    rotation = ‖A‖_F / ‖Q‖_F,   ‖Q‖_F² = ‖A‖_F² + ‖S‖_F²

0 is a gradient field, 1 nothing but rotation, √½ on average a matrix of independent entries. For two independent
probes v, w with E v vᵀ = E w wᵀ = I,

    a = (wᵀQv − vᵀQw) / 2 = wᵀAv,   E a² = ‖A‖_F²,      s = (wᵀQv + vᵀQw) / 2 = wᵀSv,   E s² = ‖S‖_F²

so m products Q v_i give m (m − 1) / 2 unbiased estimates of either. Their means are unbiased (U-statistics), and
the root of their ratio lies in [0, 1], is exactly 0 for a symmetric and exactly 1 for an antisymmetric Q, and has a
bias of order 1 / m otherwise. Standard errors are those of the jackknife, which leaves out one probe at a time.

Probes are Gaussian; the estimator is that of Hutchinson (1990) for a trace, here of QᵀQ and Q², with pairs of probes in
place of the transposed products Qᵀv, which differences of u cannot give.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from warp_phys.core.checks import check_finite_array, check_function, check_number, check_seed
from warp_phys.errors import check_count


@dataclass(frozen=True)
class Rotation:
    """Rotation of a field at a point, with standard errors; nan where the products are not finite or all zero."""

    share: float
    """‖A‖_F / ‖Q‖_F, in [0, 1]."""
    share_error: float
    """Its standard error; 0 if the Jacobian was formed."""
    antisymmetric: float
    """‖A‖_F², unbiased."""
    antisymmetric_error: float
    """Its standard error."""
    total: float
    """‖Q‖_F², unbiased."""
    total_error: float
    """Its standard error."""
    probes: int
    """Number of products with the Jacobian."""

    def __str__(self) -> str:
        return f"{self.share:.3g} ± {self.share_error:.1g}"


def draw_probes(size: int, count: int, seed: int = 0) -> np.ndarray:
    """Return directions in `size` dimensions, shape (count, size), or the unit vectors (size, size) if they are fewer.

    Args:
        size: Dimensions of the field.
        count: How many probes are wanted; three at least, for a standard error.
        seed: Seed of the probes.

    Raises:
        TypeError, ValueError: A count that is no integer or too small.

    >>> draw_probes(2, 16)
    array([[1., 0.],
           [0., 1.]])
    """
    check_seed(seed)
    if check_count("probes", count, 3) >= check_count("size", size):
        return np.eye(size)
    return np.random.default_rng(seed).standard_normal((count, size))


def estimate(probes: np.ndarray, products: np.ndarray) -> Rotation:
    """Return the rotation of a Jacobian Q from its products with probes.

    Args:
        probes: From `draw_probes`, shape (m, P). Unit vectors are taken as such: Q is known then, and no error left.
        products: Q v_i for each of them, shape (m, P).

    Raises:
        ValueError: The shapes differ, or there are fewer than three probes that are not unit vectors.

    >>> turning = np.array([[1.0, 1.0], [-1.0, 1.0]])
    >>> found = estimate(np.eye(2), np.eye(2) @ turning.T)
    >>> round(found.share, 3), found.share_error
    (0.707, 0.0)
    """
    if probes.shape != products.shape or probes.ndim != 2:
        raise ValueError(f"probes and products must have one shape (m, P), got {probes.shape} and {products.shape}")
    count = len(probes)
    exact = probes.shape[0] == probes.shape[1] and np.array_equal(probes, np.eye(count))
    if count < 3 and not exact:
        raise ValueError(f"probes must be at least 3, for a standard error, got {count}")
    if not np.isfinite(products).all():
        return Rotation(*(np.nan,) * 6, count)
    scale = np.abs(products).max()  # squares of exploded updates would overflow
    pairs = probes @ (products / (scale or 1.0)).T
    a, s = np.square((pairs - pairs.T) / 2.0), np.square((pairs + pairs.T) / 2.0)
    if exact:  # wᵀQv over all pairs of unit vectors is Q itself, the diagonal with it
        return _rotation(a.sum(), s.sum(), (0.0, 0.0, 0.0), count, scale)
    np.fill_diagonal(s, 0.0)
    number = count * (count - 1)
    of_a, of_s = a.sum() / number, s.sum() / number
    # leave one out: the pairs with probe i go
    left = number - 2 * (count - 1)
    a_left, s_left = (a.sum() - 2.0 * a.sum(axis=1)) / left, (s.sum() - 2.0 * s.sum(axis=1)) / left
    errors = [_jackknife(x) for x in (_share(a_left, s_left), a_left, a_left + s_left)]
    return _rotation(of_a, of_s, errors, count, scale)


def probe(
    field: Callable[[np.ndarray], np.ndarray], point: Any, probes: int = 32, seed: int = 0, step: float | None = None
) -> Rotation:
    """Return the rotation of a field of numpy arrays at a point, its products by central differences.

    Args:
        field: Maps θ (P,) to u (P,), a smooth function near `point`.
        point: θ, shape (P,).
        probes: Number of products; P or more form the Jacobian.
        seed: Seed of the probes.
        step: Distance of the differences to either side; `difference_step` if None.

    Raises:
        TypeError, ValueError: `point` is no vector, a count or a step that makes no sense.

    >>> matrix = np.array([[0.0, 2.0], [-2.0, 0.0]])
    >>> round(probe(lambda theta: matrix @ theta, [1.0, 0.5]).share, 9)
    1.0
    """
    check_function("field", field, "an array (P,)", optional=False)
    theta = check_finite_array("point", point)
    if theta.ndim != 1 or theta.size == 0:
        raise ValueError(f"point must have shape (P,), got {theta.shape}")
    directions = draw_probes(theta.size, probes, seed)
    distance = difference_step(theta, step)
    with np.errstate(over="ignore", invalid="ignore"):
        products = [
            (field(theta + h * v) - field(theta - h * v)) / (2.0 * h)
            for v, h in ((v, distance / np.sqrt(np.sum(v * v))) for v in directions)
        ]
    return estimate(directions, np.stack(products))


def difference_step(theta: np.ndarray, step: float | None = None, rounding: float = 2.0**-52) -> float:
    """Return how far the differences go to either side of θ: `step`, or `rounding`^(1/3) max(1, |θ|).

    Raises:
        TypeError, ValueError: `step` is no positive number.
    """
    if step is None:
        return float(np.cbrt(rounding)) * max(1.0, float(np.sqrt(np.sum(theta * theta))))
    check_number("step", step, positive=True)
    return float(step)


def _rotation(a: Any, s: Any, errors: Any, count: int, scale: Any) -> Rotation:
    """Return the result from ‖A‖², ‖S‖² and three standard errors, of products that were divided by `scale`."""
    square = float(scale) * float(scale)
    of_share, of_a, of_total = map(float, errors)
    share = float(_share(a, s))
    return Rotation(share, of_share, float(a) * square, of_a * square, float(a + s) * square, of_total * square, count)


def _share(a: Any, s: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(a / (a + s))


def _jackknife(left_out: np.ndarray) -> float:
    """Return the standard error from the estimates that leave out one probe each."""
    return float(np.sqrt((len(left_out) - 1) * left_out.var()))
