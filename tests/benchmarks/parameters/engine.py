"""An update with two physical parameters by this engine: `Rollout.value_and_grad`."""

import numpy as np
import torch

from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.policies.modules import make_module
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout


class Program:
    """The updates of a case, all at the same weights and parameters.

    Args:
        case: What to update.
        backend: "fused" or "general".
        per_sample: Whether each sample has parameters of its own.
    """

    def __init__(self, case: Case, backend: str, per_sample: bool):
        system, module = CartPole(**case.sizes, dt=case.dt), make_module("plain")
        self.rollout, shape = Rollout(system, module, case.steps, case.flow, backend=backend), (case.batch,)
        self.parameters = {
            name: torch.full(shape if per_sample else (), getattr(system, name), requires_grad=True)
            for name in ("pole_mass", "half_length")
        }
        weights = [parameter for _, parameter in sorted(module.named_parameters())]
        self.leaves = [*weights, *self.parameters.values()]
        self.batches = [torch.as_tensor(batch) for batch in make_batches(case)]

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch: weights by name, then parameters."""
        loss = self.rollout.value_and_grad(self.batches[0], parameters=self.parameters)
        return float(loss), [leaf.grad.numpy() for leaf in self.leaves if leaf.grad is not None]

    def start(self) -> None:
        """Nothing is trained."""

    def run(self, updates: int) -> None:
        """Do a number of updates."""
        for i in range(updates):
            self.rollout.value_and_grad(self.batches[i % len(self.batches)], parameters=self.parameters)
