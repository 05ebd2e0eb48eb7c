"""A model that is changed after its system was made: right at the next step or refused, noticed between two passes."""

import copy

import numpy as np
import pytest
import warp as wp

newton = pytest.importorskip("newton")

from tests.interop.newton_models import arrays, ball, cartpole, pull, unroll  # noqa: E402
from warp_phys.errors import NotRepeatable  # noqa: E402
from warp_phys.interop.newton import NewtonSystem  # noqa: E402

Featherstone, SemiImplicit = newton.solvers.SolverFeatherstone, newton.solvers.SolverSemiImplicit
WORLDS, DT = 2, 0.01
each_solver = pytest.mark.parametrize("solver", [Featherstone, SemiImplicit], ids=lambda solver: solver.__name__[6:])


def driven():
    """A cart-pole with drives, whose slide is beyond a limit: there its drive rests."""
    world = cartpole()
    for joint in range(2):
        for name in ("joint_target_ke", "joint_target_kd", "joint_limit_ke", "joint_limit_kd"):
            getattr(world, name)[joint] = 20.0
    world.joint_limit_lower[0] = 0.5
    return world


SCENES = {
    "driven": (driven, {"joints": ("slide",)}),
    "ball": (ball, {"joints": ("ball_free_joint",), "contacts": True, "ground": True}),
}


def make(scene, solver, device="cpu", **more):
    builder, options = SCENES[scene]
    return NewtonSystem.from_builder(builder(), WORLDS, solver=solver, dt=DT, device=device, **options, **more)


def fresh(system, scene):
    """Another system of the same model."""
    options = {name: value for name, value in SCENES[scene][1].items() if name != "ground"}
    return NewtonSystem(system.model, solver=type(system.solver), dt=DT, **options)


def problem(system):
    x0 = system.sample(WORLDS, spread=0.02)
    if system.states[2].startswith("ball"):
        x0[:, 2] = 0.19  # it touches the ground
    return x0, np.full((2, WORLDS, system.control_size), 0.5, dtype=np.float32)


def results(system, x0, controls):
    """States after two steps, and adjoints."""
    states = unroll(system, x0, controls)
    return states[-1].numpy(), *pull(system, states, controls, np.ones_like(x0))


def equal(found, expected):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True))


def changeable(model):
    """Names of the model's arrays of floating-point numbers."""
    for name, array in vars(model).items():
        if isinstance(array, wp.array) and array.size and name[0] != "_" and array.numpy().dtype.kind == "f":
            yield name


@each_solver
@pytest.mark.parametrize("scene", SCENES)
def test_numbers_written_into_any_array(scene, solver):
    """Each in turn: states and adjoints are those of a new system to the bit, or the array is refused by name."""
    system = make(scene, solver)
    x0, controls = problem(system)
    before, counted, refused = results(system, x0, controls), set(), set()
    for name in changeable(system.model):
        array = getattr(system.model, name)
        numbers = array.numpy().copy()
        array.assign((1.25 * numbers + 0.01).astype(numbers.dtype))
        try:
            found = results(system, x0, controls)
        except ValueError as error:
            assert f"model.{name} has been changed" in str(error)
            refused.add(name)
        else:
            assert equal(found, results(fresh(system, scene), x0, controls)), name
            counted |= set() if equal(found, before) else {name}
        array.assign(numbers)
        assert equal(results(system, x0, controls), before), name

    both = {"gravity", "body_com"}
    if scene == "driven":
        both |= {"joint_target_ke", "joint_target_kd", "joint_target_q", "joint_limit_lower", "joint_limit_ke"}
    else:
        both |= {"shape_material_ke", "shape_material_kf", "shape_scale"}
    assert both <= counted
    own = {"body_mass", "body_inertia", "joint_armature"} if solver is Featherstone else {"body_inv_mass"}
    assert own <= counted
    assert {"joint_friction", "joint_effort_limit"} <= refused
    assert ("joint_armature" in refused) == ("body_mass" in refused) == (solver is SemiImplicit)


@each_solver
def test_masses_that_belong_together(solver):
    system = make("driven", solver)
    x0, controls = problem(system)
    before, model = results(system, x0, controls), system.model
    written, other = ("body_inv_mass", "body_mass") if solver is Featherstone else ("body_mass", "body_inv_mass")
    old = {name: getattr(model, name).numpy().copy() for name in (written, other)}
    getattr(model, written).assign(2.0 * old[written])
    for _ in range(2):  # again and again
        message = (
            rf"model\.{written} has been changed and model\.{other} has not, with which {solver.__name__} computes"
        )
        with pytest.raises(ValueError, match=message):
            unroll(system, x0, controls)
    getattr(model, other).assign(0.5 * old[other])
    found = results(system, x0, controls)
    assert not equal(found, before) and equal(found, results(fresh(system, "driven"), x0, controls))

    getattr(model, written).assign(old[written])
    system.refresh()  # it is meant
    assert equal(results(system, x0, controls), found)


@each_solver
@pytest.mark.parametrize(
    ("scene", "name"),
    [("driven", n) for n in ("gravity", "joint_target_ke", "joint_target_q", "joint_armature", "body_mass", "body_com")]
    + [("ball", n) for n in ("shape_material_ke", "shape_scale", "shape_margin")],
)
def test_arrays_that_are_replaced(scene, name, solver, device):
    """By another array, which is then written as well: both count, with new graphs."""
    if solver is SemiImplicit and name in ("joint_armature", "body_mass"):
        pytest.skip("not read")
    system = make(scene, solver, device)
    x0, controls = problem(system)
    before, seen = results(system, x0, controls), []
    old = getattr(system.model, name)
    for factor in (1.0, 1.25, 1.5):
        if factor < 1.5:
            setattr(system.model, name, wp.clone(old))
        array = getattr(system.model, name)
        array.assign((factor * old.numpy() + 0.01 * (factor - 1.0)).astype(old.numpy().dtype))
        seen.append(results(system, x0, controls))
        assert equal(seen[-1], results(fresh(system, scene), x0, controls))
    assert equal(seen[0], before) and not equal(seen[1], before) and not equal(seen[2], seen[1])


def test_arrays_that_do_not_fit():
    system = make("driven", Featherstone)
    x0, controls = problem(system)
    old = system.model.gravity
    system.model.gravity = wp.zeros(7, dtype=wp.vec3, device="cpu")
    with pytest.raises(
        ValueError, match=r"model\.gravity has been replaced by an array \(7,\) of vec3f on cpu; it must"
    ):
        unroll(system, x0, controls)
    system.model.gravity = None
    with pytest.raises(ValueError, match=r"model\.gravity was an array and has been replaced by None: make another"):
        unroll(system, x0, controls)
    system.model.gravity = old
    unroll(system, x0, controls)
    for name in ("dt", "substeps"):
        with pytest.raises(AttributeError):
            setattr(system, name, 2)


@pytest.mark.parametrize("graph", [True, False])
def test_settings_of_solver_and_model(graph):
    """Numbers that Python hands to kernels."""
    system = make("driven", SemiImplicit, graph=graph)
    x0, controls = problem(system)
    before = results(system, x0, controls)
    system.solver.joint_attach_ke *= 0.5
    found = results(system, x0, controls)
    assert not equal(found, before)
    system.solver.joint_attach_ke *= 2.0
    assert equal(results(system, x0, controls), before)

    system = make("driven", Featherstone, graph=graph)
    unroll(system, x0[:, :4], controls)
    system.solver.update_mass_matrix_interval = 2
    with pytest.raises(ValueError, match="update_mass_matrix_interval 1, got 2"):
        unroll(system, x0[:, :4], controls)


def test_flags_of_bodies(device):
    """What a solver derives on the host: noticed on a CPU, by `refresh` anywhere."""
    system = make("driven", Featherstone, device)
    x0, controls = problem(system)
    before = results(system, x0, controls)
    flags = system.model.body_flags
    still = flags.numpy().copy()
    still[::2] = int(newton.BodyFlags.KINEMATIC)
    for values, expected in ((still, None), (flags.numpy().copy(), before)):
        flags.assign(values)
        if wp.get_device(device).is_cuda:
            system.refresh()
        found = results(system, x0, controls)
        assert equal(found, expected or results(fresh(system, "driven"), x0, controls))
        assert expected or not equal(found, before)

    flags.assign(still)
    system.refresh()
    found = results(system, x0, controls)
    system.model.joint_armature.assign(system.model.joint_armature.numpy() + 1.0)  # the solver has a copy
    if wp.get_device(device).is_cuda:
        system.refresh()
    again = results(system, x0, controls)
    assert not equal(again, found) and equal(again, results(fresh(system, "driven"), x0, controls))


def test_a_callers_graph_outlives_a_refresh(device):
    """It points to what is kept for it: numbers that are written count, what is replaced does not."""
    system = make("driven", Featherstone, device)
    x0, controls = problem(system)
    before = unroll(system, x0, controls[:1])[-1].numpy()
    x, c, y = arrays(x0, controls[0], x0, device=device)
    with wp.ScopedCapture(device) as capture:
        system.step(x, c, y)
    for name in ("joint_armature", "gravity", "joint_target_q"):
        array = wp.clone(getattr(system.model, name))
        array.assign((array.numpy() + 1.0).astype(array.numpy().dtype))
        setattr(system.model, name, array)
    assert not np.array_equal(unroll(system, x0, controls[:1])[-1].numpy(), before)
    rubbish = [wp.full(n, 7.0, dtype=float, device=device) for n in (2, 4, 8, 16, 32)]
    wp.capture_launch(capture.graph)
    np.testing.assert_array_equal(y.numpy(), before)
    del rubbish


@each_solver
@pytest.mark.parametrize("scene", SCENES)
def test_a_step_is_repeated_to_the_bit(scene, solver):
    """The taped step of the backward pass gives what the forward pass did, so nothing is refused that is right."""
    system = make(scene, solver, substeps=3)
    x0, controls = problem(system)
    states, out = unroll(system, x0, controls), arrays(x0, controls[0], device="cpu")
    for n, c in enumerate(controls):
        system.step_vjp(states[n], *arrays(c, x0, device="cpu"), *out, y=states[n + 1])
        np.testing.assert_array_equal(system._work.rows[-1].numpy(), states[n + 1].numpy())


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", ["gravity", "body_mass", "joint_target_q"])
def test_a_model_that_changes_between_two_passes(name, graph, device):
    system = make("driven", Featherstone, device, substeps=2, graph=graph)
    x0, controls = problem(system)
    x, c, y = unroll(system, x0, controls)[0], *arrays(controls[0], x0, device=device)
    system.step(x, c, y)
    adj, adj_x, adj_c = arrays(np.ones_like(x0), x0, controls[0], device=device)
    system.step_vjp(x, c, adj, adj_x, adj_c, y=y)
    found, array = (adj_x.numpy().copy(), adj_c.numpy().copy()), getattr(system.model, name)
    numbers = array.numpy().copy()
    changed = numbers.copy()
    changed[: len(numbers) // 2] *= 1.01  # the first world alone; the global gravity is last
    changed[: len(numbers) // 2] += 0.01
    array.assign(changed)
    adj_x.zero_()
    message = r"the backward pass finds other next states than the forward pass did, for 1 sample\(s\): 0; they differ"
    with pytest.raises(NotRepeatable, match=message):
        system.step_vjp(x, c, adj, adj_x, adj_c, y=y)
    assert not adj_x.numpy().any()  # nothing has been written
    system.step_vjp(x, c, adj, adj_x, adj_c)  # not asked to compare
    assert not np.array_equal(adj_x.numpy(), found[0])
    array.assign(numbers)
    system.step_vjp(x, c, adj, adj_x, adj_c, y=y)
    assert equal((adj_x.numpy(), adj_c.numpy()), found)


def test_what_counts_as_a_repetition():
    """A few roundings of the row's largest number do; numbers that are not finite must be the same ones."""
    system = make("driven", Featherstone)
    x0, controls = problem(system)
    x, y = unroll(system, x0, controls[:1])
    rest = arrays(controls[0], x0, x0, controls[0], device="cpu")
    right, eps = y.numpy().copy(), np.finfo(np.float32).eps
    for shift, fine in ((30.0, True), (100.0, False)):
        y.assign(right + np.float32(shift * eps) * np.abs(right).max(axis=1, keepdims=True))
        if fine:
            system.step_vjp(x, *rest, y=y)
        else:
            with pytest.raises(NotRepeatable, match=r"for 2 sample\(s\): 0, 1;"):
                system.step_vjp(x, *rest, y=y)
    y.assign(np.where(np.arange(4) == 1, np.nan, right))
    with pytest.raises(NotRepeatable, match="inf of a row"):
        system.step_vjp(x, *rest, y=y)
    x.assign(np.full_like(x0, np.nan))
    system.step(x, rest[0], y)
    assert np.isnan(y.numpy()).any()
    system.step_vjp(x, *rest, y=y)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 4\), got \(2, 1\)"):
        system.step_vjp(x, *rest, y=rest[0])


def test_steps_on_a_tape_compare():
    system = make("driven", Featherstone)
    x0, controls = problem(system)
    states = [wp.array(x0, device="cpu", requires_grad=True)]
    with wp.Tape() as tape:
        for c in arrays(*controls, device="cpu"):
            states.append(wp.zeros_like(states[0], requires_grad=True))
            system.step(states[-2], c, states[-1])
    seed = wp.ones_like(states[0])
    tape.backward(grads={states[-1]: seed})
    found = states[0].grad.numpy().copy()
    np.testing.assert_array_equal(found, pull(system, states, controls, np.ones_like(x0))[0])
    tape.zero()
    system.model.set_gravity((0.0, 0.0, -3.0))
    with pytest.raises(NotRepeatable, match="gravity, masses, targets"):
        tape.backward(grads={states[-1]: seed})


def test_what_is_neither_array_nor_number_may_come_and_go():
    """A viewer's notes on a model cost no graph."""
    system = make("driven", Featherstone)
    x0, controls = problem(system)
    unroll(system, x0, controls)
    graphs = copy.copy(system._graphs)
    system.model.notes, system.model.joint_label = {"by": "a viewer"}, list(system.model.joint_label)
    unroll(system, x0, controls)
    assert graphs and system._graphs == graphs
