"""A whole update in one call: forward, loss, backward, combination, clipping and a step of Adam, without autograd."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from warp_phys.core.arrays import shape_message
from warp_phys.core.checks import check_flag, check_function, check_given, check_number
from warp_phys.errors import check_choice
from warp_phys.flow import Combined
from warp_phys.interop.torch.dense import is_finite
from warp_phys.interop.torch.direct import DirectPass
from warp_phys.interop.torch.graph import WholeUpdate, beside, key_of
from warp_phys.interop.torch.loss import refuse_inference
from warp_phys.interop.torch.memory import Memory, value_and_grad
from warp_phys.interop.torch.optimiser import (
    End,
    check_capturable,
    check_trains,
    clip_gradients,
    gradients_of,
    is_plain,
    memory_of,
    numbers_of,
    options_of,
    record_end,
)
from warp_phys.interop.torch.report import Report
from warp_phys.interop.torch.rollout import DIRECT_PASSES, Rollout
from warp_phys.interop.torch.rows import Beside
from warp_phys.programs.rules import RULES
from warp_phys.programs.update_kernels import CLIPPING, Clip
from warp_phys.systems.base import System
from warp_phys.systems.losses import When, check_loss

Start = tuple[torch.Tensor, Beside]
"""Initial states, inputs and memory."""


class Update:
    """A minibatch's update of a rollout's controller: `update(x0)` returns the loss and takes the optimiser's step.

    It does what `rollout.value_and_grad`, clipping and `optimiser.step()` do one after the other, and leaves what they
    leave: weights, the optimiser's state, the clipped update in the `.grad` of the parameters, `rollout.report`. Where
    the fused backend runs on a CPU, the flow's rule is one of the engine's and the optimiser is a plain `Adam` or
    `AdamW` over the controller's parameters, all of it is a handful of recorded launches, which read and write the
    optimiser's own tensors. Learning rates may change from call to call.

    With `graph` the recorded launches are one graph of Warp's. On CUDA it makes one graph of torch's of all that
    torch and Warp do, for any module and backend that does not wait for the device and has no hooks; the optimiser
    must be made with `fused=True, capturable=True`. The first call of a kind goes step by step, the second is captured,
    and again when anything but numbers in memory changes; give the learning rate as a tensor on the device if it
    changes often. The code of the module runs at the capture alone.

    A flow with a memory consults a running average over the updates made here: `state_dict` has it, for checkpoints.

    Two threads must not be in updates of one rollout at the same time. While a graph is captured on a CPU, no other
    thread may launch kernels there: Warp would take them for a part of it.

    Args:
        rollout: The rollout; its flow, steps and `observe` may change from call to call.
        optimiser: Any optimiser of the controller's parameters whose step needs no closure.
        when: "final", "every", or the chosen steps, see `System.loss`.
        control_cost: Factor of the mean squared control.
        clip: "none"; "value" clips each component of the update to [−clip_at, clip_at], "norm" the norm of all.
        clip_at: The limit.
        graph: Whether to replay graphs.
        parameters: Physical parameters by name, as for `Rollout.value_and_grad`; those that require gradients may be
            trained by the optimiser, too. With them the pass is a few recorded launches, its end step by step.

    Raises:
        TypeError, ValueError: Arguments that do not fit.

    >>> from warp_phys import CartPole
    >>> nn, system = torch.nn, CartPole(poles=1)
    >>> module = nn.Sequential(nn.Linear(system.state_size, 8), nn.Tanh(), nn.Linear(8, system.control_size))
    >>> update = Update(Rollout(system, module, steps=10), torch.optim.Adam(module.parameters()))
    >>> losses = [update(system.sample(4, seed=0)) for _ in range(2)]
    >>> bool(losses[1] < losses[0]), update.is_recorded
    (True, True)
    """

    def __init__(
        self,
        rollout: Rollout,
        optimiser: torch.optim.Optimizer,
        when: When = "final",
        control_cost: float = 0.0,
        clip: Clip = "none",
        clip_at: float = 1.0,
        graph: bool = False,
        parameters: Mapping[str, Any] | None = None,
    ):
        for name, value, kind in (("rollout", rollout, Rollout), ("optimiser", optimiser, torch.optim.Optimizer)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
        when = check_loss(rollout.system, when, rollout.steps, control_cost)
        check_number("clip_at", clip_at, positive=True)
        if parameters is not None:
            check_given(getattr(rollout.system, "parameter_names", ()), parameters)
        self.parameters = dict(parameters or {})
        check_trains(optimiser, [*rollout.trained.parameters(), *self.parameters.values()])
        self.rollout, self.optimiser = rollout, optimiser
        self._loss = when, float(control_cost)
        self._clipping = check_choice("clip", clip, tuple(CLIPPING)), float(clip_at)
        self._graph, self._memory = check_flag("graph", graph), Memory()
        self.is_recorded = False
        """Whether the last call ran as recorded launches, or replayed a graph."""
        if self._graph_of_torchs:
            check_capturable(optimiser)
            if self.parameters:
                raise ValueError("parameters cannot be given to an update that is a graph on CUDA: leave graph out")
        self._forget()

    def _forget(self) -> None:
        """Start with no memory of earlier calls."""
        self._stream: torch.cuda.Stream | None = None
        self._graphs: dict[tuple, WholeUpdate | None] = {}
        self._ends: weakref.WeakKeyDictionary[DirectPass, End] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory, so that copies and pickles are possible."""
        left_out = ("_stream", "_graphs", "_ends")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy."""
        vars(self).update(state)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what an update remembers besides the optimiser's state: the average of a flow with a memory."""
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            TypeError, ValueError: It returned something else.
        """
        self._memory.load_state_dict(state, self.rollout.trained)
        self._forget()

    def _mean(self) -> torch.Tensor | None:
        """Return the average where the flow has a memory, and a parameter is trained."""
        flow = self.rollout.flow
        if not isinstance(flow, Combined) or not flow.memory:
            return None
        return self._memory.mean(flow, self.rollout.trained)

    @property
    def when(self) -> str | tuple[int, ...]:
        """When the pointwise cost counts; for another loss make another update, which may share the optimiser."""
        return self._loss[0]

    @property
    def control_cost(self) -> float:
        """Factor of the mean squared control."""
        return self._loss[1]

    @property
    def clip(self) -> str:
        """How the update is clipped."""
        return self._clipping[0]

    @property
    def clip_at(self) -> float:
        """The limit of clipping."""
        return self._clipping[1]

    @property
    def _graph_of_torchs(self) -> bool:
        """Whether updates are CUDA graphs."""
        return self._graph and self.rollout.device.type == "cuda"

    def __call__(self, x0: Any, inputs: Any = None, memory: Any = None) -> torch.Tensor:
        """Take one step; return the loss before it, a tensor of no dimensions, detached.

        Args:
            x0: Initial states, shape (batch, D): torch, numpy or any DLPack array.
            inputs: What controller and system are given at every step, as for a call of the rollout.
            memory: What the controller remembers at first, likewise.

        Raises:
            TypeError, ValueError: As `Rollout.value_and_grad`.
            Diverged: A state is not finite, and the rollout's `on_divergence` is "raise"; no weight has changed.
            RuntimeError: In `torch.inference_mode`.
        """
        refuse_inference("an update")
        x0 = self.rollout.initial_states(x0, check_finite=False)  # a trajectory from elsewhere is not finite either
        loss = x0.new_empty(1)
        self._take_steps([(x0, self.rollout._given(x0, inputs, memory))], loss, _never)
        return loss[0]

    def minibatches(
        self, x0: Any, stop: Callable[[], bool] | None = None, inputs: Any = None, memory: Any = None
    ) -> torch.Tensor:
        """Take a step for each of several minibatches, as a call for each does; return the losses before each of them.

        Recorded launches follow each other with next to no Python in between, which makes small updates cheaper; the
        module, the optimiser and its numbers are looked at once, before the first. The report is that of the last step;
        where the step after it raises `Diverged`, only its norm is left.

        Args:
            x0: Initial states, shape (minibatches, batch, D): torch, numpy or any DLPack array.
            stop: Asked before each step; when it says yes, the steps that are left are not taken.
            inputs: As for a call, the same for all minibatches; or four dimensions, the minibatches first.
            memory: What the controller remembers at first, shape (batch, H) or (minibatches, batch, H); zeros if None.

        Returns:
            The losses of the steps taken, detached.

        Raises:
            TypeError, ValueError, RuntimeError: As a call, before the first step.
            Diverged: As a call; the steps before are taken.
        """
        refuse_inference("an update")
        check_function("stop", stop, "no arguments")
        x0 = self.rollout.as_tensor(x0)
        size = self.rollout.system.state_size
        if x0.ndim != 3 or 0 in x0.shape or x0.shape[2] != size:
            raise ValueError(shape_message("x0", ("minibatches", -1, size), x0.shape))
        self.rollout.initial_states(x0.flatten(0, 1), check_finite=False)
        if not is_finite(x0):
            bad = torch.nonzero(~torch.isfinite(x0).all(dim=2))[0].tolist()
            raise ValueError("x0 must be finite, minibatch {} is not, in row {}".format(*bad))
        losses = x0.new_empty(len(x0))
        return losses[: self._take_steps(self._with_given(x0, inputs, memory), losses, stop or _never)]

    def _with_given(self, x0: torch.Tensor, inputs: Any, memory: Any) -> list[Start]:
        """Return what each minibatch starts from, or raise an error that says what is wrong with it."""
        if inputs is None and memory is None:
            given = self.rollout._given(x0[0], None, None)
            return [(x, given) for x in x0.unbind()]
        parts: list[Sequence[Any]] = []
        for name, value, own in (("inputs", inputs, 4), ("memory", memory, 3)):
            tensor = None if value is None else self.rollout.as_tensor(value, name)
            if tensor is None or tensor.ndim != own:
                parts.append([tensor] * len(x0))
            elif len(tensor) != len(x0):
                raise ValueError(f"{name} must be for {len(x0)} minibatches, got {len(tensor)}")
            else:
                parts.append(tensor.unbind())
        return [(x, self.rollout._given(x, *own)) for x, *own in zip(x0.unbind(), *parts, strict=True)]

    def _take_steps(self, minibatches: Sequence[Start], losses: torch.Tensor, stop: Callable[[], bool]) -> int:
        """Take steps until `stop` says yes; write their losses, return their number."""
        if self._graph_of_torchs or self.rollout.reduce is not None or self.parameters:
            return self._take_each(minibatches, losses, stop)
        x0, beside = minibatches[0]
        if beside.requires_grad:
            return self._take_each(minibatches, losses, stop)
        direct = self.rollout.direct_pass(self.rollout.flow, len(x0), *self._loss)
        end = None if direct is None else self._end(direct)
        if direct is None or end is None:
            return self._take_each(minibatches, losses, stop)
        return self._launch(direct, end, minibatches, losses, stop)

    def _take_each(self, minibatches: Sequence[Start], losses: torch.Tensor, stop: Callable[[], bool]) -> int:
        """Take steps one by one: replays of a CUDA graph where there is one, else what autograd and torch do."""
        for i, (x0, given) in enumerate(minibatches):
            if stop():
                return i
            loss = self._replay(x0, given) if self._graph_of_torchs and self.rollout.reduce is None else None
            self.is_recorded = loss is not None
            losses[i] = self._step_by_step(x0, given) if loss is None else loss
        return len(minibatches)

    def _launch(
        self,
        direct: DirectPass,
        end: End,
        minibatches: Sequence[Start],
        losses: torch.Tensor,
        stop: Callable[[], bool],
    ) -> int:
        """Take steps by recorded launches, and step by step where a state is not finite: then nothing has changed."""
        values, room, update, done = losses.numpy(), None, direct.grad, None
        try:
            for i, (x0, given) in enumerate(minibatches):
                if stop():
                    return i
                with torch.no_grad():
                    if direct.updates is room:
                        direct.begin_again(x0, given)
                    else:  # the first step, or another pass has been in between
                        direct.begin(x0, given)
                        room, update = direct.updates, torch.empty_like(direct.grad)
                        end.aim(direct, update)
                    if self.rollout.is_tried(direct):  # before any weight moves
                        direct.launch()
                        if is_finite(direct.states):
                            self.rollout.try_out(direct)
                        direct.begin_again(x0, given)
                    end.run(direct)
                self.is_recorded = bool(end.status[0])
                if self.is_recorded:
                    values[i], done = end.loss[0], update
                    continue
                if done is not None:
                    self._conclude(direct, done)
                    self.rollout.report, done = Report(changes=(done,)), None  # of the flows nothing is left
                losses[i], room = self._step_by_step(x0, given), None
            return len(minibatches)
        finally:
            if done is not None:
                self._conclude(direct, done)

    def _conclude(self, direct: DirectPass, update: torch.Tensor) -> None:
        """Leave what the last of some recorded steps leaves."""
        self.rollout.report = direct.report(update)
        self._tell_torch((*direct.grads, *direct.moved))

    def _replay(self, x0: torch.Tensor, given: Beside) -> torch.Tensor | None:
        """Replay a CUDA graph; None as above."""
        check_capturable(self.optimiser)
        memory, known = memory_of(self.optimiser, self.rollout._adapter.trainable), key_of(self.rollout, len(x0))
        if not memory or known is None or not isinstance(self.rollout._inner, System) or given.requires_grad:
            return None
        mean = self._mean()
        shapes = tuple(None if tensor is None else tensor.shape for tensor in given)
        key = known, shapes, tuple(memory), options_of(self.optimiser), None if mean is None else mean.data_ptr()
        if key not in self._graphs:
            if len(self._graphs) >= DIRECT_PASSES:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = None
            return None  # step by step, which checks that the module repeats itself
        whole = self._graphs[key]
        if whole is None:
            whole = WholeUpdate(self.rollout, self.optimiser, len(x0), *self._loss, *self._clipping, mean, given)
            whole.capture(self._own_stream())
            self._graphs[key] = whole
        if not whole.replay(x0, given):
            return None
        self.rollout.report = whole.report()
        self._tell_torch((*whole.grads, *whole.trainable))
        return whole.loss.clone()

    def _tell_torch(self, changed: tuple[torch.Tensor, ...]) -> None:
        """Tell autograd what has been written to, and learning-rate schedulers that a step was taken."""
        torch.autograd.graph.increment_version(changed)
        self.optimiser._opt_called = True  # type: ignore[attr-defined]

    def _own_stream(self) -> torch.cuda.Stream:
        """Return the stream of captures; torch's nodes for gradients must have been made on it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.rollout.device)
        return self._stream

    def _step_by_step(self, x0: torch.Tensor, given: Beside) -> torch.Tensor:
        with beside(self._own_stream()) if self._graph_of_torchs else contextlib.nullcontext():
            loss = value_and_grad(self.rollout, self._mean(), x0, *self._loss, self.parameters, given)
            clip_gradients(gradients_of(self._clipped()), *self._clipping)
            self.optimiser.step()
        return loss

    def _clipped(self) -> Iterable[torch.Tensor]:
        """Return whose gradients are clipped: the controller's parameters, and what else the optimiser moves."""
        moved = (p for group in self.optimiser.param_groups for p in group["params"])
        return {id(p): p for p in (*self.rollout.trained.parameters(), *moved)}.values()

    def _end(self, direct: DirectPass) -> End | None:
        """Return the recorded end of an update with the optimiser's numbers as they are now, or None."""
        flow, mean = self.rollout.flow, self._mean()
        groups = numbers_of(self.optimiser)
        if groups is None or (isinstance(flow, Combined) and flow.rule not in RULES):
            return None
        memory = memory_of(self.optimiser, direct.trainable, direct.unused, make_state=True)
        if memory is None:
            return None
        end = self._ends.get(direct)
        if end is None or end.memory != memory or end.mean is not mean or len(end.groups) != len(groups):
            if not is_plain(self.optimiser, direct.moved):
                return None
            end = self._ends[direct] = record_end(direct, flow, mean, memory, groups, self._clipping, self._graph)
        if end.numbers != groups:
            end.groups[:] = groups
            end.numbers[:] = groups
        return end


def _never() -> bool:
    return False
