"""The two-parameter example: loss, updates, rotation and minima over the plane of θ.

    x_{n+1} = S(x_n, c_n),   c_n = N(x_n; θ) = θ1 x_n² + θ2 x_n,   L = ½ (x_T − target)²

Every θ is a sample with a controller of its own, and all samples run at once: one unrolling, one sweep of all flows
and one contraction, however many there are.

Source: Schnell & Thuerey, ICLR 2024, section 3.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import warp as wp

from warp_phys.core import kernels
from warp_phys.core.arrays import numpy_type, real_type
from warp_phys.core.checks import check_device
from warp_phys.diagnose import landscape_kernels, plane
from warp_phys.engine.phases import flow_gates
from warp_phys.errors import check_count
from warp_phys.flow import (
    Combined,
    Flow,
    FlowLike,
    combine,
    linear_parts,
    parts_of,
    refuse_memory,
    refuse_whole,
    resolve_all,
)
from warp_phys.systems.losses import chosen_array
from warp_phys.systems.polynomial import Polynomial


class Evaluation(NamedTuple):
    """What one pass over the plane finds at B points θ."""

    end: np.ndarray
    """Final states x_T, shape (B,)."""
    loss: np.ndarray
    """Losses ½ (x_T − target)², shape (B,)."""
    updates: np.ndarray
    """Updates of θ by the flows asked for, in their order, shape (flows, B, 2); descent goes along minus these."""


@dataclass(frozen=True)
class Landscape:
    """The plane of θ = (θ1, θ2) of the polynomial controller.

    What is differenced or searched for, `jacobian` and `minima`, is computed in float64 whatever `dtype` says.

    Raises:
        TypeError, ValueError: A system that is no `Polynomial`, a count below one, no floating-point type, no such
            device.

    >>> landscape = Landscape(device="cpu")
    >>> found = landscape.evaluate([[0.0, 0.0], [1.0, 0.5]], flows=("R", "M"))
    >>> found.loss.round(3), found.updates.shape
    (array([2.645, 3.052]), (2, 2, 2))
    """

    system: Polynomial = field(default_factory=Polynomial)
    """System with its initial state and its target."""
    steps: int = 4
    """Number of time steps T."""
    dtype: Any = np.float64
    """Precision, float32 or float64."""
    device: Any = None
    """Warp device; None is Warp's current one."""

    def __post_init__(self):
        if not isinstance(self.system, Polynomial):
            raise TypeError(f"system must be a Polynomial, got {self.system!r}")
        object.__setattr__(self, "steps", check_count("steps", self.steps))
        object.__setattr__(self, "dtype", numpy_type(real_type(self.dtype)))
        object.__setattr__(self, "device", str(check_device(self.device)))

    def evaluate(
        self,
        theta: Any,
        flows: FlowLike | Sequence[FlowLike] = ("R", "M", "S", "C"),
        parameters: Mapping[str, Any] | None = None,
    ) -> Evaluation:
        """Return final states, losses and the updates of flows at many points, in one batched pass.

        Args:
            theta: Points, shape (B, 2).
            flows: A flow or several, each a name, a letter, a `Flow`, or a `Combined` whose rule takes numpy arrays;
                none for states and losses alone.
            parameters: Physical parameters of the system, numbers or B numbers each; its own for the others.

        Returns:
            Arrays of the landscape's precision. Where an unrolling leaves the finite numbers they are not finite.

        Raises:
            TypeError, ValueError: `theta` has another shape or is not finite, a flow or a parameter is unknown or has
                another length.
        """
        return self._pass(plane.check_points("theta", theta), _flows(flows), parameters)

    def jacobian(
        self, theta: Any, flows: FlowLike | Sequence[FlowLike] = ("R", "M", "S", "C"), step: float = 1e-5
    ) -> np.ndarray:
        """Return the Jacobians of update fields by central differences: ∂u_i/∂θ_j, in one batched pass.

        `plane.rotation` and `plane.rotation_share` measure how far they are from those of a gradient. The Jacobian of a
        combined flow is nan where its update jumps to 0 or from 0 between the points of the difference.

        Args:
            theta: Points, shape (B, 2).
            flows: As in `evaluate`.
            step: Distance of the differences to either side.

        Returns:
            Shape (flows, B, 2, 2), float64.

        Raises:
            TypeError, ValueError: As in `evaluate`; a step that is not positive.
        """
        resolved = _flows(flows)
        double = replace(self, dtype=np.float64)

        def updates(points: np.ndarray) -> np.ndarray:
            return double._pass(points, resolved, None).updates

        cut = np.array([isinstance(flow, Combined) for flow in resolved])
        return plane.jacobian(updates, theta, step, cut)

    def minima(self, bounds: tuple[float, float] = (-4.0, 4.0), cells: int = 400) -> np.ndarray:
        """Return the curves x_T(θ) = target on the square bounds × bounds, where the loss is 0.

        Args:
            bounds: Least and largest θ1 and θ2.
            cells: Squares along each axis in which to look; see `plane.zero_curves`.

        Returns:
            Segments whose ends lie on the curves to rounding, shape (segments, 2, 2): segment, end, (θ1, θ2); float64.

        Raises:
            TypeError, ValueError: `bounds` do not ascend, `cells` is no positive integer.
        """
        double = replace(self, dtype=np.float64)
        target = self.system.target
        return plane.zero_curves(lambda theta: double._pass(theta, (), None).end - target, bounds, cells)

    def _pass(
        self, points: np.ndarray, flows: Sequence[Flow | Combined], parameters: Mapping[str, Any] | None
    ) -> Evaluation:
        """Unroll, sweep all plain flows in one launch, contract; then combine."""
        plain = parts_of(flows)
        gates = flow_gates(plain, self.steps) if plain else np.empty((0, self.steps, 2))
        end, loss, updates = _run(self, points, gates, parameters)
        found = dict(zip(plain, updates, strict=True))
        out = np.empty((len(flows), *points.shape), dtype=self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # an update that overflowed makes a nan where it must
            for i, flow in enumerate(flows):
                parts = [found[part] for part in linear_parts(flow)]
                out[i] = combine(flow, parts)
        return Evaluation(end, loss, out)


def _flows(flows: FlowLike | Sequence[FlowLike]) -> tuple[Flow | Combined, ...]:
    """Return the flows asked for as values."""
    resolved = resolve_all(flows)
    refuse_memory(*resolved)
    refuse_whole("a landscape has two numbers at each of its points", *resolved)
    return resolved


def _run(
    landscape: Landscape, points: np.ndarray, gates: np.ndarray, parameters: Mapping[str, Any] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return final states (B,), losses (B,) and updates (plain flows, B, 2); gates (plain flows, steps, 2)."""
    system, structure, steps = landscape.system, landscape.system.structure, landscape.steps
    real, device, batch = real_type(landscape.dtype), landscape.device, len(points)
    launch = functools.partial(wp.launch, device=device, record_tape=False)
    zeros = functools.partial(wp.zeros, dtype=real, device=device)
    with np.errstate(over="ignore"):
        theta = wp.array(points.astype(landscape.dtype), dtype=real, device=device)
    p = system.check_parameters(system.parameter_array(parameters, device, real), theta, batch)

    states, controls, jacobian = zeros((steps + 1, batch, 1)), zeros((steps, batch, 1)), zeros((steps, batch, 1, 1))
    kernel = landscape_kernels.unroll_kernel(structure, real)
    launch(kernel, dim=batch, inputs=[theta, p], outputs=[states, controls, jacobian])

    final, costs = chosen_array((steps,), device), zeros((1, batch))
    launch(kernels.cost_kernel(structure, real), dim=(1, batch), inputs=[states, final, p], outputs=[costs])
    updates = zeros((len(gates), batch, 2))
    if len(gates):
        # every sample's loss is its own: ∂L/∂x_T is the derivative of its cost, all others are 0
        no_structs = functools.partial(wp.empty, dtype=p.dtype, device=device)
        ones, seeds = wp.full((1, batch), 1.0, dtype=real, device=device), zeros(states.shape)
        kernel = kernels.cost_vjp_kernel(structure, real)
        launch(kernel, dim=(1, batch), inputs=[states, final, p, ones], outputs=[seeds, no_structs((0, 0))])
        lam = zeros((len(gates), batch, 1))
        for f in range(len(gates)):
            wp.copy(lam[f], seeds[steps])
        mu, no_inputs = zeros((len(gates), *controls.shape)), zeros((0, 0, 0, 0))
        gates_array = wp.array(gates.astype(landscape.dtype), dtype=real, device=device)
        inputs = [states, controls, p, jacobian, seeds, zeros(controls.shape), gates_array, 0, steps, lam]
        kernel = kernels.sweep_kernel(structure, real)
        launch(kernel, dim=(len(gates), batch), inputs=inputs, outputs=[mu, no_structs((0, 0, 0)), no_inputs])
        kernel = landscape_kernels.contract_kernel(real)
        launch(kernel, dim=(len(gates), batch), inputs=[states, mu], outputs=[updates])
    return states.numpy()[steps, :, 0], costs.numpy()[0], updates.numpy()
