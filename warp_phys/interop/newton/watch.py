"""What a Newton model and solver held when graphs were recorded: replayed, they would not notice what is replaced."""

from typing import Any

import newton
import numpy as np
import warp as wp

Featherstone, SemiImplicit = newton.solvers.SolverFeatherstone, newton.solvers.SolverSemiImplicit

COLLIDING = ("shape_type", "shape_flags", "shape_scale")
"""Arrays from which a collision pipeline derives what no graph derives again."""

NEVER_READ = ("joint_friction", "joint_effort_limit", "joint_velocity_limit", "joint_target_mode")
"""Arrays that neither solver reads."""

UNREAD: dict[type, dict[str, str | None]] = {
    Featherstone: {
        **dict.fromkeys((*NEVER_READ, "joint_enabled")),
        "body_inv_mass": "body_mass",
        "body_inv_inertia": "body_inertia",
        "particle_mass": "particle_inv_mass",
    },
    SemiImplicit: {
        **dict.fromkeys((*NEVER_READ, "joint_armature")),
        "body_mass": "body_inv_mass",
        "body_inertia": "body_inv_inertia",
        "body_inv_inertia": "body_inertia",
        "particle_mass": "particle_inv_mass",
    },
}
"""Arrays whose change alone a solver would not notice, or only by half, and the array that has to change with them."""

Numbers = (bool, int, float)


class Watch:
    """A snapshot of a model and its solver: which arrays, which numbers, and on a CPU what is in some of them."""

    def __init__(self, model: newton.Model, solver: Any, contacts: bool):
        self.model, self.solver, self.contacts = model, solver, contacts
        self.unread = UNREAD[Featherstone if isinstance(solver, Featherstone) else SemiImplicit]
        self.settings = [name for name, value in vars(solver).items() if isinstance(value, Numbers) and name[0] != "_"]
        self.take()

    def take(self) -> None:
        """Take the snapshot anew."""
        self.held = dict(vars(self.model))
        self.values, self.numbers = list(self.held.values()), self._numbers()
        self.derived = set(COLLIDING if self.contacts else ())
        if isinstance(self.solver, Featherstone):
            self.derived.add("body_flags")
            if self.solver.joint_armature_effective is not self.model.joint_armature:  # a copy, for kinematic bodies
                self.derived.add("joint_armature")
        self.views = self._views()
        self.contents = [view.tobytes() for view in self.views.values()]

    def changed(self) -> bool:
        """Whether graphs, and what a solver has derived, must be made anew.

        Raises:
            ValueError: An array was replaced by one that does not fit, or written in vain.
        """
        anew = self._numbers() != self.numbers
        if list(vars(self.model).values()) != self.values and self._replaced():
            anew, self.views = True, {name: view for name, view in self._views().items() if name in self.views}
        contents = [view.tobytes() for view in self.views.values()]
        if contents == self.contents:
            return anew
        changes = zip(self.views, contents, self.contents, strict=True)
        written = [name for name, now, then in changes if now != then]
        self._check_written(written)
        self.contents = contents
        return anew or not self.derived.isdisjoint(written)

    def _numbers(self) -> list[Any]:
        """Return the solver's settings, which a graph has as they were."""
        own = vars(self.solver)
        return [own[name] for name in self.settings]

    def _views(self) -> dict[str, np.ndarray]:
        """Return the arrays to look into; numpy shares a CPU's memory, for a GPU's one would have to wait."""
        names = self.derived.union(self.unread, filter(None, self.unread.values())) if self.model.device.is_cpu else ()
        arrays = {name: vars(self.model).get(name) for name in sorted(names)}
        return {name: array.numpy() for name, array in arrays.items() if isinstance(array, wp.array) and array.size}

    def _replaced(self) -> bool:
        """Whether an array or a number of the model is another one."""
        anew, now = False, vars(self.model)
        for name, value in now.items():
            then = self.held.get(name)
            if value is not then and any(isinstance(one, (wp.array, *Numbers)) for one in (value, then)):
                if isinstance(then, wp.array):
                    _check_like(name, value, then)
                anew |= not (isinstance(value, Numbers) and value == then)
        if not anew:  # what is neither may come and go
            self.held, self.values = dict(now), list(now.values())
        return anew

    def _check_written(self, written: list[str]) -> None:
        """Raise a ValueError if an array has been written that the solver does not read, or not by itself."""
        kind = type(self.solver).__name__
        for name in (name for name in written if name in self.unread):
            other = self.unread[name]
            if other is None:
                raise ValueError(
                    f"model.{name} has been changed, but {kind} does not read it: change it back, or call refresh() to "
                    "go on without"
                )
            if other not in written:
                raise ValueError(
                    f"model.{name} has been changed and model.{other} has not, with which {kind} computes: change both "
                    "between two steps, or call refresh() if this is meant"
                )


def _check_like(name: str, value: Any, then: wp.array) -> None:
    """Raise a ValueError if an array cannot stand in for another one."""
    if not isinstance(value, wp.array):
        raise ValueError(f"model.{name} was an array and has been replaced by {value!r}: make another NewtonSystem")
    found, wanted = ((a.shape, a.dtype, str(a.device)) for a in (value, then))
    if found != wanted:
        raise ValueError(
            f"model.{name} has been replaced by an array {found[0]} of {found[1].__name__} on {found[2]}; it must have "
            f"shape {wanted[0]}, {wanted[1].__name__}, on {wanted[2]} as before, or make another NewtonSystem"
        )
