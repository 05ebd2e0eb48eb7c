"""The Taylor test: a gradient is right if the remainder of first order falls with the square of the step."""

import numpy as np

STEPS = 0.5 ** np.arange(4, 10)


def slope(function, point, gradient, direction) -> float:
    """Return the slope of log |f(x + h d) − f(x) − h ⟨g, d⟩| over log h: 2 for a right gradient, 1 for a wrong one.

    Where f is linear and the gradient right, nothing but rounding remains: infinity.
    """
    start = function(point)
    rate = float(np.vdot(gradient, direction))
    remainders = np.array([abs(function(point + h * direction) - start - h * rate) for h in STEPS])
    if (remainders < 1e-13 * (abs(start) + abs(rate))).all():
        return np.inf
    return float(np.polyfit(np.log(STEPS), np.log(remainders + 1e-300), 1)[0])


def check_gradient(function, point, gradient, seed=0, scale=0.1) -> None:
    """Assert slope 2 for `gradient`, and that the test would notice an error of one per cent."""
    direction = scale * np.random.default_rng(seed).standard_normal(point.shape)
    # in the direction of the gradient an error of the gradient cannot hide
    direction += scale * gradient * (np.sqrt(point.size) / (np.linalg.norm(gradient) + 1e-30))
    right, wrong = (slope(function, point, factor * gradient, direction) for factor in (1.0, 1.01))
    assert right > 1.8, f"the remainder falls with h^{right:.2f}: the gradient is wrong"
    assert wrong < 1.6, f"the remainder of a gradient wrong by 1 % falls with h^{wrong:.2f}: this test proves nothing"
