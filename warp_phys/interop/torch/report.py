"""What a backward pass tells about itself."""

import functools
import math
from dataclasses import dataclass

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
    updates: torch.Tensor | None = None
    """Their updates of the controller's parameters, shape (flows, parameters), of this pass alone."""
    changes: tuple[torch.Tensor, ...] = ()
    """What this pass added to the gradients of the trained parameters, in one tensor or several."""
    diverged: tuple[int, ...] = ()
    """Samples that left the finite numbers and were masked."""

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
