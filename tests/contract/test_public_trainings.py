"""The arguments of networks and trainings; see test_public_arguments.py."""

import functools
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from controllers import GRU, MLP, GridCNN, Linear, Training, export, load_controller, train
from controllers.actor_critic import ActorCritic, Settings, begin_anew, learn
from controllers.tracking import tracking
from tests.contract.arguments import Entry, bad, choice, count, device, flag, flow, function, good, number, seed
from tests.contract.entries import NO_SYSTEMS, SYSTEM, try_arguments
from warp_phys import CartPole, Quantum
from warp_phys.flow import Flow

SEQUENCES = (None, 3, "33", (0,), (1.5,), (2**40,), [None], (True,), {}, object())
"""What are no widths of layers."""

NETWORKS = [
    Entry(
        "train",
        train,
        {"settings": Training(out="")},
        {
            "settings": bad(None, 3, "run", {}, Training),
            **{name: bad(0, 1, None, "yes", [], object()) for name in ("resume", "overwrite", "graph")},
            **{name: bad(0, "stop", [], object()) for name in ("stop", "progress")},
        },
    ),
    Entry(
        "MLP",
        MLP,
        {"system": SYSTEM},
        {
            "hidden": st.one_of(good((3,), [2, 2], ()), bad(*SEQUENCES)),
            "activation": choice("tanh", "relu", "elu", "silu", "sigmoid"),
            "init": choice("glorot", "zero-last", "torch"),
            "seed": seed(optional=True),
        },
    ),
    Entry(
        "GridCNN",
        GridCNN,
        {"system": Quantum(points=8), "channels": 2},
        {
            "channels": bad(0, -1, 1.5, None, "3", 2**40),
            "activation": choice("tanh"),
            "init": choice("torch"),
            "seed": seed(optional=True),
        },
        {"channels": "hidden|channels"},
    ),
    Entry(
        "Training",
        Training,
        {},
        {
            "system": choice("cartpole", "quantum"),
            "parameters": bad(3, "x", {"mass": 1.0}, {"poles": 0}, {"dt": -1.0}, None, [1]),
            **{
                name: bad(0, -1, 1.5, None, "3", True, np.nan)
                for name in (
                    "steps",
                    "epochs",
                    "batch",
                    "accumulate",
                    "train_states",
                    "test_states",
                    "checkpoint_every",
                )
            },
            **{name: bad(-1, 1.5, None, "3", True) for name in ("seed", "threads")},
            **{name: bad(0.0, -1.0, np.nan, np.inf, None, "1", True) for name in ("rate", "epsilon", "clip_at")},
            "control_cost": bad(-1.0, np.nan, np.inf, None, "1"),
            "betas": bad(None, 3, (0.9,), (0.9, 1.0), (0.9, -0.1), "ab", (None, 1)),
            "when": choice("final", "every"),
            "flow": flow(),
            "network": choice("auto", "dense"),
            "activation": choice("tanh", "relu"),
            "init": choice("glorot"),
            "precision": choice("float32", "float64"),
            "schedule": choice("constant", "cosine"),
            "clip": choice("none", "value", "norm"),
            "shuffle": flag(),
            "device": device(optional=False),
            "out": bad(3, None, [], 1.5),
            "hidden": bad(*SEQUENCES),
            "memory": st.one_of(good(0, 3), bad(-1, 1.5, None, "3", True, 2**40)),
            "inputs": st.one_of(
                good((), ("clock",), ["noise", "clock"]),
                bad(
                    None, 3, "clock", ("wind",), ("clock", "clock"), (3,), ("sine",), ("sine", "steps"), [[]], object()
                ),
            ),
            "track": bad("position", 3, None, "altitude", (), object()),
            "tracking_cost": bad(-1.0, np.nan, None, "1", True),
            "amplitude": bad(0.0, -1.0, np.nan, np.inf, None, "1", True),
            "period": bad(0, -1, 1.5, None, "3", True),
        },
        {"parameters": "parameter|poles|dt", "hidden": "hidden", "inputs": "inputs|track"},
    ),
    Entry(
        "Training that tracks",
        lambda **given: Training(inputs=("sine",), out="", **given),
        {"track": "position"},
        {
            "track": st.one_of(
                good("velocity"), bad("", "altitude", 3, None, (), ["position"], "position [m]", object())
            ),
            "system": bad("linear_quadratics", 3),
            "network": choice("auto", "dense"),
        },
    ),
    Entry(
        "tracking",
        tracking,
        {"system": SYSTEM, "component": "position"},
        {
            "system": st.one_of(NO_SYSTEMS, bad(tracking(SYSTEM, "position"))),
            "component": st.one_of(good("velocity"), bad("", "altitude", 3, None, (), ["position"], object())),
            "weight": number(0.0, tensors=False),
        },
        {"component": "component|track", "weight": "weight"},
    ),
    Entry(
        "GRU",
        GRU,
        {"system": SYSTEM, "units": 3},
        {
            "units": count(1, 4, 2**16),
            "hidden": st.one_of(good((3,), [2, 2], ()), bad(*SEQUENCES)),
            "activation": choice("tanh", "relu"),
            "init": choice("glorot", "zero-last", "torch"),
            "seed": seed(optional=True),
        },
    ),
    Entry("Linear", Linear, {"system": SYSTEM}, {"init": choice("glorot", "torch"), "seed": seed(optional=True)}),
    *(
        Entry(kind.__name__, kind, {"system": SYSTEM, **more}, {"system": bad(None, 3, "cartpole", object(), CartPole)})
        for kind, more in ((MLP, {}), (Linear, {}), (GRU, {"units": 2}), (GridCNN, {}))
    ),
    Entry(
        "export",
        export,
        {"controller": Linear(SYSTEM), "path": "c.pt2", "system": SYSTEM},
        {
            "controller": bad(None, 3, "net", lambda x: x, torch.nn.Linear, object()),
            "path": bad(None, 3, "x", "", b"c.onnx", Path("c.pt"), Path(), object(), []),
            "system": bad(None, 3, "cartpole", CartPole, object()),
        },
    ),
    Entry(
        "export, counts",
        export,
        {"controller": Linear(SYSTEM), "path": "c.pt2", "system": SYSTEM},
        {name: count(0, 0).filter(lambda p: p[1] is False) for name in ("inputs", "memory")},
    ),
    Entry(
        "load_controller",
        load_controller,
        {"folder": "x"},
        {"folder": bad(None, 3, 1.5, [], {}, object(), b"folder", lambda: 0)},
    ),
]

COUNTS = ("environments", "horizon", "episode", "updates", "critic_epochs", "critic_minibatches", "checkpoint_every")
SHORT: dict[str, Any] = {"environments": 4, "horizon": 2, "episode": 4, "hidden": (3,), "backend": "general"}
"""A small actor-critic."""


@functools.cache
def learner() -> Any:
    """One that is trained no further."""
    return ActorCritic(Settings(**SHORT))


ACTOR_CRITIC = [
    Entry(
        "Settings",
        Settings,
        SHORT,
        {
            "system": choice("cartpole", "quadrotor"),
            "parameters": bad(3, "x", {"mass": 1.0}, {"poles": 0}, {"dt": -1.0}, None, [1], {3: 4}),
            "randomise": st.one_of(
                good((), ("gravity:9:10",), ["gravity:9:10"]),
                bad(
                    None,
                    3,
                    "gravity:9:10",
                    ("gravity",),
                    ("gravity:1:0",),
                    ("gravity:1:nan",),
                    ("mass:1:2",),
                    (3,),
                    [None],
                ),
            ),
            "observe": st.one_of(
                good((), ("position",), ["position"]),
                bad(None, 3, "position", ("altitude",), ("position", "position"), (3,), [None], object()),
            ),
            "flow": flow(),
            "actor": choice("deterministic", "stochastic"),
            "entropy": bad(-1.0, 0.1, np.nan, np.inf, None, "1", True),
            "memory": st.one_of(good(0, 3), bad(-1, 1.5, None, "3", True, 2**40)),
            "state_cost": bad(None, 3, "1111", (1.0,), (-1.0,) * 4, (np.nan,) * 4, ("a",) * 4, object()),
            "limits": bad(None, 3, "1111", (1.0,), (0.0,) * 4, (np.nan,) * 4, ("a",) * 4, object()),
            "scatter": bad(None, 3, "1111", (1.0,), (-1.0,) * 4, (np.inf,) * 4, ("a",) * 4, object()),
            **{name: bad(0, -1, 1.5, None, "3", True, np.nan, 2**70) for name in COUNTS},
            **{
                name: bad(0.0, -1.0, np.nan, np.inf, None, "1", True)
                for name in ("bound", "rate", "critic_rate", "deviation")
            },
            **{name: bad(-1.0, np.nan, np.inf, None, "1", True) for name in ("control_cost", "clip")},
            **{name: bad(-0.1, 1.1, np.nan, None, "1", True) for name in ("discount", "trace", "target_rate")},
            "hidden": bad(*SEQUENCES),
            "activation": choice("tanh", "relu"),
            "schedule": choice("constant", "linear"),
            "betas": bad(None, 3, (0.9,), (0.9, 1.0), (0.9, -0.1), "ab", (None, 1)),
            "precision": choice("float32", "float64"),
            "backend": choice("auto", "fused", "general"),
            "seed": seed(),
            "threads": bad(-1, 1.5, None, "3", True),
            "device": device(optional=False),
            "out": bad(3, None, [], 1.5),
        },
        {
            "parameters": "parameter|poles|dt",
            "episode": "episode|critic_minibatches",
            "horizon": "horizon|episode",
            "randomise": "randomise|gravity|mass",
        },
    ),
    Entry(
        "ActorCritic",
        ActorCritic,
        {"settings": Settings(**SHORT)},
        {
            "settings": bad(None, 3, "cartpole", {}, Settings, Training(out=""), object()),
            "system": NO_SYSTEMS.filter(lambda p: p[0] is not None),
            "flow": flow((Flow(0.9),)).filter(lambda p: p[0] is not None),
            "cost": function(lambda states, controls, parameters: states.square().sum(2)),
            "reset": function(begin_anew(SYSTEM, 4)),
            "graph": flag(),
        },
    ),
    Entry(
        "ActorCritic.step",
        lambda **given: ActorCritic(Settings(**SHORT), **given).step(),
        {},
        {
            "cost": bad(
                lambda s, c, p: 3,
                lambda s, c, p: None,
                lambda s, c, p: s.sum(),
                lambda s, c, p: s.detach().numpy()[:, :, 0],
            ),
            "reset": bad(
                lambda s, a, seed: 3, lambda s, a, seed: (s, a), lambda s, a, seed: None, lambda s, a, seed: (s[:1], a)
            ),
        },
    ),
    Entry(
        "ActorCritic.evaluate",
        lambda **given: learner().evaluate(**given),
        {"episodes": 2, "steps": 2},
        {"episodes": count(), "steps": count(0), "seed": seed()},
    ),
    Entry(
        "learn",
        learn,
        {"settings": Settings(**SHORT)},
        {
            "settings": bad(None, 3, "run", {}, Settings, Training(out="")),
            **{name: bad(0, 1, None, "yes", [], object()) for name in ("resume", "overwrite", "graph")},
            **{name: bad(0, "stop", [], object()) for name in ("stop", "progress")},
        },
    ),
]

GROUPS: dict[str, tuple[int, list[Entry]]] = {"networks": (600, NETWORKS), "actor-critic": (500, ACTOR_CRITIC)}
"""Entries by group, with the number of examples in `make test`."""


@pytest.mark.parametrize("name", GROUPS)
def test_each_argument_works_or_is_refused(name):
    count, entries = GROUPS[name]
    try_arguments(entries, count)
