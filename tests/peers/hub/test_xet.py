"""Large files by Xet to a hub over PostgreSQL and a bucket, whose processes take turns: tests of `tests/hub/xet`."""

from __future__ import annotations

import pytest

from tests.hub.xet.test_receiving import (  # noqa: F401
    sender,
    test_a_tenant_ends_no_epoch_but_that_of_a_repository_of_its_own,
    test_a_xorb_of_another_repository_cannot_be_named,
    test_hf_upload_of_today_sends_by_xet_and_every_byte_arrives,
)

pytestmark = pytest.mark.peer
