"""A training small enough for a test, and comparisons of trainings."""

from dataclasses import replace

import torch

from controllers.record import Record
from controllers.settings import Training

SMALL = Training(
    parameters={"poles": 1, "dt": 0.02},
    steps=20,
    hidden=(16, 16),
    epochs=4,
    batch=8,
    train_states=32,
    test_states=16,
    checkpoint_every=2,
    out="",
)

GIVEN = {"inputs": ("noise", "steps"), "track": "position", "period": 5, "memory": 4, "hidden": (8,), "when": "every"}
"""Settings of a training with a reference and a memory."""


def small(**changes) -> Training:
    """The small training with changes."""
    return replace(SMALL, **changes)


def same_bits(one, other) -> bool:
    """Whether two modules have the same weights, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def without_seconds(records) -> list[Record]:
    """Records without the one number that no run repeats."""
    return [record._replace(seconds=0.0) for record in records]


def never() -> bool:
    """Ask nobody to stop."""
    return False
