"""What runs behind the race: several trainings in turns, in a thread that the picture never waits for."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from controllers.settings import Training
from controllers.training import Loop
from warp_phys import Diverged
from warp_phys.interop.torch import Rollout

FLOWS = ("R", "M", "S", "C", "either")
PREPARING, RUNNING, DONE = "preparing", "running", "done"


class Ride(NamedTuple):
    """A trajectory from the common start."""

    states: np.ndarray
    """Shape (steps + 1, D)."""
    controls: np.ndarray
    """Shape (steps, K)."""


@dataclass
class Lane:
    """One of the trainings, as the picture sees it; whole values are replaced, so that no lock is needed to read."""

    flow: str
    losses: list[float] = field(default_factory=list)
    """Test loss after every epoch."""
    ride: Ride | None = None
    """What the controller does now."""
    diverged: bool = False


class Race(threading.Thread):
    """Trains the same initial weights with several flows, an epoch each in turns; ends when `stop` is called.

    Args:
        poles: Poles on the cart.
        rate: Learning rate; may be changed at any time.
        seed: Seed of weights and states.
        epochs: Where it ends.
    """

    def __init__(self, poles: int, rate: float, seed: int, epochs: int) -> None:
        super().__init__(name=f"race of {poles} poles", daemon=True)
        self.poles, self.rate, self.seed, self.epochs = poles, rate, seed, epochs
        self.lanes = {flow: Lane(flow) for flow in FLOWS}
        self.state = PREPARING
        self.error: Exception | None = None
        self.over: Callable[[dict[str, Lane]], bool] = lambda lanes: False
        """Asked after every epoch whether the race has been decided."""
        self._stopping, self._going = threading.Event(), threading.Event()
        self._going.set()

    def training(self, flow: str) -> Training:
        """The training of one lane: the published one, with fewer states so that a turn is short."""
        return Training(
            parameters={"poles": self.poles, "dt": 0.01},
            flow=flow,
            epochs=1,
            train_states=128,
            test_states=64,
            rate=self.rate,
            seed=self.seed,
            out="",
        )

    @property
    def paused(self) -> bool:
        """Whether the trainings rest."""
        return not self._going.is_set()

    def pause(self, paused: bool) -> None:
        """Let the trainings rest, or go on."""
        (self._going.clear if paused else self._going.set)()

    def stop(self) -> None:
        """Ask the thread to end; it does so after the minibatch that it is at."""
        self._stopping.set()
        self._going.set()

    def finished_epochs(self) -> int:
        """Epochs that all lanes have finished which have not diverged."""
        return min((len(lane.losses) for lane in self.lanes.values() if not lane.diverged), default=self.epochs)

    def run(self) -> None:
        """Body of the thread; what goes wrong is left in `error`."""
        try:
            self.train()
        except Exception as error:
            self.error = error

    def train(self) -> None:
        """Train all lanes, an epoch each in turns."""
        torch.set_num_threads(1)
        loops = {flow: Loop(self.training(flow)) for flow in FLOWS}
        for epoch in range(1, self.epochs + 1):
            for flow, loop in loops.items():
                self._going.wait()
                if self._stopping.is_set():
                    return
                if not self.lanes[flow].diverged:
                    self.turn(self.lanes[flow], loop, epoch)
            self.state = RUNNING
            if self.over(self.lanes):
                break
        self.state = DONE

    def turn(self, lane: Lane, loop: Loop, epoch: int) -> None:
        """One epoch of one lane."""
        loop.settings = replace(loop.settings, epochs=epoch)
        for group in loop.optimiser.param_groups:
            group["lr"] = self.rate
        try:
            if loop.run(self._stopping.is_set, None, None):
                ride = self.ride(loop.rollout)
                lane.losses = [*lane.losses, loop.records[-1].test_loss]
                lane.ride = ride
        except Diverged:
            lane.diverged = True

    def ride(self, rollout: Rollout) -> Ride:
        """What a controller does from the common start."""
        start = np.zeros((1, 2 + 2 * self.poles), np.float32)
        start[0, 2::2] = np.pi + np.linspace(-0.3, 0.3, self.poles)
        with torch.no_grad():
            states, controls = rollout(start)
        return Ride(states[:, 0].numpy().copy(), controls[:, 0].numpy().copy())
