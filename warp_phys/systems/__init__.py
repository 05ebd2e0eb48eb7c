"""Physical systems, one file each."""

from warp_phys.systems.base import Simulator, System, SystemFunctions, SystemTypes
from warp_phys.systems.cartpole import CartPole

SYSTEMS: dict[str, type[System]] = {"cartpole": CartPole}
"""The systems by name, as command lines and files know them."""

__all__ = ["SYSTEMS", "CartPole", "Simulator", "System", "SystemFunctions", "SystemTypes"]
