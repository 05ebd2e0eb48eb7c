"""Progress of a training on standard error: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

from controllers.record import Record


class Progress:
    """Shows each record that it is called with: `train(settings, progress=Progress(settings.epochs))`.

    Args:
        epochs: Epochs of the whole training.
        stream: Where to write; standard error by default.
        every: Seconds between two lines where the stream is no terminal.
    """

    def __init__(self, epochs: int, stream: TextIO | None = None, every: float = 10.0) -> None:
        self.epochs, self.stream, self.every = epochs, stream or sys.stderr, every
        self.terminal = self.stream.isatty()
        self.first: tuple[int, float] | None = None
        self.shown = float("-inf")

    def __call__(self, record: Record) -> None:
        """Show a record, unless one was shown a moment ago."""
        now = time.perf_counter()
        self.first = self.first or (record.epoch, now)
        last = record.epoch >= self.epochs
        if now - self.shown < (0.1 if self.terminal else self.every) and not last:
            return
        self.shown = now
        epochs, seconds = record.epoch - self.first[0], now - self.first[1]
        line = describe(record, self.epochs, epochs / seconds if epochs else None)
        if self.terminal:
            filled = 20 * record.epoch // self.epochs
            # Erase to the end of the line (ESC [K) instead of padding: the terminal may be narrow.
            self.stream.write(f"\r{'█' * filled}{'░' * (20 - filled)} {line}\x1b[K" + ("\n" if last else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line of an unfinished bar."""
        if self.terminal and self.first:
            self.stream.write("\n")


def describe(record: Record, epochs: int, rate: float | None) -> str:
    """One line about a record; `rate` is the speed [epochs/s] where it is known.

    >>> describe(Record(250, 0.2, 0.1, 0.125, 1.0, 0.5, 0.7, 1e-3, 20.0), 1000, 12.5)
    'epoch 250/1000  loss 1.000e-01  test 1.250e-01  12.5 epochs/s  1:00 left'
    """
    line = f"epoch {record.epoch}/{epochs}  loss {record.train_loss:.3e}  test {record.test_loss:.3e}"
    if rate:
        minutes, seconds = divmod(round((epochs - record.epoch) / rate), 60)
        line += f"  {rate:.1f} epochs/s  {minutes}:{seconds:02d} left"
    return line
