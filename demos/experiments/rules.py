"""Other rules against the published C: trainings as published whose backward pass is none of the named flows."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import warp as wp

from controllers.record import Record
from controllers.settings import Training
from controllers.training import Loop
from demos.experiments.published import EXPERIMENTS
from demos.experiments.study import Line, Panel, Point, Study, Trial
from warp_phys import COMBINED, MODIFIED, REGULAR, Combined, Flow
from warp_phys.interop.torch import Report


class Rule(NamedTuple):
    """How the updates of a training are made."""

    flow: Flow | Combined
    """The engine's flow."""
    also: Flow | None = None
    """With `flow` C: a flow with which M may agree where it does not agree with R."""
    balanced: int = 0
    """So many epochs of the balanced sweep before `flow` takes over."""


BALANCED_EPOCHS = 40
"""Epochs of the balanced sweep before C."""

RULES = {
    "combined": Rule(COMBINED),
    "limit-1": Rule(Flow(limit=1.0)),
    "combined-limit-1": Rule(Combined(other=Flow(limit=1.0))),
    "combined-limit-0.3": Rule(Combined(other=Flow(limit=0.3))),
    "either-limit-1": Rule(COMBINED, also=Flow(limit=1.0)),
    "balanced": Rule(COMBINED, balanced=BALANCED_EPOCHS),
}
"""The rules by the names of their folders."""

Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def balance(physics: torch.Tensor, controller: torch.Tensor) -> torch.Tensor:
    """Return feedback with the direction of the sum of both and the norm of the physics' feedback, row by row.

    >>> balance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor([[1.8000, 2.4000]])
    """
    total = physics + controller
    length = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    scale = torch.linalg.vector_norm(physics, dim=1, keepdim=True) / torch.where(length > 0.0, length, 1.0)
    return scale * total


def sweep(
    system: Any,
    states: torch.Tensor,
    controls: torch.Tensor,
    seeds: tuple[torch.Tensor, torch.Tensor],
    jacobians: torch.Tensor,
    mix: Mix,
) -> torch.Tensor:
    """Return μ_n = dL/dc_n of all steps by a walk back in time with λ_n = ∂L/∂x_n + mix(physics, controller).

    The first argument of `mix` is the physics' feedback (∂S/∂x)ᵀ λ_{n+1}, the second the controller's (∂N/∂x)ᵀ μ_n.

    Args:
        system: A `System`.
        states: Shape (T + 1, B, D).
        controls: Shape (T, B, K).
        seeds: ∂L/∂x_n, the shape of `states`, and ∂L/∂c_n, that of `controls`.
        jacobians: ∂N/∂x of all steps, shape (T, B, K, D).
        mix: Function of two tensors (B, D), with the sum for R, with the first for M.
    """
    x, c = (list(map(wp.from_torch, tensor.contiguous().unbind())) for tensor in (states, controls))
    adjoint, by_physics, by_control = states[-1].clone(), torch.empty_like(states[-1]), torch.empty_like(controls[0])
    arrays = [wp.from_torch(tensor) for tensor in (adjoint, by_physics, by_control)]
    mu = torch.empty_like(controls)
    adjoint.copy_(seeds[0][-1])
    for n in reversed(range(len(controls))):
        system.step_vjp(x[n], c[n], *arrays)
        torch.add(seeds[1][n], by_control, out=mu[n])
        by_controller = torch.bmm(mu[n].unsqueeze(1), jacobians[n]).squeeze(1)
        torch.add(seeds[0][n], mix(by_physics, by_controller), out=adjoint)
    return mu


class RuleLoop(Loop):
    """The published training with another rule."""

    def __init__(self, settings: Training, rule: Rule) -> None:
        super().__init__(settings, graph=True)
        self.rule = rule
        self.rollout.flow = rule.flow

    def update(self, minibatches: torch.Tensor, stop: Callable[[], bool]) -> None:
        """Take steps for the next minibatches, shape (minibatches, batch, D), until `stop` says yes."""
        is_balanced = len(self.records) < self.rule.balanced
        if not is_balanced and self.rule.also is None:
            super().update(minibatches, stop)
            return
        for states in minibatches:
            if stop():
                return
            self.losses[self.minibatch] += self.walk(states) if is_balanced else self.agree_with_any(states)
            self.optimiser.step()
            self.minibatch += 1

    def evaluate(self, initial_states: torch.Tensor, inputs: torch.Tensor) -> float:
        """Mean loss over test states; that over training states is not asked for."""
        return math.nan if initial_states is self.train_states else super().evaluate(initial_states, inputs)

    def agree_with_any(self, initial_states: torch.Tensor) -> torch.Tensor:
        """Leave M in the gradients where it agrees with R or with the other flow; return the loss."""
        assert self.rule.also is not None
        self.rollout.observe = (MODIFIED, REGULAR, self.rule.also)
        loss = self.rollout.value_and_grad(initial_states, self.settings.when, self.settings.control_cost)
        report = self.rollout.report
        assert report.updates is not None
        modified, regular, other = (
            report.updates[report.flows.index(flow)] for flow in (MODIFIED, REGULAR, self.rule.also)
        )
        sign = modified.sign()
        update = torch.where((sign == regular.sign()) | (sign == other.sign()), modified, 0.0)
        self.leave(list(update.split([parameter.numel() for parameter in self.parameters])))
        self.report = Report(report.flows, report.updates.clone(), (update,))
        return loss

    def walk(self, initial_states: torch.Tensor, mix: Mix = balance) -> torch.Tensor:
        """Leave the update of the sweep with `mix` in the gradients; return the loss."""
        with torch.no_grad():
            states, controls = self.rollout(initial_states)
        leaves = [tensor.detach().requires_grad_() for tensor in (states, controls)]
        loss = self.system.loss(*leaves, when=self.settings.when, control_cost=self.settings.control_cost)
        seeds = torch.autograd.grad(loss, leaves, allow_unused=True)
        by_states, by_controls = (
            torch.zeros_like(leaf) if seed is None else seed for seed, leaf in zip(seeds, leaves, strict=True)
        )
        steps, batch, size = controls.shape
        seen = states[:-1].flatten(0, 1).requires_grad_()
        output = self.controller(seen)
        rows = [torch.autograd.grad(output[:, k].sum(), seen, retain_graph=True)[0] for k in range(size)]
        jacobians = torch.stack(rows, dim=1).unflatten(0, (steps, batch))
        mu = sweep(self.system, states, controls, (by_states, by_controls), jacobians, mix)
        changes = torch.autograd.grad(output, self.parameters, mu.flatten(0, 1))
        self.leave(changes)
        self.report = Report(changes=tuple(changes))
        return loss.detach()

    def leave(self, changes: Any) -> None:
        """Put an update, parameter by parameter, into the gradients."""
        for parameter, change in zip(self.parameters, changes, strict=True):
            parameter.grad = change.reshape(parameter.shape)


def make_trial(experiment: str, level: float, shuffle: bool, epochs: int, rule: str, seed: int) -> Trial:
    """One training."""
    settings = EXPERIMENTS[experiment].training(level, seed=seed, shuffle=shuffle, epochs=epochs, out="")

    def train(stop: Callable[[], bool], progress: Callable[[Point], None]) -> bool:
        def record(line: Record) -> None:
            progress(Point(line.test_loss, seconds=line.seconds))

        return RuleLoop(settings, RULES[rule]).run(stop, (record,), None)

    return Trial(f"{experiment}-shuffled" if shuffle else experiment, rule, seed, epochs, train)


TASKS = {"cartpole": (4, 200, 0.3, 0.1), "repulsion": (0.001, 150, 1.0, 1.0), "quantum": (5, 60, 80.0, 80.0)}
"""Of each experiment the level, the epochs, the loss that a run is timed to, and that above which it has failed."""


def _panels() -> dict[str, Panel]:
    panels = {}
    for name, (level, epochs, reached, failed) in TASKS.items():
        experiment = EXPERIMENTS[name]
        for shuffle in (False, True):
            title = f"{experiment.title}, {experiment.describe(level)}, " + ("shuffled" if shuffle else "fixed order")
            panels[f"{name}-shuffled" if shuffle else name] = Panel(title, tuple(RULES), epochs, reached, failed)
    return panels


def _make(panel: str, line: str, epochs: int, seed: int) -> Trial:
    name, _, shuffled = panel.partition("-")
    return make_trial(name, TASKS[name][0], bool(shuffled), epochs, line, seed)


STUDY = Study(
    title="Rules beside C",
    panels=_panels(),
    lines={
        "combined": Line("C", "#009E73", "-"),
        "limit-1": Line("limit 1", "#D55E00", (0, (5, 1.5))),
        "combined-limit-1": Line("C with limit 1", "#56B4E9", (0, (9, 2))),
        "combined-limit-0.3": Line("C with limit 0.3", "#0072B2", (0, (5, 1.5, 1, 1.5))),
        "either-limit-1": Line("either, R or limit 1", "#882255", (0, (4, 1, 1, 1, 1, 1))),
        "balanced": Line(f"balanced {BALANCED_EPOCHS} epochs, then C", "#E69F00", (0, (3, 1, 1, 1))),
    },
    make=_make,
)
