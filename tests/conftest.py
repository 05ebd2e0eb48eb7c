"""Fixtures for all tests: every test that computes takes the device."""

import pytest
import warp as wp

wp.config.log_level = wp.LOG_WARNING
wp.init()

DEVICES = ["cpu", *(device.alias for device in wp.get_cuda_devices())]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """The CPU, and each CUDA device that is there."""
    return request.param
