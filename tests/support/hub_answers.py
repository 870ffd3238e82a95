"""A hub of a test, which gives every request the same answer, and a client of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from adapterhub.bases.hub_address import Hub
from adapterhub.remotes.hub import hub_catalog
from adapterhub.remotes.hub.hub_catalog import HubCatalog
from adapterhub.remotes.hub.hub_client import HubAddress

ABOUT = {"program": "adapterhub", "version": "0.1.0", "api": [1]}


class _Server(ThreadingHTTPServer):
    """Answers each path with what `answers` has for it, by its end, else 404."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answers = self.server.answers
        status, headers, body = answers.get(self.path) or answers.get("*") or (404, {}, b"{}")
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(document: Any = None, *, status: int = 200, about: Any = ABOUT, **headers: str) -> Iterator[HubAddress]:
    server = _Server(("127.0.0.1", 0), _Handler)
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    server.answers = {"*": (status, headers, body)}
    if about is not None:
        server.answers["/api/adapterhub"] = 200, {}, json.dumps(about).encode()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield HubAddress.parse(f"hub+http://127.0.0.1:{server.server_port}/team/sql")
    finally:
        server.shutdown()
        server.server_close()


def connect(address: HubAddress) -> HubCatalog:
    catalog = hub_catalog.connect(address, Hub(address.endpoint, None))
    assert catalog is not None
    return catalog
