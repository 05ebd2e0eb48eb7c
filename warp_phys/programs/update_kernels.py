"""The kernel that ends an update on a CPU: loss, combination, clipping and a step of Adam."""

import functools
from typing import Any, Literal

import warp as wp

from warp_phys.core.rows import scalar_name
from warp_phys.programs.native_kernels import module_options
from warp_phys.programs.rules import combined_body

Clip = Literal["none", "value", "norm"]
CLIPPING: dict[str, int] = {"none": 0, "value": 1, "norm": 2}
"""Kinds of clipping, as native/update.h numbers them."""

TENSOR = 5
"""Numbers of a trained tensor: addresses of parameter, mean, mean square and count of steps; its group."""

GROUP = 6
"""Numbers of a group of parameters: learning rate, β₁, β₂, ε, weight decay, whether that is decoupled (0 or 1)."""


@functools.cache
def finish_kernel(rule: Any, memory: bool, either: bool, real: type) -> wp.Kernel:
    """Finish an update whose flows have run, in one thread.

    `rule` combines the flows at the first two of `addresses`, or is None: then the first alone counts. The third takes
    the result, `grad` the same clipped. With `memory` the second goes into the running average at the fourth, of this
    `decay`, and the rule takes that; with `either` also the second itself, where that leaves nothing. Where a state is
    not finite, `status` becomes 0 and nothing else is written, else it becomes 1. The first `own`
    numbers of what a controller returns are controls, whose squares cost.

    Raises:
        KeyError: `rule` has no kernel.
    """
    scalar = scalar_name(real)
    end = "for (long long i = 0; i < size; ++i) update[i] = base[i];"
    if rule is not None:
        end = f"""
        const auto* other = (const {scalar}*)addresses.data[1];
        auto* mean = ({scalar}*)addresses.data[3];
        const auto* now = {int(memory)} && !remember(other, mean, size, decay) ? mean : other;
        const auto rule = []({scalar} m, {scalar} r) -> {scalar} {{ {combined_body(rule)} }};
        if ({int(either)}) combine_either(rule, base, mean, now, update, size);
        else combine(rule, base, {int(memory)} ? mean : now, update, size);
        """

    @wp.func_native(f"""
        using namespace warp_phys;
        const auto* shape = states.shape.dims;
        status.data[0] = all_finite(states.data, (long long)shape[0] * shape[1] * shape[2]);
        if (!status.data[0]) return;
        double total = cost_weight * sum(costs.data, (long long)costs.shape[0] * costs.shape[1]);
        shape = controls.shape.dims;
        const long long rows = (long long)shape[0] * shape[1], width = shape[2];
        if (control_weight != 0.0 && own == width) total += control_weight * sum_of_squares(controls.data, rows * own);
        else if (control_weight != 0.0)
            for (long long row = 0; row < rows; ++row)
                total += control_weight * sum_of_squares(controls.data + row * width, own);
        loss.data[0] = ({scalar})total;
        const long long size = grad.shape[0];
        const auto* base = (const {scalar}*)addresses.data[0];
        auto* update = ({scalar}*)addresses.data[2];
        {end}
        clip(update, grad.data, size, clipping, limit);
        for (int t = 0; t < tensors.shape[0]; ++t) {{
            const auto* at = tensors.data + t * {TENSOR};
            const auto& group = *(const Adam*)(groups.data + at[4] * {GROUP});
            const long long start = starts.data[t], length = starts.data[t + 1] - start;
            auto *theta = ({scalar}*)at[0], *mean = ({scalar}*)at[1], *square = ({scalar}*)at[2];
            if (theta) adam(theta, grad.data + start, mean, square, (float*)at[3], length, group);
        }}
        """)
    def finish(
        states: wp.array3d[real], controls: wp.array3d[real], own: int, costs: wp.array2d[real],
        cost_weight: wp.float64, control_weight: wp.float64, addresses: wp.array[wp.uint64], decay: wp.float64,
        clipping: int, limit: wp.float64, tensors: wp.array2d[wp.uint64], starts: wp.array[int],
        groups: wp.array2d[wp.float64], status: wp.array[int], loss: wp.array[real], grad: wp.array[real],
    ): ...  # fmt: skip

    @wp.kernel(module="unique", module_options=module_options())
    def finish_update(
        # in
        states: wp.array3d[real],
        controls: wp.array3d[real],
        own: int,
        costs: wp.array2d[real],
        cost_weight: wp.float64,
        control_weight: wp.float64,
        addresses: wp.array[wp.uint64],
        decay: wp.float64,
        clipping: int,
        limit: wp.float64,
        tensors: wp.array2d[wp.uint64],
        starts: wp.array[int],
        groups: wp.array2d[wp.float64],
        # out
        status: wp.array[int],
        loss: wp.array[real],
        grad: wp.array[real],
    ):
        finish(
            states, controls, own, costs, cost_weight, control_weight, addresses, decay, clipping, limit, tensors,
            starts, groups, status, loss, grad,
        )  # fmt: skip

    return finish_update
