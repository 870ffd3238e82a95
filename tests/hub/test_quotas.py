"""Quotas: a namespace takes in what it may hold, and says so in its client's words before the bytes move."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3

from adapterhub.digest import sha256_bytes
from adapterhub.hub import quotas
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.storage.from_settings import open_storage
from adapterhub.hub.workers import Workers
from adapterhub.ref import Ref
from adapterhub.registry.moves import now
from adapterhub.store.ref_log import Entry
from adapterhub_converters.errors import RefusedError
from tests.hub.conftest import Running, run_hf, serving
from tests.hub.xet.test_receiving import XORB, Sender, chunk, shard


def settle(hub: Running, **limits: int) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.set_namespace(database, Namespace("team", **limits))  # type: ignore[arg-type]


def test_what_is_over_the_quota_is_refused_before_it_moves(
    hub: Running, hf: Any, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    size = sum(path.stat().st_size for path in adapter(1).iterdir())
    settle(hub, max_bytes=size * 3 // 2)
    run_hf(hub, tmp_path, "upload", "team/sql", str(adapter(1)))
    answer = run_hf(hub, tmp_path, "upload", "team/sql", str(adapter(2)), code=1)
    assert "team: may hold" in answer, answer
    assert "ask for a larger quota" in answer
    run_hf(hub, tmp_path, "upload", "other/sql", str(adapter(2)))  # another namespace has no quota


def test_a_quota_of_files_counts_distinct_ones(hub: Running, hf: Any) -> None:
    from huggingface_hub.errors import BadRequestError

    settle(hub, max_files=2)
    hf.create_repo("team/sql")
    for path, text in (("README.md", b"# One\n"), ("NOTES.md", b"# One\n"), ("MORE.md", b"# Two\n")):
        hf.upload_file(path_or_fileobj=text, path_in_repo=path, repo_id="team/sql")
    with pytest.raises(BadRequestError, match="may hold 2 files, holds 2"):
        hf.upload_file(path_or_fileobj=b"# Three\n", path_in_repo="LAST.md", repo_id="team/sql")


def test_a_file_by_lfs_is_refused_when_it_is_announced_and_when_it_arrives(hub: Running, hf: Any) -> None:
    settle(hub, max_bytes=1000)
    hf.create_repo("team/sql")

    def announced(data: bytes) -> Any:
        batch = {"operation": "upload", "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]}
        headers = {"authorization": f"Bearer {hub.token}"}
        return urllib3.request("POST", f"{hub.url}/team/sql.git/info/lfs/objects/batch", json=batch, headers=headers)

    refused = announced(bytes(2000))
    assert (refused.status, b"may hold 1,000 bytes" in refused.data) == (400, True)
    (lfs_object,) = announced(bytes(800)).json()["objects"]
    assert urllib3.request("PUT", lfs_object["actions"]["upload"]["href"], body=bytes(800), retries=False).status == 200
    assert announced(bytes(801)).status == 400  # 800 are here now


def request(hub: Running, method: str, path: str, **options: Any) -> Any:
    """The answer to a request with the token of a hub."""
    return urllib3.request(
        method, f"{hub.url}{path}", headers={"authorization": f"Bearer {hub.token}"}, retries=False, redirect=False, **options
    )


def offered(hub: Running, name: str, size: int) -> Any:
    """The answer to a file that is announced by LFS, and new."""
    objects = [{"oid": hashlib.sha256(b"%d" % size).hexdigest(), "size": size}]
    return request(hub, "POST", f"/{name}.git/info/lfs/objects/batch", json={"operation": "upload", "objects": objects})


def test_a_session_counts_while_it_is_open_and_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "hub") as hub:
        settle(hub, max_bytes=1000)
        request(hub, "POST", "/api/repos/create", json={"name": "team/other"})
        first, second = (
            request(hub, "POST", f"/v2/team/{repo}/blobs/uploads/").headers["location"] for repo in ("sql", "text")
        )
        assert request(hub, "PATCH", first, body=bytes(800)).status == 202
        refused = request(hub, "PATCH", second, body=bytes(300))
        words = refused.json()["errors"][0]
        assert (refused.status, words["code"]) == (413, "SIZE_INVALID")
        assert "may hold 1,000 bytes, holds 800 (800 of them in uploads that are open), and 300 more" in words["message"]
        assert request(hub, "PATCH", second, body=iter([bytes(300)])).status == 413  # its size is not announced
        assert request(hub, "PATCH", second, body=iter([bytes(150)])).status == 202
    with serving(tmp_path / "hub") as hub:
        assert b"holds 950 (950 of them" in offered(hub, "team/other", 100).data
        request(hub, "DELETE", first)
        assert offered(hub, "team/other", 100).status == 200
        assert request(hub, "PATCH", second, body=bytes(850)).status == 202
        digest = f"sha256:{hashlib.sha256(bytes(1000)).hexdigest()}"
        assert request(hub, "PUT", f"{second}?digest={digest}").status == 201
        assert b"holds 1,000, and 1 more" in offered(hub, "team/other", 1).data


def test_an_error_about_a_quota_has_a_code(hub: Running) -> None:
    with closing(open_storage(hub.settings)) as storage, closing(Workers(storage, 1)) as workers:
        counting = quotas.Quotas(storage.database, lambda name: Namespace(name, max_bytes=10))
        with pytest.raises(RefusedError, match="and 11 more were to come") as caught:
            counting.check(workers.worker(), "team/sql", {"sha256:" + "0" * 64: 11})
    assert caught.value.code == "quota"


def test_uploads_without_bytes_cannot_be_begun_without_end(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_MAX_OPEN", 3)
    settle(hub, max_bytes=1000)
    uploads = [request(hub, "POST", "/v2/team/sql/blobs/uploads/") for _ in range(4)]
    assert [upload.status for upload in uploads] == [202, 202, 202, 400]
    assert uploads[3].json()["errors"][0]["message"] == (
        "team: has 3 open uploads, which are the most that may be open. End one, or wait a day until they expire"
    )
    assert request(hub, "PATCH", uploads[0].headers["location"], body=bytes(10)).status == 202
    request(hub, "DELETE", uploads[0].headers["location"])
    assert request(hub, "POST", "/v2/team/sql/blobs/uploads/").status == 202


def test_a_file_by_lfs_counts_from_its_first_byte_and_its_repository_may_offer_it_again(hub: Running) -> None:
    settle(hub, max_bytes=1000)
    for name in ("team/sql", "team/other"):
        request(hub, "POST", "/api/repos/create", json={"name": name})
    (lfs_object,) = offered(hub, "team/sql", 800).json()["objects"]
    address = urlsplit(lfs_object["actions"]["upload"]["href"])
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as sock:
        head = f"PUT {address.path}?{address.query} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 800\r\n\r\n"
        sock.sendall(head.encode() + b"x")
        wait_until(lambda: offered(hub, "team/other", 300).status == 400)
        assert offered(hub, "team/sql", 800).status == 200
    wait_until(lambda: offered(hub, "team/other", 300).status == 200)


def test_xorbs_count_until_they_are_files(hub: Running) -> None:
    settle(hub, max_bytes=1000)
    for name in ("team/sql", "team/other"):
        request(hub, "POST", "/api/repos/create", json={"name": name})
    sender = Sender(hub, "team/sql", hub.token)
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(bytes(592)))[0] == 200  # 600 with its head
    assert b"holds 600 (600 of them" in offered(hub, "team/other", 401).data
    status, body = sender.post(f"/v1/xorbs/default/{'1' * 64}", chunk(bytes(500)))
    assert (status, "may hold 1,000 bytes" in body) == (400, True)
    shard_bytes = shard(hashlib.sha256(bytes(592)).digest(), [(XORB, 592, 0, 1)])
    assert sender.post("/v1/shards", shard_bytes)[0] == 200
    assert offered(hub, "team/other", 408).status == 200
    assert b"holds 592, and 409 more" in offered(hub, "team/other", 409).data


def test_who_counts_does_not_wait_for_the_index(hub: Running, adapter: Callable[..., Path]) -> None:
    """Whoever changes a repository holds the lock of the index, and asks for room: each would wait for the other."""
    settle(hub, max_bytes=10_000_000)
    with (
        closing(open_storage(hub.settings)) as storage,
        hub.registry() as registry,
        ThreadPoolExecutor(1) as pool,
    ):
        version = registry.push(adapter(1), Ref("team/sql"))
        workers = Workers(storage)
        counting = quotas.Quotas(storage.database, lambda name: Namespace(name, max_bytes=10_000_000))
        worker = pool.submit(workers.worker).result()
        with registry.write_lock():
            state = registry.ledger.current("team/sql")
            # The move of a process between its entry in the log and its commit in the index.
            tagging = Entry("team/sql", state.seq + 1, "tag", now(), version.digest, 1, 1, ("prod",), state.head)
            assert registry.store.log.append(tagging)
            files = {sha256_bytes(b"x"): 1}
            pool.submit(counting.check, worker, "team/sql", files).result(timeout=20)
        pool.submit(worker.registry.close).result()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return once something is so; it is soon."""
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError


def test_a_quota_holds_for_what_is_moved_from_another_namespace(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    from huggingface_hub.errors import BadRequestError, RepositoryNotFoundError

    settle(hub, max_bytes=1000)
    hf.create_repo("other/sql")
    hf.upload_folder(folder_path=adapter(1), repo_id="other/sql")
    with pytest.raises(BadRequestError, match="may hold 1,000 bytes"):
        hf.move_repo("other/sql", "team/sql")
    with pytest.raises(RepositoryNotFoundError):
        hf.model_info("team/sql")
    hf.move_repo("other/sql", "other/new")


def test_forms_are_made_until_they_are_over_the_quota(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    from huggingface_hub.errors import BadRequestError

    size = sum(path.stat().st_size for path in adapter(1).iterdir())
    settle(hub, max_bytes=size * 5 // 2)
    hf.create_repo("team/sql")
    for seed in (1, 2):
        hf.upload_folder(folder_path=adapter(seed), repo_id="team/sql")
    sha = hf.model_info("team/sql.v1.mlx").sha
    with pytest.raises(BadRequestError, match="team: may hold"):
        hf.model_info("team/sql.v2.mlx")
    assert hf.model_info("team/sql.v1.mlx").sha == sha
