"""Systems as Gymnasium environments: one at a time, or many in one launch.

Importing this package registers `warp_phys/CartPole-v0`, `warp_phys/Repulsion-v0`, `warp_phys/Quantum-v0` and
`warp_phys/Polynomial-v0` for `gymnasium.make` and `gymnasium.make_vec`.
"""

from warp_phys.interop.extras import require

require("gymnasium", "gymnasium")

from warp_phys.interop.gymnasium.environments import (  # noqa: E402
    TASKS,
    AutoresetMode,
    SystemEnv,
    SystemVectorEnv,
    make_vector_env,
    register,
)

__all__ = ["TASKS", "AutoresetMode", "SystemEnv", "SystemVectorEnv", "make_vector_env", "register"]

register()
