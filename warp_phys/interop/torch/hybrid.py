"""A system with a torch module in its physics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import warp as wp

from warp_phys.core.arrays import check_array, shape_message
from warp_phys.core.checks import check_instance
from warp_phys.core.gate import active_tape
from warp_phys.interop.torch.dense import as_array
from warp_phys.interop.torch.rows import takes_inputs
from warp_phys.interop.torch.system import on_stream_of
from warp_phys.systems.base import Parameters, System
from warp_phys.systems.hybrid import HybridRows, given_size


class Network(torch.nn.Module):
    """The module of a `Hybrid`, called with states and controls, held to what it has to return.

    Args:
        module: Maps rows [x | c], or x and c, to rows of `size` numbers.
        size: How many it gives.
    """

    def __init__(self, module: torch.nn.Module, size: int):
        super().__init__()
        self.module, self.size, self.takes_both = module, size, takes_inputs(module, 0)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return what the module gives at x (N, D) and c (N, K)."""
        try:
            r = self.module(x, c) if self.takes_both else self.module(torch.cat([x, c], dim=1))
        except RuntimeError as error:
            if any(word in str(error) for word in ("shape", "size", "dimension")):
                shapes = f"{tuple(x.shape)} and controls of shape {tuple(c.shape)}"
                raise ValueError(f"the module of a Hybrid fails at states of shape {shapes}: {error}") from error
            raise
        if not isinstance(r, torch.Tensor):
            raise TypeError(f"the module of a Hybrid must return a torch.Tensor, got {type(r).__name__}")
        if r.shape != (len(x), self.size):
            raise ValueError(shape_message("what the module of a Hybrid returns", ("batch", self.size), r.shape))
        if r.dtype != x.dtype:
            raise TypeError(f"what the module of a Hybrid returns must hold {x.dtype} as the states do, got {r.dtype}")
        return r


class Hybrid:
    """A system with a torch module in its physics: what its equations leave out is learned.

    What the module gives at x_n and c_n, r(x_n, c_n), comes in in one of four ways:

        gives="residual"           x_{n+1} = S(x_n, c_n; p) + r          D numbers, in units of the state
        gives="controls"           x_{n+1} = S(x_n, c_n + r; p)          K numbers: forces where the controls act
        gives="inputs"             x_{n+1} = S(x_n, c_n, r; p)           for a system that declares inputs, E numbers:
                                                                         forces in its rate of change
        gives=("drag", …)          x_{n+1} = S(x_n, c_n; p + r)          numbers added to these physical parameters,
                                                                         whose ranges are not watched

    A module whose numbers are zero leaves the system as it is. A torch `Rollout` and `trajectory` train the module's
    parameters, as they train a controller's: together with one, or alone, and with physical parameters. The module is
    read as a row program, so that network, physics and controller run in one kernel where a rollout without it would.

    The module belongs to the physics. What it feeds back to the state, (∂r/∂x)ᵀ, goes through a flow's gate α, as
    (∂S/∂x)ᵀ does; only what goes on from the controls to the state through the controller goes through β. So the flow M
    has the whole feedback of the module, and its update of the module's parameters is Σ_n (∂r/∂θ)ᵀ of the adjoint that
    comes back to r, that of the simulator's path alone. A flow with a limit is refused.

    It is a `Simulator` of its own: `step` and `step_vjp` run step by step anywhere, for `audit` or a rollout in pure
    Warp, where the module's weights are constant.

    Args:
        system: A `System`; its physical parameters, cost and initial states are those of the hybrid.
        module: Maps rows [x | c], shape (B, D + K), to rows r; or x and c, where its forward needs two arguments. It
            goes row by row, the same way each time.
        gives: What r is.

    Raises:
        TypeError, ValueError: Arguments that do not fit; when it runs, a module that returns something else.

    >>> from warp_phys import CartPole
    >>> from warp_phys.interop.torch import Rollout
    >>> friction, policy = torch.nn.Linear(5, 1), torch.nn.Linear(4, 1)
    >>> hybrid = Hybrid(CartPole(), friction, gives="controls")
    >>> states, controls = Rollout(hybrid, policy, steps=10)(hybrid.sample(8))
    >>> hybrid.loss(states).backward()
    >>> friction.weight.grad.shape
    torch.Size([1, 5])
    """

    def __init__(self, system: System, module: torch.nn.Module, gives: str | Sequence[str] = "residual"):
        check_instance("system", system)
        if not isinstance(system, System):
            raise TypeError(
                f"system must be a warp_phys.System, got {type(system).__name__}: a TorchSystem may have a module in "
                "its function"
            )
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.system, self.module, self.gives = system, module, _checked(system, gives)
        self.rows = HybridRows(system, self.gives)
        """The system of rows that kernels know, see `warp_phys.systems.hybrid`."""
        self.network = Network(module, given_size(system, self.gives))
        """The module as a function of states and controls."""
        self.open_loops: dict[Any, Any] = {}
        """What `trajectory` keeps of it."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept, so that copies and pickles are possible."""
        return {**vars(self), "open_loops": {}}

    def __repr__(self) -> str:
        return f"Hybrid({self.system}, gives={self.gives!r})"

    def __getattr__(self, name: str) -> Any:
        """Return a physical parameter of the system."""
        if name.startswith("_") or name == "system" or name not in self.system.parameter_names:
            raise AttributeError(f"Hybrid has no {name}")
        return getattr(self.system, name)

    @property
    def state_size(self) -> int:
        """Number D of state components."""
        return self.system.state_size

    @property
    def control_size(self) -> int:
        """Number K of control components."""
        return self.system.control_size

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state components."""
        return self.system.states

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control components."""
        return self.system.controls

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the system's inputs, where they are not what the module gives."""
        return self.rows.inputs

    @property
    def input_size(self) -> int:
        """Number of these inputs."""
        return len(self.inputs)

    @property
    def cost_reads_inputs(self) -> bool:
        """Whether the pointwise cost takes inputs."""
        return self.system.cost_reads_inputs

    @property
    def time_average(self) -> bool:
        """As the system."""
        return self.system.time_average

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the physical parameters."""
        return self.system.parameter_names

    @property
    def dtype(self) -> Any:
        """Precision of the module's parameters, numpy's name; float64 if it has none."""
        first = next(self.module.parameters(), None)
        return np.float32 if first is not None and first.dtype == torch.float32 else np.float64

    @property
    def device(self) -> str:
        """Device of the module's parameters, "cpu" if it has none."""
        first = next(self.module.parameters(), None)
        return "cpu" if first is None else str(first.device)

    def sample(self, batch: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """Return random initial states of the system, shape (batch, D)."""
        return self.system.sample(batch, seed, dtype)

    def loss(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss of a trajectory, that of the system, see `System.loss`."""
        return self.system.loss(*arguments, **options)

    def picture(self, *arguments: Any, **options: Any) -> Any:
        """Return what the system looks like, see `System.picture`."""
        return self.system.picture(*arguments, **options)

    def sketch(self, axes: Any) -> Callable[..., Sequence[Any]]:
        """Draw the system, see `System.sketch`."""
        return self.system.sketch(axes)

    def range_of(self, name: str) -> str:
        """Return what a physical parameter must be, see `System.range_of`."""
        return self.system.range_of(name)

    def with_parameters(self, values: Mapping[str, float]) -> "Hybrid":
        """Return the same with other physical parameters, and this very module."""
        return Hybrid(self.system.with_parameters(values), self.module, self.gives)

    def parameter_array(self, values: Parameters | None = None, *arguments: Any, **options: Any) -> wp.array:
        """Return physical parameters for `step`, see `System.parameter_array`."""
        return self.system.parameter_array(values, *arguments, **options)

    def step(self, x: wp.array, c: wp.array, y: wp.array, parameters: wp.array | None = None) -> None:
        """Write y, the next states; x and y (batch, D), c (batch, K), `parameters` as in `System.step`.

        Raises:
            TypeError, ValueError: An array of another type, precision, shape or device.
            RuntimeError: A tape records, which would miss the module.
        """
        self._check(x, c, y, "y")
        tape = active_tape()
        if tape is not None and any(array.requires_grad for array in (x, c, y)):
            raise RuntimeError(
                "a wp.Tape cannot record the step of a Hybrid: use warp_phys.Rollout, which records whole rollouts, or "
                "call step_vjp"
            )
        with on_stream_of(x), torch.inference_mode(False), torch.no_grad():
            own_x, own_c = (wp.to_torch(array, requires_grad=False) for array in (x, c))
            z, u = torch.cat([own_x, own_x], dim=1), torch.cat([own_c, self.network(own_x, own_c)], dim=1)
            after = torch.empty_like(z)
            self.rows.step(as_array(z), as_array(u), as_array(after), parameters)
            wp.to_torch(y, requires_grad=False).copy_(after[:, : self.state_size])

    def step_vjp(
        self,
        x: wp.array,
        c: wp.array,
        adj_y: wp.array,
        adj_x: wp.array,
        adj_c: wp.array,
        parameters: wp.array | None = None,
        adj_parameters: wp.array | None = None,
    ) -> None:
        """Write the adjoints of states, controls and, if asked, physical parameters, as `System.step_vjp` does."""
        self._check(x, c, adj_y, "adj_y")
        check_array("adj_x", adj_x, x.shape, x)
        check_array("adj_c", adj_c, c.shape, x)
        size, controls = self.state_size, self.control_size
        with on_stream_of(x), torch.inference_mode(False), torch.enable_grad():
            own = [wp.to_torch(array, requires_grad=False).detach().requires_grad_() for array in (x, c)]
            r = self.network(*own)
            with torch.no_grad():
                z, u = torch.cat([own[0], own[0]], dim=1), torch.cat([own[1], r], dim=1)
                adj = torch.nn.functional.pad(wp.to_torch(adj_y, requires_grad=False), (0, size))
                adj_z, adj_u = torch.empty_like(z), torch.empty_like(u)
                at, back = (as_array(z), as_array(u), as_array(adj)), (as_array(adj_z), as_array(adj_u))
                self.rows.step_vjp(*at, *back, parameters=parameters, adj_parameters=adj_parameters)
            more: Sequence[torch.Tensor | None] = (None, None)
            if r.requires_grad:
                more = torch.autograd.grad(r, own, adj_u[:, controls:], allow_unused=True)
            direct = adj_z[:, :size], adj_u[:, :controls]
            for target, by_system, by_module in zip((adj_x, adj_c), direct, more, strict=True):
                total = by_system if by_module is None else by_system + by_module
                wp.to_torch(target, requires_grad=False).copy_(total)

    def _check(self, x: wp.array, c: wp.array, other: wp.array, name: str) -> None:
        if self.inputs:
            raise TypeError(
                f"{type(self.system).__name__} has inputs ({', '.join(self.inputs)}): unroll the Hybrid by a torch "
                "Rollout, rollout(x0, inputs=w)"
            )
        check_array("x", x, (-1, self.state_size), columns=", ".join(self.states))
        check_array("c", c, (len(x), self.control_size), x, ", ".join(self.controls))
        check_array(name, other, x.shape, x)
        own = next(self.module.parameters(), None)
        if own is not None and wp.dtype_from_torch(own.dtype) is not x.dtype:
            raise TypeError(f"x must hold {own.dtype} as the module does, got {x.dtype.__name__}")


def _checked(system: System, gives: str | Sequence[str]) -> str | tuple[str, ...]:
    """Return what a module gives, or raise an error that says what it may be."""
    if isinstance(gives, str) and gives in ("residual", "controls", "inputs") and gives not in system.parameter_names:
        if gives == "inputs" and not system.inputs:
            raise ValueError(f"gives must not be 'inputs': {type(system).__name__} declares none")
        if gives == "inputs" and system.cost_reads_inputs:
            raise ValueError(
                f"gives must not be 'inputs': the cost of {type(system).__name__} reads them, and a module gives them "
                "to the step alone"
            )
        return gives
    names = (gives,) if isinstance(gives, str) or not isinstance(gives, Sequence) else tuple(gives)
    unknown = [str(name) for name in names if name not in system.parameter_names]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            "gives must be 'residual', 'controls', 'inputs' or distinct names of physical parameters, among "
            f"{', '.join(system.parameter_names)}, got {gives!r}"
        )
    return names
