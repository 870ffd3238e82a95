"""Leases: files that list the blobs a running process needs, whether or not a ref names them.

A file in `leases/` has one line about its holder, then one digest per line. The holder keeps it locked (flock), so that the
lease of a killed process is recognized at once. Where locks prove nothing (another host, a file system or an operating system
without them), a lease is valid for a day after it was last written. Leases only save work: that no blob is lost depends on the
write lock of registry.db alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import FormatError, LocalIOError

ABANDONED = 24 * 3600  # seconds
FOLDER = "leases"
_SUFFIX = ".lease"
_NEW = ".new"


class Lease:
    """A held lease; the names of its holder's temporary files begin with `id`."""

    def __init__(self, ident: str, file: BinaryIO | None) -> None:
        self.id = ident
        self._file, self._start = file, file.tell() if file is not None else 0

    def note(self, digest: str) -> None:
        """Add a blob. Call this before checking that the store has it, so that a gc cannot remove it in between."""
        if self._file is not None:
            self._file.write(f"{digest}\n".encode())

    def replace_digests(self, digests: Iterable[str]) -> None:
        """Replace the list with these blobs. Call this while no gc can read the lease, as it might find the list incomplete."""
        if self._file is not None:
            self._file.seek(self._start)
            self._file.truncate()
            self._file.write("".join(f"{digest}\n" for digest in digests).encode())


@contextmanager
def hold(files: ConfinedFiles, kind: str, *, required: bool) -> Iterator[Lease]:
    """Hold a lease in a store. Unless it is `required`, continue without one if it cannot be written, as a reader may."""
    ident = os.urandom(12).hex()
    path = files.root / FOLDER / f"{ident}{_SUFFIX}"
    file = None
    try:
        file = _create_lease_file(files, path, kind)
    except OSError as error:
        with contextlib.suppress(OSError):
            files.remove(path.with_suffix(_NEW))
        if required:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
    try:
        yield Lease(ident, file)
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                # Removed while it is still locked, so that nobody takes it for the lease of a killed process.
                files.remove(path)
            file.close()


def _create_lease_file(files: ConfinedFiles, path: Path, kind: str) -> BinaryIO:
    files.make_dir(path.parent)
    new = path.with_suffix(_NEW)
    file = files.create(new)
    try:
        _lock(file.fileno())
        holder = {"pid": os.getpid(), "host": _host(), "time": int(time.time()), "kind": kind}
        file.write(json.dumps(holder).encode() + b"\n")
        files.move(new, path)  # named only now that it is locked: an unlocked lease looks like that of a killed process
    except BaseException:
        file.close()
        raise
    return file


def _host() -> str:
    import platform  # slow, and only writers of leases need it

    return platform.node()


def _lock(handle: int) -> bool:
    """Try to lock an open file; return False if another process has locked it, or if there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def active_leases(files: ConfinedFiles) -> tuple[set[str], set[str]]:
    """Return the digests in leases of running processes, and the ids of these leases."""
    digests: set[str] = set()
    ids: set[str] = set()
    for path in _files_with_suffix(files, _SUFFIX):
        with contextlib.suppress(FileNotFoundError), files.open(path) as file:
            if not _is_dead(file.fileno()):
                # Without the line about the holder, and without a last line that is still being written.
                digests.update(file.read().decode("utf-8", "replace").split("\n")[1:-1])
                ids.add(path.stem)
    return digests, ids


def dead_leases(files: ConfinedFiles) -> list[Path]:
    """Return the files of leases whose holders have ended."""
    dead_paths = []
    for path in _files_with_suffix(files, _NEW):
        with contextlib.suppress(FileNotFoundError):
            if _age(files.status(path)) > ABANDONED:
                dead_paths.append(path)
    for path in _files_with_suffix(files, _SUFFIX):
        with contextlib.suppress(FileNotFoundError), files.open(path) as file:
            if _is_dead(file.fileno()):
                dead_paths.append(path)
    return dead_paths


def _files_with_suffix(files: ConfinedFiles, suffix: str) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return [path for path in files.list_folder(files.root / FOLDER) if path.suffix == suffix]
    return []


def _is_dead(handle: int) -> bool:
    try:
        host = json_file.parse_object(os.read(handle, 4096).split(b"\n", 1)[0], "lease").get("host")
    except FormatError:
        host = None  # an incomplete line, as after a power cut
    # The caller reads the file from its beginning.
    os.lseek(handle, 0, os.SEEK_SET)
    old = _age(os.fstat(handle)) > ABANDONED
    # A free lock proves that the holder is gone only if it ran on this host: flock may not work across a network file system.
    return (old and not _has_locks()) or (_lock(handle) and (old or host == _host()))


def _has_locks() -> bool:
    return importlib.util.find_spec("fcntl") is not None


def _age(status: os.stat_result) -> float:
    return time.time() - status.st_mtime
