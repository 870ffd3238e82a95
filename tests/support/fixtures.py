"""Fixtures that tests of several packages share: tiny adapters, and the servers of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import object_stores, registry
from tests.support.adapters import Make, write_adapter
from tests.support.hub_server import Hub


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make an adapter's folder under a name."""

    def call(name: str = "adapter", seed: int = 0, **config: object) -> Path:
        return write_adapter(tmp_path / name, seed, **config)

    return call


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
