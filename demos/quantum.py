"""A quantum particle steered by tilting its well: choose the state to reach, disturb it."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from controllers import GridCNN
from controllers.settings import check_setting
from demos.colours import colour
from demos.frame import ANYWHERE, Button, Choice, Control, Demo, Grip, Plot, Ray, Slider
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from warp_phys.systems import Quantum
from warp_phys.systems.drawing import ASLANT, Line, Picture

TARGETS = (3, 4, 5)
CHANNELS = 32
TRACE = 192
"""Time steps of the traces."""
PAST, EVERY, APART = 24, 4, 0.12
"""Earlier densities that are drawn behind the present one, time steps from one to the next, and their distance."""
BUMP, WIDTH = 0.6, 0.15
"""A disturbance adds a bump to the wave: this amplitude relative to the wave's largest, this width."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    target: int = 3
    """Eigenstate to reach at first: 3, 4 or 5."""
    speed: float = 16.0
    """Time steps per second."""
    seed: int = 0
    """Seed of the initial states."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(map(str, TARGETS))}, got {self.target}")
        check_setting("speed", self.speed, float, above=0, below=61)
        check_setting("seed", self.seed, int, at_least=0)


def make_system(target: int) -> Quantum:
    """The well of the demo."""
    return Quantum(points=32, dt=1.0 / 16.0, target=target)


def make_controller() -> GridCNN:
    """The network of the demo, as it was trained."""
    return GridCNN(make_system(TARGETS[0]), channels=CHANNELS, seed=0)


class QuantumDemo(Demo):
    """The density coloured by its phase, earlier ones behind it; how near the target is, and the control."""

    says = "A force (the tilted floor) shakes a particle into the grey curve's quantum state: click the wave to hit it."
    clip = 12.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.target, self.speed, self.draws = settings.target, settings.speed, np.random.SeedSequence(settings.seed)
        self.steering = True
        system = make_system(self.target)
        self.simulation = Simulation(system, self.load(), system.sample(1)[0])
        self.trace: deque[tuple[float, float]] = deque(maxlen=TRACE + 1)
        self.past: deque[np.ndarray] = deque(maxlen=PAST * EVERY)
        self.begin()

    def load(self) -> Any:
        """The controller of the chosen target."""
        return load_weights("quantum", str(self.target), make_controller())

    def controls(self) -> Sequence[Control]:
        """What can be chosen."""
        return [
            Button("hit the particle", lambda: self.disturb(0.6)),
            Choice("target: eigenstate", [str(number) for number in TARGETS], lambda: str(self.target), self.choose),
            Slider("steps per second", 2.0, 60.0, 1.0, lambda: self.speed, self.set_speed),
            Button("new start", self.begin),
            Button("control on / off", self.switch),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """How near the target is, and the control, over the last steps."""
        return [
            Plot("share in the target state", ["|⟨ψ, target⟩|²"], [colour("C")], self.overlaps, "time", (0.0, 1.02)),
            Plot("control", ["control"], [colour("C")], self.pulses, "time", (-60.0, 60.0)),
        ]

    def grips(self) -> Mapping[str, Grip]:
        """A click puts a bump on the wave."""
        return {ANYWHERE: Grip(click=self.hit)}

    def words(self) -> str:
        """How near it is."""
        who = "steered by a network trained with C" if self.steering else "control switched off"
        return f"{who}: {100.0 * self.overlap():.0f} % in eigenstate {self.target}"

    def choose(self, target: str) -> None:
        """Steer to another eigenstate, from where the particle is."""
        state, self.target = self.simulation.state, int(target)
        self.simulation = Simulation(make_system(self.target), self.load(), state)

    def begin(self) -> None:
        """Start anew from a superposition of the two lowest eigenstates."""
        seed = int(self.draws.spawn(1)[0].generate_state(1)[0])
        self.simulation.state = self.simulation.system.sample(1, seed=seed)[0]

    def switch(self) -> None:
        """Switch the control off, or on again."""
        self.steering = not self.steering

    def set_speed(self, speed: float) -> None:
        """Set the time steps per second."""
        self.speed = speed

    def wave(self) -> np.ndarray:
        """ψ as complex numbers, shape (N,)."""
        return self.simulation.state[0::2] + 1j * self.simulation.state[1::2]

    def overlap(self) -> float:
        """|⟨ψ, target⟩|², 1 where the particle is in the target state."""
        return float(np.abs(self.wave() @ make_system(self.target).eigenstate(self.target)) ** 2)

    def hit(self, ray: Ray) -> None:
        """Disturb the particle where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None:
            self.disturb(float(place[0]))

    def disturb(self, place: float) -> None:
        """Add a bump to the wave at a position, and make its norm 1 again."""
        psi = self.wave()
        offset = (make_system(self.target).positions - place) / WIDTH
        psi = psi + BUMP * np.abs(psi).max() * np.exp(-0.5 * offset**2)
        psi /= np.linalg.norm(psi)
        self.simulation.state = np.stack([psi.real, psi.imag], axis=1).reshape(-1).astype(np.float32)

    def act(self) -> np.ndarray | None:
        """The control of this step; None: the controller's."""
        self.trace.append((float(self.simulation.control[0]), self.overlap()))
        self.past.appendleft(self.simulation.state)
        return None if self.steering else np.zeros(1)

    def advance(self, dt: float) -> None:
        """Step the physics."""
        self.simulation.advance(dt * self.speed * make_system(self.target).dt, self.act)

    def traced(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """A column of the trace over time."""
        values = np.array(self.trace).reshape(-1, 2)
        return make_system(self.target).dt * np.arange(1 - len(values), 1), values[:, column][None]

    def pulses(self) -> tuple[np.ndarray, np.ndarray]:
        """The control over time."""
        return self.traced(0)

    def overlaps(self) -> tuple[np.ndarray, np.ndarray]:
        """The share in the target state over time."""
        return self.traced(1)

    def picture(self) -> Picture:
        """The particle now, and behind it what it was like before."""
        system = make_system(self.target)
        shown = system.picture(self.simulation.state, self.simulation.control)
        lines = []
        for row, state in enumerate(list(self.past)[::EVERY], 1):
            density = system.picture(state).parts["density"]
            assert isinstance(density, Line)
            lines.append(np.concatenate([np.add(density.points, (0.0, APART * row, 0.0)), np.full((1, 3), np.nan)]))
        before = np.concatenate(lines or [np.zeros((0, 3))])
        rows = np.repeat(np.arange(1, len(lines) + 1), system.points + 3)
        ink = np.minimum(0.45 + 0.5 * rows / PAST, 0.95)[:, None] * np.array([1.0, 1.0, 1.0])
        parts = {"before": Line(before, ink, 1.5), **shown.parts}
        return replace(shown, parts=parts, high=(2.0, 0.6 * APART * PAST, 3.0), view=ASLANT, labels=("", ""))

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: a disturbance."""
        return [(7.0, lambda: self.disturb(0.6))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("quantum", __doc__, QuantumDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
