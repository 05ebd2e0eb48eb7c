"""Two dogs herd four sheep to a target: drag the target anywhere, or take over a dog."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from controllers import MLP
from controllers.settings import check_setting
from demos.colours import colour, tinted
from demos.frame import Button, Control, Demo, Grip, Plot, Ray
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from warp_phys.systems import Repulsion
from warp_phys.systems.drawing import Ball, Line, Picture, moved

FLOW = "R"
"""With which the dogs were trained."""
SYSTEM = Repulsion(drivers=2, evaders=4, dt=4.0 / 60.0)
REACH, SEEN = 5.0, 6.5
"""Metres to either side of the middle to which the target can be dragged, and that are seen."""
TRACE = 20.0
"""Seconds of the trace."""
RADIUS, AHEAD = 2.0, 0.9
"""Where a dog runs if the network says 0: so far from the flock's middle [m], to a place so far ahead [rad]."""
STRETCH, HASTE = 0.7, 0.6
"""How much the network may change that: the radius by factors of exp(±0.7), the angle by so much [rad]."""
NEAR, APART = 0.3, 0.1
"""How near the target the flock's direction from it counts less, and how near each other that of the dogs [m]."""
LEAST = 0.01
"""Added to |ρ|² in the denominator of a dog's controls [m²]."""
LOST = 40.0
"""Distance from the target at which a dog counts as lost [m]."""
DRAG = 4.0
"""How far the target is dragged at most where that is measured; the dogs were trained around it so far [m]."""
JUMP = 3.0
"""By how much the target moves at the press of a button [m]."""
PULL, BRAKE, STRONGEST = 20.0, 4.0, 60.0
"""A dog on its way to a place: acceleration per distance [1/s²], per speed [1/s], and at most [m/s²]."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    seed: int = 0
    """Seed of the initial states."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_setting("seed", self.seed, int, at_least=0)


class Policy(torch.nn.Module):
    """Controls of the dogs: they run round the flock on opposite sides; a dense network says how near and how fast.

    Dogs that only come from behind stretch a flock, until a sheep strays. While they circle, their pushes cancel on
    average but for one that holds the flock together, as in a Paul trap; the flock is driven by coming nearer on one
    side than on the other. When to do so is for the network to learn.

    The network sees and says everything from the middle of the flock, in directions along and across its way from the
    target: so it says the same wherever the flock is.
    """

    def __init__(self) -> None:
        super().__init__()
        agents = SYSTEM.drivers + SYSTEM.evaders
        sizes = SimpleNamespace(state_size=4 * agents + 1, control_size=SYSTEM.control_size)
        self.network = MLP(sizes, hidden=(64, 64), seed=0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Controls (B, K) at states (B, D)."""
        parts: Any = [states[:, i : i + 1] for i in range(SYSTEM.state_size)]
        x, y, vx, vy = (parts[i::4] for i in range(4))
        sheep = range(SYSTEM.drivers, SYSTEM.drivers + SYSTEM.evaders)
        sum_x, sum_y = (sum(axis[i] for i in sheep) for axis in (x, y))
        middle_x, middle_y = sum_x / SYSTEM.evaders, sum_y / SYSTEM.evaders
        far = torch.sqrt(middle_x * middle_x + middle_y * middle_y + NEAR * NEAR)
        along_x, along_y = middle_x / far, middle_y / far
        seen = [0.25 * far]
        for i in range(SYSTEM.drivers + SYSTEM.evaders):
            dx, dy = x[i] - middle_x, y[i] - middle_y
            seen += [0.5 * (dx * along_x + dy * along_y), 0.5 * (dy * along_x - dx * along_y)]
            seen += [0.25 * (vx[i] * along_x + vy[i] * along_y), 0.25 * (vy[i] * along_x - vx[i] * along_y)]
        said = torch.tanh(self.network(torch.cat(seen, dim=1)))
        between_x, between_y = x[0] - x[1], y[0] - y[1]
        apart = torch.sqrt(between_x * between_x + between_y * between_y + APART * APART)
        controls = []
        for dog, side in enumerate((1.0, -1.0)):
            radius = side * RADIUS * torch.exp(STRETCH * said[:, 2 * dog : 2 * dog + 1])
            angle = AHEAD + HASTE * said[:, 2 * dog + 1 : 2 * dog + 2]
            cos, sin = torch.cos(angle), torch.sin(angle)
            to_x = middle_x + radius * (cos * between_x - sin * between_y) / apart - x[dog]
            to_y = middle_y + radius * (cos * between_y + sin * between_x) / apart - y[dog]
            ax = STRONGEST * torch.tanh((PULL * to_x - BRAKE * vx[dog]) / STRONGEST)
            ay = STRONGEST * torch.tanh((PULL * to_y - BRAKE * vy[dog]) / STRONGEST)
            # c_radial ρ + c_turn ρ^⊥ is this acceleration, but where ρ is nearly 0
            rho_x, rho_y = x[dog] - sum_x, y[dog] - sum_y
            square = rho_x * rho_x + rho_y * rho_y + LEAST
            controls += [(ax * rho_x + ay * rho_y) / square, (ay * rho_x - ax * rho_y) / square]
        return torch.cat(controls, dim=1)


def lead(state: np.ndarray, control: np.ndarray, dog: int, mouse: np.ndarray) -> np.ndarray:
    """A control that drives one dog to the mouse and leaves the others what they had.

    A dog's acceleration by its control is c_radial ρ + c_turn ρ^⊥ with ρ as in `Repulsion`, so any acceleration has its
    control, but where ρ is 0.
    """
    agents = state.reshape(-1, 4)
    rho = agents[dog, :2] - agents[SYSTEM.drivers :, :2].sum(axis=0)
    wanted = PULL * (mouse - agents[dog, :2]) - BRAKE * agents[dog, 2:]
    wanted *= min(1.0, STRONGEST / max(float(np.hypot(*wanted)), 1e-9))
    control = control.copy()
    turned = np.array([-rho[1], rho[0]])
    control[2 * dog : 2 * dog + 2] = np.array([wanted @ rho, wanted @ turned]) / (float(rho @ rho) + LEAST)
    return control


class HerdDemo(Demo):
    """The ground, and the sheep's distances from the target.

    The model's dogs measure from the target, and their controllers were trained so: the simulation has the target at
    its origin. A target that is dragged shifts everybody's coordinates the other way; on the page it is the target that
    moves.
    """

    says = "Two trained dogs (cones) frighten four sheep (grey) to the red target: drag the target anywhere."
    clip = 12.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.draws = np.random.SeedSequence(settings.seed)
        self.led: int | None = None
        """The dog that is led by hand."""
        self.hand = np.zeros(2)
        """Where it is led to in the world [m]."""
        self.target = np.zeros(2)
        """Where the target is in the world [m]."""
        controller = load_weights("herd", FLOW, Policy())
        self.simulation = Simulation(SYSTEM, controller, np.zeros(SYSTEM.state_size))
        self.begin()

    def controls(self) -> Sequence[Control]:
        """What can be chosen."""
        return [
            Button("move the target", self.jump),
            Button("new start", self.begin),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """Distances of the sheep."""
        names = [*(f"sheep {i + 1}" for i in range(SYSTEM.evaders)), "mean"]
        inks = [*["#AAAAAA"] * SYSTEM.evaders, colour(FLOW)]
        return [Plot("distance to the target [m]", names, inks, self.distances, y_range=(0.0, 8.0))]

    def grips(self) -> Mapping[str, Grip]:
        """Target and dogs can be dragged."""
        grips = {"goal": Grip(drag=self.drag, release=self.release)}
        for dog in range(SYSTEM.drivers):
            lead_it = Grip(drag=lambda ray, dog=dog: self.lead(dog, ray), release=self.release)  # type: ignore[misc]
            grips[f"driver {dog + 1}"] = lead_it
        return grips

    def words(self) -> str:
        """Who steers, and how well."""
        far = f"; the sheep are {self.trace[-1].mean():.1f} m away" if self.trace else ""
        return f"dogs trained with {FLOW}{far}"

    def begin(self) -> None:
        """Start anew, at the place where the target is."""
        seed = int(self.draws.spawn(1)[0].generate_state(1)[0])
        self.simulation.state = SYSTEM.sample(1, seed=seed)[0]
        self.simulation.previous = self.simulation.state.copy()
        self.trace: deque[np.ndarray] = deque(maxlen=round(TRACE / SYSTEM.dt) + 1)

    def move_target(self, place: np.ndarray) -> None:
        """Put the target somewhere in the world; nobody else moves there."""
        shift = np.zeros((SYSTEM.drivers + SYSTEM.evaders, 4), np.float32)
        shift[:, :2] = place - self.target
        self.simulation.state -= shift.reshape(-1)
        self.simulation.previous -= shift.reshape(-1)
        self.target = np.asarray(place, float)

    def jump(self) -> None:
        """Move the target by 3 m, to another place near the middle."""
        seed = int(self.draws.spawn(1)[0].generate_state(1)[0])
        angle = np.random.default_rng(seed).uniform(-1.0, 1.0) + np.arctan2(*-self.target[::-1])
        self.move_target(self.target + JUMP * np.array([np.cos(angle), np.sin(angle)]))

    def positions(self) -> np.ndarray:
        """Positions of dogs and sheep in the world, shape (agents, 2)."""
        return self.simulation.state.reshape(-1, 4)[:, :2] + self.target

    def drag(self, ray: Ray) -> None:
        """Move the target to where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 0.0, 1.0))
        if place is not None:
            self.move_target(np.clip(place[:2], -REACH, REACH))

    def lead(self, dog: int, ray: Ray) -> None:
        """Lead a dog to where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 0.0, 1.0))
        if place is not None:
            self.led, self.hand = dog, np.clip(place[:2], -2.0 * REACH, 2.0 * REACH)

    def release(self) -> None:
        """Let go."""
        self.led = None

    def act(self) -> np.ndarray | None:
        """The control of this step; None: the controller's."""
        sheep = self.simulation.state.reshape(-1, 4)[SYSTEM.drivers :, :2]
        self.trace.append(np.hypot(*sheep.T))
        if self.led is None:
            return None
        return lead(self.simulation.state, self.simulation.decide(), self.led, self.hand - self.target)

    def advance(self, dt: float) -> None:
        """Step the physics; where a dog has left for good, all start anew."""
        self.simulation.advance(dt, self.act)
        if self.led is None and np.abs(self.simulation.state).max() > LOST:
            self.begin()

    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """The sheep's distances from the target over time, and their mean."""
        values = np.array(self.trace).reshape(-1, SYSTEM.evaders)
        times = SYSTEM.dt * np.arange(1 - len(values), 1)
        return times, np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1).T

    def picture(self) -> Picture:
        """Dogs and sheep in the world, a ball at the target to be dragged."""
        state = self.simulation.between()
        shown = SYSTEM.picture(state, self.simulation.control)
        dogs = [f"driver {dog + 1}" for dog in range(SYSTEM.drivers)]
        parts = tinted(shown.parts, colour(FLOW), [*dogs, *(name.replace("driver", "push") for name in dogs)])
        parts = moved(parts, (*self.target, 0.0)) | {"goal": Ball((*self.target, 0.25), 0.3, "#CC3311")}
        dog = self.positions()[self.led or 0]
        leash = np.array([[*dog, 0.2], [*self.hand, 0.2]])
        parts["leash"] = Line(leash if self.led is not None else leash[:0], "#666666", 2.0)
        return replace(shown, parts=parts, low=(-SEEN, -SEEN, 0.0), high=(SEEN, SEEN, 0.5))

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: the target moves on, twice."""
        places = [(4.0, (3.0, 2.0)), (8.0, (-0.5, 1.0))]
        return [(time, lambda place=place: self.move_target(np.array(place))) for time, place in places]  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("herd", __doc__, HerdDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
