"""Instructions that a process executes, counted by Linux's `perf` where there is one and the processor lets it."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable

SETTLE_SECONDS = 0.5
"""Time for `perf` to attach to a process."""
COMMAND = ("perf", "stat", "--field-separator", ",", "--event", "instructions:u", "--pid")


def count_instructions(process: int, action: Callable[[], object]) -> int | None:
    """Return the instructions in user space of a running process and its threads while `action` runs; None if unknown.

    The process should do nothing else meanwhile.
    """
    if shutil.which(COMMAND[0]) is None:
        return None
    perf = subprocess.Popen(
        [*COMMAND, str(process)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={"LC_ALL": "C"}
    )
    time.sleep(SETTLE_SECONDS)
    try:
        action()
    finally:
        perf.send_signal(signal.SIGINT)
        text = perf.communicate()[1]
    return parse_count(text)


def parse_count(text: str) -> int | None:
    """Read the count from what `perf` prints; None where it was not counted.

    >>> parse_count("123456,,instructions:u,1000,100.00,,"), parse_count("<not supported>,,instructions:u,0,100.00,,")
    (123456, None)
    """
    for line in text.splitlines():
        cells = line.split(",")
        if len(cells) > 2 and cells[2].startswith("instructions") and cells[0].isdigit():
            return int(cells[0])
    return None
