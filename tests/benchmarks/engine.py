"""An update with this engine, as `controllers.training` does it."""

from typing import Any

import numpy as np
import torch

from controllers.networks import MLP, GridCNN
from tests.benchmarks.cases import EPSILON, RATE, Case, make_batches, make_weights
from warp_phys.interop.torch import Rollout, Update
from warp_phys.systems import SYSTEMS
from warp_phys.systems.base import System


class Program:
    """The updates of a case.

    Args:
        case: What to update.
        backend: "fused" or "general", see `Rollout`.
        inner: Updates of one call.
    """

    def __init__(self, case: Case, backend: str, inner: int = 1):
        published = case.published
        make_system: Any = SYSTEMS[case.system]
        system = make_system(**case.sizes, dt=case.dt)
        self.controller = make_controller(system, case).to(case.device)
        self.weights = [to_torch(array).to(case.device) for array in make_weights(case)]
        self.parameters = list(self.controller.parameters())
        self.rollout = Rollout(system, self.controller, case.steps, case.flow, backend=backend)
        batches = torch.as_tensor(np.stack(make_batches(case))).to(case.device)
        self.batches = torch.cat([batches, batches[: inner - 1]])  # a call may go on from the last to the first
        self.count, self.inner = len(batches), inner
        optimiser = torch.optim.Adam(self.parameters, lr=RATE, eps=EPSILON, fused=True)
        self.loss = {"when": published.when, "control_cost": published.control_cost}
        self.update = Update(self.rollout, optimiser, **self.loss, graph=case.device == "cpu")
        self.wait = torch.cuda.synchronize if case.device != "cpu" else lambda: None
        self.start()

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch at the initial weights."""
        self.start()
        loss = self.rollout.value_and_grad(self.batches[0], **self.loss)
        return float(loss), [from_torch(parameter.grad) for parameter in self.parameters]

    @torch.no_grad()
    def start(self) -> None:
        """Go back to the initial weights."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.copy_(weight)

    def run(self, updates: int) -> None:
        """Do a number of updates, and wait for them."""
        for i in range(0, updates, self.inner):
            first = i % self.count
            self.update.minibatches(self.batches[first : first + min(self.inner, updates - i)])
        self.wait()


def make_controller(system: System, case: Case) -> torch.nn.Module:
    """Return the controller of a case."""
    width = case.published.width
    return GridCNN(system, width, seed=0) if case.system == "quantum" else MLP(system, (width, width), seed=0)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Weights of `cases` in torch's order of axes, outputs first."""
    return torch.as_tensor(np.ascontiguousarray(array.T))


def from_torch(tensor: torch.Tensor | None) -> np.ndarray:
    """The other way round."""
    assert tensor is not None
    return tensor.detach().cpu().numpy().T
