"""How well `identify` and `plan` do, and how fast open loops are.

    python -m tests.benchmarks.workflows --repetitions 100
    python -m tests.benchmarks.workflows --only open_loop

Errors and coverage of an identification over many repetitions, chaos, seconds of a swing-up; value and gradient of an
open loop against JAX as its users write it, in turns within this process, by processor time.
"""

import argparse
import time

import numpy as np
import torch

from tests.benchmarks.cases import make_batches, make_case
from warp_phys import CartPole, Pendulum
from warp_phys.interop.torch import identify, plan, trajectory

CART = CartPole(dt=0.02)
BOUNDS = {"pole_mass": (0.01, 1.0), "half_length": (0.05, 5.0)}
LEVELS = (0.9, 0.95)
FACTORS = ((3.0, 3.0), (3.0, 1 / 3), (1 / 3, 3.0), (1 / 3, 1 / 3))


def recorded(system, x0, steps, noise, seed, force):
    """Return measured states and the controls."""
    generator = torch.Generator().manual_seed(seed)
    controls = force * torch.randn(steps, len(x0), 1, dtype=torch.float64, generator=generator)
    states = trajectory(system, x0, controls)
    return states + noise * torch.randn(states.shape, dtype=torch.float64, generator=generator), controls


def coverage(repetitions, noise=0.01):
    """Identify a cart-pole again and again, from 64 trajectories of 50 steps, a factor of three away."""
    errors, covered, seconds = [], np.zeros((len(LEVELS), len(BOUNDS)), dtype=int), []
    for seed in range(repetitions):
        x0 = torch.from_numpy(CART.sample(64, seed=seed, dtype=np.float64))
        states, controls = recorded(CART, x0, 50, noise, seed, 10.0)
        factors = FACTORS[seed % len(FACTORS)]
        start = {name: factor * getattr(CART, name) for name, factor in zip(BOUNDS, factors, strict=True)}
        begin = time.process_time()
        found = identify(CART, states, controls, start, BOUNDS)
        seconds.append(time.process_time() - begin)
        errors.append([abs(found.values[name] / getattr(CART, name) - 1.0) for name in BOUNDS])
        for covers, level in zip(covered, LEVELS, strict=True):
            intervals = found.intervals(level)
            covers += [intervals[name][0] <= getattr(CART, name) <= intervals[name][1] for name in BOUNDS]
    print(
        f"cart-pole, {repetitions} repetitions, noise {noise}, estimated; {np.median(seconds):.2f} CPU s each (median)"
    )
    for i, (name, column) in enumerate(zip(BOUNDS, np.transpose(errors), strict=True)):
        counts = ", ".join(f"{covered[j, i]} of the {level:.0%} intervals" for j, level in enumerate(LEVELS))
        print(f"  {name}: error {np.median(column):.2%} median, {column.max():.2%} largest; covered by {counts}")


def chaos(noise=0.01):
    """Identify a double pendulum from 500 steps, by single shooting and by segments of 25."""
    system, generator = Pendulum(links=2), torch.Generator().manual_seed(0)
    x0 = torch.from_numpy(system.sample(4, dtype=np.float64))
    x0[:, 2::2] = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    x0[:, 3::2] *= 3.0
    states, controls = recorded(system, x0, 500, noise, 0, 2.0)
    start, bounds = {"link_mass": 0.2, "length": 1.0}, {"link_mass": (0.01, 1.0), "length": (0.05, 5.0)}
    for shooting in (None, 25):
        found = identify(system, states, controls, start, bounds, shooting=shooting, noise=noise)
        values = ", ".join(f"{name} {value:.5f} (true {getattr(system, name)})" for name, value in found.values.items())
        print(f"double pendulum, shooting={shooting}: {values}; residual {found.residuals.std():.4f}, noise {noise}")


def upright(states, controls):
    """Upright, in the middle, at rest."""
    x, v, angle, rate = states.unbind(-1)
    end = (1.0 - angle.cos() + 0.1 * (v.square() + rate.square()))[-1]
    along = (1.0 - angle.cos() + 0.05 * x.square() + 0.01 * rate.square()).mean(0)
    return along + end + 1e-3 * controls.square().mean(dim=(0, 2))


def swing_up():
    """Plan a swing-up over 100 steps, for one cart-pole that hangs and for 64 at once."""
    for batch in (1, 64):
        x0 = CART.sample(batch, dtype=np.float64) if batch > 1 else np.array([[0.0, 0.0, np.pi, 0.0]])
        for optimiser in ("L-BFGS", "L-BFGS-B"):
            settings = {"cost": upright, "bounds": (-20.0, 20.0), "optimiser": optimiser}
            plan(CART, x0, 100, iterations=2, **settings)
            begin, wall = time.process_time(), time.perf_counter()
            found = plan(CART, x0, 100, **settings)
            begin, wall = time.process_time() - begin, time.perf_counter() - wall
            up = (found.states[-1, :, 2].cos() > 0.98).sum().item()
            print(
                f"swing-up, batch {batch}, {optimiser}: {begin:.2f} CPU s, {wall:.2f} s, "
                f"{found.evaluations} evaluations, {up} of {batch} upright, mean loss {found.loss.mean():.3f}"
            )


def open_loop(rounds=15):
    """Loss at the end of 100 steps and its gradient by the controls: trajectory, loss and backward, against JAX."""
    for batch, calls in ((8, 50), (256, 15)):
        case = make_case("cartpole", "R", batch, poles=1, steps=100)
        system, x0 = CartPole(poles=1, dt=case.dt), make_batches(case)[0]
        forces = np.random.default_rng(0).standard_normal((case.steps, batch, 1)).astype(np.float32)
        controls, states = torch.tensor(forces, requires_grad=True), torch.tensor(x0)
        by_jax = _open_loop_in_jax(case, x0, forces)

        def by_torch(system=system, states=states, controls=controls):
            controls.grad = None
            loss = system.loss(trajectory(system, states, controls))
            loss.backward()
            return float(loss.detach()), controls.grad.numpy()

        (loss, gradient), (expected_loss, expected) = by_torch(), by_jax()
        error = np.abs(gradient - expected).max() / np.abs(expected).max()
        assert abs(loss - expected_loss) < 1e-5 and error < 1e-4, (loss, expected_loss, error)
        times = np.array([[_milliseconds(call, calls) for call in (by_torch, by_jax)] for _ in range(rounds)])
        own, peer = np.median(times, axis=0)
        ratio = np.median(times[:, 1] / times[:, 0])
        print(f"open loop, batch {batch}: {own:.3f} ms, JAX {peer:.3f} ms, JAX by this {ratio:.2f} (CPU time)")


def _open_loop_in_jax(case, x0, forces):
    """Return a function that gives loss and gradient; compiled."""
    import jax
    import jax.numpy as jnp

    from tests.benchmarks.jax_peer.physics import make_physics

    physics = make_physics(case)

    def loss(controls, x):
        def body(x, c):
            x = physics.step(x, c)
            return x, physics.emit(x, c)

        return physics.cost(*jax.lax.scan(body, x, controls))

    compiled = jax.jit(jax.value_and_grad(loss))
    start = jnp.asarray(np.moveaxis(x0.reshape(len(x0), *physics.shape), 0, -1))

    def call():
        value, gradient = compiled(jnp.asarray(forces), start)
        return float(value), np.asarray(gradient)

    return call


def _milliseconds(call, calls):
    begin = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begin) / calls * 1e3


PARTS = {part.__name__: part for part in (open_loop, swing_up, chaos, coverage)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=100, help="repetitions of the identification")
    parser.add_argument("--only", choices=list(PARTS), help="one part alone")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        if chosen.only in (None, name):
            part(chosen.repetitions) if name == "coverage" else part()
