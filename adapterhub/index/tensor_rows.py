"""Which files of weights have which tensors: the rows of the catalog that say so, written and asked.

A tensor is a row of its first 64 bits and of a file's number, about 20 bytes. That finds files; what is said of one is
read in its list in the store, with whole digests.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

from adapterhub.digest import Digest
from adapterhub.store.tensor_digests import Tensors, key, keys

Select = Callable[..., list[tuple[Any, ...]]]
"""`Catalog.select`."""


def add(db: sqlite3.Connection, digest: Digest, read: Callable[[Digest], Tensors | None]) -> None:
    """Note what a file has, unless that is known; nothing where nobody says it."""
    if db.execute("SELECT 1 FROM weights WHERE digest = ?", (digest,)).fetchone() or (found := read(digest)) is None:
        return
    file = db.execute("INSERT INTO weights VALUES (NULL, ?)", (digest,)).lastrowid
    rows = sorted({(key(tensor.digest), file, tensor.size) for tensor in found if tensor.size})
    db.executemany("INSERT OR IGNORE INTO tensors VALUES (?, ?, ?)", rows)


def drop(db: sqlite3.Connection, digests: Iterable[Digest], read: Callable[[Digest], Tensors | None]) -> None:
    """Forget those of these files that no version has any more."""
    for digest in digests:
        found = db.execute("SELECT id FROM weights WHERE digest = ?", (digest,)).fetchone()
        if found is None or db.execute("SELECT 1 FROM files WHERE digest = ?", (digest,)).fetchone():
            continue
        listed = read(digest)
        if listed is None:  # every row is looked at
            db.execute("DELETE FROM tensors WHERE file = ?", found)
        else:
            there = [(key(tensor.digest), *found) for tensor in listed]
            db.executemany("DELETE FROM tensors WHERE key = ? AND file = ?", there)
        db.execute("DELETE FROM weights WHERE id = ?", found)


def nearest(select: Select, tensors: Tensors, limit: int) -> list[Digest]:
    """The files that have most of some tensors, the nearest first."""
    wanted = json.dumps([key(tensor.digest) for tensor in tensors if tensor.size])
    found = select(
        "SELECT digest FROM (SELECT file, count(*) AS n, sum(size) AS bytes FROM tensors"
        " WHERE key IN (SELECT value FROM json_each(?)) GROUP BY file ORDER BY n DESC, bytes DESC, file LIMIT ?)"
        " JOIN weights ON id = file ORDER BY n DESC, bytes DESC, file",
        wanted,
        limit,
    )
    return [digest for (digest,) in found]


def having(select: Select, prefix: str) -> list[Digest]:
    """The files that may have a tensor whose digest begins so, and none that hasn't one like it."""
    found = select(
        "SELECT DISTINCT digest FROM tensors JOIN weights ON id = file WHERE key BETWEEN ? AND ? ORDER BY digest", *keys(prefix)
    )
    return [digest for (digest,) in found]


def repeated(select: Select, digests: Iterable[Digest]) -> int:
    """Bytes of tensors that are in more than one of these files, without those of the first."""
    found = select(
        "SELECT sum(size * (n - 1)) FROM (SELECT size, count(*) AS n FROM tensors WHERE file IN"
        " (SELECT id FROM weights WHERE digest IN (SELECT value FROM json_each(?))) GROUP BY key HAVING n > 1)",
        json.dumps(sorted(digests)),
    )
    return int(found[0][0] or 0)


def unlisted(select: Select) -> list[tuple[Digest, int]]:
    """Files of weights, with their sizes, of which it isn't known what tensors they have."""
    return select(
        "SELECT digest, max(size) FROM files WHERE (lower(path) LIKE '%.safetensors' OR lower(path) LIKE '%.gguf')"
        " AND digest NOT IN (SELECT digest FROM weights) GROUP BY digest ORDER BY digest"
    )
