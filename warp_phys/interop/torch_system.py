"""Another name of `warp_phys.interop.torch.system`."""

from warp_phys.interop.torch.system import TorchSystem

__all__ = ["TorchSystem"]
