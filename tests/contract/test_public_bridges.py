"""The arguments of bridges to other frameworks, and of networks in the physics; see test_public_arguments.py."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import warp as wp

from tests.contract.arguments import (
    Entry,
    Fresh,
    array,
    bad,
    choice,
    count,
    device,
    dtype,
    flag,
    flow,
    function,
    good,
    linear_flow,
    number,
    seed,
)
from tests.contract.entries import (
    CONTROLS,
    NET,
    NO_SYSTEMS,
    PARAMETERS,
    SAID_PARAMETERS,
    STATES,
    STEPS,
    SYSTEM,
    UNROLLED,
    WHEN,
    X0,
    finite,
    try_arguments,
    warp_arrays,
    zeros,
)
from warp_phys import CartPole, Pendulum, Surrogate, gate
from warp_phys.flow import Flow, agree, geometric, minmod
from warp_phys.interop.torch import Hybrid, Rollout, TorchSystem, pointwise_cost


def gymnasium_entries() -> list[Entry]:
    pytest.importorskip("gymnasium")
    from warp_phys.interop.gymnasium import SystemEnv, SystemVectorEnv, make_vector_env
    from warp_phys.interop.gymnasium.differentiable import DifferentiableVectorEnv

    env, vector = SystemEnv(SYSTEM), SystemVectorEnv(SYSTEM, 3)
    env.reset(seed=0)
    vector.reset(seed=0)
    torchy = DifferentiableVectorEnv(SYSTEM, 3, max_episode_steps=4)
    torchy.reset(seed=0)

    def assign_flow(flow: Any) -> None:
        torchy.flow = flow

    task = {
        "action_scale": number(positive=True),
        "control_cost": number(0.0, tensors=False),
        "divergence_reward": number(),
        "dtype": dtype(),
        "device": device(),
        "render_mode": st.one_of(good(None, "rgb_array"), bad("human", 3, [], "")),
    }
    system = st.one_of(good("cartpole", SYSTEM), bad(None, 3, "pole", CartPole, object(), ["cartpole"]))
    seeds = st.one_of(
        good(None, 3, [1, 2, 3], [None, 1, 2], np.int64(4)),
        bad(-1, 1.5, "abc", [1, 2], [1.5, 1, 1], ["a"] * 3, {}, object()),
    )
    actions = lambda *shape: array(shape).map(lambda p: (p[0], p[1] or None))  # noqa: E731
    return [
        Entry("SystemEnv", SystemEnv, {"system": SYSTEM}, {"system": system, **task}),
        Entry(
            "SystemVectorEnv",
            SystemVectorEnv,
            {"system": SYSTEM},
            {
                "num_envs": count(),
                "max_episode_steps": count(optional=True),
                "autoreset_mode": choice("NEXT_STEP", "SAME_STEP", "DISABLED", "NextStep", "SameStep", "Disabled"),
                **task,
            },
        ),
        Entry(
            "DifferentiableVectorEnv",
            DifferentiableVectorEnv,
            {"system": SYSTEM},
            {
                "system": system,
                "num_envs": count(),
                "max_episode_steps": count(optional=True),
                "autoreset_mode": choice("NEXT_STEP", "SAME_STEP", "DISABLED", "NextStep", "SameStep", "Disabled"),
                "flow": linear_flow(Flow(0.9)),
                **task,
            },
        ),
        Entry(
            "DifferentiableVectorEnv.flow",
            assign_flow,
            {"flow": "R"},
            {"flow": linear_flow(Flow(window=2))},
        ),
        Entry(
            "DifferentiableVectorEnv.step",
            torchy.step,
            {"actions": torch.zeros(3, 1)},
            {"actions": finite(array((3, 1), ("torch",), lists=False))},
        ),
        Entry(
            "DifferentiableVectorEnv.reset",
            torchy.reset,
            {},
            {
                "seed": seeds,
                "options": st.one_of(
                    good(
                        None,
                        {},
                        {"states": torch.zeros(3, 4)},
                        {"states": np.zeros((3, 4))},
                        {"reset_mask": np.ones(3, bool)},
                    ),
                    bad(
                        {"reset_mask": [1, 0, 1]},
                        {"reset_mask": [True]},
                        {"reset_mask": "a"},
                        {"states": X0},
                        {"states": "a"},
                        {"states": np.full((3, 4), np.nan)},
                        {"states": object()},
                        {"states": [[1], [1, 2]]},
                        {"states": torch.zeros(3, 4).to("meta")},
                        {"states": torch.ones(3, 4) * 1j},
                        3,
                        {"seed": 1},
                    ),
                ),
            },
        ),
        Entry(
            "make_vector_env",
            make_vector_env,
            {"system": SYSTEM},
            {"system": system, "num_envs": count(), "differentiable": flag()},
        ),
        Entry("SystemEnv.step", env.step, {"action": np.zeros(1)}, {"action": actions(1)}, {"action": "action"}),
        Entry("SystemVectorEnv.step", vector.step, {"actions": np.zeros((3, 1))}, {"actions": actions(3, 1)}),
        Entry(
            "SystemEnv.reset",
            env.reset,
            {},
            {
                "options": st.one_of(
                    good(None, {}, {"state": X0[0]}),
                    bad(3, {"x": 1}, {"state": 3}, {"state": "a"}, {"state": [np.nan] * 4}),
                )
            },
        ),
        Entry(
            "SystemVectorEnv.reset",
            vector.reset,
            {},
            {
                "seed": seeds,
                "options": bad(
                    {"reset_mask": [1, 0, 1]}, {"reset_mask": [True]}, {"states": X0}, {"states": "a"}, 3, {"seed": 1}
                ),
            },
        ),
    ]


def step_of(system: Any) -> None:
    """A step on zeros."""
    x, c, y = (
        wp.zeros((3, n), dtype=float, device="cpu") for n in (system.state_size, system.control_size, system.state_size)
    )
    system.step(x, c, y)


def jax_entries() -> list[Entry]:
    jax = pytest.importorskip("jax")
    from warp_phys.interop import jax as bridge

    net = bridge.MLP((4, 3, 1))
    params = net.init()
    refused = lambda kind: kind.filter(lambda p: p[1] is False)  # noqa: E731, what works is compiled
    return [
        Entry(
            "jax.rollout",
            bridge.rollout,
            {"system": SYSTEM, "controller": net, "params": params, "x0": X0, "steps": STEPS},
            {
                "system": NO_SYSTEMS,
                "x0": refused(array((2, 4))),
                "steps": refused(count()),
                "flow": refused(flow()),
                "controller": bad(None, 3, "net", []),
                "backend": refused(choice("auto")),
                "parameters": refused(PARAMETERS),
            },
            SAID_PARAMETERS,
        ),
        Entry(
            "jax.step",
            bridge.step,
            {"system": SYSTEM, "x": X0, "c": np.zeros((2, 1), np.float32)},
            {"system": NO_SYSTEMS, "x": refused(array((2, 4))), "parameters": refused(PARAMETERS)},
            SAID_PARAMETERS,
        ),
        Entry(
            "jax.loss",
            bridge.loss,
            {"system": SYSTEM, "states": jax.numpy.asarray(STATES), "controls": jax.numpy.asarray(CONTROLS)},
            {
                "when": refused(WHEN),
                "control_cost": refused(number(0.0, tensors=False)),
                "parameters": refused(PARAMETERS),
                "controls": bad("x", 3, [1.0], object()),
            },
            SAID_PARAMETERS,
        ),
        Entry(
            "jax.MLP",
            bridge.MLP,
            {"sizes": (4, 1)},
            {
                "sizes": st.one_of(good((4, 1), [4, 2, 1]), bad(3, None, "abc", (4,), (0, 1), (1.5, 1))),
                "activation": choice("tanh", "relu"),
            },
        ),
        Entry(
            "JaxSystem",
            bridge.JaxSystem,
            {"function": lambda x, c: x, "state_size": 2, "control_size": 1},
            {
                "function": function(lambda x, c: x, optional=False),
                "state_size": count(),
                "control_size": count(),
                "cost": function(lambda x: x.sum(1)),
            },
        ),
        Entry(
            "JaxSystem.step",
            lambda function: step_of(bridge.JaxSystem(function, 2, 2)),
            {"function": lambda x, c: x + c},
            {
                "function": bad(
                    lambda x, c: x[:1],
                    lambda x, c: 3,
                    lambda x, c: None,
                    lambda x, c: (x, c),
                    lambda x, c: np.asarray(x),
                    lambda x: x,
                    lambda x, c: x > 0,
                    lambda x, c: x.sum(1),
                    lambda x, c: x if x.sum() > 0 else c,
                )
            },
        ),
        Entry(
            "JaxSystem.loss",
            bridge.JaxSystem(lambda x, c: x, 4, 1, cost=lambda x: (x * x).sum(1)).loss,
            {"states": jax.numpy.asarray(STATES), "controls": jax.numpy.asarray(CONTROLS)},
            {
                "when": refused(WHEN),
                "control_cost": refused(number(0.0, tensors=False)),
                "states": bad(
                    None, 3, "x", np.ones((2, 2)), jax.numpy.ones((3, 2, 5)), jax.numpy.ones((3, 4)), object()
                ),
                "controls": bad("x", 3, [1.0], object()),
            },
        ),
        Entry(
            "jax.trajectory",
            bridge.trajectory,
            {"system": SYSTEM, "x0": X0, "controls": CONTROLS},
            {
                "system": NO_SYSTEMS,
                "x0": refused(array((2, 4))),
                "controls": refused(array((2, 2, 1))),
                "flow": refused(linear_flow()),
                "parameters": refused(PARAMETERS),
                "inputs": bad(3, "x", np.ones(3), np.ones((2, 3, 1))),
            },
            {**SAID_PARAMETERS, "x0": "x0|controls", "inputs": "inputs"},
        ),
        Entry(
            "jax.why_general",
            bridge.why_general,
            {"system": SYSTEM, "controller": net, "params": params, "x0": X0},
            {"system": NO_SYSTEMS, "x0": refused(array((2, 4))), "controller": bad(None, 3, "net", [])},
        ),
        Entry(
            "jax.check_finite",
            bridge.check_finite,
            {"states": jax.numpy.zeros((3, 2, 4))},
            {"states": bad(None, 3, "x", object(), [], np.array("a"))},
        ),
        Entry("jax.MLP.init", net.init, {}, {"seed": seed(), "dtype": refused(dtype())}),
    ]


def newton_entries() -> list[Entry]:
    newton = pytest.importorskip("newton")
    from tests.interop.newton_models import cartpole
    from warp_phys.interop.newton import NewtonSystem

    builder = newton.ModelBuilder()
    builder.replicate(cartpole(), 2)
    model, blind = builder.finalize("cpu", requires_grad=True), cartpole().finalize("cpu")
    system = NewtonSystem(model)
    refused = lambda kind: kind.filter(lambda p: p[1] is False)  # noqa: E731, what works takes a while
    return [
        Entry(
            "NewtonSystem",
            NewtonSystem,
            {"model": model},
            {
                "model": bad(None, 3, "model", cartpole(), blind, newton.Model, object(), SYSTEM),
                "solver": bad(
                    None,
                    3,
                    "solver",
                    newton.solvers.SolverXPBD,
                    object(),
                    int,
                    newton.solvers.SolverFeatherstone(blind),
                ),
                "dt": refused(number(positive=True)),
                "substeps": refused(count()),
                "control": choice("joint_f"),
                "joints": bad(3, "slide", ["nothing"], [], [3], ["slide", "slide"], object(), {"slide": 1, "no": 2}),
                "gain": bad(
                    None, "x", np.nan, np.inf, [1.0, 2.0, 3.0], [], ["a", "b"], [np.nan, 1.0], 1j, object(), {}
                ),
                "contacts": refused(flag()),
                "graph": refused(flag()),
            },
            {"solver": "solver|interval"},
        ),
        Entry(
            "NewtonSystem.from_builder",
            NewtonSystem.from_builder,
            {"builder": cartpole(), "worlds": 2, "device": "cpu"},
            {
                "builder": bad(None, 3, "builder", model, newton.ModelBuilder, object()),
                "worlds": refused(count(limit=2**31 - 1)),
                "ground": refused(flag()),
                "device": refused(device()),
            },
        ),
        Entry(
            "NewtonSystem.sample",
            system.sample,
            {"batch": 2},
            {"batch": count(), "seed": seed(), "dtype": dtype(), "spread": number(0.0)},
        ),
        Entry(
            "NewtonSystem.step",
            system.step,
            {"x": zeros(2, 4), "c": zeros(2, 2), "y": zeros(2, 4)},
            {"x": warp_arrays((2, 4), 4), "c": warp_arrays((2, 2), 2), "y": warp_arrays((2, 4), 4)},
            {"x": "x|c|y"},
        ),
    ]


class Gives(torch.nn.Module):
    """Anything."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, rows: torch.Tensor) -> Any:
        return self.made(rows)


SMALL = TorchSystem(lambda x, c: x, 2, 1)
NETWORKS_IN_THE_PHYSICS = [
    Entry(
        "Hybrid",
        Hybrid,
        {"system": SYSTEM, "module": torch.nn.Linear(5, 4)},
        {
            "system": st.one_of(NO_SYSTEMS, bad(SMALL), good(Pendulum(), SYSTEM)),
            "module": bad(None, 3, "net", lambda x: x, torch.nn.Linear, object()),
            "gives": st.one_of(
                good("residual", "controls", ("gravity",), ["gravity", "dt"], "gravity"),
                bad(
                    None,
                    3,
                    "",
                    "inputs",
                    "x",
                    (),
                    [],
                    ("gravity", "gravity"),
                    ("mass",),
                    [3],
                    object(),
                    {},
                    [["gravity"]],
                ),
            ),
        },
        {"module": "module"},
    ),
    Entry(
        "rollout of a Hybrid",
        lambda module: Rollout(Hybrid(SYSTEM, module, "controls"), NET, STEPS, "R", backend="general")(X0),
        {"module": torch.nn.Linear(5, 1)},
        {
            "module": bad(
                torch.nn.Linear(5, 2),
                torch.nn.Linear(3, 1),
                torch.nn.Linear(5, 1).double(),
                Gives(lambda rows: None),
                Gives(lambda rows: rows.sum()),
                Gives(lambda rows: rows[:1, :1]),
                Gives(lambda rows: rows[:, :1] > 0),
                Gives(lambda rows: (rows[:, :1], rows)),
                Gives(lambda rows: rows[:, 0]),
            )
        },
    ),
    Entry(
        "Surrogate",
        Surrogate,
        {"forward": SYSTEM, "backward": SYSTEM},
        {
            "forward": st.one_of(
                good(CartPole(dt=0.01)), bad(None, 3, "x", CartPole, object(), CartPole(poles=2), NET)
            ),
            "backward": st.one_of(
                good(CartPole(dt=0.01)), bad(None, 3, "x", CartPole, object(), CartPole(poles=2), NET)
            ),
        },
        {"forward": "forward", "backward": "backward"},
    ),
    Entry(
        "pointwise_cost",
        pointwise_cost,
        {"system": SYSTEM, "states": torch.from_numpy(STATES), "times": (1,), "parameters": {}},
        {
            "system": NO_SYSTEMS,
            "states": finite(array(STATES.shape, ("torch",), lists=False)),
            "times": st.one_of(
                good((1,), [0, 2], range(3)), bad(None, 3, "1", [3], [-1], [1.5], [True], [None], object())
            ),
            "parameters": PARAMETERS.filter(lambda p: p[0] is not None),
        },
        SAID_PARAMETERS,
    ),
]


def gated(x: Any, weight: Any) -> None:
    """A gate on a tape."""
    with wp.Tape():
        gate(x, weight)


ON_TAPES = [
    Entry(
        "gate",
        gated,
        {"x": Fresh(lambda: wp.zeros(3, dtype=float, device="cpu", requires_grad=True)), "weight": 1.0},
        {
            "x": bad(None, 3, "x", np.ones(3), torch.ones(3), wp.zeros(3, dtype=float, device="cpu")),
            "weight": st.one_of(
                number().filter(lambda p: not isinstance(p[0], torch.Tensor)),
                good(wp.zeros(1, dtype=float, device="cpu"), wp.zeros(3, dtype=float, device="cpu")),
                bad(
                    wp.zeros(2, dtype=float, device="cpu"),
                    wp.zeros(3, dtype=wp.float64, device="cpu"),
                    wp.zeros((3, 1), dtype=float, device="cpu"),
                ),
            ),
        },
    ),
    *(
        Entry(
            name,
            rule,
            {"base": np.ones(3), "other": np.ones(3)},
            {
                side: st.one_of(
                    good(np.full(3, np.nan), np.ones(3)[::-1]),
                    bad(
                        None,
                        3,
                        "x",
                        [1.0, 1.0, 1.0],
                        np.ones(2),
                        np.ones((3, 1)),
                        np.array(["a"] * 3),
                        object(),
                        torch.ones(3),
                    ),
                )
                for side in ("base", "other")
            },
            {"base": "base|other", "other": "base|other"},
        )
        for name, rule in (("agree", agree), ("geometric", geometric), ("minmod", minmod))
    ),
]


@functools.cache
def compiled() -> Any:
    """A rollout in code that torch compiles."""
    return torch.compile(lambda x0, **given: UNROLLED(x0, **given)[0], backend="eager")


COMPILED = [
    Entry(
        "compiled rollout",
        lambda **given: compiled()(**given),
        {"x0": torch.from_numpy(X0)},
        {
            "x0": bad(
                torch.ones(2, 3), torch.ones(4), torch.ones(2, 4, dtype=int), torch.ones(2, 4, 1), torch.ones(0, 4)
            ),
            "parameters": bad({"mass": 1.0}, {"gravity": "x"}, {"gravity": torch.ones(3)}),
        },
        SAID_PARAMETERS,
    )
]

GROUPS: dict[str, tuple[int, Callable[[], list[Entry]]]] = {
    "gymnasium": (450, gymnasium_entries),
    "jax": (300, jax_entries),
    "newton": (200, newton_entries),
    "networks in the physics": (150, lambda: NETWORKS_IN_THE_PHYSICS),
    "on tapes": (100, lambda: ON_TAPES),
    "compiled": (6, lambda: COMPILED),
}
"""Entries by group, with the number of examples in `make test`."""


@pytest.mark.parametrize("name", GROUPS)
def test_each_argument_works_or_is_refused(name):
    count, entries = GROUPS[name]
    try_arguments(entries(), count)
