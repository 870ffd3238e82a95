"""Promotions and withdrawals as JSON come back as they were, and what a hub leaves out is an error."""

from __future__ import annotations

import json

import pytest

from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub.registry.releases.tag_requirements import Requirement
from adapterhub.remotes import release_documents
from adapterhub.remotes.answer_fields import Fields
from adapterhub.remotes.release_documents import PromotionReport
from adapterhub_converters.errors import FormatError

DIGEST = "sha256:" + "a" * 64
MET = Requirement("approvals", "1", "1", True, "log 3", "adapterhub.toml")
MISSING = Requirement("eval.loss", "<=0.5", "", False, "", "adapterhub.toml")


def test_a_promotion_comes_back_with_what_is_missing() -> None:
    for current, requirements in ((0, [MET, MISSING]), (2, [])):
        report = PromotionReport("team/sql", 3, DIGEST, "prod", current, requirements, moved=not requirements)
        document = json.loads(json.dumps(release_documents.promotion_document(report)))
        assert document["ok"] == (not requirements)
        assert release_documents.read_promotion(document, "hub") == report
    assert PromotionReport("team/sql", 3, DIGEST, "prod", 0, [MET, MISSING]).missing == [MISSING]


def test_a_withdrawal_comes_back_whether_latest_moved_or_means_it_still() -> None:
    for latest, moved in ((2, True), (0, True), (0, False)):
        withdrawal = Withdrawal("team/sql", 3, DIGEST, "leaks a key", ("prod",), latest, moved)
        document = json.loads(json.dumps(release_documents.withdrawal_document(withdrawal)))
        assert release_documents.read_withdrawal(Fields(document, "hub")) == withdrawal


@pytest.mark.parametrize("key", ["name", "number", "digest", "tag", "requirements", "moved"])
def test_a_promotion_without_one_of_its_fields_is_an_error(key: str) -> None:
    document = release_documents.promotion_document(PromotionReport("team/sql", 3, DIGEST, "prod", 1, [MET]))
    with pytest.raises(FormatError, match=key):
        release_documents.read_promotion({name: value for name, value in document.items() if name != key}, "hub")
