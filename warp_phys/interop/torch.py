"""The bridge to torch: rollouts whose backward pass is a flow of one's choice, updates, steps and diagnoses."""

from warp_phys.interop.report import Report
from warp_phys.interop.torch_diagnostics import diagnose, jacobians, rotation
from warp_phys.interop.torch_loss import pointwise_cost
from warp_phys.interop.torch_ops import Step
from warp_phys.interop.torch_rollout import Rollout
from warp_phys.interop.torch_update import Update

__all__ = ["Report", "Rollout", "Step", "Update", "diagnose", "jacobians", "pointwise_cost", "rotation"]
