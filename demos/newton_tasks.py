"""What `newton_control` trains on: models that come with Newton, where they start, and what their motion costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import newton
import newton.examples
import numpy as np
import torch
import warp as wp

from warp_phys.interop.newton import NewtonSystem


@dataclass(frozen=True)
class Task:
    """A model and what it shall do."""

    title: str
    steps: int
    """Control steps of a rollout."""
    build: Callable[[int], NewtonSystem]
    """The system, given the number of worlds."""
    start: Callable[[NewtonSystem, np.random.Generator], np.ndarray]
    """Random initial states, shape (worlds, D)."""
    cost: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """The loss of a rollout, from its states and controls."""
    observe: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
    """What a controller sees of states, shape (B, numbers)."""
    bounded: bool = False
    """Whether controls lie within −1 and 1."""


def build_cartpole(worlds: int) -> NewtonSystem:
    """Return Newton's cart with two poles in a chain, pushed along its rail."""
    world = newton.ModelBuilder()
    world.add_urdf(newton.examples.get_asset("cartpole.urdf"), floating=False, enable_self_collisions=False)
    return NewtonSystem.from_builder(world, worlds, dt=0.02, joints=("slider_to_cart",), gain=10.0)


def start_cartpole(system: NewtonSystem, generator: np.random.Generator) -> np.ndarray:
    """Return carts at rest near the middle, both poles up to 0.3 rad out of line."""
    states = system.initial_states()
    states[:, 0] = generator.uniform(-0.5, 0.5, system.worlds)
    states[:, 1:3] = generator.uniform(-0.3, 0.3, (system.worlds, 2))
    return states


def cost_cartpole(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """Return missing height of both poles, distance from the middle and speeds, squared."""
    position, first, second = states[1:, :, 0], states[1:, :, 1], states[1:, :, 1] + states[1:, :, 2]
    speeds = states[1:, :, 3:].square().sum(dim=-1)
    return (2.0 - first.cos() - second.cos() + 0.1 * position.square() + 0.01 * speeds).mean()


HOPPER = """
<mujoco model="hopper">
  <default>
    <joint type="hinge" axis="0 -1 0" armature="0.05" damping="4" stiffness="150" limited="true"/>
    <geom type="capsule" density="1000"/>
  </default>
  <worldbody>
    <body name="torso" pos="0 0 1.09">
      <joint name="x" type="slide" axis="1 0 0" armature="0" damping="0" stiffness="0" limited="false"/>
      <joint name="z" type="slide" axis="0 0 1" armature="0" damping="0" stiffness="0" limited="false"/>
      <joint name="pitch" armature="0" damping="0" stiffness="0" limited="false"/>
      <geom fromto="0 0 -0.2 0 0 0.2" size="0.05"/>
      <body name="thigh" pos="0 0 -0.2">
        <joint name="hip" range="-60 100" springref="30"/>
        <geom fromto="0 0 0 0 0 -0.4" size="0.045"/>
        <body name="shin" pos="0 0 -0.4">
          <joint name="knee" range="-130 5" springref="-60"/>
          <geom fromto="0 0 0 0 0 -0.44" size="0.035"/>
          <body name="foot" pos="0 0 -0.44">
            <joint name="ankle" range="-60 60" springref="30"/>
            <geom fromto="-0.12 0 0 0.2 0 0" size="0.05"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
"""A torso on one leg with a foot, in a plane: springs in its joints hold it up, bent a little."""


def build_hopper(worlds: int) -> NewtonSystem:
    """Return the hopper on the ground, with torques at hip, knee and ankle besides its springs."""
    world = newton.ModelBuilder()
    shape = world.default_shape_cfg
    shape.ke, shape.kd, shape.kf, shape.mu = 5e3, 50.0, 50.0, 1.0  # soft enough for substeps of 2.5 ms
    world.add_mjcf(HOPPER, enable_self_collisions=False)
    world.joint_q[1], world.joint_q[3:] = -0.11, [0.52, -1.05, 0.52]  # standing on its foot
    for i in range(3, 6):
        world.joint_limit_ke[i], world.joint_limit_kd[i] = 100.0, 2.0
    options: dict[str, Any] = {"joints": ("hip", "knee", "ankle"), "gain": 60.0, "contacts": True}
    return NewtonSystem.from_builder(world, worlds, ground=True, dt=0.02, substeps=8, **options)


def start_hopper(system: NewtonSystem, generator: np.random.Generator) -> np.ndarray:
    """Return hoppers that stand, their joints up to 0.05 rad out of place."""
    states = system.initial_states()
    states[:, 2:6] += generator.uniform(-0.05, 0.05, (system.worlds, 4))
    return states


def observe_hopper(states: torch.Tensor) -> torch.Tensor:
    """Return all but the place along x, with rates by tens."""
    return torch.cat([states[:, 1:6], 0.1 * states[:, 6:]], dim=1)


def cost_hopper(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """Return what speed is missing to 1 m/s along x, what height of the torso, and its pitch, squared."""
    drop, pitch, speed = states[1:, :, 1] + 0.11, states[1:, :, 2], states[1:, :, 6]
    return ((speed - 1.0).square() + 10.0 * drop.square() + pitch.square()).mean() + 0.01 * controls.square().mean()


def build_ant(worlds: int) -> NewtonSystem:
    """Return Newton's ant on the ground, with torques at its eight joints."""
    world = newton.ModelBuilder()
    shape = world.default_shape_cfg
    shape.ke, shape.kd, shape.kf, shape.mu = 1e3, 2.0, 10.0, 1.0  # soft enough for substeps of 4 ms
    file = newton.examples.get_asset("nv_ant.xml")
    world.add_mjcf(file, ignore_names=["floor"], enable_self_collisions=False)
    world.joint_q[2] = 0.36  # standing on its feet
    world.joint_q[7:] = [0.0, 0.55, 0.0, -0.55, 0.0, -0.55, 0.0, 0.55]
    for i in range(6, 14):
        world.joint_limit_ke[i], world.joint_limit_kd[i] = 50.0, 0.5
    return NewtonSystem.from_builder(world, worlds, ground=True, dt=1.0 / 60.0, substeps=4, gain=0.5, contacts=True)


def start_ant(system: NewtonSystem, generator: np.random.Generator) -> np.ndarray:
    """Return ants that stand, their joints up to 0.1 rad out of place."""
    states = system.initial_states()
    states[:, 7:15] += generator.uniform(-0.1, 0.1, (system.worlds, 8))
    return states


def cost_ant(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """Return what speed is missing to 1 m/s along x, and what height of the torso, squared, and the torques'."""
    height, speed = states[1:, :, 2], states[1:, :, 15]
    return ((speed - 1.0).square() + 10.0 * (height - 0.36).square()).mean() + 0.01 * controls.square().mean()


def observe_ant(states: torch.Tensor) -> torch.Tensor:
    """Return all but the place on the ground, with rates by tens."""
    return torch.cat([states[:, 2:15], 0.1 * states[:, 15:]], dim=1)


def segments(system: NewtonSystem, states: np.ndarray) -> np.ndarray:
    """Return the capsules and spheres of the first world, seen from the side, shape (shapes, 5).

    A row is x and z of one end, of the other, and the radius [m]; states has shape (worlds, D).
    """
    model: Any = system.model
    state: Any = model.state(requires_grad=False)
    size = model.joint_coord_count // system.worlds
    state.joint_q.assign(np.ascontiguousarray(states[:, :size], dtype=np.float32).ravel())
    newton.eval_fk(model, state.joint_q, state.joint_qd, state)
    poses, own = state.body_q.numpy(), model.body_count // system.worlds
    kinds, bodies = model.shape_type.numpy(), model.shape_body.numpy()
    places, scales = model.shape_transform.numpy(), model.shape_scale.numpy()
    rows = []
    for i in np.flatnonzero((bodies >= 0) & (bodies < own)):
        if kinds[i] not in (int(newton.GeoType.CAPSULE), int(newton.GeoType.SPHERE)):
            continue
        pose = wp.transform(*poses[bodies[i]]) * wp.transform(*places[i])
        half = scales[i, 1] if kinds[i] == int(newton.GeoType.CAPSULE) else 0.0
        ends = [np.array(wp.transform_point(pose, wp.vec3(0.0, 0.0, sign * half))) for sign in (-1.0, 1.0)]
        rows.append([ends[0][0], ends[0][2], ends[1][0], ends[1][2], scales[i, 0]])
    return np.array(rows).reshape(-1, 5)


TASKS = {
    "cartpole": Task("Newton's cart keeps two poles upright", 50, build_cartpole, start_cartpole, cost_cartpole),
    "ant": Task("Newton's ant", 240, build_ant, start_ant, cost_ant, observe_ant, bounded=True),
    "hopper": Task("A hopper in Newton", 240, build_hopper, start_hopper, cost_hopper, observe_hopper, bounded=True),
}
