"""One run of some 500 requests, to a hub of one folder and to one over PostgreSQL and a bucket: they answer the same.

What a run itself makes differs: tokens, ids, times, digests over them. Each such word stands for its place among those of its
run, so that a difference in what it means is still seen.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.registry.repository_documents import commit_id
from tests.hub.conftest import Running, serving
from tests.hub.oci.conftest import EMPTY, MANIFEST_TYPE, image
from tests.hub.sending import WEIGHTS, Answer, Sending, commit_of, lines_of
from tests.hub.xet.test_receiving import XORB, Sender, chunk, shard
from tests.support.adapters import write_adapter

pytestmark = pytest.mark.peer
# Of the moment, of the connection, or counted by each process.
_APART = {"date", "server", "x-request-id", "connection", "keep-alive", "ratelimit", "transfer-encoding"}
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d(?::|%3A)\d\d(?:(?::|%3A)\d\d)?(?:\.\d+)?(?:Z|\+00:00| UTC)?"  # also in an address
    r"|\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT"
)
_UNTIL = re.compile(r"\b\d{10}(?:(?:&signature=|&amp;signature=|\.)[0-9a-f]{64})?\b")  # and what is signed with it
_MADE = re.compile(r"\b(?:hf_\w{40}|[0-9a-f]{16,})\b")


@dataclass
class Recording:
    """Asks a hub, and keeps what was asked and answered, without what belongs to this hub alone."""

    hub: Running
    lines: list[str] = field(default_factory=list)

    def client(self, token: str) -> Sending:
        """A client whose requests are recorded."""
        sending = Sending(self.hub.url, token)
        ask = sending.ask

        def recorded(method: str, path: str, body: Any = None, **options: Any) -> Answer:
            answer = ask(method, path, body, **options)
            headers = {name.lower(): value for name, value in answer.headers.items() if name.lower() not in _APART}
            about = [method, path, str(answer.status), json.dumps(headers, sort_keys=True), answer.data.decode("latin-1")]
            text = " ".join(about).replace(self.hub.url, "http://hub").replace(self.hub.url.partition("//")[2], "hub")
            self.lines.append(_UNTIL.sub("UNTIL", _TIME.sub("TIME", text)))
            return answer

        sending.ask = recorded  # type: ignore[method-assign]
        return sending

    def words(self) -> set[str]:
        """The words that only a run like this may have."""
        return {word for line in self.lines for word in _MADE.findall(line)}

    def beside(self, other_recording: Recording) -> Iterator[str]:
        """The lines, with a number in place of each word that the other run has not."""
        shared, numbers = other_recording.words(), itertools.count()
        places: dict[str, str] = {}

        def place(match: re.Match[str]) -> str:
            word = match[0]
            return word if word in shared else places.setdefault(word, f"<{next(numbers)}>")

        return (_MADE.sub(place, line) for line in self.lines)


def reads(names: list[str], digests: list[str]) -> list[tuple[str, str]]:
    """What anybody may ask at any time, about names and versions that may exist or not."""
    of_hub = [
        "/api/models", "/api/models?search=sql", "/api/models?author=team&limit=1", "/api/models?filter=lora&full=true",
        "/api/models-tags-by-type", "/api/whoami-v2", "/api/users/alice/overview", "/api/organizations/team/overview",
        "/v2/", "/v2/_catalog?n=2", "/", "/?q=sql", "/-/bases", "/team", "/nobody", "/no/such/page", "/api/datasets/team/sql",
    ]  # fmt: skip
    requests = [("GET", path) for path in of_hub]
    for name in names:
        requests += [
            ("GET", f"/api/models/{name}{suffix}") for suffix in ("", "/refs", "/commits/main", "/tree/main?recursive=true")
        ]
        requests += [
            ("GET", f"/api/models/{name}/revision/{revision}") for revision in ("v1", "none", *map(commit_id, digests))
        ]
        requests += [(method, f"/{name}/resolve/main/{path}") for method in ("HEAD", "GET") for path in (WEIGHTS, "README.md")]
        requests += [
            ("GET", f"/v2/{name}/{suffix}") for suffix in ("tags/list", "manifests/latest", "manifests/v1", "manifests/none")
        ]
        requests += [("HEAD", f"/v2/{name}/manifests/{digest}") for digest in digests]
        requests += [("GET", f"/v2/{name}/referrers/{digest}") for digest in digests]
        requests += [("GET", f"/{name}{suffix}") for suffix in ("", "/versions", "/tree/main", "/v/1")]
    return requests


def run(hub: Running, folder: Path) -> Recording:
    """The whole run: writes by each protocol, and after some of them all reads, by a member, a stranger and nobody."""
    recording = Recording(hub)
    alice = recording.client(hub.token)
    eve = recording.client(hub.make_token("eve", "write", namespaces=["eve"]))
    adapters = [write_adapter(folder / f"sql-{seed}", seed) for seed in range(4)]
    digests = [oci_manifest.build(adapter).digest for adapter in adapters[:2]]

    def look(*names: str) -> None:
        for client, (method, path) in itertools.product((alice, eve, recording.client("")), reads([*names], digests[:1])):
            client.ask(method, path)

    alice.ask("POST", "/api/repos/create", {"name": "team/sql"})
    alice.ask("POST", "/api/repos/create", {"name": "team/sql"})
    eve.ask("POST", "/api/repos/create", {"name": "team/other"})
    alice.commit("team/sql", lines_of({"README.md": b"# To come\n"}))
    alice.push("team/sql", adapters[0])
    alice.push("team/sql", adapters[0])
    look("team/sql")
    by_hf(alice, eve, adapters)
    by_xet(recording, alice, adapters[3])
    by_oci(alice, eve, adapters[2])
    look("team/sql", "team/secret")
    alice.ask("POST", "/api/repos/move", {"fromRepo": "team/sql", "toRepo": "team/moved"})
    alice.ask("DELETE", "/api/repos/delete", {"name": "team/secret"})
    look("team/moved")
    for path in ("/api/models/team/sql", f"/team/sql/resolve/main/{WEIGHTS}", "/api/models/team/secret"):
        alice.ask("GET", path)
    return recording


def by_hf(alice: Sending, eve: Sending, adapters: list[Path]) -> None:
    """Branches, tags, conflicts, refusals, and a repository that not everybody may see."""
    model = "/api/models/team/sql"
    alice.push("team/sql", adapters[1])
    head = alice.ask("GET", model).json()["sha"]
    alice.ask("POST", f"{model}/branch/try", {})
    alice.ask("POST", f"{model}/tag/main", {"tag": "prod", "message": "the first"})
    alice.ask("POST", f"{model}/tag/main", {"tag": "prod"})
    alice.ask("POST", f"{model}/commit/try", lines_of({"notes.txt": b"a note"}))
    alice.ask("POST", f"{model}/commit/main", lines_of({"notes.txt": b"late"}, parentCommit="0" * 40))
    alice.ask("POST", f"{model}/commit/main", lines_of({"x.bin": b"\x80\x04\x95pickle"}))
    alice.ask("POST", f"{model}/commit/main", lines_of({}, {"y": ("0" * 64, 5)}))
    alice.ask("POST", f"{model}/commit/main", b"{not json")
    alice.ask("POST", f"{model}/preupload/main", {"files": [{"path": WEIGHTS, "size": 10**8, "sample": ""}]})
    alice.ask("POST", f"{model}/paths-info/main", {"paths": [WEIGHTS, "none"], "expand": True})
    eve.ask("POST", f"{model}/commit/main", lines_of({"notes.txt": b"mine"}))
    eve.push("eve/sql", adapters[1])
    for ranged in ("bytes=0-9", "bytes=-5", "bytes=999999999-", "bytes=x"):
        alice.ask("GET", f"/team/sql/resolve/{head}/{WEIGHTS}", range=ranged)
    for path in ("", "/tree/try", "/refs", f"/compare/{head}..try", "/safetensors-metadata/main", "/auth-check"):
        alice.ask("GET", f"{model}{path}")
    for name in ("team/sql.v1", "team/sql.v9", "team/sql.mlx", "team/sql.v1.mlx"):
        alice.ask("GET", f"/api/models/{name}")
        alice.ask("GET", f"/v2/{name}/manifests/latest")
    alice.ask("DELETE", f"{model}/tag/prod")
    alice.ask("DELETE", f"{model}/branch/try")
    alice.ask("DELETE", f"{model}/branch/main")
    alice.ask("POST", "/api/repos/create", {"name": "team/secret", "private": True})
    alice.push("team/secret", adapters[0])
    alice.ask("PUT", f"{model}/settings", {"private": True})
    eve.ask("GET", model)
    alice.ask("PUT", f"{model}/settings", {"private": False})
    eve.ask("GET", model, token="hf_" + "0" * 40)


def by_xet(recording: Recording, alice: Sending, adapter: Path) -> None:
    """A file in a xorb, one whose xorb is not there, and the commit with it."""
    data = (adapter / WEIGHTS).read_bytes()
    sender = Sender(recording.hub, "team/sql", alice.token)

    def send(path: str, body: bytes) -> None:
        alice.ask("POST", f"{sender.url}{path}", body, **sender.headers)

    send(f"/v1/xorbs/default/{XORB}", chunk(data))
    send(f"/v1/xorbs/default/{XORB}", chunk(data))
    send(f"/v1/xorbs/default/{'1' * 64}", b"not a xorb")
    send("/v1/shards", shard(hashlib.sha256(data).digest(), [(XORB, len(data), 0, 1)]))
    send("/v1/shards", shard(hashlib.sha256(data).digest(), [("2" * 64, len(data), 0, 1)]))
    alice.commit("team/sql", commit_of(adapter))


def by_oci(alice: Sending, eve: Sending, adapter: Path) -> None:
    """Blobs and manifests: of an adapter, of an image and its referrer, and what is refused."""

    def put_blob(name: str, data: bytes, client: Sending = alice) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        client.ask("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data)
        client.ask("HEAD", f"/v2/{name}/blobs/{digest}")
        return digest

    def put_manifest(name: str, document: dict[str, Any] | bytes, reference: str) -> None:
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        alice.ask("PUT", f"/v2/{name}/manifests/{reference}", raw, content_type=MANIFEST_TYPE)

    manifest = oci_manifest.build(adapter)
    for path in sorted(adapter.iterdir()):
        put_blob("team/sql", path.read_bytes())
    put_manifest("team/sql", manifest.raw, "early")
    put_blob("team/sql", manifest.config_bytes)
    for layer in manifest.layers:
        if not (adapter / layer.path).exists():
            put_blob("team/sql", b"another")
    put_manifest("team/sql", manifest.raw, "early")
    layer = put_blob("team/tool", b"a layer")
    put_blob("team/tool", b"{}")
    put_blob("team/sql", b"not mine", eve)
    layers = [{"mediaType": "text/plain", "digest": layer, "size": 7}]
    put_manifest("team/tool", image(layers=layers), "one")
    raw = json.dumps(image(layers=layers)).encode()
    subject = {"mediaType": MANIFEST_TYPE, "digest": f"sha256:{hashlib.sha256(raw).hexdigest()}", "size": len(raw)}
    put_manifest("team/tool", image(layers=[EMPTY], subject=subject, artifactType="text/x-note"), "note")
    put_manifest("team/tool", image(layers=[{**layers[0], "digest": f"sha256:{'3' * 64}"}]), "broken")
    put_manifest("team/tool", b"{", "broken")
    alice.ask("POST", f"/v2/team/again/blobs/uploads/?mount={layer}&from=team/tool")
    eve.ask("POST", f"/v2/eve/again/blobs/uploads/?digest=sha256:{'4' * 64}", b"other bytes")
    for path in ("tags/list", "tags/list?n=1", "manifests/one", "manifests/note", f"referrers/{subject['digest']}"):
        alice.ask("GET", f"/v2/team/tool/{path}")
    alice.ask("GET", f"/v2/team/tool/blobs/{layer}", range="bytes=2-4")
    alice.ask("DELETE", f"/v2/team/tool/blobs/{layer}")
    alice.ask("DELETE", "/v2/team/tool/manifests/note")
    alice.ask("GET", f"/v2/team/tool/referrers/{subject['digest']}")


@pytest.fixture
def timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have time matter to no answer: each move is a second after the one before, and no page is of some seconds ago."""
    start = datetime.datetime.now(datetime.UTC)
    times = (start + datetime.timedelta(seconds=number) for number in itertools.count())
    stopped = SimpleNamespace(UTC=datetime.UTC, datetime=SimpleNamespace(now=lambda _: next(times)))
    monkeypatch.setattr("adapterhub.registry.moves.datetime", stopped)
    monkeypatch.setattr("adapterhub.hub.downloads._INTERVAL", 1e9)


def test_both_storages_give_the_same_answers_to_one_run(timeless: None, places: dict[str, Any], tmp_path: Path) -> None:
    with serving(tmp_path / "folder") as of_folder, serving(tmp_path / "shared", **places) as of_bucket:
        result, again = run(of_folder, tmp_path / "run"), run(of_bucket, tmp_path / "again")
    assert len(result.lines) == len(again.lines) > 500
    for theirs, ours in zip(again.beside(result), result.beside(again), strict=True):
        assert theirs == ours
