"""What the tests of public entries share: a system, rollouts, values of arguments that many have, and the trial."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
import warp as wp
from hypothesis import HealthCheck, given, settings

from controllers import MLP, Linear
from tests.contract.arguments import Entry, Fresh, attempt, bad, good, number
from warp_phys import CartPole, Quadrotor
from warp_phys.interop.torch import Rollout

LONG = int(os.environ.get("WARP_PHYS_EXAMPLES", "0"))
"""Examples of the long mode, of all files together; 0 for `make test`."""
ALL = 6500
"""Examples of all files together in `make test`."""
SYSTEM, STEPS, BATCH = CartPole(), 2, 2
X0 = SYSTEM.sample(BATCH)
STATES, CONTROLS = np.zeros((STEPS + 1, BATCH, 4), np.float32), np.zeros((STEPS, BATCH, 1), np.float32)
NET = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
UNROLLED = Rollout(SYSTEM, NET, STEPS, "R", backend="general")

NO_SYSTEMS = bad(None, 3, "cartpole", CartPole, object(), torch.nn.Linear(4, 1), np.ones(3))
NO_MODULES = bad(None, 3, "net", lambda x: x, torch.nn.Linear, MLP(CartPole(poles=2), (3,)), Linear(Quadrotor()))
NO_ROLLOUTS = bad(None, 3, "rollout", NET, SYSTEM, Rollout, object())
WHEN = st.one_of(
    good("final", "every", [1], (0, 2), np.array([1, 2])),
    bad("last", "", None, 3, 1.5, [], [3], [-1], [1, 1], [1.0], [True], ["final"], object(), {}),
)
NUMBERS = st.one_of(
    good(None, {}, {"gravity": 9.0}, {"pole_mass": [0.1, 0.2]}, {"dt": np.float32(0.01)}, {"gravity": torch.ones(2)}),
    good({"gravity": np.ones(4)[::2]}, {"gravity": np.ones(2)[::-1]}, {"gravity": np.ones(2, ">f8")}, {"gravity": 9}),
    bad(3, "gravity", [1.0], object(), {"mass": 1.0}, {3: 1.0}, {"gravity": "9"}, {"gravity": None}, {"gravity": {}}),
    bad(*({"gravity": value} for value in (np.nan, np.inf, [], 1j, True, "9.8", object(), b"9", [None]))),
    bad(*({"gravity": value} for value in (np.ones((2, 2)), np.array(["a"]), 10**400, [[1.0]], np.ones(0), 1e300))),
    bad({"dt": 0.0}, {"dt": -1.0}, {"pole_mass": 0.0}, {"total_mass": -1.0}, {"half_length": [0.5, 0.0]}),
)
PARAMETERS = st.one_of(NUMBERS, bad({"gravity": [1.0] * 3}))
SAID_PARAMETERS = {"parameters": "parameter"}
LOSS = {"when": WHEN, "control_cost": number(0.0, tensors=False), "parameters": PARAMETERS}


def zeros(*shape: int) -> Fresh:
    return Fresh(lambda: wp.zeros(shape, dtype=float, device="cpu"))


def warp_arrays(shape: tuple[int, ...], columns: int) -> Any:
    """Warp arrays of one shape, and what is none."""
    make = {"dtype": float, "device": "cpu"}
    wide = wp.zeros((*shape[:-1], 2 * columns), **make)
    return st.one_of(
        good(wp.zeros(shape, **make), wide[:, :columns], wide[:, ::2]),
        bad(None, 3, "x", np.zeros(shape, np.float32), torch.zeros(shape), [[0.0] * columns] * shape[0]),
        bad(*(wp.zeros(other, **make) for other in ((1,), (shape[0], columns + 1), (0, columns), (*shape, 1)))),
        bad(wp.zeros(shape, dtype=wp.float64, device="cpu"), wp.zeros(shape, dtype=int, device="cpu")),
        bad(wp.zeros(shape[:1], dtype=wp.vec4, device="cpu")),
    )


def finite(kind: Any) -> Any:
    """Leave out numbers that are not finite, which functions of single steps and losses take as they come."""

    def is_finite(pair: tuple[Any, Any]) -> bool:
        value = pair[0]
        if isinstance(value, torch.Tensor):
            plain = value.device.type == "cpu" and value.layout == torch.strided and value.is_floating_point()
            return not plain or bool(value.isfinite().all())
        return not isinstance(value, np.ndarray) or value.dtype.kind != "f" or bool(np.isfinite(value).all())

    return kind.filter(is_finite)


def examples(count: int) -> Any:
    """So many examples, the same ones each time, or their share of the long mode, others each time."""
    return settings(
        max_examples=LONG * count // ALL if LONG else count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not LONG,
        database=None,
    )


def try_arguments(entries: Sequence[Entry], count: int) -> None:
    """Try entries with one argument at a time that is sensible or nonsense: they work, or refuse in words."""
    tried = st.sampled_from([(entry, argument) for entry in entries for argument in entry.kinds])

    @examples(count)
    @given(tried.flatmap(lambda place: st.tuples(st.just(place), place[0].kinds[place[1]])))
    def run(example: Any) -> None:
        (entry, argument), (value, is_good) = example
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt(entry, argument, value, is_good)

    run()
