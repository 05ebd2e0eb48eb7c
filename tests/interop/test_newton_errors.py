"""What Newton's models, solvers and arrays must be, and what is said when they are not."""

import subprocess
import sys

import numpy as np
import pytest
import warp as wp

newton = pytest.importorskip("newton")

from tests.interop.newton_models import arrays, ball, cartpole  # noqa: E402
from warp_phys.interop.newton import NewtonSystem  # noqa: E402
from warp_phys.interop.newton.layout import read_layout, world_count  # noqa: E402


def scene(*builders, requires_grad=True):
    whole = newton.ModelBuilder()
    for builder in builders:
        whole.add_world(builder)
    return whole.finalize(device="cpu", requires_grad=requires_grad)


@pytest.fixture(scope="module")
def model():
    return scene(cartpole(), cartpole())


@pytest.fixture(scope="module")
def system(model):
    return NewtonSystem(model, joints=("slide",))


def test_models():
    with pytest.raises(
        TypeError, match="model must be a newton.Model, got ModelBuilder; a builder goes to from_builder"
    ):
        NewtonSystem(cartpole())
    with pytest.raises(
        ValueError, match=r"model has no gradients: make it with ModelBuilder.finalize\(requires_grad=True\)"
    ):
        NewtonSystem(scene(cartpole(), requires_grad=False))
    with pytest.raises(ValueError, match="model must have the same joints in every world and none outside"):
        NewtonSystem(scene(cartpole(), ball()))
    with pytest.raises(ValueError, match="model must have joints, bodies or particles, it has none"):
        NewtonSystem(newton.ModelBuilder().finalize(device="cpu", requires_grad=True))


def test_a_model_without_worlds_is_one_sample():
    assert NewtonSystem(cartpole().finalize(device="cpu", requires_grad=True)).worlds == 1


def test_solvers(model):
    for solver in (newton.solvers.SolverXPBD, newton.solvers.SolverXPBD(model), newton.solvers.SolverMuJoCo):
        with pytest.raises(
            ValueError, match="solver must be SolverFeatherstone or SolverSemiImplicit, whose steps have"
        ):
            NewtonSystem(model, solver)
    with pytest.raises(ValueError, match="solver must have been made for this model"):
        NewtonSystem(model, newton.solvers.SolverFeatherstone(scene(cartpole())))
    with pytest.raises(ValueError, match="solver must have update_mass_matrix_interval 1, got 4"):
        NewtonSystem(model, newton.solvers.SolverFeatherstone(model, update_mass_matrix_interval=4))


def chain(order=(0, 1), joints=2, loop=False):
    """Two links, their joints made in an order, with a loop outside the articulation or not."""
    world = newton.ModelBuilder()
    links = [world.add_link(mass=1.0, inertia=wp.mat33(np.eye(3))) for _ in range(2)]
    upper, lower = (links[i] for i in order)
    made = [world.add_joint_revolute(-1, upper, axis=(0.0, 1.0, 0.0), label="upper")]
    if joints > 1:
        made.append(world.add_joint_revolute(upper, lower, axis=(0.0, 1.0, 0.0), label="lower"))
    world.add_articulation(made)
    if loop:
        world.add_joint_revolute(-1, lower, axis=(0.0, 1.0, 0.0), label="loop")
    return world


@pytest.mark.parametrize("worlds", [1, 2])
def test_what_featherstone_mistakes_for_another(worlds):
    """It would compute something else, of equal rows unequal ones, or end the process."""
    semi_implicit = newton.solvers.SolverSemiImplicit
    for builder, message in (
        (chain((1, 0)), "needs bodies and joints in the same order: joint 0, upper, moves body 1"),
        (chain(joints=1), f"needs one joint per body, got {worlds} joints and {2 * worlds} bodies"),
        (chain(loop=True), "needs every joint in an articulation, in none are loop"),
    ):
        model = scene(*[builder] * worlds)
        with pytest.raises(ValueError, match=message):
            NewtonSystem(model)
        assert NewtonSystem(model, semi_implicit).worlds == worlds
    assert NewtonSystem(scene(*[chain()] * worlds)).worlds == worlds


def test_particles_of_several_worlds():
    world = chain()
    for x in (0.0, 1.0):
        world.add_particle(wp.vec3(x, 0.0, 0.0), wp.vec3(), 1.0)
    model = scene(world, world)
    semi_implicit = newton.solvers.SolverSemiImplicit
    with pytest.raises(ValueError, match="particles of all worlds push each other: set model.particle_grid = None"):
        NewtonSystem(model, semi_implicit)
    NewtonSystem(model)
    NewtonSystem(scene(world), semi_implicit)
    model.particle_grid = None
    system = NewtonSystem(model, semi_implicit)
    x = system.initial_states()
    x[1, system.states.index("particle 0 x [m]")] += 0.05
    y = wp.zeros(x.shape, dtype=wp.float32, device="cpu")
    system.step(*arrays(x, np.zeros((2, 2)), device="cpu"), y)
    alone = NewtonSystem(scene(world), semi_implicit)
    y0 = wp.zeros((1, x.shape[1]), dtype=wp.float32, device="cpu")
    alone.step(*arrays(x[:1], np.zeros((1, 2)), device="cpu"), y0)
    particles = [i for i, name in enumerate(system.states) if name.startswith("particle 0")]
    assert particles and np.abs(y.numpy()[0, particles] - y0.numpy()[0, particles]).max() < 1e-7


def test_options(model):
    for options, message in (
        ({"dt": 0.0}, "dt must be a positive number, got 0.0"),
        ({"substeps": 0}, "substeps must be at least 1, got 0"),
        ({"control": "force"}, "control must be one of 'joint_f', 'joint_target_qd', 'joint_target_q', got 'force'"),
        (
            {"joints": ("slid",)},
            r"joints must name movable joints of one world \(slide, hinge\), each once, got 'slid'",
        ),
        ({"joints": ("slide", "slide")}, "each once, got 'slide'"),
        ({"joints": ()}, "joints must name at least one joint; there are slide, hinge"),
        ({"gain": (1.0, 2.0, 3.0)}, "gain must be a number or 2 numbers, finite and not 0"),
        ({"gain": 0.0}, "gain must be a number or 2 numbers, finite and not 0, got 0.0"),
        ({"control": "joint_target_q"}, "control 'joint_target_q' needs joint_target_ke of joint slide to be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            NewtonSystem(model, **options)
    with pytest.raises(TypeError, match="gain must be a number or 2 numbers, got 'a'"):
        NewtonSystem(model, gain="a")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        NewtonSystem(model).sample(0)
    with pytest.raises(TypeError, match="joints must be a sequence of names of joints, or None, got 'slide'"):
        NewtonSystem(model, joints="slide")
    with pytest.raises(ValueError, match="drives no free or ball joints, ball_free_joint is one"):
        NewtonSystem(scene(ball()), control="joint_target_q", joints=("ball_free_joint",))
    with pytest.raises(ValueError, match="the model has none besides fixed and free ones"):
        NewtonSystem(scene(ball()))


def test_arrays(system):
    x, c = np.zeros((2, 4)), np.zeros((2, 1))

    def step(x, c, y, dtype=wp.float32):
        system.step(*(wp.array(a, dtype=dtype, device="cpu") for a in (x, c, y)))

    with pytest.raises(ValueError, match=r"x must have shape \(2, 4\), got \(3, 4\): one row per world of the model"):
        step(np.zeros((3, 4)), np.zeros((3, 1)), np.zeros((3, 4)))
    with pytest.raises(
        ValueError, match=r"x must have shape \(batch, 4\), got \(2, 5\); its columns are slide \[m\], hinge"
    ):
        step(np.zeros((2, 5)), c, x)
    with pytest.raises(
        ValueError, match=r"c must have shape \(2, 1\), got \(2, 2\); its columns are slide force \[N\]"
    ):
        step(x, np.zeros((2, 2)), x)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 4\), got \(2, 3\)"):
        step(x, c, np.zeros((2, 3)))
    with pytest.raises(TypeError, match="x must hold float32, in which Newton computes, got float64"):
        step(x, c, x, wp.float64)
    with pytest.raises(TypeError, match="x must be a warp array, got ndarray"):
        system.step(x, c, x)
    with pytest.raises(ValueError, match=r"adj_c must have shape \(2, 1\), got \(2, 4\)"):
        system.step_vjp(*arrays(x, c, x, x, x, device="cpu"))


def test_no_backward_pass(model, monkeypatch):
    monkeypatch.setattr(wp.config, "enable_backward", False)
    with pytest.raises(ValueError, match=r"wp.config.enable_backward is False, so that kernels have no backward pass"):
        NewtonSystem(model)


def test_kernels_without_a_backward_pass(model):
    """A module that was loaded while backward passes were off stays without; the first adjoint says so."""
    x, c, adj_x, adj_c = arrays(np.zeros((2, 4)), np.zeros((2, 1)), np.zeros((2, 4)), np.zeros((2, 1)), device="cpu")
    # Warp keeps for good what it finds of a kernel at its first launch: for later tests, with a backward pass
    NewtonSystem(model, joints=("slide",)).step_vjp(x, c, x, adj_x, adj_c)
    system = NewtonSystem(model, joints=("slide",))
    options = wp.get_module("newton._src.solvers.featherstone.kernels").options
    options["enable_backward"] = False
    try:
        with pytest.raises(ValueError, match=r"kernel \w+ of newton.*featherstone.* compiled without a backward pass"):
            system.step_vjp(x, c, x, adj_x, adj_c)
    finally:
        options["enable_backward"] = True


def test_columns():
    """Free joints, quaternions and velocities are named in the order in which Newton keeps them."""
    model = scene(ball(), ball())
    assert world_count(model) == 2
    reduced = read_layout(model, 2, reduced=True)
    assert reduced.names[:4] == tuple(f"ball_free_joint {c}" for c in ("x [m]", "y [m]", "z [m]", "qx [-]"))
    assert reduced.names[7] == "ball_free_joint speed x [m/s]" and reduced.quaternions == (3,)
    maximal = read_layout(model, 2, reduced=False)
    assert maximal.names[2] == "ball z [m]" and maximal.names[12] == "ball spin z [rad/s]"
    assert [field.offset for field in maximal.fields] == [0, 7]


def test_without_newton_the_message_names_the_extra():
    program = "import sys; sys.modules['newton'] = None; import warp_phys.interop.newton"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'ImportError: newton is not installed: pip install "warp_phys[newton]"' in result.stderr
