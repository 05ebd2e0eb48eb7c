"""Nothing grows with the number of updates, of batch sizes, of systems."""

import mmap

import numpy as np
import pytest

from tests.growth.cases import CASES, measure

COUNT = 100
"""More than any cache of the engine holds."""
PYTHON, RESIDENT = 100.0, 4000.0
"""Bytes for each time. The least thing kept, an entry of a dictionary or an array, takes more than the first; pools of
the system's memory move by pages."""


@pytest.mark.parametrize("name", CASES)
def test_nothing_grows(name):
    if name in ("jax", "newton"):
        pytest.importorskip(name)
    growth = measure(CASES[name](), COUNT, windows=6)
    assert growth.python < PYTHON
    assert growth.resident < RESIDENT


def test_growth_is_seen():
    kept = []
    assert measure(lambda i: kept.append(np.zeros(100, np.uint8)), COUNT).python > PYTHON

    def keep_pages(_: int) -> None:
        kept.append(mmap.mmap(-1, 200_000))  # an array may find room that the process has already
        kept[-1].write(b"1" * 200_000)

    assert measure(keep_pages, COUNT).resident > RESIDENT
