"""A hub's record of a repository: each change is one entry of its log, and what was refused or rehearsed leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.digest import sha256_bytes
from adapterhub.registry.registry import Registry
from adapterhub.registry.rehearsal import rehearsal
from adapterhub.registry.repository_documents import OtherManifest, Repository, with_manifest
from adapterhub.registry.repository_records import Repositories, needed_blobs, required_blobs
from adapterhub_converters.errors import RefusedError


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def private(repository: Repository) -> Repository:
    return replace(repository, private=True)


def test_every_reader_of_the_registry_sees_a_change_and_one_that_changes_nothing_is_no_entry(registry: Registry) -> None:
    ours, their_repositories = Repositories(registry), Repositories(registry)
    assert their_repositories.get("team/sql") is None
    ours.change("team/sql", private)
    changed = their_repositories.current("team/sql")
    assert changed[1] is not None
    assert changed[1].private
    ours.change("team/sql", private)
    assert their_repositories.current("team/sql") == changed
    assert ours.names() == ["team/sql"]


def test_a_removed_repository_is_gone_and_may_come_again(registry: Registry) -> None:
    repositories = Repositories(registry)
    repositories.change("team/sql", private)
    repositories.remove("team/sql")
    assert (repositories.get("team/sql"), repositories.names()) == (None, [])
    again = repositories.change("team/sql", lambda repository: repository)
    assert not again.private


def test_a_change_without_room_is_refused_and_a_smaller_record_never_is(registry: Registry) -> None:
    Repositories(registry).change(
        "team/sql", lambda repository: replace(repository, private=True, tags={"a": "sha256:" + "0" * 64})
    )

    def full(name: str, size: int) -> None:
        raise RefusedError(name, f"no room for {size > 0}")

    repositories = Repositories(registry, check_size=full)
    with pytest.raises(RefusedError, match="no room for True"):
        repositories.change("team/other", private)
    assert repositories.get("team/other") is None
    assert repositories.change("team/sql", lambda repository: replace(repository, tags={})).tags == {}


def test_a_rehearsed_change_is_seen_in_the_rehearsal_alone(registry: Registry) -> None:
    repositories = Repositories(registry)
    with rehearsal(registry), repositories.rehearsal():
        repositories.change("team/sql", private)
        assert repositories.get("team/sql") is not None
    assert repositories.get("team/sql") is None
    assert Repositories(registry).names() == []


def test_a_repository_needs_its_manifests_and_their_blobs(registry: Registry) -> None:
    manifest, blob = sha256_bytes(b"manifest"), sha256_bytes(b"blob")
    repositories = Repositories(registry)
    repository = repositories.change(
        "team/sql", lambda before: with_manifest(before, manifest, OtherManifest("application/x", 8, blobs=(blob,)), {})
    )
    assert needed_blobs(registry.store, repository) == {manifest, blob}
    entry = registry.store.log.entry("team/sql", 1, log="hub")
    assert entry is not None
    assert required_blobs(registry.store, entry[0].digest) >= {manifest, blob}
