"""Xorbs, each kept in the hub's storage for a day, and the files that shards make of them.

The name of a xorb's file has the epoch and the repository in it: no term reaches into another repository. A term that leads to
a xorb that is not here any more ends the epoch, since the client would go on to believe that it has sent it. Each repository
has an epoch of its own: what one tenant sends, wrong or right, has no other one send anything again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import BinaryIO

from adapterhub.digest import is_hex
from adapterhub.hub.hub import Hub
from adapterhub.hub.uploads import USABLE
from adapterhub.store.atomic import write_all
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError

from . import formats
from .formats import Chunk, File

_EPOCH = 12 * 3600.0  # seconds: half of the time that a file in tmp/ stays
_SUFFIX = ".xorb"
_OPEN = 64  # xorbs that are open at a time
# A term may repeat chunks, and a chunk of zeros is small: 100 kB in xorbs and shards can stand for 1 TB.
_REPEATED, _RATIO = 1 << 30, 64  # bytes of files that any shard may make, and those more for each byte of its xorbs
# A chunk takes 2 us, however small; clients make them of 8 KiB and more, but for the last one of a file.
_CHUNKS, _CHUNK = 1 << 16, 1 << 10  # chunks that any shard may name, and the bytes of files for each further one


def epoch(hub: Hub, repository: str) -> str:
    """The epoch of a repository; a new one if it has none, or that has lasted its time."""
    now = time.time()
    with hub.database.transaction():
        hub.database.execute("DELETE FROM xet_epochs WHERE since <= ?", now - _EPOCH)
        for (ident,) in hub.database.select("SELECT id FROM xet_epochs WHERE name = ?", repository):
            return str(ident)
        ident = secrets.token_hex(8)
        hub.database.execute("INSERT INTO xet_epochs (id, name, since) VALUES (?, ?, ?)", ident, repository, now)
        return ident


def _end(hub: Hub, scope: str) -> None:
    hub.database.execute("DELETE FROM xet_epochs WHERE id = ?", scope.partition("/")[0])


def keep(hub: Hub, scope: str, repository: str, name: str, raw: bytes) -> bool:
    """Keep a xorb that was sent to a scope, an epoch and a repository; False if it was there.

    Raises:
        FormatError: It is not one.
        RefusedError: The namespace may not hold so much.
    """
    formats.chunks(lambda at, n: raw[at : at + n], len(raw), f"xorb {name[:12]}")
    file = _file(scope, name)
    hub.quotas.open(hub.workers.worker(), repository, file, len(raw), lifetime=USABLE)
    try:
        return hub.storage.keep(file, raw)
    except BaseException:
        hub.quotas.close(repository, [file])
        raise


def _file(scope: str, name: str) -> str:
    if not is_hex(name):
        raise FormatError(name[:80], "is not the hash of a xorb")
    about = hashlib.sha256(scope.encode()).hexdigest()[:24]
    return f"{about}-{name}{_SUFFIX}"


def rebuild(hub: Hub, scope: str, repository: str, shard: bytes) -> None:
    """Store the files of a shard as blobs, which the repository may then use.

    Raises:
        FormatError: The shard, or a xorb, is malformed.
        IntegrityError: A xorb is missing, or a file has another sha256.
        RefusedError: A file is larger than one may be.
    """
    files = list(formats.files(shard, "shard"))  # the whole shard first
    _check_total(hub, scope, repository, files)
    for file in files:
        if file.size > hub.settings.max_file:
            raise RefusedError(repository, f"a file may have at most {hub.settings.max_file:,} bytes")
        with ExitStack() as stack:
            _store(hub, scope, file, _Xorbs(hub, scope, stack))
        hub.uploaded(repository, [file.digest], {_file(scope, term.xorb) for term in file.terms})


def _check_total(hub: Hub, scope: str, repository: str, files: Sequence[File]) -> None:
    """Refuse files that are so much larger than what was sent of them that they would only fill the disk, or take hours."""
    total = sum(file.size for file in files)
    pieces = sum(max(term.end - term.first, 0) for file in files for term in file.terms)
    if pieces > _CHUNKS + total // _CHUNK:
        what = f"its shard makes {total:,} bytes of {pieces:,} chunks, which are too small"
        raise RefusedError(repository, what, "Upload it with HF_HUB_DISABLE_XET=1")
    sent = 0
    for name in {term.xorb for file in files for term in file.terms} if total > _REPEATED else ():
        if found := hub.storage.kept(_file(scope, name)):
            with found:
                sent += os.fstat(found.fileno()).st_size
    if total > _REPEATED + _RATIO * sent:
        what = f"its shard makes {total:,} bytes of the {sent:,} that were sent"
        raise RefusedError(repository, what, "Upload it with HF_HUB_DISABLE_XET=1")


class _Xorbs:
    """The xorbs that a file is made of, opened when they are needed."""

    def __init__(self, hub: Hub, scope: str, stack: ExitStack) -> None:
        self._hub, self._scope, self._stack = hub, scope, stack
        self._open: dict[str, tuple[BinaryIO, list[Chunk]]] = {}

    def get(self, name: str) -> tuple[BinaryIO, list[Chunk]]:
        """A xorb's file and its chunks."""
        if name not in self._open:
            if len(self._open) >= _OPEN:
                self._stack.close()
                self._open.clear()
            found = self._hub.storage.kept(_file(self._scope, name))
            if found is None:
                _end(self._hub, self._scope)
                raise IntegrityError(f"xorb {name[:12]}", "is not here any more", "Run the same command again")
            file = self._stack.enter_context(found)
            size = os.fstat(file.fileno()).st_size
            read = _Reader(file).read_at
            self._open[name] = file, formats.chunks(read, size, f"xorb {name[:12]}")
        return self._open[name]


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read_at(self, at: int, count: int) -> bytes:
        """Bytes of a file."""
        self._file.seek(at)
        return self._file.read(count)


def _store(hub: Hub, scope: str, file: File, xorbs: _Xorbs) -> None:
    """Write a file chunk by chunk and give it its name if its sha256 is that of the shard."""
    state, size = hashlib.sha256(), 0
    with hub.store.files.temporary() as (path, out):
        for term in file.terms:
            source, chunks = xorbs.get(term.xorb)
            if not 0 <= term.first < term.end <= len(chunks):
                raise FormatError("shard", f"chunks {term.first} to {term.end} of a xorb with {len(chunks)}")
            length = sum(chunk.size for chunk in chunks[term.first : term.end])
            if length != term.size:
                raise FormatError("shard", f"a term of {length} bytes that declares {term.size}")
            for chunk in chunks[term.first : term.end]:
                source.seek(chunk.start)
                data = formats.unpacked(chunk, source.read(chunk.stored), f"xorb {term.xorb[:12]}")
                state.update(data)
                write_all(out, data)
            size += length
        found = f"sha256:{state.hexdigest()}"
        if found != file.digest:
            raise IntegrityError("shard", f"its chunks make {found}, not {file.digest}", "Send the file again")
        if not hub.store.holds(found, size):
            hub.store.adopt(path, out, found)
            hub.store.sync_blobs()
    hub.uploads.sweep()
