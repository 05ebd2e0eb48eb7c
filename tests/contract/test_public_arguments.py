"""Every public entry with one argument at a time that is sensible or nonsense: it works, or refuses in words.

Over 6000 examples in the files test_public_*.py, the same ones each time. WARP_PHYS_EXAMPLES=200000 is the long mode:
so many, others each time.
"""

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
    either,
    flag,
    flow,
    function,
    good,
    linear_flow,
    number,
    seed,
    shape_of,
)
from tests.contract.entries import (
    CONTROLS,
    LOSS,
    NET,
    NO_MODULES,
    NO_ROLLOUTS,
    NO_SYSTEMS,
    NUMBERS,
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
from warp_phys import (
    CartPole,
    Combined,
    Dense,
    Flow,
    Hopper,
    LinearQuadratic,
    Pendulum,
    Polynomial,
    Quadrotor,
    Quantum,
    Repulsion,
    audit,
)
from warp_phys import Rollout as WarpRollout
from warp_phys.diagnose import plane
from warp_phys.diagnose import rotation as rotation_by_probes
from warp_phys.diagnose.landscape import Landscape
from warp_phys.flow import agree, resolve
from warp_phys.interop.torch import (
    RecedingHorizon,
    Rollout,
    Step,
    TorchSystem,
    Update,
    diagnose,
    identify,
    jacobians,
    plan,
    rotation,
    trajectory,
)
from warp_phys.systems.integrators import INTEGRATORS

REMEMBERING = Rollout(TorchSystem(lambda x, c: x + 0.1 * c, 2, 2), torch.nn.Identity(), STEPS, "R")


class Remembers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4 + 2 + 3, 1 + 3)

    def forward(self, x, w, h):
        out = self.layer(torch.cat([x, w, h], 1))
        return out[:, :1], out[:, 1:]


BESIDE = Rollout(SYSTEM, Remembers(), STEPS, "R", memory=3, inputs=2)


def of_system(kind: type, integrators: tuple[str, ...] = tuple(INTEGRATORS), **counts: Any) -> Entry:
    """The constructor of a system: each physical parameter in its range."""
    example = kind()
    own: dict[str, Any] = {
        name: number(
            least=0.0 if example.range_of(name) == "not negative" else None,
            positive=example.range_of(name) == "positive",
        )
        for name in example.parameter_names
    }
    if integrators:
        own["integrator"] = choice(*integrators)
    return Entry(kind.__name__, kind, {}, own | counts)


def dimensions(value: Any) -> int:
    return len(shape_of(value))


ADAM = Fresh(lambda: torch.optim.Adam(NET.parameters()))
RULES = st.one_of(
    good(agree, np.minimum, lambda a, b: a, lambda base, other: base + other),
    bad(None, 3, "agree", lambda: 0, lambda a: a, lambda a, b, c: a, object(), []),
)
LOSSES = function(lambda states, controls: states.square().mean())

SYSTEMS = [
    of_system(CartPole, poles=count(1, 9, 1024)),
    of_system(Pendulum, links=count(1, 9, 15)),
    of_system(Repulsion, drivers=count(1, 9, 1024), evaders=count(1, 9, 1024)),
    of_system(Quantum, (), points=count(3, 9, 1024), target=count(1, 32, 32)),
    of_system(Polynomial, ()),
    of_system(Quadrotor),
    of_system(Hopper),
    of_system(LinearQuadratic, ("rk4", "euler"), A=array((2, 2), values=(0.0, 1.0)), B=array((2, 1))),
    *(
        Entry(
            f"{type(system).__name__}.sample",
            system.sample,
            {"batch": 3},
            {"batch": count(), "seed": seed(), "dtype": dtype()},
        )
        for system in (CartPole(), Pendulum(), Repulsion(), Quantum(), Polynomial(), Quadrotor(), Hopper())
    ),
    Entry(
        "System.parameter_array",
        SYSTEM.parameter_array,
        {"device": "cpu"},
        {
            "values": NUMBERS,
            "device": device(),
            "dtype": dtype(),
            "requires_grad": flag(),
        },
        {"values": "parameter"},
    ),
]

IN_WARP = [
    Entry(
        "System.step",
        SYSTEM.step,
        {"x": zeros(3, 4), "c": zeros(3, 1), "y": zeros(3, 4)},
        {
            "x": warp_arrays((3, 4), 4),
            "c": warp_arrays((3, 1), 1),
            "y": warp_arrays((3, 4), 4),
            "parameters": st.one_of(
                good(None), bad(3, {"gravity": 1.0}, np.ones(3), wp.zeros(1, dtype=float, device="cpu"))
            ),
        },
        {"x": "x|c|y", "c": "c"},
    ),
    Entry(
        "System.step_vjp",
        SYSTEM.step_vjp,
        {"x": zeros(3, 4), "c": zeros(3, 1), "adj_y": zeros(3, 4), "adj_x": zeros(3, 4), "adj_c": zeros(3, 1)},
        {"adj_y": warp_arrays((3, 4), 4), "adj_x": warp_arrays((3, 4), 4), "adj_c": warp_arrays((3, 1), 1)},
    ),
    Entry(
        "Dense",
        Dense,
        {"sizes": (4, 3, 1), "device": "cpu"},
        {
            "sizes": st.one_of(
                good((4, 3, 1), [4, 1], np.array([4, 1])), bad(3, "abc", None, (4,), (), (4, 0), (4, 2.0), {})
            ),
            "activation": choice("tanh", "relu"),
            "device": device(),
            "dtype": dtype(),
            "seed": seed(),
            "parameters": st.one_of(good(None), bad(3, "w", [], [1, 2, 3, 4], [np.ones((3, 4))] * 4)),
        },
    ),
    Entry(
        "Rollout in Warp",
        WarpRollout,
        {"system": SYSTEM, "controller": Dense((4, 3, 1), device="cpu"), "steps": STEPS},
        {
            "system": NO_SYSTEMS,
            "controller": bad(None, 3, NET, Dense, Dense((5, 1), device="cpu")),
            "steps": count(),
            "flow": flow(("geometric",), (Combined(rule=np.minimum), "averaged")),
            "on_divergence": choice("raise", "ignore"),
            "backend": choice("auto", "fused", "general"),
            "check": choice("auto", "always"),
            "memory": bad(-1, 1, 1.5, None, "1"),
            "inputs": bad(-1, 2, 1.5, None, "1"),
        },
        {"flow": "flow|rule", "memory": "memory|controller", "inputs": "inputs|controller"},
    ),
    Entry(
        "rollout in Warp",
        WarpRollout(SYSTEM, Dense((4, 3, 1), device="cpu"), STEPS),
        {"x0": zeros(2, 4)},
        {"x0": warp_arrays((2, 4), 4)},
    ),
]

FLOWS = [
    Entry("resolve", resolve, {"flow": "R"}, {"flow": flow()}),
    Entry(
        "Flow",
        Flow,
        {},
        {
            **{
                name: st.one_of(number(), array((3,), lists=True)).map(
                    lambda pair: (pair[0], pair[1] if pair[1] else None)
                )
                for name in ("physics", "controller")
            },
            "memory": number().map(lambda pair: (pair[0], pair[1] if pair[1] else None)),
            "window": count(optional=True),
            "limit": st.one_of(number(least=0.0), good(None)).filter(lambda p: p[0] is not None),
        },
    ),
    Entry(
        "Combined",
        Combined,
        {},
        {
            "base": bad(None, "R", 3, Combined()),
            "other": bad(None, "R", 3, Combined()),
            "rule": RULES,
            "either": bad(0, 1, "", None),
            "whole": flag(),
            "memory": number(0.0).filter(lambda pair: pair[1] is False),
        },
    ),
    *(
        Entry(
            f"rule {name}",
            lambda rule, x: Combined(rule=rule).apply(x, x),
            {"rule": agree, "x": np.ones(3)},
            {
                "rule": bad(
                    lambda a, b: a.sum(),
                    lambda a, b: a[:1],
                    lambda a, b: 3,
                    lambda a, b: None,
                    lambda a, b: a.nothing,
                    lambda a, b: a > b,
                    lambda a, b: a.tolist(),
                    lambda a, b: a @ "x",
                    lambda a, b: a[5],
                    lambda a, b: a.astype(np.float32),
                )
            },
        )
        for name in ("in numpy",)
    ),
]

LANDSCAPE = Landscape(steps=2, device="cpu")
THETA = array((3, 2), dtype="float64")
NUMERIC = [
    Entry(
        "Landscape",
        Landscape,
        {"device": "cpu"},
        {"system": bad(None, SYSTEM, "polynomial", Polynomial), "steps": count(), "dtype": dtype(), "device": device()},
    ),
    Entry(
        "Landscape.evaluate",
        LANDSCAPE.evaluate,
        {"theta": np.ones((3, 2))},
        {
            "theta": st.one_of(THETA, bad([])),
            "flows": flow((["R", "M"], ("C",), []), (["X"], 3, ["averaged"])),
            "parameters": st.one_of(
                good(None, {}, {"target": 1.0}, {"start": np.ones(3)}), bad({"start": np.ones(2)}, 3, {"mass": 1.0})
            ),
        },
        {"flows": "flow", "parameters": "parameter"},
    ),
    Entry(
        "Landscape.jacobian",
        LANDSCAPE.jacobian,
        {"theta": np.ones((3, 2))},
        {"step": number(positive=True), "theta": THETA},
        {"theta": "theta|points"},
    ),
    Entry(
        "plane.jacobian",
        plane.jacobian,
        {"field": lambda p: p, "points": np.ones((3, 2))},
        {"points": THETA, "step": number(positive=True)},
    ),
    Entry(
        "plane.zero_curves",
        plane.zero_curves,
        {"function": lambda p: p[:, 0], "cells": 4},
        {
            "bounds": st.one_of(
                good((-1, 1), [0.0, 2.0]), bad(3, "ab", (1, 1), (1, -1), (0, np.nan), (0, np.inf), None, (1, 2, 3), [])
            ),
            "cells": count(limit=20_000),
        },
    ),
    Entry(
        "draw_probes",
        rotation_by_probes.draw_probes,
        {"size": 5, "count": 3},
        {"size": count(), "count": count(3, 6), "seed": seed()},
        {"count": "probes"},
    ),
    Entry(
        "probe",
        rotation_by_probes.probe,
        {"field": lambda x: 2.0 * x, "point": np.ones(3), "probes": 3},
        {
            "point": array((3,), dtype="float64").filter(lambda p: p[1] is not False or dimensions(p[0]) != 1),
            "probes": count(3, 6),
            "seed": seed(),
            "step": number(positive=True).filter(lambda p: p[0] is not None),
            "field": function(lambda x: x, optional=False),
        },
    ),
    Entry(
        "audit",
        audit,
        {"system": SYSTEM, "horizons": (1,), "samples": 1},
        {
            "system": NO_SYSTEMS,
            "horizons": st.one_of(good((1,), [2], range(1, 2)), bad(3, (), [0], [1.5], "12", None, [True])),
            "samples": count(1, 2, optional=True),
            "tolerance": number(positive=True).filter(lambda p: p[0] is not None),
            "kick": number(0.0, most=5.0),
            "seed": seed(),
            "dtype": dtype().filter(lambda p: p[0] is not None),
            "device": device(),
            "differences": bad(
                3, "x", [1.0], [1, 2, 3, 4], [1e-1, 1e-2, 1e-3, np.nan], [0.1, 0.01, 0.001, -1], object(), []
            ),
            "states": array((1, 4), dtype="float64", optional=True).filter(
                lambda p: p[1] is not False or shape_of(p[0])[:1] != (0,)
            ),
        },
    ),
]

IN_TORCH = [
    Entry(
        "System.loss of numpy",
        SYSTEM.loss,
        {"states": STATES, "controls": CONTROLS},
        {
            "states": finite(array(STATES.shape, lists=False)),
            "controls": finite(array(CONTROLS.shape, optional=True, lists=False)),
            **LOSS,
        },
        SAID_PARAMETERS,
    ),
    Entry(
        "System.loss of torch",
        SYSTEM.loss,
        {"states": torch.from_numpy(STATES), "controls": torch.from_numpy(CONTROLS)},
        {
            "controls": bad(
                "…", 3, [1.0], CONTROLS, torch.zeros(2, 2), torch.zeros(CONTROLS.shape, dtype=int), object()
            ),
            **LOSS,
        },
        SAID_PARAMETERS,
    ),
    Entry(
        "Rollout",
        Rollout,
        {"system": SYSTEM, "controller": NET, "steps": STEPS},
        {
            "system": NO_SYSTEMS,
            "controller": NO_MODULES,
            "steps": count(),
            "flow": flow(("averaged", Flow(0.9))),
            "device": st.one_of(device(), bad("meta", "cuda:0"), good(torch.device("cpu"))),
            "backend": choice("auto", "fused", "general"),
            "on_divergence": choice("raise", "mask"),
            "reduce": function(lambda updates: None),
            "check": choice("auto", "always"),
            "memory": bad(-1, 1.5, "1", None, True),
            "inputs": bad(-1, 1.5, "1", True),
        },
        {"device": "device", "controller": "controller"},
    ),
    Entry(
        "rollout",
        UNROLLED,
        {"x0": X0},
        {
            "x0": array((2, 4), ("numpy", "torch")),
            "parameters": PARAMETERS,
            "inputs": either(None, 3, "x", np.ones(3), torch.ones(2, 2, 1)),
            "memory": bad(3, "x", np.ones((2, 3))),
        },
        {**SAID_PARAMETERS, "inputs": "inputs"},
    ),
    Entry(
        "rollout with memory and inputs",
        BESIDE,
        {"x0": X0, "inputs": np.zeros((2, 2, 2), np.float32)},
        {
            "inputs": array((2, 2, 2), ("numpy", "torch")).filter(lambda p: p[1] is not False or dimensions(p[0]) != 2),
            "memory": array((2, 3), ("numpy", "torch"), optional=True),
            "x0": array((2, 4), ("numpy", "torch")),
        },
    ),
    Entry(
        "value_and_grad",
        UNROLLED.value_and_grad,
        {"x0": X0},
        {"x0": array((2, 4), ("numpy", "torch")), **LOSS},
        SAID_PARAMETERS,
    ),
    Entry(
        "Update",
        Update,
        {"rollout": UNROLLED, "optimiser": ADAM},
        {
            "rollout": NO_ROLLOUTS,
            "optimiser": bad(None, 3, "adam", torch.optim.Adam, NET),
            "when": WHEN,
            "control_cost": number(0.0, tensors=False),
            "clip": choice("none", "value", "norm"),
            "clip_at": number(positive=True),
            "graph": flag(),
            "parameters": bad(3, "x", {"mass": 1.0}, {"gravity": "x"}, [1.0], object()),
        },
        SAID_PARAMETERS,
    ),
    Entry(
        "update",
        Update(UNROLLED, torch.optim.SGD(NET.parameters(), lr=0.0)),
        {"x0": X0},
        {"x0": array((2, 4), ("numpy", "torch"))},
    ),
    Entry(
        "Update.minibatches",
        Update(UNROLLED, torch.optim.SGD(NET.parameters(), lr=0.0)).minibatches,
        {"x0": X0[None]},
        {"x0": array((2, 2, 4), ("numpy", "torch")), "stop": function(lambda: False)},
    ),
    Entry(
        "Step",
        Step(SYSTEM),
        {"x": torch.zeros(3, 4), "c": torch.zeros(3, 1)},
        {"x": finite(array((3, 4), ("torch",), lists=False)), "c": finite(array((3, 1), ("torch",), lists=False))},
        {"x": "x|c"},
    ),
    Entry(
        "trajectory",
        trajectory,
        {"system": SYSTEM, "x0": torch.zeros(2, 4), "controls": torch.zeros(2, 2, 1)},
        {
            "system": NO_SYSTEMS,
            "x0": array((2, 4), ("torch",), lists=False),
            "controls": array((2, 2, 1), ("torch",), lists=False),
            "parameters": PARAMETERS,
            "flow": linear_flow(Flow(0.9)),
            "inputs": bad(3, np.ones(3), torch.ones(2, 3, 1), "x"),
        },
        {**SAID_PARAMETERS, "x0": "x0|controls"},
    ),
    Entry(
        "TorchSystem",
        TorchSystem,
        {"function": lambda x, c: x, "state_size": 2, "control_size": 1},
        {
            "function": function(lambda x, c: x, optional=False),
            "state_size": count(),
            "control_size": count(),
            "cost": function(lambda x: x.sum(1)),
        },
    ),
]

RECORDED, FORCES = np.zeros((4, 3, 4)), np.zeros((3, 3, 1))
DIAGNOSED = {"rollout": UNROLLED, "x0": X0}
MEASURES = [
    Entry(
        "diagnose",
        diagnose,
        {**DIAGNOSED, "samples": 1},
        {
            "rollout": NO_ROLLOUTS,
            "x0": array((2, 4), ("numpy", "torch")),
            "loss": LOSSES,
            "samples": count(),
            "flows": flow((["R"], ("C", "M"), []), (["X"], 3, ["averaged"])),
            "seed": seed(),
            "probes": bad(-1, 1.5, None, "3", True, 2),
            **LOSS,
        },
        {**SAID_PARAMETERS, "flows": "flow"},
    ),
    Entry(
        "rotation",
        rotation,
        {**DIAGNOSED, "flows": "R", "probes": 3},
        {
            "rollout": NO_ROLLOUTS,
            "x0": array((2, 4), ("numpy", "torch")),
            "loss": LOSSES,
            "flows": bad([], ["X"], 3, None),
            "seed": seed(),
            "probes": count(3, 4),
            "step": number(positive=True).filter(lambda p: p[1] is False and p[0] is not None),
        },
        {"flows": "flow"},
    ),
    Entry(
        "jacobians",
        jacobians,
        DIAGNOSED,
        {
            "rollout": NO_ROLLOUTS,
            "samples": count(optional=True),
            "x0": array((2, 4), ("numpy", "torch")),
            "parameters": PARAMETERS,
        },
        SAID_PARAMETERS,
    ),
    Entry(
        "plan",
        plan,
        {"system": SYSTEM, "x0": X0, "steps": 2, "iterations": 1},
        {
            "system": NO_SYSTEMS,
            "x0": array((2, 4), ("numpy", "torch")).map(lambda p: (p[0], p[1] or None)),
            "steps": count(),
            "cost": function(),
            "when": WHEN,
            "control_cost": number(0.0, tensors=False),
            "controls": bad(3, "x", np.ones(2), np.full((2, 2, 1), np.nan)),
            "bounds": st.one_of(
                good(None, (-1, 1), ([-1.0], [1.0])), bad(3, "ab", (1, -1), (0, 0), (np.nan, 1), (-1, [1, 2]), ())
            ),
            "optimiser": st.one_of(good("L-BFGS"), bad("newton", None, 3, [], "")),
            "iterations": count(1, 2),
            "tolerance": number(0.0),
            "seed": seed(),
        },
        {"controls": "controls", "cost": "cost"},
    ),
    Entry(
        "RecedingHorizon",
        RecedingHorizon,
        {"system": SYSTEM, "steps": 3},
        {"steps": count(), "iterations": count(), "first_iterations": count()},
    ),
    Entry(
        "RecedingHorizon, called",
        lambda state, **settings: RecedingHorizon(SYSTEM, 2, 1, 1)(state, **settings),
        {"state": X0},
        {
            "state": array((2, 4), ("numpy", "torch")).map(lambda p: (p[0], p[1] or None)),
            **{name: bad(None, 3) for name in ("x0", "nothing", "steps")},
        },
        {"state": "state|x0"},
    ),
    Entry(
        "identify",
        identify,
        {"system": SYSTEM, "states": RECORDED, "controls": FORCES, "parameters": {"gravity": 9.0}},
        {
            "system": NO_SYSTEMS,
            "states": bad(
                None,
                3,
                "x",
                np.ones((4, 3)),
                np.full((4, 3, 4), np.nan),
                np.ones((4, 3, 4), "U2"),
                np.full((4, 3, 4), 1e30),
            ),
            "controls": bad(None, 3, "x", np.ones((3, 3, 2)), np.ones((2, 3, 1)), np.full((3, 3, 1), np.inf)),
            "parameters": bad(
                None,
                {},
                3,
                "gravity",
                {"mass": 1.0},
                {"gravity": None},
                {"gravity": np.nan},
                {"dt": -1.0},
                {"pole_mass": 0.0},
            ),
            "bounds": bad(
                3, {"gravity": 1.0}, {"gravity": (2, 1)}, {"gravity": (10, 11)}, {"dt": (0, 1)}, {"gravity": "ab"}
            ),
            "shooting": count(optional=True).filter(lambda p: p[1] is False),
            "noise": bad("x", 0.0, -1.0, np.nan, [1.0, 2.0], object()),
            "iterations": count().filter(lambda p: p[1] is False),
        },
        {**SAID_PARAMETERS, "bounds": "bounds"},
    ),
]

GROUPS: dict[str, tuple[int, list[Entry]]] = {
    "systems": (900, SYSTEMS),
    "in Warp": (600, IN_WARP),
    "flows": (500, FLOWS),
    "numeric": (700, NUMERIC),
    "in torch": (800, IN_TORCH),
    "measures": (500, MEASURES),
}
"""Entries by group, with the number of examples in `make test`."""


@pytest.mark.parametrize("name", GROUPS)
def test_each_argument_works_or_is_refused(name):
    count, entries = GROUPS[name]
    try_arguments(entries, count)
