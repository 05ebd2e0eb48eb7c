"""A policy's update with this engine: `Rollout.value_and_grad`."""

from typing import Any

import numpy as np
import torch

from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.policies.modules import make_module
from tests.benchmarks.policies.weights import MEMORY, make_inputs
from warp_phys import CartPole
from warp_phys.interop.torch import Rollout


class Program:
    """The updates of a case; nothing is trained, so that all are at the same weights.

    Args:
        case: What to update.
        policy: A name of `weights.POLICIES`.
        backend: "fused" or "general".
    """

    def __init__(self, case: Case, policy: str, backend: str):
        system = CartPole(**case.sizes, dt=case.dt)
        self.module = make_module(policy)
        inputs = make_inputs(policy, case.steps, case.batch)
        beside: Any = {"memory": MEMORY.get(policy, 0), "inputs": 0 if inputs is None else 1}
        self.rollout = Rollout(system, self.module, case.steps, case.flow, backend=backend, **beside)
        self.given: Any = {} if inputs is None else {"inputs": torch.as_tensor(inputs)}
        self.batches = [torch.as_tensor(batch) for batch in make_batches(case)]

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch, parameters by name."""
        loss = self.rollout.value_and_grad(self.batches[0], **self.given)
        return float(loss), [_numpy(parameter.grad) for _, parameter in sorted(self.module.named_parameters())]

    def start(self) -> None:
        """Nothing: see above."""

    def run(self, updates: int) -> None:
        """Do a number of updates."""
        for i in range(updates):
            self.rollout.value_and_grad(self.batches[i % len(self.batches)], **self.given)


def _numpy(gradient: torch.Tensor | None) -> np.ndarray:
    assert gradient is not None
    return gradient.numpy()
