"""A simulation that runs on, one state after the other, steered by a controller or by hand."""

from collections.abc import Callable

import numpy as np
import torch
import warp as wp

from warp_phys.systems import System


class Simulation:
    """One sample of a system, stepped on the CPU as time passes.

    Args:
        system: What is simulated.
        controller: Maps states (1, D) to controls (1, K).
        state: Initial state, shape (D,).

    >>> from controllers import MLP
    >>> from warp_phys import CartPole
    >>> system = CartPole()
    >>> simulation = Simulation(system, MLP(system), system.sample(1)[0])
    >>> simulation.advance(0.055)
    5
    """

    def __init__(self, system: System, controller: torch.nn.Module, state: np.ndarray) -> None:
        self.system, self.controller = system, controller
        sizes = (system.state_size, system.control_size, system.state_size)
        self._x, self._c, self._y = (wp.zeros((1, size), dtype=wp.float32, device="cpu") for size in sizes)
        self.control = np.zeros(system.control_size, np.float32)
        """Last control, shape (K,)."""
        self.state = np.array(state, np.float32)
        """State, shape (D,); may be changed from outside at any time."""
        self.previous = self.state.copy()
        """The state one step earlier."""
        self.left = 0.0
        """Time that has passed since the last step, less than a step."""

    def decide(self) -> np.ndarray:
        """What the controller would do now, shape (K,)."""
        with torch.no_grad():
            return self.controller(torch.from_numpy(self.state[None].copy()))[0].numpy()

    def step(self, control: np.ndarray | None = None) -> None:
        """One time step, with a control of one's own or the controller's."""
        self.control = np.asarray(self.decide() if control is None else control, np.float32)
        self._x.numpy()[0], self._c.numpy()[0] = self.state, self.control
        self.system.step(self._x, self._c, self._y)
        self.previous, self.state = self.state, self._y.numpy()[0].copy()

    def advance(self, dt: float, act: Callable[[], np.ndarray | None] = lambda: None) -> int:
        """Let `dt` seconds pass; returns the number of steps. `act` gives each step's control, None: the controller's.

        A state that is no longer finite stays where it was.
        """
        self.left += dt
        steps = 0
        while self.left >= self.system.dt:  # type: ignore[attr-defined]
            self.left -= self.system.dt  # type: ignore[attr-defined]
            self.step(act())
            if not np.isfinite(self.state).all():
                self.state = self.previous.copy()
            steps += 1
        return steps

    def between(self) -> np.ndarray:
        """The state as of now, between the last two steps, for pictures that come more often than steps."""
        share = self.left / self.system.dt  # type: ignore[attr-defined]
        return (1.0 - share) * self.previous + share * self.state
