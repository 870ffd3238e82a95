"""A real PostgreSQL on 127.0.0.1: a temporary cluster of an unprivileged user, since it refuses to run as root."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.conftest import need_program

_names = itertools.count()


@dataclass(frozen=True)
class Postgres:
    """A running server that trusts all who connect from this machine."""

    programs: Path
    port: int
    control: Callable[..., None]  # runs pg_ctl

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # Nothing here outlives the machine, so nothing is flushed to the disk.
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        self.control("start", "--wait", f"--options={options}")

    def stop(self) -> None:
        """End it at once, and all its connections."""
        self.control("stop", "--mode=immediate")

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop every process of it in the middle of what it does, until the block ends; no connection is closed."""
        first = int(self.sql("postgres", "SELECT pg_read_file('postmaster.pid')").split()[0])
        children = subprocess.run(["pgrep", "-P", str(first)], check=False, capture_output=True, text=True).stdout.split()
        processes = [first, *map(int, children)]

        def send(signal_number: signal.Signals) -> None:
            for process in processes:
                with suppress(ProcessLookupError):  # of psql, which is ending at this moment
                    os.kill(process, signal_number)

        try:
            send(signal.SIGSTOP)
            yield
        finally:
            send(signal.SIGCONT)

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"database_{next(_names)}"
        self.sql("postgres", f"CREATE DATABASE {name}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def sql(self, database: str, text: str) -> str:
        """What psql prints for statements: rows as lines, cells divided by `|`. `database` is a name or a URL."""
        at = database if "://" in database else f"postgresql://postgres@127.0.0.1:{self.port}/{database}"
        words = [self.programs / "psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1"]
        return subprocess.run([*words, at, "--command", text], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def running() -> Iterator[Postgres]:
    """Serve from a temporary folder until the block ends."""
    programs = _programs()
    user: dict[str, Any] = {}
    # Not below pytest's own folders, which no other user may enter.
    folder = Path(tempfile.mkdtemp(prefix="adapterhub-postgres-"))
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program: str, *words: object) -> None:
        command = [str(word) for word in (programs / program, f"--pgdata={folder / 'data'}", *words)]
        # Its server inherits what it writes to: a pipe would have us wait for the server's end.
        with open(folder / "log", "ab") as log:
            result = subprocess.run(command, check=False, stdout=log, stderr=log, cwd=folder, **user)
        assert result.returncode == 0, (folder / "log").read_text()

    try:
        # Texts in the order of a language, as most servers have it.
        order = ("--locale=C", "--locale-provider=icu", "--icu-locale=en-US")
        call("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", *order, "--no-sync")
        server = Postgres(programs, port, partial(call, "pg_ctl"))
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs, which Debian keeps off PATH: that of the newest version."""
    return Path(need_program("pg_ctl")).parent
