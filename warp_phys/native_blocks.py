"""Physics in C++ for blocks of samples on a CPU: what a system may bring besides its Warp functions, for speed.

The Warp functions stay the definition of a system; the C++ of `native/` says the same for eight samples at a time, one
in each lane of a vector, and the tests hold one against the other.
"""

from typing import Any

import warp as wp


def block_functions(structure: Any, name: str, sizes: tuple[int, ...], real: type) -> tuple[Any, Any]:
    """Return the functions `advance` and `retreat` of `native_kernels` for a struct of the folder `native`.

    Args:
        structure: The system; the struct takes its parameters in the order of `parameter_names`.
        name: Name of the struct; see native/lanes.h for what it must have.
        sizes: Its template arguments after the number type.
        real: wp.float32 or wp.float64.
    """
    types, names = structure.types(real), structure.parameter_names
    Parameters, inputs, outputs = types.Parameters, structure.state_size, structure.control_size
    scalar = "double" if real is wp.float64 else "float"
    block = f"warp_phys::Block<{scalar}, warp_phys::{name}<{', '.join([scalar, *map(str, sizes)])}>>"
    numbers = "\n".join(f"own[{i}][s] = from.{field};" for i, field in enumerate(names))
    arguments = f"""
        warp_phys::lanes<{scalar}> own[{len(names)}];
        for (int s = 0; s < warp_phys::LANES; ++s) {{
            const auto& from = p.data[(first + (s < count ? s : count - 1)) % p.shape[0]];
            {numbers}
        }}
        const long long at = (long long)n * states.shape[1] + first;
        const auto* x = states.data + at * {inputs};
        const auto* c = controls.data + at * {outputs};
        auto* y = states.data + (at + states.shape[1]) * {inputs};
    """

    @wp.func_native(f"{arguments} {block}::advance(count, x, c, own, y);")
    def advance(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], n: int, first: int, count: int
    ): ...

    @wp.func_native(f"""{arguments}
        {block}::retreat(
            count, adj_x.shape[0], x, c, own, y, adj_x.data + (long long)first * {inputs},
            (long long)adj_x.shape[1] * {inputs}, adj_c.data
        );""")
    def retreat(
        states: wp.array3d[real], controls: wp.array3d[real], p: wp.array[Parameters], n: int, first: int, count: int,
        adj_x: wp.array3d[real], adj_c: wp.array3d[real],
    ): ...  # fmt: skip

    return advance, retreat
