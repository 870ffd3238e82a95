"""Proposals to a hub over PostgreSQL and a bucket, whose processes take turns: tests of `tests/hub/hf/test_proposing.py`."""

from __future__ import annotations

import pytest

from tests.hub.hf.test_proposing import (  # noqa: F401
    ada,
    maintainer,
    reader,
    team,
    test_a_proposal_moves_with_its_repository_and_outlives_a_squash,
    test_a_refused_proposal_has_its_reason_and_a_gc_has_its_bytes,
    test_an_accepted_proposal_is_the_next_version_of_who_proposed_it,
    test_hf_upload_of_a_reader_is_a_proposal_and_the_version_stays,
    test_of_two_decisions_at_the_same_time_one_holds,
    test_only_its_author_or_a_maintainer_withdraws_a_proposal,
    test_the_calls_of_a_client_list_show_merge_and_close_proposals,
)

pytestmark = pytest.mark.peer
