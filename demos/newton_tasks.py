"""What `newton_control` trains on: models that come with Newton, where they start, and what their motion costs."""

from collections.abc import Callable
from dataclasses import dataclass

import newton
import newton.examples
import numpy as np
import torch

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


TASKS = {
    "cartpole": Task("Newton's cart keeps two poles upright", 50, build_cartpole, start_cartpole, cost_cartpole),
    "ant": Task("Newton's ant sets off", 30, build_ant, start_ant, cost_ant),
}
