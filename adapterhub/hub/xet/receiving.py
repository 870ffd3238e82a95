"""Receive xorbs, each kept in the hub's storage for a day, and rebuild files from them as shards say.

A xorb's file name contains the epoch and the repository: no term can refer to another repository's xorb. A term that refers to
a missing xorb ends the epoch, because the client would otherwise keep believing that it had sent it. Each repository has its
own epoch: whatever one tenant sends never makes another one send anything again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import BinaryIO

from adapterhub.digest import is_hex
from adapterhub.hub.hub import Hub
from adapterhub.hub.uploads import USABLE_SECONDS, Upload
from adapterhub.manifest.package_files import MAX_FILES
from adapterhub.store.store_files import write_all
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError

from . import xet_formats
from .xet_formats import Chunk, File

_EPOCH_LIFETIME = 12 * 3600.0  # seconds: half as long as files in tmp/ are kept
_SUFFIX = ".xorb"
_FILE_LIFETIME = 3600.0  # seconds in which a file is rebuilt
_MAX_OPEN = 16  # xorbs open at a time, with a megabyte for the headers of each
# Headers of chunks that a shard may have read again, of xorbs that were closed for others meanwhile: each takes 3 us. Clients
# go through their xorbs in order.
_FREE_HEADERS, _HEADERS_PER_CHUNK = 1 << 18, 4
# Terms may repeat chunks, and a chunk of zeros is small: 100 kB of xorbs and shards can expand to 1 TB.
_FREE_BYTES, _MAX_RATIO = 1 << 30, 64  # bytes of files any shard may make, plus so many for each byte of its xorbs
# A chunk takes 2 us however small it is; clients make chunks of at least 8 KiB, except the last one of a file.
_FREE_CHUNKS, _MIN_CHUNK = 1 << 16, 1 << 10  # chunks any shard may name, and bytes of files per further chunk


def epoch(hub: Hub, repository: str) -> str:
    """Return the epoch of a repository; a new one if it has none, or the last one has expired."""
    now = time.time()
    with hub.database.transaction():
        hub.database.execute("DELETE FROM xet_epochs WHERE since <= ?", now - _EPOCH_LIFETIME)
        for (ident,) in hub.database.select("SELECT id FROM xet_epochs WHERE name = ?", repository):
            return str(ident)
        ident = secrets.token_hex(8)
        hub.database.execute("INSERT INTO xet_epochs (id, name, since) VALUES (?, ?, ?)", ident, repository, now)
        return ident


def _end_epoch(hub: Hub, scope: str) -> None:
    hub.database.execute("DELETE FROM xet_epochs WHERE id = ?", scope.partition("/")[0])


def store_xorb(hub: Hub, scope: str, name: str, upload: Upload) -> bool:
    """Store a xorb that was sent to a scope, which is an epoch and a repository; return False if it was there already.

    Raises:
        FormatError: It is malformed.
    """
    xet_formats.chunks(_PositionedReader(upload.file).read_at, upload.size, f"xorb {name[:12]}")
    file_name = _file_name(scope, name)
    is_new = hub.storage.keep_temporary(file_name, upload.path, upload.file)
    hub.quotas.rename(upload.count_id, file_name, USABLE_SECONDS)
    return is_new


def _file_name(scope: str, name: str) -> str:
    if not is_hex(name):
        raise FormatError(name[:80], "is not the hash of a xorb")
    scope_hash = hashlib.sha256(scope.encode()).hexdigest()[:24]
    return f"{scope_hash}-{name}{_SUFFIX}"


def rebuild(hub: Hub, scope: str, repository: str, shard: bytes) -> None:
    """Store the files of a shard as blobs, which the repository may then use.

    Raises:
        FormatError: The shard or a xorb is malformed.
        IntegrityError: A xorb is missing, or a file has another sha256.
        RefusedError: A file is too large, or the namespace may not hold that much.
    """
    # Parse the whole shard before storing anything. A file that it has twice is made once.
    files = list({file.digest: file for file in xet_formats.files(shard, "shard")}.values())
    chunk_count = _check_total(hub, scope, repository, files)
    with ExitStack() as stack:
        opened = _Xorbs(hub, scope, stack, _FREE_HEADERS + _HEADERS_PER_CHUNK * chunk_count)
        for file in files:
            _rebuild_file(hub, scope, repository, file, opened)


def _rebuild_file(hub: Hub, scope: str, repository: str, file: File, opened: _Xorbs) -> None:
    worker = hub.workers.worker()
    if file.size > hub.settings.max_file:
        raise RefusedError(repository, f"a file may have at most {hub.settings.max_file:,} bytes")
    xorbs = {_file_name(scope, term.xorb) for term in file.terms}
    upload = secrets.token_hex(16)
    # Counted before its first byte is written; its xorbs make room for it. One that is sent again counts already.
    if not hub.quotas.has_counted(worker, repository, file.digest, file.size):
        hub.quotas.open(worker, repository, upload, file.size, lifetime=_FILE_LIFETIME, except_uploads=xorbs)
    try:
        count = partial(hub.uploaded.count, repository, {file.digest: file.size}, [upload], except_uploads=xorbs)
        _store(hub, file, opened, count)
    finally:
        hub.quotas.close(repository, [upload])
    for removable in hub.quotas.mark_spent(repository, xorbs):
        hub.storage.remove_temporary(removable)


def _check_total(hub: Hub, scope: str, repository: str, files: Sequence[File]) -> int:
    """Return how many chunks some files have; refuse files that would only fill the disk, or take hours."""
    if len(files) > MAX_FILES:
        raise RefusedError(repository, f"its shard has more than {MAX_FILES:,} files", "Upload fewer at a time")
    total = sum(file.size for file in files)
    pieces = sum(max(term.end - term.first, 0) for file in files for term in file.terms)
    if pieces > _FREE_CHUNKS + total // _MIN_CHUNK:
        problem = f"its shard makes {total:,} bytes of {pieces:,} chunks, which are too small"
        raise RefusedError(repository, problem, "Upload it with HF_HUB_DISABLE_XET=1")
    sent_bytes = 0
    for name in {term.xorb for file in files for term in file.terms} if total > _FREE_BYTES else ():
        if xorb := hub.storage.open_temporary(_file_name(scope, name)):
            with xorb:
                sent_bytes += os.fstat(xorb.fileno()).st_size
    if total > _FREE_BYTES + _MAX_RATIO * sent_bytes:
        problem = f"its shard makes {total:,} bytes of the {sent_bytes:,} that were sent"
        raise RefusedError(repository, problem, "Upload it with HF_HUB_DISABLE_XET=1")
    return pieces


class _Xorbs:
    """The xorbs of a shard, opened on demand; of many, those used last stay open.

    Args:
        hub: The hub.
        scope: The epoch and the repository.
        stack: Closes them in the end.
        most_reread: Headers of chunks that may be read again, because their xorb was closed meanwhile.
    """

    def __init__(self, hub: Hub, scope: str, stack: ExitStack, most_reread: int) -> None:
        self._hub, self._scope, self._left = hub, scope, most_reread
        self._open: OrderedDict[str, tuple[BinaryIO, list[Chunk]]] = OrderedDict()
        self._read: set[str] = set()
        stack.callback(self._close)

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()

    def get(self, name: str) -> tuple[BinaryIO, list[Chunk]]:
        """Return a xorb's file and its chunks."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= _MAX_OPEN:
            self._open.popitem(last=False)[1][0].close()
        file = self._hub.storage.open_temporary(_file_name(self._scope, name))
        if file is None:
            _end_epoch(self._hub, self._scope)
            raise IntegrityError(f"xorb {name[:12]}", "is not here any more", "Run the same command again")
        try:
            size = os.fstat(file.fileno()).st_size
            parsed = xet_formats.chunks(_PositionedReader(file).read_at, size, f"xorb {name[:12]}")
            self._left -= len(parsed) if name in self._read else 0
            if self._left < 0:
                problem = f"its terms go back and forth between more than {_MAX_OPEN} xorbs"
                raise RefusedError("shard", problem, "Upload it with HF_HUB_DISABLE_XET=1")
        except BaseException:
            file.close()
            raise
        self._read.add(name)
        self._open[name] = file, parsed
        return self._open[name]


class _PositionedReader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read_at(self, offset: int, count: int) -> bytes:
        """Return bytes of the file."""
        self._file.seek(offset)
        return self._file.read(count)


def _store(hub: Hub, file: File, xorbs: _Xorbs, count: Callable[[], object]) -> None:
    """Rebuild a file chunk by chunk, and store it as a blob if its sha256 is the one in the shard, and `count` allows it."""
    hasher, size = hashlib.sha256(), 0
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
                data = xet_formats.decompress(chunk, source.read(chunk.stored), f"xorb {term.xorb[:12]}")
                hasher.update(data)
                write_all(out, data)
            size += length
        digest = f"sha256:{hasher.hexdigest()}"
        if digest != file.digest:
            raise IntegrityError("shard", f"its chunks make {digest}, not {file.digest}", "Send the file again")
        count()
        if not hub.store.retain_if_present(digest, size):
            hub.store.adopt(path, out, digest)
            hub.store.sync_blobs()
    hub.uploads.sweep()
