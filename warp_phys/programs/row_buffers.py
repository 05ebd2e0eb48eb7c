"""Memory for the rows of trajectories on a CPU: lent to one pass at a time, used again by later ones."""

from typing import Any

import warp as wp

from warp_phys.core.arrays import aligned_zeros

KEPT_BYTES = 48 * 2**20
"""Most memory for the activations of a forward pass; a longer one computes them again on its way back.

Buffers that wait for a later pass take as much again at most.
"""


class Rows:
    """A buffer for the rows of a trajectory, and a count of the passes that have written to it."""

    def __init__(self, length: int, real: type):
        self.array = aligned_zeros((length,), real, "cpu")
        self.writes = 0


class Buffers:
    """The buffers of a network.

    A pass takes a buffer off a list and puts it back: passes in several threads, or in one another, do not share.
    """

    def __init__(self, real: type):
        self.real = real
        self._scratch: dict[int, list[Rows]] = {}  # by length, for good: a captured graph goes on using it
        self._idle: list[Rows] = []  # what forward passes had kept

    def borrow(self, length: int) -> Rows:
        """Return scratch memory that nobody holds; its contents are what was written last, or zero."""
        try:
            return self._scratch.setdefault(length, []).pop()
        except IndexError:
            return Rows(length, self.real)

    def give_back(self, rows: Rows) -> None:
        """Put scratch memory back."""
        self._scratch[len(rows.array)].append(rows)

    def borrow_kept(self, length: int) -> Rows:
        """Return a buffer of at least that length, for a forward pass that is about to write to it."""
        fitting = sorted((rows for rows in list(self._idle) if len(rows.array) >= length), key=lambda r: len(r.array))
        rows = next((rows for rows in fitting if self._pick(rows)), None) or Rows(length, self.real)
        rows.writes += 1
        return rows

    def set_aside(self, rows: Rows) -> None:
        """Put a buffer back for later passes; where too many wait, those that have waited longest go."""
        self._idle.append(rows)
        waiting = list(self._idle)
        while sum(len(rows.array) for rows in waiting) * wp.types.type_size_in_bytes(self.real) > KEPT_BYTES:
            self._pick(waiting.pop(0))

    def take(self, kept: Any) -> Rows | None:
        """Return what a forward pass has kept (`network.Kept`), or None if another pass has had its buffer."""
        if kept.owned:
            kept.owned = False
            return kept.rows
        if not self._pick(kept.rows):
            return None
        if kept.rows.writes != kept.write:
            self._idle.append(kept.rows)
            return None
        return kept.rows

    def _pick(self, rows: Rows) -> bool:
        """Take a buffer off the list of those that wait; return whether it was still there."""
        try:
            self._idle.remove(rows)
        except ValueError:
            return False
        return True
