"""The tables of registry.db, one migration after the other.

The database is an index: a migration may drop what it likes, as `Catalog` replays the store's logs after the last of
them, in the same transaction. STRICT tables need SQLite 3.37, FTS5 a SQLite that was built with it, as Python's are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

Migration = Callable[[sqlite3.Connection], None]
MIGRATIONS: list[Migration] = []
FILLED = (
    "index_file",
    "unwritten",
    "marks",
    "search",
    "facets",
    "metrics",
    "files",
    "made_from",
    "tensors",
    "weights",
    "facet_counts",
    "tags",
    "versions",
    "names",
)
"""What a rebuild empties, in this order."""


def migration(step: Migration) -> Migration:
    """Make a function the next migration; what the last one leaves is the schema."""
    MIGRATIONS.append(step)
    return step


@migration
def _names_and_versions(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE names (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, head TEXT NOT NULL, number INTEGER NOT NULL,"
        " deleted INTEGER NOT NULL) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE versions (name TEXT NOT NULL REFERENCES names, number INTEGER NOT NULL, digest TEXT NOT NULL,"
        " manifest_size INTEGER NOT NULL, time TEXT NOT NULL, size INTEGER, base TEXT, revision TEXT, method TEXT, r INTEGER,"
        " alpha REAL, format TEXT, dtype TEXT, parameters INTEGER, licence TEXT, description TEXT,"
        " PRIMARY KEY (name, number), UNIQUE (name, digest)) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE tags (name TEXT NOT NULL, tag TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, tag),"
        " FOREIGN KEY (name, number) REFERENCES versions) STRICT, WITHOUT ROWID"
    )


@migration
def _finding(db: sqlite3.Connection) -> None:
    """Versions get an id, by which words (`search`), facets, metrics and files name them."""
    db.execute("DROP TABLE tags")
    db.execute("DROP TABLE versions")
    db.execute(
        "CREATE TABLE versions (id INTEGER PRIMARY KEY, name TEXT NOT NULL REFERENCES names, number INTEGER NOT NULL,"
        " digest TEXT NOT NULL, manifest_size INTEGER NOT NULL, time TEXT NOT NULL, size INTEGER, base TEXT, revision TEXT,"
        " method TEXT, r INTEGER, alpha REAL, format TEXT, dtype TEXT, parameters INTEGER, licence TEXT, description TEXT,"
        " parents TEXT NOT NULL, UNIQUE (name, number), UNIQUE (digest, name)) STRICT"
    )
    db.execute(
        "CREATE TABLE tags (name TEXT NOT NULL, tag TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, tag),"
        " FOREIGN KEY (name, number) REFERENCES versions (name, number)) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE facets (version INTEGER NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL COLLATE NOCASE,"
        " PRIMARY KEY (version, kind, value)) STRICT, WITHOUT ROWID"
    )
    db.execute("CREATE INDEX facets_value ON facets (kind, value)")
    db.execute(
        "CREATE TABLE metrics (version INTEGER NOT NULL, name TEXT NOT NULL COLLATE NOCASE, value REAL NOT NULL,"
        " PRIMARY KEY (version, name)) STRICT, WITHOUT ROWID"
    )
    db.execute("CREATE INDEX metrics_value ON metrics (name, value)")
    db.execute(
        "CREATE TABLE files (digest TEXT NOT NULL, version INTEGER NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,"
        " PRIMARY KEY (digest, version, path)) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE VIRTUAL TABLE search USING fts5 (name, title, tags, description, facts, card,"
        " tokenize = 'unicode61 remove_diacritics 2')"
    )
    # The index.json that was written last, and the names whose lines in it are older than their versions here.
    db.execute("CREATE TABLE index_file (stamp TEXT NOT NULL) STRICT")
    db.execute("CREATE TABLE unwritten (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID")


@migration
def _marks(db: sqlite3.Connection) -> None:
    """What logs say besides where refs are: `kind` is an operation of `Entry`, `key` a tag or a version's number."""
    db.execute(
        "CREATE TABLE marks (name TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,"
        " PRIMARY KEY (kind, name, key)) STRICT, WITHOUT ROWID"
    )


@migration
def _made_from(db: sqlite3.Connection) -> None:
    """Which versions name which digest among their parents. By version, so that dropping one reads no other's lines."""
    db.execute(
        "CREATE TABLE made_from (parent TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (parent, version)) STRICT,"
        " WITHOUT ROWID"
    )
    db.execute("CREATE INDEX made_from_version ON made_from (version)")
    db.execute("CREATE INDEX files_version ON files (version)")


@migration
def _tensors(db: sqlite3.Connection) -> None:
    """Which files of weights have which tensors. A row a tensor, of which there may be millions: `key` is all of its digest
    that it takes to find it (`tensors.key`); the lists in the store have the rest."""
    db.execute("CREATE TABLE weights (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE) STRICT")
    db.execute(
        "CREATE TABLE tensors (key INTEGER NOT NULL, file INTEGER NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (key, file))"
        " STRICT, WITHOUT ROWID"
    )


@migration
def _common(db: sqlite3.Connection) -> None:
    """What is asked of everything: the newest versions, and how many names' newest versions say what (`r` is a facet here, and
    the empty one counts the names)."""
    db.execute("CREATE INDEX versions_time ON versions (time)")
    db.execute(
        "CREATE TABLE facet_counts (kind TEXT NOT NULL, value TEXT NOT NULL COLLATE NOCASE, n INTEGER NOT NULL,"
        " PRIMARY KEY (kind, value)) STRICT, WITHOUT ROWID"
    )


@migration
def _license(db: sqlite3.Connection) -> None:
    """The spelling that adapter.json has since schema 2."""
    db.execute("ALTER TABLE versions RENAME COLUMN licence TO license")
