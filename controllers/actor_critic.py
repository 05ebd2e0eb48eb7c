"""A short-horizon actor-critic: an actor that learns through the physics, windows of time one after the other.

    python -m controllers.actor_critic --system cartpole --flow combined --out out/swing

A window of T steps is unrolled from where each environment stands. The actor's loss is the discounted cost of the
window and what a critic expects after its end,

    J = (1 − γ) Σ γⁿ k_n + γᵀ V(x_T),    k_n = cost(x_{n+1}) + control cost + entropy weight · log π(c_n),

differentiated along the flow of one's choice. R gives SHAC, M gives D.VA's rule, any other flow a method of its own;
with the entropy and a stochastic actor, R gives SAPO. Then the critic is fitted to TD(λ) targets, a target network
follows it, the statistics that normalise observations go on, and so does every environment, from where it ended.
Critics here are in costs per step: V is (1 − γ) times the discounted sum.

Sources: Xu et al., Accelerated policy learning with parallel differentiable simulation, ICLR 2022 (SHAC); Xing et al.,
Stabilizing reinforcement learning in differentiable multiphysics simulation, ICLR 2025 (SAPO).
"""

import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # importing torch takes seconds; until the program listens itself, Ctrl-C just ends it
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch

from controllers.checkpoint import CHECKPOINT, RECORD, atomic_write, load_tensors, save_tensors
from controllers.commandline import Parser, add_flags, stop_on_signals
from controllers.networks import MLP, WIDEST, check_network
from controllers.progress import Progress
from controllers.regression import Regression
from controllers.settings import check_device, check_setting, choices, make_system, parameters_of
from warp_phys import Diverged, quiet
from warp_phys.core.checks import check_flag, check_function, check_seed
from warp_phys.errors import check_count, shown
from warp_phys.flow import Combined, FlowLike, linear_parts, memory_in, resolve
from warp_phys.interop.torch import Rollout, Update, pointwise_cost
from warp_phys.interop.torch.combine import split
from warp_phys.interop.torch.memory import Memory, combine_remembering
from warp_phys.systems import SYSTEMS, System

Cost = Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""From the states after each step (T, B, D), the controls (T, B, K) and the randomised parameters, (B,) each, to costs
(T, B)."""
Reset = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""From the states at the end of a window (B, D), not a number where an environment diverged, ages in steps (B,) and a
seed to the states to go on from (B, D), and which of them are new (B,)."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training.

    Raises:
        ValueError, TypeError: A setting cannot be met; the message names it.

    >>> Settings(flow="M", actor="stochastic", entropy=0.01).flow
    'modified'
    """

    system: str = "cartpole"
    """Physical system, by name."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The system's own parameters, by name; what is not given keeps the system's default."""
    randomise: tuple[str, ...] = ()
    """Physical parameters that each environment draws anew with each episode, as name:least:most; the critic sees them,
    the actor does not."""
    observe: tuple[str, ...] = ()
    """Components of the state that the actor sees, by name without unit; none given: all. The critic sees all."""
    flow: str = "regular"
    """Gradient flow of the actor by name or letter: regular R (SHAC), modified M (D.VA), combined C, either, …"""
    actor: Literal["deterministic", "stochastic"] = "deterministic"
    """Whether the actor adds noise of a trained deviation before its controls are bounded."""
    entropy: float = 0.0
    """Weight of the entropy bonus of a stochastic actor, in the cost of a step (SAPO)."""
    memory: int = 0
    """Units of a gated recurrent cell that the actor remembers by; 0 for an actor without a memory."""
    bound: float = 10.0
    """Largest control, of either sign."""
    control_cost: float = 0.0
    """Weight of the mean squared control in the cost of a step."""
    state_cost: tuple[float, ...] = ()
    """Weights of the squares of the state's components, one for each, in the cost of a step; none given: all 0."""
    environments: int = 64
    """Environments side by side."""
    horizon: int = 32
    """Time steps of a window."""
    episode: int = 500
    """Time steps after which an environment begins anew, at the end of a window."""
    limits: tuple[float, ...] = ()
    """Largest magnitudes of the state's components, one for each: an environment beyond them begins anew at the end of
    the window; none given: no limits."""
    scatter: tuple[float, ...] = ()
    """Largest magnitudes of what is added to the components of a fresh state in training, one for each, drawn evenly:
    with π for an angle, episodes begin at any; none given: nothing. Episodes that are only played begin without it."""
    discount: float = 0.99
    """Discount γ of a step."""
    trace: float = 0.95
    """λ of the critic's targets: 0 looks one step ahead, 1 to the end of the window."""
    updates: int = 1000
    """Updates of the actor, one a window."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, of actor and critic."""
    activation: str = "silu"
    """Activation of the hidden layers: tanh, relu, elu, silu, sigmoid."""
    rate: float = 1e-2
    """Learning rate of the actor at first."""
    critic_rate: float = 1e-3
    """Learning rate of the critic at first."""
    schedule: Literal["constant", "linear"] = "linear"
    """Learning rates over the updates: constant, or linear, which falls to 0."""
    betas: tuple[float, float] = (0.7, 0.95)
    """Decays of Adam's two moments, of actor and critic."""
    clip: float = 1.0
    """Largest norm of the actor's update; 0 for none."""
    critic_epochs: int = 4
    """Times that the critic goes through the states of a window."""
    critic_minibatches: int = 4
    """Minibatches in each of these."""
    target_rate: float = 0.5
    """Share by which the target network comes nearer to the critic after a window."""
    deviation: float = 0.3
    """Deviation of a stochastic actor's noise at first, in units of half the bound's range."""
    precision: Literal["float32", "float64"] = "float32"
    """Precision of states and weights."""
    backend: Literal["auto", "fused", "general"] = "auto"
    """How rollouts run; auto: in kernels of their own on a CPU, step by step on CUDA."""
    seed: int = 0
    """One seed for weights, environments and noise."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    threads: int = 1
    """Threads of torch on the CPU, set by the command line program; 0 leaves torch's choice."""
    out: str = ""
    """Folder of the run's files; empty to write none."""
    checkpoint_every: int = 100
    """Updates between two checkpoints."""

    def __post_init__(self) -> None:
        """Check every setting; store names in full and the system's parameters complete."""
        set_field = object.__setattr__  # a frozen dataclass sets its own fields this way
        for name in ("hidden", "betas", "randomise", "observe", "state_cost", "limits", "scatter"):
            value = getattr(self, name)
            if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
                raise TypeError(f"{name} must be a sequence, got {value!r}; write ({value!r},)")
            set_field(self, name, tuple(value))
        self._check_numbers()
        for name, values in choices(Settings).items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {shown(value)}")
        if not isinstance(self.out, str):
            raise TypeError(f"out must be text, the name of a folder, got {shown(self.out)}")
        check_network(self.hidden, self.activation, "glorot")
        check_device(self.device)
        if self.entropy and self.actor != "stochastic":
            raise ValueError(f"entropy must be 0 for a deterministic actor, got {self.entropy!r}")
        if self.episode < self.horizon:
            raise ValueError(f"episode must be at least horizon ({self.horizon}), got {self.episode}")
        rows = self.environments * self.horizon
        if rows % self.critic_minibatches:
            raise ValueError(
                f"critic_minibatches must divide environments × horizon ({rows}), got {self.critic_minibatches}"
            )
        set_field(self, "flow", resolve(self.flow).name)
        system = self.make_system()
        set_field(self, "parameters", parameters_of(system))
        self.check_system(system)

    def _check_numbers(self) -> None:
        """Raise a TypeError or ValueError where a number is out of its bounds."""
        check_setting("memory", self.memory, int, at_least=0, below=WIDEST + 1)
        counts = ("environments", "horizon", "episode", "updates", "critic_epochs", "critic_minibatches")
        for name in (*counts, "checkpoint_every"):
            check_setting(name, getattr(self, name), int, at_least=1)
        check_seed(self.seed)
        check_setting("threads", self.threads, int, at_least=0)
        for name in ("bound", "rate", "critic_rate", "deviation"):
            check_setting(name, getattr(self, name), float, above=0)
        for name in ("entropy", "control_cost", "clip"):
            check_setting(name, getattr(self, name), float, at_least=0)
        check_setting("discount", self.discount, float, above=0, below=1)
        for name in ("trace", "target_rate"):
            check_setting(name, getattr(self, name), float, at_least=0)
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        if self.target_rate == 0:
            raise ValueError("target_rate must be above 0, or the target network would never move, got 0")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            check_setting("betas", beta, float, at_least=0, below=1)

    def check_system(self, system: Any) -> None:
        """Raise a TypeError or ValueError where an actor-critic with these settings cannot be trained on a system."""
        if not isinstance(system, System):
            raise TypeError(f"system must be a System, got {type(system).__name__}")
        if system.inputs:
            raise TypeError(
                f"system must have no inputs of its own, {type(system).__name__} has {', '.join(system.inputs)}: what "
                "differs from episode to episode can be a physical parameter that is randomised"
            )
        self.ranges(system)
        columns_of(system.states, self.observe)
        for name, least in (("state_cost", {"at_least": 0}), ("limits", {"above": 0}), ("scatter", {"at_least": 0})):
            numbers = getattr(self, name)
            if len(numbers) not in (0, system.state_size):
                raise ValueError(f"{name} must have a number for each of {', '.join(system.states)}, got {numbers!r}")
            for number in numbers:
                check_setting(name, number, float, **least)

    def make_system(self) -> System:
        """The system with its parameters."""
        return make_system(self.system, self.parameters)

    def ranges(self, system: System) -> dict[str, tuple[float, float]]:
        """Least and most of the physical parameters that are randomised, by name."""
        found: dict[str, tuple[float, float]] = {}
        for text in self.randomise:
            name, *numbers = str(text).split(":")
            try:
                least, most = map(float, numbers)
            except ValueError:
                raise ValueError(f"randomise must be of the form name:least:most, got {text!r}") from None
            if name not in system.parameter_names or name in found:
                known = ", ".join(system.parameter_names)
                raise ValueError(f"randomise must name each physical parameter once, of {known}, got {name!r}")
            if not (math.isfinite(least) and math.isfinite(most) and least <= most):
                raise ValueError(f"randomise needs finite numbers, the least first, got {text!r}")
            replace(system, **{name: least}), replace(system, **{name: most})  # which checks them
            found[name] = least, most
        return found

    def rate_at(self, update: int) -> float:
        """The factor of the learning rates for an update, the first one being 0.

        >>> [Settings(updates=4).rate_at(update) for update in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        """
        return 1.0 if self.schedule == "constant" else 1.0 - update / self.updates


FREE_ON_RESUME = ("device", "out", "checkpoint_every", "threads")
"""What a resumed run may change without becoming another one; updates, too, where the learning rates are constant."""


class Record(NamedTuple):
    """One update of a training."""

    update: int
    """Updates done so far, 1 after the first."""
    cost: float
    """Mean cost of a step in the window, without entropy."""
    value: float
    """Mean value of the states at the end of the window, a cost per step."""
    critic_loss: float
    """Mean squared error of the critic over the window's minibatches, before each of its steps."""
    entropy: float
    """Mean entropy of the actor, in units of the bound; nan for a deterministic one."""
    norm: float
    """Norm of the actor's update, before clipping."""
    seconds: float
    """Time spent in training so far [s], earlier parts of a resumed run included."""


def columns_of(names: Sequence[str], chosen: Sequence[str] = ()) -> tuple[list[int], list[int]]:
    """Return the columns that are seen as they are, and those that are angles, by names with and without units.

    Raises:
        ValueError: A name that is not there, or is there twice.

    >>> columns_of(("position [m]", "angle 1 [rad]", "rate 1 [rad/s]"), ("angle 1", "rate 1"))
    ([2], [1])
    """
    short = [name.partition(" [")[0] for name in names]
    for name in chosen:
        if name not in short or list(chosen).count(name) > 1:
            raise ValueError(f"observe must name each component once, of {', '.join(short)}, got {name!r}")
    seen = [i for i, name in enumerate(short) if not chosen or name in chosen]
    angles = [i for i in seen if names[i].endswith(" [rad]")]
    return [i for i in seen if i not in angles], angles


class Observer(torch.nn.Module):
    """What a network sees of rows: chosen columns, angles as sine and cosine, less their mean, by their deviation.

    Mean and deviation are buffers, running over the rows that `take_up` is given, so they are a part of the network: in
    its program, its copies, its checkpoints.

    Args:
        names: Names of the columns, with units.
        chosen: Names, without units, of those that are seen; all if there are none.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, names: Sequence[str], chosen: Sequence[str] = ()) -> None:
        super().__init__()
        self.plain, self.angles = columns_of(names, chosen)
        self.size = len(self.plain) + 2 * len(self.angles)
        self.register_buffer("mean", torch.zeros(self.size))
        self.register_buffer("variance", torch.zeros(self.size))
        self.register_buffer("deviation", torch.ones(self.size))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Observations (N, E) of rows (N, D)."""
        return (self.raw(rows) - self.mean) / self.deviation

    def raw(self, rows: torch.Tensor) -> torch.Tensor:
        """The same before it is normalised."""
        parts = [rows[:, self.plain]] if self.plain else []
        if self.angles:
            angles = rows[:, self.angles]
            parts += [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def take_up(self, rows: torch.Tensor, share: float) -> None:
        """Have rows (N, D) make up this share of mean and deviation; what is constant keeps the deviation 1."""
        raw = self.raw(rows).double()
        mean = raw.mean(dim=0)
        variance = (raw - mean).square_().mean(dim=0)
        shift = mean - self.mean
        self.variance.mul_(1 - share).add_(share * (variance + (1 - share) * shift.square()))
        self.mean.add_(share * shift)
        self.deviation.copy_(torch.where(self.variance > 1e-12, self.variance.sqrt(), 1.0))


class Actor(torch.nn.Module):
    """Controls bound · tanh(u), with u by a dense network of what is observed, and remembered.

    Called with (x), or with what its kind needs: noise w (B, K) and memory h (B, H), as a `Rollout` gives them. A
    stochastic actor puts u = mean + deviation · w, and the last number of its memory is log π of the control that it
    has just taken, in units of the bound: so the rollout differentiates the entropy along with everything else.

    Args:
        system: The system.
        settings: Those of the training.
        seed: Seed of the weights.
    """

    bound: torch.Tensor

    def __init__(self, system: System, settings: Settings, seed: int = 0) -> None:
        super().__init__()
        self.observer = Observer(system.states, settings.observe)
        size, self.units = self.observer.size + settings.memory, settings.memory
        sizes = SimpleNamespace(state_size=size, control_size=system.control_size)
        # no control at first: nothing runs away before anything is learnt
        self.network = MLP(sizes, settings.hidden, settings.activation, "zero-last", seed)
        if self.units:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                self.cell = torch.nn.GRUCell(self.observer.size, self.units)
        self.register_buffer("bound", torch.full((system.control_size,), float(settings.bound)))

    @property
    def memory(self) -> int:
        """Numbers H that it remembers."""
        return self.units

    def seen(self, x: torch.Tensor, h: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the network is given, and what the cell remembers."""
        observed = self.observer(x)
        if h is None:
            return observed, None
        h = self.cell(observed, h)
        return torch.cat([observed, h], dim=1), h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Controls (B, K) at states (B, D)."""
        return self.bound * torch.tanh(self.network(self.seen(x, None)[0]))


class RememberingActor(Actor):
    """A deterministic actor with a memory."""

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Controls (B, K), and what is remembered now (B, H)."""
        seen, h_next = self.seen(x, h)
        assert h_next is not None
        return self.bound * torch.tanh(self.network(seen)), h_next


class StochasticActor(Actor):
    """A stochastic actor, with a memory or without."""

    def __init__(self, system: System, settings: Settings, seed: int = 0) -> None:
        super().__init__(system, settings, seed)
        self.log_deviation = torch.nn.Parameter(torch.full((system.control_size,), math.log(settings.deviation)))

    @property
    def memory(self) -> int:
        """Numbers that it remembers, log π with them."""
        return self.units + 1

    def forward(self, x: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Controls (B, K), and what is remembered now (B, H)."""
        seen, h_next = self.seen(x, h[:, : self.units] if self.units else None)
        u = self.network(seen) + self.log_deviation.exp() * w
        # of a normal number, less the logarithm of the slope of tanh
        slope = 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u))
        normal = 0.5 * w.square() + self.log_deviation + 0.5 * math.log(2.0 * math.pi)
        log_density = -(normal + slope).sum(dim=1, keepdim=True)
        memory = log_density if h_next is None else torch.cat([h_next, log_density], dim=1)
        return self.bound * torch.tanh(u), memory


def make_actor(system: System, settings: Settings, seed: int = 0) -> Actor:
    """Return the actor of the settings' kind, in their precision and on their device."""
    kind = StochasticActor if settings.actor == "stochastic" else RememberingActor if settings.memory else Actor
    return kind(system, settings, seed).to(settings.device, getattr(torch, settings.precision))


def td_lambda(costs: torch.Tensor, values: torch.Tensor, discount: float, trace: float) -> torch.Tensor:
    """Return the TD(λ) targets of the states before each step, in costs per step, shape (T, B).

        G_n = (1 − γ) k_n + γ ((1 − λ) V_{n+1} + λ G_{n+1}),    G_T = V_T

    Args:
        costs: Cost k_n of each step, shape (T, B).
        values: Value V_{n+1} of the state after each step, shape (T, B).
        discount: γ.
        trace: λ.

    >>> td_lambda(torch.ones(2, 1), torch.zeros(2, 1), 0.5, 1.0).flatten()
    tensor([0.7500, 0.5000])
    """
    decay = discount * trace
    own = (1.0 - discount) * costs + discount * (1.0 - trace) * values
    own[-1] += decay * values[-1]
    return decays(decay, len(costs), costs.dtype, costs.device) @ own


@functools.lru_cache(maxsize=32)
def decays(decay: float, steps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the powers with which what follows counts, shape (steps, steps): decay^(m − n) for m ≥ n, else 0."""
    with torch.inference_mode(False):  # or autograd could not use them later
        n = torch.arange(steps, device=device)
        apart = n[None, :] - n[:, None]
        return torch.where(apart >= 0, decay ** apart.clamp(min=0).to(dtype), 0.0)


def begin_anew(system: System, episode: int, limits: Sequence[float] = (), scatter: Sequence[float] = ()) -> Reset:
    """Return the usual reset: what is of this age, beyond the limits or diverged starts from a sample of the system.

    Args:
        system: The system.
        episode: The age, in steps.
        limits: Largest magnitudes of the state's components; none if empty.
        scatter: Largest magnitudes of what is added to the components of a sample; nothing if empty.
    """
    return functools.partial(_anew, system, episode, tuple(limits), tuple(scatter))  # which can be pickled


def _anew(
    system: System,
    episode: int,
    limits: Sequence[float],
    scatter: Sequence[float],
    states: torch.Tensor,
    ages: torch.Tensor,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual reset."""
    anew = (ages >= episode) | ~states.isfinite().all(dim=1)
    if limits:
        anew |= (states.abs() > states.new_tensor(limits)).any(dim=1)
    if anew.any():
        fresh = system.sample(len(states), seed=seed, dtype=np.dtype(str(states.dtype).removeprefix("torch.")))
        if scatter:
            more = np.random.default_rng((seed, 1)).uniform(-1.0, 1.0, fresh.shape) * scatter
            fresh = fresh + more.astype(fresh.dtype)
        states = torch.where(anew[:, None], torch.as_tensor(fresh).to(states), states)
    return states, anew


class ActorCritic:
    """An actor, its critic, and the environments that they learn in.

    Args:
        settings: What to train, and how.
        system: A system of one's own, in place of the one that the settings name.
        flow: A flow without a name, in place of the settings'.
        cost: The cost of the steps, in place of the system's pointwise cost; the settings' costs are added to either.
        reset: Where environments go on after a window; see `begin_anew`, which is the default.
        graph: Whether the critic's updates are graphs, see `Update`: a little faster, but no other thread may launch
            kernels while the first one is captured.

    Raises:
        TypeError, ValueError: Arguments that do not fit.

    >>> learner = ActorCritic(Settings(environments=4, horizon=8, hidden=(8,), backend="general"))
    >>> [learner.step().update for _ in range(2)]
    [1, 2]
    """

    def __init__(
        self,
        settings: Settings,
        system: System | None = None,
        flow: FlowLike | None = None,
        cost: Cost | None = None,
        reset: Reset | None = None,
        graph: bool = False,
    ) -> None:
        if not isinstance(settings, Settings):
            raise TypeError(f"settings must be the Settings of an actor-critic, got {shown(settings)}")
        check_function("cost", cost, "states, controls and parameters")
        check_function("reset", reset, "states, ages and a seed")
        check_flag("graph", graph)
        self.settings = settings
        self.system = settings.make_system() if system is None else system
        settings.check_system(self.system)
        self.dtype, self.device = getattr(torch, settings.precision), torch.device(settings.device)
        self.ranges = settings.ranges(self.system)
        beginning = self.system, settings.episode, settings.limits
        self.cost, self.reset = cost, reset or begin_anew(*beginning, settings.scatter)
        self.played = reset or begin_anew(*beginning)  # episodes that are only played
        seeds = np.random.SeedSequence(settings.seed).generate_state(3).tolist()
        # On the CPU whatever the device is: a seed then means the same numbers everywhere.
        self.generator = torch.Generator().manual_seed(seeds[2])

        self.actor = make_actor(self.system, settings, seeds[0])
        self.trained = list(self.actor.parameters())
        self.actor_optimiser = torch.optim.Adam(self.trained, lr=settings.rate, betas=settings.betas, fused=True)
        backend = settings.backend
        if backend == "auto" and self.device.type == "cpu":
            backend = "fused"  # at once, so that a resumed run has the same bits
        self.flow = resolve(settings.flow if flow is None else flow)
        self.averages = Memory()  # of a flow that consults a running average of R
        linear = replace(self.flow, memory=0.0, either=False) if isinstance(self.flow, Combined) else self.flow
        self.inputs = self.system.control_size if settings.actor == "stochastic" else 0
        self.rollout = Rollout(
            self.system, self.actor, settings.horizon, linear, backend=backend, on_divergence="mask",
            memory=self.actor.memory, inputs=self.inputs,
        )  # fmt: skip

        names = (*self.system.states, *(f"{name} [1]" for name in self.ranges))
        self.observer = Observer(names).to(self.device, self.dtype)
        sizes = SimpleNamespace(state_size=self.observer.size, control_size=1)
        self.critic, self.target = (
            MLP(sizes, settings.hidden, settings.activation, seed=seeds[1]).to(self.device, self.dtype)
            for _ in range(2)
        )
        self.target.requires_grad_(False)
        self.critic_optimiser = torch.optim.Adam(
            self.critic.parameters(), lr=settings.critic_rate, betas=settings.betas
        )
        features = Regression(features=self.observer.size)
        fitted = Rollout(features, self.critic, 1, "regular", backend=backend, inputs=1)
        self.fit = Update(fitted, self.critic_optimiser, graph=graph and self.device.type == "cpu")

        self.states, self.ages = self.environments(settings.environments, self.reset)
        self.randomised = self.draw(settings.environments)
        self.memory = self.states.new_zeros((settings.environments, self.actor.memory))
        self.updates, self.seconds = 0, 0.0
        self.take_up(self.states[None])  # until the first window takes its place

    def environments(self, count: int, reset: Reset) -> tuple[torch.Tensor, torch.Tensor]:
        """Return fresh states and ages; ages anywhere in an episode, so that not all begin anew at once."""
        fresh, _ = self.after(
            reset,
            torch.full((count, self.system.state_size), math.nan, device=self.device, dtype=self.dtype),
            torch.full((count,), self.settings.episode, device=self.device),
            self.seed(),
        )
        ages = torch.randint(self.settings.episode, (count,), generator=self.generator).to(self.device)
        return fresh, ages

    @staticmethod
    def after(reset: Reset, states: torch.Tensor, ages: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a reset makes of states and ages, or raise a TypeError or ValueError if it is of no use."""
        given, shape = reset(states, ages, seed), tuple(states.shape)
        is_pair = isinstance(given, tuple | list) and len(given) == 2
        if not is_pair or not all(isinstance(part, torch.Tensor) for part in given):
            raise TypeError(f"reset must return two tensors, states and which of them are new, got {shown(given)}")
        fresh, anew = given
        if anew.dtype != torch.bool or anew.shape != ages.shape:
            kind = f"{anew.dtype} of shape {tuple(anew.shape)}"
            raise TypeError(
                f"reset must return which states are new as booleans of shape {tuple(ages.shape)}, got {kind}"
            )
        if fresh.shape != states.shape or fresh.dtype != states.dtype or not fresh.isfinite().all():
            raise ValueError(
                f"reset must return finite states of shape (environments, {shape[1]}), {states.dtype}, got shape "
                f"{tuple(fresh.shape)}, {fresh.dtype}; states that are not a number are those of environments that "
                "diverged, or have not begun: they must begin anew"
            )
        return fresh, anew

    def seed(self) -> int:
        """Draw a seed."""
        return int(torch.randint(2**31, (), generator=self.generator))

    def draw(self, count: int) -> dict[str, torch.Tensor]:
        """Draw the randomised parameters of so many environments."""
        drawn = {}
        for name, (least, most) in self.ranges.items():
            share = torch.rand(count, generator=self.generator, dtype=torch.float64)
            drawn[name] = (least + (most - least) * share).to(self.device, self.dtype)
        return drawn

    def noise(self, steps: int, count: int) -> torch.Tensor | None:
        """Draw the noise of a window, None for a deterministic actor."""
        if not self.inputs:
            return None
        shape = steps, count, self.inputs
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """What the critic sees of states (…, B, D), before it is observed: rows with the randomised parameters."""
        if self.randomised:
            beside = torch.stack(list(self.randomised.values()), dim=1)
            states = torch.cat([states, beside.expand(*states.shape[:-1], -1)], dim=-1)
        return states.flatten(0, -2)

    def take_up(self, states: torch.Tensor) -> None:
        """Have states (…, B, D) count in what normalises observations, as much as those of each window before."""
        share = 1.0 / (self.updates + 1)
        self.actor.observer.take_up(states.flatten(0, -2), share)
        self.observer.take_up(self.rows(states), share)

    def unroll(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Unroll a window: states (T + 1, B, D), controls (T, B, K), memories (T + 1, B, H) if there are some."""
        given: Any = {
            "parameters": self.randomised or None,
            "inputs": self.noise(self.settings.horizon, len(self.states)),
        }
        if not self.actor.memory:
            return (*self.rollout(self.states, **given), None)
        return self.rollout(self.states, **given, memory=self.memory)

    def costs(self, states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
        """Cost of each step, shape (T, B), without the entropy's share."""
        if self.cost is not None:
            costs = self.cost(states[1:], controls, self.randomised)
            if not isinstance(costs, torch.Tensor):
                raise TypeError(f"cost must return a tensor, got {shown(costs)}")
            if costs.shape != controls.shape[:2]:
                raise ValueError(f"cost must return shape {tuple(controls.shape[:2])}, got {tuple(costs.shape)}")
        else:
            costs = pointwise_cost(self.system, states, range(1, len(states)), self.randomised)
        if self.settings.state_cost:
            costs = costs + states[1:].square() @ states.new_tensor(self.settings.state_cost)
        if self.settings.control_cost:
            costs = costs + self.settings.control_cost * controls.square().mean(dim=2)
        return costs

    def step(self) -> Record:
        """Unroll a window, take a step with the actor and several with the critic; environments go on.

        Raises:
            Diverged: All environments have left the finite numbers.
        """
        start, settings, discount = time.perf_counter(), self.settings, self.settings.discount
        for optimiser, rate in ((self.actor_optimiser, settings.rate), (self.critic_optimiser, settings.critic_rate)):
            optimiser.param_groups[0]["lr"] = rate * settings.rate_at(self.updates)
        states, controls, memories = self.unroll()
        plain = costs = self.costs(states, controls)
        if settings.entropy:
            assert memories is not None
            costs = costs + settings.entropy * memories[1:, :, -1]
        powers = decays(discount, len(costs), self.dtype, self.device)[0]
        end = self.target(self.observer(self.rows(states[-1])))
        loss = (1.0 - discount) * (powers @ costs).mean() + discount ** len(costs) * end.mean()
        self.actor_optimiser.zero_grad()
        loss.backward()
        diverged = list(self.rollout.report.diverged)
        norm = self.finish_update()
        self.actor_optimiser.step()

        with torch.no_grad():
            features = self.observer(self.rows(states))
            values = self.target(features).view(states.shape[:2])
            targets = td_lambda(costs.detach(), values[1:], discount, settings.trace)
            critic_loss = self.fit_critic(features[: targets.numel()], targets, diverged)
            for mine, its in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                mine.lerp_(its, settings.target_rate)
            self.take_up(states[1:])
            self.go_on(states[-1], None if memories is None else memories[-1], diverged)
        self.updates += 1
        self.seconds += time.perf_counter() - start
        entropy = math.nan if not self.inputs or memories is None else -float(memories[1:, :, -1].detach().mean())
        means = float(plain.detach().mean()), float(values[-1].mean())
        return Record(self.updates, *means, critic_loss, entropy, norm, round(self.seconds, 3))

    def finish_update(self) -> float:
        """Leave the clipped update in the actor's gradients; return its norm before clipping."""
        if memory_in(self.flow):
            assert isinstance(self.flow, Combined)
            report, mean = self.rollout.report, self.averages.mean(self.flow, self.actor)
            assert report.updates is not None and mean is not None
            base, other = (report.updates[report.flows.index(part)] for part in linear_parts(self.flow))
            update = combine_remembering(self.flow, base, other, mean)
            for parameter, part in zip(self.trained, split(update, self.trained), strict=True):
                parameter.grad = part.clone()
        return float(torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip or math.inf))

    def fit_critic(self, features: torch.Tensor, targets: torch.Tensor, diverged: Sequence[int]) -> float:
        """Fit the critic to the states of a window, but for those of environments that diverged; return its loss."""
        count, rows = targets.numel(), torch.arange(targets.numel())
        if diverged:
            left = torch.ones(targets.shape, dtype=torch.bool)
            left[:, list(diverged)] = False
            rows = rows[left.flatten()]
        size, order = count // self.settings.critic_minibatches, []
        for _ in range(self.settings.critic_epochs):
            drawn = rows[torch.randperm(len(rows), generator=self.generator)]
            order.append(drawn.repeat(-(-count // len(drawn)))[:count] if diverged else drawn)
        chosen = torch.cat(order).to(self.device)
        inputs = targets.flatten()[chosen].view(-1, 1, size, 1)
        return float(self.fit.minibatches(features[chosen].view(len(inputs), size, -1), inputs=inputs).mean())

    def go_on(self, states: torch.Tensor, memory: torch.Tensor | None, diverged: Sequence[int]) -> None:
        """Have each environment go on from where it ended, or begin anew."""
        states, count = states.clone(), len(states)
        states[list(diverged)] = math.nan
        self.states, anew = self.after(self.reset, states, self.ages + self.settings.horizon, self.seed())
        self.ages = torch.where(anew, 0, self.ages + self.settings.horizon)
        for name, drawn in self.draw(count).items():
            self.randomised[name] = torch.where(anew, drawn, self.randomised[name])
        if memory is not None:
            self.memory = torch.where(anew[:, None], 0.0, memory)

    @torch.no_grad()
    def evaluate(self, episodes: int = 256, steps: int = 0, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Play whole episodes without noise; return their states (T + 1, B, D) and the costs of their steps (T, B).

        The training does not notice.

        Args:
            episodes: How many.
            steps: How long; the settings' episode if 0.
            seed: Seed of initial states and randomised parameters.
        """
        check_count("episodes", episodes)
        seed = check_seed(seed)
        steps = check_count("steps", steps, 0) or self.settings.episode
        kept = self.generator, self.randomised, self.rollout.flow
        self.generator = torch.Generator().manual_seed(seed)
        try:
            x0, _ = self.environments(episodes, self.played)
            self.randomised = self.draw(episodes)
            given: dict[str, Any] = {"parameters": self.randomised or None}
            if self.inputs:
                given["inputs"] = x0.new_zeros((steps, 1, self.inputs))
            self.rollout.flow = "stopped"  # gates of single steps would not fit
            self.rollout.steps = steps
            states, controls, *_ = self.rollout(x0, **given)
            return states, self.costs(states, controls)
        finally:
            self.rollout.steps = self.settings.horizon
            self.generator, self.randomised, self.rollout.flow = kept

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs to have the bits of an uninterrupted one."""
        return {
            "settings": asdict(self.settings),
            **{name: getattr(self, name).state_dict() for name in self._parts},
            **{name: getattr(self, name) for name in ("states", "ages", "randomised", "memory", "updates", "seconds")},
            "averages": self.averages.state_dict(),
            "generator": self.generator.get_state(),
        }

    _parts = ("actor", "critic", "target", "observer", "actor_optimiser", "critic_optimiser")

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: It returned something else, or for other settings.
        """
        missing = {*self._parts, "settings", "averages", "states", "updates", "generator"} - saved.keys()
        if missing:
            raise ValueError(f"this is no state of an actor-critic: it lacks {', '.join(sorted(missing))}")
        check_resume(saved["settings"], self.settings)
        for name in self._parts:
            getattr(self, name).load_state_dict(saved[name])
        self.averages.load_state_dict(saved["averages"], self.actor)
        for name in ("states", "ages", "memory"):
            setattr(self, name, saved[name].to(self.device))
        self.randomised = {name: value.to(self.device) for name, value in saved["randomised"].items()}
        self.updates, self.seconds = saved["updates"], saved["seconds"]
        self.generator.set_state(saved["generator"])


def check_resume(saved: Mapping[str, Any], settings: Settings) -> None:
    """Raise a ValueError where `settings` would make the saved run another run."""
    free = (*FREE_ON_RESUME, *(["updates"] if settings.schedule == "constant" else []))
    wanted = asdict(settings)
    # A setting that the saved run lacks came later, and its default is what was there before.
    saved = asdict(Settings()) | dict(saved)
    names = [name for name in wanted if name not in free and saved[name] != wanted[name]]
    if names:
        differences = "; ".join(f"{name} was {saved[name]!r}, is {wanted[name]!r}" for name in names)
        raise ValueError(f"a resumed run keeps its settings (only {', '.join(free)} may change), but {differences}")


ACTOR = "actor.pt"
VERSION = 2
"""Of the checkpoints that are written. 1 had no "version"; it can be read."""
KINDS = {"settings": dict, "averages": dict, "states": torch.Tensor, "updates": int, "generator": torch.Tensor}
"""What a checkpoint holds, besides weights and optimisers."""


def learn(
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] | threading.Event | None = None,
    progress: Callable[[Record], None] | None = None,
    **own: Any,
) -> ActorCritic:
    """Train to the last update, or until asked to stop; on a CPU the same settings give the same bits, however resumed.

    Files in `settings.out`, if that is not empty: checkpoint.pt and record.csv as it goes, actor.pt at the end.

    Args:
        settings: What to train, and how.
        resume: Continue the run in `settings.out`.
        overwrite: Replace the run in `settings.out`.
        stop: Asked before every update, as an Event or a function.
        progress: Called with every new record.
        **own: A system, flow, cost or reset of one's own, and whether to use graphs, for `ActorCritic`.

    Raises:
        FileExistsError: `settings.out` holds a run, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: There is nothing to resume.
        ValueError: The saved run had other settings.
        Diverged: All environments left the finite numbers; the last checkpoint, where there is one, is kept.
    """
    for name, flag in (("resume", resume), ("overwrite", overwrite)):
        check_flag(name, flag)
    if not isinstance(stop, threading.Event):
        check_function("stop", stop, "no arguments")
    check_function("progress", progress, "a record")
    learner, folder, records = ActorCritic(settings, **own), Path(settings.out), list[str]()
    if resume:
        try:
            learner.load_state_dict(load_checkpoint(folder))
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:  # what torch says of weights of others
            raise ValueError(f"out: {folder / CHECKPOINT} does not fit its own settings: {error}") from None
        records = (folder / RECORD).read_text(encoding="utf-8").splitlines()[1 : learner.updates + 1]
    elif settings.out:
        found = [name for name in (CHECKPOINT, RECORD, ACTOR) if (folder / name).exists()]
        if found and not overwrite:
            raise FileExistsError(
                f"out: {folder} already holds a run ({', '.join(found)}); "
                "resume it, overwrite it, or choose another out"
            )
        for name in found:  # nothing of another run stays beside this one
            (folder / name).unlink()

    def save() -> None:
        if not settings.out:
            return
        with atomic_write(folder / RECORD) as file:
            file.write(("\n".join([",".join(Record._fields), *records]) + "\n").encode())
        save_tensors(folder / CHECKPOINT, {**learner.state_dict(), "version": VERSION})

    asked = stop.is_set if isinstance(stop, threading.Event) else stop or (lambda: False)
    while learner.updates < settings.updates and not asked():
        record = learner.step()
        records.append(",".join(map(repr, record)))
        if progress:
            progress(record)
        if learner.updates % settings.checkpoint_every == 0:
            save()
    save()
    if settings.out and learner.updates >= settings.updates:
        save_tensors(folder / ACTOR, learner.actor.state_dict())
    return learner


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the checkpoint of a run; raise FileNotFoundError if there is none, ValueError for another file."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"out: {folder} holds no {CHECKPOINT}, so there is nothing to resume")
    content = load_tensors(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in KINDS.items()):
        raise ValueError(f"{path} is no checkpoint of an actor-critic")
    version = content.get("version", 1)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{path} is a checkpoint of version {shown(version)}, this program reads those up to {VERSION}: resume it "
            "with the program that wrote it, or a later one"
        )
    return content


def _words(record: Record) -> str:
    """What is shown of an update."""
    entropy = "" if math.isnan(record.entropy) else f", entropy {record.entropy:.2f}"
    return f"cost {record.cost:.3e}, value {record.value:.3e}{entropy}"


def parse(arguments: Sequence[str] | None) -> tuple[Settings, bool, bool]:
    """Read a command line: settings, whether to resume, whether to overwrite."""
    options: dict[str, Any] = {"prog": "python -m controllers.actor_critic", "allow_abbrev": False}
    first = Parser(add_help=False, **options)
    for name in ("--system", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    glance = first.parse_known_args(arguments)[0]
    try:
        saved = load_checkpoint(Path(glance.out or ""))["settings"] if glance.resume else {}
    except (OSError, ValueError) as error:
        first.error(str(error))
    name = glance.system or saved.get("system", Settings.system)
    if name not in SYSTEMS:
        first.error(f"system must be one of {', '.join(SYSTEMS)}, got {name!r}")
    parser = Parser(description=(__doc__ or "").partition("\n")[0], **options)
    add_flags(parser.add_argument_group("training"), Settings)
    taken = {entry.name for entry in fields(Settings)} | {"resume", "overwrite", "help"}
    own = add_flags(parser.add_argument_group(f"parameters of {name}"), SYSTEMS[name], taken=taken)
    parser.add_argument("--resume", action="store_true", help="Continue the run in out, with its settings.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the run in out.")
    given = vars(parser.parse_args(arguments))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    if resume and overwrite:
        parser.error("resume and overwrite exclude each other")
    kept = saved.get("parameters", {}) if saved.get("system") == name else {}
    given["parameters"] = kept | {field: given.pop(flag) for flag, field in own.items() if flag in given}
    try:
        return Settings(**saved | {"system": name} | given), resume, overwrite
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0 done, 1 diverged, 2 a mistake, 130 and 143 stopped by a signal."""
    settings, resume, overwrite = parse(arguments)
    try:
        quiet()
    except OSError as error:  # there is no place for kernels
        print(f"python -m controllers.actor_critic: error: {error}", file=sys.stderr)
        return 2
    if settings.threads:
        torch.set_num_threads(settings.threads)
    print("Preparing; the first run of a system compiles its kernels …", file=sys.stderr)
    with stop_on_signals() as (stop, received):
        try:
            progress = Progress(settings.updates, unit="update", words=_words)
            with closing(progress):
                learner = learn(settings, resume=resume, overwrite=overwrite, stop=stop, progress=progress, graph=True)
        except (OSError, ValueError) as error:
            print(f"python -m controllers.actor_critic: error: {error}", file=sys.stderr)
            return 2
        except Diverged as error:
            print(f"The training diverged: {error}.", file=sys.stderr)
            return 1
    if received:
        print(f"Stopped after {learner.updates} updates.", file=sys.stderr)
        return 128 + received[0]
    _, costs = learner.evaluate()
    last = costs[-max(1, len(costs) // 5) :]
    print(f"Cost of a step over {costs.shape[1]} episodes: {costs.mean():.4g}; in their last fifth: {last.mean():.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
