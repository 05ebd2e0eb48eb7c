"""Another name of `warp_phys.interop.jax.system`."""

from warp_phys.interop.jax.system import JaxSystem

__all__ = ["JaxSystem"]
