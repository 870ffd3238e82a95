"""What processes that share a PostgreSQL and a bucket owe to each other, and to their clients."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.operations import health
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage.postgres import PostgresDatabase
from adapterhub.hub.storage.shared_storage import SharedStorage, open_bucket
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.ref_log import Entry
from adapterhub_converters.errors import AdapterhubError, RefusedError, RemoteError, UsageError
from tests.hub.conftest import Running, client, run_hf, serving
from tests.hub.crowd import push_and_pull
from tests.hub.sending import Sending
from tests.support.adapters import write_adapter
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer
Open = Callable[..., SharedStorage]
AWAY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}


# ---- moves


def test_a_move_of_one_process_is_seen_by_the_next_request_of_another(opened: Open, adapter: Callable[..., Path]) -> None:
    first, second = opened("one"), opened("other")
    with first.registry() as mine, second.registry() as theirs:
        pushed = mine.push(adapter(1), Ref("team/sql"))
        second.refresh(theirs)
        assert theirs.resolve(Ref("team/sql")).digest == pushed.digest
        assert [row.name for row in theirs.list()] == ["team/sql"]
        again = theirs.push(adapter(2), Ref("team/sql"), expect=pushed.digest)
        first.refresh(mine)
        assert mine.resolve(Ref("team/sql")).digest == again.digest


def test_of_racing_pushes_each_gets_a_number_of_its_own(opened: Open, adapter: Callable[..., Path]) -> None:
    storages = [opened(name) for name in ("one", "other")]
    folders = [adapter(seed) for seed in range(8)]

    def push(number: int) -> int:
        with storages[number % 2].registry() as registry:
            return registry.push(folders[number], Ref("team/sql")).number

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(push, range(8))) == list(range(1, 9))
    for storage in storages:
        with storage.registry() as registry:
            storage.refresh(registry)
            assert [row.number for row in registry.list()] == list(range(8, 0, -1))


def test_an_entry_whose_writer_was_killed_before_its_mirror_had_it_is_there(opened: Open, adapter: Callable[..., Path]) -> None:
    storage = opened()
    with storage.registry() as registry:
        version = registry.push(adapter(1), Ref("team/sql"))
        head = registry.ledger.current("team/sql").head
        entry = Entry("team/sql", 2, "tag", "2026-01-01T00:00:00Z", version.digest, 1, 1, ("prod",), head)
        assert storage.database.append("refs", "team/sql", 2, entry.dump())
        storage.refresh(registry)
        assert registry.resolve(Ref("team/sql", tag="prod")).number == 1


def test_a_version_that_cannot_be_fetched_now_is_indexed_once_it_can(opened: Open, adapter: Callable[..., Path]) -> None:
    first, second = opened("one"), opened("other")
    with first.registry() as mine, second.registry() as theirs:
        mine.push(adapter(1), Ref("team/sql"))
        bucket = second._blobs.bucket
        second._blobs.bucket = open_bucket("s3://bucket/away", AWAY)
        second._blobs.bucket._retries = 0  # or it waits for minutes
        with pytest.raises(RemoteError):
            second.refresh(theirs)
        second._blobs.bucket = bucket
        second.refresh(theirs)
        assert theirs.list() == mine.list()


def test_a_new_process_has_everything_and_one_that_is_back_goes_on(opened: Open, adapter: Callable[..., Path]) -> None:
    with opened("one").registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        with opened("late").registry() as late:
            assert late.list() == registry.list()
        registry.push(adapter(2), Ref("team/sql"))
        with opened("late").registry() as late:
            assert late.list() == registry.list()


def test_what_the_bucket_did_not_take_of_the_log_it_gets_later(
    opened: Open, adapter: Callable[..., Path], places: dict[str, Any]
) -> None:
    storage, bucket = opened(), open_bucket(places["blobs"], places["environ"])
    with storage.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        assert bucket.read("refs/team/sql/00000001.json", 1000)
        bucket.remove("refs/team/sql/00000001.json")
        storage.database.execute("UPDATE entries SET copied = false")
        registry.push(adapter(2), Ref("team/sql"))
    assert [key for key, *_ in sorted(bucket.objects("refs"))] == [f"refs/team/sql/0000000{n}.json" for n in (1, 2)]


def test_nothing_is_moved_where_the_bucket_takes_no_blobs(opened: Open, adapter: Callable[..., Path]) -> None:
    storage = opened("one", environ=AWAY)
    storage._blobs.bucket._retries = 0  # or it waits for minutes
    with storage.registry() as registry, pytest.raises(RemoteError):
        registry.push(adapter(1), Ref("team/sql"))
    assert storage.database.rows_after(0, 1) == []


# ---- a database that is away


def test_a_hub_whose_database_was_away_answers_again_at_the_first_request(
    postgres: Postgres, places: dict[str, Any], adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresDatabase, "_connect_seconds", 1)
    with serving(tmp_path / "hub", **places) as hub:
        client = Sending(hub.url, hub.token)
        assert client.push("team/sql", adapter(1)).status == 200
        requests = [
            lambda: client.push("team/sql", adapter(2)),
            lambda: client.ask("GET", "/api/models/team/sql"),
            lambda: client.ask("GET", "/v2/team/sql/manifests/latest"),
            lambda: client.ask("GET", "/team/sql"),
        ]
        postgres.stop()
        try:
            for answer in [ask() for ask in requests]:
                words = answer.data.decode()
                assert answer.status == 503
                assert ("no connection to the database" in words, "postgresql" in words) == (True, False)
                assert answer.headers["retry-after"] == "5"
            assert client.ask("GET", "/ready").status == 503
        finally:
            postgres.start()
        assert [ask().status for ask in requests] == [200] * len(requests)
        with hub.registry() as registry:
            assert [row.number for row in registry.list("team/sql")] == [2, 1]


# ---- the bucket


def test_the_bucket_is_one_that_adapterhub_pulls_from(
    opened: Open, adapter: Callable[..., Path], places: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    with opened().registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    run("pull", f"{places['blobs']}/team/sql", "-o", "out", env=places["environ"])
    for path in adapter(1).iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_copies_that_nobody_used_lately_make_room_and_come_back(opened: Open, adapter: Callable[..., Path]) -> None:
    storage = opened("one", cache=1)
    with storage.registry() as registry:
        version = registry.push(adapter(1), Ref("team/sql"))
        storage.store().trim()
        blobs = list(registry.store.blobs())
        for path in blobs:
            os.utime(path, (0, 0))
        storage.store().trim()
        assert blobs
        assert list(registry.store.blobs()) == []
        for layer in registry.files(version):
            with registry.store.open_blob(layer.digest) as file:
                assert hashlib.sha256(file.read()).hexdigest() == layer.digest.removeprefix("sha256:")


def test_what_killed_processes_left_is_removed_and_what_is_in_use_stays(opened: Open, adapter: Callable[..., Path]) -> None:
    storage = opened("one", cache=1)
    root = storage.store().root
    with storage.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        for path in registry.store.blobs():
            os.utime(path, (0, 0))
    old = [root / "tmp" / "a.upload", root / "tmp" / "b.xorb", root / "leases" / f"{'0' * 24}.lease", root / "cache" / "c"]
    new = [root / "tmp" / "d.upload", root / "cache" / "e"]
    for path in (*old, *new):
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if path.parent.name == "cache" else path.write_bytes(b"{}")
    for path in old:
        os.utime(path, (0, 0))
    with storage.store().lease("hub"):
        storage.remove_stale()
        names = [path.name for path in (root / "leases").iterdir()]
    assert sorted(path.name for folder in ("tmp", "cache") for path in (root / folder).iterdir()) == ["d.upload", "e"]
    assert len(names) == 1
    assert names[0] != old[2].name
    assert list(storage.store().blobs()) == []


def test_a_blob_that_is_damaged_in_the_bucket_is_not_taken(
    opened: Open, adapter: Callable[..., Path], places: dict[str, Any]
) -> None:
    with opened("one").registry() as registry:
        layer = registry.files(registry.push(adapter(1), Ref("team/sql")))[0]
    bucket = open_bucket(places["blobs"], places["environ"])
    bucket.put_object(f"blobs/sha256/{layer.digest.removeprefix('sha256:')}", bytes(layer.size))
    with pytest.raises(AdapterhubError, match="do not have the digest"):
        opened("other").store().open_stream(layer.digest)


# ---- folders


def test_a_folder_with_adapters_of_its_own_and_one_of_another_hub_are_refused(
    opened: Open, tmp_path: Path, postgres: Postgres, adapter: Callable[..., Path]
) -> None:
    with Registry.init(tmp_path / "own") as registry:
        registry.push(adapter(1), Ref("team/sql"))
    says = "own: has a registry of its own, .* Name another folder; `hub migrate` takes adapters along"
    with pytest.raises(RefusedError, match=says):
        opened("own")
    opened("one").close()
    with pytest.raises(
        RefusedError, match="one: has copies of another hub than that of .* Remove the folder, or name another one"
    ):
        opened("one", database=postgres.database())
    with pytest.raises(UsageError):
        opened("one", blobs="")


# ---- clients


def test_many_clients_push_and_pull_at_once_and_nothing_is_lost(hub: Running, tmp_path: Path) -> None:
    assert push_and_pull(hub, write_adapter, tmp_path) > 0


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def ask(method: str, url: str, token: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """An answer, redirects not followed."""
    request = urllib.request.Request(url, method=method, headers={"authorization": f"Bearer {token}", **headers})
    try:
        with urllib.request.build_opener(_Stay).open(request) as answer:
            return answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {key.lower(): value for key, value in error.headers.items()}, error.read()


@pytest.mark.parametrize("proxy", [False, True])
def test_weights_come_from_the_bucket_or_through_the_hub(
    proxy: bool, places: dict[str, Any], tmp_path: Path, large: Path
) -> None:
    name = "adapter_model.safetensors"
    data = (large / name).read_bytes()
    with serving(tmp_path / "in", **places) as server:
        client(server, tmp_path).create_repo("team/sql")
        client(server, tmp_path).upload_folder(folder_path=large, repo_id="team/sql")
    with serving(tmp_path / "hub", proxy_blobs=proxy, **places) as hub:
        url = f"{hub.url}/team/sql/resolve/main/{name}"
        status, head, _ = ask("HEAD", url, hub.token)
        assert (status, head["content-length"], head["x-linked-size"]) == (200, str(len(data)), str(len(data)))
        status, headers, body = ask("GET", url, hub.token, range="bytes=1000000-1000009")
        if proxy:
            assert (status, body) == (206, data[1000000:1000010])
        else:
            assert (status, headers["x-linked-size"], headers["etag"]) == (302, str(len(data)), head["etag"])
            assert urllib.request.urlopen(headers["location"]).read() == data
        run_hf(hub, tmp_path, "download", "team/sql", "--local-dir", str(tmp_path / "out"))
        assert (tmp_path / "out" / name).read_bytes() == data
        assert not any(path.stat().st_size > 256 << 10 for path in (hub.folder / "mirror" / "blobs" / "sha256").iterdir())


def test_an_address_of_the_bucket_is_given_only_to_whom_may_read(hub: Running, hf: Any, large: Path) -> None:
    hf.create_repo("alice/secret", private=True)
    hf.upload_folder(folder_path=large, repo_id="alice/secret")
    url = f"{hub.url}/alice/secret/resolve/main/adapter_model.safetensors"
    assert ask("GET", url, hub.make_token("eve", "read", namespaces=["eve"]))[0] == 404
    assert ask("GET", url, hub.token)[0] == 302


def test_the_log_of_a_process_has_no_credentials(places: dict[str, Any]) -> None:
    url = places["database"].replace("postgres@", "postgres:secret-word@")
    with closing(PostgresDatabase(url)) as database:
        assert "secret-word" not in database.location
    assert "secret-word" not in repr(HubSettings(registry=Path("x"), **{**places, "database": url}))


def test_a_process_is_ready_as_long_as_its_bucket_takes_writes(opened: Open) -> None:
    storage = opened()
    assert [check.state for check in health.checks(storage)] == ["ok", "ok", "ok"]
    storage._blobs.bucket = open_bucket("s3://bucket/away", AWAY)
    storage._blobs.bucket._retries = 0  # or it waits for minutes
    assert [check.state for check in health.checks(storage)] == ["ok", "error", "ok"]


def test_metrics_tell_of_the_connections_and_the_bucket(tmp_path: Path, places: dict[str, Any]) -> None:
    with serving(tmp_path / "hub", **places) as running:
        urllib.request.urlopen(f"{running.url}/ready").close()  # writes to the bucket
        request = urllib.request.Request(f"{running.url}/metrics", headers={"authorization": f"Bearer {running.token}"})
        with urllib.request.urlopen(request) as answer:
            numbers = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    assert float(numbers['hub_database_connections{state="used"}']) + float(numbers['hub_database_connections{state="idle"}'])
    assert float(numbers["hub_database_waiting"]) == 0
    assert (float(numbers["hub_bucket_requests_total"]) > 0, float(numbers["hub_bucket_failures_total"])) == (True, 0)
    assert float(numbers['hub_queued{queue="log entries without a copy"}']) == 0
