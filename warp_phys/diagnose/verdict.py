"""A diagnosis in words: the table, and why R explodes or vanishes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from warp_phys.flow import MODIFIED, REGULAR, Combined

GROWS = 10.0
"""Feedback grows if its size over the batch gets more than this larger over the horizon, and shrinks likewise."""
EXPLODES = 1000.0
"""Feedback explodes if it grows more than this over the horizon, or overflows, and vanishes if it shrinks as much."""
MOSTLY = 0.75
"""Share of R's growth rate above which one path alone is named as the cause."""

VERBS = {"explodes": "explodes, it grows", "grows": "grows", "shrinks": "shrinks", "vanishes": "vanishes, it shrinks"}


@dataclass(frozen=True)
class Verdict:
    """Whether R explodes or vanishes, and through which path, by the size of all samples' adjoints together.

    With r = log growth per step of that size: the physics path is named if r_M / r_R ≥ `MOSTLY`, else the controller
    path if it is ≤ 1 − `MOSTLY` or M stays level, else both; for M is R without the controller path.
    """

    kind: str
    """"explodes", "grows", "level", "shrinks", "vanishes", or "unknown" where too few steps receive anything."""
    path: str
    """"physics", "controller" or "both" if R grows or shrinks, else empty."""
    text: str
    """The same in words, with numbers."""

    def __str__(self) -> str:
        return self.text


def judge(diagnosis: Any) -> Verdict:
    """Return the verdict on a `Diagnosis`."""
    of_regular, of_modified = (_course(diagnosis, flow) for flow in (REGULAR, MODIFIED))
    if of_regular.overflowed:
        return _overflow(diagnosis, of_regular, of_modified)
    if np.isnan(of_regular.rate):
        return Verdict("unknown", "", "Too few steps receive feedback to say how R grows.")
    kind, modified = of_regular.kind, f"M changes by {of_modified}, worst sample {_number(of_modified.worst)}"
    if kind == "level":
        text = f"R's feedback stays level: it changes by {of_regular}. {modified}."
        if of_modified.kind in ("grows", "explodes"):
            text += " The physics alone would grow, the controller's path holds it."
        return Verdict(kind, "", text)
    share = _share(of_modified.rate, of_regular.rate)
    path = "physics" if share >= MOSTLY else "both"
    if share <= 1.0 - MOSTLY or (path == "both" and of_modified.kind == "level"):
        path = "controller"
    through = "both paths" if path == "both" else f"the {path} path"
    text = (
        f"R's feedback {VERBS[kind]} by {of_regular}, through {through}; worst sample {_number(of_regular.worst)}. "
        f"{modified}. {_radii(diagnosis)}"
    )
    return Verdict(kind, path, text)


def _overflow(diagnosis: Any, of_regular: "_Course", of_modified: "_Course") -> Verdict:
    """Return the verdict where R leaves the finite numbers: rates say nothing there, but M may overflow as well."""
    text = (
        f"R's feedback explodes: R overflows in {of_regular.overflowed} of {diagnosis.adjoints.shape[2]} samples, M in "
        f"{of_modified.overflowed}. {_radii(diagnosis)}"
    )
    return Verdict("explodes", "both" if of_modified.overflowed else "controller", text)


@dataclass(frozen=True)
class _Course:
    """How one flow's feedback goes back in time, all samples together."""

    rate: float
    """Log growth per step."""
    span: int
    """Steps over which it grows."""
    worst: float
    """Largest growth of a sample over them."""
    overflowed: int
    """Samples whose adjoints leave the finite numbers."""

    @property
    def kind(self) -> str:
        over = self.rate * self.span
        if over > np.log(GROWS) or self.overflowed:
            return "explodes" if over > np.log(EXPLODES) or self.overflowed else "grows"
        if over < -np.log(GROWS):
            return "vanishes" if over < -np.log(EXPLODES) else "shrinks"
        return "level"

    def __str__(self) -> str:
        if np.isnan(self.rate):
            return "an unknown factor, too few steps receive any"
        with np.errstate(over="ignore"):
            per_step, over = np.exp(np.float64(self.rate)), np.exp(np.float64(self.span * self.rate))
        return f"a factor {_number(per_step)} per step, {_number(over)} over {self.span} steps"


def _course(diagnosis: Any, flow: Any) -> _Course:
    i, span = diagnosis.index(flow), diagnosis.steps - 1
    overflowed = int((~np.isfinite(diagnosis.adjoints[i, 1:])).any(axis=0).sum())
    rate, worst = float(np.log(diagnosis.batch_growth[i])), _largest(diagnosis.horizon_growth[i])
    return _Course(rate, span, worst, overflowed)


def _share(of_modified: float, of_regular: float) -> float:
    """Return which share of R's rate the physics has by itself; 0 where M goes the other way or nowhere."""
    return 0.0 if np.isnan(of_modified) or of_modified * of_regular <= 0.0 else of_modified / of_regular


def _radii(diagnosis: Any) -> str:
    s = diagnosis.spectra
    physics, closed = median(s.physics_radius), median(s.closed_radius)
    return f"Median spectral radius of a step: physics {_number(physics)}, closed loop {_number(closed)}."


def table(diagnosis: Any) -> str:
    """Return all measures of a `Diagnosis` as text, the verdict at the end."""
    parts = [f"{diagnosis.title}: {_number(diagnosis.loss)}", _flows(diagnosis), _spectra(diagnosis)]
    if diagnosis.layers:
        parts.append(_layers(diagnosis))
    if diagnosis.rotation:
        rows = [(name, str(found), found.probes) for name, found in diagnosis.rotation.items()]
        parts.append(layout(("rotation of", "antisymmetric share", "probes"), rows))
    return "\n\n".join([*parts, diagnosis.why.text])


def _flows(diagnosis: Any) -> str:
    header = ["feedback of", "per step", "over horizon", "worst sample", "batch", "largest/smallest"]
    header += ["effective steps", "by controller"] + ["update"] * bool(diagnosis.layers)
    rows = []
    growth, horizon = diagnosis.growth, diagnosis.horizon_growth
    with np.errstate(over="ignore"):
        batch = diagnosis.batch_growth ** (diagnosis.steps - 1)
    share = diagnosis.controller_share
    for i, flow in enumerate(diagnosis.flows):
        row: list[Any] = [f"{flow.letter} {flow.name}".strip(), median(growth[i]), median(horizon[i])]
        row += [
            _largest(horizon[i]),
            float(batch[i]),
            median(diagnosis.spread[i]),
            median(diagnosis.effective_steps[i]),
        ]
        row.append("" if isinstance(flow, Combined) or not np.isfinite(share[i]).any() else f"{median(share[i]):.0%}")
        rows.append(row + ([diagnosis.layers[-1].norms[flow.name]] if diagnosis.layers else []))
    return layout(header, rows)


def _spectra(diagnosis: Any) -> str:
    s = diagnosis.spectra
    samples = s.physics_radius.shape[1]
    rows = [
        ("physics alone", *_both(s.physics_radius), *_both(s.physics_norm), median(np.exp(s.physics_exponent))),
        ("controller's path", *_both(s.controller_radius), *_both(s.controller_norm), ""),
        ("closed loop", *_both(s.closed_radius), *_both(s.closed_norm), median(np.exp(s.closed_exponent))),
    ]
    header = (f"Jacobian of a step, {samples} samples", "radius", "largest", "norm", "largest", "Lyapunov factor")
    return layout(header, rows)


def _layers(diagnosis: Any) -> str:
    rows = []
    for layer in diagnosis.layers:
        of_modified, of_regular = (layer.norms[flow.name] for flow in (MODIFIED, REGULAR))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float(np.float64(of_regular) / of_modified)
        same = "" if np.isnan(layer.agreement) else f"{layer.agreement:.1%}"
        rows.append((layer.name, layer.size, layer.cosine, same, of_modified, of_regular, ratio))
    return layout(("parameter", "components", "cosine M, R", "same sign", "|M|", "|R|", "|R|/|M|"), rows)


def _both(values: np.ndarray) -> tuple[float, float]:
    """Return median and largest."""
    return median(values), _largest(values)


def _largest(values: np.ndarray) -> float:
    """Return the largest of what is not nan; nan where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else float("nan")


def median(values: np.ndarray) -> float:
    """Return the median of what is not nan; nan where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, 0.5, method="closest_observation")) if known.size else float("nan")


def layout(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as text: the first column to the left, the others to the right.

    >>> print(layout(("flow", "growth"), [("R", 1.25)]))
    flow  growth
    R       1.25
    """
    cells = [list(header), *([value if isinstance(value, str) else _number(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    """Return three digits of a number, four of one near 1, for those are the factors per step."""
    return f"{value:.4g}" if 0.9 < abs(value) < 1.1 else str(value) if isinstance(value, int) else f"{value:.3g}"
