"""Tables and figures of the published experiments, from made-up runs; every number is found again by hand."""

import csv
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from small_runs import changed, pretend, pretended_results, small_plan

from controllers.record import Record
from demos import paper
from demos.colours import COLOURS, colour
from demos.experiments.figures import STYLES, draw, make_bins, thin, write_figures
from demos.experiments.plan import DIVERGED
from demos.experiments.results import group_results, load_results, quartile_curves, quartiles
from demos.experiments.tables import summarise, write_tables


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of made-up runs with its tables: the folder, {run name: test losses}."""
    folder = tmp_path_factory.mktemp("paper")
    losses = pretended_results(folder)
    assert paper.main(["--tables-only", "--out", str(folder)]) == 0
    return folder, losses


def rows(path):
    """Lines of a table as dictionaries."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def name(row):
    """Name of the run that a line belongs to."""
    return f"{row['experiment']}/poles-{row['level']}/{row['flow']}/clip-{row['clip']}/seed-{row['seed']}"


def test_every_epoch_of_every_run_is_in_the_table(made):
    folder, losses = made
    found = defaultdict(list)
    for row in rows(folder / "epochs.csv"):
        assert tuple(row) == (
            *("experiment", "level", "flow", "clip", "seed", "shuffle"),
            *Record._fields,
            "best_test_loss",
        )
        assert row["shuffle"] == "0"
        found[name(row)].append(row)
    assert found.keys() == losses.keys()
    for run, table in found.items():
        assert [int(row["epoch"]) for row in table] == list(range(1, len(losses[run]) + 1))
        assert [float(row["test_loss"]) for row in table] == losses[run].tolist()
        assert [float(row["minibatch_loss"]) for row in table] == (10 * losses[run]).tolist()
        assert [float(row["best_test_loss"]) for row in table] == np.minimum.accumulate(losses[run]).tolist()


def test_every_run_has_a_line(made):
    folder, losses = made
    table = {name(row): row for row in rows(folder / "runs.csv")}
    assert table.keys() == losses.keys()
    states = defaultdict(list)
    for run, row in table.items():
        states[row["state"]].append(run)
        assert int(row["epochs"]) == len(losses[run])
        assert float(row["best_test_loss"]) == pytest.approx(losses[run].min(), rel=1e-5)
        assert float(row["seconds"]) == 0.25 * len(losses[run])
    assert sorted(states[DIVERGED]) == [f"cartpole/poles-2/regular/clip-none/seed-{seed}" for seed in (1, 2)]
    assert states["to do"] == ["cartpole/poles-1/combined/clip-value/seed-2"]
    assert len(states["finished"]) == 21
    diverged = table["cartpole/poles-2/regular/clip-none/seed-1"]
    assert diverged["final_test_loss"] == "inf"
    assert diverged["reason"] == "step 7, samples 0, 3"
    assert table["cartpole/poles-1/combined/clip-value/seed-2"]["final_test_loss"] == ""
    finished = table["cartpole/poles-1/regular/clip-none/seed-0"]
    # A tenth of 20 epochs is 2.
    last = losses["cartpole/poles-1/regular/clip-none/seed-0"][-2:]
    assert float(finished["final_test_loss"]) == pytest.approx(last.mean(), rel=1e-5)


def test_the_summary_has_the_quartiles(made):
    folder, losses = made
    table = {(row["level"], row["flow"], row["clip"]): row for row in rows(folder / "summary.csv")}
    assert len(table) == 2 * 2 * 3
    for (level, flow, clip), row in table.items():
        runs = [
            f"cartpole/poles-{level}/{flow}/clip-{mode}/seed-{seed}"
            for mode in ("none", "value")
            for seed in range(3)
            if clip in (mode, "all")
        ]
        counted = [run for run in runs if len(losses[run]) != 4]
        assert [int(row[key]) for key in ("runs", "unfinished")] == [len(counted), len(runs) - len(counted)]
        numbers = [float(row[f"final_{key}"]) for key in ("lower_quartile", "median", "upper_quartile")]
        if (level, flow) == ("2", "regular") and clip in ("none", "all"):
            assert row["diverged"] == "2"
            continue
        assert row["diverged"] == "0"
        finals = [np.median(losses[run][-2:]) for run in counted]
        assert numbers == pytest.approx(np.quantile(finals, [0.25, 0.5, 0.75]), rel=1e-5)
        assert float(row["best_median"]) == pytest.approx(np.median([losses[run].min() for run in counted]), rel=1e-5)


def test_runs_that_diverged_count_as_infinite(made):
    folder, losses = made
    table = {(row["level"], row["flow"], row["clip"]): row for row in rows(folder / "summary.csv")}
    only = table["2", "regular", "none"]
    # Of three runs two are infinite: so is the median, and what lies between a number and infinity.
    assert [only[f"final_{key}"] for key in ("lower_quartile", "median", "upper_quartile")] == ["inf"] * 3
    both = table["2", "regular", "all"]
    finals = sorted(
        np.median(losses[f"cartpole/poles-2/regular/clip-{mode}/seed-{seed}"][-2:])
        for mode, seed in (("none", 0), ("value", 0), ("value", 1), ("value", 2))
    )
    # Of six runs the two largest are infinite: places 1.25, 2.5 and 3.75 of 0 … 5.
    assert float(both["final_lower_quartile"]) == pytest.approx(finals[1] + 0.25 * (finals[2] - finals[1]), rel=1e-5)
    assert float(both["final_median"]) == pytest.approx((finals[2] + finals[3]) / 2, rel=1e-5)
    assert both["final_upper_quartile"] == "inf"


def test_the_readable_summary_says_the_same(made):
    folder, losses = made
    text = (folder / "summary.md").read_text()
    groups = {(group.level, group.flow, group.clip): group for group in group_results(load_results(folder))}
    regular, combined = (groups[1, flow, "all"].finals[1] for flow in ("regular", "combined"))
    cells = [f"{regular:.3g}", f"**{combined:.3g}**"] if combined < regular else [f"**{regular:.3g}**"]
    assert " | ".join(["| 1", *cells]) in text
    lower, median, upper = groups[2, "combined", "value"].finals
    best = groups[2, "combined", "value"].best
    assert f"| 2 | C combined | value | 3 | 0 | {lower:.3g} | {median:.3g} | {upper:.3g} | {best:.3g} |" in text
    assert "| 2 | R regular | none | 3 | 2 | inf | inf | inf |" in text
    assert "Not counted, since not finished: 1 of 24 runs." in text
    assert "20 epochs, 8 train states, 8 test states" in text
    assert max(map(len, text.splitlines())) <= 120


def test_flows_that_are_level_as_printed_are_level(tmp_path):
    losses = {"regular": 0.5, "modified": 0.3001, "stopped": 0.9, "combined": 0.3}
    for run in small_plan(tmp_path, "RMSC", epochs=1):
        pretend(run, [losses[run.settings.flow]])
    assert "| 1 | 0.5 | **0.3** | 0.9 | **0.3** | 1 |" in summarise(load_results(tmp_path))
    assert summarise([]) == "No runs yet.\n"


def test_failures_are_named_in_the_summary(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    pretend(run, [1.0], "failed", "OSError: disk full")
    text = summarise(load_results(tmp_path))
    assert "- failed: cartpole/poles-1/regular/clip-none/seed-0: OSError: disk full" in text


def test_a_damaged_record_is_named(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    pretend(run, [1.0] * 3)
    path = run.folder / "record.csv"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"record\.csv is damaged: line 4 has \d of \d numbers"):
        load_results(tmp_path)


def test_tables_are_written_whole_or_not_at_all(made, tmp_path):
    (tmp_path / "epochs.csv").write_text("old")
    results = load_results(made[0])
    results[-1].run.settings.__dict__["seed"] = type("Broken", (), {"__str__": lambda self: 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        write_tables(tmp_path, results)
    assert (tmp_path / "epochs.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_quartiles_are_those_of_numpy_where_all_is_finite(count):
    curves = np.random.default_rng(count).normal(size=(count, 5))
    np.testing.assert_allclose(quartile_curves(curves), np.quantile(curves, [0.25, 0.5, 0.75], axis=0), rtol=1e-12)


def test_quartiles_know_infinity():
    inf = math.inf
    assert quartiles([inf, 1.0, 2.0]) == (1.5, 2.0, inf)
    assert quartiles([1.0, 2.0, 3.0, 4.0, inf]) == (2.0, 3.0, 4.0)
    assert quartiles([math.nan, inf, inf]) == (inf, inf, inf)


def test_bins_cover_every_epoch_once():
    for epochs in (1, 2, 9, 100, 1000):
        points, bins = make_bins(epochs)
        covered = [row for rows in bins for row in range(epochs)[rows]]
        assert covered == list(range(epochs))
        assert (np.diff(points) > 0).all()
        # Each is a tenth wider than the one before, about, and the last one is not much narrower.
        widths = [rows.stop - rows.start for rows in bins]
        assert widths[-1] >= widths[-2] / 2 if epochs > 1 else widths == [1]
    points, bins = make_bins(1000)
    assert [rows.stop - rows.start for rows in bins[:8]] == [1] * 8
    assert len(bins) < 75
    losses = np.arange(1000.0)
    assert thin(losses, bins)[-1] == np.median(losses[bins[-1]])


def test_a_figure_shows_medians_bands_colours_and_styles(made):
    folder, losses = made
    results = [result for result in load_results(folder) if result.state.counts]
    figure = draw("cartpole", results)
    assert [axes.get_title() for axes in figure.axes] == ["1 pole", "2 poles"]
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [line.get_label() for line in axes.lines] == ["regular", "combined"]
        assert len(axes.collections) == 2
        assert [line.get_color() for line in axes.lines] == [colour("R"), colour("C")]
        for line, band in zip(axes.lines, axes.collections, strict=True):
            assert tuple(band.get_facecolor()[0][:3]) == to_rgba(line.get_color())[:3]
    drawn = figure.axes[0].lines[0]
    curves = [
        losses[f"cartpole/poles-1/regular/clip-{clip}/seed-{seed}"] for clip in ("none", "value") for seed in "012"
    ]
    # The first points are one epoch each.
    np.testing.assert_allclose(drawn.get_xdata()[:8], np.arange(1, 9))
    np.testing.assert_allclose(drawn.get_ydata()[:8], np.median(curves, axis=0)[:8], rtol=1e-12)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    for edge in np.quantile(curves, [0.25, 0.75], axis=0)[:, 3]:
        assert np.isclose(band[band[:, 0] == 4.0][:, 1], edge).any()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["R regular", "C combined"]
    title = figure.get_suptitle()
    assert "5 to 6 runs: 3 seeds, clipping none, value; 2 of all 23 runs diverged" in title


def test_a_curve_leaves_the_figure_where_half_of_the_runs_diverge(made):
    folder, _ = made
    own = [result for result in load_results(folder) if result.run.settings.clip == "none"]
    figure = draw("cartpole", own)
    axes = figure.axes[1]
    regular, combined = axes.lines
    # The runs diverge after 5 and after 10 of 20 epochs, so from there on the median is beyond the axes.
    beyond = regular.get_ydata() > axes.get_ylim()[1]
    assert beyond.tolist() == (regular.get_xdata() > 10.5).tolist()
    assert (combined.get_ydata() < axes.get_ylim()[1]).all()


def test_every_flow_has_a_colour_and_a_style_of_its_own():
    assert STYLES.keys() == COLOURS.keys()
    assert len(set(map(str, STYLES.values()))) == len(STYLES)


def test_figures_are_drawn_for_all_clipping_modes_and_for_each(made, tmp_path):
    results = load_results(made[0])
    paths = write_figures(tmp_path, results, svg=False)
    names = ["cartpole.png", "cartpole-clip-none.png", "cartpole-clip-value.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    few = [result for result in results if result.run.settings.clip == "none" and result.run.level == 1]
    assert [path.name for path in write_figures(tmp_path, few, svg=True)] == ["cartpole.png", "cartpole.svg"]
    assert b"<svg" in (tmp_path / "cartpole.svg").read_bytes()


def test_nothing_written_lies_outside_the_figure(made):
    """The legend and the titles fit, also with all flows over a single panel."""
    one = [result for result in load_results(made[0]) if result.run.level == 1 and result.state.counts]
    flows = [replace(one[0], run=changed(one[0].run, flow=flow)) for flow in STYLES]
    figure = draw("cartpole", [*one, *flows])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(figure.texts) == 1
    for artist in [*figure.legends, *figure.texts, *(axes.xaxis.label for axes in figure.axes)]:
        box = artist.get_window_extent(renderer)
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
    lowest = min(axes.xaxis.label.get_window_extent(renderer).y0 for axes in figure.axes)
    assert figure.legends[0].get_window_extent(renderer).y1 <= lowest
