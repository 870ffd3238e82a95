"""Fixtures that tests of several packages share: tiny adapters, and the servers of others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import object_stores, registry
from tests.support.adapters import Make, write_adapter
from tests.support.hub_server import Hub

Filled = Callable[[str, Path, Callable[[], object]], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make an adapter's folder under a name."""

    def call(name: str = "adapter", seed: int = 0, **config: object) -> Path:
        return write_adapter(tmp_path / name, seed, **config)

    return call


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Fill an empty folder by commands for the first test of a module, and for the others with a copy of what they made."""
    template_root = tmp_path_factory.mktemp("filled")

    def call(name: str, folder: Path, make: Callable[[], object]) -> Path:
        if (template_root / name).exists():
            shutil.copytree(template_root / name, folder, symlinks=True, dirs_exist_ok=True)
        else:
            make()
            shutil.copytree(folder, template_root / name, symlinks=True)
        return folder

    return call


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a registry that takes everything of everybody."""
    with registry.running(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that takes everything of everybody."""
    with Hub() as hub_server:
        yield hub_server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_stores.Server]:
    """An S3 that creates exclusively, sends ranges, and takes everything of everybody."""
    with object_stores.moto(tmp_path_factory.mktemp("moto")) as moto_server:
        yield moto_server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_stores.Server]:
    """An S3 that does neither, and checks who asks."""
    with object_stores.rclone(tmp_path_factory.mktemp("rclone")) as rclone_server:
        yield rclone_server
