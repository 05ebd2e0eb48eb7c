"""Physical parameters from recorded trajectories: least squares with multiple shooting."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from warp_phys.core.arrays import shape_message
from warp_phys.core.checks import check_given, check_instance, check_number, range_of
from warp_phys.errors import Diverged, check_count
from warp_phys.interop.extras import require
from warp_phys.interop.torch.hybrid import Hybrid
from warp_phys.interop.torch.open_loop import finite_numbers, trajectory
from warp_phys.systems.base import System

TIGHTER = (1.0, 10.0, 100.0, 1000.0)
"""How far below the noise the gaps between segments are pressed, one fit after the other."""
DAMPING = 1e-3
"""Damping of the first step, relative to the squared columns of the Jacobian."""
LEAST_DAMPING, MOST_DAMPING = 1e-12, 1e12
"""Where even the shortest steps do not lower the sum of squares, it is at its least."""
MOST_CONDITION = 1e10
"""Condition of the scaled Jacobian above which parameters count as not determined."""
TOLERANCE = 1e-10
"""A fit ends where a step would lower the sum of squares by less than this share."""


@dataclass(frozen=True)
class Identified:
    """What `identify` found; `print` shows values and intervals."""

    system: System | Hybrid
    """The system with the values found."""
    values: Mapping[str, float]
    """The values found."""
    covariance: np.ndarray
    """Their covariance, (JᵀJ)⁻¹ of the weighted residuals, initial states eliminated; shape (P, P)."""
    noise: np.ndarray
    """Standard deviation of the noise of each component, as given or as estimated, shape (D,)."""
    freedom: float
    """Measured numbers less fitted ones where the noise was estimated, else infinity."""
    measured: np.ndarray
    """What was recorded, shape (steps + 1, batch, D)."""
    states: np.ndarray
    """What the segments give with the values found, shape (steps + 1, batch, D)."""
    gaps: np.ndarray
    """What is left between the end of a segment and the start of the next, shape (segments − 1, batch, D)."""
    times: np.ndarray
    """Time of each state [s], in steps where the system has no dt; shape (steps + 1,)."""
    iterations: int
    """Linearisations that were needed."""
    converged: bool
    """Whether the last fit has come to its end."""

    @property
    def residuals(self) -> np.ndarray:
        """Measured less simulated states, shape (steps + 1, batch, D)."""
        return self.measured - self.states

    @property
    def deviations(self) -> dict[str, float]:
        """Standard deviation of each value."""
        return dict(zip(self.values, np.sqrt(np.diag(self.covariance)).tolist(), strict=True))

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Return confidence intervals, each parameter by itself.

        They are those of the linearised problem, without regard to bounds: normal where the noise was given, Student's
        where it was estimated.

        Args:
            level: Share of repetitions in which an interval covers the truth.

        Raises:
            TypeError, ValueError: No number between 0 and 1.
        """
        check_number("level", level, positive=True)
        if level >= 1.0:
            raise ValueError(f"level must be below 1, got {level}")
        from scipy.special import ndtri, stdtrit  # noqa: PLC0415

        above = 0.5 + level / 2.0
        factor = float(ndtri(above) if math.isinf(self.freedom) else stdtrit(self.freedom, above))
        return {
            name: (self.values[name] - factor * deviation, self.values[name] + factor * deviation)
            for name, deviation in self.deviations.items()
        }

    def picture(self, sample: int = 0) -> Any:
        """Return a matplotlib figure of one trajectory, measured and simulated, a panel for each component.

        Args:
            sample: Which trajectory.

        Raises:
            ImportError: matplotlib is not there.
            ValueError: There is no such trajectory.
        """
        if not 0 <= sample < self.states.shape[1]:
            raise ValueError(f"sample must be from 0 to {self.states.shape[1] - 1}, got {sample}")
        require("matplotlib", "plots")
        from matplotlib.figure import Figure  # noqa: PLC0415

        names = self.system.states
        figure = Figure(figsize=(7.0, 1.0 + 1.4 * len(names)), layout="constrained")
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for d, (axes, name) in enumerate(zip(panels, names, strict=True)):
            axes.plot(self.times, self.measured[:, sample, d], ".", color="0.6", markersize=4, label="measured")
            axes.plot(self.times, self.states[:, sample, d], color="C0", linewidth=1.2, label="simulated")
            axes.set_ylabel(name)
        panels[0].legend(loc="best")
        panels[-1].set_xlabel("time [s]" if hasattr(self.system, "dt") else "step")
        return figure

    def __str__(self) -> str:
        """A line for each parameter."""
        intervals = self.intervals()
        width = max(map(len, self.values))
        lines = [
            f"{name:{width}}  {self.values[name]:.6g}  95 % from {low:.6g} to {high:.6g}"
            for name, (low, high) in intervals.items()
        ]
        return "\n".join(lines if self.converged else [*lines, "the fit has not converged"])


def identify(
    system: System | Hybrid,
    states: Any,
    controls: Any,
    parameters: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]] | None = None,
    shooting: int | None = None,
    noise: Any = None,
    inputs: Any = None,
    iterations: int = 100,
) -> Identified:
    """Return the physical parameters with which a system repeats what was recorded.

    Least squares of measured less simulated states, each component weighted by its noise. Unknown are the parameters
    and the initial state of every trajectory. With `shooting`, trajectories are cut into segments of so many steps,
    whose initial states are unknowns as well, at first those measured: no simulation is longer than a segment, so a
    wrong parameter cannot lead it away. What gaps the segments leave is pressed to a thousandth of the noise, in four
    fits, so that in the end each trajectory is one again. That is what chaotic or unstable systems need.

    Each fit is Levenberg and Marquardt's method. The Jacobian is exact: those of all single steps come from one batch
    of one step, and are multiplied along the segments. Initial states are eliminated segment by segment, by orthogonal
    transformations; what is left, as small as the parameters are few, goes to `scipy.optimize.lsq_linear` with its
    bounds. All numbers are float64.

    Args:
        system: A `System`, or a `Hybrid` whose module is float64 and stays as it is; what is not identified keeps its
            numbers.
        states: Recorded states, shape (steps + 1, batch, D): torch, numpy or nested lists.
        controls: Recorded controls, shape (steps, batch, K) or (steps, 1, K).
        parameters: What is sought, by name, with start values.
        bounds: Least and largest values by name; those without have none, but what must be positive stays so.
        shooting: Steps of a segment; all of them if None: single shooting.
        noise: Standard deviation of the noise, a number or one for each component, shape (D,); estimated if None, which
            takes two fits more.
        inputs: For systems that have inputs, as in `trajectory`.
        iterations: Linearisations at most, in all.

    Raises:
        ImportError: scipy is not there.
        TypeError, ValueError: Arguments that do not fit.
        Diverged: With the start values a state is not finite.

    >>> from warp_phys import CartPole
    >>> x0, forces = torch.from_numpy(CartPole().sample(8)).double(), torch.ones(20, 8, 1, dtype=torch.float64)
    >>> recorded = trajectory(CartPole(half_length=0.4), x0, forces)
    >>> found = identify(CartPole(), recorded, forces, {"half_length": 0.6}, {"half_length": (0.1, 2.0)}, noise=0.01)
    >>> round(found.values["half_length"], 6)
    0.4
    """
    require("scipy", "scipy")
    check_instance("system", system)
    if not isinstance(system, System | Hybrid):
        raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}")
    record = _record(system, states, controls, inputs)
    steps, batch, size = len(record.states) - 1, record.states.shape[1], system.state_size
    names, start, low, high = _checked(system, parameters, bounds or {})
    length = steps if shooting is None else min(check_count("shooting", shooting), steps)
    given = _noise(system, noise)
    freedom = (steps + 1) * batch - batch - len(names) / size
    if freedom <= 0.0:
        raise ValueError(
            f"states must hold more numbers than are sought: {record.states.numel()} are recorded, "
            f"{batch * size + len(names)} are sought"
        )
    problem = _Problem(system, names, record, length, low, high)
    deviation = torch.as_tensor(given).to(record.states) if given is not None else _spread(record.states)
    fit = _Fit(problem, start, check_count("iterations", iterations))
    for tightness in TIGHTER if problem.count > 1 else TIGHTER[:1]:
        converged = fit.run(deviation, tightness)
    for _ in range(0 if given is not None else 2):
        residuals = record.states - problem.joined(fit.states)
        least = 1e-10 * _spread(record.states)
        deviation = torch.maximum((residuals.square().sum(dim=(0, 1)) / freedom).sqrt(), least)
        converged = fit.run(deviation, TIGHTER[-1])
    return fit.result(deviation, converged, math.inf if given is not None else freedom * size)


class _Record(NamedTuple):
    states: torch.Tensor
    controls: torch.Tensor
    inputs: torch.Tensor | None


def _record(system: System | Hybrid, states: Any, controls: Any, inputs: Any) -> _Record:
    """Return what was recorded in float64, all samples with controls and inputs of their own."""
    if (inputs is None) != (not system.inputs):
        needed = ", ".join(system.inputs)
        raise ValueError(f"{type(system).__name__} has inputs ({needed}): give inputs" if needed else
                         f"{type(system).__name__} has no inputs")  # fmt: skip
    x, c = finite_numbers("states", states), finite_numbers("controls", controls)
    if x.ndim != 3 or len(x) < 2 or x.shape[1] == 0 or x.shape[2] != system.state_size:
        wanted = ("steps + 1", "batch", system.state_size)
        raise ValueError(shape_message("states", wanted, x.shape, ", ".join(system.states)))
    steps, batch, place = len(x) - 1, x.shape[1], x.device
    if c.ndim != 3 or len(c) != steps or c.shape[1] not in (1, batch) or c.shape[2] != system.control_size:
        expected = (steps, batch, system.control_size)
        raise ValueError(shape_message("controls", expected, c.shape, ", ".join(system.controls)))
    w = None
    if inputs is not None:
        given = finite_numbers("inputs", inputs).to(place)
        w = given[:, None] if given.ndim == 2 else given
        if w.ndim != 3 or len(w) != steps or w.shape[1] not in (1, batch) or w.shape[2] != system.input_size:
            expected = (steps, batch, system.input_size)
            raise ValueError(shape_message("inputs", expected, given.shape, ", ".join(system.inputs)))
        w = w.expand(-1, batch, -1)
    return _Record(x, c.to(place).expand(-1, batch, -1), w)


def _checked(
    system: System | Hybrid, parameters: Any, bounds: Any
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Return names, start values and bounds of what is sought."""
    check_given(system.parameter_names, parameters)
    if not parameters:
        raise ValueError(f"parameters must name what is sought, among {', '.join(system.parameter_names)}")
    if not isinstance(bounds, Mapping):
        raise TypeError(f"bounds must be a mapping of names to (least, largest), got {type(bounds).__name__}")
    unknown = [str(name) for name in bounds if name not in parameters]
    if unknown:
        raise ValueError(f"bounds of {', '.join(unknown)} are given, which are not among the parameters sought")
    starts, lows, highs = [], [], []
    lowest = {"positive": np.finfo(float).tiny, "not negative": 0.0}
    for name, value in parameters.items():
        check_number(f"parameter {name}", value)
        least = lowest.get(range_of(system, name), -math.inf)
        try:
            low, high = (float(end) for end in bounds.get(name, (-math.inf, math.inf)))
        except (TypeError, ValueError):
            raise TypeError(f"bounds of {name} must be two numbers, got {bounds[name]!r}") from None
        if not low < high:
            raise ValueError(f"bounds of {name} must be a smaller and a larger number, got {low} and {high}")
        low = max(low, least)
        if not low <= float(value) <= high:
            raise ValueError(f"parameter {name} must start between its bounds {low} and {high}, got {float(value)}")
        for numbers, number in ((starts, float(value)), (lows, low), (highs, high)):
            numbers.append(number)
    return tuple(parameters), np.array(starts), np.array(lows), np.array(highs)


def _noise(system: System | Hybrid, noise: Any) -> np.ndarray | None:
    if noise is None:
        return None
    try:
        numbers = np.asarray(noise, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"noise must be a number or one for each component, got {noise!r}") from None
    if numbers.shape not in ((), (1,), (system.state_size,)):
        raise ValueError(shape_message("noise", (system.state_size,), numbers.shape, ", ".join(system.states)))
    if not (np.isfinite(numbers).all() and (numbers > 0.0).all()):
        raise ValueError(f"noise must be positive, got {noise!r}")
    return np.broadcast_to(numbers, (system.state_size,)).copy()


def _spread(states: torch.Tensor) -> torch.Tensor:
    """Return how far each component goes about, for a scale: never zero."""
    spread = states.std(dim=(0, 1))
    return torch.where(spread > 0.0, spread, torch.ones_like(spread))


class _Problem:
    """Trajectories cut into segments; what they give with parameters p and initial states s, and its derivatives.

    Segments are samples: (L + 1, S, B, D) for S segments of L steps. The last one may be shorter: it goes on with the
    last control, and what it then gives is not looked at.
    """

    def __init__(
        self, system: System | Hybrid, names: tuple[str, ...], record: _Record, length: int, low: np.ndarray,
        high: np.ndarray,
    ):  # fmt: skip
        self.system, self.names, self.record, self.low, self.high = system, names, record, low, high
        steps = len(record.states) - 1
        self.length, self.count = length, -(-steps // length)
        places = torch.arange(length + 1)[:, None] + length * torch.arange(self.count)
        last = torch.arange(self.count) == self.count - 1
        self.own = (places <= steps) & ((torch.arange(length + 1) < length)[:, None] | last)
        self.places = places.clamp(max=steps).to(record.states.device)
        self.own = self.own.to(record.states.device)
        self.measured = record.states[self.places]
        before = self.places[:length].clamp(max=steps - 1)
        self.controls = record.controls[before]
        self.inputs = None if record.inputs is None else record.inputs[before]

    def simulate(self, p: np.ndarray, starts: torch.Tensor) -> torch.Tensor:
        """Return the states of all segments, shape (L + 1, S, B, D)."""
        controls, inputs = self.controls.flatten(1, 2), None if self.inputs is None else self.inputs.flatten(1, 2)
        values = dict(zip(self.names, p.tolist(), strict=True))
        with torch.no_grad():
            states = trajectory(self.system, starts.flatten(0, 1), controls, values, inputs)
        return states.reshape(self.length + 1, *starts.shape)

    def sensitivities(self, p: np.ndarray, states: torch.Tensor) -> torch.Tensor:
        """Return ∂x/∂(s, p) of all states, shape (L + 1, S, B, D, D + P)."""
        at_state, at_parameters = self._of_steps(p, states)
        size, total = states.shape[-1], states.shape[-1] + len(p)
        out = states.new_zeros((*states.shape, total))
        out[0, ..., :size] = torch.eye(size).to(states)
        for n in range(self.length):
            torch.matmul(at_state[n], out[n], out=out[n + 1])
            out[n + 1, ..., size:] += at_parameters[n]
        return out

    def _of_steps(self, p: np.ndarray, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ∂S/∂x and ∂S/∂p of every step: one batch of one step, each row once for each component of S."""
        size, shape = states.shape[-1], states.shape[:-1]
        rows = states[:-1].reshape(-1, size).repeat(size, 1).requires_grad_()

        def repeated(given: torch.Tensor) -> torch.Tensor:
            return given.reshape(1, -1, given.shape[-1]).repeat(1, size, 1)

        controls, inputs = repeated(self.controls), None if self.inputs is None else repeated(self.inputs)
        own = [torch.full((len(rows),), value).to(rows).requires_grad_() for value in p.tolist()]
        seeds = torch.eye(size).to(rows).repeat_interleave(len(rows) // size, dim=0)
        with torch.enable_grad():
            after = trajectory(self.system, rows, controls, dict(zip(self.names, own, strict=True)), inputs)[1]
            by_state, *by_parameter = torch.autograd.grad(after, [rows, *own], seeds)
        whole = (size, self.length, *shape[1:])
        at_state = by_state.reshape(*whole, size).movedim(0, -2)
        return at_state, torch.stack(by_parameter, dim=-1).reshape(*whole, len(p)).movedim(0, -2)

    def joined(self, states: torch.Tensor) -> torch.Tensor:
        """Return segments as trajectories again, shape (steps + 1, B, D)."""
        out = torch.empty_like(self.record.states)
        out[self.places[self.own]] = states[self.own]
        return out


class _Rows(NamedTuple):
    """The linearised problem: rows with columns [δs, δp, right side]."""

    measured: torch.Tensor
    """Of what was measured, as a triangle, (S, B, rows, D + P + 1)."""
    gaps: torch.Tensor
    """Of the gaps but for the next segment's δs, (S − 1, B, D, D + P + 1)."""
    weight: torch.Tensor
    """What a gap weighs, (D,)."""


class _Fit:
    """Levenberg and Marquardt's method for parameters and the initial states of all segments."""

    def __init__(self, problem: _Problem, start: np.ndarray, iterations: int):
        self.problem, self.p, self.left, self.iterations = problem, start, iterations, 0
        self.starts = problem.measured[0].clone()
        self.states = problem.simulate(self.p, self.starts)

    def run(self, noise: torch.Tensor, tightness: float) -> bool:
        """Lower the sum of squares until it goes no lower; returns whether it got there."""
        damping, cost = DAMPING, self._cost(self.states, self.starts, noise, tightness)
        while self.left > 0:
            self.left, self.iterations = self.left - 1, self.iterations + 1
            rows, lower = self._rows(noise, tightness), math.inf
            while not lower < cost:
                p, starts, expected = self._step(rows, damping)
                if cost - expected <= TOLERANCE * cost:
                    return True
                if damping > MOST_DAMPING:
                    return math.isfinite(lower)
                try:
                    states = self.problem.simulate(p, starts)
                    lower = self._cost(states, starts, noise, tightness)
                except Diverged:
                    lower = math.inf
                good = cost - lower > 0.25 * (cost - expected)
                damping = max(damping / 8.0, LEAST_DAMPING) if good else damping if lower < cost else damping * 8.0
            self.p, self.starts, self.states, cost = p, starts, states, lower
        return False

    def result(self, noise: torch.Tensor, converged: bool, freedom: float) -> Identified:
        """Return what was found."""
        problem, system = self.problem, self.problem.system
        matrix, _, _ = self._eliminate(self._rows(noise, TIGHTER[-1]), 0.0)
        steps = np.arange(len(problem.record.states))
        values = dict(zip(problem.names, self.p.tolist(), strict=True))
        host = [t.cpu().numpy() for t in (noise, problem.record.states, problem.joined(self.states))]
        gaps = (self.starts[1:] - self.states[-1, :-1]).cpu().numpy()
        return Identified(
            system.with_parameters(values), values, _covariance(matrix), host[0], freedom, host[1], host[2], gaps,
            steps * getattr(system, "dt", 1.0), self.iterations, converged,
        )  # fmt: skip

    def _residuals(
        self, states: torch.Tensor, starts: torch.Tensor, noise: torch.Tensor, tightness: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what was measured otherwise, and the gaps between segments, both in units of their noise."""
        off = torch.where(self.problem.own[:, :, None, None], (self.problem.measured - states) / noise, 0.0)
        return off, (starts[1:] - states[-1, :-1]) * (tightness / noise)

    def _cost(self, *arguments: Any) -> float:
        return sum(float(part.square().sum()) for part in self._residuals(*arguments))

    def _rows(self, noise: torch.Tensor, tightness: float) -> _Rows:
        along = self.problem.sensitivities(self.p, self.states)
        off, gaps = self._residuals(self.states, self.starts, noise, tightness)
        mask, weight = self.problem.own[:, :, None, None, None], tightness / noise
        measured = torch.cat([torch.where(mask, along / noise[:, None], 0.0), off[..., None]], dim=-1)
        measured = torch.linalg.qr(measured.movedim(0, 2).flatten(2, 3), mode="r")[1]
        return _Rows(measured, torch.cat([along[-1, :-1] * weight[:, None], gaps[..., None]], dim=-1), weight)

    def _eliminate(self, rows: _Rows, damping: float) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
        """Eliminate initial states, segment after segment, by orthogonal transformations.

        Returns:
            What is left of the linearised problem, min |A δp − b|²; and the rows, a segment each, that then give its
            δs: columns [δs, δs of the next segment, δp, right side], the last one's without the second.
        """
        count, batch, _, width = rows.measured.shape
        size = self.starts.shape[-1]
        scale = rows.measured[..., :size].square().sum(dim=2).sqrt() * math.sqrt(damping)
        damped = torch.nn.functional.pad(torch.diag_embed(scale), (0, width - size))
        next_start = -torch.diag_embed(rows.weight.expand(batch, -1))
        carried, local = rows.measured.new_zeros((batch, 0, width)), []
        for j in range(count):
            mine = torch.cat([carried, rows.measured[j], damped[j]], dim=1)
            if j < count - 1:
                gap, none = rows.gaps[j], mine.new_zeros((*mine.shape[:2], size))
                gap = torch.cat([gap[..., :size], next_start, gap[..., size:]], dim=-1)
                mine = torch.cat([gap, torch.cat([mine[..., :size], none, mine[..., size:]], dim=-1)], dim=1)
            triangle = torch.linalg.qr(mine, mode="r")[1]
            local.append(triangle[:, :size])
            carried = triangle[:, size:, size:]
        left = torch.linalg.qr(carried.flatten(0, 1), mode="r")[1].cpu().numpy()
        if not np.isfinite(left).all():
            raise ValueError(
                "the least-squares problem is not finite: states are too large, or change too much with the "
                "parameters; use other units, or a smaller shooting"
            )
        matrix, right = left[:, :-1], left[:, -1]
        if damping:
            own = np.diag(math.sqrt(damping) * np.linalg.norm(matrix, axis=0))
            matrix, right = np.vstack([matrix, own]), np.concatenate([right, np.zeros(len(own))])
        return matrix, right, local

    def _step(self, rows: _Rows, damping: float) -> tuple[np.ndarray, torch.Tensor, float]:
        """Return parameters and initial states after a step, and the sum of squares that the linear problem expects."""
        from scipy.optimize import lsq_linear  # noqa: PLC0415

        matrix, right, local = self._eliminate(rows, damping)
        low, high, size = self.problem.low, self.problem.high, self.starts.shape[-1]
        solution = lsq_linear(matrix, right, (low - self.p, high - self.p), method="bvls")
        change, below, changes = torch.from_numpy(solution.x).to(self.starts), None, []
        for triangle in reversed(local):
            known = triangle[..., -1] - triangle[..., -1 - len(change) : -1] @ change
            if below is not None:
                known = known - (triangle[..., size : 2 * size] @ below[..., None])[..., 0]
            below = torch.linalg.solve_triangular(triangle[..., :size], known[..., None], upper=True)[..., 0]
            changes.append(below)
        starts = self.starts + torch.stack(changes[::-1])
        return np.clip(self.p + solution.x, low, high), starts, 2.0 * float(solution.cost)


def _covariance(matrix: np.ndarray) -> np.ndarray:
    """Return (AᵀA)⁻¹; infinite where the rows do not determine all parameters."""
    scale = np.linalg.norm(matrix, axis=0)
    if not scale.all() or np.linalg.cond(matrix / scale) > MOST_CONDITION:
        return np.full((len(scale), len(scale)), math.inf)
    inverse = np.linalg.pinv(matrix / scale)
    return inverse @ inverse.T / np.outer(scale, scale)
