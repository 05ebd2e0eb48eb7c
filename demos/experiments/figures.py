"""Results as figures: test loss against epochs, a panel per level, a median and a band of quartiles per flow."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from controllers.checkpoint import atomic_write
from demos.colours import colour
from demos.experiments.plan import CLIPS, DIVERGED, FLOW_ORDER
from demos.experiments.published import EXPERIMENTS
from demos.experiments.results import Result, quartile_curves
from demos.experiments.tables import flow_title

STYLES = {
    "regular": (0, (5, 1.5)),
    "modified": (0, (5, 1.5, 1, 1.5)),
    "stopped": (0, (1, 1.2)),
    "controller": (0, (2, 2)),
    "combined": "-",
    "geometric": (0, (9, 2)),
    "minmod": (0, (3, 1, 1, 1, 1, 1)),
    "averaged": (0, (7, 1, 2, 1)),
    "either": (0, (4, 1, 1, 1, 1, 1)),
}
"""A dash pattern per flow, so that a print without colours can be read too."""
BINS = 24
"""Points of a curve per factor of ten in epochs."""


def write_figures(out: str | Path, results: Sequence[Result], svg: bool = False) -> list[Path]:
    """Draw every experiment over all its runs, and for each clipping mode apart where there are several."""
    paths = []
    for (experiment, shuffle), own in split(results).items():
        clips = [clip for clip in CLIPS if any(result.run.settings.clip == clip for result in own)]
        for clip in ["all", *clips] if len(clips) > 1 else clips:
            chosen = [result for result in own if clip in (result.run.settings.clip, "all")]
            name = experiment + ("-shuffled" if shuffle else "")
            name += f"-clip-{clip}" if clip != "all" and len(clips) > 1 else ""
            figure = draw(experiment, chosen)
            for kind in ("png", "svg") if svg else ("png",):
                path = Path(out) / f"{name}.{kind}"
                with atomic_write(path) as file:
                    figure.savefig(file, format=kind, dpi=200)
                paths.append(path)
    return paths


def split(results: Sequence[Result]) -> dict[tuple[str, bool], list[Result]]:
    """The results that count, by experiment and order of the batches."""
    found: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        if result.state.counts:
            found.setdefault((result.run.experiment, result.run.settings.shuffle), []).append(result)
    return found


def draw(name: str, results: Sequence[Result]) -> Figure:
    """Draw one experiment; all results must count and be of it."""
    experiment = EXPERIMENTS[name]
    levels = list(dict.fromkeys(result.run.level for result in results))
    flows = [flow for flow in FLOW_ORDER if any(result.run.settings.flow == flow for result in results)]
    columns = len(levels) if len(levels) < 4 else (len(levels) + 1) // 2
    rows = -(-len(levels) // columns)
    width = max(5.6, 3.4 * columns)
    lines = -(-len(flows) // int(width / 1.4))
    figure = Figure(figsize=(width, 0.9 + 2.7 * rows + 0.25 * lines), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axes, level in zip(panels, levels, strict=False):
        for flow in flows:
            own = [result for result in results if (result.run.level, result.run.settings.flow) == (level, flow)]
            if own:
                draw_flow(axes, flow, own)
        finish(axes, experiment.describe(level))
    for axes in panels[len(levels) :]:
        axes.remove()
    for number, axes in enumerate(panels[: len(levels)]):
        axes.set_ylabel("test loss" if number % columns == 0 else "")
        # The lowest panel of a column bears the numbers of its axis.
        lowest = number + columns >= len(levels)
        axes.set_xlabel("epoch" if lowest else "")
        axes.tick_params(labelbottom=lowest)
    figure.suptitle(f"{experiment.title}\n{describe_runs(results)}", fontsize=10)
    handles = [Line2D([], [], label=flow_title(flow), **line_style(flow)) for flow in flows]
    ncols = -(-len(flows) // lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, handlelength=2.8, fontsize=9)
    return figure


def draw_flow(axes: Any, flow: str, results: Sequence[Result]) -> None:
    """Draw the median of some runs and the band between their quartiles; a run that diverged goes on at infinity."""
    epochs = max(result.run.settings.epochs for result in results)
    points, bins = make_bins(epochs)
    curves = np.stack([thin(complete(result, epochs), bins) for result in results])
    lower, median, upper = quartile_curves(curves)
    # What is infinite is beyond the upper edge, not missing; the axes are fitted to what is finite.
    beyond = 1e30
    axes.fill_between(
        points, np.minimum(lower, beyond), np.minimum(upper, beyond), color=colour(flow), alpha=0.16, lw=0
    )
    axes.plot(points, np.minimum(median, beyond), label=flow, **line_style(flow))


def complete(result: Result, epochs: int) -> np.ndarray:
    """Test losses of all epochs: infinite from where a run has diverged."""
    losses = np.full(epochs, np.inf)
    losses[: len(result.test_losses)] = result.test_losses[:epochs]
    return losses


def make_bins(epochs: int) -> tuple[np.ndarray, list[slice]]:
    """Bins of epochs, each of one epoch at first and then wider on and on; their geometric centres, and their rows.

    >>> points, bins = make_bins(4)
    >>> points.tolist(), bins[0], bins[-1]
    ([1.0, 2.0, 3.0, 4.0], slice(0, 1, None), slice(3, 4, None))
    """
    edges = [1]
    while edges[-1] <= epochs:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 10 ** (1 / BINS))))
    # A last bin that is cut short would be noisier than the others: it joins the one before.
    if len(edges) > 2 and epochs + 1 - edges[-2] < (edges[-1] - edges[-2]) / 2:
        del edges[-2]
    edges[-1] = epochs + 1
    bins = [slice(first - 1, last - 1) for first, last in zip(edges[:-1], edges[1:], strict=True)]
    return np.array([np.sqrt((rows.start + 1) * rows.stop) for rows in bins]), bins


def thin(losses: np.ndarray, bins: Sequence[slice]) -> np.ndarray:
    """Median of a run's losses in every bin: a log axis has no room for hundreds of epochs side by side."""
    return np.array([quartile_curves(losses[rows, None])[1, 0] for rows in bins])


def line_style(flow: str) -> dict[str, Any]:
    """How a flow's line looks."""
    return {"color": colour(flow), "linestyle": STYLES[flow], "linewidth": 2.0 if flow == "combined" else 1.5}


def finish(axes: Any, title: str) -> None:
    """Log axes with few, plain numbers, fitted to what is finite."""
    axes.set(xscale="log", yscale="log")
    axes.set_title(title, fontsize=10)
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    bands = [path.vertices[:, 1] for band in axes.collections for path in band.get_paths()]
    values = np.concatenate([values, *bands])
    values = values[(values > 0) & (values < 1e29)]
    if len(values):
        low, high = values.min(), values.max()
        margin = max((high / low) ** 0.06, 1.05)
        axes.set_ylim(low / margin, high * margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    label_losses(axes)
    axes.grid(which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def label_losses(axes: Any) -> None:
    """Label the loss at powers of ten, and at as many round numbers between them as give three labels."""
    low, high = axes.get_ylim()
    for subs in STEPS:
        if round_numbers(low, high, subs) >= 3:
            break
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


STEPS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    tuple(np.arange(10, 100, 5) / 10),
    tuple(np.arange(100, 1000, 5) / 100),
)


def round_numbers(low: float, high: float, subs: Sequence[float]) -> int:
    """How many numbers of the form sub · 10ⁿ are between two positive numbers.

    >>> round_numbers(0.5, 30.0, (1.0, 2.0, 5.0))
    6
    """
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return sum(low <= part * 10.0**decade <= high for decade in decades for part in subs)


def describe_runs(results: Sequence[Result]) -> str:
    """What the medians are over, and how many runs diverged."""
    counts = Counter((result.run.level, result.run.settings.flow) for result in results).values()
    seeds = len({result.run.settings.seed for result in results})
    clips = [clip for clip in CLIPS if any(result.run.settings.clip == clip for result in results)]
    runs = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    text = f"median and quartiles of {runs} run{'s' if runs != '1' else ''}: {seeds} seed{'s' if seeds > 1 else ''}, "
    text += f"clipping {', '.join(clips)}" if clips != ["none"] else "no clipping"
    diverged = sum(result.state.word == DIVERGED for result in results)
    return text + (f"; {diverged} of all {len(results)} runs diverged" if diverged else "")
