"""What a client of a hub can take at most: each attack against a hub of its own limits, measured, next to the limit.

A client without an account, and a member of a namespace that may hold QUOTA bytes. Memory is the growth of the hub's process,
disk that of its folder, CPU that of all its threads. The exit code is 1 if anything is over its limit.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import selectors
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MIB = 1 << 20
QUOTA = 10 * MIB
_BASE = 48  # MiB of threads, imports and the allocator, which are there once
_HEAD = 128 << 10  # bytes of a connection before its body is asked for
_PATIENCE = 1.5  # seconds without a byte that the hub takes
_FILES = 64  # that a hub opens for requests of its own
_COMMIT = "/api/models/red/open/commit/main"
STRANGER, MEMBER = "a stranger", f"a member who may hold {QUOTA // MIB} MiB"
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Row:
    """An attack, what it took, and what it may take at most; both in `unit`."""

    attacker: str
    attack: str
    took: float
    limit: float
    unit: str


@dataclass
class Target:
    """A running hub and the token of a member of the namespace `red`."""

    url: str
    token: str
    pid: int
    folder: Path

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    def ask(self, method: str, path: str, body: bytes = b"", token: str = "", **headers: str) -> tuple[int, bytes]:
        """The status and the body of an answer; 0 for a connection that was cut."""
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        sent = {"authorization": f"Bearer {token}"} if token else {}
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body or None, {**sent, **headers})
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                return 0, b""

    def memory(self) -> float:
        """Bytes in memory."""
        match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        return int(match[1]) * 1024.0 if match else 0.0

    def disk(self) -> float:
        """Bytes of the files of the store."""
        total = 0
        for path in (self.folder / ".adapterhub").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return float(total)

    def rows(self) -> float:
        """Rows of the audit log."""
        with contextlib.closing(sqlite3.connect(f"file:{self.folder / 'hub.db'}?mode=ro", uri=True)) as database:
            return float(database.execute("SELECT count(*) FROM audit").fetchone()[0])

    def files(self) -> float:
        """Open files, connections among them."""
        return float(len(os.listdir(f"/proc/{self.pid}/fd")))

    def wait_until_idle(self) -> None:
        """Wait until it has used no CPU for half a second."""
        before = -1.0
        while (now := self.cpu()) != before:
            before = now
            time.sleep(0.5)

    def cpu(self) -> float:
        """Seconds of CPU."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK

    def memory_while_held(self, head: bytes, size: int, count: int) -> float:
        """Return by how much memory grows while connections have sent a head and `size` bytes, as far as the hub takes them."""
        before, unsent, last = self.memory(), {}, time.monotonic()
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            data = head + b" " * size
            for _ in range(count):
                sock = stack.enter_context(socket.create_connection(self.address, 60))
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_WRITE, sock)
                unsent[sock] = memoryview(data)
            while unsent and time.monotonic() - last < _PATIENCE:
                for key, _ in selector.select(0.1):
                    sock = key.data
                    try:
                        unsent[sock], last = unsent[sock][sock.send(unsent[sock]) :], time.monotonic()
                    except OSError:  # the hub has cut it
                        unsent[sock] = unsent[sock][:0]
                    if not unsent[sock]:
                        selector.unregister(sock)
                        del unsent[sock]
            return max(self.memory() - before, 0.0)


@contextlib.contextmanager
def growth(measured: Callable[[], float]) -> Iterator[list[float]]:
    """Append how much more there is at the end of a block."""
    before, grown = measured(), list[float]()
    yield grown
    grown.append(max(measured() - before, 0.0))


def _bodies(hub: Target, part: int) -> list[Row]:
    from adapterhub.hub import app

    count = 120 // part
    grown = hub.memory_while_held(_head("POST", "/api/models/red/open/paths-info/main", 4 * MIB), 4 * MIB - 1, count)
    limit = app.BODY_LIMITS.stranger / MIB + _BASE
    return [Row(STRANGER, f"{count} bodies of 4 MiB without an end", grown / MIB, limit, "MiB")]


def _heads(hub: Target, part: int) -> list[Row]:
    from adapterhub.http_server import client_connections

    assert 2 * client_connections.MAX_HEAD == _HEAD
    count = 1500 // part
    grown = hub.memory_while_held(_head("GET", "/", 0)[:-2] + b"X-Long: ", 60 << 10, count)
    return [Row(STRANGER, f"{count} heads of 60 KiB without an end", grown / MIB, count * _HEAD / MIB + _BASE, "MiB")]


def _connections(hub: Target, part: int) -> list[Row]:
    from adapterhub.hub import server

    count = 3000 // part
    before = hub.files()
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(hub.address, 60))
        # Those in the queue of the system are accepted, and cut, by then.
        hub.wait_until_idle()
        opened = hub.files() - before
    return [Row(STRANGER, f"{count} connections", opened, server.MAX_CONNECTIONS + _FILES, "open")]


def _cursors(hub: Target, part: int) -> list[Row]:
    count = 500 // part
    with growth(hub.memory) as memory:
        for number in range(count):
            hub.ask("GET", f"/api/models/red/open/tree/main?cursor={number}{'c' * 50_000}")
    return [Row(STRANGER, f"{count} cursors of 50 kB", memory[0] / MIB, 16 + _BASE, "MiB")]


def _refusals(request_kind: str, method: str, path: str, token: str = "") -> Callable[[Target, int], list[Row]]:
    """Return the attack that sends a request which is refused, again and again."""

    def attack(hub: Target, part: int) -> list[Row]:
        from adapterhub.hub import middleware

        count = 1500 // part
        with growth(hub.rows) as log_rows, growth(hub.cpu) as seconds, growth(hub.disk) as disk:
            statuses = [hub.ask(method, path, token=token)[0] for _ in range(count)]
        read = count - statuses.count(429)
        # A minute may end meanwhile.
        return [
            Row(STRANGER, f"{count} {request_kind}", log_rows[0], 2 * middleware.STRANGER_ROWS, "rows of the log"),
            Row(STRANGER, f"{count} {request_kind}", read, 2 * middleware.REFUSALS, "read"),
            Row(STRANGER, f"{count} {request_kind}", seconds[0], count * 0.01, "CPU seconds"),
            Row(STRANGER, f"{count} {request_kind}", disk[0] / MIB, 1, "MiB on the disk"),
        ]

    return attack


def _lines(hub: Target, part: int) -> list[Row]:
    from adapterhub.hub import app

    count = 60 // part
    head = _head("POST", _COMMIT, 8 * MIB, f"Authorization: Bearer {hub.token}")
    with growth(hub.disk) as disk:
        grown = hub.memory_while_held(head, 8 * MIB - 1, count)
    limit = app.BODY_LIMITS.account / MIB + _BASE
    return [
        Row(MEMBER, f"{count} lines of 8 MiB without an end", grown / MIB, limit, "MiB"),
        Row(MEMBER, f"{count} lines of 8 MiB without an end", disk[0] / MIB, QUOTA / MIB + 1, "MiB on the disk"),
    ]


def _storage(hub: Target, part: int) -> list[Row]:
    from adapterhub.hub.accounts import audit_log

    stored = hub.disk()
    with growth(hub.disk) as disk:
        for number in range(4):
            hub.ask("POST", _COMMIT, _commit(number, 16 * MIB // part), hub.token)
    rows = [Row(MEMBER, "four commits of 16 MiB", disk[0] / MIB, QUOTA / MIB + 1, "MiB on the disk")]
    with growth(hub.disk) as disk:
        hub.ask("PUT", "/v2/red/open/manifests/note", _manifest(2 * MIB), hub.token, **{"content-type": _MANIFEST})
        for number in range(60 // part):
            hub.ask("POST", f"/api/models/red/open/branch/b{number}", b"{}", hub.token)
    rows.append(Row(MEMBER, f"a manifest of 2 MiB, and {60 // part} branches", disk[0] / MIB, 8, "MiB on the disk"))
    count = 300 // part
    with growth(hub.disk) as disk, growth(hub.rows) as log_rows, growth(hub.cpu) as seconds:
        accepted_count = [hub.ask("POST", _COMMIT, _commit(number, 10), hub.token)[0] for number in range(count)].count(200)
    rows.append(
        Row(MEMBER, f"{count} commits of a line, {accepted_count} taken", disk[0] / MIB, count * 8 / 1024, "MiB on the disk")
    )
    rows.append(Row(MEMBER, f"{count} commits of a line", log_rows[0], min(count, audit_log.MAX_ROWS), "rows of the log"))
    rows.append(Row(MEMBER, f"{count} commits of a line", seconds[0], count * 0.2, "CPU seconds"))
    # Until nothing more is taken, so that the limit is reached.
    for number in range(60 // part):
        hub.ask("POST", _COMMIT, _commit(number, MIB), hub.token)
    return [
        *rows,
        Row(MEMBER, "all of these, and commits of 1 MiB", (hub.disk() - stored) / MIB, QUOTA / MIB + 3, "MiB on the disk"),
    ]


ATTACKS: tuple[Callable[[Target, int], list[Row]], ...] = (
    _bodies, _heads, _connections, _cursors, _lines, _storage,
    _refusals("refused requests", "PUT", f"/lfs/a/b/{'0' * 64}?signature=1"),
    _refusals("forms without a session", "POST", "/-/account/token"),
    _refusals("wrong tokens", "GET", "/api/whoami-v2", f"hf_{'x' * 40}"),
)  # fmt: skip
"""Each is of a hub that has just started: freed memory that an earlier one took would hide what it takes."""


def show(rows: list[Row]) -> bool:
    """Print a table; return whether everything is within its limits."""
    print(f"{'who':36}{'what':44}{'took':>9}{'limit':>9}")
    for row in rows:
        verdict = "" if row.took <= row.limit else "  OVER"
        print(f"{row.attacker:36}{row.attack:44}{row.took:9.1f}{row.limit:9.0f}  {row.unit}{verdict}")
    return all(row.took <= row.limit for row in rows)


def _head(method: str, path: str, size: int, *lines: str) -> bytes:
    fields = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        *lines,
    ]
    return "\r\n".join([*fields, "", ""]).encode()


_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def _commit(number: int, size: int) -> bytes:
    """A commit of files of at most 4 MiB, of so many new bytes in all."""
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": str(number)}}]
    for at in range(0, size, 4 * MIB):
        content = base64.b64encode(os.urandom(min(size - at, 4 * MIB))).decode()
        lines.append({"key": "file", "value": {"path": f"{at}.txt", "content": content, "encoding": "base64"}})
    return "\n".join(map(json.dumps, lines)).encode()


def _manifest(size: int) -> bytes:
    empty = {"mediaType": "application/vnd.docker.image.rootfs.foreign.x", "digest": f"sha256:{'0' * 64}", "size": 2}
    document = {"schemaVersion": 2, "mediaType": _MANIFEST, "artifactType": "application/x-note", "config": empty, "layers": []}
    return json.dumps({**document, "annotations": {"x": "y" * size}}).encode()
