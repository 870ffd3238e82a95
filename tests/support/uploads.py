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

    def answer(self, exchange: Exchange) -> None:
        path, _, query = exchange.path.partition("?")
        if "/blobs/" not in path:
            self._name(exchange, path)
            return
        session = self.sessions.get(path, bytearray())
        if exchange.method == "HEAD":
            data = self.blobs.get(path.rpartition("/")[2])
            exchange.status = 404 if data is None else 200
            exchange.answer = {"content-length": str(len(data or b""))}
        elif exchange.method == "POST":
            path = f"{path}{len(self.sessions)}"
            self.sessions[path] = bytearray()
            exchange.status, exchange.answer = 202, {"location": path}
        elif exchange.method == "PATCH" and int(exchange.headers["content-range"].partition("-")[0]) != len(session):
            exchange.status = 416
        elif exchange.method == "PUT":
            self.sent += len(exchange.body)
            self.blobs[query.partition("=")[2].replace("%3A", ":")] = bytes(session + exchange.body)
            exchange.status = 201
        else:
            self.sent += len(exchange.body)
            session += exchange.body
            exchange.status = 202 if exchange.method == "PATCH" else 204
            exchange.answer = {"location": path, "range": f"0-{max(len(session) - 1, 0)}"}

    def _name(self, exchange: Exchange, path: str) -> None:
        """Manifests and tags."""
        tag = path.rpartition("/")[2]
        if exchange.method == "PUT":
            self.manifests[tag] = exchange.body
            exchange.status = 201
        elif path.endswith("/tags/list"):
            exchange.status = 200 if self.manifests else 404
            exchange.data = json.dumps({"tags": [tag for tag in self.manifests if ":" not in tag]}).encode()
        else:
            exchange.data = self.manifests.get(tag, b"")
            exchange.status = 200 if exchange.data else 404
