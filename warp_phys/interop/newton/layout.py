"""Newton's states and controls as rows: which number stands in which column."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import newton
import numpy as np
import warp as wp

from warp_phys.core.arrays import alias
from warp_phys.errors import shown

Joint = newton.JointType
ROTATION, FLOATING = (Joint.BALL,), (Joint.FREE, Joint.DISTANCE)
TARGETS = {"joint_f": "joint_qd", "joint_target_qd": "joint_qd", "joint_target_q": "joint_q"}
"""Arrays of `newton.Control` that may be steered, and the array of the state that each is laid out like."""
AXES = ("x", "y", "z")


class Field(NamedTuple):
    """An array of Newton's state, and the columns that it takes in a row."""

    name: str
    offset: int
    """First column."""
    width: int
    """Columns, that is, numbers of one world."""


class Layout(NamedTuple):
    """What the columns of a row of states are."""

    fields: tuple[Field, ...]
    names: tuple[str, ...]
    """Name and unit of every column."""
    quaternions: tuple[int, ...]
    """First columns of unit quaternions (x, y, z, w)."""


class Steering(NamedTuple):
    """What the columns of a row of controls are."""

    target: str
    """The array of `newton.Control` that is written."""
    width: int
    """Numbers of one world in that array."""
    places: wp.array
    """Where in its world each column goes."""
    gain: wp.array
    """What each column is multiplied by."""
    names: tuple[str, ...]


def world_count(model: newton.Model) -> int:
    """Return the number of samples: the worlds, or one where all of the model is in no world.

    Raises:
        ValueError: Bodies, joints or particles are shared by the worlds, or the worlds differ.
    """
    parts = {"joints": "joint", "joint coordinates": "joint_coord", "bodies": "body", "particles": "particle"}
    starts = {}
    for what, name in parts.items():
        array = getattr(model, f"{name}_world_start")
        if array is not None and array.numpy()[-1] > 0:
            starts[what] = array.numpy()
    if not starts:
        raise ValueError("model must have joints, bodies or particles, it has none")
    if all(start[0] == start[-1] or start[-2] == start[0] for start in starts.values()):
        return 1  # nothing is in a world
    for what, start in starts.items():
        counts = np.diff(start[:-1])
        if start[0] != 0 or start[-1] != start[-2] or len(set(counts.tolist())) != 1:
            raise ValueError(
                f"model must have the same {what} in every world and none outside, as ModelBuilder.replicate makes "
                f"them; it has {counts.tolist()[:8]} in its worlds and {start[-1] - counts.sum()} outside"
            )
    worlds = model.world_count
    types = _numbers(model, "joint_type").reshape(worlds, -1) if model.joint_count else np.zeros((worlds, 0))
    if (types != types[0]).any():
        raise ValueError("model must have the same joints in every world, as ModelBuilder.replicate makes them")
    return worlds


def check_bodies(model: newton.Model) -> None:
    """Raise a ValueError where SolverFeatherstone would silently go wrong: it takes a joint's number for its body's."""
    children = _numbers(model, "joint_child")[: model.joint_count] if model.joint_count else np.zeros(0, dtype=int)
    articulations = _numbers(model, "joint_articulation")[: model.joint_count] if model.joint_count else children
    outside = np.flatnonzero(articulations < 0)
    if len(outside):
        names = ", ".join(dict.fromkeys(short(model.joint_label[joint]) for joint in outside))
        raise ValueError(f"SolverFeatherstone needs every joint in an articulation, in none are {names}")
    if len(children) != model.body_count:
        raise ValueError(
            f"SolverFeatherstone needs one joint per body, got {len(children)} joints and {model.body_count} bodies"
        )
    wrong = np.flatnonzero(children != np.arange(len(children)))
    if len(wrong):
        joint = int(wrong[0])
        raise ValueError(
            "SolverFeatherstone needs bodies and joints in the same order: "
            f"joint {joint}, {short(model.joint_label[joint])}, moves body {children[joint]}"
        )


def check_particles(model: newton.Model, worlds: int) -> None:
    """Raise a ValueError where SolverSemiImplicit would let particles of different worlds push each other.

    SolverFeatherstone never builds the grid, so that it finds no contacts.
    """
    if worlds > 1 and model.particle_count > 1 and model.particle_grid is not None:
        raise ValueError(
            "SolverSemiImplicit lets particles of all worlds push each other: set model.particle_grid = None, which "
            "ends contact between particles, or build one world"
        )


def _numbers(model: newton.Model, name: str) -> np.ndarray:
    """Return an array of the model as numpy."""
    return getattr(model, name).numpy()


def flat(array: wp.array) -> wp.array:
    """Return an array of numbers, vectors or transforms as numbers: same memory, no adjoint."""
    numbers = array.size * wp.types.type_size(array.dtype)
    return alias(array, wp.float32, (numbers,))


def short(label: str) -> str:
    """Return the last part of one of Newton's labels.

    >>> short("cartpole/slider_to_cart")
    'slider_to_cart'
    """
    return label.rsplit("/", 1)[-1]


def _joint_columns(model: newton.Model, joint: int) -> tuple[list[str], list[str], int | None]:
    """Return names of a joint's coordinates and of its velocities, and which coordinate a quaternion starts at."""
    kind, name = int(_numbers(model, "joint_type")[joint]), short(model.joint_label[joint])
    linear, angular = (int(n) for n in _numbers(model, "joint_dof_dim")[joint])
    quaternion = [f"{name} q{axis} [-]" for axis in (*AXES, "w")]
    spins = [f"{name} spin {axis} [rad/s]" for axis in AXES]
    if kind in FLOATING:
        places = [f"{name} {axis} [m]" for axis in AXES]
        return places + quaternion, [f"{name} speed {axis} [m/s]" for axis in AXES] + spins, 3
    if kind in ROTATION:
        return quaternion, spins, 0
    numbers = [""] if linear + angular == 1 else [f" {i}" for i in range(linear + angular)]
    units = ["m"] * linear + ["rad"] * angular
    return (
        [f"{name}{i} [{unit}]" for i, unit in zip(numbers, units, strict=True)],
        [f"{name}{i} rate [{unit}/s]" for i, unit in zip(numbers, units, strict=True)],
        None,
    )


def read_layout(model: newton.Model, worlds: int, reduced: bool) -> Layout:
    """Return the columns of a state: joint coordinates if `reduced`, else poses of bodies; then particles."""
    names: dict[str, list[str]] = {}
    turns: dict[str, list[int]] = {}
    if reduced and model.joint_count:
        names, turns = {"joint_q": [], "joint_qd": []}, {"joint_q": []}
        for joint in range(model.joint_count // worlds):
            places, rates, quaternion = _joint_columns(model, joint)
            if quaternion is not None:
                turns["joint_q"].append(len(names["joint_q"]) + quaternion)
            names["joint_q"] += places
            names["joint_qd"] += rates
    elif not reduced and model.body_count:
        names, turns = {"body_q": [], "body_qd": []}, {"body_q": []}
        for label in model.body_label[: model.body_count // worlds]:
            name = short(label)
            turns["body_q"].append(len(names["body_q"]) + 3)
            names["body_q"] += [f"{name} {axis} [m]" for axis in AXES]
            names["body_q"] += [f"{name} q{axis} [-]" for axis in (*AXES, "w")]
            names["body_qd"] += [f"{name} speed {axis} [m/s]" for axis in AXES]
            names["body_qd"] += [f"{name} spin {axis} [rad/s]" for axis in AXES]
    if model.particle_count:
        count = range(model.particle_count // worlds)
        names["particle_q"] = [f"particle {i} {axis} [m]" for i in count for axis in AXES]
        names["particle_qd"] = [f"particle {i} speed {axis} [m/s]" for i in count for axis in AXES]
    if not names:
        raise ValueError("model must have joints for SolverFeatherstone, bodies or particles for SolverSemiImplicit")
    fields, offset = [], 0
    for name, columns in names.items():
        fields.append(Field(name, offset, len(columns)))
        offset += len(columns)
    quaternions = tuple(field.offset + start for field in fields for start in turns.get(field.name, ()))
    return Layout(tuple(fields), tuple(column for columns in names.values() for column in columns), quaternions)


def read_steering(
    model: newton.Model, worlds: int, target: str, joints: Sequence[str] | None, gain: float | Sequence[float]
) -> Steering:
    """Return the columns of a control: which degrees of freedom of one world are steered.

    Raises:
        TypeError, ValueError: A joint that is not there or cannot be steered so, no joint, gains that do not fit.
    """
    chosen = _chosen_joints(model, worlds, target, joints)
    starts = _numbers(model, f"{TARGETS[target]}_start")
    places, names = [], []
    for joint in chosen:
        coordinates, rates, _ = _joint_columns(model, joint)
        columns = {"joint_f": [_force(rate) for rate in rates], "joint_target_q": coordinates, "joint_target_qd": rates}
        names += columns[target] if target == "joint_f" else [f"target of {name}" for name in columns[target]]
        places += range(int(starts[joint]), int(starts[joint]) + len(columns[target]))
    try:
        gains = np.asarray(gain, dtype=np.float32).ravel()
    except (TypeError, ValueError):
        raise TypeError(f"gain must be a number or {len(places)} numbers, got {gain!r}") from None
    if len(gains) not in (1, len(places)) or not np.isfinite(gains).all() or (gains == 0.0).any():
        raise ValueError(f"gain must be a number or {len(places)} numbers, finite and not 0, got {gain!r}")
    gains = np.broadcast_to(gains, len(places))
    width = model.joint_coord_count if TARGETS[target] == "joint_q" else model.joint_dof_count
    return Steering(
        target,
        width // worlds,
        wp.array(places, dtype=wp.int32, device=model.device),
        wp.array(gains, dtype=wp.float32, device=model.device),
        tuple(names),
    )


def _force(rate: str) -> str:
    """Return the name of the force along a velocity.

    >>> _force("slider rate [m/s]"), _force("hip rate [rad/s]")
    ('slider force [N]', 'hip torque [N·m]')
    """
    name, _, unit = rate.removesuffix("]").rpartition(" [")
    name = name.replace(" rate", "").replace(" speed", "").replace(" spin", "")
    return f"{name} torque [N·m]" if unit == "rad/s" else f"{name} force [N]"


def _chosen_joints(model: newton.Model, worlds: int, target: str, joints: Sequence[str] | None) -> list[int]:
    """Return the joints of the first world that are steered."""
    kinds = _numbers(model, "joint_type")[: model.joint_count // worlds] if model.joint_count else ()
    labels = model.joint_label[: len(kinds)]
    movable = [short(label) for label, kind in zip(labels, kinds, strict=True) if kind != Joint.FIXED]
    able = [j for j, kind in enumerate(kinds) if kind != Joint.FIXED and kind not in FLOATING]
    if isinstance(joints, str) or not (joints is None or isinstance(joints, Iterable)):
        raise TypeError(f"joints must be a sequence of names of joints, or None, got {shown(joints)}")
    if joints is None:
        chosen = able
    else:
        chosen = []
        for name in joints:
            found = [j for j, label in enumerate(labels) if name in (label, short(label))]
            if len(found) != 1 or found[0] in chosen or kinds[found[0]] == Joint.FIXED:
                known = ", ".join(movable)
                raise ValueError(f"joints must name movable joints of one world ({known}), each once, got {name!r}")
            chosen += found
    if not chosen:
        known = f"there are {', '.join(movable)}" if movable else "the model has none"
        known = known if joints is not None else "the model has none besides fixed and free ones"
        raise ValueError(f"joints must name at least one joint; {known}")
    if target != "joint_f":
        _check_drives(model, chosen, target)
    return chosen


def _check_drives(model: newton.Model, chosen: Sequence[int], target: str) -> None:
    """Raise a ValueError where a target would move nothing."""
    constant = "joint_target_ke" if target == "joint_target_q" else "joint_target_kd"
    values, starts = _numbers(model, constant), _numbers(model, "joint_qd_start")
    for joint in chosen:
        name, kind = short(model.joint_label[joint]), _numbers(model, "joint_type")[joint]
        if kind in (*FLOATING, *ROTATION):
            raise ValueError(f"control {target!r} drives no free or ball joints, {name} is one; use 'joint_f'")
        if (values[starts[joint] : starts[joint + 1]] == 0.0).any():
            raise ValueError(f"control {target!r} needs {constant} of joint {name} to be positive, it is 0")
