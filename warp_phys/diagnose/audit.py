"""Whether a simulator's vector-Jacobian products are the derivatives of its steps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import warp as wp

from warp_phys.core.arrays import numpy_type, real_type, shape_message
from warp_phys.core.checks import check_device, check_finite_array, check_number, check_seed, numbers_of
from warp_phys.errors import check_count, shown
from warp_phys.rollout import check_sizes
from warp_phys.systems.base import Simulator, System

TOLERANCES = {np.float32: 1e-3, np.float64: 1e-6}
DIFFERENCES = {np.float32: 0.1 / 2.5 ** np.arange(6), np.float64: 0.1 / 8.0 ** np.arange(6)}
"""Step sizes of the differences, in units of a component's size."""
SAFETY = 5.0
"""How many times what the differences leave uncertain an error has to be."""
ROUNDINGS = 20.0
"""Roundings of the largest derivative by a component that a backward pass may make in the others."""


class Finding(NamedTuple):
    """One component of x_0 or of c_0, over one horizon."""

    horizon: int
    """Number T of steps."""
    kind: str
    """"state" or "control": whether it is the adjoint of a component of x_0 or of c_0."""
    component: str
    """Name of that component, or its number."""
    error: float
    """Largest disagreement of ∂x_T / ∂ component with the differences, as a share of its largest entry."""
    through: tuple[str, ...]
    """Components of x_T whose derivatives are wrong, the worst first; empty if none is."""
    judged: float
    """Share of the derivatives that the differences know better than to a tenth of the component's largest one."""
    cosine: float = 1.0
    """Cosine between ∂x_T / ∂ component and the differences, over samples and components of x_T."""

    @property
    def ok(self) -> bool:
        """Whether all derivatives agree within the tolerance."""
        return not self.through

    @property
    def unclear(self) -> bool:
        """Whether adjoint and differences disagree by more than a tenth where the differences are no better."""
        return self.ok and self.error > 0.1


@dataclass(frozen=True)
class Audit:
    """What `audit` found; `print` shows it as a table."""

    system: str
    """The simulator."""
    tolerance: float
    """Relative error that is allowed."""
    findings: tuple[Finding, ...]
    """One per horizon and component."""
    exact: bool = True
    """Whether adjoints are meant to be the derivatives; those of a `Surrogate` are not, and have no failures."""
    cosines: tuple[tuple[int, float], ...] = ()
    """Of each horizon, the cosine between the whole Jacobian and the differences."""

    def cosine(self, horizon: int) -> float:
        """Return the cosine between ∂x_T / ∂(x_0, c_0) and the differences, each component in units of its size.

        It is what a gradient's direction is worth: 1 where adjoints are exact, 0 where they say nothing.
        """
        return dict(self.cosines)[horizon]

    @property
    def ok(self) -> bool:
        """Whether there is no failure; findings that are unclear are none."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What disagrees with the differences."""
        return tuple(finding for finding in self.findings if not finding.ok)

    @property
    def unclear(self) -> tuple[Finding, ...]:
        """What could not be told: a step that jumps or has a kink, or differences that drown in rounding."""
        return tuple(finding for finding in self.findings if finding.unclear and self.exact)

    def components(self, kind: str) -> tuple[str, ...]:
        """Return the names of the components of this kind, "state" or "control", that fail over some horizon."""
        return tuple(dict.fromkeys(f.component for f in self.failures if f.kind == kind))

    def __str__(self) -> str:
        if not self.exact:
            return self._angles()
        count = len(self.findings)
        wrong, unclear = len(self.failures), len(self.unclear)
        verdict = f"{count - wrong - unclear} of {count} adjoints agree with finite differences"
        verdict += f", {wrong} are wrong" * bool(wrong) + f", {unclear} are unclear" * bool(unclear)
        lines = [f"{self.system}: {verdict} (tolerance {self.tolerance:g})"]
        width = max(len(f.component) for f in self.findings)
        lines.append(f"{'steps':>5}  {'adjoint of':<{width + 8}}  {'error':>8}  judged")
        for f in self.findings:
            note = "  unclear" if f.unclear else ""
            if not f.ok:
                note = f"  WRONG through {', '.join(f.through[:3])}{', …' if len(f.through) > 3 else ''}"
            lines.append(
                f"{f.horizon:>5}  {f'{f.kind} {f.component}':<{width + 8}}  {f.error:>8.1e}  {f.judged:>6.0%}{note}"
            )
        return "\n".join(lines)

    def _angles(self) -> str:
        """Return the table of adjoints that are not meant to be exact."""
        lines = [f"{self.system}: adjoints that are not exact, and the angle between them and finite differences"]
        width = max(len(f.component) for f in self.findings)
        lines.append(f"{'steps':>5}  {'adjoint of':<{width + 8}}  {'cosine':>6}  {'error':>8}  judged")
        for horizon, cosine in self.cosines:
            lines.append(f"{horizon:>5}  {'all':<{width + 8}}  {cosine:>6.3f}")
            for f in (f for f in self.findings if f.horizon == horizon):
                what = f"{f.kind} {f.component}"
                lines.append(f"{'':>5}  {what:<{width + 8}}  {f.cosine:>6.3f}  {f.error:>8.1e}  {f.judged:>6.0%}")
        return "\n".join(lines)


def audit(
    system: Simulator,
    states: Any = None,
    controls: Any = None,
    *,
    horizons: Sequence[int] = (1, 2, 8),
    samples: int | None = None,
    tolerance: float | None = None,
    differences: Sequence[float] | None = None,
    kick: float = 1.0,
    seed: int = 0,
    dtype: Any = None,
    device: Any = None,
) -> Audit:
    """Compare a simulator's vector-Jacobian products with finite differences of its steps.

    Over each horizon T the whole Jacobian of x_T by x_0 and by c_0 is found twice: from `step_vjp`, chained as a
    rollout chains it, and from central differences of `step` with a sweep of step sizes, extrapolated. Where
    neighbouring step sizes disagree, the difference counts as uncertainty, not as an error.

    It costs (D + K) · 2 · len(differences) unrollings and D backward passes per horizon.

    A `Surrogate`, or any simulator whose attribute `exact` is False, has no failures: cosines say how far its
    derivatives point where the differences do.

    Args:
        system: Anything with `step` and `step_vjp`.
        states: x_0, shape (samples, D), numpy; `system.sample` if None.
        controls: c_0 … , shape (longest horizon, samples, K), numpy; normal numbers if None.
        horizons: Numbers of steps T.
        samples: How many samples are drawn; `system.worlds` where there is such a number, else 3.
        tolerance: Relative error of a derivative that is allowed; 1e-3 in float32, 1e-6 in float64 if None.
        differences: Step sizes, descending by a constant factor, in units of a component's root mean square (at least
            0.1); at least four.
        kick: Size of the controls that are drawn.
        seed: Of what is drawn.
        dtype: float32 or float64; `system.dtype` where there is one, else float64.
        device: Warp device; `system.device` where there is one, else "cpu".

    Raises:
        TypeError, ValueError: Arguments that do not fit; a step that gives numbers that are not finite, with what it
            was given.

    >>> from warp_phys import CartPole
    >>> report = audit(CartPole(), horizons=(1, 2))
    >>> report.ok, report.components("state")
    (True, ())
    """
    check_sizes(system, object())
    dtype = numpy_type(real_type(getattr(system, "dtype", np.float64) if dtype is None else dtype))
    check_number("kick", kick, least=0.0)
    check_seed(seed)
    if tolerance is not None:
        check_number("tolerance", tolerance, positive=True)
    if not isinstance(horizons, Iterable):
        raise TypeError(f"horizons must be numbers of steps, got {shown(horizons)}")
    horizons = [check_count("horizons", horizon) for horizon in horizons]
    if not horizons:
        raise ValueError("horizons must have at least one number of steps, got none")
    x0, c = _inputs(system, states, controls, max(horizons), samples, kick, seed, dtype)
    sweep = _check_differences(DIFFERENCES[dtype] if differences is None else differences)
    tolerance = TOLERANCES[dtype] if tolerance is None else float(tolerance)
    scale = _sizes(x0, c)
    runner = _Runner(system, dtype, check_device(getattr(system, "device", "cpu") if device is None else device))
    findings: list[Finding] = []
    exact, cosines = bool(getattr(system, "exact", True)), []
    for horizon in horizons:
        found = runner.jacobian(x0, c[:horizon])
        expected, noise = _differences(runner, x0, c[:horizon], sweep)
        findings += _compare(runner, horizon, found, expected, noise, tolerance, exact)
        cosines.append((horizon, _cosine(found * scale, expected * scale)))
    return Audit(str(system), tolerance, tuple(findings), exact, tuple(cosines))


def _inputs(system, states, controls, steps, samples, kick, seed, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return x_0 (samples, D) and c (steps, samples, K), given or drawn."""
    if states is None:
        if not hasattr(system, "sample"):
            raise ValueError(f"states must be given: {type(system).__name__} has no method sample")
        count = getattr(system, "worlds", 3) if samples is None else check_count("samples", samples)
        states = system.sample(count, seed=seed, dtype=dtype)
    states = check_finite_array("states", states, dtype)
    if states.ndim != 2 or states.shape[1] != system.state_size or len(states) == 0:
        raise ValueError(shape_message("states", ("samples", system.state_size), states.shape))
    shape = (steps, len(states), system.control_size)
    if controls is None:
        controls = kick * np.random.default_rng(seed).standard_normal(shape)
    controls = check_finite_array("controls", controls, dtype)
    if controls.ndim != 3 or controls.shape[1:] != shape[1:] or len(controls) < steps:
        raise ValueError(shape_message("controls", shape, controls.shape))
    return states, controls


def _check_differences(differences: Any) -> np.ndarray:
    """Return the step sizes if they descend by a constant factor, else raise a ValueError."""
    sweep = numbers_of("differences", differences).astype(np.float64)
    ratios = sweep[:-1] / sweep[1:] if sweep.ndim == 1 and len(sweep) > 3 and (sweep > 0.0).all() else np.zeros(1)
    if not (ratios > 1.0).all() or not np.allclose(ratios, ratios[0]):
        raise ValueError(
            f"differences must be four or more numbers that fall by a constant factor, got {shown(differences)}"
        )
    return sweep


class _Runner:
    """Calls the two verbs of a simulator with numpy arrays."""

    def __init__(self, system: Any, dtype: Any, device: Any):
        self.system, self.dtype, self.device = system, dtype, device
        self.state_names = _names(system, "states", system.state_size)
        self.control_names = _names(system, "controls", system.control_size)

    def final_states(self, x0: np.ndarray, c: np.ndarray, what: Any) -> np.ndarray:
        """Return x_T of many variants, shape (variants, samples, D).

        Args:
            x0: Shape (variants, samples, D).
            c: Shape (variants, T, samples, K).
            what: Called with the index of a variant, says what was varied, for a message.
        """
        out = np.empty_like(x0)
        for group in self._groups(len(x0)):
            states = self._unroll(_rows(x0[group]), _rows(np.moveaxis(c[group], 0, 1), 1))
            self._check_finite(states, group, x0.shape[1], what)
            out[group] = states[-1].numpy().reshape(out[group].shape)
        return out

    def jacobian(self, x0: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Return ∂(x_T)_i / ∂(x_0, c_0)_j from vector-Jacobian products, shape (samples, D, D + K)."""
        samples, size = x0.shape
        out = np.empty((size, samples, size + c.shape[2]))
        for group in self._groups(size):
            seeds = np.zeros((len(group), samples, size))
            seeds[np.arange(len(group)), :, group] = 1.0
            states = self._unroll(_tile(x0, len(group)), _tile(c, len(group), 1))
            controls = [self._array(values) for values in _tile(c, len(group), 1)]
            adjoint, adj_x = self._array(_rows(seeds)), self._array(_rows(np.full_like(seeds, np.nan)))
            adj_c = self._array(np.full_like(_tile(c[0], len(group)), np.nan))
            for n in reversed(range(len(c))):
                self.system.step_vjp(states[n], controls[n], adjoint, adj_x, adj_c)
                adjoint, adj_x = adj_x, adjoint
            both = np.concatenate([adjoint.numpy(), adj_c.numpy()], axis=1)
            out[group] = both.reshape(len(group), samples, -1)
        return np.moveaxis(out, 0, 1)

    def _unroll(self, x0: np.ndarray, c: np.ndarray) -> list[wp.array]:
        """Return x_0 … x_T, each an array of its own."""
        states = [self._array(x0)]
        for values in c:
            states.append(self._array(np.full_like(x0, np.nan)))
            self.system.step(states[-2], self._array(values), states[-1])
        return states

    def _groups(self, count: int) -> Iterator[np.ndarray]:
        """Yield which variants run together: all, or one by one where the batch is the simulator's business."""
        if isinstance(self.system, System):
            yield np.arange(count)
        else:
            yield from np.arange(count)[:, None]

    def _array(self, values: np.ndarray) -> wp.array:
        return wp.array(np.ascontiguousarray(values, dtype=self.dtype), device=self.device)

    def _check_finite(self, states: list[wp.array], group: np.ndarray, samples: int, what: Any) -> None:
        """Raise a ValueError that says where a trajectory leaves the finite numbers, and what was done before."""
        for n, array in enumerate(states):
            values = array.numpy().reshape(len(group), samples, -1)
            if not np.isfinite(values).all():
                variant, sample, component = _first(~np.isfinite(values))
                raise ValueError(
                    f"step gives {values[variant, sample, component]} for {self.state_names[component]} of sample "
                    f"{sample} at step {n}, {what(int(group[variant]))}: nothing can be compared there. Give states "
                    "and controls that the simulator can take, a smaller dt, a smaller kick or smaller differences"
                )


def _differences(runner: _Runner, x0: np.ndarray, c: np.ndarray, sweep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Jacobian from differences, shape (samples, D, D + K), and how uncertain each entry is."""
    size, names = x0.shape[1], [*runner.state_names, *runner.control_names]
    base = runner.final_states(x0[None], c[None], lambda _: "with the states and controls as they are")[0]
    scale = _sizes(x0, c)
    jacobian, noise = np.empty((2, *x0.shape, len(names)))
    for j, name in enumerate(names):
        shifts = [sign * h * scale[j] for h in sweep for sign in (1.0, -1.0)]
        varied_x, varied_c = np.stack([x0] * len(shifts)), np.stack([c] * len(shifts))
        varied = varied_x[..., j] if j < size else varied_c[:, 0, :, j - size]
        before = varied.astype(np.float64)
        varied += np.array(shifts, dtype=x0.dtype)[:, None]
        widths = (varied.astype(np.float64) - before)[..., None]  # what the rounded sum really differs by
        y = runner.final_states(varied_x, varied_c, lambda v, s=shifts, m=name: f"{m} shifted by {s[v]:.2g}")
        y = y.astype(np.float64)
        slopes = (y[::2] - y[1::2]) / (widths[::2] - widths[1::2])
        ratio = (sweep[0] / sweep[1]) ** 2
        better = (ratio * slopes[1:] - slopes[:-1]) / (ratio - 1.0)
        gaps = np.abs(better[1:] - better[:-1])
        rounding = np.finfo(x0.dtype).eps * np.abs(base) / np.abs(widths[4::2][: len(gaps) - 1])
        doubt = np.maximum(gaps[1:], gaps[:-1]) + rounding
        best = doubt.argmin(axis=0)[None]
        jacobian[..., j] = np.take_along_axis(better[1:-1], best, axis=0)[0]
        noise[..., j] = np.take_along_axis(doubt, best, axis=0)[0]
    return jacobian, noise


def _compare(
    runner: _Runner,
    horizon: int,
    found: np.ndarray,
    expected: np.ndarray,
    noise: np.ndarray,
    tolerance: float,
    exact: bool,
) -> Iterator[Finding]:
    """Yield a finding per component of x_0 and c_0; all arrays have shape (samples, D, D + K)."""
    size = np.abs(expected).max(axis=0)
    largest = size.max(axis=0)
    error = np.where(np.isfinite(found), np.abs(found - expected), np.inf)
    rounding = ROUNDINGS * np.finfo(runner.dtype).eps * largest
    excess = (error - SAFETY * noise).max(axis=0) - tolerance * size - rounding
    names = [("state", name) for name in runner.state_names] + [("control", name) for name in runner.control_names]
    for j, (kind, name) in enumerate(names):
        wrong = np.flatnonzero((excess[:, j] > 0.0) & exact)
        wrong = wrong[np.argsort(-excess[wrong, j], kind="stable")]
        share = error[..., j].max() / largest[j] if largest[j] > 0.0 else error[..., j].max()
        judged = float((SAFETY * noise[..., j] <= 0.1 * largest[j]).mean())
        through, angle = tuple(runner.state_names[i] for i in wrong), _cosine(found[..., j], expected[..., j])
        yield Finding(horizon, kind, name, float(share), through, judged, angle)


def _sizes(x0: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return the size of each component of x_0 and c_0, its root mean square, shape (D + K,)."""
    return np.sqrt(np.mean(np.concatenate([x0, c[0]], axis=1) ** 2, axis=0, dtype=np.float64)).clip(0.1)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine between two arrays as vectors; 1 where both are zero, nan where one alone is."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        if lengths == (0.0, 0.0):
            return 1.0
        return float(np.vdot(a, b) / (lengths[0] * lengths[1])) if min(lengths) > 0.0 else np.nan


def _names(system: Any, attribute: str, count: int) -> tuple[str, ...]:
    """Return the names of components, numbers where the system has no names."""
    names = getattr(system, attribute, ())
    return tuple(names) if len(names) == count else tuple(str(i) for i in range(count))


def _rows(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return variants and samples, two dimensions from `axis` on, as one dimension of rows."""
    shape = values.shape
    return values.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _tile(values: np.ndarray, count: int, axis: int = 0) -> np.ndarray:
    """Return rows `count` times over, along their axis."""
    repetitions = [1] * values.ndim
    repetitions[axis] = count
    return np.tile(values, repetitions)


def _first(mask: np.ndarray) -> tuple[int, ...]:
    """Return the first place where a mask is set."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
