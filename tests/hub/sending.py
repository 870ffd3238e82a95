"""A client of a hub in raw requests, for what no client of others does at the right moment."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3

WEIGHTS = "adapter_model.safetensors"
Answer = urllib3.BaseHTTPResponse


@dataclass
class Sending:
    """A client with a token; `statuses` has what was answered."""

    url: str
    token: str = ""
    statuses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pool = urllib3.PoolManager(maxsize=1)

    def ask(self, method: str, path: str, body: Any = None, *, token: str | None = None, **headers: str) -> Answer:
        """The answer to a request, which is not tried again; a dictionary is sent as JSON. `token`: instead of its own."""
        sent = {name.replace("_", "-").lower(): value for name, value in headers.items()}
        token = self.token if token is None else token
        if token and "authorization" not in sent:
            sent["authorization"] = f"Bearer {token}"
        if isinstance(body, dict):
            body, sent["content-type"] = json.dumps(body), "application/json"
        url = path if path.startswith("http") else f"{self.url}{path}"
        answer = self._pool.request(method, url, body=body, headers=sent, redirect=False, retries=False)
        self.statuses.append(answer.status)
        return answer

    def batch(self, name: str, oid: str, size: int, operation: str = "upload") -> dict[str, Any]:
        """What git-lfs' batch API answers of one object."""
        batch = {"operation": operation, "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
        answer = self.ask("POST", f"/{name}.git/info/lfs/objects/batch", batch)
        document: dict[str, Any] = answer.json()
        return dict(document["objects"][0]) if answer.status == 200 else document

    def send(self, name: str, data: bytes, body: Iterator[bytes] | None = None) -> Answer | None:
        """Upload a file by LFS, as `body` if it is given; None if the repository has it."""
        batch = self.batch(name, hashlib.sha256(data).hexdigest(), len(data))
        if "actions" not in batch:
            return None
        return self.ask("PUT", batch["actions"]["upload"]["href"], body or data, content_length=str(len(data)))

    def commit(self, name: str, lines: bytes) -> Answer:
        """Commit to main."""
        return self.ask("POST", f"/api/models/{name}/commit/main", lines)

    def push(self, name: str, folder: Path) -> Answer:
        """Upload and commit a folder in which the weights alone are large."""
        self.ask("POST", "/api/repos/create", dict(zip(("organization", "name"), name.split("/"), strict=True)))
        sent = self.send(name, (folder / WEIGHTS).read_bytes())
        return sent if sent and sent.status != 200 else self.commit(name, commit_of(folder))


def commit_of(folder: Path, **header: str) -> bytes:
    """The body of a commit of a folder whose weights were uploaded."""
    uploaded: dict[str, bytes] = {}
    within: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        (uploaded if path.name == WEIGHTS else within)[path.name] = path.read_bytes()
    return lines_of(within, {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in uploaded.items()}, **header)


def lines_of(within: Mapping[str, bytes], uploaded: Mapping[str, tuple[str, int]] | None = None, **header: str) -> bytes:
    """The body of a commit of files by their bytes, and of files that were uploaded by their sha256 and size."""
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "a commit", **header}}]
    for path, data in within.items():
        content = base64.b64encode(data).decode()
        lines.append({"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}})
    for path, (oid, size) in (uploaded or {}).items():
        lines.append({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": size}})
    return "\n".join(map(json.dumps, lines)).encode()
