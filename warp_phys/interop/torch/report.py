"""What a backward pass tells about itself."""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch

from warp_phys.flow import MODIFIED, REGULAR, Flow, agreement, cosine, norm


@dataclass(frozen=True)
class Report:
    """Numbers of one backward pass; each is computed when it is read.

    >>> Report().cosine
    nan
    """

    flows: tuple[Flow, ...] = ()
    """The flows that ran."""
    updates: torch.Tensor | None = field(default=None, repr=False)
    """Their updates of the controller's parameters, shape (flows, parameters), of this pass alone."""
    changes: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    """What this pass added to the gradients of the trained parameters, in one tensor or several."""
    diverged: tuple[int, ...] = ()
    """Samples that left the finite numbers and were masked."""

    def __str__(self) -> str:
        """The numbers in one line."""
        if not self.flows:
            return "no backward pass yet"
        parts = [f"|{flow.letter or flow.name}| {self.norms[flow.name]:.3g}" for flow in self.flows]
        parts.append(f"|update| {self.norm:.3g}")
        if self._both:
            parts.append(f"cosine of M and R {self.cosine:.3g}, signs that agree {self.agreement:.0%}")
        if self.diverged:
            parts.append(f"{len(self.diverged)} samples diverged")
        return ", ".join(parts)

    @functools.cached_property
    def norms(self) -> dict[str, float]:
        """Euclidean norm of every flow's update, by the flow's name."""
        return {flow.name: norm(self._update(flow)) for flow in self.flows}

    @functools.cached_property
    def norm(self) -> float:
        """Euclidean norm of what this pass added to the gradients; nan before the first pass."""
        if not self.changes:
            return math.nan
        return math.sqrt(sum(float(change.double().square().sum()) for change in self.changes))

    @functools.cached_property
    def cosine(self) -> float:
        """Cosine between M and R; nan unless both ran."""
        return cosine(self._update(MODIFIED), self._update(REGULAR)) if self._both else math.nan

    @functools.cached_property
    def agreement(self) -> float:
        """Share of components on which M and R agree in sign; nan unless both ran."""
        return agreement(self._update(MODIFIED), self._update(REGULAR)) if self._both else math.nan

    @property
    def _both(self) -> bool:
        return MODIFIED in self.flows and REGULAR in self.flows

    def _update(self, flow: Flow) -> np.ndarray:
        assert self.updates is not None
        return self.updates[self.flows.index(flow)].double().cpu().numpy()
