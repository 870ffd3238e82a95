"""What who runs a hub relies on: /ready, /metrics, log lines, a shutdown that drops nothing, backups, `hub doctor`."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.http_server import logs
from adapterhub.hub.accounts import access_tokens, accounts
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.operations import backup, health
from adapterhub.hub.storage.from_settings import open_storage
from adapterhub.maintenance.fsck import fsck
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_records import Repositories
from adapterhub_converters.errors import FormatError, IntegrityError, OutputExistsError
from tests.conftest import Run, _environment
from tests.hub.conftest import Running, client, serving


def get(hub: Running, path: str, **headers: str) -> Any:
    return urllib3.request("GET", hub.url + path, headers=headers, retries=False)


@pytest.fixture
def filled(hub: Running, hf: Any, adapter: Callable[..., Path]) -> Running:
    """A hub with a version, a commit that is none, and an account."""
    hf.create_repo("team/sql", private=True)
    hf.upload_folder(folder_path=adapter(1), repo_id="team/sql")
    hf.create_repo("team/soon")
    hf.upload_file(path_or_fileobj=b"# Soon\n", path_in_repo="README.md", repo_id="team/soon")
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, "ada")
        accounts.set_member(database, "team", "ada", "write")
    return hub


def backed_up(hub: Running, file: Path) -> int:
    """Write a backup of a running hub; return its bytes."""
    with closing(open_storage(hub.settings)) as storage:
        return backup.write(storage, file)


# ---- health and metrics


def test_a_hub_is_ready_until_its_store_cannot_be_written(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_READY_SECONDS", 0.0)
    assert get(hub, "/ready").json() == {"status": "ready", "checks": {"database": "ok", "store": "ok", "disk": "ok"}}
    tmp = hub.folder / ".adapterhub" / "tmp"
    tmp.rename(tmp.with_name("gone"))
    answer = get(hub, "/ready")
    assert answer.status == 503
    assert answer.json() == {"status": "not ready", "checks": {"database": "ok", "store": "error", "disk": "ok"}}


NEWER = "a newer adapterhub has written its registry; its operator has to upgrade it"


def replace_index(folder: Path, version: int) -> None:
    """Put an index of a version in the place of a registry's, as another program does that upgrades it."""
    index = folder / "registry.db"
    with closing(sqlite3.connect(index)) as source, closing(sqlite3.connect(folder / "new.db")) as target:
        source.backup(target)
        target.execute(f"PRAGMA user_version = {version}")
    (folder / "new.db").replace(index)


def test_a_hub_whose_index_is_of_a_newer_adapterhub_is_not_ready_and_says_so(
    filled: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_READY_SECONDS", 0.0)
    assert get(filled, "/ready").status == 200
    replace_index(filled.folder, 99)
    answer = get(filled, "/ready")
    assert (answer.status, answer.json()["checks"]["store"]) == (503, "error")
    headers = {"authorization": f"Bearer {filled.token}"}
    for path in (
        "/",
        "/team/soon",
        "/api/models",
        "/api/models/team/soon",
        "/api/adapterhub/v1/search",
        "/v2/_catalog",
        "/v2/team/soon/tags/list",
        "/team/soon/resolve/main/README.md",
        "/metrics",
    ):
        answer = get(filled, path, **headers)
        assert answer.status == 503, path
        assert NEWER in answer.data.decode(), path
        assert str(filled.folder) not in answer.data.decode(), path


def test_a_hub_reads_the_index_that_took_the_place_of_its_own(filled: Running) -> None:
    headers = {"authorization": f"Bearer {filled.token}"}
    get(filled, "/api/models", **headers)
    with closing(sqlite3.connect(filled.folder / "registry.db")) as index:
        ((version,),) = index.execute("PRAGMA user_version").fetchall()
    replace_index(filled.folder, version)
    with Registry.open(filled.folder) as registry:
        registry.push(filled.folder.parent / "adapter-1", Ref("team/other"))
    for _ in range(16):  # whichever thread answers
        assert "team/other" in {model["id"] for model in get(filled, "/api/models", **headers).json()}


def test_a_name_that_a_newer_adapterhub_has_moved_is_not_served_and_the_others_are(filled: Running) -> None:
    log = filled.folder / ".adapterhub" / "refs" / "team" / "sql"
    entry = json.loads((log / "00000001.json").read_bytes())
    (log / "00000002.json").write_text(json.dumps({**entry, "version": 99, "seq": 2}))
    headers = {"authorization": f"Bearer {filled.token}"}
    for path in ("/team/sql", "/api/models/team/sql", "/v2/team/sql/tags/list"):
        answer = get(filled, path, **headers)
        assert answer.status == 503, path
        assert NEWER in answer.data.decode(), path
    assert get(filled, "/api/models/team/soon").status == 200
    assert get(filled, "/ready").status == 200


def test_a_hub_goes_on_beside_a_newer_one_that_has_added_to_its_tables(filled: Running) -> None:
    with closing(sqlite3.connect(filled.folder / "hub.db")) as newer:
        newer.execute("ALTER TABLE accounts ADD COLUMN newer TEXT")
        newer.execute("PRAGMA user_version = 99")
    assert get(filled, "/ready").status == 200
    assert get(filled, "/api/whoami-v2", authorization=f"Bearer {filled.token}").status == 200


def metrics_of(hub: Running) -> str:
    """The metrics that a token shows which reads everything."""
    page: bytes = get(hub, "/metrics", authorization=f"Bearer {hub.token}").data
    return page.decode()


def test_metrics_count_by_the_template_of_a_route_and_name_nobody(filled: Running) -> None:
    get(filled, "/team/soon/resolve/main/README.md")
    text = metrics_of(filled)
    route = "/{namespace}/{repo}/resolve/{revision}/{path:path}"
    assert f'hub_requests_total{{method="GET",route="{route}",status="200"}} 1.0' in text
    assert "hub_versions 1.0" in text
    assert "hub_names 1.0" in text
    assert "hub_uploads_open 0.0" in text
    assert "team" not in text


def test_metrics_tell_of_the_process_its_threads_and_what_is_queued(filled: Running) -> None:
    with closing(HubDatabase(filled.folder)) as database:
        database.execute(
            "INSERT INTO webhooks (id, namespace, url, secret, private) VALUES (1, 'team', 'https://ci.example', '', 0)"
        )
        sql = "INSERT INTO deliveries (webhook, event, body, due, state, tries, error) VALUES (1, '', '', ?, 'waiting', 0, '')"
        database.execute(sql, 9e9)
    text = metrics_of(filled)
    for line in (
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
        "process_open_fds ",
        'hub_work_waiting{threads="requests"} 0.0',
        'hub_work_waiting{threads="bodies"} 0.0',
        'hub_queued{queue="webhook deliveries"} 1.0',
        'hub_queued{queue="renames"} 0.0',
    ):
        assert f"\n{line}" in text
    assert "hub_database_connections" not in text  # a file has none
    assert "hub_bucket" not in text


def test_metrics_need_a_token_where_reading_does(tmp_path: Path) -> None:
    with serving(tmp_path / "closed", require_login=True) as hub:
        assert get(hub, "/metrics").status == 401
        headers = {"authorization": f"Bearer {hub.token}"}
        assert urllib3.request("GET", f"{hub.url}/metrics", headers=headers).status == 200


def test_a_hub_in_a_database_and_a_bucket_is_asked_for_both(run: Run) -> None:
    reason = "not set, and this is for a hub in a database and a bucket"
    for words, env, missing in (
        (("hub", "migrate"), {}, "ADAPTERHUB_DATABASE and ADAPTERHUB_BLOBS"),
        (("hub", "recover"), {"ADAPTERHUB_BLOBS": "s3://x"}, "ADAPTERHUB_DATABASE"),
        (("hub", "gc"), {"ADAPTERHUB_DATABASE": "postgresql://x"}, "ADAPTERHUB_BLOBS"),
    ):
        assert run(*words, env=env, code=2).stderr == f"error: {missing}: {reason}. Set {missing}  [invalid-usage]\n"


# ---- log lines


def test_a_log_line_has_the_account_and_no_secret(
    hub: Running, hf: Any, adapter: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="adapterhub.hub"):
        hf.create_repo("team/sql")
        hf.upload_folder(folder_path=adapter(1), repo_id="team/sql")
        get(hub, f"/{hub.token}/x")
    lines = [logs.JsonLines().format(record) for record in caplog.records if record.name == "adapterhub.hub"]
    documents = [json.loads(line) for line in lines]
    commit = next(document for document in documents if "/commit/" in document["path"])
    assert (commit["account"], commit["token"], commit["status"]) == ("alice", hub.token[:8], 200)
    assert not [line for line in lines if hub.token in line or "signature=" in line]


# ---- the end


def test_a_hub_that_is_told_to_stop_finishes_what_has_begun(tmp_path: Path) -> None:
    environment = _environment(tmp_path, None)
    folder = tmp_path / "hub"
    with closing(HubDatabase(Registry.init(folder).root)) as database:
        token = access_tokens.create(database, "alice", "write")
    command = [sys.executable, "-m", "adapterhub", "--registry", str(folder), "--json", "hub", "start", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout
    text = ""
    while "}" not in text:
        text += process.stdout.readline()
    host, port = json.loads(text)["url"].removeprefix("http://").split(":")
    body = json.dumps({"name": "sql", "organization": "team"}).encode()
    with socket.create_connection((host, int(port)), timeout=60) as sent:
        headers = ["Host: localhost", f"Authorization: Bearer {token}", f"Content-Length: {len(body)}"]
        head = "\r\n".join(["POST /api/repos/create HTTP/1.1", *headers, "", ""])
        sent.sendall(head.encode() + body[:5])
        with socket.create_connection((host, int(port)), timeout=60) as second:  # answered: the first was taken too
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"200" in second.recv(100)
        process.send_signal(signal.SIGTERM)
        while True:  # until it takes no more
            try:
                socket.create_connection((host, int(port)), timeout=60).close()
                time.sleep(0.05)
            except ConnectionError:  # refused, or taken by a socket that is closed at this moment
                break
        sent.sendall(body[5:])
        assert b"200 OK" in sent.recv(1000)
    process.wait(60)
    with Registry.open(folder) as registry:
        from adapterhub.registry.repository_records import Repositories

        assert Repositories(registry).get("team/sql")


# ---- backups


def test_a_restored_hub_is_the_hub(filled: Running, tmp_path: Path, adapter: Callable[..., Path]) -> None:
    backed_up(filled, tmp_path / "hub.tar")
    assert (tmp_path / "hub.tar").stat().st_mode & 0o777 == 0o600
    backup.restore(tmp_path / "hub.tar", tmp_path / "again")
    with filled.registry() as before, Registry.open(tmp_path / "again") as after:
        assert after.list() == before.list()
        assert after.log(Ref("team/sql")) == before.log(Ref("team/sql"))
    with serving(tmp_path / "again") as again:
        hub_client = client(Running(again.url, again.settings, filled.token), tmp_path)  # the token of before
        assert hub_client.model_info("team/sql").private
        assert [listed_commit.title for listed_commit in hub_client.list_repo_commits("team/soon")]
        hub_client.upload_folder(folder_path=adapter(2), repo_id="team/sql")
        with again.registry() as registry:
            assert registry.resolve(Ref("team/sql")).number == 2


def test_a_backup_has_the_repositories_of_when_it_began(filled: Running, hf: Any, tmp_path: Path) -> None:
    """Whoever changes one meanwhile removes the document that the backup names."""
    branches: list[str] = []

    def change(_done_count: int, _total: int) -> None:
        branches.append(f"branch-{len(branches)}")
        hf.create_branch("team/soon", branch=branches[-1])

    with closing(open_storage(filled.settings)) as storage:
        backup.write(storage, tmp_path / "hub.tar", change)
    assert branches
    backup.restore(tmp_path / "hub.tar", tmp_path / "again")
    with Registry.open(tmp_path / "again") as registry:
        repository = Repositories(registry).get("team/soon")
        assert repository is not None
        assert repository.heads.keys() == {"main"}
        assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


def test_a_backup_is_an_image_layout(filled: Running, tmp_path: Path) -> None:
    import tarfile

    backed_up(filled, tmp_path / "hub.tar")
    with tarfile.open(tmp_path / "hub.tar") as archive:
        names = set(archive.getnames())
        index = json.load(archive.extractfile("index.json"))  # type: ignore[arg-type]
    assert {f"blobs/sha256/{manifest['digest'][7:]}" for manifest in index["manifests"]} <= names


def test_a_damaged_backup_leaves_nothing(filled: Running, tmp_path: Path) -> None:
    backed_up(filled, tmp_path / "hub.tar")
    data = bytearray((tmp_path / "hub.tar").read_bytes())
    data[data.rindex(b"lora_A")] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(IntegrityError):
        backup.restore(tmp_path / "bad.tar", tmp_path / "again")
    (tmp_path / "short.tar").write_bytes(data[:5000])
    with pytest.raises(FormatError):
        backup.restore(tmp_path / "short.tar", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_is_overwritten(filled: Running, tmp_path: Path) -> None:
    backed_up(filled, tmp_path / "hub.tar")
    with pytest.raises(OutputExistsError):
        backed_up(filled, tmp_path / "hub.tar")
    with pytest.raises(OutputExistsError):
        backup.restore(tmp_path / "hub.tar", filled.folder)


@pytest.mark.parametrize("name", ["../evil", "blobs/sha256/short", "registry.db", "refs/x/y/evil.sh"])
def test_a_backup_writes_only_what_it_is_made_of(filled: Running, tmp_path: Path, name: str) -> None:
    import io
    import tarfile

    backed_up(filled, tmp_path / "hub.tar")
    with tarfile.open(tmp_path / "hub.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(FormatError):
        backup.restore(tmp_path / "hub.tar", tmp_path / "again")


# ---- doctor


def test_doctor_finds_what_is_wrong(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    token = run("hub", "token", "create", "root", "--role", "admin", "--registry", folder).stdout
    assert token
    fine = run("hub", "doctor", "--registry", folder)
    assert "1 token of a service may do everything and never expires" in fine.stdout
    os.chmod(folder / "hub.db", 0o644)
    with closing(HubDatabase(folder)) as database:
        database.execute("UPDATE audit SET account = 'eve'")
    document = json.loads(run("hub", "doctor", "--registry", folder, "--json", code=1).stdout)
    assert {check["name"] for check in document["checks"] if check["state"] == "error"} == {"permissions", "audit"}


def test_doctor_tells_when_a_certificate_ends(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from tests.support.certificates import write_certificate

    run("hub", "token", "create", "ci", "--role", "write", "--registry", tmp_path / "hub")
    ended, soon = write_certificate(tmp_path / "a.pem", days=-1), write_certificate(tmp_path / "b.pem", days=5)
    assert "it ended on" in run("hub", "doctor", "--registry", tmp_path / "hub", "--certificate", ended, code=1).stdout
    assert "it ends on" in run("hub", "doctor", "--registry", tmp_path / "hub", "--certificate", soon).stdout
    assert "not a certificate" in run("hub", "doctor", "--registry", tmp_path / "hub", "--certificate", __file__, code=1).stdout
