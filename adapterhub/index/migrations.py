"""The tables of registry.db, one migration after the other, by sqlite-utils.

The database is an index: a file with other tables than the latest is replaced with a new one, into which the store's logs are
replayed, so that a migration may drop any data. Released migrations are frozen; a new one raises `VERSION` in `index_database`,
and changes schema.sql, the result of all of them, and `schema.DIGEST`. STRICT tables need SQLite 3.37, full-text search a
SQLite built with FTS5, as Python's is. WITHOUT ROWID tables, which sqlite-utils cannot create, are plain SQL.
"""

from __future__ import annotations

import datetime
import sqlite3

from sqlite_utils import Database, Migrations
from sqlite_utils.db import Table

from .index_database import VERSION

migrations = Migrations("adapterhub")
REBUILT_TABLES = (
    "index_file", "unwritten", "marks", "texts", "facets", "metrics", "files", "made_from", "tensors", "weights",
    "facet_counts", "tags", "versions", "names", "repositories",
)  # fmt: skip
"""Tables that a rebuild empties, in this order."""
_SEARCHED_COLUMNS = ("name", "title", "tags", "description", "facts", "card")


def apply(connection: sqlite3.Connection, version: int = VERSION) -> None:
    """Apply the migrations that a database lacks, up to `version`; call this in a transaction.

    `user_version` counts the applied migrations, so that a command can tell without sqlite-utils that there are none to apply.
    The table of sqlite-utils lacks the migrations that were applied before version 8; they are added to it.
    """
    db = sqlite_utils_view(connection)
    ((before,),) = db.execute("PRAGMA user_version").fetchall()
    migrations.ensure_migrations_table(db)
    applied, pending = migrations.applied(db), [migration.name for migration in migrations.pending(db)]
    now = datetime.datetime.now(datetime.UTC).isoformat()
    db.table(migrations.migrations_table).insert_all(
        {"migration_set": migrations.name, "name": name, "applied_at": now} for name in pending[: before - len(applied)]
    )
    migrations.apply(db, stop_before=pending[version - len(applied) :])
    db.execute(f"PRAGMA user_version = {version}")


def sqlite_utils_view(connection: sqlite3.Connection) -> Database:
    """Return sqlite-utils' view of a connection, with STRICT tables and no plugins."""
    return Database(connection, strict=True, recursive_triggers=False, execute_plugins=False)


def texts(db: Database) -> Table:
    """Return the table of searched texts, one row per version."""
    return db.table("texts")


def build_search(db: Database) -> None:
    """Build the full-text index `texts_fts` from the table `texts`; from then on, triggers keep it up to date.

    It lists the texts with each beginning of one or two letters: those of all words that begin so would have to be merged for a
    search, which takes 0.4 s in a million texts. sqlite-utils, which cannot ask for that, recognizes the index all the same.
    """
    columns, new, old = (", ".join(f'{row}"{column}"' for column in _SEARCHED_COLUMNS) for row in ("", "new.", "old."))
    insert = f'INSERT INTO "texts_fts" (rowid, {columns}) VALUES (new.rowid, {new});'  # noqa: S608 - ours
    delete = f'INSERT INTO "texts_fts" ("texts_fts", rowid, {columns}) VALUES(\'delete\', old.rowid, {old});'
    db.execute(
        f"CREATE VIRTUAL TABLE \"texts_fts\" USING FTS5 ( {columns}, tokenize='unicode61 remove_diacritics 2', prefix='1 2',"
        ' content="texts" )'
    )
    for name, event, body in (
        ("texts_ai", "INSERT", insert),
        ("texts_ad", "DELETE", delete),
        ("texts_au", "UPDATE", f"{delete} {insert}"),
    ):
        db.execute(f'CREATE TRIGGER "{name}" AFTER {event} ON "texts" BEGIN {body} END')
    db.execute("INSERT INTO texts_fts (texts_fts) VALUES ('rebuild')")


def drop_search(db: Database) -> None:
    """Drop the full-text index and its triggers, so that many texts can be written at once."""
    texts(db).disable_fts()


@migrations()
def names_and_versions(db: Database) -> None:
    """Create names, versions and tags."""
    db.execute(
        "CREATE TABLE names (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, head TEXT NOT NULL, number INTEGER NOT NULL,"
        " deleted INTEGER NOT NULL) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE versions (name TEXT NOT NULL REFERENCES names, number INTEGER NOT NULL, digest TEXT NOT NULL,"
        " manifest_size INTEGER NOT NULL, time TEXT NOT NULL, size INTEGER, base TEXT, revision TEXT, method TEXT, r INTEGER,"
        " alpha REAL, format TEXT, dtype TEXT, parameters INTEGER, licence TEXT, description TEXT,"  # codespell:ignore licence
        " PRIMARY KEY (name, number), UNIQUE (name, digest)) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE tags (name TEXT NOT NULL, tag TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, tag),"
        " FOREIGN KEY (name, number) REFERENCES versions) STRICT, WITHOUT ROWID"
    )


@migrations()
def finding(db: Database) -> None:
    """Add an id to versions, by which texts, facets, metrics and files refer to them."""
    db.execute("DROP TABLE tags")
    db.execute("DROP TABLE versions")
    db.execute(
        "CREATE TABLE versions (id INTEGER PRIMARY KEY, name TEXT NOT NULL REFERENCES names, number INTEGER NOT NULL,"
        " digest TEXT NOT NULL, manifest_size INTEGER NOT NULL, time TEXT NOT NULL, size INTEGER, base TEXT, revision TEXT,"
        " method TEXT, r INTEGER, alpha REAL, format TEXT, dtype TEXT, parameters INTEGER,"
        " licence TEXT, description TEXT,"  # codespell:ignore licence
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
    # The stamp of the index.json that was written last, and the names whose lines in it are outdated.
    db.execute("CREATE TABLE index_file (stamp TEXT NOT NULL) STRICT")
    db.execute("CREATE TABLE unwritten (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID")


@migrations()
def marks(db: Database) -> None:
    """Add settings from the logs: `kind` is an operation of `Entry`, `key` a tag or a version's number."""
    db.execute(
        "CREATE TABLE marks (name TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,"
        " PRIMARY KEY (kind, name, key)) STRICT, WITHOUT ROWID"
    )


@migrations()
def made_from(db: Database) -> None:
    """Add the versions that name a digest among their parents; indexed by version, too, for dropping one."""
    db.execute(
        "CREATE TABLE made_from (parent TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (parent, version)) STRICT,"
        " WITHOUT ROWID"
    )
    db.execute("CREATE INDEX made_from_version ON made_from (version)")
    db.execute("CREATE INDEX files_version ON files (version)")


@migrations()
def tensors(db: Database) -> None:
    """Add the tensors of files of weights, one row each; there may be millions.

    `key` is the part of a digest by which a tensor is found (`tensor_search.key`); the lists in the store have the whole
    digest.
    """
    db.execute("CREATE TABLE weights (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE) STRICT")
    db.execute(
        "CREATE TABLE tensors (key INTEGER NOT NULL, file INTEGER NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (key, file))"
        " STRICT, WITHOUT ROWID"
    )


@migrations()
def common(db: Database) -> None:
    """Add an index for the newest versions, and the number of names whose newest version has a facet.

    `r` is a facet here, and the empty facet counts the names.
    """
    db.execute("CREATE INDEX versions_time ON versions (time)")
    db.execute(
        "CREATE TABLE facet_counts (kind TEXT NOT NULL, value TEXT NOT NULL COLLATE NOCASE, n INTEGER NOT NULL,"
        " PRIMARY KEY (kind, value)) STRICT, WITHOUT ROWID"
    )


@migrations()
def license_spelling(db: Database) -> None:
    """Rename a column as adapter.json did in schema 2."""
    db.execute("ALTER TABLE versions RENAME COLUMN licence TO license")  # codespell:ignore licence


@migrations()
def searched_texts(db: Database) -> None:
    """Move the searched texts into a table of their own, for which sqlite-utils keeps a full-text index."""
    db.table("search").drop()
    columns = {"version": int, **dict.fromkeys(_SEARCHED_COLUMNS, str)}
    texts(db).create(columns, pk="version", not_null=columns)
    texts(db).enable_fts(_SEARCHED_COLUMNS, tokenize="unicode61 remove_diacritics 2", create_triggers=True)


@migrations()
def pushed_by(db: Database) -> None:
    """Add the entry of the log that pushed a version. Facets and texts are limited from here on."""
    db.execute("ALTER TABLE versions ADD COLUMN seq INTEGER NOT NULL DEFAULT 0")


@migrations()
def rank_range(db: Database) -> None:
    """Add the smallest rank of any module: `r` is the largest from here on, and was that of most modules."""
    db.execute("ALTER TABLE versions ADD COLUMN least_r INTEGER")


@migrations()
def listing(db: Database) -> None:
    """Let an index lead to any page of the newest versions. Library and pipeline are facets from here on."""
    db.execute("DROP INDEX versions_time")
    db.execute("CREATE INDEX versions_time ON versions (time, name)")


@migrations()
def short_beginnings(db: Database) -> None:
    """Let the full-text index find beginnings of one or two letters at once."""
    drop_search(db)
    build_search(db)


@migrations()
def repositories(db: Database) -> None:
    """Add a row for each repository that a hub has a record of."""
    db.execute(
        "CREATE TABLE repositories (name TEXT PRIMARY KEY, private INTEGER NOT NULL, moved_from TEXT NOT NULL,"
        " removed INTEGER NOT NULL, changed INTEGER NOT NULL) STRICT, WITHOUT ROWID"
    )
    db.execute("CREATE INDEX repositories_changed ON repositories (changed)")
    db.execute(
        "CREATE INDEX repositories_restricted ON repositories (name) WHERE removed = 0 AND (private = 1 OR moved_from <> '')"
    )
