"""Promotions, approvals and withdrawals at a hub over PostgreSQL and a bucket: the tests of `tests/hub/api`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.api.test_releasing import *  # noqa: F403
from tests.hub.api.test_releasing import releasing
from tests.hub.conftest import Running
from tests.support.adapters import Make

pytestmark = pytest.mark.peer
# It stores a signature beside the hub; a hub in a bucket keeps those that its clients attach.
del test_a_signed_version_is_withdrawn_by_its_signer_or_an_admin  # noqa: F821 - imported above


@pytest.fixture
def hub(tmp_path: Path, places: dict[str, Any], make: Make) -> Iterator[Running]:
    """A hub with requirements on prod in a database and a bucket."""
    with releasing(tmp_path, make, **places) as running:
        yield running
