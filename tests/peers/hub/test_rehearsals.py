"""What a hub rehearses over PostgreSQL and a bucket, it changes nowhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.hub_database import FILE
from adapterhub.hub.storage.from_settings import open_storage
from adapterhub.hub.storage.shared_storage import SharedStorage
from tests.hub.api.test_rehearsals import *  # noqa: F403
from tests.hub.api.test_rehearsals import rows
from tests.hub.conftest import Running, serving

pytestmark = pytest.mark.peer


@pytest.fixture
def hub(tmp_path: Path, places: dict[str, Any]) -> Iterator[Running]:
    """An empty hub in this process, whose limits the tests change."""
    with serving(tmp_path / "hub", **places) as running:
        yield running


@pytest.fixture
def state(hub: Running, tmp_path: Path) -> Callable[[], Any]:
    """Return everything that the hub keeps: the entries of its log, the keys of its bucket, its index and its tables."""

    def state() -> Any:
        copy = tmp_path / "tables"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        with closing(open_storage(hub.settings)) as storage:
            assert isinstance(storage, SharedStorage)
            storage.copy_tables(copy)
            keys = sorted(key for key, *_ in storage.bucket.objects(""))
            return storage.database.rows_after(0, 1000), keys, rows(copy / FILE), rows(hub.folder / "registry.db")

    return state
