"""Writing to a hub over PostgreSQL and a bucket: the tests of `tests/hub/hf`."""

from __future__ import annotations

import pytest

from tests.hub.hf.test_writing import *  # noqa: F403

pytestmark = pytest.mark.peer
