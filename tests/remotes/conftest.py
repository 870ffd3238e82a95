"""One docker-registry for all tests, and the tiny adapters of the registry's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.registry.conftest import make  # noqa: F401 - a fixture
from tests.remotes import object_stores, registry
from tests.remotes.hub_server import Hub


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a registry that takes everything of everybody."""
    with registry.running(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that takes everything of everybody."""
    with Hub() as found:
        yield found


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_stores.Server]:
    """An S3 that creates exclusively, sends ranges, and takes everything of everybody."""
    with object_stores.moto(tmp_path_factory.mktemp("moto")) as found:
        yield found


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_stores.Server]:
    """An S3 that does neither, and checks who asks."""
    with object_stores.rclone(tmp_path_factory.mktemp("rclone")) as found:
        yield found
