"""What is done many times, and what a process has grown by meanwhile."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import warp as wp

from warp_phys import CartPole, gate
from warp_phys.interop.torch import Rollout, Update

STEPS, BATCH = 5, 4


class Growth(NamedTuple):
    """How much a process has grown, for each time that something was done."""

    blocks: float
    """Blocks of memory that Python has and has not given back: whatever is kept has one at least, arrays too."""
    resident: float
    """Bytes of all memory of the process."""


def measure(step: Callable[[int], object], count: int, windows: int = 3) -> Growth:
    """Return how memory grows with a step, after up to 1000 to warm up: in the best of some windows of `count`.

    Something that grows does so in every window; what fills a cache or a pool does not.
    """
    begin = min(count, 1000)
    for i in range(begin):
        step(i)
    found, before = [], _memory()
    for start in range(begin, begin + windows * count, count):
        for i in range(start, start + count):
            step(i)
        after = _memory()
        found.append(((after[0] - before[0]) / count, (after[1] - before[1]) / count))
        before = after
    return Growth(*map(min, zip(*found, strict=True)))


def _memory() -> tuple[int, int]:
    gc.collect()
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE")


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def _states(batch: int = BATCH) -> torch.Tensor:
    return torch.as_tensor(CartPole().sample(batch, seed=0))


def rollout() -> Callable[[int], object]:
    """Rollouts with a backward pass of autograd, fused and in general, by turns."""
    system, net, x0 = CartPole(), _network(), _states()
    rollouts = [Rollout(system, net, STEPS, "C", backend=backend) for backend in ("general", "fused")]

    def step(i: int) -> None:
        net.zero_grad()
        system.loss(*rollouts[i % 2](x0)).backward()

    return step


def update() -> Callable[[int], object]:
    """Whole updates, recorded; one flow has a memory."""
    net, x0 = _network(), _states()
    updates = [
        Update(Rollout(CartPole(), net, STEPS, flow), torch.optim.Adam(net.parameters(), lr=1e-6))
        for flow in ("C", "averaged")
    ]
    return lambda i: updates[i % 2](x0)


def batches() -> Callable[[int], object]:
    """An update of another batch size every time, of 401 sizes in all: more than any cache holds."""
    net = _network()
    one, x0 = Update(Rollout(CartPole(), net, STEPS), torch.optim.Adam(net.parameters(), lr=1e-6)), _states(401)
    return lambda i: one(x0[: 1 + 37 * i % 401])  # large and small ones in every window


def systems() -> Callable[[int], object]:
    """An update of another system every time: other physical parameters, so that the kernels are the same."""
    net, x0 = _network(), _states()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-6)
    return lambda i: Update(Rollout(CartPole(gravity=9.0 + i / 1e5), net, STEPS), optimiser)(x0)


def in_warp() -> Callable[[int], object]:
    """A tape of steps of one's own, with gates."""
    system, x0 = CartPole(), wp.array(CartPole().sample(BATCH, seed=0), requires_grad=True, device="cpu")
    c = wp.zeros((BATCH, 1), device="cpu", requires_grad=True)

    def step(_: int) -> None:
        tape = wp.Tape()
        with tape:
            y = wp.empty_like(x0, requires_grad=True)
            system.step(x0, c, y)
            z = gate(y, 0.5)
        tape.backward(grads={z: wp.ones_like(z)})

    return step


def environments() -> Callable[[int], object]:
    """Episodes of environments."""
    from warp_phys.interop.gymnasium import SystemVectorEnv

    environment = SystemVectorEnv("cartpole", num_envs=BATCH)
    environment.reset(seed=0)
    action = np.zeros(environment.action_space.shape, np.float32)
    return lambda i: environment.reset(seed=i) if i % 10 == 0 else environment.step(action)


def in_jax() -> Callable[[int], object]:
    """Gradients in JAX, compiled once."""
    import jax

    from warp_phys.interop.jax import rollout as unroll

    system, x0 = CartPole(), CartPole().sample(BATCH, seed=0)

    def loss(gains, x0):
        states, _ = unroll(system, lambda gains, x: x @ gains, gains, x0, steps=STEPS)
        return (states[-1] ** 2).mean()

    gradient = jax.jit(jax.grad(loss))
    return lambda i: gradient(np.full((4, 1), 1e-6 * i, np.float32), x0).block_until_ready()


def in_newton() -> Callable[[int], object]:
    """Steps of a Newton model there and back."""
    from tests.interop.newton_models import cartpole
    from warp_phys.interop.newton import NewtonSystem

    system = NewtonSystem.from_builder(cartpole(), 2, dt=0.01, device="cpu")
    x = wp.zeros((system.worlds, system.state_size), device="cpu")
    c = wp.zeros((system.worlds, system.control_size), device="cpu")
    y, adj_x, adj_c = wp.empty_like(x), wp.empty_like(x), wp.empty_like(c)

    def step(_: int) -> None:
        system.step(x, c, y)
        system.step_vjp(x, c, y, adj_x, adj_c)

    return step


CASES: dict[str, Callable[[], Callable[[int], object]]] = {
    "rollout": rollout,
    "update": update,
    "batches": batches,
    "systems": systems,
    "warp": in_warp,
    "environments": environments,
    "jax": in_jax,
    "newton": in_newton,
}
"""By name; each returns what is done for the i-th time."""
