"""A hub in a process of its own that can be killed: at once, or at a chosen moment of what a client sends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.maintenance.fsck import fsck
from adapterhub.registry.registry import Registry
from tests.conftest import ROOT
from tests.hub.conftest import Running


def assert_sound(folder: Path) -> None:
    """Assert that every byte, log and index of a registry is right; what killed commands left to a gc is no fault."""
    with closing(Registry.open(folder)) as registry:
        assert [str(finding) for finding in fsck(registry) if finding.severity != "note"] == []


@dataclass
class Killable:
    """A hub in a process of its own, on a port that it gets again when it is started again."""

    folder: Path
    port: int = 0
    upstream: str = ""  # a hub whose models it keeps
    replicate: tuple[str, str] = ("", "")  # the URL of a hub to which it copies everything, and a token there

    def start(self) -> None:
        """Start it and wait until it answers."""
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as sock:
                self.port = sock.getsockname()[1]
        code = "import sys\nfrom pathlib import Path\nfrom adapterhub.hub.server import serve\n"
        code += "from adapterhub.bases.hub_address import Hub\n"
        code += "from adapterhub.hub.settings import HubSettings, ModelUpstream, Replication\n"
        code += "from adapterhub.remotes.remote_address import UserSettings\n"
        code += "upstream = ModelUpstream(sys.argv[3], 'cache') if sys.argv[3] else None\n"
        code += "user = UserSettings(None, lambda: Hub('http://localhost:1', None), login=lambda *_: sys.argv[5])\n"
        code += "replications = (Replication('*', sys.argv[4], user),) if sys.argv[4] else ()\n"
        code += "settings = HubSettings(registry=Path(sys.argv[1]), port=int(sys.argv[2]), upstream=upstream,"
        code += " replications=replications)\nserve(settings, ready=print)"
        self.folder.mkdir(exist_ok=True)
        words = [sys.executable, "-c", code, str(self.folder), str(self.port), self.upstream, *self.replicate]
        paths = os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))
        self.process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
        while True:
            assert self.process.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a loss of power would, but for what the system has not written yet."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def url(self) -> str:
        """Its address, always the same."""
        return f"http://127.0.0.1:{self.port}"

    def running(self) -> Running:
        """It as other tests know a hub, with a token that may write everywhere."""
        with closing(HubDatabase(self.folder)) as database:
            token = access_tokens.create(database, "alice", "write")
        return Running(self.url, HubSettings(registry=self.folder), token)

    @property
    def peak(self) -> float:
        """The most memory that its process has had, in MB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


@contextlib.contextmanager
def killable_hub(folder: Path, *, upstream: str = "") -> Iterator[Killable]:
    """A hub that can be killed, and is in the end."""
    running = Killable(folder, upstream=upstream)
    running.start()
    try:
        yield running
    finally:
        running.kill()


@dataclass(frozen=True)
class Moment:
    """When a hub is killed.

    Attributes:
        sent: Once clients have sent so many bytes.
        request: Instead, once it got a request in whose head these bytes are, such as `PUT /`.
        answered: Only when it answers that request; its client never reads the answer.
    """

    sent: int = 0
    request: bytes = b""
    answered: bool = False


@dataclass(eq=False)
class _Connection:
    client: socket.socket
    hub: socket.socket
    has_sent: bool = False  # the request of the moment was sent over it


class Killer:
    """A proxy before a hub that kills it at a moment, cuts all connections, and starts it again. `with` runs it."""

    def __init__(self, killable: Killable) -> None:
        self._killable = killable
        self._moment: Moment | None = None
        self._sent = 0
        self._connections: set[_Connection] = set()
        self._lock = threading.RLock()  # held while the hub is away
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Killer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._moment = None
            self._socket.close()
            self._cut()

    def at(self, moment: Moment) -> None:
        """Choose the next moment; bytes count from here."""
        with self._lock:
            self._moment, self._sent = moment, 0

    def has_killed(self) -> bool:
        """Whether the moment has come; if so, wait until the hub is back."""
        with self._lock:
            return self._moment is None

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            try:
                hub = socket.create_connection(("127.0.0.1", self._killable.port))
            except OSError:  # it was killed, and is not back yet
                client.close()
                continue
            connection = _Connection(client, hub)
            with self._lock:
                self._connections.add(connection)
            for hand_on in (self._up, self._down):
                threading.Thread(target=self._guarded, args=(hand_on, connection), daemon=True).start()

    def _guarded(self, hand_on: Callable[[_Connection], None], connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            hand_on(connection)
        with self._lock:
            self._connections.discard(connection)
        _end(connection)

    def _up(self, connection: _Connection) -> None:
        while piece := connection.client.recv(1 << 16):
            with self._lock:
                piece, due = self._counted(connection, piece)
            connection.hub.sendall(piece)
            if due:
                self._kill()

    def _counted(self, connection: _Connection, piece: bytes) -> tuple[bytes, bool]:
        """What is handed on of a piece, and whether the hub is to be killed then."""
        moment, due = self._moment, False
        self._sent += len(piece)
        if moment and moment.request:
            connection.has_sent |= moment.request in piece
            due = connection.has_sent and not moment.answered
        elif moment and self._sent >= moment.sent:
            due, piece = True, piece[: len(piece) - (self._sent - moment.sent)]
        return piece, due

    def _down(self, connection: _Connection) -> None:
        while piece := connection.hub.recv(1 << 16):
            with self._lock:
                if self._moment and self._moment.answered and connection.has_sent:
                    self._kill()
                    return
            connection.client.sendall(piece)

    def _kill(self) -> None:
        with self._lock:
            if self._moment is None:  # two connections were due
                return
            self._moment = None
            self._killable.kill()
            self._cut()
            self._killable.start()

    def _cut(self) -> None:
        for connection in self._connections:
            _end(connection)


def _end(connection: _Connection) -> None:
    for sock in (connection.client, connection.hub):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
