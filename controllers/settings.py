"""The settings of a training, declared once and checked in one place."""

import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch

from controllers.networks import WIDEST, check_kind, check_network
from controllers.signals import check_signals, draw_signals
from controllers.tracking import tracking
from warp_phys.core.checks import check_flag
from warp_phys.errors import MOST, shown
from warp_phys.flow import memory_in, resolve
from warp_phys.systems import SYSTEMS

# What a resumed run may change without becoming another run; epochs only where the learning rate does not know them.
FREE_ON_RESUME = ("epochs", "device", "out", "checkpoint_every", "threads")


@dataclass(frozen=True)
class Training:
    """Everything that decides a training; the defaults are the published ones.

    Raises:
        ValueError, TypeError: A setting cannot be met; the message names it.

    >>> Training(parameters={"poles": 4}, flow="C").flow
    'combined'
    """

    system: str = "cartpole"
    """Physical system, by name."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The system's own parameters, by name; what is not given keeps the system's default."""
    steps: int = 100
    """Time steps of one unrolling."""
    when: Literal["final", "every"] = "final"
    """Times at which the loss looks at the states: the last one, or every one."""
    control_cost: float = 0.0
    """Weight of the mean squared control in the loss."""
    flow: str = "combined"
    """Gradient flow by name or letter: regular R, modified M, stopped S, controller N, combined C; geometric and minmod
    combine M and R by other rules, averaged compares M with a running average of R, either with both."""
    network: Literal["auto", "dense", "grid-cnn", "gru"] = "auto"
    """Network: dense layers, convolutions over a grid, a gated recurrent unit (GRU) with dense layers behind it, or
    auto: the last where there is a memory, convolutions for a system on a grid, else dense layers."""
    memory: int = 0
    """Units of a gated recurrent unit by which the controller remembers; 0 for none."""
    inputs: tuple[str, ...] = ()
    """What the controller is given at every step besides the state, drawn anew for every sample: clock (from 0 to 1),
    noise (standard normal numbers), and one reference for the component track: sine (a wave of random phase), or steps
    (random levels)."""
    track: str = ""
    """Component of the state that shall follow the reference, by name without unit."""
    tracking_cost: float = 1.0
    """Weight of the squared distance from the reference, which the system's own cost is added to."""
    amplitude: float = 1.0
    """Amplitude of the reference, in units of the component."""
    period: int = 50
    """Time steps of a wave, or of one level, of the reference."""
    hidden: tuple[int, ...] = (100, 100)
    """Widths of the hidden layers of a dense network; none for a linear controller."""
    activation: str = "tanh"
    """Activation of the hidden layers: tanh, relu, elu, silu, sigmoid."""
    init: str = "glorot"
    """Start of the weights: glorot, zero-last (Glorot but the last weight zero), torch (torch's own)."""
    precision: Literal["float32", "float64"] = "float32"
    """Precision of states and weights."""
    epochs: int = 1000
    """Passes over the training states."""
    batch: int = 8
    """States in a minibatch; divides the number of training states."""
    accumulate: int = 1
    """Parts in which a minibatch is run, one after the other; the update is that of the whole, in less memory."""
    train_states: int = 256
    """Initial states to train on."""
    test_states: int = 256
    """Initial states to test on."""
    shuffle: bool = False
    """Draw a new order of the training states every epoch; as published the order is fixed."""
    rate: float = 1e-3
    """Learning rate of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the epochs: constant, or cosine, which falls to 0 over all epochs in half a wave."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of Adam's two moments."""
    epsilon: float = 1e-7
    """Term that keeps Adam's division finite."""
    clip: Literal["none", "value", "norm"] = "none"
    """Clipping of the update: none, each component (value), or the norm of the whole (norm)."""
    clip_at: float = 1.0
    """Largest component, or largest norm, that clipping leaves."""
    seed: int = 0
    """One seed for weights, training states, test states, shuffling and inputs."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    threads: int = 1
    """Threads of torch on the CPU, set by the command line program; 0 leaves torch's choice."""
    out: str = "out/run"
    """Folder of the run's files; empty to write none."""
    checkpoint_every: int = 20
    """Epochs between two checkpoints."""

    def __post_init__(self) -> None:
        """Check every setting; store names in full and the system's parameters complete."""
        for name in (
            "steps",
            "epochs",
            "batch",
            "accumulate",
            "train_states",
            "test_states",
            "checkpoint_every",
            "period",
        ):
            check_setting(name, getattr(self, name), int, at_least=1)
        for name in ("seed", "threads"):
            check_setting(name, getattr(self, name), int, at_least=0)
        check_setting("memory", self.memory, int, at_least=0, below=WIDEST + 1)
        for name in ("rate", "epsilon", "clip_at", "amplitude"):
            check_setting(name, getattr(self, name), float, above=0)
        for name in ("control_cost", "tracking_cost"):
            check_setting(name, getattr(self, name), float, at_least=0)
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {shown(self.betas)}")
        for beta in self.betas:
            check_setting("betas", beta, float, at_least=0, below=1)
        for name, values in choices(Training).items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {shown(value)}")
        check_flag("shuffle", self.shuffle)
        if not isinstance(self.out, str):
            raise TypeError(f"out must be text, the name of a folder, got {shown(self.out)}")
        check_network(self.hidden, self.activation, self.init)
        check_signals(self.inputs, self.track)
        if self.train_states % self.batch:
            raise ValueError(f"batch must divide train_states ({self.train_states}), got {self.batch}")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate must be at most batch ({self.batch}), got {self.accumulate}")
        if self.accumulate > 1 and memory_in(resolve(self.flow)):
            raise ValueError(f"accumulate must be 1 with flow {self.flow!r}, which has a memory, got {self.accumulate}")
        check_device(self.device)
        # A frozen dataclass sets its own fields this way; equal settings then compare equal, however they were written.
        set_field = object.__setattr__
        set_field(self, "hidden", tuple(self.hidden))
        set_field(self, "betas", tuple(self.betas))
        set_field(self, "inputs", tuple(self.inputs))
        set_field(self, "flow", resolve(self.flow).name)
        set_field(self, "parameters", parameters_of(make_system(self.system, self.parameters)))
        check_kind(self.network, self.make_system(), len(self.inputs), self.memory)

    def rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch, the first one being 0.

        >>> [round(Training(epochs=4, rate=1.0, schedule="cosine").rate_at(epoch), 3) for epoch in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        """
        if self.schedule == "constant":
            return self.rate
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))

    def make_system(self) -> Any:
        """The system with its parameters, and with a reference where it has one to follow."""
        system = make_system(self.system, self.parameters)
        return tracking(system, self.track, self.tracking_cost) if self.track else system

    def draw_inputs(self, samples: int, *key: int) -> np.ndarray:
        """The inputs of some samples, shape (samples, steps, inputs): a function of seed and key.

        A resumed run needs no memory of them. The key has one number for the states that are evaluated, training states
        0 and test states 1; two for those of a minibatch, its epoch and its place there.

        >>> Training(inputs=("noise",), steps=5).draw_inputs(3, 0).shape
        (3, 5, 1)
        """
        draw = np.random.default_rng(np.random.SeedSequence(derive_seeds(self.seed).inputs, spawn_key=key))
        return draw_signals(self.inputs, draw, samples, self.steps, self.amplitude, self.period)


def make_system(name: str, parameters: Mapping[str, Any]) -> Any:
    """Return a system by name, with some of its parameters; raise an error for an unknown name."""
    if not isinstance(name, str) or name not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {shown(name)}")
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a mapping of names to values, got {shown(parameters)}")
    kind = SYSTEMS[name]
    known = [entry.name for entry in fields(kind)]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{name} has no parameter {shown(parameter)}; its parameters are {', '.join(known)}")
    return kind(**parameters)


def parameters_of(system: Any) -> dict[str, Any]:
    """Return a system's parameters by name, as plain Python numbers: a checkpoint is loaded without running code."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in asdict(system).items()}


class Seeds(typing.NamedTuple):
    """One seed for each thing that is drawn; near seeds of a training share none of them."""

    weights: int
    train_states: int
    test_states: int
    shuffle: int
    inputs: int


def derive_seeds(seed: int) -> Seeds:
    """Derive all seeds of a training from its one seed, by numpy's `SeedSequence`.

    >>> derive_seeds(0)
    Seeds(weights=2968811710, train_states=3677149159, test_states=745650761, shuffle=2884920346, inputs=2642120001)
    """
    return Seeds(*map(int, np.random.SeedSequence(seed).generate_state(len(Seeds._fields))))


def choices(kind: type) -> dict[str, tuple[str, ...]]:
    """Settings that are one of a few words, and the words."""
    hints = typing.get_type_hints(kind)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}


def check_setting(
    name: str,
    value: Any,
    kind: type[int] | type[float],
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise TypeError or ValueError where a setting is not a finite number of its kind within its bounds.

    Integers, but for seeds, which others check, are counts: at most 2³¹ − 1.
    """
    if kind is int and name != "seed" and isinstance(value, int) and value > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {shown(value)}")
    bounds = [("at least", at_least), ("above", above), ("below", below)]
    wanted = " and ".join(f"{words} {bound:g}" for words, bound in bounds if math.isfinite(bound))
    wanted = f"{name} must be {'an integer' if kind is int else 'a number'} {wanted}, got {shown(value)}"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise TypeError(wanted)
    if not (-math.inf < value < math.inf and at_least <= value < below and above < value):
        raise ValueError(wanted)


def check_device(name: str) -> None:
    """Raise ValueError where there is no such device."""
    try:
        device = torch.device(name) if isinstance(name, str) else None
    except RuntimeError:
        device = None
    if device is None:
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, got {shown(name)}")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= present):
        found = ", ".join(["cpu", *(f"cuda:{index}" for index in range(present))])
        raise ValueError(f"device must be one that is present ({found}), got {name!r}")


def check_resume(saved: dict[str, Any], settings: Training) -> None:
    """Raise ValueError where `settings` would make the saved run another run."""
    wanted = asdict(settings)
    # A setting that the saved run lacks came later, and its default is what was there before.
    saved = {entry.name: entry.default for entry in fields(Training)} | saved
    free = [name for name in FREE_ON_RESUME if name != "epochs" or settings.schedule == "constant"]
    names = [name for name in wanted if name not in free and saved[name] != wanted[name]]
    if names:
        differences = "; ".join(f"{name} was {saved[name]!r}, is {wanted[name]!r}" for name in names)
        raise ValueError(f"a resumed run keeps its settings (only {', '.join(free)} may change), but {differences}")
