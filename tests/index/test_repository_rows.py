"""The rows of repositories are what their logs say, whoever wrote them, and however the index came to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.index import repository_rows
from adapterhub.index.repository_rows import RepositoryRow
from adapterhub.registry.registry import Registry
from adapterhub.registry.rehearsal import rehearsal
from adapterhub.registry.repository_records import Repositories
from adapterhub.store.ref_log import RefLog
from adapterhub.store.store import HUB
from adapterhub_converters.errors import LocalIOError

EVERYTHING = [RepositoryRow("team/open"), RepositoryRow("team/secret", private=True)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry with a public repository, a private one, and one that was removed."""
    with Registry.init(tmp_path / "registry") as opened:
        repositories = Repositories(opened)
        repositories.change("team/open", lambda state: state)
        repositories.change("team/secret", lambda state: replace(state, private=True))
        repositories.change("team/gone", lambda state: state)
        repositories.remove("team/gone")
        yield opened


def rows(registry: Registry) -> list[RepositoryRow]:
    return [row for row in repository_rows.changed_after(registry.index, 0) if not row.removed]


def test_lists_are_read_from_the_rows(registry: Registry) -> None:
    index = registry.index
    assert rows(registry) == EVERYTHING
    assert repository_rows.names_after(index, "", 9, ()) == repository_rows.names_without_versions(index)
    assert repository_rows.names_after(index, "team/open", 9, ()) == ["team/secret"]
    assert repository_rows.names_after(index, "", 9, {"team/open"}) == ["team/secret"]
    assert repository_rows.restricted(index) == EVERYTHING[1:]
    assert repository_rows.restricted_among(index, ["team/open", "team/gone"]) == []
    assert repository_rows.namespaces(index) == {"team"}


def test_only_a_row_that_differs_is_written(registry: Registry) -> None:
    change = repository_rows.last_change(registry.index)
    Repositories(registry).change("team/open", lambda state: replace(state, tags={"a": "sha256:" + "0" * 64}))
    assert repository_rows.changed_after(registry.index, change) == []
    Repositories(registry).change("team/open", lambda state: replace(state, private=True))
    assert repository_rows.changed_after(registry.index, change) == [RepositoryRow("team/open", private=True)]


def test_a_rebuilt_index_and_a_deleted_one_have_the_same_rows(registry: Registry) -> None:
    assert registry.ledger.rebuild() == []
    assert rows(registry) == EVERYTHING
    registry.close()
    (registry.root / "registry.db").unlink()
    with Registry.open(registry.root) as again:
        assert rows(again) == EVERYTHING


def test_a_change_of_a_process_that_was_killed_before_its_row_was_written_is_found(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(repository_rows, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Repositories(registry).change("team/open", lambda state: replace(state, private=True))
    assert rows(registry) == EVERYTHING
    with Registry.open(registry.root) as again:
        assert repository_rows.row(again.index, "team/open") == RepositoryRow("team/open", private=True)


def test_a_refused_and_a_rehearsed_change_leave_the_row(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    repositories = Repositories(registry)
    with rehearsal(registry), repositories.rehearsal():
        repositories.change("team/open", lambda state: replace(state, private=True))
        assert repository_rows.row(registry.index, "team/open") == RepositoryRow("team/open", private=True)

    def full(*_: object, **__: object) -> bool:
        raise LocalIOError("disk", "full")

    monkeypatch.setattr(RefLog, "append", full)
    with pytest.raises(LocalIOError):
        repositories.remove("team/open")
    assert rows(registry) == EVERYTHING


def test_a_record_that_cannot_be_read_is_hidden(registry: Registry) -> None:
    entry = registry.store.log.entry("team/open", 1, log=HUB)
    assert entry
    path = registry.store.blob_path(entry[0].digest)
    path.chmod(0o600)
    path.write_bytes(b"{")
    registry.ledger.rebuild()
    assert repository_rows.row(registry.index, "team/open") == RepositoryRow("team/open", private=True)
