"""Memory that one backward pass takes over a long horizon, by this engine, by tapes of Warp's and by torch.

    python -m tests.benchmarks.tape_memory

One cart-pole, 64 samples, a network of two layers of 64, the loss at the end, its gradient by the weights. Each
contestant and horizon has a process of its own, which does the same over 10 steps first; what is told is how much its
peak memory rises above what it holds then. docs/memory.md has the table.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import warp as wp

from tests.benchmarks.processes import ROOT
from tests.benchmarks.tables import markdown_table
from warp_phys import CartPole, quiet
from warp_phys.controllers import MLP
from warp_phys.interop.torch import Rollout

BATCH, WIDTH = 64, 64
HORIZONS = (1000, 10_000)
SYSTEM = CartPole(poles=1, dt=0.01)


class TapedStep(torch.autograd.Function):
    """A step of Warp's as a function of torch's, as users write it: each call keeps a tape, and the arrays on it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the next states."""
        ctx.x, ctx.c = (wp.from_torch(rows.detach(), requires_grad=True) for rows in (x, c))
        ctx.y = wp.empty(tuple(x.shape), dtype=float, device="cpu", requires_grad=True)
        ctx.tape = wp.Tape()
        with ctx.tape:
            SYSTEM.step(ctx.x, ctx.c, ctx.y)
        return wp.to_torch(ctx.y).detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the adjoints of state and control."""
        ctx.tape.backward(grads={ctx.y: wp.from_torch(gradient.contiguous())})
        return wp.to_torch(ctx.x.grad), wp.to_torch(ctx.c.grad)


def torch_step(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The same step, in torch."""
    s, (position, speed, angle, rate) = SYSTEM, x.split(1, dim=1)
    push = (c + s.pole_mass * s.half_length * angle.sin() * rate**2) / s.total_mass
    turn = (s.gravity * angle.sin() - angle.cos() * push) / (
        s.half_length * (4.0 / 3.0 - s.pole_mass * angle.cos() ** 2 / s.total_mass)
    )
    speed = speed + s.dt * (push - s.pole_mass * s.half_length * turn * angle.cos() / s.total_mass)
    rate = rate + s.dt * turn
    return torch.cat([position + s.dt * speed, speed, angle + s.dt * rate, rate], dim=1)


def looped(step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.nn.Module, int], None]:
    """A backward pass through a loop over a step."""

    def run(controller: torch.nn.Module, steps: int) -> None:
        x = torch.as_tensor(SYSTEM.sample(BATCH, seed=0))
        for _ in range(steps):
            x = step(x, controller(x))
        (1.0 - x[:, 2].cos()).mean().backward()

    return run


def rolled(controller: torch.nn.Module, steps: int) -> None:
    """A backward pass of a rollout, M and R in one."""
    states, _ = Rollout(SYSTEM, controller, steps=steps, flow="combined")(SYSTEM.sample(BATCH, seed=0))
    (1.0 - states[-1, :, 2].cos()).mean().backward()


CONTESTANTS: dict[str, Callable[[torch.nn.Module, int], None]] = {
    "this engine, C": rolled,
    "a tape per step": looped(TapedStep.apply),
    "torch eager": looped(torch_step),
}


def status(field: str) -> float:
    """A number of this process's memory, from /proc [MB]."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(float(line.split()[1]) / 1024 for line in file if line.startswith(field))


def measure(name: str, steps: int) -> dict[str, float]:
    """The child's side: memory of one pass [MB], and the size of the gradient, for comparison."""
    quiet()
    torch.set_num_threads(1)
    controller = MLP(SYSTEM, hidden=(WIDTH, WIDTH), seed=0)
    CONTESTANTS[name](controller, 10)
    controller.zero_grad()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    CONTESTANTS[name](controller, steps)
    norm = torch.cat([p.grad.flatten() for p in controller.parameters() if p.grad is not None]).norm()
    return {"megabytes": status("VmHWM") - before, "norm": float(norm)}


def main(arguments: Sequence[str]) -> None:
    """Measure all, or, as a child, one."""
    if arguments:
        print(json.dumps(measure(arguments[0], int(arguments[1]))))
        return
    rows = []
    for steps in HORIZONS:
        row = [f"{steps}", f"{4 * BATCH * (steps * 5 + 4) / 2**20:.1f}"]
        for name in CONTESTANTS:
            command = [sys.executable, "-m", "tests.benchmarks.tape_memory", name, str(steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            row.append(f"{json.loads(done.stdout)['megabytes']:.0f}")
        rows.append(row)
    print(markdown_table(["steps", "trajectory", *CONTESTANTS], rows, 1))


if __name__ == "__main__":
    main(sys.argv[1:])
