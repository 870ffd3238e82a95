"""registry.db that is missing, broken, old or of a newer program: rebuilt, caught up or refused by name."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.maintenance.fsck import fsck
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import (
    IntegrityError,
    RefusedError,
)
from tests.registry.test_registry import SQL, Make, errors, ref
from tests.support.registries import new_registry


@pytest.fixture(params=["local", "packed"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with new_registry(request.param, tmp_path / "registry", monkeypatch) as opened:
        yield opened


def test_a_deleted_or_broken_database_is_rebuilt(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), ref("team/sql:prod"))
    registry.push(make("a"), ref("team/gone"))
    registry.rm(ref("team/gone"))
    before, names = registry.list(), queries.names(registry.index)
    registry.close()
    for suffix in ("", "-wal", "-shm"):
        (registry.root / f"registry.db{suffix}").unlink(missing_ok=True)
    with Registry.open(registry.root) as again:
        assert (again.list(), queries.names(again.index)) == (before, names)
        again.rebuild_index()
        assert (again.list(), queries.names(again.index)) == (before, names)
        assert errors(again) == []


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"SQLite format 3\0" + bytes(84), "foreign"])
def test_a_file_that_is_no_registry_is_one_line_with_a_way_out(registry: Registry, make: Make, content: bytes | str) -> None:
    registry.push(make(), SQL)
    registry.close()
    path = registry.root / "registry.db"
    path.unlink()
    if isinstance(content, str):
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE t (x)")
        db.close()
    else:
        path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not an adapterhub registry. Rebuild the index") as caught:
        Registry.open(path)
    assert caught.value.code == "broken-index"
    path.unlink()
    with Registry.open(path) as again:
        assert again.resolve(SQL).number == 1


def test_a_damaged_database_is_one_line(registry: Registry, make: Make) -> None:
    registry.push(make(), SQL)
    registry.close()
    path = registry.root / "registry.db"
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    path.write_bytes(raw)
    with (
        pytest.raises(IntegrityError, match="a broken registry .* Rebuild the index"),
        Registry.open(path) as again,
    ):
        again.list()


def test_a_newer_database_is_named(registry: Registry) -> None:
    registry.close()
    with sqlite3.connect(registry.root / "registry.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(
        RefusedError, match=r"made by a newer adapterhub \(index version 99; this one supports \d+\). Upgrade adapterhub"
    ) as caught:
        Registry.open(registry.root)
    assert caught.value.code == "newer-index"


def test_a_database_restored_from_an_old_backup_catches_up(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make("a"), SQL)
    registry.close()
    shutil.copy(registry.root / "registry.db", tmp_path / "backup")
    with Registry.open(registry.root) as later:
        later.push(make("b", 1), SQL)
    for path in registry.root.glob("registry.db*"):
        path.unlink()
    shutil.copy(tmp_path / "backup", registry.root / "registry.db")
    with Registry.open(registry.root) as again:
        assert [row.number for row in again.list()] == [2, 1]
        assert fsck(again) == []
        assert again.resolve(SQL).number == 2
        assert again.push(make("c", 2), SQL).number == 3


def test_an_index_without_its_store_is_no_registry_and_is_not_filled_anew(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.close()
    registry.store.root.rename(registry.root / "elsewhere")
    with pytest.raises(IntegrityError) as error:
        Registry.open(registry.root)
    assert error.value.where == str(registry.store.root)
    assert error.value.what == "the store is missing, and registry.db contains no adapters itself"
    assert error.value.hint == "Restore the store from a backup"
    assert not registry.store.root.exists()
