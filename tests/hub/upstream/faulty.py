"""A hub with one model that does with its files what a test asks for: it lies, is slow, or ends in the middle."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "org/model"
PATH = "model.bin"


class Faulty(ThreadingHTTPServer):
    """The hub; each attribute may be changed while it runs.

    Attributes:
        listed: The bytes of the file whose size and digest the hub lists.
        sent: Other bytes that it sends instead, if any.
        other_files: Other files by path, which it always sends at once.
        cut: Bytes of a body after which the connection is cut, once; None for never.
        slow_after: Bytes of a body after which the rest waits for `go`; None for never.
        drips: Whether it sends 100 bytes of the file at a time, 5 kB a second, until `go`.
        ranges: Whether it answers a request of a part with that part.
        ended: The bodies of which it could not send all, as the client had gone.
        hangs: Whether its documents, too, wait for `go`.
        location: Where a request of the file is redirected to; empty for nowhere.
        refuses: The status of all answers; 0 to answer.
        code: The code of the error then.
        extra: What its document says besides, or instead.
        requests: Method, path and headers of the requests so far.
    """

    daemon_threads = True

    def __init__(self, listed: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.listed, self.sent, self.other_files = listed, None, dict[str, bytes]()
        self.cut: int | None = None
        self.slow_after: int | None = None
        self.go, self.hangs = threading.Event(), False
        self.drips, self.ranges, self.ended = False, True, 0
        self.location, self.refuses, self.code, self.extra = "", 0, "", dict[str, Any]()
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    sent: bytes | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def commit(self) -> str:
        return hashlib.sha1(self.listed).hexdigest()

    @property
    def downloads(self) -> list[str]:
        """The ranges that were asked of the file; empty for all of it."""
        return [headers.get("range", "") for _, path, headers in self.requests if "/resolve/" in path]

    def handle_error(self, *_: object) -> None:
        """Nothing: a client has ended."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        if hub.hangs and "/resolve/" not in self.path:
            hub.go.wait(20)
        if hub.refuses:
            self._send(hub.refuses, b"{}", **{"X-Error-Code": hub.code})
        elif "/resolve/" not in self.path:
            self._send(200 if self.path.startswith(f"/api/models/{NAME}/") else 404, json.dumps(self._document()).encode())
        elif hub.location:
            self._send(302, b"", Location=hub.location)
        elif other_file := hub.other_files.get(self.path.rpartition("/")[2]):
            self._send(200, other_file)
        else:
            self._send_file(hub.listed if hub.sent is None else hub.sent)

    def _document(self) -> dict[str, Any]:
        siblings = []
        for path, data in {PATH: self.server.listed, **self.server.other_files}.items():
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append({"rfilename": path, "size": len(data), "blobId": "0" * 40, "lfs": lfs})
        return {"id": NAME, "sha": self.server.commit, "siblings": siblings, **self.server.extra}

    def _send_file(self, data: bytes) -> None:
        hub = self.server
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if hub.ranges else None
        start, end = (int(byte_range[1]), min(int(byte_range[2]) + 1, len(data))) if byte_range else (0, len(data))
        self.send_response(206 if byte_range else 200)
        if byte_range:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if hub.drips:
            self._drip(data[start:end])
            return
        for position in range(start, end, 1 << 14):
            if hub.slow_after is not None and position >= hub.slow_after:
                hub.go.wait(20)
            if hub.cut is not None and position >= hub.cut:
                hub.cut = None
                self.close_connection = True
                return
            self.wfile.write(data[position : min(position + (1 << 14), end)])

    def _drip(self, data: bytes) -> None:
        try:
            for position in range(0, len(data), 100):
                self.server.go.wait(0.02)
                self.wfile.write(data[position : position + 100])
        except OSError:
            self.server.ended += 1
            self.close_connection = True

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def faulty_hub(listed: bytes) -> Iterator[Faulty]:
    """A faulty hub that runs for the block, and can be ended and started again by nobody."""
    hub = Faulty(listed)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go.set()
        hub.shutdown()
        hub.server_close()
