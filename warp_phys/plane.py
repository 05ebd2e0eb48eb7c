"""Another name of `warp_phys.diagnose.plane`."""

from warp_phys.diagnose.plane import jacobian, rotation, rotation_share, zero_curves

__all__ = ["jacobian", "rotation", "rotation_share", "zero_curves"]
