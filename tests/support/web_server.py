"""HTTP servers on 127.0.0.1: plain files with ranges, and the endpoints of a hub that reading a base takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Answer = Callable[["Handler"], None]
"""What a server does at a path instead of serving a file."""


class Handler(BaseHTTPRequestHandler):
    """Looks for a rule of its server, then for a file."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart
    server: Web

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        rule = self.server.rules.get(path)
        if rule is not None:
            rule(self)
        elif unquote(path) in self.server.files:
            self.file(self.server.files[unquote(path)])
        else:
            self.send(404)

    do_HEAD = do_GET

    def file(self, data: bytes, **headers: str) -> None:
        """The data, or the range of it that was asked for, as RFC 9110 has it."""
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", **headers}
        range_match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not range_match:
            self.send(200, data, **etag)
            return
        start, end = int(range_match[1]), min(int(range_match[2]) + 1, len(data))
        if start >= len(data):
            self.send(416, **{"Content-Range": f"bytes */{len(data)}"})
            return
        self.send(206, data[start:end], **{**etag, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} | headers)

    def send(self, status: int, body: bytes = b"", /, **headers: str) -> None:
        """An answer; a header given here replaces the one that belongs to it."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        try:
            if self.command != "HEAD":
                with self.server.lock:
                    self.server.sent += len(body)
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Web(ThreadingHTTPServer):
    """A server of `files` (path to bytes), with `rules` for paths that misbehave. A context manager that runs it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.rules: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def add(self, folder: Path, under: str = "") -> None:
        """Serve the files of a folder."""
        self.files |= {f"{under}/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested."""

    def __enter__(self) -> Web:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


COMMIT = "5a3b" * 10


class FakeHub:
    """A hub on `web` with large files redirected to `storage`, another origin, as the real one does."""

    def __init__(self, web: Web, storage: Web, token: str | None = None) -> None:
        self.web, self.storage, self.token = web, storage, token

    def publish(self, repo: str, folder: Path, *, revision: str = "main", commit: str = COMMIT) -> None:
        siblings = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                siblings.append(self._publish(repo, str(path.relative_to(folder)), path.read_bytes(), commit))
        document = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False,
                    "gated": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        raw = json.dumps(document).encode()
        self.web.rules[f"/api/models/{repo}/revision/{revision}"] = self._guarded(lambda to: to.send(200, raw))

    def _publish(self, repo: str, name: str, data: bytes, commit: str) -> dict[str, Any]:
        digest, large = hashlib.sha256(data).hexdigest(), name.endswith((".safetensors", ".gguf", "tokenizer.json"))
        address = f"/{repo}/resolve/{commit}/{name}"
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if not large:
            self.web.rules[address] = self._guarded(lambda to: to.file(data, **{"X-Repo-Commit": commit}))
            return entry
        self.storage.files[f"/{digest}"] = data
        linked = {
            "X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)),
            "Location": f"{self.storage.url}/{digest}?signature=secret",
        }  # fmt: skip
        self.web.rules[address] = self._guarded(lambda to: to.send(302, **linked))
        return {**entry, "lfs": {"sha256": digest, "size": len(data), "pointerSize": 133}}

    def _guarded(self, answer: Answer) -> Answer:
        def rule(to: Handler) -> None:
            if self.token and to.headers.get("Authorization") != f"Bearer {self.token}":
                to.send(401, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
            else:
                answer(to)

        return rule
