"""A proxy as companies have them: takes whole addresses for plain HTTP, CONNECT for TLS, and a password if it is to.

Every name is this machine, so that a test may call a registry what no name server knows.
"""

from __future__ import annotations

import base64
import socket
import socketserver
import threading
from typing import Any
from urllib.parse import urlsplit


class _Handler(socketserver.StreamRequestHandler):
    server: ForwardProxy

    def handle(self) -> None:
        line, headers = self.rfile.readline().decode(), []
        while (header := self.rfile.readline()) not in (b"\r\n", b"\n", b""):
            headers.append(header)
        if not line:
            return
        method, target, version = line.split()
        self.server.requests.append(f"{method} {target}")
        authorizations = [header for header in headers if header.lower().startswith(b"proxy-authorization:")]
        if self.server.password and base64.b64encode(self.server.password.encode()) not in b"".join(authorizations):
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        parts = urlsplit(target if method != "CONNECT" else f"//{target}")
        with socket.create_connection(("127.0.0.1", parts.port or 80), timeout=60) as upstream:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = parts.path + (f"?{parts.query}" if parts.query else "")
                passed = [header for header in headers if header not in authorizations] + [b"Connection: close\r\n\r\n"]
                upstream.sendall(f"{method} {path} {version}\r\n".encode() + b"".join(passed))
            back = threading.Thread(target=_pump, args=(upstream, self.connection), daemon=True)
            back.start()
            _pump(self.rfile, upstream)
            back.join(60)


def _pump(source: Any, target: socket.socket) -> None:
    read = source.read1 if hasattr(source, "read1") else source.recv
    try:
        while data := read(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class ForwardProxy(socketserver.ThreadingTCPServer):
    """A context manager that runs it; `requests` are the requests, as their first lines name them."""

    daemon_threads = True

    def __init__(self, password: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.password, self.requests = password, list[str]()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> ForwardProxy:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
