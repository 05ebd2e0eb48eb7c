"""The picture of a diagnosis: feedback and its paths, what steps give to the update, Jacobians, agreement, rotation."""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demos.colours import colour
from warp_phys.diagnose.diagnostics import Diagnosis
from warp_phys.flow import REGULAR, Combined

DASHED = (0, (4, 2))
PHYSICS, CONTROLLER = "#0072B2", "#CC79A7"
"""Colours of the paths: those of the flows that keep them alone."""


def draw(figure: Figure, diagnosis: Diagnosis) -> None:
    """Draw everything on an empty figure."""
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 9.5, "axes.linewidth": 0.7}):
        axes: Any = figure.subplots(2, 3)
        draw_feedback(axes[0, 0], diagnosis)
        draw_paths(axes[0, 1], diagnosis)
        draw_contributions(axes[0, 2], diagnosis)
        draw_jacobians(axes[1, 0], diagnosis)
        draw_agreement(axes[1, 1], diagnosis)
        draw_rotation(axes[1, 2], diagnosis)
        figure.suptitle(diagnosis.title, fontsize=10)


def draw_feedback(axes: Axes, diagnosis: Diagnosis) -> None:
    """Draw |λ_n|: all samples together, and the band from the smallest sample to the largest."""
    steps, size = np.arange(diagnosis.steps + 1), np.sqrt(diagnosis.adjoints.shape[2])
    for i, flow in enumerate(diagnosis.flows):
        values = np.where(np.isfinite(diagnosis.adjoints[i]), diagnosis.adjoints[i], np.nan)
        band = np.where(values > 0.0, values, np.nan)
        axes.plot(steps, positive(diagnosis.batch[i] / size), label=name(flow), **line(flow))
        if flow.letter in ("R", "M"):
            axes.fill_between(steps, band.min(axis=1), band.max(axis=1), color=colour(flow), alpha=0.13, linewidth=0)
    axes.set(yscale="log", xlabel="time step n", title="|λₙ|: root mean square (line), range of samples (R, M)")
    axes.legend(fontsize=8, frameon=False)


def draw_paths(axes: Axes, diagnosis: Diagnosis) -> None:
    """Draw what reaches λ_n in R on either path."""
    i, steps = diagnosis.index(REGULAR), np.arange(diagnosis.steps)
    for values, ink, label in (
        (diagnosis.physics[i], PHYSICS, "through the physics"),
        (diagnosis.controller[i], CONTROLLER, "through the controller"),
    ):
        axes.plot(steps, positive(np.sqrt(np.mean(np.square(values), axis=1))), color=ink, label=label)
    axes.set(yscale="log", xlabel="time step n", title="What arrives at λₙ in R, root mean square")
    axes.legend(fontsize=8, frameon=False)


def draw_contributions(axes: Axes, diagnosis: Diagnosis) -> None:
    """Draw what every step gives to the update of θ."""
    if diagnosis.contributions is not None:
        for flow, values in zip(diagnosis.flows, diagnosis.contributions, strict=True):
            axes.plot(positive(values), label=name(flow), **line(flow))
    axes.set(yscale="log", xlabel="time step n", title="|share of step n in the update|")


def draw_jacobians(axes: Axes, diagnosis: Diagnosis) -> None:
    """Draw spectral radii and largest singular values along the trajectory, medians over the samples."""
    s = diagnosis.spectra
    for radius, norm, ink, label in (
        (s.physics_radius, s.physics_norm, PHYSICS, "physics alone"),
        (s.closed_radius, s.closed_norm, colour("R"), "closed loop"),
    ):
        axes.plot(np.nanmedian(norm, axis=1), color=ink, linestyle=DASHED, linewidth=1.2, label=f"{label}, norm")
        axes.plot(np.nanmedian(radius, axis=1), color=ink, linewidth=1.8, label=f"{label}, radius")
    axes.set(xlabel="time step n", title="Jacobian of a step, median of samples")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))
    axes.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper center")


def draw_agreement(axes: Axes, diagnosis: Diagnosis) -> None:
    """Draw cosine and share of agreeing signs of M and R, parameter by parameter."""
    layers = diagnosis.layers
    places = np.arange(len(layers))
    axes.barh(places - 0.2, [layer.cosine for layer in layers], 0.38, color="0.35", label="cosine")
    axes.barh(places + 0.2, [layer.agreement for layer in layers], 0.38, color="0.7", label="same sign")
    axes.set(yticks=places, yticklabels=[layer.name for layer in layers], xlim=(-1, 1), title="M and R by parameter")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.7)
    if layers:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)


def draw_rotation(axes: Axes, diagnosis: Diagnosis) -> None:
    """Draw the rotation of the update fields with their standard errors."""
    rows = [(flow, diagnosis.rotation[flow.name]) for flow in diagnosis.flows if flow.name in diagnosis.rotation]
    for place, (flow, found) in enumerate(rows):
        axes.bar(place, found.share, 0.6, yerr=found.share_error, capsize=4, color=colour(flow))
        axes.annotate(f"{found.share:.2f} ± {found.share_error:.2f}", (place, found.share + found.share_error), (0, 4),
                      textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    axes.set(
        xticks=range(len(rows)), xticklabels=[name(flow) for flow, _ in rows], ylim=(0, 1),
        title="Rotation: antisymmetric share of the Jacobian",
    )  # fmt: skip
    if not rows:
        axes.text(0.5, 0.5, "not asked for", transform=axes.transAxes, ha="center", color="0.5")


def line(flow: Any) -> dict[str, Any]:
    """Return the style of a flow's line; a combined one is dashed, for it often lies on its base."""
    style = {"color": colour(flow), "linewidth": 1.8, "linestyle": DASHED if isinstance(flow, Combined) else "-"}
    return {**style, "marker": "o", "markersize": 3} if flow.letter == "S" else style


def name(flow: Any) -> str:
    """Return letter and name of a flow."""
    return f"{flow.letter} {flow.name}".strip()


def positive(values: np.ndarray) -> np.ndarray:
    """Return values with nan for those that have no place on a logarithmic axis."""
    return np.where(np.isfinite(values) & (values > 0.0), values, np.nan)
