"""A client that sends what it is told to, and the clients of others."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from tests.conftest import need_program
from tests.hub.conftest import Running, serving

EMPTY = {"mediaType": "application/vnd.oci.empty.v1+json", "size": 2}
EMPTY["digest"] = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """Its body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of the error that it is."""
        return str(self.json["errors"][0]["code"])

    @property
    def words(self) -> str:
        """The words of the error that it is."""
        return str(self.json["errors"][0]["message"])


class Registry:
    """One repository of a hub, by the requests of the specification."""

    def __init__(self, url: str, token: str | None, name: str = "team/other") -> None:
        self.host, self.token, self.name = urlsplit(url).netloc or url, token, name

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request to a path below the repository, or to an absolute one; `_` in the names of headers stands for `-`."""
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        if self.token:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request(method, path if path.startswith("/") else f"/v2/{self.name}/{path}", body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def put_blob(self, data: bytes, algorithm: str = "sha256") -> dict[str, Any]:
        """Upload a blob in one request; its descriptor."""
        digest = digest_of(data, algorithm)
        answer = self.ask("POST", f"blobs/uploads/?digest={digest}", data)
        assert answer.status == 201, answer.body
        return {"mediaType": "application/octet-stream", "digest": digest, "size": len(data)}

    def put(self, document: Mapping[str, Any] | bytes, reference: str = "", kind: str = MANIFEST_TYPE) -> Answer:
        """Put a manifest under a tag, or under its digest."""
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.ask("PUT", f"manifests/{reference or digest_of(raw)}", raw, Content_Type=kind)

    def put_image(self, reference: str = "", **fields: Any) -> str:
        """Put a manifest with an empty config, and other fields; its digest."""
        self.put_blob(b"{}")
        answer = self.put(image(**fields), reference)
        assert answer.status == 201, answer.body
        return str(answer.headers["docker-content-digest"])


def image(**fields: Any) -> dict[str, Any]:
    """An image manifest with an empty config."""
    return {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": EMPTY, "layers": [], **fields}


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@pytest.fixture
def registry(hub: Running) -> Registry:
    """The repository team/other, with the right to write."""
    return Registry(hub.url, hub.token)


Peer = Callable[..., str]


def logged_in(host: str, token: str, home: Path) -> dict[str, str]:
    """The variables by which programs of others are logged in to a hub, with a new home of their own."""
    home.mkdir()
    auth = base64.b64encode(f"alice:{token}".encode()).decode()
    (home / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return {"HOME": str(home), "DOCKER_CONFIG": str(home), "REGISTRY_AUTH_FILE": str(home / "config.json")}


@pytest.fixture
def peer(hub: Running, tmp_path: Path) -> Peer:
    """Run a program of others, logged in to the hub; return what it printed."""
    settings = logged_in(urlsplit(hub.url).netloc, hub.token, tmp_path / "home")

    def call(program: str, *words: object, code: int = 0, cwd: Path | None = None, **env: str) -> str:
        path = need_program(program)
        result = subprocess.run(
            [path, *map(str, words)],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=cwd or tmp_path,
            env={**os.environ, **settings, **env},
        )
        assert (result.returncode == 0) == (code == 0), result.stdout + result.stderr
        return result.stdout + result.stderr

    return call


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Running]:
    """A hub that takes files of up to 1,000 bytes."""
    with serving(tmp_path / "small", max_file=1000) as running:
        yield running
