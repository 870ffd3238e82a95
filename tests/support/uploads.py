"""A registry's side of uploads as the distribution-spec has it: one that keeps what had come when a connection broke."""

from __future__ import annotations

import json

from tests.support.proxy import Exchange


class Uploads:
    """Answers everything that a push asks; what it holds is in memory. `sent`: bytes of blobs that came."""

    def __init__(self) -> None:
        self.sessions: dict[str, bytearray] = {}
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.sent = 0

    def answer(self, found: Exchange) -> None:
        path, _, query = found.path.partition("?")
        if "/blobs/" not in path:
            self._name(found, path)
            return
        session = self.sessions.get(path, bytearray())
        if found.method == "HEAD":
            data = self.blobs.get(path.rpartition("/")[2])
            found.status = 404 if data is None else 200
            found.answer = {"content-length": str(len(data or b""))}
        elif found.method == "POST":
            path = f"{path}{len(self.sessions)}"
            self.sessions[path] = bytearray()
            found.status, found.answer = 202, {"location": path}
        elif found.method == "PATCH" and int(found.headers["content-range"].partition("-")[0]) != len(session):
            found.status = 416
        elif found.method == "PUT":
            self.sent += len(found.body)
            self.blobs[query.partition("=")[2].replace("%3A", ":")] = bytes(session + found.body)
            found.status = 201
        else:
            self.sent += len(found.body)
            session += found.body
            found.status = 202 if found.method == "PATCH" else 204
            found.answer = {"location": path, "range": f"0-{max(len(session) - 1, 0)}"}

    def _name(self, found: Exchange, path: str) -> None:
        """Manifests and tags."""
        tag = path.rpartition("/")[2]
        if found.method == "PUT":
            self.manifests[tag] = found.body
            found.status = 201
        elif path.endswith("/tags/list"):
            found.status = 200 if self.manifests else 404
            found.data = json.dumps({"tags": [tag for tag in self.manifests if ":" not in tag]}).encode()
        else:
            found.data = self.manifests.get(tag, b"")
            found.status = 200 if found.data else 404
