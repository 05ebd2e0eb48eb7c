"""An update in torch as one writes it: a module, a loop over time, autograd, `detach` for the flow."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.benchmarks.cases import EPSILON, RATE, Case, eigenstate, grid_lengths, make_batches, make_weights


class Program:
    """The updates of a case."""

    def __init__(self, case: Case):
        self.steps, self.flow = case.steps, case.flow
        make = {"cartpole": cartpole, "repulsion": repulsion, "quantum": quantum}[case.system]
        self.step, self.cost = make(case)
        self.controller = make_controller(case).to(case.device)
        arrays = (np.ascontiguousarray(array.T) for array in make_weights(case))  # outputs first
        self.weights = [torch.as_tensor(array).to(case.device) for array in arrays]
        self.parameters = list(self.controller.parameters())
        self.batches = [torch.as_tensor(batch).to(case.device) for batch in make_batches(case)]
        self.optimiser = torch.optim.Adam(self.parameters, lr=RATE, eps=EPSILON, fused=True)
        self.wait = torch.cuda.synchronize if case.device != "cpu" else lambda: None
        self.start()

    def loss(self, x: torch.Tensor, flow: str) -> torch.Tensor:
        """Unroll one flow."""
        states, controls = [x], []
        for _ in range(self.steps):
            controls.append(self.controller(states[-1].detach() if flow == "M" else states[-1]))
            states.append(self.step(states[-1], controls[-1]))
        return self.cost(states, controls)

    def gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return loss and update; C unrolls twice."""
        found = []
        for flow in "MR" if self.flow == "C" else self.flow:
            loss = self.loss(x, flow)
            found.append(torch.autograd.grad(loss, self.parameters))
        pairs = zip(found[0], found[-1], strict=True)
        return loss.detach(), [torch.where(torch.sign(m) == torch.sign(r), m, 0) for m, r in pairs]

    def loss_and_update(self) -> tuple[float, list[np.ndarray]]:
        """Return loss and update of the first batch at the initial weights."""
        self.start()
        loss, update = self.gradient(self.batches[0])
        return float(loss), [tensor.cpu().numpy().T for tensor in update]

    @torch.no_grad()
    def start(self) -> None:
        """Go back to the initial weights."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.copy_(weight)

    def run(self, updates: int) -> None:
        """Do a number of updates, and wait for them."""
        for i in range(updates):
            _, update = self.gradient(self.batches[i % len(self.batches)])
            for parameter, gradient in zip(self.parameters, update, strict=True):
                parameter.grad = gradient
            self.optimiser.step()
        self.wait()


class WaveFunction(nn.Module):
    """Rows (batch, 2 N) as channels (batch, 2, N); used again after the convolutions, the other way round."""

    def __init__(self, unfold: bool):
        super().__init__()
        self.unfold = unfold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, 2)).transpose(1, 2) if self.unfold else x.transpose(1, 2).flatten(1)


def make_controller(case: Case) -> nn.Module:
    """Return the controller of a case."""
    width = case.published.width
    if case.system == "quantum":
        last = grid_lengths(case.sizes["points"])[1] * width
        first, second = nn.Conv1d(2, width, 3, stride=2), nn.Conv1d(width, width, 3, stride=2)
        ends = WaveFunction(True), WaveFunction(False)
        return nn.Sequential(ends[0], first, nn.Tanh(), second, nn.Tanh(), ends[1], nn.Linear(last, 1))
    widths = [array.shape for array in make_weights(case)[::2]]
    layers: list[nn.Module] = []
    for inputs, outputs in widths:
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


Parts = tuple[Callable[..., torch.Tensor], Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]]


def cartpole(case: Case) -> Parts:
    """Step and loss of a cart with poles."""
    g, m, M, l, dt = 9.8, 0.1, 1.1, 0.5, case.dt

    def step(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        s = x.unflatten(1, (-1, 2))
        angle, rate = s[:, 1:, 0], s[:, 1:, 1]
        cos, sin = torch.cos(angle), torch.sin(angle)
        q = sin * rate**2
        bend = (g * sin - cos * (u + m * l * q) / M) / (l * (4.0 / 3.0 - m * cos**2 / M))
        push = (u[:, 0] + m * l * (q - bend * cos).sum(1)) / M
        rate = rate + dt * bend
        speed = s[:, 0, 1] + dt * push
        cart = torch.stack([s[:, 0, 0] + dt * speed, speed], 1)[:, None]
        return torch.cat([cart, torch.stack([angle + dt * rate, rate], 2)], 1).flatten(1)

    def cost(states: Any, controls: Any) -> torch.Tensor:
        return 1 - torch.cos(states[-1][:, 2::2]).mean()

    return step, cost


def repulsion(case: Case) -> Parts:
    """Step and loss of drivers and evaders."""
    drivers, evaders, dt = case.sizes["drivers"], case.sizes["evaders"], case.dt
    one_driver, one_evader = torch.eye(drivers, device=case.device), torch.eye(evaders, device=case.device)

    def distance(r: torch.Tensor, same: torch.Tensor | float) -> torch.Tensor:
        return 0.1 + ((r**2).sum(-1) + same).sqrt()

    def step(rows: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        s, c = rows.unflatten(1, (-1, 2, 2)), u.unflatten(1, (-1, 2))
        x, v = s[:, :, 0], s[:, :, 1]
        dogs, sheep, dog_v, sheep_v = x[:, :drivers], x[:, drivers:], v[:, :drivers], v[:, drivers:]
        z = dogs - sheep.sum(1, keepdim=True)
        steered = c[..., :1] * z + c[..., 1:] * torch.stack([-z[..., 1], z[..., 0]], -1)
        r = dogs[:, :, None] - sheep[:, None]
        frightened = -(r / distance(r, 0.0)[..., None] ** 2).sum(1)
        r = sheep[:, :, None] - sheep[:, None]
        d = distance(r, one_evader)
        flocking = (((0.5 / d - 1) / d)[..., None] * r).sum(1)
        r = dogs[:, None] - dogs[:, :, None]
        spaced = (r / distance(r, one_driver)[..., None] ** 2).sum(1)
        dog_a = steered - 1.0 * dog_v + 0.2 * spaced
        sheep_a = 15.0 * frightened - 4.0 * sheep_v + 0.2 * flocking
        return (s + dt * torch.stack([v, torch.cat([dog_a, sheep_a], 1)], 2)).flatten(1)

    def cost(states: Any, controls: Any) -> torch.Tensor:
        x = torch.stack(states[1:], 1).unflatten(2, (-1, 2, 2))[:, :, drivers:, 0]
        return (x**2).mean() + case.published.control_cost * (torch.stack(controls, 1) ** 2).mean()

    return step, cost


def quantum(case: Case) -> Parts:
    """Step and loss of a particle in a box; the solve is torch's own, on dense matrices."""
    points, dt = case.sizes["points"], case.dt
    dx = 2.0 / (points + 1)
    grid = torch.arange(1, points + 1, dtype=torch.float32, device=case.device) * dx
    r, beside = dt / dx / dx, torch.ones(points - 1, device=case.device)
    off = (-0.5j * r * (torch.diag(beside, 1) + torch.diag(beside, -1))).to(torch.complex64)
    target = torch.tensor(eigenstate(case.sizes["target"], points), device=case.device).to(torch.complex64)

    def complex_rows(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())

    def step(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        psi = complex_rows(x)
        q = r + 0.5 * dt * u * grid
        matrix = off + torch.diag_embed(torch.complex(torch.ones_like(q), q))
        return torch.view_as_real(2 * torch.linalg.solve(matrix, psi) - psi).flatten(1)

    def cost(states: Any, controls: Any) -> torch.Tensor:
        overlap = complex_rows(torch.stack(states[1:], 1)) @ target
        return (1 - (overlap.real**2 + overlap.imag**2)).sum(1).mean()

    return step, cost
