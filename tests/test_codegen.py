"""Kernels in which a loop's counter is an index and a number: Warp alone reads the index before it is set."""

import numpy as np
import warp as wp

from warp_phys.core.kernel_cache import start_warp


@wp.kernel(module="unique", module_options={"optimization_level": 0}, enable_backward=False)
def sum_of_products(x: wp.array(dtype=wp.vec3d), y: wp.array(dtype=wp.float64)):
    total = wp.float64(0.0)
    for i in range(3):
        total += x[0][i] * wp.float64(i) * x[0][i]
    y[0] = total


@wp.kernel(module="unique", module_options={"optimization_level": 0}, enable_backward=False)
def sum_of_some(x: wp.array(dtype=wp.float64), n: int, y: wp.array(dtype=wp.float64)):
    total = wp.float64(0.0)
    for i in range(3):
        if i < n:
            total += x[i] * wp.float64(i)
        else:
            total += x[i]
    y[0] = total


def test_a_counter_that_is_index_and_number(tmp_path, monkeypatch):
    start_warp()
    monkeypatch.setattr(wp.config, "kernel_cache_dir", str(tmp_path))  # not what was compiled before
    y = wp.zeros(1, dtype=wp.float64, device="cpu")
    x = np.array([3.0, 5.0, 7.0])
    wp.launch(sum_of_products, 1, [wp.array(x[None], dtype=wp.vec3d, device="cpu"), y], device="cpu")
    assert y.numpy()[0] == 25.0 + 2 * 49.0
    for n, expected in ((3, 19.0), (1, 12.0)):
        wp.launch(sum_of_some, 1, [wp.array(x, dtype=wp.float64, device="cpu"), n, y], device="cpu")
        assert y.numpy()[0] == expected
