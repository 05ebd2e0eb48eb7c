"""Another name of `warp_phys.diagnose.landscape`."""

from warp_phys.diagnose.landscape import Landscape

__all__ = ["Landscape"]
