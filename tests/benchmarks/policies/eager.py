"""A policy's update in torch as one writes it: see `tests.benchmarks.eager`, with a module of one's own."""

import numpy as np
import torch

from tests.benchmarks import eager
from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.policies.modules import make_module


class Program(eager.Program):
    """The updates of a case, without an optimiser."""

    def __init__(self, case: Case, policy: str):
        self.steps, self.flow = case.steps, case.flow
        self.step, self.cost = eager.cartpole(case)
        self.controller = make_module(policy)
        self.parameters = [parameter for _, parameter in sorted(self.controller.named_parameters())]
        self.batches = [torch.as_tensor(batch) for batch in make_batches(case)]

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch, parameters by name."""
        loss, update = self.gradient(self.batches[0])
        return float(loss), [tensor.numpy() for tensor in update]

    def start(self) -> None:
        """Nothing is trained."""

    def run(self, updates: int) -> None:
        """Do a number of updates."""
        for i in range(updates):
            self.gradient(self.batches[i % len(self.batches)])
