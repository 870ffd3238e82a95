"""What the tables of a hub say is of one moment, in PostgreSQL: the tests of `tests/hub/test_snapshots.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.storage.postgres import PostgresDatabase
from tests.hub.test_snapshots import *  # noqa: F403 - the contract
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def opened(postgres: Postgres) -> Callable[[], HubDatabase]:
    """Open the tables of one database, as one process of a hub does."""
    url = postgres.database()
    return lambda: PostgresDatabase(url)
