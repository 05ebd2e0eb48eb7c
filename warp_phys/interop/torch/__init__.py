"""The bridge to torch: rollouts whose backward pass is a flow of one's choice, updates, steps and diagnoses."""

from warp_phys.interop.extras import require

require("torch", "torch")

from warp_phys.interop.torch.diagnosis import diagnose, jacobians, rotation  # noqa: E402
from warp_phys.interop.torch.hybrid import Hybrid  # noqa: E402
from warp_phys.interop.torch.identify import Identified, identify  # noqa: E402
from warp_phys.interop.torch.loss import pointwise_cost  # noqa: E402
from warp_phys.interop.torch.open_loop import trajectory  # noqa: E402
from warp_phys.interop.torch.ops import Step  # noqa: E402
from warp_phys.interop.torch.plan import Plan, RecedingHorizon, plan  # noqa: E402
from warp_phys.interop.torch.report import Report  # noqa: E402
from warp_phys.interop.torch.rollout import Rollout  # noqa: E402
from warp_phys.interop.torch.system import TorchSystem  # noqa: E402
from warp_phys.interop.torch.update import Update  # noqa: E402

__all__ = [
    "Hybrid",
    "Identified",
    "Plan",
    "RecedingHorizon",
    "Report",
    "Rollout",
    "Step",
    "TorchSystem",
    "Update",
    "diagnose",
    "identify",
    "jacobians",
    "plan",
    "pointwise_cost",
    "rotation",
    "trajectory",
]
