"""Back up a whole hub into one file, and restore it, whether it is in a folder or in a database and a bucket.

    oci-layout, index.json, blobs/sha256/<hex>    every blob, uncompressed: an image layout that skopeo and oras read
    refs/, bases/, merges/, hub/                  the logs
    hub.db                                        accounts, tokens, quotas, the audit log

The hub may keep running. What belongs together is listed under the write lock, the tables are copied as of one moment, and a
lease keeps the blobs from a gc; blobs and log entries never change. Every blob is compared with its digest both when written
and when restored.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import CHUNK, Digest, is_hex
from adapterhub.hub.hub_database import FILE, HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage import migration
from adapterhub.hub.storage.folder_storage import Storage
from adapterhub.index import queries
from adapterhub.registry.registry import Registry
from adapterhub.remotes.layouts import archive_tar
from adapterhub.remotes.layouts.archive_tar import Member
from adapterhub.store import oci_index
from adapterhub.store.store import DOCUMENTS, FOLDER, REFS, Store
from adapterhub_converters.containers import atomic, open_file
from adapterhub_converters.errors import FormatError, IntegrityError

_LAYOUT, _INDEX, _BLOBS = "oci-layout", "index.json", "blobs/sha256/"
_LOGS = (REFS, *DOCUMENTS)
_ENTRY_SUFFIX = ".json"
Progress = Callable[[int, int], object] | None
"""A callback for bytes done and total bytes."""


def write(storage: Storage, out: Path, progress: Progress = None) -> int:
    """Write a hub to a new file that only its owner can read; return the file's size in bytes.

    Raises:
        OutputExistsError: The file exists.
        IntegrityError: A blob is damaged.
    """
    with storage.registry() as registry, registry.store.lease("backup") as lease:
        store = registry.store
        with atomic.pending_output(out, folder=False) as path, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            with registry.write_lock():
                storage.copy_tables(Path(scratch))
                entries = list(_entries(store))
                digests = sorted(storage.digests())
                # Note the blobs while the lock is held: from here on a gc spares them.
                for digest in digests:
                    storage.retain(lease, digest)
                index = oci_index.build(queries.ref_lines(registry.index))
            sizes = {digest: store.size(digest) for digest in digests}
            total, copied_bytes = sum(size or 0 for size in sizes.values()), 0
            with open_new(path) as file:
                _write_member(file, _LAYOUT, store.files.read(store.root / _LAYOUT))
                _write_member(file, _INDEX, index)
                _write_member(file, FILE, open_file.read_bytes(Path(scratch) / FILE))
                for name in entries:
                    _write_member(file, name, store.files.read(store.root / name))
                for digest, size in sizes.items():
                    if size is None:
                        raise IntegrityError(
                            str(store.root), f"{digest} was removed meanwhile", "Try again", code="changed-meanwhile"
                        )
                    with store.open_stream(digest) as blob:
                        file.write(archive_tar.header(_BLOBS + digest.removeprefix("sha256:"), size))
                        _copy_blob(blob, file, size, digest)
                        file.write(archive_tar.padding(size))
                    copied_bytes += size
                    if progress:
                        progress(copied_bytes, total)
                file.write(archive_tar.END)
                return file.tell()


def open_new(path: Path) -> BinaryIO:
    """Create a file that only its owner can read."""
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")


def _write_member(file: BinaryIO, name: str, data: bytes) -> None:
    file.write(archive_tar.header(name, len(data)) + data + archive_tar.padding(len(data)))


def _entries(store: Store) -> Iterator[str]:
    """Yield the files of all logs, relative to the store."""
    for log in _LOGS:
        if store.files.exists(store.root / log):
            yield from (path.relative_to(store.root).as_posix() for path in _log_files(store, store.root / log))


def _log_files(store: Store, folder: Path) -> Iterator[Path]:
    yield from (path for path in store.files.list_folder(folder) if path.suffix == _ENTRY_SUFFIX)
    for inner in store.files.list_subfolders(folder):
        yield from _log_files(store, inner)


def _copy_blob(source: BinaryIO, out: BinaryIO, size: int, digest: Digest) -> None:
    """Copy a blob.

    Raises:
        IntegrityError: Its bytes do not match its digest.
    """
    hasher, remaining = hashlib.sha256(), size
    while remaining and (piece := source.read(min(CHUNK, remaining))):
        hasher.update(piece)
        out.write(piece)
        remaining -= len(piece)
    if remaining or f"sha256:{hasher.hexdigest()}" != digest:
        raise IntegrityError(digest, "its bytes do not match its digest", "Check the registry", code="check-registry")


# ---- restoring


def restore(file: Path, root: Path, progress: Progress = None) -> None:
    """Create a registry's folder, with its hub.db, from a backup.

    Raises:
        OutputExistsError: The folder is not empty.
        FormatError: The file is not a backup.
        IntegrityError: A blob in it is damaged.
    """
    with open_file.open_regular(file) as source:
        length = source.seek(0, os.SEEK_END)
        members = archive_tar.scan_members(source, length, str(file))
        for name in members:
            if not _is_backup_member(name):
                raise FormatError(str(file), f"{name[:80]!r} is not part of a backup")
        if not {_LAYOUT, _INDEX, FILE} <= members.keys():
            raise FormatError(str(file), "not the backup of a hub, or not all of it")
        total, extracted_bytes = sum(member.size for member in members.values()), 0
        with atomic.pending_output(root) as new:
            for name, member in members.items():
                _extract(source, member, name, new)
                extracted_bytes += member.size
                if progress:
                    progress(extracted_bytes, total)
            with closing(HubDatabase(new)) as database:
                database.execute("DELETE FROM xet_epochs")  # clients would skip xorbs they sent to the old hub
                database.execute("DELETE FROM devices")
                database.execute("DELETE FROM upstream_cache")  # which another bucket lacks
    Registry.open(root).close()  # rebuilds registry.db from the logs


def restore_shared(file: Path, settings: HubSettings, progress: Progress = None) -> None:
    """Fill an empty database and a bucket from a backup, by way of a temporary folder.

    Raises as `restore` does, and RefusedError if the database has a hub.
    """
    from adapterhub.hub.storage.postgres import PostgresDatabase
    from adapterhub.hub.storage.shared_storage import open_bucket

    settings.registry.parent.mkdir(parents=True, exist_ok=True)
    with (
        closing(PostgresDatabase(settings.database)) as database,
        closing(open_bucket(settings.blobs, settings.environ)) as bucket,
        tempfile.TemporaryDirectory(dir=settings.registry.parent) as scratch,
    ):
        migration.check_empty(database)
        restore(file, Path(scratch) / "hub", progress)
        migration.move_in(Path(scratch) / "hub", database, bucket)


def _is_backup_member(name: str) -> bool:
    if name in (_LAYOUT, _INDEX, FILE):
        return True
    if name.startswith(_BLOBS):
        return is_hex(name.removeprefix(_BLOBS))
    return name.startswith(tuple(f"{log}/" for log in _LOGS)) and name.endswith(_ENTRY_SUFFIX)


def _extract(source: BinaryIO, member: Member, name: str, new: Path) -> None:
    path = new / name if name == FILE else new / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    source.seek(member.offset)
    with open_new(path) as out:
        if name.startswith(_BLOBS):
            _copy_blob(source, out, member.size, f"sha256:{path.name}")
        else:
            out.write(source.read(member.size))
    if name != FILE:
        path.chmod(0o444 if name.startswith(_BLOBS) else 0o644)
