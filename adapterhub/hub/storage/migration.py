"""Migrate a whole hub from its folder into PostgreSQL and a bucket, and back; and recover a log from its copies in a bucket.

Digests, entries and rows stay the same, byte for byte. The target becomes a hub in one step at the end, so an interrupted run
is simply started again; blobs that have arrived are not sent twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path

from adapterhub.digest import Digest, is_hex
from adapterhub.hub.hub_database import MIGRATIONS, HubDatabase
from adapterhub.registry.registry import Registry
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.ref_log import Entry
from adapterhub.store.store import REFS, Progress, Store, counter
from adapterhub.store.store_files import MAX_DOCUMENT
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import FormatError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .bucket_blobs import blob_key, put_pieces, read_pieces
from .postgres import LogRow, PostgresDatabase
from .shared_log import LOGS, copy_entries, parse_copy

_THREADS = 8
_PAGE_SIZE = 1000
_TABLE, _NUMBERED = safe_regex.Pattern(r"CREATE TABLE ([a-z0-9_]+)"), safe_regex.Pattern(r"\(\s*id INTEGER PRIMARY KEY")


@dataclass(frozen=True)
class MigrationResult:
    """The result of a copy: the number of entries, of blobs, and the bytes of blobs that were not there yet."""

    entries: int
    blobs: int
    size: int


def move_in(folder: Path, database: PostgresDatabase, bucket: Bucket, progress: Progress | None = None) -> MigrationResult:
    """Copy the hub in a folder, which no process may be serving, into an empty database and a bucket.

    Raises:
        RefusedError: The database has a hub already.
        IntegrityError: A blob is damaged.
    """
    check_empty(database)
    bucket.create_folder()
    with Registry.open(folder) as registry, registry.write_lock(), closing(HubDatabase(folder)) as tables:
        store = registry.store
        sizes = _sizes(store)
        size = _send(store, sizes, bucket, progress)
        with database.transaction():
            entries = _fill(database, _entries(store), copied=False)
            copy_tables(tables, database)
            # Rows were copied with their ids: continue each sequence after the highest one.
            for table in _tables(numbered=True):
                number = f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table} HAVING max(id) > 0"  # noqa: S608
                database.execute(number)
    while copy_entries(database, bucket, _PAGE_SIZE):
        pass
    return MigrationResult(entries, len(sizes), size)


def move_out(database: PostgresDatabase, bucket: Bucket, folder: Path, progress: Progress | None = None) -> MigrationResult:
    """Copy the hub in a database and a bucket, which no process may be serving, into a new folder.

    Raises:
        OutputExistsError: The folder exists.
        IntegrityError: A blob is damaged, or a log cannot be replayed.
    """
    with (
        atomic.pending_output(folder) as new_folder,
        Registry.init(new_folder) as registry,
        closing(HubDatabase(new_folder)) as tables,
    ):
        entries = 0
        for rows in _pages(database):
            for row in rows:
                registry.store.log.mirror(row.raw, _parse_row(row), log=row.log)
            entries += len(rows)
        blobs = {f"sha256:{key.rpartition('/')[2]}": size for key, size, _ in bucket.objects("blobs/sha256")}
        advance = counter(progress, sum(blobs.values()))
        for digest, size in blobs.items():
            with bucket.stream(blob_key(digest), size, 0, blob_key(digest)) as source:
                if not registry.store.put_back(source, digest, size):
                    raise IntegrityError(blob_key(digest), "its bytes do not have this digest", "Restore it from a backup")
            if advance:
                advance(size)
        registry.store.sync_blobs()
        for error in registry.rebuild_index():
            raise error
        copy_tables(database, tables)
    return MigrationResult(entries, len(blobs), sum(blobs.values()))


def recover(database: PostgresDatabase, bucket: Bucket) -> int:
    """Fill the log of an empty database from the copies in the bucket; return the number of entries.

    Accounts and tokens are not in the bucket: restore them from a backup of the database, or create them anew.

    Raises:
        RefusedError: The database has a hub already.
        IntegrityError: A copy is missing between two others.
    """
    check_empty(database)
    keys = sorted(key for log in LOGS for key, *_ in bucket.objects(log))
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = [row for row in pool.map(lambda key: _read_copy(bucket, key), keys) if row]
    for (log, name), group in groupby(rows, key=lambda row: (row.log, row.name)):
        seqs = [row.seq for row in group]
        if seqs != list(range(1, len(seqs) + 1)):
            missing = min(set(range(1, seqs[-1])) - set(seqs))
            raise IntegrityError(f"{bucket.location}/{log}/{name}", f"entry {missing} is missing", "Restore it from a backup")
    with database.transaction():
        return _fill(database, rows, copied=True)


def check_empty(database: PostgresDatabase) -> None:
    """Raise RefusedError if a database has a hub."""
    if database.rows_after(0, 1) or database.select("SELECT 1 FROM accounts LIMIT 1"):
        raise RefusedError(database.location, "has a hub already", "Name an empty database")


# ---- blobs


def _sizes(store: Store) -> dict[Digest, int]:
    names = {path.name for path in (*store.blobs(), *store.packs.files()) if is_hex(path.name)}
    sizes = ((digest, store.size(digest)) for digest in (f"sha256:{name}" for name in sorted(names)))
    return {digest: size for digest, size in sizes if size is not None}


def _send(store: Store, sizes: dict[Digest, int], bucket: Bucket, progress: Progress | None) -> int:
    """Write the blobs that a bucket lacks; return the bytes written."""
    advance = counter(progress, sum(sizes.values()))

    def send(digest: Digest) -> int:
        size = sizes[digest]
        if bucket.size(blob_key(digest)) == size:
            return 0
        with store.open_blob(digest) as file:
            put_pieces(bucket, digest, _verified_pieces(read_pieces(file), digest), size)
        return size

    total = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for digest, sent_bytes in zip(sizes, pool.map(send, sizes), strict=True):
            total += sent_bytes
            if advance:
                advance(sizes[digest])
    return total


def _verified_pieces(parts: Iterable[bytearray], digest: Digest) -> Iterator[bytearray]:
    hasher = hashlib.sha256()
    for piece in parts:
        hasher.update(piece)
        yield piece
    if f"sha256:{hasher.hexdigest()}" != digest:
        raise IntegrityError(digest, "its bytes do not have this digest", "Check the registry", code="check-registry")


# ---- the log


def _entries(store: Store) -> Iterator[LogRow]:
    for log in LOGS:
        for name in store.log.names() if log == REFS else store.log.document_names(log):
            seq = 1
            while store.log.entry(name, seq, log=log):
                yield LogRow(0, log, name, seq, store.files.read(store.log.path(name, seq, log=log), MAX_DOCUMENT))
                seq += 1


def _fill(database: PostgresDatabase, rows: Iterable[LogRow], *, copied: bool) -> int:
    total, waiting = 0, iter(rows)
    while batch := list(islice(waiting, _PAGE_SIZE)):
        values = [(row.log, row.name, row.seq, row.raw, copied) for row in batch]
        database.execute_many("INSERT INTO entries (log, name, seq, entry, copied) VALUES (?, ?, ?, ?, ? <> 0)", values)
        total += len(batch)
    return total


def _pages(database: PostgresDatabase) -> Iterator[list[LogRow]]:
    last = 0
    while rows := database.rows_after(last, _PAGE_SIZE):
        yield rows
        last = rows[-1].id


def _parse_row(row: LogRow) -> Entry:
    entry = Entry.parse(row.raw, f"{row.log}/{row.name}/{row.seq}")
    if (entry.name, entry.seq) != (row.name, row.seq):
        raise FormatError(f"{row.log}/{row.name}/{row.seq}", f"contains entry {entry.seq} of {entry.name[:80]}")
    return entry


def _read_copy(bucket: Bucket, key: str) -> LogRow | None:
    position = parse_copy(key)
    raw = bucket.read(key, MAX_DOCUMENT) if position else None
    if position is None or raw is None:
        return None
    row = LogRow(0, *position, raw)
    _parse_row(row)
    return row


# ---- tables


def _tables(*, numbered: bool = False) -> list[str]:
    """Return the tables of a hub, referenced ones first; only those with generated ids if `numbered`."""
    statements = [statement for script in MIGRATIONS for statement in script.split(";")]
    created = [(match[1], statement) for statement in statements if (match := _TABLE.search(statement))]
    return [table for table, statement in created if not numbered or _NUMBERED.search(statement)]


def copy_tables(source: HubDatabase, target: HubDatabase) -> None:
    """Copy the rows of all tables into empty ones."""
    for table in _tables():
        rows = source.select(f"SELECT * FROM {table}")  # noqa: S608 - a name of ours
        if rows:
            placeholders = ", ".join("?" * len(rows[0]))
            target.execute_many(f"INSERT INTO {table} VALUES ({placeholders}) ON CONFLICT DO NOTHING", rows)  # noqa: S608
