"""Nothing grows with the number of updates, of batch sizes, of systems."""

import mmap

import numpy as np
import pytest

from tests.growth.cases import CASES, measure

COUNT = 100
"""More than any cache of the engine holds."""
BLOCKS, RESIDENT = 0.5, 4000.0
"""For each time. Whatever is kept has a block at least; pools of the system's memory move by pages."""


@pytest.mark.parametrize("name", CASES)
def test_nothing_grows(name):
    if name in ("jax", "newton"):
        pytest.importorskip(name)
    growth = measure(CASES[name](), COUNT, windows=6)
    assert growth.blocks < BLOCKS
    assert growth.resident < RESIDENT


def test_growth_is_seen():
    kept = []
    assert measure(lambda i: kept.append(np.zeros(100, np.uint8)), COUNT).blocks > BLOCKS

    def keep_pages(_: int) -> None:
        kept.append(mmap.mmap(-1, 40_000))  # an array may find room that the process has already
        kept[-1].write(b"1" * 40_000)

    assert measure(keep_pages, COUNT).resident > RESIDENT
