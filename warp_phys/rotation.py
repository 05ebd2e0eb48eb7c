"""Another name of `warp_phys.diagnose.rotation`."""

from warp_phys.diagnose.rotation import probe

__all__ = ["probe"]
