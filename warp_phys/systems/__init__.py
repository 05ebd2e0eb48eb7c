"""Physical systems, one file each."""

from warp_phys.systems.base import Simulator, System, SystemFunctions, SystemTypes
from warp_phys.systems.cartpole import CartPole
from warp_phys.systems.extended import Extended
from warp_phys.systems.hopper import Hopper
from warp_phys.systems.linear_quadratic import LinearQuadratic
from warp_phys.systems.pendulum import Pendulum
from warp_phys.systems.polynomial import Polynomial
from warp_phys.systems.quadrotor import Quadrotor
from warp_phys.systems.quantum import Quantum
from warp_phys.systems.repulsion import Repulsion
from warp_phys.systems.solve import solve
from warp_phys.systems.surrogate import Surrogate

SYSTEMS: dict[str, type[System]] = {
    "cartpole": CartPole,
    "repulsion": Repulsion,
    "quantum": Quantum,
    "polynomial": Polynomial,
    "pendulum": Pendulum,
    "quadrotor": Quadrotor,
    "hopper": Hopper,
    "linear_quadratic": LinearQuadratic,
}
"""The systems by name, as command lines and files know them."""

__all__ = [
    "SYSTEMS",
    "CartPole",
    "Extended",
    "Hopper",
    "LinearQuadratic",
    "Pendulum",
    "Polynomial",
    "Quadrotor",
    "Quantum",
    "Repulsion",
    "Simulator",
    "Surrogate",
    "System",
    "SystemFunctions",
    "SystemTypes",
    "solve",
]
