"""How the gradient flows: what reaches every time step, on which path, how evenly, and why it explodes if it does.

The measures are functions of numpy arrays; a `Diagnosis` holds one rollout's, as arrays and as a table in words.
`docs/diagnostics.md` has the formulas. Adapters make a `Diagnosis`: `warp_phys.interop.torch.diagnose`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from warp_phys.diagnose import verdict
from warp_phys.diagnose.feedback import Feedback, StepJacobians
from warp_phys.diagnose.rotation import Rotation
from warp_phys.flow import Combined, Flow, linear_parts


class Spectra(NamedTuple):
    """Spectral radii ρ and largest singular values σ of the Jacobians of every step, each of shape (steps, samples)."""

    physics_radius: np.ndarray
    """ρ(∂S/∂x), at a fixed control."""
    physics_norm: np.ndarray
    """σ(∂S/∂x)."""
    controller_radius: np.ndarray
    """ρ((∂S/∂c) J), the controller's path alone."""
    controller_norm: np.ndarray
    """σ((∂S/∂c) J)."""
    closed_radius: np.ndarray
    """ρ(∂S/∂x + (∂S/∂c) J), both paths."""
    closed_norm: np.ndarray
    """σ(∂S/∂x + (∂S/∂c) J)."""
    physics_exponent: np.ndarray
    """Largest finite-time Lyapunov exponent per step of the physics alone, log σ(Π_n ∂S/∂x) / T; shape (samples,)."""
    closed_exponent: np.ndarray
    """The same with the controller in the loop; shape (samples,)."""


class Layer(NamedTuple):
    """M and R in one parameter of the controller."""

    name: str
    """Name of the parameter."""
    size: int
    """Number of components."""
    cosine: float
    """Cosine between M and R; nan if one of them is zero."""
    agreement: float
    """Share of components on which they have the same sign."""
    norms: Mapping[str, float]
    """Euclidean norm of every flow's update, by the flow's name."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """How feedback travels back through one rollout, from one forward pass.

    The flows asked for come first in all arrays over flows; R and M follow if they were not asked for, since the
    verdict needs them. A combined flow has no feedback of its own: its adjoint stands for its rule applied to the
    adjoints of its two flows, as in the gradient of x0, and it has no paths (nan).
    """

    title: str
    """System, horizon, batch and loss, in words."""
    flows: tuple[Flow | Combined, ...]
    """The flows."""
    loss: float
    """The loss."""
    adjoints: np.ndarray
    """|λ_n| for n = 0 … T, shape (flows, steps + 1, batch), float64; inf where it has overflowed."""
    physics: np.ndarray
    """|α_n (∂S/∂x)ᵀ λ_{n+1}|, what reaches λ_n through the simulator, shape (flows, steps, batch)."""
    controller: np.ndarray
    """|β_n (∂N/∂x)ᵀ μ_n|, what reaches λ_n through the controller, shape (flows, steps, batch)."""
    spectra: Spectra
    """Jacobians along the trajectory."""
    contributions: np.ndarray | None = None
    """Norm of what step n gives to the update of θ, summed over the batch, shape (flows, steps), where it was found."""
    layers: tuple[Layer, ...] = ()
    """M and R, parameter by parameter, and all together at the end."""
    rotation: Mapping[str, Rotation] = field(default_factory=dict)
    """Rotation of the update fields, by the flow's name, if it was asked for."""

    @property
    def steps(self) -> int:
        """Number of time steps T."""
        return self.adjoints.shape[1] - 1

    def index(self, flow: Flow | Combined) -> int:
        """Return the place of a flow in the arrays.

        Raises:
            ValueError: The flow was not diagnosed.
        """
        if flow not in self.flows:
            raise ValueError(f"flow {flow.name} was not diagnosed, there are {', '.join(f.name for f in self.flows)}")
        return self.flows.index(flow)

    def quantiles(self, levels: Sequence[float] = (0.1, 0.5, 0.9)) -> np.ndarray:
        """Return quantiles of |λ_n| over the samples, shape (levels, flows, steps + 1)."""
        return np.quantile(self.adjoints, levels, axis=2, method="closest_observation")

    @property
    def growth(self) -> np.ndarray:
        """Factor by which feedback grows from one step to the one before it, shape (flows, batch); see `growth_rate`.

        Its logarithm is the finite-time Lyapunov exponent of the backward pass.
        """
        return np.exp(growth_rate(self.adjoints))

    @property
    def horizon_growth(self) -> np.ndarray:
        """The same from the last step to the first that a control sees, growth^(T − 1), shape (flows, batch)."""
        with np.errstate(over="ignore"):
            return np.exp((self.steps - 1) * growth_rate(self.adjoints))

    @property
    def batch(self) -> np.ndarray:
        """√ Σ_b |λ_n|² over the samples b, what the sum over the batch sees, shape (flows, steps + 1)."""
        return row_norms(self.adjoints)

    @property
    def batch_growth(self) -> np.ndarray:
        """Growth per step of that size, shape (flows,): where few samples explode it is theirs, as in the update."""
        return np.exp(growth_rate(self.batch[:, :, None])[:, 0])

    @property
    def spread(self) -> np.ndarray:
        """Largest |λ_n| over the smallest, n = 1 … T, shape (flows, batch); inf where a step receives nothing."""
        return spread(self.adjoints)

    @property
    def effective_steps(self) -> np.ndarray:
        """Number of steps that share the feedback, from 1 to T, shape (flows, batch); see `effective_steps`."""
        return effective_steps(self.adjoints[:, 1:])

    @property
    def balance(self) -> np.ndarray:
        """Effective steps over T: 1 if all steps receive the same, 1 / T if one receives all; shape (flows, batch)."""
        return self.effective_steps / self.steps

    @property
    def controller_share(self) -> np.ndarray:
        """Share of the controller's path in what arrives, |controller| / (|physics| + |controller|); like `physics`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.controller / (self.physics + self.controller)

    @property
    def why(self) -> "verdict.Verdict":
        """Whether R explodes or vanishes, and through which path."""
        return verdict.judge(self)

    def __str__(self) -> str:
        return verdict.table(self)


def growth_rate(adjoints: np.ndarray) -> np.ndarray:
    """Return the slope of log |λ_n| against T − n by least squares, n = 1 … T.

    Those n count at which |λ_n| is finite and not zero; nan where they are fewer than two.

    Args:
        adjoints: |λ_0| … |λ_T| along the second last dimension, shape (…, steps + 1, batch).

    >>> growth_rate(2.0 ** np.arange(5)[::-1, None]).round(6)
    array([0.693147])
    """
    values = adjoints[..., 1:, :]
    back = np.arange(values.shape[-2])[::-1, None]
    valid = np.isfinite(values) & (values > 0.0)
    logs = np.log(np.where(valid, values, 1.0))
    count = valid.sum(axis=-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = np.where(valid, back - (valid * back).sum(axis=-2, keepdims=True) / count[..., None, :], 0.0)
        slope = (centred * logs).sum(axis=-2) / np.square(centred).sum(axis=-2)
    return np.where(count >= 2, slope, np.nan)


def spread(adjoints: np.ndarray) -> np.ndarray:
    """Return the largest |λ_n| over the smallest, n = 1 … T, for |λ_0| … |λ_T| of shape (…, steps + 1, batch)."""
    values = adjoints[..., 1:, :]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where(np.isfinite(values).all(axis=-2), values.max(axis=-2) / values.min(axis=-2), np.inf)


def effective_steps(sizes: np.ndarray) -> np.ndarray:
    """Return (Σ_n a_n)² / Σ_n a_n² for sizes a_n along the second last dimension, nan where they are not finite.

    It is T if all T sizes are the same, k if k of them are the same and the others zero.

    >>> effective_steps(np.array([[1.0], [1.0], [0.0]])), effective_steps(np.array([[1.0], [0.5]]))
    (array([2.]), array([1.8]))
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = sizes / sizes.max(axis=-2, keepdims=True)  # squares of exploded adjoints would overflow
        return np.square(scaled.sum(axis=-2)) / np.square(scaled).sum(axis=-2)


def spectra(jacobians: StepJacobians) -> Spectra:
    """Return spectral radii, norms and exponents of Jacobians along a trajectory; nan where they are not finite."""
    physics, closed = jacobians.physics.astype(np.float64), jacobians.closed_loop.astype(np.float64)
    measured = [
        function(matrices)
        for matrices in (physics, jacobians.controller_path.astype(np.float64), closed)
        for function in (spectral_radius, largest_singular_value)
    ]
    return Spectra._make([*measured, largest_exponent(physics), largest_exponent(closed)])


def spectral_radius(matrices: np.ndarray) -> np.ndarray:
    """Return the largest |eigenvalue| of matrices (…, D, D), shape (…); nan for one that is not finite."""
    finite = np.isfinite(matrices).all(axis=(-2, -1))
    values = np.abs(np.linalg.eigvals(np.where(finite[..., None, None], matrices, 0.0))).max(axis=-1)
    return np.where(finite, values, np.nan)


def largest_singular_value(matrices: np.ndarray) -> np.ndarray:
    """Return the largest singular value of matrices (…, D, D), shape (…); nan for one that is not finite."""
    finite = np.isfinite(matrices).all(axis=(-2, -1))
    values = np.linalg.norm(np.where(finite[..., None, None], matrices, 0.0), 2, axis=(-2, -1))
    return np.where(finite, values, np.nan)


def largest_exponent(matrices: np.ndarray) -> np.ndarray:
    """Return log σ(Q_{T−1} … Q_0) / T, σ the largest singular value, for Q_n of shape (T, samples, D, D).

    The product is rescaled at every step, so that it neither overflows nor vanishes. −inf where it is zero, nan where a
    Jacobian is not finite.

    >>> largest_exponent(np.full((500, 1, 1, 1), 10.0)) / np.log(10.0)
    array([1.])
    """
    product, scale = np.broadcast_to(np.eye(matrices.shape[-1]), matrices.shape[1:]), np.zeros(matrices.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        for matrix in matrices:
            product = matrix @ product
            size = np.abs(product).max(axis=(-2, -1))
            scale = scale + np.log(size)
            product = product / np.where(size > 0.0, size, 1.0)[:, None, None]
        return (scale + np.log(largest_singular_value(product))) / len(matrices)


def path_norms(
    feedback: Feedback, plain: Sequence[Flow], flows: Sequence[Flow | Combined]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return norms of adjoints, of the physics path and of the controller path, for flows made of `plain` ones."""
    wide = feedback.adjoints.astype(np.float64)
    norms = [row_norms(array) for array in feedback[:3]]
    rows: list[list[np.ndarray]] = [[], [], []]
    for flow in flows:
        parts = [plain.index(part) for part in linear_parts(flow)]
        own = [array[parts[0]] for array in norms]
        if isinstance(flow, Combined):
            with np.errstate(over="ignore", invalid="ignore"):
                combined = flow.apply(wide[parts[0]], wide[parts[1]])
            own = [row_norms(combined), *(np.full(array.shape, np.nan) for array in own[1:])]
        for row, array in zip(rows, own, strict=True):
            row.append(array)
    adjoints, physics, controller = (np.stack(row) for row in rows)
    return adjoints, physics, controller


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Return Euclidean norms along the last dimension in float64; inf for a row that is not finite.

    >>> row_norms(np.array([[3e200, 4e200], [0.0, 0.0], [np.nan, 1.0]]))
    array([5.e+200, 0.e+000,     inf])
    """
    values = rows.astype(np.float64)
    largest = np.abs(values).max(axis=-1, keepdims=True)  # squares of exploded adjoints would overflow
    finite = np.isfinite(largest)
    scale = np.where(finite & (largest > 0.0), largest, 1.0)
    scaled = np.where(finite, values, 0.0) / scale
    norms = scale[..., 0] * np.sqrt(np.square(scaled).sum(axis=-1))
    return np.where(finite[..., 0], norms, np.inf)
