"""Steps of one simulator, vector-Jacobian products of another."""

from typing import Any

import warp as wp

from warp_phys.core.checks import check_instance
from warp_phys.core.gate import active_tape
from warp_phys.systems.base import Simulator

SHARED = ("sample", "loss", "picture", "sketch", "draw", "worlds", "dtype", "device", "time_average")
"""What a surrogate has of its simulators: of the one that steps, or else of the other."""


class Surrogate:
    """A simulator that steps as `forward` does, and whose vector-Jacobian product is that of `backward`.

        x_{n+1} = S(x_n, c_n)                         by `forward`, which needs no derivatives
        (∂S/∂x)ᵀ λ ≈ (∂S̃/∂x)ᵀ λ at x_n, c_n           by `backward`, at the states of `forward`; likewise for c

    So a controller is trained through an accurate simulator that has no gradients, by those of a simple or learned one
    that has. The trajectory, the loss and its derivatives by states and controls are those of `forward`: what is not
    exact is how adjoints travel through a step. Both must mean the same by the components of states and controls.

    Rollouts in torch and in pure Warp take it. `audit` does not judge it, but reports the cosine between its
    derivatives and finite differences of `forward`. Weights of `backward` are not trained: it is fitted to `forward`
    before, by `identify` for instance.

    Args:
        forward: Anything with `state_size`, `control_size` and `step`; it computes from its arguments alone.
        backward: Anything with these sizes and `step_vjp`.

    Raises:
        TypeError, ValueError: Arguments that do not fit.

    >>> from warp_phys import CartPole, audit
    >>> rough = Surrogate(CartPole(integrator="rk4"), backward=CartPole(pole_mass=0.2))
    >>> report = audit(rough, horizons=(1,))
    >>> report.exact, 0.9 < report.cosine(1) < 1.0
    (False, True)
    """

    exact = False
    """Whether `step_vjp` is meant to be the derivative of `step`."""

    def __init__(self, forward: Any, backward: Any):
        for name, simulator, verb in (("forward", forward, "step"), ("backward", backward, "step_vjp")):
            check_instance(name, simulator)
            missing = [part for part in ("state_size", "control_size", verb) if not hasattr(simulator, part)]
            if missing:
                raise TypeError(f"{name} must have {', '.join(missing)}, {type(simulator).__name__} has not")
            if getattr(simulator, "inputs", ()):
                raise TypeError(f"{name} must have no inputs of its own, {type(simulator).__name__} has some")
        for what in ("state_size", "control_size"):
            own, other = getattr(forward, what), getattr(backward, what)
            if own != other:
                raise ValueError(
                    f"forward and backward must have one {what}, {type(forward).__name__} has {own}, "
                    f"{type(backward).__name__} has {other}"
                )
        self.forward: Simulator = forward
        self.backward: Simulator = backward

    def __repr__(self) -> str:
        return f"Surrogate({_shown(self.forward)}, backward={_shown(self.backward)})"

    def __getattr__(self, name: str) -> Any:
        """Return what the simulators have besides their verbs."""
        if name in SHARED:
            for simulator in (self.forward, self.backward):
                if hasattr(simulator, name):
                    return getattr(simulator, name)
        raise AttributeError(f"Surrogate has no {name}")

    @property
    def state_size(self) -> int:
        """Number D of state components."""
        return self.forward.state_size

    @property
    def control_size(self) -> int:
        """Number K of control components."""
        return self.forward.control_size

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components, where a simulator has such."""
        return _names("states", self.forward, self.backward)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components, where a simulator has such."""
        return _names("controls", self.forward, self.backward)

    def step(self, x: wp.array, c: wp.array, y: wp.array) -> None:
        """Write y, the next states by `forward`; x and y (batch, D), c (batch, K).

        Raises:
            RuntimeError: A tape records, on which the derivatives would be those of `forward`.
        """
        if active_tape() is not None and any(array.requires_grad for array in (x, c, y)):
            raise RuntimeError(
                "a wp.Tape cannot record the step of a Surrogate: use warp_phys.Rollout, which records whole rollouts, "
                "or call step_vjp"
            )
        self.forward.step(x, c, y)

    def step_vjp(self, x: wp.array, c: wp.array, adj_y: wp.array, adj_x: wp.array, adj_c: wp.array) -> None:
        """Write adj_x = (∂S̃/∂x)ᵀ adj_y and adj_c = (∂S̃/∂c)ᵀ adj_y, by `backward`."""
        self.backward.step_vjp(x, c, adj_y, adj_x, adj_c)


def _names(what: str, *simulators: Any) -> tuple[str, ...]:
    return next((names for s in simulators if (names := tuple(getattr(s, what, ())))), ())


def _shown(simulator: Any) -> str:
    """Return a simulator in words: its name, if it says nothing of itself."""
    kind = type(simulator)
    return kind.__name__ if kind.__repr__ is object.__repr__ else repr(simulator)
