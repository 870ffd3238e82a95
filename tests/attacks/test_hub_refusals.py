"""What a hub refuses leaves no bytes: whatever the way in, and whatever goes wrong, the disk is as it was before."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from adapterhub.hub import quotas, staged_files, uploads
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hf import writing
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.maintenance import gc
from adapterhub.maintenance.fsck import fsck
from adapterhub.project.policy import Policy
from adapterhub.registry.repository_records import Repositories
from adapterhub.store import store, store_files
from adapterhub_converters.errors import RefusedError
from tests.attacks.test_hub_bodies import ROUTES, bodies_of
from tests.attacks.test_hub_forms import Visitor
from tests.hub.conftest import Running, serving
from tests.hub.sending import lines_of
from tests.hub.xet.test_receiving import Sender, chunk, shard
from tests.support.adapters import write_adapter
from tests.support.hub_tenants import Tenant

QUOTA = 300_000
SLACK = 20_000  # bytes of logs, documents and of a lease


@pytest.fixture
def red(tmp_path: Path) -> Iterator[Tenant]:
    """A tenant with a quota, and a repository."""
    with limited(tmp_path) as tenant:
        yield tenant


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    """Likewise, for tests after which all is as it was."""
    with limited(tmp_path_factory.mktemp("refused")) as tenant:
        yield tenant


@contextmanager
def limited(folder: Path) -> Iterator[Tenant]:
    with serving(folder / "hub") as hub:
        with closing(HubDatabase(hub.folder)) as database:
            accounts.set_namespace(database, Namespace("red", max_bytes=QUOTA))
        tenant = Tenant(hub, "red")
        tenant.create("open")
        yield tenant


def disk(hub: Running) -> int:
    """The bytes of all files of the store, besides those that count as uploaded."""
    with closing(HubDatabase(hub.folder)) as database:
        uploaded = {digest.removeprefix("sha256:") for (digest,) in database.select("SELECT digest FROM uploaded")}
    root = hub.folder / ".adapterhub"
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.name not in uploaded)


def counted(hub: Running) -> list[Any]:
    """What counts as arriving."""
    with closing(HubDatabase(hub.folder)) as database:
        return [tuple(row) for row in database.select("SELECT name, size FROM arriving WHERE spent = 0 AND size > 0")]


@contextmanager
def leaving_nothing(hub: Running) -> Iterator[None]:
    """Assert that nothing more is on the disk afterwards, nor counted."""
    before = disk(hub)
    yield
    for _ in range(200):
        if disk(hub) < before + SLACK and counted(hub) == []:
            return
        time.sleep(0.02)
    assert disk(hub) < before + SLACK
    assert counted(hub) == []


# ---- the ways in


def by_commit(red: Tenant, data: bytes) -> requests.Response:
    half = len(data) // 2
    return red.send("open", lines_of({"a.txt": data[:half], "b.txt": data[half:]}))


def by_lfs(red: Tenant, data: bytes) -> requests.Response:
    oid = hashlib.sha256(data).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    answer = red.post("/red/open.git/info/lfs/objects/batch", json=batch)
    if not answer.ok:
        return answer
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    return red.request("PUT", href.removeprefix(red.hub.url), data=data)


def by_xet(red: Tenant, data: bytes) -> requests.Response:
    sender = Sender(red.hub, "red/open", red.token)
    base = sender.url.removeprefix(red.hub.url)
    xorb = b"".join(chunk(data[at : at + 100_000]) for at in range(0, len(data), 100_000))
    answer = requests.post(f"{red.hub.url}{base}/v1/xorbs/default/{'ab' * 32}", data=xorb, headers=sender.headers, timeout=60)
    if not answer.ok:
        return answer
    terms = [("ab" * 32, len(data), 0, (len(data) + 99_999) // 100_000)]
    body = shard(hashlib.sha256(data).digest(), terms)
    return requests.post(f"{red.hub.url}{base}/v1/shards", data=body, headers=sender.headers, timeout=60)


def by_blob(red: Tenant, data: bytes) -> requests.Response:
    return red.post(f"/v2/red/open/blobs/uploads/?digest=sha256:{hashlib.sha256(data).hexdigest()}", data=data)


def by_manifest(red: Tenant, data: bytes) -> requests.Response:
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": f"sha256:{'0' * 64}", "size": 2}
    document = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/x-note",
        "config": {**config, "mediaType": "application/vnd.docker.image.rootfs.foreign.x"},
        "layers": [],
        "annotations": {"x": data.hex()},
    }
    headers = {"content-type": document["mediaType"]}
    return red.request("PUT", "/v2/red/open/manifests/note", data=json.dumps(document), headers=headers)


@cache
def reader_of(red: Tenant) -> Tenant:
    """Somebody who may read what a tenant has."""
    reader = Tenant(red.hub, "carol", "read")
    reader.token = red.hub.make_token("carol", "read")
    return reader


def by_proposal(red: Tenant, data: bytes) -> requests.Response:
    """A commit that a reader proposes, who may fill a quarter of the namespace with them."""
    half = len(data) // 2
    body = lines_of({"a.txt": data[:half], "b.txt": data[half:]})
    return reader_of(red).post("/api/models/red/open/commit/main?create_pr=1", data=body)


def by_acceptance(red: Tenant) -> requests.Response:
    """What a writer accepts of the newest proposal, or of a new one."""
    path = "/api/adapterhub/v1/names/red/open/proposals"
    if not red.get(f"{path}?state=open").json()["proposals"]:
        by_proposal(red, os.urandom(2_000)).raise_for_status()
    number = red.get(f"{path}?state=open").json()["proposals"][0]["proposal"]
    return red.post(f"{path}/{number}/acceptance", json={})


def by_form(red: Tenant, data: bytes) -> requests.Response:
    """Files of the form of a page."""
    visitor = Visitor.sign_in(red.hub, red.token)
    files = {"files": ("a.txt", data, "text/plain")}
    url = f"{red.hub.url}/-/adapters/red/open/upload"
    return visitor.session.post(url, data={"csrf": visitor.csrf}, files=files, timeout=60)


def by_edit(red: Tenant, data: bytes, action: str = "edit", token: str = "") -> requests.Response:
    """A text from the editor of a page."""
    visitor, page = Visitor.sign_in(red.hub, token or red.token), f"{red.hub.url}/-/adapters/red/open"
    match = re.search(r'name="parent" value="([^"]*)"', visitor.session.get(f"{page}/edit/README.md", timeout=60).text)
    assert match
    fields = {"csrf": visitor.csrf, "parent": match[1], "text": data.hex()[: len(data)]}
    return visitor.session.post(f"{page}/{action}/README.md", data=fields, timeout=60)


def by_proposed_edit(red: Tenant, data: bytes) -> requests.Response:
    """Likewise, by a reader."""
    return by_edit(red, data, "propose-edit", reader_of(red).token)


WAYS: dict[str, Callable[[Tenant, bytes], requests.Response]] = {
    "a commit": by_commit, "LFS": by_lfs, "Xet": by_xet, "a blob": by_blob, "a manifest": by_manifest,
    "a proposal": by_proposal, "a form": by_form,
}  # fmt: skip
EDITS = {"an edit": by_edit, "a proposed edit": by_proposed_edit}  # of texts that are smaller than what may be held


@pytest.mark.parametrize("way", [*WAYS, *EDITS])
def test_what_may_be_held_is_taken_by_every_way(red: Tenant, way: str) -> None:
    answer = (WAYS | EDITS)[way](red, os.urandom(60_000))
    assert answer.ok, answer.text


@pytest.mark.parametrize("way", EDITS)
def test_an_edit_for_which_no_room_is_left_leaves_no_bytes(red: Tenant, way: str) -> None:
    assert by_commit(red, os.urandom(200_000)).ok
    with leaving_nothing(red.hub):
        answer = EDITS[way](red, os.urandom(150_000))
        assert answer.status_code in (400, 413)
        assert "may hold 300,000 bytes" in answer.text or "its proposals may hold 75,000 bytes" in answer.text


@pytest.mark.parametrize("way", WAYS)
def test_what_is_over_the_quota_leaves_no_bytes(red: Tenant, way: str) -> None:
    with leaving_nothing(red.hub):
        answer = WAYS[way](red, os.urandom(QUOTA * 2))
        assert answer.status_code in (400, 413)
        assert "may hold 300,000 bytes" in answer.text or "its proposals may hold 75,000 bytes" in answer.text


@pytest.mark.parametrize(("way", "count"), [*((way, 1) for way in [*WAYS, *EDITS]), ("a commit", 2), ("a manifest", 2)])
def test_what_a_full_disk_refuses_leaves_no_bytes(red: Tenant, way: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills at the first or the second write; a manifest that was whole before that counts as uploaded."""
    writes = []

    def full(file: Any, data: Any) -> None:
        writes.append(len(data))
        if len(writes) >= count and len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        store_files.write_all(file, data)

    with leaving_nothing(red.hub):
        for module in (staged_files, store, uploads):
            monkeypatch.setattr(module, "write_all", full)
        answer = (WAYS | EDITS)[way](red, os.urandom(60_000))
        monkeypatch.undo()
        assert answer.status_code == 507


@pytest.mark.parametrize(("method", "path"), bodies_of(ROUTES))
def test_nonsense_leaves_no_bytes_by_any_route(refused: Tenant, method: str, path: str) -> None:
    with leaving_nothing(refused.hub):
        refused.request(method, path, data=os.urandom(QUOTA - 100_000))


@pytest.mark.parametrize("sent", [0.3, 0.9])
def test_a_commit_whose_client_goes_leaves_no_bytes(red: Tenant, sent: float) -> None:
    body = lines_of({f"{number}.txt": os.urandom(20_000) for number in range(10)})
    parts = urlsplit(red.hub.url)
    head = f"POST /api/models/red/open/commit/main HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {red.token}\r\n"
    with leaving_nothing(red.hub), socket.create_connection((parts.hostname, parts.port), 20) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: int(len(body) * sent)])
        for _ in range(500):
            if counted(red.hub):
                break
            time.sleep(0.01)


def test_a_commit_whose_last_line_is_nonsense_leaves_no_bytes(red: Tenant) -> None:
    """Four commits of 12 MB left 48 MB in a namespace of 1 MB."""
    with leaving_nothing(red.hub):
        assert red.send("open", lines_of({"a.txt": os.urandom(200_000)}) + b"\n{}").status_code == 400


def test_a_commit_that_a_policy_refuses_leaves_no_bytes(tmp_path: Path) -> None:
    policy = Policy(bases=("other/base",))
    with serving(tmp_path / "hub", policy=policy) as hub:
        red = Tenant(hub, "red")
        red.create("open")
        folder = write_adapter(tmp_path / "adapter", 1)
        (folder / "NOTES.md").write_bytes(os.urandom(200_000))
        with leaving_nothing(hub):
            assert red.upload("open", folder).status_code == 400


def test_a_commit_without_room_for_its_document_leaves_no_blob(red: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files were blobs by then, which counted against the namespace until a gc."""

    def refuse(*_: object, **__: object) -> None:
        raise RefusedError("red", "has no room", code="quota")

    with leaving_nothing(red.hub):
        monkeypatch.setattr(quotas.Quotas, "check_record", refuse)
        answer = red.send("open", lines_of({"a.txt": os.urandom(100_000)}))
        monkeypatch.undo()
        assert (answer.status_code, "has no room" in answer.text) == (400, True)
        with closing(HubDatabase(red.hub.folder)) as database:
            assert database.select("SELECT digest FROM uploaded") == []


def test_a_shard_of_repeated_chunks_writes_no_more_than_the_quota(red: Tenant) -> None:
    """131 kB sent left 200 MB in a namespace of 1 MB."""
    sender = Sender(red.hub, "red/open", red.token)
    assert sender.post(f"/v1/xorbs/default/{'ab' * 32}", chunk(bytes(128 << 10), 1))[0] == 200
    before = disk(red.hub)
    for last in range(3):
        status, body = sender.post("/v1/shards", shard(bytes([last]) * 32, [("ab" * 32, 128 << 10, 0, 1)] * 1000))
        assert (status, "may hold 300,000 bytes" in body) == (400, True)
    assert disk(red.hub) < before + SLACK


def test_xorbs_of_which_a_file_needs_little_do_not_pile_up(red: Tenant) -> None:
    """They count no more once a file was made of them: each round would have been free."""
    sender = Sender(red.hub, "red/open", red.token)
    for number in range(8):
        name, tiny = f"{number:064x}", bytes([number])
        assert sender.post(f"/v1/xorbs/default/{name}", chunk(tiny) + chunk(os.urandom(120_000)))[0] == 200
        assert sender.post("/v1/shards", shard(hashlib.sha256(tiny).digest(), [(name, 1, 0, 1)]))[0] == 200
    assert disk(red.hub) < 2 * QUOTA + SLACK


# ---- documents and logs


def test_a_commit_that_has_no_room_publishes_no_version(red: Tenant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quotas, "_FREE_RECORDS", 0)
    first = red.upload("open", write_adapter(tmp_path / "first", 1))
    assert first.ok, first.text
    monkeypatch.setattr(writing, "_DERIVED_BYTES", QUOTA)
    assert red.upload("open", write_adapter(tmp_path / "second", 2)).status_code == 400
    with red.hub.registry() as registry:
        assert [row.number for row in registry.list()] == [1]


def test_a_change_writes_what_is_new(red: Tenant) -> None:
    """Each change wrote the document anew: 40 requests of 100 bytes took 114 MB, with a manifest of 3 MB."""
    assert by_manifest(red, os.urandom(60_000)).ok
    before = disk(red.hub)
    assert {red.post(f"/api/models/red/open/branch/b{number}", json={}).status_code for number in range(20)} == {200}
    assert disk(red.hub) < before + 20 * 4000


def test_commits_write_as_much_at_the_end_as_at_the_beginning(red: Tenant) -> None:
    """n commits wrote n²·120 bytes: each wrote the list of all commits again."""
    sizes = [disk(red.hub)]
    for number in range(96):
        assert red.commit("open", {"a.txt": str(number).encode()}).ok
        if number % 32 == 31:
            sizes.append(disk(red.hub))
    written = [after - before for before, after in itertools.pairwise(sizes)]
    assert written[-1] < written[0] * 1.2
    assert len(red.get("/api/models/red/open/commits/main").json()) == 50
    before = disk(red.hub)
    with red.hub.registry() as registry:
        gc.gc(registry, grace=0)
        assert not [finding for finding in fsck(registry) if finding.severity == "error"]
    assert disk(red.hub) <= before
    first = red.get("/api/models/red/open/commits/main")
    assert len(red.get(first.links["next"]["url"].removeprefix(red.hub.url)).json()) == 46


def test_replaced_documents_count_until_a_gc_may_have_removed_them(red: Tenant) -> None:
    def records() -> int:
        with red.hub.registry() as registry:
            return Repositories(registry).written_bytes("red/open", "")

    before = records()
    assert by_manifest(red, os.urandom(30_000)).ok
    assert by_manifest(red, os.urandom(30_000)).ok
    assert records() > before + 120_000


def test_what_is_indexed_of_each_version_counts(red: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 commits of a few bytes, each a version with the same card, took 34 MB of the index in a namespace of 2 MB."""
    monkeypatch.setattr(quotas, "_FREE_RECORDS", 20_000)
    folder = write_adapter(tmp_path / "adapter", 1)
    (folder / "README.md").write_text(" ".join(os.urandom(4).hex() for _ in range(2_000)))
    assert red.upload("open", folder).ok
    answers = [red.commit("open", {"NOTES.md": str(number).encode()}) for number in range(12)]
    assert [answer.ok for answer in answers[:2]] == [True, True]
    assert "may hold 300,000 bytes" in answers[-1].text
    with red.hub.registry() as registry:
        [(size,)] = registry.index.select("SELECT sum(length(card)) FROM texts")
    assert size < QUOTA


def test_a_namespace_that_is_full_may_still_be_made_private(red: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_FREE_RECORDS", 5_000)
    assert red.commit("open", {"a.txt": os.urandom(QUOTA - 20_000)}).ok
    assert red.commit("open", {"b.txt": os.urandom(40_000)}).status_code == 400
    with closing(HubDatabase(red.hub.folder)) as database:
        accounts.set_namespace(database, Namespace("red", max_bytes=1))
    for private in (True, False, True):
        settings = red.request("PUT", "/api/models/red/open/settings", json={"private": private})
        assert settings.status_code == 200, settings.text


def test_documents_and_logs_count_beyond_the_first_mebibyte(red: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_FREE_RECORDS", 0)
    before = disk(red.hub)
    statuses = []
    for number in range(400):
        message = "x" * 9000
        line = {"key": "header", "value": {"summary": "s", "description": message}}
        body = json.dumps(line).encode() + b"\n" + lines_of({"a.txt": str(number).encode()}).partition(b"\n")[2]
        statuses.append(red.send("open", body).status_code)
        if statuses[-1] != 200:
            break
    assert statuses[-1] == 400
    assert disk(red.hub) < before + QUOTA + SLACK
    assert red.request("DELETE", "/api/repos/delete", json={"name": "open", "organization": "red"}).ok


# ---- a disk that fails at any write of a commit


COMMITTING: dict[str, Callable[[Tenant, Path], requests.Response]] = {
    "loose files": lambda red, _: by_commit(red, os.urandom(10_000)),
    "an adapter": lambda red, folder: red.upload("open", folder),
    "a manifest": lambda red, _: by_manifest(red, os.urandom(3_000)),
    "a proposal": lambda red, _: by_proposal(red, os.urandom(2_000)),
    "a form": lambda red, _: by_form(red, os.urandom(10_000)),
    "LFS": lambda red, _: by_lfs(red, os.urandom(10_000)),
    "an edit": lambda red, _: by_edit(red, os.urandom(2_000)),
    "a proposed edit": lambda red, _: by_proposed_edit(red, os.urandom(2_000)),
    "an acceptance": lambda red, _: by_acceptance(red),
}  # fmt: skip


UPLOADING = ("a form", "LFS")
"""Whose files count as uploaded from when they are stored, whatever becomes of a commit."""


def blobs_of(hub: Running) -> set[str]:
    return {path.name for path in (hub.folder / ".adapterhub/blobs/sha256").iterdir()}


@pytest.mark.parametrize("way", COMMITTING)
def test_a_disk_that_fails_at_any_flush_of_a_change_leaves_no_blob(
    tmp_path: Path, red: Tenant, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a commit were blobs by then, and counted against the namespace until a gc."""
    folder, flush, writes = write_adapter(tmp_path / "adapter", 1), os.fsync, itertools.count()
    (folder / "NOTES.md").write_bytes(os.urandom(5_000))
    statuses, after = [], set[str]()
    reader_of(red)
    if way == "an acceptance":
        by_proposal(red, os.urandom(2_000)).raise_for_status()
    for failing in range(40):
        before, writes = blobs_of(red.hub), itertools.count()

        def fail(file: int, failing: int = failing, writes: Iterator[int] = writes) -> None:
            if next(writes) >= failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(file)

        monkeypatch.setattr(os, "fsync", fail)
        statuses.append(COMMITTING[way](red, folder).status_code)
        monkeypatch.setattr(os, "fsync", flush)
        after = blobs_of(red.hub)
        if statuses[-1] < 300:
            break
        named = {path.name for path in named_blobs(red.hub)}
        with closing(HubDatabase(red.hub.folder)) as database:
            uploaded = {digest.removeprefix("sha256:") for (digest,) in database.select("SELECT digest FROM uploaded")}
        assert named | uploaded <= after
        kept_blobs = named | uploaded if way in UPLOADING else named
        assert after - before <= kept_blobs, f"flush {failing}: {len(after - before)} blobs"
    assert statuses[0] == 507
    assert statuses[-1] < 300, statuses


def named_blobs(hub: Running) -> list[Path]:
    """The blobs that a version or a document needs."""
    from adapterhub.maintenance.gc import NeededBlobs

    with hub.registry() as registry:
        needs = NeededBlobs(registry.store, dict, 0.0, {})
        return [registry.store.blob_path(digest) for digest in needs.update() - needs.spared]
