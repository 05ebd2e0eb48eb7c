"""The bridge to JAX: rollouts whose reverse-mode derivative is a flow of one's choice, under `jit`, inside `grad`."""

from warp_phys.interop.extras import require

require("jax", "jax")

from warp_phys.interop.jax.costs import loss  # noqa: E402
from warp_phys.interop.jax.mlp import MLP  # noqa: E402
from warp_phys.interop.jax.stepping import step  # noqa: E402
from warp_phys.interop.jax.system import JaxSystem  # noqa: E402
from warp_phys.interop.jax.unrolling import check_finite, rollout, trajectory, why_general  # noqa: E402

__all__ = ["MLP", "JaxSystem", "check_finite", "loss", "rollout", "step", "trajectory", "why_general"]
