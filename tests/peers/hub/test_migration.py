"""A hub moved from a folder into PostgreSQL and a bucket, and back; and one whose database was lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage import migration
from adapterhub.hub.storage.from_settings import open_storage
from adapterhub.hub.storage.postgres import PostgresDatabase
from adapterhub.hub.storage.shared_storage import open_bucket
from adapterhub.maintenance import fsck
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_documents import Repository
from adapterhub.registry.repository_records import Repositories
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, RefusedError
from tests.conftest import Run
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer
PRIVATE = Repository(private=True, created="2026-01-01T00:00:00Z")


@pytest.fixture
def folder(tmp_path: Path, adapter: Callable[..., Path]) -> Path:
    """The folder of a hub with three versions, a removed name, a repository, two tokens."""
    path = tmp_path / "hub"
    with Registry.init(path) as registry:
        for name, seed in (("team/sql", 1), ("team/sql", 2), ("team/old", 3)):
            registry.push(adapter(seed), Ref(name, tag="dev"))
        registry.rm(Ref("team/old"))
        Repositories(registry).change("team/empty", lambda _: PRIVATE)
    with closing(HubDatabase(path)) as database:
        for account in ("alice", "bob"):
            access_tokens.create(database, account, "write")
    return path


def logs(root: Path) -> dict[str, bytes]:
    """Every entry of a store."""
    paths = (path for log in ("refs", "hub") for path in (root / log).rglob("*.json"))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def blobs(root: Path) -> dict[str, bytes]:
    """Every blob of a store."""
    return {path.name: path.read_bytes() for path in (root / "blobs" / "sha256").iterdir()}


@pytest.fixture
def ends(places: dict[str, Any]) -> Any:
    """An empty database and an empty bucket."""
    with closing(PostgresDatabase(places["database"])) as database:
        yield database, open_bucket(places["blobs"], places["environ"])


def test_a_hub_moves_in_and_out_with_every_byte(folder: Path, tmp_path: Path, ends: Any) -> None:
    database, bucket = ends
    moved = migration.move_in(folder, database, bucket)
    assert moved.entries == 5
    assert migration.move_out(database, bucket, tmp_path / "back").entries == 5
    assert logs(tmp_path / "back" / ".adapterhub") == logs(folder / ".adapterhub")
    assert blobs(tmp_path / "back" / ".adapterhub") == blobs(folder / ".adapterhub")
    with closing(HubDatabase(folder)) as before, closing(HubDatabase(tmp_path / "back")) as after:
        assert access_tokens.list_tokens(before) == access_tokens.list_tokens(after)
    with Registry.open(folder) as before, Registry.open(tmp_path / "back") as after:
        assert before.list() == after.list()
        assert not [finding for finding in fsck.fsck(after) if finding.severity == "error"]


def test_a_hub_that_moved_in_serves_what_it_served(folder: Path, tmp_path: Path, places: dict[str, Any], ends: Any) -> None:
    migration.move_in(folder, *ends)
    settings = HubSettings(registry=tmp_path / "copies", **places)
    with closing(open_storage(settings)) as storage, storage.registry() as registry, Registry.open(folder) as before:
        assert registry.list() == before.list()
        assert Repositories(registry).get("team/empty") == PRIVATE
        assert access_tokens.create(storage.database, "carol", "read")  # its number is not one that another token has
        assert [token.account for token in access_tokens.list_tokens(storage.database)] == ["alice", "bob", "carol"]


def test_only_an_empty_database_and_a_new_folder_are_filled(folder: Path, ends: Any) -> None:
    database, bucket = ends
    migration.move_in(folder, database, bucket)
    with pytest.raises(RefusedError):
        migration.move_in(folder, database, bucket)
    with pytest.raises(AdapterhubError, match="exists"):
        migration.move_out(database, bucket, folder)


def test_a_damaged_blob_moves_nowhere(folder: Path, ends: Any) -> None:
    database, bucket = ends
    path = max((folder / ".adapterhub" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(IntegrityError):
        migration.move_in(folder, database, bucket)
    assert database.rows_after(0, 1) == []
    assert bucket.size(f"blobs/sha256/{path.name}") is None


def test_a_lost_database_is_made_again_from_the_bucket(
    folder: Path, tmp_path: Path, places: dict[str, Any], ends: Any, postgres: Postgres
) -> None:
    database, bucket = ends
    migration.move_in(folder, database, bucket)
    new = postgres.database()
    with closing(PostgresDatabase(new)) as empty:
        assert migration.recover(empty, bucket) == 5
        assert [row[1:] for row in empty.rows_after(0, 9)] == sorted(row[1:] for row in database.rows_after(0, 9))
        with pytest.raises(RefusedError):
            migration.recover(empty, bucket)
    settings = HubSettings(registry=tmp_path / "copies", **{**places, "database": new})
    with closing(open_storage(settings)) as storage, storage.registry() as registry, Registry.open(folder) as before:
        assert registry.list() == before.list()


def test_an_entry_in_the_place_of_another_is_not_moved_out(folder: Path, tmp_path: Path, ends: Any) -> None:
    database, bucket = ends
    migration.move_in(folder, database, bucket)
    raw = next(row.raw for row in database.rows_after(0, 9) if (row.name, row.seq) == ("team/sql", 2))
    assert database.append("refs", "team/other", 1, raw)
    with pytest.raises(FormatError, match="refs/team/other/1: contains entry 2 of team/sql"):
        migration.move_out(database, bucket, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_log_with_a_hole_is_not_recovered(folder: Path, ends: Any, postgres: Postgres) -> None:
    database, bucket = ends
    migration.move_in(folder, database, bucket)
    bucket.remove("refs/team/sql/00000001.json")
    with closing(PostgresDatabase(postgres.database())) as empty, pytest.raises(IntegrityError, match="entry 1 is missing"):
        migration.recover(empty, bucket)


def test_the_commands_move_a_hub_and_make_a_lost_database_again(
    folder: Path, tmp_path: Path, places: dict[str, Any], postgres: Postgres, run: Run
) -> None:
    env = {**places["environ"], "ADAPTERHUB_DATABASE": places["database"], "ADAPTERHUB_BLOBS": places["blobs"]}
    assert "copied 5 moves" in run("--registry", folder, "hub", "migrate", env=env).stdout
    assert "copied 5 moves" in run("--registry", tmp_path / "back", "hub", "migrate", "--back", env=env).stdout
    listed = json.loads(run("--registry", tmp_path / "nowhere", "--json", "hub", "token", "list", env=env).stdout)
    assert [token["account"] for token in listed["tokens"]] == ["alice", "bob"]
    assert "has a hub already" in run("--registry", folder, "hub", "migrate", env=env, code=6).stderr
    assert "recovered 5 moves" in run("hub", "recover", env={**env, "ADAPTERHUB_DATABASE": postgres.database()}).stdout
