"""The log of a hub on several machines: decided in PostgreSQL, mirrored in files here, copied to the bucket.

Everything that reads the log reads the mirror, which `LogMirror.pages` and `LogMirror.mirror` bring up to date. An entry that
did not reach the mirror, as in a killed process, arrives with the next update.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterhub.digest import Digest
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.oci_index import IndexFile, Line
from adapterhub.store.ref_log import REFS, Entry, RefLog, parse_entry_at
from adapterhub.store.store import DOCUMENTS
from adapterhub.store.store_files import StoreFiles
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import AdapterhubError, FormatError

from .postgres import LogRow, PostgresDatabase

_log = logging.getLogger("adapterhub.hub")
_PAGE_SIZE = 1000  # entries in one query
_THREADS = 8
LOGS = (REFS, *DOCUMENTS)
_COPY = safe_regex.Pattern(r"(refs|bases|merges|hub)/([a-z0-9._/-]+)/([0-9]{8,15})\.json")
_MAX_COPIES = 100  # entries copied with each move, so that those the bucket failed to take catch up


class LogMirror:
    """The state of the log that all threads of a process share: how far it is mirrored.

    Attributes:
        database: The database with the log.
        bucket: The bucket with its copies.
        refresh_lock: Held while the mirror and the index are brought up to date.
    """

    def __init__(self, root: Path, database: PostgresDatabase, bucket: Bucket) -> None:
        self.database, self.bucket = database, bucket
        self._files = StoreFiles(root)
        self._mark = root / "seen"
        self._seen = 0
        self.refresh_lock = threading.Lock()

    def open(self) -> None:
        """Continue where the mirror left off."""
        if self._files.exists(self._mark):
            self._seen = int(self._files.read(self._mark, 32))

    def has_news(self) -> bool:
        """Return whether the log has entries that the mirror may lack."""
        return bool(self.database.rows_after(self._seen, 1))

    def pages(self) -> Iterator[list[LogRow]]:
        """Yield the entries that the mirror may lack, in batches, oldest first."""
        while rows := self.database.rows_after(self._seen, _PAGE_SIZE):
            yield rows
            self._seen = max(self._seen, rows[-1].id)

    def save(self) -> None:
        """Record that everything `pages` yielded is in the mirror and in the index."""
        self._files.replace(self._mark, str(self._seen).encode())

    def mirror(self, rows: Iterable[LogRow]) -> list[Entry]:
        """Write entries into the mirror; return those of adapters."""
        log, entries = RefLog(self._files), []
        for row in rows:
            entry = Entry.parse(row.raw, f"entry {row.id} of the log")
            if (entry.name, entry.seq) != (row.name, row.seq):
                raise FormatError(f"entry {row.id} of the log", f"contains entry {entry.seq} of {entry.name[:80]}")
            log.mirror(row.raw, entry, log=row.log)
            if row.log == REFS:
                entries.append(entry)
        return entries


class SharedLog(RefLog):
    """The mirror of the log, below the root of a store."""

    def __init__(self, files: StoreFiles, shared: LogMirror) -> None:
        super().__init__(files)
        self._shared = shared

    def append(self, entry: Entry, *, log: str = REFS) -> bool:
        """Commit an entry; return False if another writer took its number first, and mirror that writer's entry."""
        raw, database = entry.dump(), self._shared.database
        is_committed = database.append(log, entry.name, entry.seq, raw)
        if is_committed:
            self.mirror(raw, entry, log=log)
            # Only after the commit: a bucket that cannot be written to must not fail the move.
            copy_entries(database, self._shared.bucket)
        else:
            self._shared.mirror(database.rows_of_name(log, entry.name, entry.seq))
        return is_committed


class DatabaseLog:
    """The log as it is in the database, read for verification without updating a mirror."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        self._name: tuple[str, str] | None = None
        self._rows: dict[int, bytes] = {}

    def names(self, log: str = REFS) -> list[str]:
        """Return every name in a log."""
        return self._database.names(log)

    document_names = names

    def entry(self, name: str, seq: int, *, log: str = REFS) -> tuple[Entry, Digest] | None:
        """Return entry `seq` (from 1) of a name's log and the digest of its bytes; None if it is missing."""
        raw = self._entries_of(log, name).get(seq)
        return None if raw is None else parse_entry_at(raw, name, seq, self.where(name, seq, log=log))

    def has_entry_after(self, name: str, seq: int, *, log: str = REFS) -> bool:
        """Return whether there is an entry with a number above `seq`."""
        return any(number > seq for number in self._entries_of(log, name))

    def where(self, name: str, seq: int, *, log: str = REFS) -> str:
        """Return the key of an entry's copy."""
        return copy_key(log, name, seq)

    def _entries_of(self, log: str, name: str) -> dict[int, bytes]:
        """Return the entries of a name by number, all as of one moment; those of the last requested name are cached."""
        if self._name != (log, name):
            self._name, self._rows = (log, name), {row.seq: row.raw for row in self._database.rows_of_name(log, name, 1)}
        return self._rows


class NoIndexFile(IndexFile):
    """An index.json without lines: nobody reads the mirror as an image layout, so no move has to list all versions.

    Each move still writes the file, because its stamp tells whether the index is up to date with the log.
    """

    def write(self, lines: Iterable[Line]) -> str:
        """Replace the file; return its new stamp."""
        return super().write([])

    def change(self, changes: Iterable[tuple[str, list[Line], str | None]]) -> str:
        """Replace the file; return its new stamp."""
        return super().write([])

    def is_written(self, lines: Iterable[Line]) -> bool:
        """Return True: the file never has any lines."""
        return True

    def has_exactly(self, lines: Iterable[Line]) -> bool:
        """Return True: the file never has any lines."""
        return True


def copy_key(log: str, name: str, seq: int) -> str:
    """Return the key of an entry's copy, as in the log of a store in a bucket (`remotes.objects`)."""
    return f"{log}/{name}/{seq:08}.json"


def parse_copy(key: str) -> tuple[str, str, int] | None:
    """Return log, name and number of an entry from the key of its copy; None for any other key."""
    match = _COPY.fullmatch(key)
    return (match[1], match[2], int(match[3])) if match else None


def copy_entries(database: PostgresDatabase, bucket: Bucket, most: int = _MAX_COPIES) -> int:
    """Copy the oldest entries that a bucket lacks to it; return their number.

    A bucket that cannot be written to does not fail the move: the entry is in the log, and is copied with a later one.
    """
    rows = database.rows_without_copy(most)
    try:
        with ThreadPoolExecutor(min(_THREADS, len(rows) or 1)) as pool:
            list(pool.map(lambda row: bucket.put_object(copy_key(row.log, row.name, row.seq), row.raw), rows))
    except AdapterhubError as error:
        _log.warning("the log has entries that the bucket lacks: %s", error)
        return 0
    if rows:
        database.mark_copied(rows)
    return len(rows)
