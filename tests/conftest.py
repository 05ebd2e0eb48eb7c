"""Fixtures for all tests: every test that computes takes the device."""

import pytest
import warp as wp

wp.config.log_level = wp.LOG_WARNING
wp.init()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what makes a run of the whole suite shorter."""
    parser.addoption(
        "--unoptimised",
        action="store_true",
        help="compile kernels without optimisation, in a third of the time",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose how kernels are compiled, once for a process."""
    if config.getoption("--unoptimised"):
        wp.config.optimization_level = 0


DEVICES = ["cpu", *(device.alias for device in wp.get_cuda_devices())]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """The CPU, and each CUDA device that is there."""
    return request.param
