"""The core's float32 matrix rate: what the best matrix library reaches on square matrices, in billions a second."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = (256, 512, 1024)
SECONDS = 0.02
"""Time for each size in one measurement."""
LIBRARIES = {"cpu": ("openblas", "xla"), "cuda": ("cublas",)}


class Program:
    """Square products by one library: openblas (numpy's), xla, or cublas (torch's, without reduced precision)."""

    def __init__(self, library: str):
        make = {"openblas": _openblas, "xla": _xla, "cublas": _cublas}[library]
        sizes = SIZES if library != "cublas" else (2048, 4096, 8192)
        self.products = {size: make(size) for size in sizes}

    def rate(self) -> float:
        """Return the rate in GFLOP/s at the size that suits the library best."""
        return max(2e-9 * size**3 / best_time(product) for size, product in self.products.items())


def best_time(product: Callable[[], Any]) -> float:
    """Return the shortest of several times in seconds."""
    product()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


def _matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return tuple(generator.standard_normal((size, size), dtype=np.float32) for _ in range(2))  # type: ignore[return-value]


def _openblas(size: int) -> Callable[[], Any]:
    a, b = _matrices(size)
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)


def _xla(size: int) -> Callable[[], Any]:
    import jax

    a, b = map(jax.numpy.asarray, _matrices(size))
    product = jax.jit(lambda a, b: a @ b)
    return lambda: product(a, b).block_until_ready()


def _cublas(size: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.as_tensor(matrix).cuda() for matrix in _matrices(size))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)
        torch.cuda.synchronize()

    return product
