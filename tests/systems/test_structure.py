"""What is refused in a system's Warp functions, before any kernel runs: numbers read from the system, plain numbers."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import warp as wp

from tests.springs import Springs
from warp_phys import CartPole
from warp_phys.systems import System, SystemFunctions
from warp_phys.systems.integrators import integrate


@dataclass(frozen=True)
class Mass(System):
    """x'' = c / m, said in many ways, most of them wrong."""

    way: str = "right"
    dt: float = 0.1
    mass: float = 2.0
    states: ClassVar = ("position [m]", "velocity [m/s]")
    controls: ClassVar = ("force [N]",)

    @property
    def inverse(self):
        return 1.0 / self.mass

    def functions(self, real):
        types = self.types(real)
        functions = _functions(types.State, types.Control, types.Parameters, real, self)
        rate, cost = functions["right"], functions["cost"]
        if self.way == "closure":
            rate = _closure(types.State, types.Control, types.Parameters, real, self.mass)
        elif self.way == "property":
            rate = _closure(types.State, types.Control, types.Parameters, real, self.inverse)
        elif self.way == "plain cost":
            cost = functions[self.way]
        else:
            rate = functions[self.way]
        return SystemFunctions(integrate(rate, types, "semi-implicit"), cost)

    def sample(self, batch, seed=0, dtype=np.float32):
        return np.ones((batch, 2), dtype)


def _closure(State, Control, Parameters, real, mass):
    @wp.func
    def rate(x: State, c: Control, p: Parameters):
        return State(x[1], c[0] / real(mass))

    return rate


def _functions(State, Control, Parameters, real, system):
    gain = 0.5

    @wp.func
    def right(x: State, c: Control, p: Parameters):
        return State(x[1], c[0] / p.mass * real(wp.static(4.0 / 4.0)))

    @wp.func
    def attribute(x: State, c: Control, p: Parameters):
        return State(x[1], c[0] / real(system.mass))

    @wp.func
    def static(x: State, c: Control, p: Parameters):
        return State(x[1], c[0] / real(wp.static(system.mass)))

    @wp.func
    def plain(x: State, c: Control, p: Parameters):
        return State(x[1], 0.5 * c[0] / p.mass)

    @wp.func
    def captured(x: State, c: Control, p: Parameters):
        return State(x[1], c[0] * gain / p.mass)

    @wp.func
    def assigned(x: State, c: Control, p: Parameters):
        out = State()
        out[0] = 0.5
        out[1] = c[0] / p.mass
        return out

    @wp.func
    def quotient(x: State, c: Control, p: Parameters):
        return State(x[1], c[0] / (p.mass * real(4.0 / 3.0)))

    @wp.func
    def beyond(x: State, c: Control, p: Parameters):
        out = State()
        for i in range(2):
            out[i] = x[2 * i + 1]
        return out

    @wp.func
    def plain_cost(x: State, p: Parameters):
        return 0.5 * x[0] * x[0]

    @wp.func
    def cost(x: State, p: Parameters):
        return real(0.5) * x[0] * x[0]

    return {
        "right": right, "attribute": attribute, "static": static, "plain": plain, "captured": captured,
        "assigned": assigned, "quotient": quotient, "beyond": beyond, "plain cost": plain_cost, "cost": cost,
    }  # fmt: skip


def use(way, dtype):
    """Return the cost of a state after one step."""
    system = Mass(way=way)
    x, c, y = (wp.array(a, dtype=dtype, device="cpu") for a in (np.ones((3, 2)), np.ones((3, 1)), np.ones((3, 2))))
    system.step(x, c, y)
    return system.loss(np.stack([x.numpy(), y.numpy()]))


@pytest.mark.parametrize("dtype", [wp.float32, wp.float64])
@pytest.mark.parametrize("way", ["closure", "property", "attribute", "static"])
def test_physical_parameters_read_from_the_system_are_named(way, dtype):
    with pytest.raises(
        TypeError, match=r"Mass\.functions reads the physical parameter mass from the system.*read p\.mass"
    ):
        use(way, dtype)


@pytest.mark.parametrize(
    ("way", "function", "line"),
    [
        ("plain", "plain", "return State(x[1], 0.5 * c[0] / p.mass)"),
        ("captured", "captured", "return State(x[1], c[0] * gain / p.mass)"),
        ("assigned", "assigned", "out[0] = 0.5"),
        ("quotient", "quotient", "4.0 / 3.0"),
        ("plain cost", "plain_cost", "return 0.5 * x[0] * x[0]"),
    ],
)
def test_plain_numbers_are_refused_in_double_precision(way, function, line):
    message = (
        f"{function} mixes precisions at {re.escape(__file__)}:\\d+: {re.escape(repr(line))}.*write real\\(0.5\\) for"
    )
    with pytest.raises(TypeError, match=message):
        use(way, wp.float64)
    assert np.isfinite(use(way, wp.float32))


@pytest.mark.parametrize("dtype", [wp.float32, wp.float64])
def test_an_index_beyond_the_end_is_named(dtype):
    message = (
        "Mass.functions: index 3 is out of range for a vector of 2 numbers, in beyond at "
        f"{re.escape(__file__)}:\\d+: 'out\\[i\\] = x\\[2 \\* i \\+ 1\\]'"
    )
    with pytest.raises(IndexError, match=message):
        use("beyond", dtype)


@pytest.mark.parametrize("dtype", [wp.float32, wp.float64])
def test_what_is_right_passes(dtype):
    x = 1.0 + 0.1 * (1.0 + 0.1 / 2.0)
    assert use("right", dtype) == pytest.approx(0.5 * x * x, rel=1e-6)


def test_a_structure_is_of_its_class_and_prints_what_shapes_it():
    structure = CartPole(poles=2).structure
    assert isinstance(structure, CartPole) and structure.structure is structure
    assert repr(structure) == "CartPole(poles=2, integrator='semi-implicit')"
    assert structure != CartPole(poles=2) and structure != Springs().structure


def test_a_system_without_a_drawing_says_so():
    with pytest.raises(NotImplementedError, match="Mass cannot be drawn: give it a method picture"):
        Mass().draw(None, np.zeros(2))
