"""A cart-pole that plans anew at every step: it swings up and stands; drag the cart, kick the pole."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from controllers.settings import check_setting
from demos.colours import colour, tinted
from demos.frame import Button, Control, Demo, Grip, Plot, Ray
from demos.simulation import Simulation
from demos.views import run
from warp_phys.interop.torch import RecedingHorizon
from warp_phys.systems import CartPole
from warp_phys.systems.drawing import Line, Picture

REACH, FREE = 2.3, 1.0
"""Metres to either side of the middle that are seen, and that the cart may go from there before the picture follows."""
TRACE = 6.0
"""Seconds of the trace."""
FORCE = 20.0
"""Largest force [N]."""
GRIP, DRAG = 80.0, 16.0
"""The hand at the cart: a spring [N/m], its damping [N s/m]."""
KICK = 1.0
"""What a click beside the pole adds to its rate [rad/s]."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    horizon: int = 40
    """Steps of 0.02 s that the controller looks ahead."""
    iterations: int = 8
    """Iterations of a plan; the first one has more."""
    error: float = 0.2
    """By which share mass and length of the pole are larger than the controller believes."""
    noise: float = 1.0
    """Standard deviation of a force on the cart that nobody has planned [N]."""
    seed: int = 0
    """Seed of that force."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_setting("horizon", self.horizon, int, at_least=1)
        check_setting("iterations", self.iterations, int, at_least=1)
        check_setting("error", self.error, float, above=-1)
        check_setting("noise", self.noise, float, at_least=0)
        check_setting("seed", self.seed, int, at_least=0)


def upright(states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """Loss of a plan, shape (batch,): upright and in the middle, at rest in the end, with little force."""
    x, v, angle, rate = states.unbind(-1)
    end = (1.0 - angle.cos() + 0.1 * (v.square() + rate.square()))[-1]
    along = (1.0 - angle.cos() + 0.05 * x.square() + 0.01 * rate.square()).mean(0)
    return along + end + 1e-3 * controls.square().mean(dim=(0, 2))


class RecedingDemo(Demo):
    """The cart, and where the latest plan sees the end of its pole."""

    says = "This cart plans ahead anew at every step (green): drag the cart or kick the pole, and it plans again."
    clip = 8.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.error = settings.error
        self.noise, self.generator = settings.noise, np.random.default_rng(settings.seed)
        model = CartPole(dt=0.02)
        larger = 1.0 + settings.error
        self.system = CartPole(dt=model.dt, pole_mass=larger * model.pole_mass, half_length=larger * model.half_length)
        self.length = 2.0 * model.half_length
        self.plan = RecedingHorizon(
            model, settings.horizon, settings.iterations, cost=upright, bounds=(-FORCE, FORCE), seed=settings.seed
        )
        self.simulation = Simulation(self.system, torch.nn.Identity(), np.array([0.0, 0.0, np.pi, 0.0]))
        self.trace: deque[float] = deque(maxlen=round(TRACE / self.system.dt) + 1)
        self.hand: float | None = None

    def controls(self) -> Sequence[Control]:
        """What can be done."""
        return [
            Button("kick the pole", lambda: self.kick(float(self.generator.choice([-KICK, KICK])))),
            Button("pause / go on", self.pause),
        ]

    def plots(self) -> Sequence[Plot]:
        """The angle over the last seconds."""
        return [Plot("angle [°], 0 is upright", ["angle"], [colour("C")], self.angles, y_range=(-190.0, 190.0))]

    def grips(self) -> Mapping[str, Grip]:
        """The cart can be dragged, the pole kicked."""
        return {"cart": Grip(drag=self.drag, release=self.release), "pole 1": Grip(click=self.hit)}

    def words(self) -> str:
        """What the controller is not told."""
        kind = "longer and heavier" if self.error >= 0.0 else "shorter and lighter"
        return f"the pole is {100.0 * abs(self.error):.0f} % {kind} than the plan believes"

    def act(self) -> np.ndarray:
        """The force of this step: the first of a new plan, the hand's, and noise."""
        state = self.simulation.state
        self.trace.append(float(np.degrees((state[2] + np.pi) % (2.0 * np.pi) - np.pi)))
        force = self.plan(state[None].astype(np.float64))[0].cpu().numpy()
        pull = 0.0 if self.hand is None else GRIP * (self.hand - state[0]) - DRAG * state[1]
        return force + pull + self.noise * self.generator.standard_normal(1)

    def advance(self, dt: float) -> None:
        """Step the physics."""
        self.simulation.advance(dt, self.act)

    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """The angle over time."""
        return self.system.dt * np.arange(1.0 - len(self.trace), 1.0), np.array(self.trace)[None]

    def picture(self) -> Picture:
        """Cart, pole, and the plan for the end of the pole."""
        state = self.simulation.between()
        shown = self.system.picture(state, self.simulation.control)
        ahead = np.zeros((0, 3))
        if self.plan.latest is not None:
            x, _, angle, _ = self.plan.latest.states[:, 0].T.cpu().numpy()
            ahead = np.stack([x + self.length * np.sin(angle), 0.0 * x - 0.3, self.length * np.cos(angle)], axis=1)
        held = np.array([[state[0] if self.hand is None else self.hand, -0.25, 0.0], [state[0], -0.25, 0.0]])
        parts = tinted(shown.parts, colour("C"), ("cart", "force")) | {
            "plan": Line(ahead, colour("C"), 3.0),
            "hand": Line(held if self.hand is not None else held[:0], "#666666", 3.0),
        }
        middle = float(np.clip(0.0, state[0] - FREE, state[0] + FREE))
        low, high = (middle - REACH, -0.5, -1.3), (middle + REACH, 0.3, 1.3)
        return replace(shown, parts=parts, low=low, high=high, labels=("", ""))

    def kick(self, rate: float) -> None:
        """Add to the rate of the pole."""
        self.simulation.state[3] += rate

    def hit(self, ray: Ray) -> None:
        """Kick the pole away from where it was clicked."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None:
            x, _, angle, _ = self.simulation.state
            # positive rates turn clockwise
            beside = (place[0] - x) * np.cos(angle) - place[2] * np.sin(angle)
            self.kick(-KICK if beside > 0 else KICK)

    def drag(self, ray: Ray) -> None:
        """Hold the cart where somebody points."""
        place = ray.meet((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
        if place is not None:
            self.hand = float(place[0])

    def release(self) -> None:
        """Let the cart go."""
        self.hand = None

    def script(self) -> Sequence[tuple[float, Callable[[], None]]]:
        """In a file: two kicks."""
        return [(3.0, lambda: self.kick(KICK)), (5.0, lambda: self.kick(-KICK))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    return run("receding", __doc__, RecedingDemo, Settings, arguments)


if __name__ == "__main__":
    sys.exit(main())
