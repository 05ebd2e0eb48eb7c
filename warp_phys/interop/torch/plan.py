"""Controls that are planned: open loops optimised, many problems at once, and a controller that plans at every step."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from warp_phys.core.arrays import shape_message
from warp_phys.core.checks import check_function, check_instance, check_number, check_seed, numbers_of
from warp_phys.errors import Diverged, check_choice, check_count, shown
from warp_phys.interop.extras import require
from warp_phys.interop.torch.open_loop import finite_numbers, trajectory
from warp_phys.systems.base import System
from warp_phys.systems.losses import When, check_loss, pointwise_costs

Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Optimiser = Callable[[list[torch.Tensor]], torch.optim.Optimizer]

NUDGE = 0.1
"""Standard deviation of the first controls: where the gradient vanishes, at rest, something must begin."""
ARMIJO, CURVATURE, SHORTEST = 1e-4, 1e-10, 1e-8
"""The least share of the decrease that the slope promises, the least cosine of a pair, the least share of a step."""
CORRECTIONS = 20
"""Pairs of steps and changes of the gradient from which L-BFGS-B makes its Hessian."""
WORSE = 1e3
"""How much larger the loss counts where a state is not finite than at the last controls where all were."""


@dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    controls: torch.Tensor
    """Shape (steps, batch, K)."""
    states: torch.Tensor
    """Where they lead, shape (steps + 1, batch, D)."""
    loss: torch.Tensor
    """The loss of each problem, shape (batch,)."""
    evaluations: int
    """How often losses and gradients of all problems were computed."""
    converged: torch.Tensor
    """Whether the optimiser has come to its end with each problem, shape (batch,); never of torch's optimisers."""
    pairs: tuple[torch.Tensor, torch.Tensor] | None = None
    """What "L-BFGS" knows of the curvature: steps and changes of the gradient, shape (batch, pairs, steps · K) each."""

    def shifted(self) -> "Plan":
        """Return the plan as it looks one step later: where to begin then. Its last control is held."""
        size, pairs = self.controls.shape[2], None
        if self.pairs is not None:
            s, y = (torch.nn.functional.pad(part[..., size:], (0, size)) for part in self.pairs)
            pairs = s, y
        controls, states = (torch.cat([part[1:], part[-1:]]) for part in (self.controls, self.states))
        return replace(self, controls=controls, states=states, pairs=pairs)


def plan(
    system: System,
    x0: Any,
    steps: int,
    cost: Cost | None = None,
    when: When = "every",
    control_cost: float = 0.0,
    controls: Any | Plan = None,
    bounds: tuple[Any, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    inputs: torch.Tensor | None = None,
    optimiser: Optimiser | str = "L-BFGS",
    iterations: int = 300,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Plan:
    """Return controls that make the loss small from given initial states: an optimisation over an open loop.

    All problems are solved at once: one unrolling gives losses and gradients of all. "L-BFGS" is a projected one in
    torch, with a line search and a Hessian for each problem. "L-BFGS-B" is `scipy.optimize.minimize`, on the sum of all
    losses: for one problem, or few. A function makes one of torch's optimisers, which steps all controls together; what
    leaves the bounds is put back, and the best controls of each problem are kept. All numbers are float64.

    A minimum that is found is a local one: more problems with the same x0 and other first controls find others.

    Args:
        system: A `System`.
        x0: Initial states, shape (batch, D): torch or numpy.
        steps: Number of steps.
        cost: A function of states (steps + 1, batch, D) and controls (steps, batch, K), torch tensors attached to
            autograd, that returns a loss for each problem, shape (batch,); none may depend on another problem. The
            system's own loss if None.
        when: For the system's own loss, as in `System.loss`.
        control_cost: For the system's own loss, as in `System.loss`.
        controls: Where to begin, shape (steps, batch, K) or (steps, 1, K): a warm start. Or a `Plan` to go on with, of
            which "L-BFGS" takes what it knows of the curvature too. Nearly zero if None: where a system is at rest in
            an equilibrium the gradient may vanish at zero.
        bounds: Least and largest controls, a number or one for each component, shape (K,), each; infinite if there
            is none.
        parameters: As in `trajectory`.
        inputs: As in `trajectory`.
        optimiser: "L-BFGS", "L-BFGS-B", or a function that makes a torch optimiser of a list of tensors, such as
            `lambda leaves: torch.optim.Adam(leaves, 0.1)`.
        iterations: Iterations at most; of "L-BFGS" evaluations of all problems.
        tolerance: Either L-BFGS ends where no component of the gradient is larger, but for those that bounds hold.
        seed: Of the first controls, if none are given.

    Raises:
        ImportError: "L-BFGS-B" without scipy.
        TypeError, ValueError: Arguments that do not fit; a cost that returns something else.
        Diverged: A state is not finite with the first controls, or with those that a torch optimiser has made.

    >>> from warp_phys import CartPole
    >>> upright = CartPole(dt=0.02)
    >>> found = plan(upright, np.array([[0.0, 0.0, 0.3, 0.0]]), 40, when="final", bounds=(-10.0, 10.0))
    >>> found.controls.shape, bool(found.loss < 1e-6)
    (torch.Size([40, 1, 1]), True)
    """
    if not callable(optimiser):
        check_choice("optimiser", optimiser, ("L-BFGS", "L-BFGS-B"))
    if optimiser == "L-BFGS-B":
        require("scipy", "scipy")
    problem = _Problem(system, x0, steps, cost, when, control_cost, bounds, parameters, inputs)
    before = controls if isinstance(controls, Plan) else None
    start = problem.first(controls if before is None else before.controls, seed)
    iterations = check_count("iterations", iterations)
    check_number("tolerance", tolerance, least=0.0)
    if callable(optimiser):
        return _by_torch(problem, start, optimiser, iterations)
    if optimiser == "L-BFGS-B":
        return _by_scipy(problem, start, iterations, tolerance)
    pairs = None if before is None or before.controls.shape != start.shape else before.pairs
    return _by_lbfgs(problem, start, iterations, tolerance, pairs)


class RecedingHorizon:
    """A controller that plans anew at every step, and does the first control of its plan.

    Each plan begins with the one before, shifted by a step, and with what that one has learnt of the curvature. So few
    iterations do, but for the first plan; and whatever has moved the state in between is answered from where it is now.

    Args:
        system: A `System`: the model that it plans with, which need not be the one that it controls.
        steps: Steps that it looks ahead.
        iterations: Iterations of each plan after the first.
        first_iterations: Iterations of the first plan.
        **settings: What else `plan` takes, but controls.

    Raises:
        TypeError, ValueError: As `plan` raises them, in the first call.

    >>> from warp_phys import CartPole
    >>> controller = RecedingHorizon(CartPole(dt=0.02), steps=30, bounds=(-10.0, 10.0), control_cost=1e-4)
    >>> state = torch.tensor([[0.0, 0.0, 0.3, 0.0]], dtype=torch.float64)
    >>> controller(state).shape
    torch.Size([1, 1])
    """

    def __init__(
        self, system: System, steps: int, iterations: int = 10, first_iterations: int = 300, **settings: Any
    ) -> None:
        _check_names(settings)
        self.system, self.steps, self.settings = system, check_count("steps", steps), settings
        self.iterations = check_count("iterations", iterations)
        self.first_iterations = check_count("first_iterations", first_iterations)
        self.latest: Plan | None = None
        """The latest plan."""

    def reset(self) -> None:
        """Forget the plan: the next call makes a first one."""
        self.latest = None

    def __call__(self, state: Any, **settings: Any) -> torch.Tensor:
        """Return controls (batch, K) at states (batch, D).

        Args:
            state: torch or numpy.
            **settings: What differs in this call: `cost` or `inputs` of a reference that has moved on, for instance.

        Raises:
            TypeError, ValueError: As `plan` raises them.
        """
        _check_names(settings, (*_SETTINGS, "iterations", "controls"))
        state = finite_numbers("state", state)
        begin: dict[str, Any] = {"iterations": self.first_iterations}
        if self.latest is not None and self.latest.controls.shape[1:2] == state.shape[:1]:
            begin = {"iterations": self.iterations, "controls": self.latest.shifted()}
        self.latest = plan(self.system, state, self.steps, **{**begin, **self.settings, **settings})
        return self.latest.controls[0].clone()


_SETTINGS = (
    "cost", "when", "control_cost", "bounds", "parameters", "inputs", "optimiser", "tolerance", "seed",
)  # fmt: skip


def _check_names(settings: Mapping[str, Any], names: Sequence[str] = _SETTINGS) -> None:
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise TypeError(f"plan takes no {', '.join(unknown)} here; it takes {', '.join(names)}")


class _Problem:
    """Losses of open loops, one for each initial state."""

    def __init__(
        self, system: System, x0: Any, steps: int, cost: Cost | None, when: When, control_cost: float, bounds: Any,
        parameters: Mapping[str, Any] | None, inputs: Any,
    ):  # fmt: skip
        check_instance("system", system)
        if not isinstance(system, System):
            raise TypeError(f"system must be a warp_phys.System, got {type(system).__name__}")
        self.system, self.steps = system, check_count("steps", steps)
        self.x0 = finite_numbers("x0", x0)
        if self.x0.ndim != 2 or self.x0.shape[1] != system.state_size or len(self.x0) == 0:
            raise ValueError(shape_message("x0", (-1, system.state_size), self.x0.shape, ", ".join(system.states)))
        check_function("cost", cost, "states and controls")
        if cost is not None and (not isinstance(when, str) or when != "every" or control_cost != 0.0):
            raise ValueError("when and control_cost belong to the system's own loss: give them, or a cost")
        check_loss(system, when, self.steps, control_cost)
        self.parameters = {} if parameters is None else parameters
        self.inputs = None if inputs is None else finite_numbers("inputs", inputs).to(self.x0.device)
        self.shape = (self.steps, len(self.x0), system.control_size)
        self.low, self.high = _bounds(system, bounds)
        self.cost = cost or functools.partial(self._own, when, control_cost)
        self.evaluations = 0

    def _own(self, when: When, control_cost: float, states: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
        costs = pointwise_costs(self.system, states, when, self.parameters, self.inputs)
        loss = costs.mean(dim=0) if self.system.time_average else costs.sum(dim=0)
        return loss + control_cost * controls.square().mean(dim=(0, 2)) if control_cost else loss

    def first(self, controls: Any, seed: int) -> torch.Tensor:
        """Return the controls to begin with, within the bounds, shape (steps, batch, K)."""
        if controls is None:
            generator = torch.Generator().manual_seed(check_seed(seed))
            start = NUDGE * torch.randn((self.steps, 1, self.shape[2]), dtype=torch.float64, generator=generator)
        else:
            start = finite_numbers("controls", controls)
        if start.ndim != 3 or start.shape not in (self.shape, (self.steps, 1, self.shape[2])):
            raise ValueError(shape_message("controls", self.shape, start.shape, ", ".join(self.system.controls)))
        start = start.to(self.x0.device).expand(self.shape)
        return self.put_back(start.clone())

    def put_back(self, controls: torch.Tensor) -> torch.Tensor:
        """Return controls within the bounds."""
        low, high = (torch.from_numpy(end).to(controls) for end in (self.low, self.high))
        return torch.minimum(torch.maximum(controls, low), high)

    def losses(self, controls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states and the loss of each problem, attached to autograd."""
        self.evaluations += 1
        states = trajectory(self.system, self.x0, controls, self.parameters, self.inputs)
        losses = self.cost(states, controls)
        if not isinstance(losses, torch.Tensor) or losses.shape != (len(self.x0),):
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(f"cost must return a loss for each problem, shape ({len(self.x0)},), got {got}")
        return states, losses

    def evaluate(self, controls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return states, losses and gradients, attached to nothing."""
        with torch.enable_grad():
            leaf = controls.detach().requires_grad_()
            states, losses = self.losses(leaf)
            (gradient,) = torch.autograd.grad(losses.sum(), [leaf])
        return states.detach(), losses.detach(), gradient

    def finished(
        self, controls: torch.Tensor, converged: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Plan:
        """Return the plan of these controls."""
        with torch.no_grad():
            states, losses = self.losses(controls)
        return Plan(controls, states, losses, self.evaluations - 1, converged & losses.isfinite(), pairs)


def _bounds(system: System, bounds: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return least and largest controls, shape (K,) each."""
    try:
        ends = (-np.inf, np.inf) if bounds is None else bounds
        low, high = (numbers_of("bounds", end).astype(np.float64) for end in ends)
    except (TypeError, ValueError):
        raise TypeError(f"bounds must be least and largest controls, got {shown(bounds)}") from None
    for end in (low, high):
        if end.shape not in ((), (1,), (system.control_size,)):
            raise ValueError(shape_message("bounds", (system.control_size,), end.shape, ", ".join(system.controls)))
    if not (low < high).all():
        raise ValueError(f"bounds must be smaller and larger controls, got {shown(bounds)}")
    size = (system.control_size,)
    return np.broadcast_to(low, size).copy(), np.broadcast_to(high, size).copy()


def _by_scipy(problem: _Problem, start: torch.Tensor, iterations: int, tolerance: float) -> Plan:
    """Minimise the sum of all losses by scipy's L-BFGS-B."""
    from scipy.optimize import Bounds, minimize  # noqa: PLC0415

    ends = (np.broadcast_to(end, problem.shape).ravel() for end in (problem.low, problem.high))
    good: list[Any] = []

    def ask(flat: np.ndarray) -> tuple[float, np.ndarray]:
        controls = torch.from_numpy(flat.reshape(problem.shape)).to(start)
        try:
            _, losses, gradients = problem.evaluate(controls)
        except Diverged:
            if not good:
                raise
            return good[0] + WORSE * (1.0 + abs(good[0])), good[1]
        good[:] = [float(losses.sum()), gradients.cpu().numpy().ravel()]
        return good[0], good[1]

    options = {"maxiter": iterations, "maxfun": 10 * iterations, "gtol": tolerance, "ftol": 0.0, "maxcor": CORRECTIONS}
    flat = start.cpu().numpy().ravel()
    result = minimize(ask, flat, jac=True, bounds=Bounds(*ends), method="L-BFGS-B", options=options)
    converged = start.new_full(start.shape[1:2], result.status == 0, dtype=torch.bool)
    return problem.finished(torch.from_numpy(result.x.reshape(problem.shape)).to(start), converged)


def _by_lbfgs(
    problem: _Problem, start: torch.Tensor, iterations: int, tolerance: float,
    known: tuple[torch.Tensor, torch.Tensor] | None,
) -> Plan:  # fmt: skip
    """Minimise each problem by L-BFGS in the controls that no bound holds, all of them in step.

    Controls are rows here, (batch, steps · K). A line search goes back along the path that the bounds bend.
    """
    low, high = (torch.from_numpy(np.tile(end, problem.steps)).to(start) for end in (problem.low, problem.high))
    x = _rows(start)
    loss, g = _evaluate(problem, x, None)
    free, pairs, length = _free(x, g, low, high), _Pairs(x, known), torch.ones_like(loss)
    direction = pairs.direction(g, free)
    ended = (g * free).abs().amax(dim=1) <= tolerance
    for _ in range(iterations):
        if ended.all():
            break
        tried = torch.minimum(torch.maximum(x + length[:, None] * direction, low), high)
        tried = torch.where(ended[:, None], x, tried)
        lower, gradient = _evaluate(problem, tried, x)
        slope = (g * (tried - x)).sum(dim=1)
        good = ~ended & (lower <= loss + ARMIJO * slope) & (lower < loss)
        # no lower loss: pairs of elsewhere are to blame, or without any, rounding
        lost = ~ended & ~good & (length < SHORTEST)
        ended = ended | lost & ~pairs.any()
        pairs.add(tried - x, gradient - g, good)
        pairs.forget(lost)
        # the least of the parabola through what is known, within reason
        least = -slope / (2.0 * (lower - loss - slope)).clamp(min=1e-300)
        least = least.nan_to_num(nan=0.1).clamp(0.1, 0.5)
        loss = torch.where(good, lower, loss)
        x, g = (torch.where(good[:, None], new, old) for new, old in ((tried, x), (gradient, g)))
        free, anew = _free(x, g, low, high), good | lost
        ended = ended | ((g * free).abs().amax(dim=1) <= tolerance)
        direction = torch.where(anew[:, None], pairs.direction(g, free), direction)
        length = torch.where(anew, 1.0, length * least)
    return problem.finished(_controls(x, problem.shape), ended, (pairs.s, pairs.y))


def _free(x: torch.Tensor, g: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return which controls no bound holds."""
    return ~((x <= low) & (g > 0.0) | (x >= high) & (g < 0.0))


def _rows(controls: torch.Tensor) -> torch.Tensor:
    return controls.transpose(0, 1).flatten(1)


def _controls(rows: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    return rows.reshape(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()


def _evaluate(problem: _Problem, rows: torch.Tensor, instead: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses and gradients; infinite losses where a state is not finite, if there are controls instead."""
    rows, bad = rows.clone(), []
    while True:
        try:
            _, loss, gradient = problem.evaluate(_controls(rows, problem.shape))
        except Diverged as error:
            if instead is None:
                raise
            bad += error.samples
            rows[bad] = instead[bad]
            continue
        loss[bad] = torch.inf
        return loss, _rows(gradient)


class _Pairs:
    """The last steps s and changes of the gradient y of each problem, from which L-BFGS makes its Hessian."""

    def __init__(self, like: torch.Tensor, known: tuple[torch.Tensor, torch.Tensor] | None):
        if known is not None:
            self.s, self.y = known
            return
        self.s = self.y = like.new_zeros((len(like), 1, like.shape[1]))

    def any(self) -> torch.Tensor:
        """Whether a problem has some."""
        return self.s.any(dim=2).any(dim=1)

    def add(self, s: torch.Tensor, y: torch.Tensor, moved: torch.Tensor) -> None:
        """Keep a pair of each problem that has moved."""
        if self.s.shape[1] < CORRECTIONS:
            self.s, self.y = (torch.nn.functional.pad(pairs, (0, 0, 1, 0)) for pairs in (self.s, self.y))
        self.s, self.y = (
            torch.where(moved[:, None, None], torch.cat([pairs[:, 1:], new[:, None]], dim=1), pairs)
            for pairs, new in ((self.s, s), (self.y, y))
        )

    def forget(self, lost: torch.Tensor) -> None:
        """Drop those of some problems."""
        self.s, self.y = (pairs * ~lost[:, None, None] for pairs in (self.s, self.y))

    def direction(self, g: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """Return −H g in the free components, zero elsewhere.

        With R the upper triangle of S Yᵀ and D its diagonal, p = R⁻¹ S g, q = R⁻ᵀ ((D + γ Y Yᵀ) p − γ Y g):
        H g = γ g + Sᵀ q − γ Yᵀ p.

        Source: Byrd, Nocedal & Schnabel, Mathematical Programming 63, 1994.
        """
        g = g * free
        scale = 1.0 / g.norm(dim=1).clamp(min=1e-300)
        s, y = self.s * free[:, None], self.y * free[:, None]
        curvature = (s * y).sum(dim=2)
        fits = curvature > CURVATURE * s.norm(dim=2) * y.norm(dim=2)
        s, y = s * fits[..., None], y * fits[..., None]
        last = (fits * torch.arange(1, fits.shape[1] + 1, device=g.device)).argmax(dim=1, keepdim=True)
        newest = (curvature / (y * y).sum(dim=2).clamp(min=1e-300)).gather(1, last)[:, 0]
        scale = torch.where(fits.any(dim=1), newest, scale)[:, None]
        diagonal = torch.where(fits, curvature, 0.0)
        triangle = (s @ y.mT).triu() + torch.diag_embed(torch.where(fits, 0.0, 1.0))
        sg, yg = (s @ g[..., None]), (y @ g[..., None])
        p = torch.linalg.solve_triangular(triangle, sg, upper=True)
        inner = diagonal[..., None] * p + scale[..., None] * (y @ (y.mT @ p) - yg)
        q = torch.linalg.solve_triangular(triangle.mT, inner, upper=False)
        return -(scale * g + (s.mT @ q - scale[..., None] * (y.mT @ p))[..., 0])


def _by_torch(problem: _Problem, start: torch.Tensor, optimiser: Optimiser, iterations: int) -> Plan:
    """Minimise all problems together; the best controls of each are kept."""
    leaf = torch.nn.Parameter(start)
    stepper = optimiser([leaf])
    if not isinstance(stepper, torch.optim.Optimizer):
        raise TypeError(f"optimiser must make a torch.optim.Optimizer, got {type(stepper).__name__}")
    best, least = start.clone(), start.new_full((start.shape[1],), torch.inf)

    def closure() -> torch.Tensor:
        nonlocal best
        _, losses, leaf.grad = problem.evaluate(leaf)
        within = (leaf.detach() == problem.put_back(leaf.detach())).all(dim=2).all(dim=0)
        better = (losses < least) & within  # an optimiser may look at points that nothing has put back
        torch.where(better, losses, least, out=least)
        best = torch.where(better[:, None], leaf.detach(), best)
        return losses.sum()

    for _ in range(iterations):
        stepper.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            leaf.copy_(problem.put_back(leaf.detach()))
    with torch.no_grad():
        closure()
    return problem.finished(best, torch.zeros_like(least, dtype=torch.bool))
