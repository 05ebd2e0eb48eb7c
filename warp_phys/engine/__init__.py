"""How a trajectory is unrolled and run backward: the three phases, and the layers of a controller in pure Warp."""
