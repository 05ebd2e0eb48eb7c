"""An independent torch implementation of the flows: unrolled by autograd, with `detach` where a flow stops feedback."""

import math

import torch


def cart_pole_step(system, x, c):
    """One semi-implicit Euler step, batched over rows; written from the equations, not from the engine."""
    g, m, total, l, dt = system.gravity, system.pole_mass, system.total_mass, system.half_length, system.dt
    angle, rate, force = x[:, 2::2], x[:, 3::2], c
    push = (force + m * l * angle.sin() * rate**2) / total
    turn = (g * angle.sin() - angle.cos() * push) / (l * (4 / 3 - m * angle.cos() ** 2 / total))
    swing = (angle.sin() * rate**2 - turn * angle.cos()).sum(1, keepdim=True)
    speed = x[:, 1:2] + dt * (force + m * l * swing) / total
    rate = rate + dt * turn
    poles = torch.stack([angle + dt * rate, rate], dim=2).flatten(1)
    return torch.cat([x[:, :1] + dt * speed, speed, poles], dim=1)


def two_controls_step(system, x, c):
    """One step of the tests' own system with two controls."""
    q, v = x[:, :2], x[:, 2:]
    pull = system.coupling * (q.flip(1) - q)
    v = v + system.dt * (-system.stiffness * q.sin() + pull + system.gain * (1 + q * q) * c)
    return torch.cat([q + system.dt * v, v], dim=1)


def gated(x, weight):
    """The identity forward; backward its adjoint is multiplied by `weight`."""
    return weight * x + ((1 - weight) * x).detach() if weight else x.detach()


def unroll(step, controller, x0, gates):
    """Return states and controls of an unrolling whose feedback passes the gates, shape (steps, 2)."""
    states, controls, x = [x0], [], x0
    for alpha, beta in gates.tolist():
        c = controller(gated(x, beta))
        x = step(gated(x, alpha), c)
        states.append(x)
        controls.append(c)
    return torch.stack(states), torch.stack(controls)


def cart_pole_loss(states, controls, when, control_cost):
    """1 − mean cos θ over samples, poles and times, plus the control cost."""
    chosen = states[-1:] if when == "final" else states[1:]
    return 1 - chosen[:, :, 2::2].cos().mean() + control_cost * controls.square().mean()


def two_controls_loss(states, controls, when, control_cost, target=0.7):
    """Mean over samples of the sum over times, plus the control cost."""
    x = states[-1:] if when == "final" else states[1:]
    cost = (x[:, :, 0] - target) ** 2 + 0.5 * x[:, :, 1] ** 2 * x[:, :, 3]
    return cost.sum(0).mean() + control_cost * controls.square().mean()


def gradient(loss, parameters):
    """Return the gradient as one flat tensor."""
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def relative(a, b):
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm()) if float(b.norm()) else math.inf * float(a.norm() > 0)


class _Meeting(torch.autograd.Function):
    """A row that goes to the physics and to the controller; backward what comes from there meets at the gates."""

    @staticmethod
    def forward(ctx, x, alpha, beta, limit):
        ctx.gates = alpha, beta, limit
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx, from_physics, from_controller):
        alpha, beta, limit = ctx.gates
        physics, controller = alpha * from_physics, beta * from_controller
        if limit is not None:
            lengths = [part.norm(dim=1, keepdim=True) for part in (physics, controller)]
            controller = controller * (limit * lengths[0] / lengths[1]).clamp(max=1.0).nan_to_num(0.0)
        return physics + controller, None, None, None


def unroll_beside(step, controller, x0, steps, inputs=None, memory=None, gates=(1.0, 1.0, 1.0), limit=None):
    """Return states, controls and memories of an unrolling with inputs (T, B or 1, E) and a memory (B, H).

    Gates are numbers or tensors (T, B, D), those of the state's feedback, and a number, that of the memory's.
    """
    states, controls, memories, x, h = [x0], [], [memory], x0, memory
    for n in range(steps):
        alpha, beta = (gate if isinstance(gate, float) else gate[n] for gate in gates[:2])
        seen, own = _Meeting.apply(x, alpha, beta, limit)[::-1]
        more = [] if inputs is None else [inputs[n].expand(len(x), -1)]
        if h is None:
            c = controller(seen, *more)
        else:
            c, h = controller(seen, *more, gated(h, gates[2]))
        x = step(own, c)
        states.append(x)
        controls.append(c)
        memories.append(h)
    return torch.stack(states), torch.stack(controls), None if h is None else torch.stack(memories)
