"""Leases: files that list the blobs a running process needs although no ref names them, or although a ref may stop to.

A file in `leases/` has one line about its holder, then one digest per line. The holder keeps it locked (flock), so that the
lease of a killed process is recognized at once. Where locks are no evidence (another host, a file system or an operating system
without them), a lease is valid for a day after it was last written. Leases save work; that no blob is lost depends on the write
lock of registry.db alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, LocalIOError

ABANDONED = 24 * 3600  # seconds
_SUFFIX = ".lease"
_NEW = ".new"


class Lease:
    """A held lease; the names of its holder's temporary files begin with `id`."""

    def __init__(self, ident: str, handle: int | None) -> None:
        self.id = ident
        self._handle = handle

    def note(self, digest: str) -> None:
        """Add a blob. Call this before checking that the store has it, so that a gc cannot remove it in between."""
        if self._handle is not None:
            os.write(self._handle, f"{digest}\n".encode())


@contextmanager
def hold(folder: Path, kind: str, *, required: bool) -> Iterator[Lease]:
    """Hold a lease in `folder`. Unless it is `required`, continue without one where it cannot be written, as a reader may."""
    ident = os.urandom(12).hex()
    path = folder / f"{ident}{_SUFFIX}"
    handle = None
    try:
        handle = _make(folder, path, kind)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.with_suffix(_NEW).unlink(missing_ok=True)
        if required:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
    try:
        yield Lease(ident, handle)
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(handle)


def _make(folder: Path, path: Path, kind: str) -> int:
    folder.mkdir(exist_ok=True)
    new = path.with_suffix(_NEW)
    handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        _lock(handle)
        holder = {"pid": os.getpid(), "host": _host(), "time": int(time.time()), "kind": kind}
        os.write(handle, json.dumps(holder).encode() + b"\n")
        os.rename(new, path)  # a lease for others from here on, as it is locked
    except BaseException:
        os.close(handle)
        raise
    return handle


def _host() -> str:
    import platform  # slow, and only writers of leases need it

    return platform.node()


def _lock(handle: int) -> bool:
    """Try to lock an open file; False when another process holds it or there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def wait_for(handle: int) -> None:
    """Lock an open file until it is closed, waiting for other holders; do nothing where there are no locks."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)


def noted(folder: Path) -> tuple[set[str], set[str]]:
    """Return the digests in leases of running processes, and the ids of these leases."""
    digests: set[str] = set()
    ids: set[str] = set()
    for path in _files(folder, _SUFFIX):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if not _is_dead(file.fileno(), path):
                digests.update(file.read().decode("utf-8", "replace").split("\n")[1:-1])
                ids.add(path.stem)
    return digests, ids


def dead(folder: Path) -> list[Path]:
    """List the files of leases whose holders have ended."""
    found = [path for path in _files(folder, _NEW) if _age(path) > ABANDONED]
    for path in _files(folder, _SUFFIX):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if _is_dead(file.fileno(), path):
                found.append(path)
    return found


def _files(folder: Path, suffix: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == suffix)
    except FileNotFoundError:
        return []


def _is_dead(handle: int, path: Path) -> bool:
    try:
        host = json_file.parse_object(os.read(handle, 4096).split(b"\n", 1)[0], str(path)).get("host")
    except FormatError:
        host = None  # an incomplete line, as after a power cut
    os.lseek(handle, 0, os.SEEK_SET)
    old = _age(path) > ABANDONED
    return (old and not _has_locks()) or (_lock(handle) and (old or host == _host()))


def _has_locks() -> bool:
    return importlib.util.find_spec("fcntl") is not None


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
