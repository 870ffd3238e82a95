"""A document says the same when it is read again, and one that is hostile or newer is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.registry.repository_documents import (
    ACCEPTED,
    BranchHead,
    CommitRecord,
    OtherManifest,
    Proposal,
    Repository,
    commit_id,
    open_proposals,
    with_head,
    with_manifest,
    without_head,
    without_manifest,
    without_tags,
)
from adapterhub_converters.errors import FormatError, RefusedError

BLOB = sha256_bytes(b"blob")
COMMIT = commit_id(BLOB)
PROPOSALS = {
    "1": Proposal(COMMIT, "ada", "More", "2026-12-01T00:00:00Z", state=ACCEPTED, became=COMMIT, co_authors=("bob",)),
    "2": Proposal(COMMIT, "eve", "Less", "2026-12-02T00:00:00Z", "the license"),
}
WHOLE = Repository(
    private=True,
    created="2026-12-01T00:00:00Z",
    heads={"main": BranchHead(COMMIT, COMMIT)},
    commits={COMMIT: BLOB},
    manifests={BLOB: OtherManifest("application/x", 7, subject=BLOB, annotations={"a": "b"}, blobs=(BLOB,))},
    tags={"latest": BLOB},
    proposals=PROPOSALS,
)


def read_again(repository: Repository, before: Repository | None = None) -> Repository:
    raw, _, blobs = repository.dump(before)
    return Repository.parse(raw, "hub/team/sql", blobs.__getitem__)


def test_a_repository_is_the_same_when_it_is_read_again() -> None:
    commits = {commit_id(sha256_bytes(b"%d" % number)): BLOB for number in range(3000)}
    for repository in (Repository(), WHOLE, Repository(commits=commits)):
        assert read_again(repository) == repository


def test_a_document_without_proposals_is_that_of_an_earlier_release() -> None:
    document = json.loads(Repository(private=True).dump(None)[0])
    assert (document["version"], "proposals" in document) == (1, False)
    assert json.loads(WHOLE.dump(None)[0])["version"] == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("commits", {"x": BLOB}),
        ("commits", {COMMIT: "sha256:x"}),
        ("heads", {"main": {"commit": "../x", "after": ""}}),
        ("heads", []),
        ("manifests", {BLOB: {"media_type": "x"}}),
        ("proposals", {"1": {"commit": COMMIT}}),
        ("proposals", {"1": {**json.loads(WHOLE.dump(None)[0])["proposals"]["2"], "state": "perhaps"}}),
        ("proposals", {"one": {}}),
    ],
)
def test_a_hostile_document_is_refused(field: str, value: Any) -> None:
    raw = json.dumps({**json.loads(WHOLE.dump(None)[0]), field: value}).encode()
    with pytest.raises(FormatError):
        Repository.parse(raw, "hub/team/sql", lambda digest: b"")


def test_a_document_of_a_newer_release_is_refused_rather_than_shortened() -> None:
    for raw, parse in ((b'{"version": 4}', Repository.parse), (b'{"version": 2}', CommitRecord.parse)):
        with pytest.raises(RefusedError) as error:
            parse(raw, "hub/team/sql", lambda digest: b"") if parse == Repository.parse else CommitRecord.parse(raw, "x")
        assert error.value.code == "newer-store"


def test_a_commit_is_the_same_when_it_is_read_again() -> None:
    record = CommitRecord({"README.md": (BLOB, 4)}, COMMIT, "title", "words", "ada", "2026-12-01T00:00:00Z", BLOB)
    assert CommitRecord.parse(record.dump(), "commit") == record
    with pytest.raises(FormatError):
        CommitRecord.parse(b'{"version": 1, "files": {"x": 7}}', "commit")


def test_a_repository_is_changed_in_one_thing_at_a_time() -> None:
    other_digest: Digest = sha256_bytes(b"other")
    branched = with_head(WHOLE, "dev", COMMIT, after="")
    assert without_head(branched, "dev") == WHOLE
    added = with_manifest(WHOLE, other_digest, OtherManifest("application/x", 1), {"x": "sha512:1", "y": other_digest})
    assert without_tags(added, ["x", "y"]).tags == WHOLE.tags
    assert without_manifest(added, other_digest, "sha512:1") == WHOLE
    assert open_proposals(WHOLE) == {"2": PROPOSALS["2"]}
    assert open_proposals(None) == {}
