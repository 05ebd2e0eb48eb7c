"""What a training leaves for the eye: one row of numbers per epoch, as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from controllers.checkpoint import atomic_write
from warp_phys.interop.extras import require


class Record(NamedTuple):
    """One epoch of a training."""

    epoch: int
    """Epochs done so far, 1 after the first."""
    minibatch_loss: float
    """Mean over the epoch's minibatches of the loss before each update."""
    train_loss: float
    """Loss over all training states after the epoch."""
    test_loss: float
    """Loss over all test states after the epoch."""
    update_norm_squared: float
    """Squared norm of the epoch's last update, before clipping."""
    cosine: float
    """Cosine between the flows M and R at the epoch's last update."""
    agreement: float
    """Share of components at which M and R have the same sign, at the epoch's last update."""
    rate: float
    """Learning rate."""
    seconds: float
    """Time spent in training so far [s], earlier parts of a resumed run included."""


def write_record(path: str | Path, records: Sequence[Record]) -> None:
    """Write records as comma separated values under a header line, to full precision."""
    lines = [",".join(Record._fields), *(",".join(repr(value) for value in record) for record in records)]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def read_record(path: str | Path) -> np.ndarray:
    """Read a record: one entry per epoch, columns by name, such as `read_record(path)["test_loss"]`."""
    table = np.genfromtxt(path, delimiter=",", names=True)
    return np.atleast_1d(table) if table.size else table.reshape(0)


def plot_record(path: str | Path, records: Sequence[Record], title: str = "") -> None:
    """Draw the curves of one training: losses, norm of the update, cosine between M and R."""
    require("matplotlib", "plots")
    # Figures without pyplot: no window system is touched and any thread may draw. Imported late: it takes a second.
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = {name: np.array(values) for name, values in zip(Record._fields, zip(*records, strict=True), strict=True)}
    figure = Figure(figsize=(7, 8), layout="constrained")
    losses, norms, cosines = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    for name, style in (("minibatch_loss", ":"), ("train_loss", "--"), ("test_loss", "-")):
        losses.plot(columns["epoch"], columns[name], style, linewidth=1, label=name.replace("_", " "))
    losses.set(yscale="log", ylabel="loss", title=title)
    losses.legend()
    norms.plot(columns["epoch"], np.sqrt(columns["update_norm_squared"]), linewidth=1, color="black")
    norms.set(yscale="log", ylabel="norm of the update")
    cosines.plot(columns["epoch"], columns["cosine"], linewidth=1, color="black")
    cosines.axhline(0, linewidth=0.5, color="grey")
    cosines.set(ylim=(-1.05, 1.05), ylabel="cosine of M and R", xlabel="epoch")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
