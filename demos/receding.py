"""A cart-pole that plans anew at every step: it swings up and stands; drag the cart, kick the pole."""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from controllers.settings import check_setting
from demos.colours import colour
from demos.frame import Demo
from demos.simulation import Simulation
from demos.views import run
from warp_phys.interop.torch import RecedingHorizon
from warp_phys.systems import CartPole

REACH = 2.6
"""Metres to either side of the middle that are drawn."""
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

    clip = 8.0

    def __init__(self, figure: Figure, settings: Settings) -> None:
        super().__init__(figure)
        self.noise, self.generator = settings.noise, np.random.default_rng(settings.seed)
        model = CartPole(dt=0.02)
        larger = 1.0 + settings.error
        self.system = CartPole(dt=model.dt, pole_mass=larger * model.pole_mass, half_length=larger * model.half_length)
        self.length = 2.0 * model.half_length
        self.plan = RecedingHorizon(
            model, settings.horizon, settings.iterations, cost=upright, bounds=(-FORCE, FORCE), seed=settings.seed
        )
        state = np.array([0.0, 0.0, np.pi, 0.0])
        self.simulation = Simulation(self.system, torch.nn.Identity(), state)
        self.hand: float | None = None
        self.world = figure.add_axes((0.04, 0.1, 0.92, 0.8))
        self.sketch = self.system.sketch(self.world)
        (self.path,) = self.world.plot([], [], ".-", color=colour("C"), markersize=3, linewidth=0.8, zorder=5)
        (self.grip,) = self.world.plot([], [], color="black", linewidth=1)
        self.moving = [*self.sketch(state), self.path, self.grip]
        # the picture follows the cart; the rail has marks of its own
        self.world.set(xlim=(-REACH, REACH), xticks=[], xlabel="")
        self.world.set_title("drag the cart, click beside the pole to kick it; dots: what the latest plan expects")

    def act(self) -> np.ndarray:
        """The force of this step: the first of a new plan, the hand's, and noise."""
        state = self.simulation.state
        force = self.plan(state[None].astype(np.float64))[0].cpu().numpy()
        pull = 0.0 if self.hand is None else GRIP * (self.hand - state[0]) - DRAG * state[1]
        return force + pull + self.noise * self.generator.standard_normal(1)

    def advance(self, dt: float) -> None:
        """Step the physics."""
        self.simulation.advance(dt, self.act)

    def draw(self) -> None:
        """Move cart, pole and plan."""
        state = self.simulation.between()
        self.sketch(state, self.simulation.control)
        middle = float(np.clip(0.0, state[0] - REACH / 2, state[0] + REACH / 2))
        self.world.set_xlim(middle - REACH, middle + REACH)
        self.grip.set_data([] if self.hand is None else [self.hand, state[0]], [] if self.hand is None else [0.0, 0.0])
        if self.plan.latest is not None:
            x, _, angle, _ = self.plan.latest.states[:, 0].T.cpu().numpy()
            self.path.set_data(x + self.length * np.sin(angle), self.length * np.cos(angle))

    def kick(self, rate: float) -> None:
        """Add to the rate of the pole."""
        self.simulation.state[3] += rate

    def press(self, event: Any) -> None:
        """Grab the cart, or kick the pole away from the mouse."""
        if event.inaxes is not self.world or event.xdata is None:
            return
        x, _, angle, _ = self.simulation.state
        if abs(event.xdata - x) < 0.3 and abs(event.ydata) < 0.2:
            self.hand = float(event.xdata)
            return
        # positive rates turn clockwise
        beside = (event.xdata - x) * np.cos(angle) - event.ydata * np.sin(angle)
        self.kick(-KICK if beside > 0 else KICK)

    def drag(self, event: Any) -> None:
        """Move the hand that holds the cart."""
        if self.hand is not None and event.inaxes is self.world:
            self.hand = float(event.xdata)

    def release(self, event: Any) -> None:
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
