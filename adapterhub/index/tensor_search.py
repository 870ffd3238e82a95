# ruff: noqa: S608 - the text put into a statement here is fixed
"""Search by tensors: the versions that have the tensors of a file, when no version has the whole file.

Bytes are compared, not names: a tensor is found in a file of another format, and under another name. In registry.db a tensor is
a row of the first 64 bits of its digest and of a file's number, about 20 bytes. That finds files; the whole digests are in the
lists of the store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from adapterhub.digest import Digest
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub.store.store import Store
from adapterhub.store.tensor_digests import Tensor, Tensors
from adapterhub_converters.lazy_dataclass import dataclass

from .index_database import Index
from .queries import IN_NAMESPACE, VersionRow, namespace_values, versions
from .version_search import Holder, holders

LIMIT = 20
_FILES = 64  # files whose lists are read


@dataclass(frozen=True, slots=True)
class Share:
    """A file of a version, with the digest `digest`, that has `count` of the tensors searched for, `size` bytes in total."""

    row: VersionRow
    path: str
    digest: Digest
    count: int
    size: int


def nearest(
    index: Index,
    store: Store,
    tensors: Tensors,
    limit: int = LIMIT,
    sees: Callable[[VersionRow], bool] = lambda _: True,
) -> list[Share]:
    """Return the versions that have most of some tensors: most tensors first, then most bytes, by name, newest first.

    `sees` returns whether a version may be among them.
    """
    shares = []
    for digest, places in _places_of_files_with(index, [key(tensor.digest) for tensor in tensors if tensor.size]):
        # The index has only 64 bits of each digest: compare the whole digests.
        common = shared_tensors(tensors, store.list_tensors(digest) or ())
        if common:
            count, size = len(common), sum(tensor.size for tensor in common)
            shares += [Share(row, path, digest, count, size) for row, path in places if sees(row)]
    shares.sort(key=lambda share: (-share.count, -share.size, share.row.name, -share.row.number, share.path))
    return shares[:limit]


@of_one_snapshot
def _places_of_files_with(index: Index, keys: list[int]) -> list[tuple[Digest, list[tuple[VersionRow, str]]]]:
    """Return the files with most of the tensors with these keys, most first: digest, and versions and paths that have it."""
    files = index.select(
        "SELECT digest FROM (SELECT file, count(*) AS n, sum(size) AS bytes FROM tensors"
        " WHERE key IN (SELECT value FROM json_each(?)) GROUP BY file ORDER BY n DESC, bytes DESC, file LIMIT ?)"
        " JOIN weights ON id = file ORDER BY n DESC, bytes DESC, file",
        json.dumps(keys),
        _FILES,
    )
    return [(digest, _places(index, digest)) for (digest,) in files]


def _places(index: Index, digest: Digest) -> list[tuple[VersionRow, str]]:
    rows = {(row.name, row.number): row for row in versions(index, file=digest)}
    records = index.select("SELECT name, number, path FROM files JOIN versions ON id = version WHERE files.digest = ?", digest)
    return [(rows[name, number], path) for name, number, path in records]


def shared_tensors(tensors: Sequence[Tensor], candidates: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors whose bytes are also among the `candidates`, under any name; an empty tensor never is."""
    contents = {(candidate.digest, candidate.size) for candidate in candidates}
    return [tensor for tensor in tensors if tensor.size and (tensor.digest, tensor.size) in contents]


def with_digest(index: Index, store: Store, digest_prefix: str) -> list[Holder]:
    """Return the versions that have a tensor whose digest begins with `digest_prefix`, with its file and name."""
    results = []
    for digest, file_holders in _holders_of_files_with(index, *keys(digest_prefix)):
        matching = [tensor for tensor in store.list_tensors(digest) or () if tensor.digest.startswith(digest_prefix)]
        results += [
            Holder(file_holder.row, file_holder.path, tensor.digest, tensor.name)
            for file_holder in file_holders
            if file_holder.path
            for tensor in matching
        ]
    return sorted(results, key=lambda holder: (holder.row.name, -holder.row.number, holder.path))


@of_one_snapshot
def _holders_of_files_with(index: Index, low: int, high: int) -> list[tuple[Digest, list[Holder]]]:
    """Return the files that have a tensor with a key from `low` to `high`, by digest, each with the versions that have it."""
    sql = "SELECT DISTINCT digest FROM tensors JOIN weights ON id = file WHERE key BETWEEN ? AND ? ORDER BY digest"
    return [(digest, holders(index, digest)) for (digest,) in index.select(sql, low, high)]


def repeated_bytes(index: Index, digests: Iterable[Digest]) -> int:
    """Return the bytes of tensors that are in more than one of these files, without the first occurrence of each."""
    records = index.select(
        "SELECT sum(size * (n - 1)) FROM (SELECT size, count(*) AS n FROM tensors WHERE file IN"
        " (SELECT id FROM weights WHERE digest IN (SELECT value FROM json_each(?))) GROUP BY key HAVING n > 1)",
        json.dumps(sorted(digests)),
    )
    return int(records[0][0] or 0)


# ---- rows


def unlisted_files(index: Index, prefix: str | None = None) -> dict[Digest, int]:
    """Return the files of weights whose tensors are not in the index, with their sizes; of a name or namespace, or all."""
    condition, values = (
        ("1", ())
        if prefix is None
        else (f"version IN (SELECT id FROM versions WHERE {IN_NAMESPACE})", namespace_values(prefix))
    )
    sql = (
        "SELECT digest, max(size) FROM files WHERE (lower(path) LIKE '%.safetensors' OR lower(path) LIKE '%.gguf')"
        f" AND digest NOT IN (SELECT digest FROM weights) AND {condition} GROUP BY digest ORDER BY digest"
    )
    return dict(index.select(sql, *values))


def add(index: Index, digest: Digest, read: Callable[[Digest], Tensors | None]) -> None:
    """Add the tensors of a file if `read` returns them, unless the index has them already. Call this in a transaction."""
    if index.select("SELECT 1 FROM weights WHERE digest = ?", digest) or (file_tensors := read(digest)) is None:
        return
    file = index.execute("INSERT INTO weights (digest) VALUES (?)", digest)
    # Sorted by the primary key, in which order SQLite inserts fastest.
    rows = sorted({(key(tensor.digest), file, tensor.size) for tensor in file_tensors if tensor.size})
    index.execute_many("INSERT OR IGNORE INTO tensors (key, file, size) VALUES (?, ?, ?)", rows)


def drop(index: Index, digests: Iterable[Digest], read: Callable[[Digest], Tensors | None]) -> None:
    """Remove the tensors of those files that no version has anymore. Call this in a transaction."""
    for digest in digests:
        records = index.select("SELECT id FROM weights WHERE digest = ?", digest)
        if not records or index.select("SELECT 1 FROM files WHERE digest = ?", digest):
            continue
        ((file,),) = records
        file_tensors = read(digest)
        if file_tensors is None:  # without its keys, every row is visited
            index.execute("DELETE FROM tensors WHERE file = ?", file)
        else:
            index.execute_many(
                "DELETE FROM tensors WHERE key = ? AND file = ?", [(key(tensor.digest), file) for tensor in file_tensors]
            )
        index.execute("DELETE FROM weights WHERE id = ?", file)


def key(digest: Digest) -> int:
    """Return the first 64 bits of a digest as SQLite's INTEGER, in the order of the digests."""
    # SQLite's INTEGER is signed; the shift keeps the order.
    return int(digest.removeprefix("sha256:")[:16], 16) - 2**63


def keys(prefix: str) -> tuple[int, int]:
    """Return the lowest and the highest key of the digests that begin with `prefix`."""
    digits = prefix.removeprefix("sha256:")[:16]
    return key(digits.ljust(16, "0")), key(digits.ljust(16, "f"))
