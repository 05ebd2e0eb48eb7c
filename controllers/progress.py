"""Progress of a training on standard error: a bar in a terminal, a line now and then elsewhere."""

import io
import sys
import time
from typing import TextIO

from tqdm import tqdm

from controllers.record import Record


class _Nowhere(io.StringIO):
    """Takes text and keeps nothing of it."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


LINE = "{desc}epoch {n_fmt}/{total_fmt}{postfix}, {rate_fmt}, {remaining} left"


class Progress:
    """Shows each record that it is called with: `train(settings, progress=Progress(settings.epochs))`.

    Args:
        epochs: Epochs of the whole training.
        stream: Where to write; standard error by default.
        every: Seconds between two lines where the stream is no terminal.
        name: Stands before the numbers.
        position: Line of the bar, where several trainings share a terminal.
    """

    def __init__(
        self, epochs: int, stream: TextIO | None = None, every: float = 10.0, name: str = "", position: int = 0
    ) -> None:
        self.stream, self.every, self.shown = stream or sys.stderr, every, float("-inf")
        self.terminal = self.stream.isatty()
        self.bar = tqdm(
            total=epochs,
            desc=name if self.terminal or not name else f"{name}: ",
            unit=" epochs",
            # Elsewhere than in a terminal it counts, and its line is written below.
            file=self.stream if self.terminal else _Nowhere(),
            bar_format=None if self.terminal else LINE,
            position=position,
            dynamic_ncols=self.terminal,
        )

    def __call__(self, record: Record) -> None:
        """Show a record, unless one was shown a moment ago."""
        if self.bar.n == 0:  # a resumed training does not begin at the first epoch
            self.bar.n = self.bar.initial = record.epoch - 1
        self.bar.set_postfix_str(f"loss {record.train_loss:.3e}, test {record.test_loss:.3e}", refresh=False)
        self.bar.update(record.epoch - self.bar.n)
        now = time.perf_counter()
        if not self.terminal and (now - self.shown >= self.every or record.epoch >= self.bar.total):
            self.shown = now
            print(self.bar, file=self.stream, flush=True)

    def close(self) -> None:
        """End the line of the bar."""
        self.bar.close()
