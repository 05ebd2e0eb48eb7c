"""One build and one environment for all tests of this folder."""

import pytest

from tests.packaging.installing import Environment, build


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel; its files lie beside it in `files`."""
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """An environment that has the wheel."""
    return Environment(tmp_path_factory.mktemp("environment") / "venv", wheel)
