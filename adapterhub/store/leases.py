"""Leases: while a process needs blobs that no ref names yet, or may stop naming, it holds a file that says which.

A file in `leases/` has a line about its holder, then a digest a line. The holder keeps it locked (flock), so that one whose
holder was killed is known at once; where locks say nothing (another host, a file system or system without them) it counts for
a day after it was last written. A lease spares work; that nothing is lost hangs on the store's write lock alone.
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

from adapterhub_converters.errors import LocalIOError

ABANDONED = 24 * 3600  # seconds
_SUFFIX = ".lease"
_NEW = ".new"


class Lease:
    """One held lease; `id` is what its holder's temporary files begin with."""

    def __init__(self, ident: str, handle: int | None) -> None:
        self.id = ident
        self._handle = handle

    def note(self, digest: str) -> None:
        """Say that a blob is needed, before looking whether it is there."""
        if self._handle is not None:
            os.write(self._handle, f"{digest}\n".encode())


@contextmanager
def hold(folder: Path, kind: str, *, required: bool) -> Iterator[Lease]:
    """Hold a lease in `folder`. Who only reads goes on without one where it cannot be written, unless it is `required`."""
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
        os.rename(new, path)  # only now, locked, others take it for a lease
    except BaseException:
        os.close(handle)
        raise
    return handle


def _host() -> str:
    import platform  # not needed by who only looks

    return platform.node()


def _lock(handle: int) -> bool:
    """Whether the file is ours to lock; False when another process holds it or there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def wait_for(handle: int) -> None:
    """Have the lock of an open file until it is closed, where there are locks."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)


def noted(folder: Path) -> tuple[set[str], set[str]]:
    """The digests that live leases name, and the ids of these leases."""
    digests: set[str] = set()
    ids: set[str] = set()
    for path in _files(folder, _SUFFIX):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if not _is_dead(file.fileno(), path):
                digests.update(file.read().decode("utf-8", "replace").split("\n")[1:-1])
                ids.add(path.stem)
    return digests, ids


def dead(folder: Path) -> list[Path]:
    """The files of leases whose holders have gone."""
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
        host = json.loads(os.read(handle, 4096).split(b"\n", 1)[0]).get("host")
    except (ValueError, AttributeError):
        host = None  # half a line, as a power cut leaves it
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
