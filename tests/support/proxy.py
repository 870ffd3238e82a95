"""A proxy in front of a registry that hands on what it gets, but for what a test has it do to it."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Exchange:
    """One request and its answer; what a fault changes is what goes on.

    `hang_up`: close instead of answering. `cut`: close after so many bytes. `endless`: say no length, and never stop.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    answer: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    hang_up: bool = False
    cut: int | None = None
    wait: threading.Event | None = None
    endless: bool = False


Fault = Callable[[Exchange], None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        exchange = Exchange(self.command, self.path, {key.lower(): value for key, value in self.headers.items()}, body)
        self.server.before(exchange)
        if not exchange.status:  # a fault may answer itself
            self._ask(exchange)
        self.server.after(exchange)
        with self.server.lock:
            self.server.exchanges.append(exchange)
        self._answer(exchange)

    def _ask(self, exchange: Exchange) -> None:
        http_connection = http.client.HTTPConnection(self.server.host, timeout=60)
        length = {"content-length": str(len(exchange.body))} if exchange.method in ("POST", "PUT", "PATCH") else {}
        http_connection.request(exchange.method, exchange.path, exchange.body or None, {**exchange.headers, **length})
        response = http_connection.getresponse()
        exchange.status, exchange.data = response.status, response.read()
        exchange.answer = {key.lower(): value for key, value in response.headers.items()}
        http_connection.close()

    def _answer(self, exchange: Exchange) -> None:
        if exchange.hang_up:
            self.close_connection = True
            return
        try:
            self.send_response(exchange.status)
            has_length = "content-length" in exchange.answer or exchange.endless
            lengths = {} if has_length else {"content-length": str(len(exchange.data))}
            for key, value in {**exchange.answer, **lengths}.items():
                if key not in ("transfer-encoding", "connection", "date"):
                    self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(exchange.data[: exchange.cut])
                while exchange.endless:
                    self.wfile.write(exchange.data or b"x" * (1 << 16))
                if exchange.wait:
                    exchange.wait.wait(60)
            if exchange.cut is not None:
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _handle

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Proxy(ThreadingHTTPServer):
    """A context manager that runs it; `before` and `after` are what is done to a request and to its answer."""

    daemon_threads = True

    def __init__(self, host: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = host
        self.before: Fault = lambda _: None
        self.after: Fault = lambda _: None
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested."""

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def kill_when_noted(command: Sequence[str], folder: Path, environment: Mapping[str, str], size: int) -> None:
    """Run a command in a folder until it has noted there that it has `size` bytes of a file, and kill it."""
    process = subprocess.Popen(command, cwd=folder, env=environment)
    while max(map(_noted_size, folder.rglob("*.part.json")), default=0) < size:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()


def _noted_size(note: Path) -> int:
    try:
        return int(json.loads(note.read_text())["size"])
    except (OSError, ValueError):
        return 0
