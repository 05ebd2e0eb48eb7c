"""What systems written as functions of another framework share; imports no framework."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import warp as wp

from warp_phys.core.arrays import check_array, shape_message
from warp_phys.core.gate import active_tape
from warp_phys.errors import check_count
from warp_phys.systems.losses import When, check_trajectory, chosen_times


@dataclass(frozen=True, eq=False)
class ForeignSystem(ABC):
    """A simulator x_{n+1} = function(x_n, c_n), rows (B, D) and (B, K) to rows (B, D); the framework differentiates it.

    The function computes from its arguments alone, row by row, and leaves them as they are.
    """

    function: Callable[[Any, Any], Any]
    """The step: states (B, D) and controls (B, K) to the next states (B, D)."""
    state_size: int
    """Number D of state components."""
    control_size: int
    """Number K of control components."""
    cost: Callable[[Any], Any] | None = None
    """Pointwise cost of states (N, D), shape (N,), for `loss`; None leaves the loss to the caller."""

    def __post_init__(self):
        for name in ("function", "cost"):
            value = getattr(self, name)
            if not callable(value) and not (name == "cost" and value is None):
                raise TypeError(f"{name} must be a function, got {type(value).__name__}")
        for name in ("state_size", "control_size"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components: none are known."""
        return ()

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components: none are known."""
        return ()

    def loss(self, states: Any, controls: Any = None, when: When = "final", control_cost: float = 0.0) -> Any:
        """Return the mean pointwise cost over samples and the chosen times, plus a control cost.

        Args:
            states: Shape (steps + 1, batch, D).
            controls: Shape (steps, batch, K); needed only with a control cost.
            when: "final" (the last state), "every" (states 1 … steps), or the chosen steps themselves.
            control_cost: Factor of the mean squared control.

        Raises:
            TypeError: The system was made without a cost; the cost returns something else than an array of numbers.
            ValueError: Wrong shapes, times that are not there, a control cost without controls.
        """
        if self.cost is None:
            raise TypeError(
                f"this {type(self).__name__} was made without a cost: make it with cost=…, or write the loss as an "
                "expression of states and controls"
            )
        check_trajectory(self, states, controls, control_cost)
        times = chosen_times(when, states.shape[0] - 1)
        value = self._costs(states, times).mean()
        return value + control_cost * (controls * controls).mean() if control_cost else value

    @abstractmethod
    def _costs(self, states: Any, times: Sequence[int]) -> Any:
        """Return the pointwise costs at distinct times, shape (times · batch,)."""

    def _check_inputs(self, x: wp.array, c: wp.array, other: wp.array, other_name: str) -> None:
        """Raise where arrays do not fit, or where a tape would miss the step."""
        check_array("x", x, (-1, self.state_size))
        check_array("c", c, (len(x), self.control_size), x)
        check_array(other_name, other, x.shape, x)
        tape = active_tape()
        if tape is not None and other_name == "y" and any(array.requires_grad for array in (x, c, other)):
            raise RuntimeError(
                f"a wp.Tape cannot record the step of a {type(self).__name__}: use warp_phys.Rollout, which records "
                "whole rollouts, or call step_vjp"
            )


def check_result(name: str, shape: Sequence[int], dtype: Any, expected_shape: Sequence[int], expected: Any) -> None:
    """Raise a ValueError or TypeError if a function returned another shape or another precision than it should."""
    if tuple(shape) != tuple(expected_shape):
        raise ValueError(shape_message(f"what {name} returns", expected_shape, shape))
    if dtype != expected:
        raise TypeError(f"what {name} returns must hold {expected} as its arguments do, got {dtype}")


def not_finite_message(which: str, samples: Sequence[int]) -> str:
    """Return the text of an error about a vector-Jacobian product that is not finite."""
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    return (
        f"the vector-Jacobian product of function with respect to {which} is not finite for samples {shown}, though "
        "the state, the control and the adjoint of the next state are: a square root or a norm at zero does that, "
        "and so does a where(…) whose other branch is not finite"
    )
