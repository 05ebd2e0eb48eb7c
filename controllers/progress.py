"""Progress of a training on standard error: a bar in a terminal, a line now and then elsewhere."""

import io
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from controllers.record import Record


class _Nowhere(io.StringIO):
    """Takes text and keeps nothing of it."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


LINE = " {n_fmt}/{total_fmt}{postfix}, {rate_fmt}, {remaining} left"


def _losses(record: Record) -> str:
    """What is shown of an epoch."""
    return f"loss {record.train_loss:.3e}, test {record.test_loss:.3e}"


class Progress:
    """Shows each record that it is called with: `train(settings, progress=Progress(settings.epochs))`.

    Args:
        total: Epochs of the whole training, or what else there is a record of.
        stream: Where to write; standard error by default.
        every: Seconds between two lines where the stream is no terminal.
        name: Stands before the numbers.
        position: Line of the bar, where several trainings share a terminal.
        unit: Of what there is a record each, whose first number counts them.
        words: What is shown of a record.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        every: float = 10.0,
        name: str = "",
        position: int = 0,
        unit: str = "epoch",
        words: Callable[[Any], str] = _losses,
    ) -> None:
        from tqdm import tqdm  # noqa: PLC0415, benchmarks read command lines where it is not installed

        self.words = words
        self.stream, self.every, self.shown = stream or sys.stderr, every, float("-inf")
        self.terminal = self.stream.isatty()
        self.bar = tqdm(
            total=total,
            desc=name if self.terminal or not name else f"{name}: ",
            unit=unit,
            # Elsewhere than in a terminal it counts, and its line is written below.
            file=self.stream if self.terminal else _Nowhere(),
            bar_format=None if self.terminal else "{desc}" + unit + LINE,
            position=position,
            dynamic_ncols=self.terminal,
        )

    def __call__(self, record: tuple[Any, ...]) -> None:
        """Show a record, unless one was shown a moment ago."""
        done = record[0]
        if self.bar.n == 0:  # a resumed training does not begin at the first epoch
            self.bar.n = self.bar.initial = done - 1
        self.bar.set_postfix_str(self.words(record), refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.perf_counter()
        if not self.terminal and (now - self.shown >= self.every or done >= self.bar.total):
            self.shown = now
            print(self.bar, file=self.stream, flush=True)

    def close(self) -> None:
        """End the line of the bar."""
        self.bar.close()
