"""A store takes in whole files with the right bytes, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.index import index_database
from adapterhub.index.index_opening import create_index
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.verify import verify
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry, Store
from adapterhub_converters.errors import (
    IntegrityError,
)
from tests.registry.test_registry import SQL, Make, flip
from tests.support.registries import new_registry


@pytest.fixture(params=["local", "packed"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with new_registry(request.param, tmp_path / "registry", monkeypatch) as opened:
        yield opened


def lies(store: Store, digest: str) -> Path:
    """The file of a blob, plain or packed."""
    plain = store.blob_path(digest)
    return plain if plain.exists() else store.packs.path(digest)


def test_wrong_bytes_leave_nothing_behind(registry: Registry, make: Make, tmp_path: Path) -> None:
    version = registry.push(make(), SQL)
    for layer in registry.files(version):
        path = lies(registry.store, layer.digest)
        flip(path)
        with pytest.raises(IntegrityError, match=path.name):
            registry.pull(SQL, tmp_path / "out" / "x")
        assert list((tmp_path / "out").iterdir()) == []
        assert layer.path in " ".join(map(str, verify(registry, SQL)))
        assert any(finding.code in ("flipped", "broken-pack") for finding in fsck(registry))
        flip(path)
    assert fsck(registry) == verify(registry, SQL) == []


def test_what_a_killed_push_left_is_swept_a_day_later(registry: Registry, make: Make) -> None:
    fresh, old = registry.store.root / "tmp" / "fresh", registry.store.root / "tmp" / "old"
    for path in (fresh, old):
        path.write_text("half a blob")
    os.utime(old, (0, 0))
    registry.push(make(), SQL)
    assert (fresh.exists(), old.exists()) == (True, False)


def test_a_file_system_without_hard_links_works(registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    registry.push(make("a"), SQL)
    assert registry.push(make("b", 1), SQL).number == 2
    assert not registry.store.log.append(Entry("team/sql", 2, "delete", "t"))
    create_index(registry.root / "other.db", registry.store)
    assert index_database.is_ours(registry.root / "other.db")
    assert fsck(registry) == []


def test_files_that_change_while_they_are_read_are_refused(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make()
    put_stream = Store.put_stream

    def slow(store: Store, file: object, **options: Any) -> object:
        result = put_stream(store, file, **options)
        (source / "README.md").write_text("changed")
        return result

    monkeypatch.setattr(Store, "put_stream", slow)
    with pytest.raises(IntegrityError, match="README.md: changed while it was read"):
        registry.push(source, SQL)
    assert registry.list() == []
