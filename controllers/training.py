"""The training loop: unroll, differentiate along the chosen flow, clip, step; record, save, resume."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controllers import checkpoint as files
from controllers.config import read_config, write_config
from controllers.log import Log
from controllers.networks import make_network
from controllers.ranks import Ranks
from controllers.record import Record, plot_record, write_record
from controllers.settings import Training, check_resume, derive_seeds
from warp_phys import Diverged
from warp_phys.core.checks import check_flag, check_function
from warp_phys.errors import shown
from warp_phys.flow import MODIFIED, REGULAR, resolve
from warp_phys.interop.extras import require
from warp_phys.interop.torch import Report, Rollout, Update
from warp_phys.interop.torch.optimiser import clip_gradients, gradients_of

Stop = Callable[[], bool] | threading.Event


@dataclass
class Trained:
    """What a training leaves behind."""

    controller: torch.nn.Module
    """The controller as it is after the last update."""
    records: list[Record] = field(default_factory=list)
    """One record per finished epoch."""
    finished: bool = False
    """False where the training was stopped before its last epoch."""


def train(
    settings: Training,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Stop | None = None,
    progress: Callable[[Record], None] | None = None,
    log: Log | None = None,
    graph: bool = False,
) -> Trained:
    """Train a controller; on the CPU the same settings give the same bits, stopped and resumed or in one go.

    Files in `settings.out`: run.toml, checkpoint.pt and record.csv as it goes; controller.pt (the weights alone,
    for `load_state_dict`) and curves.png at its end. May be called from any thread.

    Args:
        settings: What to train, and how.
        resume: Continue the run in `settings.out`.
        overwrite: Replace the run in `settings.out`.
        stop: Asked before every minibatch, as an Event or a function; when it says yes, the state is saved, within the
            epoch if need be, and the training returns.
        progress: Called with every new record, such as `Progress(settings.epochs)`.
        log: Likewise, such as `TensorBoard(folder)`.
        graph: On a CPU, replay updates as graphs, for speed: the same bits. No other thread may launch Warp kernels
            during the first epoch that runs, or Warp would take them for a part of a graph.

    Raises:
        FileExistsError: `settings.out` holds a run, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: There is nothing to resume.
        TypeError, ValueError: An argument of another kind; the saved run had other settings.
        Diverged: A trajectory left the finite numbers; the last checkpoint, where there is one, is kept.
        RanksLost: Another process that takes part has ended; the last checkpoint is kept, and any number resumes.
        ImportError: The curves of a run with a folder need matplotlib.

    >>> trained = train(Training(epochs=2, train_states=8, test_states=8, steps=10, hidden=(8,), out=""))
    >>> [record.epoch for record in trained.records]
    [1, 2]
    """
    _check_arguments(settings, stop, progress, log, resume=resume, overwrite=overwrite, graph=graph)
    if settings.out:
        require("matplotlib", "plots")
    loop = Loop(settings, graph)
    folder = Path(settings.out) if settings.out else None
    if folder and resume:
        loop.restore(files.load_checkpoint(folder))
    elif folder:
        files.claim_folder(folder, overwrite and loop.ranks.leads)
    elif resume:
        raise ValueError("resume needs the folder of a run in out, got an empty out")
    # No process writes before all have seen the folder as it was.
    loop.ranks.wait()
    asked = stop.is_set if isinstance(stop, threading.Event) else stop or (lambda: False)
    if not loop.ranks.leads:
        folder, progress, log = None, None, None
    if folder:
        path = folder / files.CONFIG
        if not (resume and path.exists() and Training(**read_config(path)) == settings):  # its owner's words stay
            write_config(path, settings)
    try:
        finished = loop.run(asked, [tell for tell in (progress, log) if tell], folder)
    except Diverged as error:
        if folder:
            write_record(folder / files.RECORD, loop.records)
        # A training has no setting that masks samples, so its message names none.
        raise Diverged(error.step, error.samples) from error
    if folder:
        loop.save(folder)
        if finished:
            files.save_tensors(folder / files.CONTROLLER, loop.controller.state_dict())
        if loop.records:
            title = f"{settings.system}, {settings.flow} flow, seed {settings.seed}"
            plot_record(folder / files.CURVES, loop.records, title)
    # All come back to files that are complete.
    loop.ranks.wait()
    return Trained(loop.controller, loop.records, finished)


def _check_arguments(settings: Any, stop: Any, progress: Any, log: Any, **flags: Any) -> None:
    """Raise a TypeError for arguments of `train` that are of another kind."""
    if not isinstance(settings, Training):
        raise TypeError(f"settings must be a Training, got {shown(settings)}")
    for name, value in flags.items():
        check_flag(name, value)
    if not isinstance(stop, threading.Event):
        check_function("stop", stop, "no arguments")
    check_function("progress", progress, "a record")
    check_function("log", log, "a record")


class Loop:
    """The state of a training, and its steps; `train` is its public face."""

    def __init__(self, settings: Training, graph: bool = False) -> None:
        self.settings, self.ranks, self.seeds = settings, Ranks(), derive_seeds(settings.seed)
        self.ranks.check(settings.batch // settings.accumulate, settings.test_states)
        self.device = torch.device(settings.device)
        dtype = getattr(torch, settings.precision)
        self.system = settings.make_system()
        layers = settings.hidden, settings.activation, settings.init, self.seeds.weights
        sizes = len(settings.inputs), settings.memory
        network = make_network(settings.network, self.system, *layers, *sizes)
        self.controller = network.to(self.device, dtype)
        self.parameters = list(self.controller.parameters())
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=settings.rate, betas=settings.betas, eps=settings.epsilon, fused=True
        )
        self.rollout = Rollout(
            self.system,
            self.controller,
            steps=settings.steps,
            flow=resolve(settings.flow),
            device=settings.device,
            # In kernels from the first pass on, not after a few, so that a resumed run has the same bits.
            backend="fused" if self.device.type == "cpu" and any(sizes) else "auto",
            reduce=self.ranks.average if self.ranks.world > 1 else None,
            memory=settings.memory,
            inputs=len(settings.inputs),
        )
        clipping = settings.clip, settings.clip_at
        graph = graph and self.device.type == "cpu"
        self.step = Update(self.rollout, self.optimiser, settings.when, settings.control_cost, *clipping, graph=graph)
        self.train_states, self.test_states = (
            torch.as_tensor(self.system.sample(count, seed=seed, dtype=np.dtype(settings.precision))).to(self.device)
            for count, seed in (
                (settings.train_states, self.seeds.train_states),
                (settings.test_states, self.seeds.test_states),
            )
        )
        self.train_inputs = self.draw_inputs(settings.train_states, 0)
        self.test_inputs = self.draw_inputs(settings.test_states, 1)
        self.records: list[Record] = []
        self.report = Report()  # of the last update, all its parts
        self.minibatch = 0
        # Losses stay on the device until the epoch is over: reading one would wait for the device.
        self.losses = torch.zeros(settings.train_states // settings.batch, device=self.device, dtype=dtype)
        self.seconds = 0.0

    def run(self, stop: Callable[[], bool], told: Sequence[Log] | None, folder: Path | None) -> bool:
        """Train to the last epoch, or until asked to stop; returns whether the last epoch was reached."""
        start = time.perf_counter() - self.seconds
        while len(self.records) < self.settings.epochs:
            if not self.run_epoch(stop):
                self.seconds = time.perf_counter() - start
                self.ranks.sum(self.losses)
                return False
            train_loss = self.evaluate(self.train_states, self.train_inputs)
            test_loss = self.evaluate(self.test_states, self.test_inputs)
            self.seconds = time.perf_counter() - start
            self.records.append(self.make_record(train_loss, test_loss))
            self.minibatch = 0
            for tell in told or ():
                tell(self.records[-1])
            if folder and len(self.records) % self.settings.checkpoint_every == 0:
                self.save(folder)
        return True

    def run_epoch(self, stop: Callable[[], bool]) -> bool:
        """Go through the minibatches that are left of this epoch; returns False where asked to stop before its end."""
        if self.settings.schedule != "constant":  # else it stays what the optimiser has
            for group in self.optimiser.param_groups:
                group["lr"] = self.settings.rate_at(len(self.records))
        states = self.train_states[self.order()].unflatten(0, (-1, self.settings.batch))
        last = len(states) - 1
        # Both flows ride along in the sweep of one update per epoch, whatever the flow trained with.
        for observe, end in (((), last), ((MODIFIED, REGULAR), len(states))):
            self.rollout.observe = observe
            self.update(states[self.minibatch : end], lambda: self.ranks.any(stop(), self.device))
            if self.minibatch < end:
                return False
        self.rollout.observe = ()
        return True

    def order(self) -> torch.Tensor:
        """Order of the training states in this epoch, a function of seed and epoch: a resumed run needs no memory."""
        if not self.settings.shuffle:
            return torch.arange(self.settings.train_states)
        seed = np.random.SeedSequence([self.seeds.shuffle, len(self.records)])
        return torch.as_tensor(np.random.default_rng(seed).permutation(self.settings.train_states))

    def draw_inputs(self, samples: int, *key: int) -> torch.Tensor:
        """Inputs of some samples, shape (samples, steps, inputs), see `Training.draw_inputs`."""
        return torch.as_tensor(self.settings.draw_inputs(samples, *key)).to(self.train_states)

    def given(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """Inputs as a rollout is given them, the time before the samples; None where there are none."""
        return inputs.transpose(-3, -2) if self.settings.inputs else None

    def update(self, minibatches: torch.Tensor, stop: Callable[[], bool]) -> None:
        """Take steps for the next minibatches, shape (minibatches, batch, D), until `stop` says yes."""
        if len(minibatches) == 0:
            return
        epoch, size = len(self.records), minibatches.shape[1]
        drawn = [self.draw_inputs(size, epoch, self.minibatch + i) for i in range(len(minibatches))]
        if self.settings.accumulate == 1:
            given = self.given(self.ranks.share(torch.stack(drawn), dim=1))
            losses = self.step.minibatches(self.ranks.share(minibatches, dim=1), stop, inputs=given)
            self.losses[self.minibatch : self.minibatch + len(losses)] += losses * self.ranks.weight
            self.minibatch += len(losses)
            self.report = self.rollout.report
            return
        for states, inputs in zip(minibatches, drawn, strict=True):
            if stop():
                return
            self.accumulate(states, inputs)
            clip_gradients(gradients_of(self.parameters), self.settings.clip, self.settings.clip_at)
            self.optimiser.step()
            self.minibatch += 1

    def accumulate(self, states: torch.Tensor, inputs: torch.Tensor) -> None:
        """Leave the gradient of a minibatch that comes in parts."""
        self.optimiser.zero_grad(set_to_none=True)
        updates: Any = 0.0
        parts = (tensor.tensor_split(self.settings.accumulate) for tensor in (states, inputs))
        for part in zip(*parts, strict=True):
            rows, own_inputs = map(self.ranks.share, part)
            # Each part counts by its share of the minibatch's mean.
            loss = self.loss(rows, own_inputs) * (len(part[0]) / len(states))
            loss.backward()
            self.losses[self.minibatch] += loss.detach() * self.ranks.weight
            if self.rollout.observe:
                updates = updates + self.rollout.report.updates
        if self.rollout.observe:
            gradients = tuple(gradient.clone() for gradient in gradients_of(self.parameters))
            self.report = Report(self.rollout.report.flows, updates, gradients)

    def loss(self, initial_states: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Loss of the trajectories that the controller steers from here, under inputs (batch, steps, inputs)."""
        given, when, control_cost = self.given(inputs), self.settings.when, self.settings.control_cost
        states, controls, *_memory = self.rollout(initial_states, inputs=given)
        return self.system.loss(states, controls, when=when, control_cost=control_cost, inputs=given)

    @torch.no_grad()
    def evaluate(self, initial_states: torch.Tensor, inputs: torch.Tensor) -> float:
        """Mean loss over many states and their inputs, each rank taking its share of them."""
        total = self.loss(self.ranks.share(initial_states), self.ranks.share(inputs))
        self.ranks.average(total)
        return float(total)

    def make_record(self, train_loss: float, test_loss: float) -> Record:
        """The record of the epoch that was just done."""
        self.ranks.sum(self.losses)
        minibatch_loss = float(self.losses.mean())
        self.losses.zero_()
        report = self.report
        return Record(
            epoch=len(self.records) + 1,
            minibatch_loss=minibatch_loss,
            train_loss=train_loss,
            test_loss=test_loss,
            update_norm_squared=report.norm**2,
            cosine=float(report.cosine),
            agreement=float(report.agreement),
            rate=float(self.optimiser.param_groups[0]["lr"]),
            seconds=round(self.seconds, 3),
        )

    def save(self, folder: Path) -> None:
        """Write checkpoint and record; a checkpoint within an epoch knows the losses of the minibatches done."""
        content: dict[str, Any] = {
            "settings": asdict(self.settings),
            "weights": self.controller.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "update": self.step.state_dict(),
            "records": [tuple(record) for record in self.records],
            "minibatch": self.minibatch,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        files.save_checkpoint(folder, content)
        write_record(folder / files.RECORD, self.records)

    def restore(self, content: dict[str, Any]) -> None:
        """Take up a checkpoint, after checking that it belongs to these settings."""
        check_resume(content["settings"], self.settings)
        done = len(content["records"]) + (content["minibatch"] > 0)
        if done > self.settings.epochs:
            raise ValueError(f"epochs must be at least {done}, as the saved run has begun, got {self.settings.epochs}")
        try:
            self.controller.load_state_dict(content["weights"])
            self.optimiser.load_state_dict(content["optimiser"])
            if "update" in content:  # an earlier version had no flow with a memory
                self.step.load_state_dict(content["update"])
            self.records = [Record(*values) for values in content["records"]]
            self.minibatch, self.seconds = content["minibatch"], content["seconds"]
            if self.ranks.leads:
                self.losses.copy_(content["losses"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"out: the checkpoint does not fit its own settings: {' '.join(str(error).split())}"
            ) from None
