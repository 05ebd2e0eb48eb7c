"""The bridge to torch: rollouts whose backward pass is a flow of one's choice, updates, steps and diagnoses."""

from warp_phys.interop.torch.diagnosis import diagnose, jacobians, rotation
from warp_phys.interop.torch.loss import pointwise_cost
from warp_phys.interop.torch.open_loop import trajectory
from warp_phys.interop.torch.ops import Step
from warp_phys.interop.torch.report import Report
from warp_phys.interop.torch.rollout import Rollout
from warp_phys.interop.torch.system import TorchSystem
from warp_phys.interop.torch.update import Update

__all__ = [
    "Report",
    "Rollout",
    "Step",
    "TorchSystem",
    "Update",
    "diagnose",
    "jacobians",
    "pointwise_cost",
    "rotation",
    "trajectory",
]
