"""warp_phys: a differentiable physics engine on NVIDIA Warp whose backward pass stays usable over long horizons."""

from warp_phys.core.gate import gate
from warp_phys.core.quiet import quiet
from warp_phys.diagnose.audit import audit
from warp_phys.engine.layers import Dense
from warp_phys.errors import Diverged
from warp_phys.flow import COMBINED, CONTROLLER, MODIFIED, REGULAR, STOPPED, Combined, Flow, agree, geometric, minmod
from warp_phys.rollout import Rollout
from warp_phys.systems import (
    SYSTEMS,
    CartPole,
    Hopper,
    LinearQuadratic,
    Pendulum,
    Polynomial,
    Quadrotor,
    Quantum,
    Repulsion,
    Simulator,
    Surrogate,
    System,
)

__version__ = "0.1.0"

__all__ = [
    "COMBINED",
    "CONTROLLER",
    "MODIFIED",
    "REGULAR",
    "STOPPED",
    "SYSTEMS",
    "CartPole",
    "Combined",
    "Dense",
    "Diverged",
    "Flow",
    "Hopper",
    "LinearQuadratic",
    "Pendulum",
    "Polynomial",
    "Quadrotor",
    "Quantum",
    "Repulsion",
    "Rollout",
    "Simulator",
    "Surrogate",
    "System",
    "agree",
    "audit",
    "gate",
    "geometric",
    "minmod",
    "quiet",
]
