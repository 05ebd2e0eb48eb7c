"""Newton inside this engine: a Newton model and solver as a `Simulator`, its physics with our flows."""

from warp_phys.interop.extras import require

require("newton", "newton")

from warp_phys.interop.newton.system import DIFFERENTIABLE, NewtonSystem  # noqa: E402

__all__ = ["DIFFERENTIABLE", "NewtonSystem"]
