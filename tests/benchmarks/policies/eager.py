"""A policy's update in torch as one writes it: see `tests.benchmarks.eager`, with a module of one's own."""

import numpy as np
import torch

from tests.benchmarks import eager
from tests.benchmarks.cases import Case, make_batches
from tests.benchmarks.policies.modules import make_module
from tests.benchmarks.policies.weights import MEMORY, make_inputs


class Program(eager.Program):
    """The updates of a case, without an optimiser."""

    def __init__(self, case: Case, policy: str):
        self.steps, self.flow = case.steps, case.flow
        self.step, self.cost = eager.cartpole(case)
        self.controller = make_module(policy)
        self.parameters = [parameter for _, parameter in sorted(self.controller.named_parameters())]
        self.batches = [torch.as_tensor(batch) for batch in make_batches(case)]
        inputs = make_inputs(policy, case.steps, case.batch)
        self.inputs = None if inputs is None else torch.as_tensor(inputs).expand(-1, case.batch, -1)
        self.memory = MEMORY.get(policy, 0)

    def loss(self, x: torch.Tensor, flow: str) -> torch.Tensor:
        """Unroll one flow, with what the policy is given and remembers."""
        states, controls, h = [x], [], x.new_zeros((len(x), self.memory))
        for n in range(self.steps):
            seen = [states[-1].detach() if flow == "M" else states[-1]]
            seen += [] if self.inputs is None else [self.inputs[n]]
            if self.memory:
                c, h = self.controller(*seen, h)
            else:
                c = self.controller(*seen)
            controls.append(c)
            states.append(self.step(states[-1], c))
        return self.cost(states, controls)

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
