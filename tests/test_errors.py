"""Wrong input is answered before any kernel runs, by a message that says what came and what is expected."""

import pickle
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import warp as wp

from tests.springs import Springs
from warp_phys import CartPole, Combined, Dense, Diverged, Flow, audit
from warp_phys import Rollout as WarpRollout
from warp_phys.flow import resolve
from warp_phys.interop.torch import Rollout, Step
from warp_phys.systems import System
from warp_phys.systems.integrators import integrate

SYSTEM = CartPole(poles=4)


def net(inputs=10, outputs=1):
    return torch.nn.Sequential(torch.nn.Linear(inputs, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs))


def raises(kind, text):
    return pytest.raises(kind, match=re.escape(text))


@pytest.mark.parametrize(
    ("x0", "kind", "message"),
    [
        (np.zeros((8, 4)), ValueError, "x0 must have shape (batch, 10), got (8, 4) for CartPole(poles=4"),
        (np.zeros((8, 4)), ValueError, "its columns are position [m], velocity [m/s], angle 1 [rad], rate 1 [rad/s]"),
        (np.zeros(10), ValueError, "x0 must have shape (batch, 10), got (10,)"),
        (np.zeros((0, 10)), ValueError, "x0 must have shape (batch, 10), got (0, 10)"),
        (np.zeros((8, 10), int), TypeError, "x0 must hold floating-point numbers, got int64"),
        (
            torch.zeros(8, 10, dtype=torch.float64),
            TypeError,
            "x0 must hold torch.float32 as the controller does, got torch.float64",
        ),
        (torch.zeros(8, 10, device="meta"), ValueError, "x0 must be on device cpu as the controller is, got meta"),
        (np.full((8, 10), np.nan), ValueError, "x0 must be finite, rows [0, 1, 2, 3, 4, 5, 6, 7] are not"),
        ("states", TypeError, "x0 must be a torch, numpy or DLPack array, got str"),
    ],
)
def test_initial_states(x0, kind, message):
    with raises(kind, message):
        Rollout(SYSTEM, net(), 5)(x0)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5 of type float"),
        ({"flow": "combine"}, ValueError, "flow 'combine' is unknown; known are 'regular' (R), 'modified' (M)"),
        ({"flow": 3}, TypeError, "flow must be a name, a letter, a Flow or a Combined, got 3"),
        ({"flow": Flow((1.0, 0.5), 1.0)}, ValueError, "the flow's physics gate has 2 numbers, the rollout has 5 steps"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'auto', 'fused', 'general', got 'fast'"),
        ({"on_divergence": "skip"}, ValueError, "on_divergence must be one of 'raise', 'mask', got 'skip'"),
        ({"device": "cuda"}, ValueError, "the controller's parameters are on cpu: use controller.to("),
        ({"controller": net(6)}, ValueError, "controller has state_size 6, CartPole(poles=4"),
        ({"controller": net(10, 2)}, ValueError, "controller has control_size 2"),
        ({"controller": lambda x: x}, TypeError, "controller must be a torch.nn.Module, got function"),
        (
            {"controller": net().half()},
            TypeError,
            "controller must have float32 or float64 parameters, got torch.float16",
        ),
        ({"system": CartPole}, TypeError, "system must be an instance, got the class CartPole"),
        ({"system": "cartpole"}, TypeError, "system must have step (see warp_phys.systems.Simulator), str has not"),
    ],
)
def test_rollout(arguments, kind, message):
    with raises(kind, message):
        Rollout(**{"system": SYSTEM, "controller": net(), "steps": 5, **arguments})


def test_mixed_precision_controller():
    mixed = net()
    mixed[2].double()
    with raises(ValueError, "controller must have its parameters in one precision on one device"):
        Rollout(SYSTEM, mixed, 5)


def test_forced_fusion_of_what_cannot_be_fused():
    module = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
    assert Rollout(SYSTEM, module, 5).backend == "general"
    with raises(ValueError, "that is a row program; this one is neither: it cannot be tried out: controller must give"):
        Rollout(SYSTEM, module, 5, backend="fused")


def test_controller_with_a_wrong_output_shape():
    class Squeezed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x)[:, 0]

    with raises(ValueError, "controller must return shape (8, K), a row per state, got (8,)"):
        Rollout(SYSTEM, Squeezed(), 5)(SYSTEM.sample(8))


@pytest.mark.parametrize(
    "call",
    [
        lambda values: Rollout(SYSTEM, net(), 5)(SYSTEM.sample(8), values),
        lambda values: Step(SYSTEM)(torch.zeros(8, 10), torch.zeros(8, 1), values),
        lambda values: SYSTEM.loss(torch.zeros(6, 8, 10), parameters=values),
        lambda values: SYSTEM.parameter_array(values, device="cpu"),
    ],
    ids=["rollout", "step", "loss", "array"],
)
@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"mass": 1.0},
            ValueError,
            "parameters mass are unknown; there are dt, gravity, pole_mass, total_mass, half_length",
        ),
        ({"gravity": np.nan}, ValueError, "parameter gravity must be finite, got "),
        ({"dt": -0.01}, ValueError, "parameter dt must be positive, got -0.01"),
        ({"dt": [0.01] * 7 + [-0.01]}, ValueError, "parameter dt must be positive, got [0.01, 0.01"),
        ({"gravity": np.ones((2, 4))}, ValueError, "parameter gravity must be a number or "),
        ({"gravity": np.ones((8, 1))}, ValueError, "parameter gravity must be a number or "),
        ({"gravity": "a"}, TypeError, "parameter gravity must be a number or one number per sample, got 'a'"),
        ({"gravity": None}, TypeError, "parameter gravity must be a number or one number per sample, got None"),
        ({"gravity": True}, TypeError, "parameter gravity must be a number or one number per sample, got True"),
        ({"gravity": [9.8, True]}, TypeError, "parameter gravity must be a number or one number per sample, got [9.8"),
        ({"gravity": np.ones(5, bool)}, TypeError, "parameter gravity must be a number or one number per sample"),
        (
            {"gravity": torch.ones(5, dtype=torch.complex64)},
            TypeError,
            "parameter gravity must be a number or",
        ),
        ("gravity", TypeError, "parameters must be a mapping of names to numbers, got str"),
    ],
)
def test_physical_parameters(call, values, kind, message):
    with raises(kind, message):
        call(values)


def test_numbers_of_physical_parameters():
    rollout, x0 = Rollout(SYSTEM, net(), 5), SYSTEM.sample(8)
    with raises(ValueError, "parameter gravity must be a number or 8 numbers, one per sample, got 2"):
        rollout(x0, {"gravity": [1.0, 2.0]})
    with raises(ValueError, "parameter gravity must be a number or 8 numbers, one per sample, got shape (2, 4)"):
        rollout(x0, {"gravity": torch.ones(2, 4)})
    with raises(ValueError, "parameter dt must be positive, got 0.0"):
        rollout(x0, {"dt": 0.0})


def test_classes_in_place_of_instances():
    for call in (Step, audit):
        with raises(TypeError, "system must be an instance, got the class CartPole"):
            call(CartPole)
    with raises(TypeError, "controller must be an instance, got the class Dense"):
        WarpRollout(SYSTEM, Dense, 5)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"poles": 0}, ValueError, "poles must be at least 1, got 0"),
        ({"poles": 2.0}, TypeError, "poles must be an integer, got 2.0 of type float"),
        ({"dt": 0.0}, ValueError, "dt must be positive, got 0.0"),
        ({"gravity": float("inf")}, ValueError, "gravity must be finite, got inf"),
        ({"gravity": "9.8"}, TypeError, "gravity must be a number, got '9.8'"),
        (
            {"integrator": "leapfrog"},
            ValueError,
            "integrator must be one of 'euler', 'semi-implicit', 'rk4', got 'leapfrog'",
        ),
    ],
)
def test_cart_pole(arguments, kind, message):
    with raises(kind, message):
        CartPole(**arguments)


def test_sampling():
    with raises(ValueError, "batch must be at least 1, got 0"):
        SYSTEM.sample(0)
    with raises(TypeError, "dtype must be float32 or float64, got 'float16'"):
        SYSTEM.sample(4, dtype="float16")


def test_step():
    x, c, y = (wp.zeros(shape, dtype=float, device="cpu") for shape in ((8, 10), (8, 1), (8, 10)))
    with raises(ValueError, "c must have shape (8, 1), got (7, 1); its columns are force [N]"):
        SYSTEM.step(x, c[:7], y)
    with raises(ValueError, "x must have shape (batch, 10), got (8, 1)"):
        SYSTEM.step(c, c, c)
    with raises(TypeError, "x must be a warp array, got ndarray; wrap it without a copy: wp.from_torch"):
        SYSTEM.step(x.numpy(), c, y)
    with raises(TypeError, "y must hold float32 as the other arrays do, got float64"):
        SYSTEM.step(x, c, wp.zeros((8, 10), dtype=wp.float64, device="cpu"))
    with raises(TypeError, "parameters must come from CartPole.parameter_array(dtype=float32)"):
        SYSTEM.step(x, c, y, x)
    with raises(ValueError, "parameters must have length 1 or 8 (the batch), got 3"):
        SYSTEM.step(x, c, y, SYSTEM.parameter_array({"gravity": [1, 2, 3]}, device="cpu"))
    with raises(ValueError, "adj_x must have shape (8, 10), got (8, 1)"):
        SYSTEM.step_vjp(x, c, y, c, c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_cost": np.nan}, "control_cost must be a number of at least 0, got nan"),
        ({"control_cost": np.inf}, "control_cost must be a number of at least 0, got inf"),
        ({"control_cost": -1.0}, "control_cost must be a number of at least 0, got -1.0"),
        ({"states": np.zeros((8, 10))}, "states must have shape (steps + 1, batch, 10), got (8, 10)"),
        ({"when": "last"}, "when must be one of 'final', 'every', got 'last'"),
        ({"when": [6]}, "when must be 'final', 'every' or distinct steps from 0 to 5, got [6]"),
        ({"when": [2, 2]}, "distinct steps"),
        ({"control_cost": 0.1}, "control_cost needs the controls"),
        ({"controls": np.zeros((6, 8, 1))}, "controls must have shape (5, 8, 1), got (6, 8, 1)"),
    ],
)
def test_loss(arguments, message):
    with raises(ValueError, message):
        SYSTEM.loss(**{"states": np.zeros((6, 8, 10)), **arguments})


@pytest.mark.parametrize("make", [np.zeros, torch.zeros, lambda shape: wp.zeros(shape, dtype=float, device="cpu")])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_cost": "x"}, "control_cost must be a number of at least 0, got 'x'"),
        ({"control_cost": True}, "control_cost must be a number of at least 0, got True"),
        ({"when": [1.7]}, "when must be 'final', 'every' or distinct steps from 0 to 5, got [1.7]"),
        ({"when": [True]}, "when must be 'final', 'every' or distinct steps from 0 to 5, got [True]"),
        ({"when": 5}, "when must be 'final', 'every' or distinct steps from 0 to 5, got 5"),
        ({"when": None}, "when must be 'final', 'every' or distinct steps from 0 to 5, got None"),
    ],
)
def test_kinds_of_a_loss(make, arguments, message):
    with raises(TypeError, message):
        SYSTEM.loss(make((6, 8, 10)), make((5, 8, 1)), **arguments)


def test_numbers_of_numpy():
    states, controls = np.ones((6, 8, 10)), np.ones((5, 8, 1))
    expected = SYSTEM.loss(states, controls, [1, 5], 0.5)
    assert SYSTEM.loss(states, controls, np.array([1, 5]), np.float32(0.5)) == expected
    assert Combined(memory=np.float32(0.5)).memory == 0.5


@pytest.mark.parametrize("rule", [lambda base, other: base.sum(), lambda base, other: base[:1], lambda base, other: 3])
def test_rules_of_another_shape(rule):
    rollout = Rollout(SYSTEM, net(), 5, Combined(rule=rule))
    with raises(ValueError, "rule <lambda> must return the shape of its arguments, (49,), got "):
        rollout.value_and_grad(SYSTEM.sample(8))
    with raises(ValueError, "rule <lambda> must return the shape of its arguments, (49,), got "):
        SYSTEM.loss(*rollout(SYSTEM.sample(8))).backward()


def test_flows():
    with raises(TypeError, "physics must be a number or an array of numbers, got 'all'"):
        Flow(physics="all")
    with raises(ValueError, "controller must be a finite number, or finite numbers of shape"):
        Flow(controller=float("nan"))
    with raises(ValueError, "window must be at least 1, got 0"):
        Flow(window=0)
    with raises(TypeError, "base must be a Flow, got 'modified'"):
        Combined(base="modified")
    with raises(TypeError, "rule must be a function of two arrays, got 'sign'"):
        Combined(rule="sign")
    with raises(ValueError, "flow 'X' is unknown"):
        resolve("X")


def test_pure_warp():
    controller = Dense((10, 4, 1), device="cpu")
    with raises(ValueError, "sizes (10, 4, 1) need 4 parameters, got 3"):
        Dense((10, 4, 1), parameters=controller.parameters[:3])
    with raises(ValueError, "parameters[1] must have shape (4,), got (1,)"):
        Dense((10, 4, 1), parameters=[controller.parameters[i] for i in (0, 3, 2, 1)])
    with raises(ValueError, "activation must be one of 'tanh'"):
        Dense((10, 4, 1), "softmax", device="cpu")
    with raises(
        TypeError, "controller must have evaluator (see warp_phys.engine.phases.WarpController), Sequential has not"
    ):
        WarpRollout(SYSTEM, net(), 5)
    with raises(ValueError, "controller has state_size 10"):
        WarpRollout(CartPole(poles=1), controller, 5)
    with raises(ValueError, "in pure Warp the rule of a combined flow must be one of agree, geometric, minmod"):
        WarpRollout(SYSTEM, controller, 5, Combined(rule=np.minimum))
    rollout = WarpRollout(SYSTEM, controller, 5)
    with raises(TypeError, "x0 must hold float32 as the controller does, got float64"):
        rollout(wp.zeros((8, 10), dtype=wp.float64, device="cpu"))
    with raises(TypeError, "x0 must be a warp array, got ndarray"):
        rollout(np.zeros((8, 10)))
    with raises(ValueError, "x0 must have shape (batch, 10), got (8, 4); its columns are position [m]"):
        rollout(wp.zeros((8, 4), dtype=float, device="cpu"))


def test_diverged_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(Diverged(3, range(20))))
    assert error.step == 3 and error.samples == tuple(range(20))
    assert "at step 3; 20 sample(s) diverge: 0, 1, 2, 3, 4, 5, 6, 7, …" in str(error)
    for maskable in (True, False):
        error = Diverged(3, [0], maskable)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_masking_is_advised_where_it_would_help():
    controller, some = Dense((10, 4, 1), device="cpu"), torch.as_tensor(SYSTEM.sample(4))
    some[2, 3] = 1e30  # a rate whose square overflows
    rollouts = {kind: Rollout(SYSTEM, net(), 5, on_divergence=kind) for kind in ("raise", "mask")}
    for run, advised in (
        (lambda: rollouts["raise"](some), True),
        (lambda: rollouts["raise"](some[2:3]), False),
        (lambda: rollouts["mask"](some[2:3]), False),
        (lambda: WarpRollout(SYSTEM, controller, 5)(wp.from_torch(some)), False),
    ):
        with pytest.raises(Diverged) as caught:
            run()
        assert ("on_divergence='mask'" in str(caught.value)) == advised


def test_semi_implicit_wants_positions_and_velocities():
    for system, block, got in ((Springs(size=5), 1, 5), (Springs(size=6), 2, 6)):
        with raises(
            ValueError, f"semi-implicit needs states in turn of {block} positions and {block} velocities, got {got}"
        ):
            integrate(None, system.types(wp.float64), "semi-implicit", block)


def test_a_system_without_a_physical_parameter():
    @dataclass(frozen=True)
    class Map(System):
        size: int = 2
        states = controls = ("a", "b")
        functions = sample = picture = None

    for call in (Map().parameter_array, lambda: Rollout(Map(), torch.nn.Linear(2, 2), 3)(torch.zeros(4, 2))):
        with raises(TypeError, "Map needs a physical parameter, a field annotated float: dt, for instance"):
            call()
