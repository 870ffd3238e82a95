"""Reading from a hub over PostgreSQL and a bucket: the tests of `tests/hub/hf`."""

from __future__ import annotations

import pytest

from tests.hub.hf.test_reading import *  # noqa: F403

pytestmark = pytest.mark.peer
