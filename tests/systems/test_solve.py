"""Small linear systems inside Warp functions against numpy, their adjoints in closed form, use in a system."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import warp as wp

from warp_phys import audit
from warp_phys.systems import System, SystemFunctions, solve
from warp_phys.systems.integrators import integrate

PRECISIONS = {"float32": wp.float32, "float64": wp.float64}
EACH_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


@functools.cache
def solve_kernel(size, real):
    Matrix, Vector = wp.types.matrix(shape=(size, size), dtype=real), wp.types.vector(length=size, dtype=real)

    @wp.kernel(module="unique")
    def solve_rows(a: wp.array[Matrix], b: wp.array[Vector], x: wp.array[Vector]):
        i = wp.tid()
        x[i] = solve(a[i], b[i])

    return solve_rows, Matrix, Vector


def solved(a, b, weights, precision):
    """Return x with a x = b and the adjoints of a and b of ⟨weights, x⟩; leading dimension batch."""
    kernel, Matrix, Vector = solve_kernel(b.shape[-1], PRECISIONS[precision])
    settings = {"device": "cpu", "requires_grad": True}
    a, b = wp.array(a, dtype=Matrix, **settings), wp.array(b, dtype=Vector, **settings)
    x = wp.zeros(len(b), dtype=Vector, **settings)
    with wp.Tape() as tape:
        wp.launch(kernel, dim=len(b), inputs=[a, b], outputs=[x], device="cpu")
    tape.backward(grads={x: wp.array(weights, dtype=Vector, device="cpu")})
    return x.numpy(), a.grad.numpy(), b.grad.numpy()


def matrices(size, condition=10.0, batch=3):
    """Symmetric positive definite matrices of a given condition number, right sides and weights; float64."""
    generator = np.random.default_rng(size)
    rotations = np.linalg.qr(generator.standard_normal((batch, size, size)))[0]
    a = rotations * np.geomspace(1.0, condition, size) @ rotations.swapaxes(1, 2)
    return 0.5 * (a + a.swapaxes(1, 2)), *generator.standard_normal((2, batch, size))


@EACH_PRECISION
@pytest.mark.parametrize("size", range(1, 17))
def test_solutions_and_adjoints(size, precision):
    """The condition number is 10: what is lost is a few units in the last place."""
    a, b, w = matrices(size)
    x, adj_a, adj_b = solved(a, b, w, precision)
    expected, dual = (np.linalg.solve(a, side[..., None])[..., 0] for side in (b, w))
    outer = -0.5 * (dual[:, :, None] * expected[:, None] + dual[:, None] * expected[:, :, None])
    tolerance = 200.0 * np.finfo(precision).eps
    for found, exact in ((x, expected), (adj_b, dual), (adj_a, outer)):
        np.testing.assert_allclose(found, exact, rtol=0.0, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_the_adjoint_of_each_element_by_differences(size):
    """Also of a matrix that is not symmetric: its symmetric part counts."""
    a, b, w = matrices(size)
    a = a + 0.1 * np.triu(np.random.default_rng(0).standard_normal(a.shape), 1)
    adj_a = solved(a, b, w, "float64")[1]
    for i, j in np.ndindex(size, size):
        values = []
        for step in (1e-6, -1e-6):
            moved = a.copy()
            moved[:, i, j] += step
            values.append((w * solved(moved, b, w, "float64")[0]).sum(1))
        np.testing.assert_allclose(adj_a[:, i, j], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


@EACH_PRECISION
@pytest.mark.parametrize("exponent", [2, 4, 6])
def test_the_error_is_that_of_rounding_times_the_condition_number(precision, exponent):
    condition = 10.0**exponent
    if precision == "float32" and exponent == 6:
        pytest.skip("beyond the digits of float32 (1.2e-7)")
    a, b, w = matrices(8, condition)
    exact = np.linalg.solve(a, b[..., None])[..., 0]
    error = np.abs(solved(a, b, w, precision)[0] - exact).max() / np.abs(exact).max()
    assert error < 4.0 * condition * np.finfo(precision).eps


@EACH_PRECISION
def test_what_is_not_positive_definite_gives_nan(precision):
    a, b, w = matrices(4)
    a[0], a[1, 3, 3], a[2] = -a[0], -1.0, 0.0
    assert np.isnan(solved(a, b, w, precision)[0]).all()


@dataclass(frozen=True)
class Coupled(System):
    """Three coordinates with the mass matrix M(q) = (1 + q²) + coupling cos(q_i − q_j), asked twice per rate.

    M v' = −q + c and, through a second solve in a loop, a damping force −d M⁻¹ M⁻¹ v.
    """

    dt: float = 0.05
    """Time step [s]."""
    coupling: float = 0.3
    """Off-diagonal masses [kg]."""
    damping: float = 0.2
    """d [kg² N s/m]."""

    states = tuple(f"{name} {i}" for name in ("q [m]", "v [m/s]") for i in range(3))
    controls = tuple(f"force {i} [N]" for i in range(3))

    def functions(self, real):
        return coupled_functions(self, real)

    def sample(self, batch, seed=0, dtype=np.float32):
        return np.random.default_rng(seed).uniform(-1.0, 1.0, (batch, 6)).astype(dtype)


@functools.cache
def coupled_functions(system, real):
    types = system.types(real)
    State, Control, Parameters = types.State, types.Control, types.Parameters
    Matrix, Vector = wp.types.matrix(shape=(3, 3), dtype=real), wp.types.vector(length=3, dtype=real)

    @wp.func
    def masses(x: State, p: Parameters):
        out = Matrix()
        for i in range(3):
            for j in range(3):
                if i == j:
                    out[i, j] = real(1.0) + p.coupling + x[i] * x[i]
                else:
                    out[i, j] = p.coupling * wp.cos(x[i] - x[j])
        return out

    @wp.func
    def rate(x: State, c: Control, p: Parameters):
        m = masses(x, p)
        drag = Vector(x[3], x[4], x[5])
        for _ in range(2):
            drag = solve(m, drag)
        force = Vector(c[0] - x[0], c[1] - x[1], c[2] - x[2]) - p.damping * drag
        a = solve(m, force)
        return State(x[3], x[4], x[5], a[0], a[1], a[2])

    @wp.func
    def cost(x: State, p: Parameters):
        v = Vector(x[3], x[4], x[5])
        return wp.dot(v, solve(masses(x, p), v))

    return SystemFunctions(integrate(rate, types, "rk4"), cost)


def numpy_step(system, x, c):
    def rate(x):
        q, v = x[:, :3], x[:, 3:]
        m = system.coupling * np.cos(q[:, :, None] - q[:, None]) + np.eye(3) * (1.0 + q**2)[:, :, None]
        drag = np.linalg.solve(m, np.linalg.solve(m, v[..., None]))[..., 0]
        return np.hstack([v, np.linalg.solve(m, (c - q - system.damping * drag)[..., None])[..., 0]])

    h = system.dt
    k1 = rate(x)
    k2 = rate(x + h / 2 * k1)
    k3 = rate(x + h / 2 * k2)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(x + h * k3))


def test_several_solves_in_a_step():
    system = Coupled()
    x, c = system.sample(4, dtype=np.float64), np.random.default_rng(1).standard_normal((4, 3))
    y = wp.zeros((4, 6), dtype=wp.float64, device="cpu")
    system.step(*(wp.array(a, dtype=wp.float64, device="cpu") for a in (x, c)), y)
    np.testing.assert_allclose(y.numpy(), numpy_step(system, x, c), rtol=1e-13, atol=1e-14)
    assert audit(system, x).ok


@pytest.mark.parametrize("size", [1, 16])
def test_compiles_for_cuda(size, tmp_path):
    for real in PRECISIONS.values():
        wp.compile_aot_module(solve_kernel(size, real)[0].module, arch=[80, 90], module_dir=tmp_path)
    assert len([file for file in tmp_path.iterdir() if file.suffix in (".ptx", ".cubin")]) == 4
