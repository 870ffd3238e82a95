"""The API and pushes at a hub over PostgreSQL and a bucket: the tests of `tests/hub/api`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.api.test_access import *  # noqa: F403
from tests.hub.api.test_commands import *  # noqa: F403
from tests.hub.api.test_pushes import *  # noqa: F403
from tests.hub.conftest import Running, serving

pytestmark = pytest.mark.peer
# It collects a folder; what the gc of a bucket removes, which is older than two hours, is in `test_collection`.
del test_a_restored_name_is_without_what_a_gc_has_removed  # noqa: F821 - imported above


@pytest.fixture
def hub(tmp_path: Path, places: dict[str, Any]) -> Iterator[Running]:
    """An empty hub in this process, whose limits the tests change."""
    with serving(tmp_path / "hub", **places) as running:
        yield running
