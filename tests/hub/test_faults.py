"""A hub under faults: it is killed, its disk fills, many push at once, a stranger asks. Nothing is lost and nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import urllib3

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_documents import commit_id
from adapterhub_converters.errors import LocalIOError
from tests.conftest import missing
from tests.hub.conftest import Running, serving
from tests.hub.crowd import push_and_pull
from tests.hub.killing import Killable, assert_sound, killable_hub
from tests.hub.sending import WEIGHTS, Sending, commit_of, lines_of
from tests.hub.xet.test_receiving import XORB, Sender, chunk, shard
from tests.support.adapters import write_adapter

BROKEN = (urllib3.exceptions.HTTPError, OSError)


# ---- killed


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Killable]:
    """A hub that can be killed."""
    with killable_hub(tmp_path / "hub") as running:
        yield running


def test_a_hub_that_is_killed_six_times_loses_nothing_that_it_has_taken(killable: Killable, tmp_path: Path) -> None:
    hub = killable.running()
    client = Sending(hub.url, hub.token)
    client.ask("POST", "/api/repos/create", {"name": "team/sql"})
    folders = [write_adapter(tmp_path / f"sql{seed}", seed) for seed in range(6)]
    pieces = os.urandom(3 << 20)

    def cut(data: bytes, at: int) -> Iterator[bytes]:
        yield data[:at]
        killable.kill()
        yield data[at:]

    def in_a_file(folder: Path, at: int) -> None:
        with contextlib.suppress(*BROKEN):
            client.send("team/sql", pieces + bytes([at % 251]), cut(pieces + bytes([at % 251]), at))

    def in_a_xorb(folder: Path, at: int) -> None:
        raw = chunk(pieces[:100_000]) * 20
        sender = Sender(hub, "team/sql", client.token)
        with contextlib.suppress(*BROKEN):
            client.ask("POST", f"{sender.url}/v1/xorbs/default/{XORB}", cut(raw, at), **sender.headers)

    def in_a_commit(folder: Path, at: int) -> None:
        client.send("team/sql", (folder / WEIGHTS).read_bytes())
        lines = commit_of(folder)
        with contextlib.suppress(*BROKEN):
            client.ask("POST", "/api/models/team/sql/commit/main", cut(lines, len(lines) * at // 100))

    def after_a_commit(folder: Path, at: int) -> None:
        """It has the whole commit and works on it; the client never reads its answer."""
        client.send("team/sql", (folder / WEIGHTS).read_bytes())
        lines = commit_of(folder)
        with socket.create_connection(("127.0.0.1", killable.port)) as sock:
            head = f"POST /api/models/team/sql/commit/main HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {client.token}\r\n"
            sock.sendall(f"{head}content-length: {len(lines)}\r\n\r\n".encode() + lines)
            time.sleep(at / 1000)
            killable.kill()

    faults = [
        (in_a_file, 2 << 20), (in_a_xorb, 1_500_000), (in_a_commit, 60),
        (after_a_commit, 1), (after_a_commit, 8), (after_a_commit, 40),
    ]  # fmt: skip
    for (fault, at), folder in zip(faults, folders, strict=True):
        fault(folder, at)
        killable.process.wait()
        killable.start()
        assert client.push("team/sql", folder).status == 200
        killable_head = client.ask("GET", "/api/models/team/sql").json()["sha"]
        assert killable_head == commit_id(oci_manifest.build(folder).digest)
    killable.kill()
    assert_sound(killable.folder)
    with closing(Registry.open(killable.folder)) as registry:
        expected = [oci_manifest.build(folder).digest for folder in folders]
        assert [row.digest for row in reversed(registry.list("team/sql"))] == expected


def test_a_xorb_that_was_taken_is_still_there_after_a_kill(killable: Killable) -> None:
    hub = killable.running()
    client = Sending(hub.url, hub.token)
    client.ask("POST", "/api/repos/create", {"name": "team/sql"})
    sender = Sender(hub, "team/sql", client.token)
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(b"hello"))[0] == 200
    killable.kill()
    killable.start()
    assert sender.post("/v1/shards", shard(hashlib.sha256(b"hello").digest(), [(XORB, 5, 0, 1)]))[0] == 200
    assert client.commit("team/sql", lines_of({}, {"notes.txt": (hashlib.sha256(b"hello").hexdigest(), 5)})).status == 200


# ---- a full disk


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], object]]:
    """A file system of some MiB at a folder; it can be made larger."""
    folder.mkdir()

    def mount(*options: str) -> int:
        return subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode

    if sys.platform != "linux" or not shutil.which("mount") or mount("-o", f"size={size}m"):
        missing("a file system that only root may mount")
    try:
        yield lambda size_mib: subprocess.run(["mount", "-o", f"remount,size={size_mib}m", str(folder)], check=True)
    finally:
        gc.collect()  # the registries of the hub's threads
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_in_words_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"sql{seed}", seed) for seed in range(8)]
    with small_disk(tmp_path / "disk", 16) as grow:
        with serving(tmp_path / "disk" / "hub") as hub:
            client = Sending(hub.url, hub.token)
            assert client.push("team/sql", folders[0]).status == 200
            tmp, filler = hub.folder / ".adapterhub" / "tmp", tmp_path / "disk" / "filler"
            sender = Sender(hub, "team/sql", hub.token)
            for answer in (
                client.send("team/sql", os.urandom(20 << 20)),
                client.commit("team/sql", lines_of({f"{n}.txt": b"x" * (7 << 20) + bytes([n]) for n in range(4)})),
                client.ask("POST", f"{sender.url}/v1/xorbs/default/{XORB}", chunk(os.urandom(100_000)) * 200, **sender.headers),
            ):
                assert answer is not None
                assert (answer.status, "No space left on device" in answer.json()["error"]) == (507, True)
                assert str(tmp_path) not in answer.data.decode()
            assert [path for path in tmp.iterdir() if path.stat().st_size > 0 and path.suffix != ".xorb"] == []
            # What is left of the disk gets smaller and smaller, so that each step of a commit is the one that fails.
            successes = []
            for step, folder in enumerate(folders[1:]):
                free = shutil.disk_usage(tmp_path / "disk").free
                with open(filler, "ab") as file, contextlib.suppress(OSError):
                    file.write(b"x" * max(0, free - (64 - 10 * step) * 4096))
                answer = client.push("team/sql", folder)
                assert answer.status in (200, 507), answer.data
                successes.append(answer.status == 200)
            assert not all(successes)
            filler.unlink()
            grow(64)
            for folder in folders:
                assert client.push("team/sql", folder).status == 200
        assert_sound(tmp_path / "disk" / "hub")


# ---- a folder that is away


def test_a_hub_whose_folder_was_away_goes_on_when_it_is_back(hub: Running, tmp_path: Path) -> None:
    client, first, second = Sending(hub.url, hub.token), write_adapter(tmp_path / "1", 1), write_adapter(tmp_path / "2", 2)
    assert client.push("team/sql", first).status == 200
    hub.folder.rename(tmp_path / "away")
    pushed, download = client.push("team/sql", second), client.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}")
    assert (pushed.status, client.ask("GET", "/ready").status) == (507, 503)
    assert download.status in (500, 507)  # by what the hub still remembers
    assert str(tmp_path) not in (pushed.data + download.data).decode()
    assert not hub.folder.exists()
    (tmp_path / "away").rename(hub.folder)
    assert client.push("team/sql", second).status == 200
    assert client.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}").data == (second / WEIGHTS).read_bytes()
    assert_sound(hub.folder)


def test_tables_that_were_away_are_not_replaced_by_empty_ones(tmp_path: Path) -> None:
    with closing(HubDatabase(tmp_path)) as database, ThreadPoolExecutor(1) as thread:
        (tmp_path / "hub.db").rename(tmp_path / "away.db")
        with pytest.raises(LocalIOError, match="unable to open"):
            thread.submit(database.select, "SELECT * FROM tokens").result()
        (tmp_path / "away.db").rename(tmp_path / "hub.db")
        assert thread.submit(database.select, "SELECT * FROM tokens").result() == []


# ---- many at once


def test_many_clients_push_and_pull_at_once_and_nothing_is_lost(hub: Running, tmp_path: Path) -> None:
    assert push_and_pull(hub, write_adapter, tmp_path) > 0
    assert_sound(hub.folder)


# ---- two tenants


def test_a_tenant_gets_nothing_of_anothers_by_its_digest(hub: Running, tmp_path: Path) -> None:
    theirs, mine = Sending(hub.url, hub.token), Sending(hub.url, hub.make_token("eve", "write", namespaces=["eve"]))
    secret, adapter = write_adapter(tmp_path / "secret", 1, license="secret-license"), write_adapter(tmp_path / "other", 2)
    note = b"the secret of alice"
    theirs.ask("POST", "/api/repos/create", {"name": "alice/secret", "private": True})
    assert theirs.push("alice/secret", secret).status == 200
    assert theirs.commit("alice/secret", lines_of({"notes.txt": note})).status == 200
    assert mine.push("eve/sql", adapter).status == 200
    weights = (secret / WEIGHTS).read_bytes()
    files = {
        WEIGHTS: (hashlib.sha256(weights).hexdigest(), len(weights)),
        "notes.txt": (hashlib.sha256(note).hexdigest(), len(note)),
    }
    # By LFS: to upload it is asked for, to download it is not there.
    for oid, size in files.values():
        assert "upload" in mine.batch("eve/sql", oid, size)["actions"]
        assert "actions" not in mine.batch("eve/sql", oid, size, "download")
        assert mine.ask("POST", "/alice/secret.git/info/lfs/objects/batch", {"objects": []}).status == 404
        href = mine.batch("eve/sql", oid, size)["actions"]["upload"]["href"]
        assert mine.ask("GET", href).status == 403
        assert mine.ask("POST", href, {"oid": oid, "size": size}).status == 404
        assert mine.ask("GET", href.replace("/lfs/eve/sql/", "/lfs/alice/secret/")).status == 403
    # By a commit that names its digest.
    for path, (oid, size) in files.items():
        for claimed in (size, size + 1):
            answer = mine.commit("eve/sql", lines_of({}, {path: (oid, claimed)}))
            assert (answer.status, "was not uploaded" in answer.json()["error"]) == (400, True)
    # By Xet: a xorb that was sent to another repository.
    theirs_x, mine_x = Sender(hub, "alice/secret", theirs.token), Sender(hub, "eve/sql", mine.token)
    assert theirs_x.post(f"/v1/xorbs/default/{XORB}", chunk(note))[0] == 200
    assert mine_x.post("/v1/shards", shard(hashlib.sha256(note).digest(), [(XORB, len(note), 0, 1)]))[0] == 400
    assert mine.ask("GET", "/api/models/alice/secret/xet-write-token/main").status == 404
    # By its name, with or without a revision; in lists; by its facts.
    for path in (
        "/api/models/alice/secret", "/api/models/alice/secret/tree/main", "/api/models/alice/secret/refs",
        "/api/models/alice/secret/commits/main", "/alice/secret/resolve/main/notes.txt", "/api/models/alice/secret/auth-check",
        f"/eve/sql/resolve/{oci_manifest.build(secret).digest[7:47]}/{WEIGHTS}",
    ):  # fmt: skip
        assert mine.ask("GET", path).status == 404, path
    for query in ("", "?search=secret", "?author=alice", "?filter=license:secret-license"):
        assert "alice/secret" not in mine.ask("GET", f"/api/models{query}").data.decode()
    assert "secret-license" not in mine.ask("GET", "/api/models-tags-by-type").data.decode()
    assert mine.ask("GET", "/api/organizations/alice/overview").status == 404
    assert mine.ask("POST", "/api/repos/move", {"fromRepo": "alice/secret", "toRepo": "eve/secret"}).status == 404
    # Who has the bytes may use them.
    assert mine.push("eve/same", secret).status == 200
    assert mine.ask("GET", f"/eve/same/resolve/main/{WEIGHTS}").data == weights
    theirs.ask("DELETE", "/api/repos/delete", {"name": "alice/secret"})
    assert mine.ask("GET", f"/eve/same/resolve/main/{WEIGHTS}").data == weights
