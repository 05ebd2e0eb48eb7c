"""Updates of a network in Newton, against a plain tape of Newton's that is captured as a graph.

    python -m tests.benchmarks.newton_tape
    python -m tests.benchmarks.newton_tape --only cartpole --steps 50

The plain tape is what one writes with Newton alone: a solver, a state, a control and contacts for every substep, a
network of Warp kernels, one `wp.Tape` over the episode, forward and backward pass recorded once as one graph. Against
it stand R, M and C: of a torch `Rollout`, and, without torch, of a `warp_phys.Rollout` captured in the same way. All in
turns within this process, by processor time; medians of the ratios. Where there are no contacts the gradients must
agree: with contacts, Newton's own tape has lever arms with the wrong sign (docs/newton.md).
"""

import argparse
import time

import newton
import numpy as np
import torch
import warp as wp

import warp_phys
from controllers.networks import MLP
from demos.newton_tasks import TASKS
from warp_phys.engine.layers import Dense
from warp_phys.interop.newton.inertia import make_featherstone
from warp_phys.interop.torch import Rollout

HIDDEN, FLOWS = (64, 64), "RMC"
WARM_UP = 4
"""Updates before those that are timed: at the first, the second and the fourth a rollout tries its controller out."""


@wp.kernel
def observe(q: wp.array2d[float], qd: wp.array2d[float], rows: wp.array2d[float]):
    """rows ← [q | qd]."""
    b, i = wp.tid()
    if i < q.shape[1]:
        rows[b, i] = q[b, i]
    else:
        rows[b, i] = qd[b, i - q.shape[1]]


@wp.kernel
def layer(x: wp.array2d[float], weight: wp.array2d[float], bias: wp.array[float], y: wp.array2d[float]):
    """y ← weight x + bias."""
    b, i = wp.tid()
    total = bias[i]
    for j in range(x.shape[1]):
        total += weight[i, j] * x[b, j]
    y[b, i] = total


@wp.kernel
def bend(x: wp.array2d[float], y: wp.array2d[float]):
    """y ← tanh x; within `layer` its slope would be taken at a sum that the loop has changed since."""
    b, i = wp.tid()
    y[b, i] = wp.tanh(x[b, i])


@wp.kernel
def act(c: wp.array2d[float], places: wp.array[int], gain: wp.array[float], force: wp.array2d[float]):
    """force ← gain · c at the steered degrees of freedom."""
    b, k = wp.tid()
    force[b, places[k]] = gain[k] * c[b, k]


@wp.kernel
def add_squares(q: wp.array2d[float], qd: wp.array2d[float], scale: float, loss: wp.array[float]):
    """loss += scale (|q|² + |qd|²)."""
    b = wp.tid()
    total = float(0.0)  # noqa: UP018, a literal is a constant for Warp
    for i in range(q.shape[1]):
        total += q[b, i] * q[b, i]
    for i in range(qd.shape[1]):
        total += qd[b, i] * qd[b, i]
    wp.atomic_add(loss, 0, scale * total)


@wp.kernel
def add_row_squares(x: wp.array3d[float], scale: float, loss: wp.array[float]):
    """loss += scale |x|² of all states but the first."""
    n, b = wp.tid()
    total = float(0.0)  # noqa: UP018
    for i in range(x.shape[2]):
        total += x[n + 1, b, i] * x[n + 1, b, i]
    wp.atomic_add(loss, 0, scale * total)


def parameters_of(network):
    """Return copies of a network's weights and biases as Warp arrays with gradients."""
    return [wp.array(p.detach().numpy(), dtype=wp.float32, requires_grad=True) for p in network.parameters()]


def finish(update, tape):
    """Run the tape of an update backward, note its gradients, and zero all adjoints for the next one."""
    tape.backward(update.loss)
    for gradient, parameter in zip(update.gradients, update.parameters, strict=True):
        wp.copy(gradient, parameter.grad)
    tape.zero()
    return tape


class Captured:
    """An update that is recorded once and replayed; `_update` runs it and returns what the graph needs."""

    def __init__(self, network):
        self.parameters, self.loss = parameters_of(network), wp.zeros(1, dtype=wp.float32, requires_grad=True)
        self.gradients = [wp.zeros_like(p, requires_grad=False) for p in self.parameters]

    def capture(self):
        self._update()  # loads kernels, allocates
        with wp.ScopedCapture("cpu") as capture:
            self.kept = self._update()
        self.graph = capture.graph

    def __call__(self):
        wp.capture_launch(self.graph)

    def gradient(self):
        return np.concatenate([array.numpy().ravel() for array in self.gradients])


class PlainTape(Captured):
    """The whole update on one tape, with Newton's own solver or one that forms mass matrices body by body."""

    def __init__(self, system, network, steps, x0, make_solver):
        model, self.worlds = system.model, system.worlds
        super().__init__(network)
        self.system, self.steps, count = system, steps, steps * system.substeps
        self.solvers = [make_solver(model) for _ in range(count)]
        self.states = [model.state(requires_grad=True) for _ in range(count + 1)]
        self.inputs = [model.control(requires_grad=True) for _ in range(steps)]
        pipeline = system._work.pipeline
        self.contacts = [pipeline.contacts() if pipeline else None for _ in range(count)]
        sizes = [system.state_size, *HIDDEN, system.control_size]
        new = {"dtype": wp.float32, "requires_grad": True}
        self.layers = [[wp.zeros((self.worlds, size), **new) for size in sizes] for _ in range(steps)]
        self.sums = [[wp.zeros((self.worlds, size), **new) for size in HIDDEN] for _ in range(steps)]
        start = self.states[0]
        numbers = np.split(x0, [model.joint_coord_count // self.worlds], axis=1)
        start.joint_q.assign(np.ascontiguousarray(numbers[0]).ravel())
        start.joint_qd.assign(np.ascontiguousarray(numbers[1]).ravel())
        self.capture()

    def _update(self):
        self.loss.zero_()
        tape = wp.Tape()
        for n in range(self.steps):
            with tape:
                self._steer(n)
            for m in range(n * self.system.substeps, (n + 1) * self.system.substeps):
                state = self.states[m]
                state.clear_forces()
                if self.contacts[m] is not None:
                    newton.eval_fk(self.system.model, state.joint_q, state.joint_qd, state)
                    self.system._work.pipeline.collide(state, self.contacts[m])
                with tape:
                    self.solvers[m].step(
                        state, self.states[m + 1], self.inputs[n], self.contacts[m], self.system._work.dt
                    )
            with tape:
                self._pay(self.states[(n + 1) * self.system.substeps])
        return finish(self, tape)

    def _steer(self, n):
        state, rows = self.states[n * self.system.substeps], self.layers[n]
        q, qd = self._rows(state)
        wp.launch(observe, dim=rows[0].shape, inputs=[q, qd], outputs=[rows[0]])
        for i in range(len(rows) - 1):
            last = i == len(rows) - 2
            sums = rows[-1] if last else self.sums[n][i]
            inputs = [rows[i], *self.parameters[2 * i : 2 * i + 2]]
            wp.launch(layer, dim=sums.shape, inputs=inputs, outputs=[sums])
            if not last:
                wp.launch(bend, dim=sums.shape, inputs=[sums], outputs=[rows[i + 1]])
        steering = self.system._work.steering
        force = self.inputs[n].joint_f.reshape((self.worlds, -1))
        wp.launch(act, dim=rows[-1].shape, inputs=[rows[-1], steering.places, steering.gain], outputs=[force])

    def _pay(self, state):
        scale = 1.0 / (self.steps * self.worlds * self.system.state_size)
        wp.launch(add_squares, dim=self.worlds, inputs=[*self._rows(state), scale], outputs=[self.loss])

    def _rows(self, state):
        return state.joint_q.reshape((self.worlds, -1)), state.joint_qd.reshape((self.worlds, -1))


class OnTorch:
    """The same by a torch `Rollout`."""

    def __init__(self, system, network, steps, x0, flow):
        self.network, self.x0 = network, torch.from_numpy(x0)
        self.rollout = Rollout(system, network, steps, flow=flow)

    def __call__(self):
        self.network.zero_grad()
        self.rollout(self.x0)[0][1:].square().mean().backward()

    def gradient(self):
        return np.concatenate([p.grad.numpy().ravel() for p in self.network.parameters()])


class InWarp(Captured):
    """The same by a `warp_phys.Rollout`, captured."""

    def __init__(self, system, network, steps, x0, flow):
        super().__init__(network)
        dense = Dense((system.state_size, *HIDDEN, system.control_size), parameters=self.parameters)
        self.rollout = warp_phys.Rollout(system, dense, steps, flow=flow, on_divergence="ignore")
        self.x0 = wp.array(x0, dtype=wp.float32)
        self.capture()

    def _update(self):
        self.loss.zero_()
        with wp.Tape() as tape:
            states, _ = self.rollout(self.x0)
            steps, batch, size = states.shape[0] - 1, *states.shape[1:]
            scale = 1.0 / (steps * batch * size)
            wp.launch(add_row_squares, dim=(steps, batch), inputs=[states, scale], outputs=[self.loss])
        return finish(self, tape), states


def compare(name, worlds, steps, rounds):
    """Print the ratios of one model."""
    task, generator = TASKS[name], np.random.default_rng(0)
    system = task.build(worlds)
    x0 = task.start(system, generator).astype(np.float32)
    network = MLP(system, HIDDEN, seed=0)
    with torch.no_grad():
        network[-1].weight *= 0.1  # controls as small as those of a network that starts to learn
    contestants = {"plain tape": PlainTape(system, network, steps, x0, newton.solvers.SolverFeatherstone)}
    contestants["plain tape, inertia by bodies"] = PlainTape(system, network, steps, x0, make_featherstone)
    contestants |= {f"torch {flow}": OnTorch(system, network, steps, x0, flow) for flow in FLOWS}
    contestants |= {f"captured {flow}": InWarp(system, network, steps, x0, flow) for flow in FLOWS}
    gradients = {}
    for label, update in contestants.items():
        for _ in range(WARM_UP):
            update()
        gradients[label] = update.gradient()
    times = np.array([[_milliseconds(update) for update in contestants.values()] for _ in range(rounds)])
    print(f"{name}, {worlds} worlds, {steps} steps of {system.substeps} substeps, ms a step (CPU time)", flush=True)
    columns = dict(zip(contestants, times.T / steps, strict=True))
    for label, column in columns.items():
        plain = np.median(columns["plain tape"] / column)
        print(f"  {label:<30} {np.median(column):8.3f} ms, the plain tape takes {plain:.2f} times as long")
    for kind in ("torch", "captured"):
        print(f"  {kind} C by R: {np.median(columns[f'{kind} C'] / columns[f'{kind} R']):.2f}")
    for label in ("plain tape", "plain tape, inertia by bodies", "captured R"):
        print(f"  gradient, {label} from torch R: {_apart(gradients[label], gradients['torch R']):.1e}")
    agreed = gradients["torch C"]
    print(f"  update, captured C from torch C: {_apart(gradients['captured C'], agreed):.1e}", flush=True)


def _apart(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def _milliseconds(call):
    begin = time.process_time()
    call()
    return (time.process_time() - begin) * 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=list(TASKS), help="one model alone")
    parser.add_argument("--worlds", type=int, default=8, help="samples of an update")
    parser.add_argument("--steps", type=int, default=240, help="control steps of an episode")
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn")
    chosen = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    wp.set_device("cpu")
    torch.set_num_threads(1)
    for name in TASKS:
        if chosen.only in (None, name):
            compare(name, chosen.worlds, chosen.steps, chosen.rounds)
