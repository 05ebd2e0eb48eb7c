"""Systems as Gymnasium environments: one at a time, or many in one launch.

Importing this package registers the names of `TASKS`, `warp_phys/CartPole-v0` and others, for `gymnasium.make` and
`gymnasium.make_vec`.
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
