"""The numbers behind the picture of the plane of two parameters: settings, fields, minima, paths, a summary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from controllers.settings import check_setting
from warp_phys.diagnose import plane
from warp_phys.diagnose.landscape import Landscape
from warp_phys.flow import FlowLike, FlowName, resolve
from warp_phys.systems import Polynomial

FLOWS: tuple[FlowName, ...] = ("R", "M", "S", "C")
SOLVED = 1e-4
"""Loss below which a path counts as arrived."""
GRID_STARTS = 29
"""Starts along each axis of the grid from which all flows are tried."""


class Start(NamedTuple):
    """Where an optimisation starts."""

    theta1: float
    theta2: float


DEFAULT_STARTS = (Start(2.75, -0.5), Start(1.0, -3.0), Start(2.5, -2.0), Start(-1.0, -0.25))


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    starts: list[Start] = field(default_factory=lambda: list(DEFAULT_STARTS))
    """Where the optimisations start; not more than nine."""
    optimiser: Literal["adam", "descent"] = "adam"
    """What follows the updates: adam, or plain descent."""
    rate: float = 0.05
    """Step size of the optimiser."""
    iterations: int = 300
    """Steps of each optimisation."""
    reach: float = 4.0
    """The plane is drawn for θ1 and θ2 from minus this to this."""
    cells: int = 200
    """Points along each axis that are coloured."""
    steps: int = 4
    """Time steps of the unrolling."""
    start_state: float = -0.3
    """Initial state x_0."""
    target: float = 2.0
    """Where the last state shall be."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if not 1 <= len(self.starts) <= 9:
            raise ValueError(f"there must be one to nine starts, got {len(self.starts)}")
        for name in ("rate", "reach"):
            check_setting(name, getattr(self, name), float, above=0)
        check_setting("iterations", self.iterations, int, at_least=1)
        check_setting("cells", self.cells, int, at_least=2)
        check_setting("steps", self.steps, int, at_least=1, below=17)

    def landscape(self) -> Landscape:
        """The landscape, in float64."""
        try:
            return Landscape(Polynomial(start=self.start_state, target=self.target), self.steps, device=self.device)
        except RuntimeError as error:
            raise ValueError(f"device: {error}") from None

    def rule(self, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser of parameters."""
        if self.optimiser == "adam":
            return torch.optim.Adam(parameters, self.rate, eps=1e-7)
        return torch.optim.SGD(parameters, self.rate)


class Found(NamedTuple):
    """All that is drawn; rows of a plane are θ2, columns θ1, the flows come first."""

    axis: np.ndarray
    """θ1 and θ2 of the coloured points, shape (cells,)."""
    loss: np.ndarray
    """Shape (cells, cells)."""
    updates: np.ndarray
    """Shape (4, cells, cells, 2)."""
    share: np.ndarray
    """Antisymmetric part of the Jacobian relative to the whole, shape (4, cells, cells)."""
    minima: np.ndarray
    """Segments, shape (segments, 2, 2)."""
    tendencies: np.ndarray
    """Rate at which descent along each flow approaches the minima, shape (4, segments); negative: leads away."""
    paths: np.ndarray
    """Shape (4, iterations + 1, starts, 2); nan where a path has left the finite numbers."""
    path_losses: np.ndarray
    """Shape (4, iterations + 1, starts)."""
    arrived: np.ndarray
    """Share of a whole grid of starts from which each flow arrives, shape (4,)."""


def compute(settings: Settings) -> Found:
    """Evaluate the plane, trace the minima and run all optimisations."""
    landscape = settings.landscape()
    # points in the middle of the coloured squares
    axis = settings.reach * (2.0 * np.arange(settings.cells) + 1.0 - settings.cells) / settings.cells
    plane_points = np.stack(np.meshgrid(axis, axis), axis=-1)
    shape, points = plane_points.shape[:2], plane_points.reshape(-1, 2)
    at_points = landscape.evaluate(points, FLOWS)
    share = plane.rotation_share(landscape.jacobian(points, FLOWS))
    minima = landscape.minima((-settings.reach, settings.reach))
    paths = np.stack([find_paths(landscape, settings.starts, f, settings.rule, settings.iterations) for f in FLOWS])
    # a grid that leaves out the border
    ticks = settings.reach * np.linspace(-1.0, 1.0, GRID_STARTS + 2)[1:-1]
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    ends = [find_paths(landscape, grid, f, settings.rule, settings.iterations)[-1] for f in FLOWS]
    return Found(
        axis,
        at_points.loss.reshape(shape),
        at_points.updates.reshape(len(FLOWS), *shape, 2),
        share.reshape(len(FLOWS), *shape),
        minima,
        tendencies(landscape, minima),
        paths,
        losses_at(landscape, paths),
        (losses_at(landscape, np.stack(ends)) < SOLVED).mean(axis=1),
    )


def find_paths(
    landscape: Landscape,
    starts: np.ndarray | Sequence[Sequence[float]],
    flow: FlowLike,
    optimiser: Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer],
    iterations: int,
) -> np.ndarray:
    """Return the optimisation paths of one flow's update from many starts, all starts at once.

    Args:
        landscape: The plane.
        starts: Points θ, shape (B, 2).
        flow: The flow whose update the optimiser follows.
        optimiser: Makes an optimiser of the parameters that it is given; it must work number by number.
        iterations: Number of steps.

    Returns:
        Shape (iterations + 1, B, 2), float64; entry 0 is `starts`. A path that leaves the finite numbers is nan from
        there on.
    """
    path = np.full((iterations + 1, len(starts), 2), np.nan)
    path[0] = starts
    theta = torch.tensor(path[0])
    stepper = optimiser([theta])
    for before, after in pairwise(path):
        finite = np.isfinite(before).all(axis=1)
        if not finite.any():
            break
        theta.grad = torch.full_like(theta, torch.nan)
        theta.grad[finite] = torch.from_numpy(landscape.evaluate(before[finite], flow).updates[0])
        stepper.step()
        moved = theta.numpy()
        after[:] = np.where(np.isfinite(moved).all(axis=1, keepdims=True), moved, np.nan)
    return path


def losses_at(landscape: Landscape, points: np.ndarray) -> np.ndarray:
    """Losses at points (…, 2), nan where a point is."""
    flat = points.reshape(-1, 2)
    finite = np.isfinite(flat).all(axis=1)
    losses = np.full(len(flat), np.nan)
    if finite.any():
        losses[finite] = landscape.evaluate(flat[finite], ()).loss
    return losses.reshape(points.shape[:-1])


def tendencies(landscape: Landscape, minima: np.ndarray) -> np.ndarray:
    """Return at each segment of the minima the rate at which descent along each flow approaches, shape (4, segments).

    On the minima the Jacobian of an update has one eigenvalue besides 0, its trace. Where that is negative descent
    leads away, where it is 0 nothing moves.
    """
    if not len(minima):
        return np.zeros((len(FLOWS), 0))
    jacobians = landscape.jacobian(minima.reshape(-1, 2), FLOWS)
    return np.trace(jacobians, axis1=2, axis2=3).reshape(len(FLOWS), -1, 2).mean(axis=2)


def summarise(settings: Settings, found: Found) -> str:
    """The numbers of the picture."""
    sizes = np.hypot(*np.moveaxis(found.updates, -1, 0))
    lengths = np.hypot(*(found.minima[:, 1] - found.minima[:, 0]).T)
    rows: list[tuple[str, ...]] = [
        ("", "largest", "median", "median", "0.99", "minima", "minima", "starts", "grid"),
        ("", "|update|", "|update|", "rotation", "rotation", "it repels", "it ignores", "arrived", "arrived"),
    ]
    for i, letter in enumerate(FLOWS):
        share = np.abs(found.share[i])
        numbers = [sizes[i].max(), np.median(sizes[i]), np.nanmedian(share), np.nanquantile(share, 0.99)]
        repelled, ignored = (lengths[where].sum() for where in (found.tendencies[i] < 0.0, found.tendencies[i] == 0.0))
        of_minima = [f"{part / lengths.sum():.1%}" if len(lengths) else "-" for part in (repelled, ignored)]
        arrived = f"{(found.path_losses[i, -1] < SOLVED).sum()} of {len(settings.starts)}"
        words = [f"{number:.2g}" for number in numbers]
        rows.append((f"{letter} {resolve(letter).name}", *words, *of_minima, arrived, f"{found.arrived[i]:.1%}"))
    lines = [f"{row[0]:10}" + "".join(f"{word:>12}" for word in row[1:]) for row in rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, middle, high, largest = np.nanquantile(sizes[0] / sizes[1], [0.01, 0.5, 0.99, 1.0])
    zero = (found.updates[FLOWS.index("C")] == 0.0).all(axis=-1).mean()
    lines += [
        f"|R| / |M|: 0.01 quantile {low:.2g}, median {middle:.2g}, 0.99 quantile {high:.2g}, largest {largest:.2g}.",
        f"C is 0 on {zero:.1%} of the plane. Length of the minima: {lengths.sum():.2f}.",
        "Rotation: antisymmetric part of the update's Jacobian relative to the whole, 0 to 1.",
        f"Arrived: a loss below {SOLVED:g} after {settings.iterations} iterations; {GRID_STARTS}² starts in the grid.",
    ]
    return "\n".join(lines) + "\n"
