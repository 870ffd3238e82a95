"""What a gc removes from the bucket of a hub, and all that it must not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import access_control
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.storage.bucket_blobs import blob_key
from adapterhub.hub.storage.bucket_gc import collect
from adapterhub.hub.storage.from_settings import open_database, open_storage
from adapterhub.hub.storage.shared_storage import SharedStorage
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.store_files import StoreFiles
from adapterhub_converters.errors import ParameterError, RefusedError
from tests.conftest import Run
from tests.hub.conftest import serving
from tests.hub.sending import WEIGHTS, Sending, lines_of
from tests.support.hub_tenants import Tenant
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a grace period of zero, as if all that is unneeded had been so for a day."""
    monkeypatch.setattr("adapterhub.hub.storage.bucket_gc.MIN_GRACE", 0)


@pytest.fixture
def storage(opened: Callable[..., SharedStorage]) -> SharedStorage:
    """That of a process which also collects."""
    return opened()


@pytest.fixture
def registry(storage: SharedStorage) -> Iterator[Registry]:
    with storage.registry() as opened_registry:
        yield opened_registry


def stored_digests(storage: SharedStorage) -> set[str]:
    return {f"sha256:{key.rpartition('/')[2]}" for key, *_ in storage.bucket.objects("blobs/sha256")}


def forget(storage: SharedStorage) -> None:
    """Have an hour pass for a process, in which it may have relied on what it noted."""
    storage._blobs.noted.clear()
    storage._blobs.relied.clear()


def test_what_no_version_needs_any_more_goes_and_comes_back_when_it_is_pushed_again(
    storage: SharedStorage, registry: Registry, adapter: Callable[..., Path]
) -> None:
    registry.push(adapter(1), Ref("team/sql"))
    needed = stored_digests(storage)
    registry.push(adapter(2), Ref("team/other"))
    needed_and_unneeded = stored_digests(storage)
    registry.rm(Ref("team/other"))
    planned = collect(storage, grace=0, dry_run=True)
    assert stored_digests(storage) == needed_and_unneeded
    swept = collect(storage, grace=0)
    assert stored_digests(storage) == needed
    assert planned.blobs == swept.blobs == len(needed_and_unneeded - needed)
    assert planned.size == swept.size > 0
    assert collect(storage, grace=0).blobs == 0
    forget(storage)
    registry.push(adapter(2), Ref("team/again"))
    assert stored_digests(storage) == needed_and_unneeded


def test_a_second_gc_reads_only_what_was_pushed_since(
    storage: SharedStorage, registry: Registry, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_file = list[str](), StoreFiles.open

    def counting(files: StoreFiles, path: Path) -> object:
        opened.append(path.relative_to(files.root).as_posix())
        return open_file(files, path)

    def gc_opens() -> list[str]:
        opened.clear()
        collect(storage, grace=0)
        return sorted({name for name in opened if name.startswith(("refs/", "blobs/"))})

    monkeypatch.setattr(StoreFiles, "open", counting)
    for seed in range(3):
        registry.push(adapter(seed), Ref("team/sql"))
    assert len(gc_opens()) == 6  # the entries and the manifests
    version = registry.push(adapter(9), Ref("team/sql"))
    entries = ["refs/team/sql/00000003.json", "refs/team/sql/00000004.json"]
    assert gc_opens() == [f"blobs/sha256/{version.digest[7:]}", *entries]
    assert gc_opens() == entries[1:]


def test_versions_that_another_machine_dropped_since_the_last_gc_are_not_needed(
    opened: Callable[..., SharedStorage], storage: SharedStorage, registry: Registry, adapter: Callable[..., Path]
) -> None:
    for seed in range(2):
        registry.push(adapter(seed), Ref(f"team/a{seed}"))
    collect(storage, grace=0)
    needed = stored_digests(storage)
    other_storage = opened("two")
    with other_storage.registry() as elsewhere:
        elsewhere.rm(Ref("team/a0"))
        elsewhere.push(adapter(2), Ref("team/a2"))
        collect(other_storage, grace=0)
        elsewhere.rm(Ref("team/a2"))
    collect(storage, grace=0)
    version = registry.resolve(Ref("team/a1"))
    manifest = registry.oci_manifest(version)
    assert (
        stored_digests(storage)
        == {version.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
        < needed
    )


def test_what_was_stored_noted_or_let_go_within_the_grace_period_stays(
    storage: SharedStorage, registry: Registry, adapter: Callable[..., Path]
) -> None:
    registry.push(adapter(1), Ref("team/sql"))
    registry.rm(Ref("team/sql"))
    assert collect(storage, grace=24).waiting == len(stored_digests(storage)) > 0
    noted = min(stored_digests(storage))
    storage.database.execute("UPDATE held SET time = 'infinity' WHERE digest = ?", noted)
    collect(storage, grace=0)
    assert stored_digests(storage) == {noted}


def test_parts_of_uploads_go_once_no_client_can_go_on_with_them(
    storage: SharedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.bucket.put_object("tmp/a.xorb", bytes(10))
    assert collect(storage, grace=0).leftovers == 0
    monkeypatch.setattr("adapterhub.hub.storage.bucket_gc._PART_LIFETIME", -60)
    assert collect(storage, grace=0, dry_run=True).leftover_size == 10
    assert [key.rpartition("/")[2] for key, *_ in storage.bucket.objects("tmp")] == ["a.xorb"]
    assert collect(storage, grace=0).leftovers == 1
    assert list(storage.bucket.objects("tmp")) == []


def test_versions_that_need_not_be_kept_go_with_their_blobs(
    storage: SharedStorage, registry: Registry, adapter: Callable[..., Path]
) -> None:
    for seed in range(3):
        registry.push(adapter(seed), Ref("team/sql"))
    swept = collect(storage, grace=0, last=1)
    assert [str(ref) for ref in swept.dropped] == ["team/sql:v1", "team/sql:v2"]
    version = registry.resolve(Ref("team/sql"))
    manifest = registry.oci_manifest(version)
    assert stored_digests(storage) == {version.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}


def test_uploads_and_commits_of_a_hub_that_serves_stay(
    storage: SharedStorage, places: dict[str, Any], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    with serving(tmp_path / "hub", **places) as hub:
        client, note = Sending(hub.url, hub.token), b"# Not an adapter yet\n"
        client.ask("POST", "/api/repos/create", {"name": "team/notes"})
        assert client.commit("team/notes", lines_of({"README.md": note})).status == 200
        weights = (adapter(1) / WEIGHTS).read_bytes()
        client.ask("POST", "/api/repos/create", {"name": "team/sql"})
        assert client.send("team/sql", weights).status == 200  # type: ignore[union-attr]
        collect(storage, grace=0)
        assert f"sha256:{hashlib.sha256(weights).hexdigest()}" in stored_digests(storage)
        assert client.push("team/sql", adapter(1)).status == 200
        assert client.ask("GET", "/team/notes/resolve/main/README.md").data == note
        client.ask("DELETE", "/api/repos/delete", {"name": "team/sql"})
        storage.database.execute("DELETE FROM uploaded")  # a day later
        assert collect(storage, grace=0).blobs > 0
        assert client.ask("GET", "/team/notes/resolve/main/README.md").data == note
        assert client.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}").status == 404


def test_who_stores_a_blob_that_is_being_removed_waits_and_stores_it(storage: SharedStorage, postgres: Postgres) -> None:
    data = b"stored twice"
    digest, _ = storage.store().put_bytes(data)
    forget(storage)
    with ThreadPoolExecutor(1) as pool:
        with storage.database.lock_unnoted([digest], 0) as removed:
            assert removed == [digest]
            storing = pool.submit(storage.store().put_bytes, data)
            while postgres.sql("postgres", "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == "0":
                assert not storing.done()
            storage.bucket.remove(blob_key(digest))
        storing.result()
    assert stored_digests(storage) == {digest}
    with storage.database.lock_unnoted([digest], 1) as removed:
        assert removed == []


def test_a_new_database_in_place_of_a_lost_one_removes_nothing(
    opened: Callable[..., SharedStorage], registry: Registry, postgres: Postgres, adapter: Callable[..., Path]
) -> None:
    registry.push(adapter(1), Ref("team/sql"))
    new = opened("new", database=postgres.database())
    before = stored_digests(new)
    with pytest.raises(RefusedError, match="which the database lacks"):
        collect(new, grace=0)
    assert stored_digests(new) == before


def test_the_command_says_what_it_removed(
    storage: SharedStorage, registry: Registry, places: dict[str, Any], adapter: Callable[..., Path], run: Run
) -> None:
    registry.push(adapter(1), Ref("team/sql"))
    registry.rm(Ref("team/sql"))
    env = {**places["environ"], "ADAPTERHUB_DATABASE": places["database"], "ADAPTERHUB_BLOBS": places["blobs"]}
    document = json.loads(run("--registry", "copies", "hub", "gc", "--json", env=env).stdout)
    assert (document["blobs"], document["waiting"]) == (0, len(stored_digests(storage)))


def test_a_grace_period_that_is_too_short_is_refused(storage: SharedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub.hub.storage.bucket_gc.MIN_GRACE", 2)
    says = "grace: 1 h is too short for uploads in progress. Set at least 2"
    with pytest.raises(ParameterError, match=says):
        collect(storage, grace=1)


def test_what_a_refused_change_has_stored_counts_until_a_gc_has_its_bytes(
    tmp_path: Path, places: dict[str, Any], adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest of 4 MB for a protected tag was stored, refused and counted for nobody, as often as one liked."""
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    with serving(tmp_path / "hub", **places) as hub:
        team = Tenant(hub, "team", "admin")
        team.create("sql")
        assert team.upload("sql", adapter(1)).status_code == 200
        assert team.request("PUT", "/api/adapterhub/v1/names/team/sql/tags/prod", json={"reference": "v1"}).ok
        assert team.request("PUT", "/api/adapterhub/v1/names/team/sql/tags/prod/protection").ok
        with closing(open_database(hub.settings)) as database:
            accounts.set_namespace(database, Namespace("team", max_bytes=1_000_000))
        kind = {"content-type": MANIFEST_TYPE}
        manifest = team.get("/v2/team/sql/manifests/v1", headers={"accept": MANIFEST_TYPE}).json()
        answers = []
        for number in range(6):
            document = {**manifest, "annotations": {"note": str(number) * 300_000}}
            answers.append(team.request("PUT", "/v2/team/sql/manifests/prod", data=json.dumps(document), headers=kind))
        assert "protected" in answers[0].text
        assert "may hold 1,000,000 bytes" in answers[-1].text
        with closing(open_storage(hub.settings)) as storage:
            assert isinstance(storage, SharedStorage)
            assert sum(size for _, size, _ in storage.bucket.objects("blobs/sha256")) < 1_100_000
