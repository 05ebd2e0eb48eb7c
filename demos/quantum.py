"""A quantum particle steered by tilting its well: choose the state to reach, disturb it by a click."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from controllers import GridCNN
from controllers.settings import check_setting
from demos.colours import colour
from demos.frame import Demo
from demos.simulation import Simulation
from demos.views import run
from demos.weights import load_weights
from demos.widgets import button, choice, slider
from warp_phys.systems import Quantum

TARGETS = (3, 4, 5)
CHANNELS = 32
TRACE = 192
"""Time steps of the traces."""
BUMP, WIDTH = 0.6, 0.15
"""A click adds a bump to the wave: this amplitude relative to the wave's largest, this width."""


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
    """Density, phase and pulse at the left, how near the target is and choices at the right."""

    size = (10.0, 6.4)
    clip = 12.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.target, self.speed, self.draws = settings.target, settings.speed, np.random.SeedSequence(settings.seed)
        self.steering = True
        self.world = figure.add_axes((0.07, 0.46, 0.58, 0.46))
        self.phases = figure.add_axes((0.07, 0.26, 0.58, 0.14))
        self.pulse = figure.add_axes((0.07, 0.08, 0.58, 0.1))
        self.overlaps = figure.add_axes((0.72, 0.62, 0.26, 0.3))
        self.widgets = [
            choice(
                figure,
                (0.72, 0.34, 0.12, 0.18),
                "target",
                [f"eigenstate {number}" for number in TARGETS],
                TARGETS.index(self.target),
                lambda number: self.choose(TARGETS[number]),
            ),
            button(figure, (0.86, 0.47, 0.12, 0.05), "new start", self.begin),
            button(figure, (0.86, 0.405, 0.12, 0.05), "control on / off", self.switch),
            button(figure, (0.86, 0.34, 0.12, 0.05), "pause", self.pause),
            slider(figure, (0.8, 0.26, 0.12, 0.03), "steps / s", (2, 60), self.speed, self.set_speed, "%.0f"),
        ]
        figure.text(0.72, 0.09, "click into the upper picture:\na bump on the wave, there", fontsize=9, color="0.3")
        self.build()
        self.begin()

    def build(self) -> None:
        """Draw the world of the chosen target."""
        for axes in (self.world, self.phases, self.pulse, self.overlaps):
            axes.clear()
        system, ink = make_system(self.target), colour("C")
        self.sketch = system.sketch(self.world)
        self.simulation = Simulation(system, self.load(), system.sample(1)[0])
        density, well = self.sketch(self.simulation.state, np.zeros(1))
        self.world.set(xlabel="", xticklabels=())
        self.world.set_title(
            f"|ψ|², the state to reach (dashed), the tilted well: trained with C, target {self.target}"
        )
        self.dots = self.phases.scatter(
            system.positions,
            np.zeros(system.points),
            c=np.zeros(system.points),
            cmap="twilight",
            vmin=-np.pi,
            vmax=np.pi,
        )
        self.phases.set(xlim=(0, 2), ylim=(-3.6, 3.6), yticks=(-np.pi, 0, np.pi), ylabel="phase")
        self.phases.set_yticklabels(["−π", "0", "π"])
        (self.pulse_line,) = self.pulse.plot([], [], color=ink, linewidth=1.2)
        self.pulse.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        self.pulse.set(xlim=(-TRACE * system.dt, 0), ylim=(-60, 60), xlabel="time", ylabel="control")
        (self.overlap_line,) = self.overlaps.plot([], [], color=ink, linewidth=1.5)
        self.overlaps.set(xlim=(-TRACE * system.dt, 0), ylim=(0, 1.02), xlabel="time")
        self.overlaps.set_title("|⟨ψ, target⟩|²")
        self.moving = [density, well, self.dots, self.pulse_line, self.overlap_line]
        for artist in self.moving:
            artist.set_animated(True)
        self.trace: deque[tuple[float, float]] = deque(maxlen=TRACE + 1)
        self.refresh()

    def load(self) -> Any:
        """The controller of the chosen target."""
        return load_weights("quantum", str(self.target), make_controller())

    def choose(self, target: int) -> None:
        """Steer to another eigenstate, from where the particle is."""
        state, self.target = self.simulation.state, target
        self.build()
        self.simulation.state = state

    def begin(self) -> None:
        """Start anew from a superposition of the two lowest eigenstates."""
        seed = int(self.draws.spawn(1)[0].generate_state(1)[0])
        self.simulation.state = self.simulation.system.sample(1, seed=seed)[0]

    def switch(self) -> None:
        """Switch the control off, or on again."""
        self.steering = not self.steering

    def pause(self) -> None:
        """Hold the time, or let it go on."""
        self.paused = not self.paused

    def set_speed(self, speed: float) -> None:
        """Set the time steps per second."""
        self.speed = speed

    def wave(self) -> np.ndarray:
        """ψ as complex numbers, shape (N,)."""
        return self.simulation.state[0::2] + 1j * self.simulation.state[1::2]

    def overlap(self) -> float:
        """|⟨ψ, target⟩|², 1 where the particle is in the target state."""
        return float(np.abs(self.wave() @ make_system(self.target).eigenstate(self.target)) ** 2)

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
        return None if self.steering else np.zeros(1)

    def advance(self, dt: float) -> None:
        """Step the physics."""
        self.simulation.advance(dt * self.speed * make_system(self.target).dt, self.act)

    def draw(self) -> None:
        """Move everything."""
        self.sketch(self.simulation.state, self.simulation.control)
        psi = self.wave()
        phase, density = np.angle(psi), np.abs(psi) ** 2
        self.dots.set_offsets(np.stack([make_system(self.target).positions, phase], axis=1))
        self.dots.set_array(phase)
        # a phase counts as much as there is of the wave
        self.dots.set_sizes(4.0 + 60.0 * density / density.max())
        if self.trace:
            controls, overlaps = np.array(self.trace).T
            times = make_system(self.target).dt * np.arange(1 - len(controls), 1)
            self.pulse_line.set_data(times, controls)
            self.overlap_line.set_data(times, overlaps)

    def press(self, event: Any) -> None:
        """Disturb the particle where it was clicked."""
        if event.inaxes is self.world:
            self.disturb(float(event.xdata))

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: a disturbance."""
        return [(7.0, lambda: self.disturb(0.6))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("quantum", __doc__, QuantumDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
