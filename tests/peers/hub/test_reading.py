"""Reading from a hub over PostgreSQL and a bucket: the tests of `tests/hub/hf`."""

from __future__ import annotations

import pytest

from tests.hub.hf.test_reading import *  # noqa: F403

pytestmark = pytest.mark.peer
# It lowers a limit in this process, and the second hub is another.
del test_refs_of_thousands_of_versions_are_bounded_and_each_can_be_looked_up  # noqa: F821 - imported above
