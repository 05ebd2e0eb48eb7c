"""What is measured: a system, its size, a flow, a batch; and numbers to start from, the same for every contestant.

Only numpy is used here: a contestant's process imports no more than its own framework.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Published(NamedTuple):
    """Sizes of a published experiment."""

    sizes: Mapping[str, int]
    """The system's own sizes, by name."""
    steps: int
    dt: float
    width: int
    """Width of both hidden layers, or channels of both convolutions."""
    when: str
    """Times at which the loss looks at the states, as for `System.loss`."""
    control_cost: float


# Quantum's target is an eigenstate that the initial states hold a part of. Their overlap with a published one (3 to 5)
# is nearly zero before training: a gradient of mere rounding, by which contestants could not be compared.
PUBLISHED: Mapping[str, Published] = {
    "cartpole": Published({"poles": 4}, 100, 0.01, 100, "final", 0.0),
    "repulsion": Published({"drivers": 2, "evaders": 4}, 60, 4.0 / 60.0, 100, "every", 0.001),
    "quantum": Published({"points": 32, "target": 2}, 128, 1.0 / 16.0, 60, "every", 0.0),
}
FLOWS = ("R", "M", "C")
RATE = 1e-3
"""Learning rate of Adam."""
EPSILON = 1e-8
"""Term that keeps Adam's division finite."""
TRAIN_STATES = 256
"""Initial states, through which updates go batch by batch; more where a batch is larger."""


@dataclass(frozen=True)
class Case:
    """One line of a table: everything that decides the work of an update."""

    system: str
    flow: str
    batch: int
    sizes: dict[str, int] = field(default_factory=dict)
    """The system's sizes, complete."""
    steps: int = 0
    dt: float = 0.0
    device: str = "cpu"

    @property
    def published(self) -> Published:
        """The published experiment with this system."""
        return PUBLISHED[self.system]

    @property
    def name(self) -> str:
        """The case in words, unique in a run."""
        sizes = " ".join(f"{name} {value}" for name, value in self.sizes.items() if name != "target")
        return f"{self.system} {sizes}, {self.steps} steps, {self.flow}, batch {self.batch}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, to send to a process."""
        return asdict(self)


def make_case(system: str, flow: str, batch: int, device: str = "cpu", steps: int = 0, **sizes: int) -> Case:
    """Return a case with the published sizes where none are given.

    Another number of steps cuts the same physical time into more or fewer of them: gradients over a longer time would
    overflow, and what is measured is the cost.

    >>> make_case("cartpole", "C", 8, poles=2).name
    'cartpole poles 2, 100 steps, C, batch 8'
    """
    published = PUBLISHED[system]
    steps = steps or published.steps
    dt = published.dt * published.steps / steps
    return Case(system, flow, batch, {**published.sizes, **sizes}, steps, dt, device)


def state_size(case: Case) -> int:
    """Numbers D of a state."""
    sizes = case.sizes
    match case.system:
        case "cartpole":
            return 2 * (sizes["poles"] + 1)
        case "repulsion":
            return 4 * (sizes["drivers"] + sizes["evaders"])
        case _:
            return 2 * sizes["points"]


def control_size(case: Case) -> int:
    """Numbers K of a control."""
    return 2 * case.sizes["drivers"] if case.system == "repulsion" else 1


def grid_lengths(points: int) -> tuple[int, int]:
    """Points that are left after each of two convolutions of kernel 3 and stride 2.

    >>> grid_lengths(32)
    (15, 7)
    """
    first = (points - 3) // 2 + 1
    return first, (first - 3) // 2 + 1


def weight_shapes(case: Case) -> list[tuple[tuple[int, ...], int, int]]:
    """Shape, inputs and outputs of each weight: (inputs, outputs), or (kernel, channels in, channels out)."""
    width, outputs = case.published.width, control_size(case)
    if case.system == "quantum":
        last = grid_lengths(case.sizes["points"])[1] * width
        convolutions = [((3, channels, width), 3 * channels, 3 * width) for channels in (2, width)]
        return [*convolutions, ((last, outputs), last, outputs)]
    widths = [state_size(case), width, width, outputs]
    return [((a, b), a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]


def make_weights(case: Case, seed: int = 0) -> list[np.ndarray]:
    """Return Glorot-uniform weights and zero biases in turn, float32; with many evaders smaller controls."""
    generator, found = np.random.default_rng(1000 + seed), []
    for shape, inputs, outputs in weight_shapes(case):
        limit = np.sqrt(6.0 / (inputs + outputs))
        found += [generator.uniform(-limit, limit, shape), np.zeros(shape[-1])]
    if case.system == "repulsion":
        # drivers are steered along a sum over all evaders: many of them would make a trajectory that rounding decides
        found[-2] *= case.published.sizes["evaders"] / case.sizes["evaders"]
    return [array.astype(np.float32) for array in found]


def make_batches(case: Case, seed: int = 0) -> list[np.ndarray]:
    """Return batches of initial states (batch, D), float32, distributed as published."""
    count = max(TRAIN_STATES, case.batch)
    generator = np.random.default_rng(42 + seed)
    make = {"cartpole": _hanging_poles, "repulsion": _resting_agents, "quantum": _superpositions}[case.system]
    states = make(generator, count, case.sizes).reshape(count, -1).astype(np.float32)
    return [states[i : i + case.batch] for i in range(0, count - case.batch + 1, case.batch)]


def _hanging_poles(generator: np.random.Generator, count: int, sizes: Mapping[str, int]) -> np.ndarray:
    states = generator.uniform(-1.0, 1.0, (count, sizes["poles"] + 1, 2))
    states[:, 1:, 0] = np.pi + states[:, 1:, 0] * np.pi / 6
    return states


def _resting_agents(generator: np.random.Generator, count: int, sizes: Mapping[str, int]) -> np.ndarray:
    drivers, evaders = sizes["drivers"], sizes["evaders"]
    states = np.zeros((count, drivers + evaders, 2, 2))

    def ring(inner: float, agents: int) -> np.ndarray:
        radius = generator.uniform(inner, inner + 1.0, (count, agents))
        angle = generator.uniform(0.0, 2 * np.pi, (count, agents))
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)

    states[:, :drivers, 0] = ring(3.0, drivers)
    states[:, drivers:, 0] = ring(1.0, 1) + generator.uniform(-0.5, 0.5, (count, evaders, 2))
    return states


def _superpositions(generator: np.random.Generator, count: int, sizes: Mapping[str, int]) -> np.ndarray:
    amplitudes = generator.normal(size=(count, 2)) * np.exp(2j * np.pi * generator.uniform(size=(count, 2)))
    amplitudes /= np.linalg.norm(amplitudes, axis=1, keepdims=True)
    psi = amplitudes @ np.stack([eigenstate(1, sizes["points"]), eigenstate(2, sizes["points"])])
    return np.stack([psi.real, psi.imag], axis=-1)


def eigenstate(number: int, points: int) -> np.ndarray:
    """Eigenstate of the untilted well, shape (points,), normalised."""
    values = np.sin(np.pi * number / (points + 1) * np.arange(1, points + 1))
    return values / np.linalg.norm(values)
