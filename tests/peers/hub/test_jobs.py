"""Work that one of several processes does, over PostgreSQL: the tests of `tests/hub`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.storage.postgres import PostgresDatabase
from tests.hub.conftest import serving
from tests.hub.test_jobs import (  # noqa: F401
    check_made_once,
    test_a_job_is_done_by_one_process_after_the_other,
    test_the_job_of_a_process_that_was_killed_is_done_by_another_once_its_lease_is_over,
)
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer


@pytest.fixture
def database(postgres: Postgres) -> Iterator[PostgresDatabase]:
    """An empty database."""
    with closing(PostgresDatabase(postgres.database())) as opened:
        yield opened


def test_two_processes_over_one_database_make_a_form_once(
    tmp_path: Path, places: dict[str, Any], adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "one", **places) as server, serving(tmp_path / "other", **places) as other_server:
        check_made_once([server, other_server], adapter(1), monkeypatch)
