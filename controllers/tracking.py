"""A system that is given a reference for one component of its state, and whose cost grows with the distance from it."""

import functools
from dataclasses import fields, make_dataclass
from typing import Any

import warp as wp

from warp_phys.systems.base import System, SystemFunctions


def tracking(system: System, component: str, weight: float = 1.0) -> System:
    """Return a system with the input r, a reference for the component x_k of its state.

        cost(x, r) = cost(x) + weight · (x_k − r)²

    All else is as before; `weight` is a physical parameter, `tracking_weight`.

    Args:
        system: A system without inputs.
        component: Name of a state component, without its unit. Of an angle it is the number itself that is compared.
        weight: Weight of the squared distance, not negative.

    Raises:
        TypeError, ValueError: The system has inputs of its own, or no such component; the weight is negative.

    >>> from warp_phys import CartPole
    >>> follower = tracking(CartPole(), "position")
    >>> follower.inputs, follower.tracking_weight
    (('reference of position [m]',), 1.0)
    """
    if not isinstance(system, System):
        raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}")
    if system.inputs:
        own = ", ".join(system.inputs)
        raise TypeError(
            f"system must have no inputs of its own to follow a reference, {type(system).__name__} has {own}"
        )
    short = [name.partition(" [")[0] for name in system.states]
    if component not in short:
        raise ValueError(f"track must be a component of the state, of {', '.join(short)}, got {component!r}")
    values = {entry.name: getattr(system, entry.name) for entry in fields(system)}
    return _kind(type(system))(**values, tracked=short.index(component), tracking_weight=weight)


def _made(kind: type[System], values: dict[str, Any]) -> System:
    """Return such a system from what a pickle holds of it."""
    made: System = _kind(kind)(**values)
    return made


@functools.cache
def _kind(kind: type[System]) -> type:
    """Return the class of such systems, whose parameters are those of `kind` and the weight."""

    def functions(self: Any, real: type) -> SystemFunctions:
        return _functions(self, kind.functions(self, real), real)

    members = {
        "inputs": property(lambda self: (f"reference of {self.states[self.tracked]}",)),
        "not_negative": (*kind.not_negative, "tracking_weight"),
        "functions": functions,
        "__reduce__": lambda self: (_made, (kind, {entry.name: getattr(self, entry.name) for entry in fields(self)})),
        "__doc__": f"{kind.__name__}, a component of whose state shall follow a reference.",
    }
    more = [("tracked", int, 0), ("tracking_weight", float, 1.0)]
    return make_dataclass(f"Tracking{kind.__name__}", more, bases=(kind,), namespace=members, frozen=True)


@functools.cache
def _functions(system: Any, own: SystemFunctions, real: type) -> SystemFunctions:
    """Return step and cost; `system` is a structure."""
    types, step, cost = system.types(real), own.step, own.cost
    State, Control, Input, Parameters = types.State, types.Control, types.Input, types.Parameters

    @wp.func
    def tracking_step(x: State, c: Control, w: Input, p: Parameters):
        return step(x, c, p)

    @wp.func
    def tracking_cost(x: State, w: Input, p: Parameters):
        error = x[wp.static(system.tracked)] - w[0]
        return cost(x, p) + p.tracking_weight * error * error

    return SystemFunctions(tracking_step, tracking_cost)
