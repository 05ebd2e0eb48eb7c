"""Models that the tests of Newton share, and an adapter that makes the mistake that ours avoids."""

import newton
import newton.examples
import numpy as np
import warp as wp

from warp_phys.interop.newton import NewtonSystem

LENGTH, POLE, CART, GRAVITY = 0.5, 0.1, 1.0, 9.8
"""Half length, mass of the pole, mass of the cart, gravity: the numbers of `CartPole(poles=1)`."""


def cartpole():
    """A cart on the x axis with a uniform rod on it; at 0 the rod stands, as in `CartPole`."""
    world = newton.ModelBuilder(gravity=(0.0, 0.0, -GRAVITY))
    cart = world.add_link(mass=CART, inertia=wp.mat33(np.eye(3)), label="cart")
    rod = wp.mat33(np.diag([POLE * LENGTH**2 / 3.0] * 3))
    pole = world.add_link(mass=POLE, inertia=rod, com=wp.vec3(0.0, 0.0, LENGTH), label="pole")
    slide = world.add_joint_prismatic(-1, cart, axis=(1.0, 0.0, 0.0), label="slide")
    hinge = world.add_joint_revolute(cart, pole, axis=(0.0, 1.0, 0.0), label="hinge")
    world.add_articulation([slide, hinge])
    return world


def double_pole():
    """Newton's cart with two poles in a chain, read from its URDF file."""
    world = newton.ModelBuilder()
    world.add_urdf(newton.examples.get_asset("cartpole.urdf"), floating=False, enable_self_collisions=False)
    return world


def ball(height=0.3):
    """A free ball above the ground."""
    world = newton.ModelBuilder()
    # no damping: it would make the force jump at touch
    world.default_shape_cfg.ke, world.default_shape_cfg.kd, world.default_shape_cfg.kf = 2e4, 0.0, 10.0
    body = world.add_body(xform=wp.transform(wp.vec3(0.0, 0.0, height)), label="ball")
    world.add_shape_sphere(body, radius=0.2)
    return world


def arrays(*values, device):
    """Return values as arrays of float32."""
    return [wp.array(np.ascontiguousarray(v, dtype=np.float32), device=device) for v in values]


def unroll(system, x0, controls):
    """Return x_0 … x_T as arrays."""
    states = arrays(x0, device=system.device)
    for c in controls:
        states.append(wp.empty_like(states[0]))
        system.step(states[-2], *arrays(c, device=system.device), states[-1])
    return states


def pull(system, states, controls, adjoint):
    """Return the adjoints of x_0 and of all controls."""
    adj_x, adj_next = arrays(adjoint, np.full_like(adjoint, np.nan), device=system.device)
    adj_c = np.empty_like(controls)
    for n in reversed(range(len(controls))):
        c, out = arrays(controls[n], np.full_like(controls[n], np.nan), device=system.device)
        system.step_vjp(states[n], c, adj_x, adj_next, out)
        adj_x, adj_next, adj_c[n] = adj_next, adj_x, out.numpy()
    return adj_x.numpy(), adj_c


class SharedSolver:
    """An adapter as one writes it first: a tape per step, one solver for all of them."""

    dtype = np.float32

    def __init__(self, system: NewtonSystem):
        self.system, self.solver, self.tapes = system, newton.solvers.SolverFeatherstone(system.model), {}
        self.worlds, self.device = system.worlds, system.device
        self.state_size, self.control_size = system.state_size, system.control_size
        self.states, self.controls, self.sample = system.states, system.controls, system.sample

    def step(self, x, c, y):
        """Record a step on a tape of its own."""
        work, model = self.system._work, self.system.model
        source, target, control = model.state(), model.state(), model.control()
        work._spread(x, source)
        wp.copy(work.c, c)
        work.control = control
        work._steer()
        with wp.Tape() as tape:
            self.solver.step(source, target, control, None, self.system.dt)
        work._collect(target, y)
        self.tapes[x.ptr] = (x, tape, source, target, control)

    def step_vjp(self, x, c, adj_y, adj_x, adj_c):
        """Run that tape backward, when the solver's buffers may be those of a later step."""
        work = self.system._work
        _, tape, source, target, work.control = self.tapes[x.ptr]
        work._spread(adj_y, target, adjoint=True)
        tape.backward()
        work._collect(source, adj_x, adjoint=True)
        grad = work.control.joint_f.grad.numpy().reshape(self.worlds, -1)
        adj_c.assign(grad[:, work.steering.places.numpy()] * work.steering.gain.numpy())
        tape.zero()


def ant():
    """Newton's ant, read from its MJCF file, on feet that press on the ground a little."""
    world = newton.ModelBuilder()
    shape = world.default_shape_cfg
    shape.ke, shape.kd, shape.kf, shape.mu = 1e3, 2.0, 10.0, 1.0
    file = newton.examples.get_asset("nv_ant.xml")
    world.add_mjcf(file, ignore_names=["floor"], enable_self_collisions=False)
    world.joint_q[2] = 0.34
    world.joint_q[7:] = [0.0, 0.55, 0.0, -0.55, 0.0, -0.55, 0.0, 0.55]
    return world
