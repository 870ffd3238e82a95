"""hub.db: what only the hub knows: accounts, members, tokens, sessions, its secret, uploads, conversions, mirrored commits.

It lies next to registry.db but, unlike that, is not derived from anything: back it up. `sqlite_file` is what it shares with
other databases.

A hub on several machines has the same tables in PostgreSQL (`storage.postgres`), which runs the same statements. They therefore
use only what both understand: `?` for values and nowhere else, `ON CONFLICT … DO …` rather than `INSERT OR …`, integers for
booleans. Only the statements that create tables are in SQLite's dialect.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import NamedTuple

from adapterhub.sqlite_file import SqliteFile, SqliteReader

FILE = "hub.db"
# The statements that take the database from each version to the next; `user_version` counts them. Never edit one: append.
MIGRATIONS = (
    """
    CREATE TABLE accounts (name TEXT PRIMARY KEY, created TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE tokens (
        id INTEGER PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts, hash TEXT NOT NULL UNIQUE, prefix TEXT NOT NULL,
        role TEXT NOT NULL, namespaces TEXT NOT NULL, kind TEXT NOT NULL, created REAL NOT NULL, expires REAL, revoked REAL,
        used REAL
    ) STRICT;
    CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE uploaded (name TEXT NOT NULL, digest TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (name, digest))
        STRICT, WITHOUT ROWID;
    """,
    "CREATE TABLE xet_epochs (id TEXT PRIMARY KEY, since REAL NOT NULL) STRICT, WITHOUT ROWID",
    """
    CREATE TABLE sha512 (digest TEXT PRIMARY KEY, sha256 TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE INDEX sha512_sha256 ON sha512 (sha256);
    CREATE TABLE forms (source TEXT NOT NULL, form TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (source, form))
        STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE accounts ADD COLUMN removed REAL;
    CREATE TABLE members (
        namespace TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, role TEXT NOT NULL, PRIMARY KEY (namespace, account)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE namespaces (
        name TEXT PRIMARY KEY, readers TEXT NOT NULL, max_bytes INTEGER, max_files INTEGER
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE sessions (id TEXT PRIMARY KEY, token INTEGER NOT NULL REFERENCES tokens, expires REAL NOT NULL)
        STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE devices (
        hash TEXT PRIMARY KEY, code TEXT NOT NULL UNIQUE, address TEXT NOT NULL, expires REAL NOT NULL, polled REAL NOT NULL,
        answer TEXT, account TEXT, role TEXT, namespaces TEXT, kind TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE refreshes (
        hash TEXT PRIMARY KEY, family TEXT NOT NULL, token INTEGER NOT NULL REFERENCES tokens, expires REAL NOT NULL, used REAL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY, time REAL NOT NULL, account TEXT NOT NULL, token TEXT NOT NULL, action TEXT NOT NULL,
        name TEXT NOT NULL, detail TEXT NOT NULL, address TEXT NOT NULL, hash TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE webhooks (
        id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, url TEXT NOT NULL, secret TEXT NOT NULL, private INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE deliveries (
        id INTEGER PRIMARY KEY AUTOINCREMENT, webhook INTEGER NOT NULL REFERENCES webhooks, event TEXT NOT NULL,
        body TEXT NOT NULL, due REAL NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL, error TEXT NOT NULL
    ) STRICT;
    CREATE INDEX deliveries_due ON deliveries (state, due)
    """,
    """
    CREATE TABLE publishers (
        id INTEGER PRIMARY KEY, scope TEXT NOT NULL, issuer TEXT NOT NULL, claims TEXT NOT NULL,
        account TEXT NOT NULL REFERENCES accounts
    ) STRICT;
    CREATE TABLE exchanged (ident TEXT PRIMARY KEY, expires REAL NOT NULL) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE mirrored (
        name TEXT NOT NULL, origin TEXT NOT NULL, digest TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (name, origin)
    ) STRICT, WITHOUT ROWID
    """,
    "ALTER TABLE namespaces ADD COLUMN adapters_only INTEGER NOT NULL DEFAULT 0",
    """
    DELETE FROM xet_epochs;
    ALTER TABLE xet_epochs ADD COLUMN name TEXT NOT NULL DEFAULT '';
    CREATE INDEX xet_epochs_name ON xet_epochs (name)
    """,
    """
    CREATE TABLE identities (
        issuer TEXT NOT NULL, subject TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, linked INTEGER NOT NULL,
        PRIMARY KEY (issuer, subject)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE admissions (
        id INTEGER PRIMARY KEY, issuer TEXT NOT NULL, claims TEXT NOT NULL, namespace TEXT NOT NULL, role TEXT NOT NULL
    ) STRICT;
    ALTER TABLE members ADD COLUMN admission INTEGER
    """,
    "CREATE TABLE jobs (job TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) STRICT, WITHOUT ROWID",
    """
    ALTER TABLE webhooks ADD COLUMN since TEXT NOT NULL DEFAULT '';
    CREATE TABLE announced (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE arriving (id TEXT PRIMARY KEY, name TEXT NOT NULL, size INTEGER NOT NULL, until REAL NOT NULL)
        STRICT, WITHOUT ROWID;
    CREATE INDEX arriving_name ON arriving (name)
    """,
    "CREATE TABLE moves (new TEXT PRIMARY KEY, old TEXT NOT NULL, account TEXT NOT NULL) STRICT, WITHOUT ROWID",
    "ALTER TABLE arriving ADD COLUMN spent INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE tokens ADD COLUMN parent INTEGER; ALTER TABLE devices ADD COLUMN parent INTEGER",
    """
    CREATE TABLE audit_cuts (last INTEGER NOT NULL PRIMARY KEY, hash TEXT NOT NULL, time REAL NOT NULL, mac TEXT NOT NULL)
        STRICT, WITHOUT ROWID
    """,
    "CREATE TABLE upstream_cache (key TEXT PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL) STRICT, WITHOUT ROWID",
    """
    ALTER TABLE tokens ADD COLUMN name TEXT NOT NULL DEFAULT '';
    ALTER TABLE accounts ADD COLUMN disabled REAL;
    CREATE TABLE quota_requests (
        namespace TEXT PRIMARY KEY, account TEXT NOT NULL, max_bytes INTEGER, max_files INTEGER, reason TEXT NOT NULL,
        time REAL NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE downloads (
        name TEXT NOT NULL, number INTEGER NOT NULL, day TEXT NOT NULL, protocol TEXT NOT NULL, count INTEGER NOT NULL,
        PRIMARY KEY (name, number, day, protocol)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX deliveries_webhook ON deliveries (webhook, id)",
    """
    CREATE TABLE gates (name TEXT PRIMARY KEY, mode TEXT NOT NULL, terms TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE access_requests (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, status TEXT NOT NULL,
        asked REAL NOT NULL, terms TEXT NOT NULL, decided REAL, decider TEXT NOT NULL, reason TEXT NOT NULL,
        UNIQUE (name, account)
    ) STRICT;
    CREATE INDEX access_requests_status ON access_requests (name, status, id);
    CREATE INDEX access_requests_account ON access_requests (account)
    """,
    """
    CREATE TABLE stars (
        name TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, time REAL NOT NULL, PRIMARY KEY (name, account)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX stars_account ON stars (account, name);
    CREATE INDEX downloads_day ON downloads (day, name, count)
    """,
    """
    CREATE TABLE reads (
        day TEXT NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL, account TEXT NOT NULL, protocol TEXT NOT NULL,
        address TEXT NOT NULL, count INTEGER NOT NULL, time REAL NOT NULL,
        PRIMARY KEY (day, name, digest, account, protocol)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX reads_name ON reads (name, time);
    CREATE INDEX reads_time ON reads (time)
    """,
    """
    CREATE TABLE proposals (
        name TEXT NOT NULL, ident TEXT NOT NULL, account TEXT NOT NULL, size INTEGER NOT NULL, opened REAL NOT NULL,
        announced INTEGER NOT NULL, closed REAL, PRIMARY KEY (name, ident)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX proposals_account ON proposals (account)
    """,
    """
    ALTER TABLE accounts ADD COLUMN full_name TEXT NOT NULL DEFAULT '';
    ALTER TABLE accounts ADD COLUMN about TEXT NOT NULL DEFAULT '';
    ALTER TABLE accounts ADD COLUMN link TEXT NOT NULL DEFAULT ''
    """,
    """
    CREATE TABLE replications (
        target TEXT PRIMARY KEY, complete REAL NOT NULL, waiting INTEGER NOT NULL, failing INTEGER NOT NULL, error TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE replicated (
        target TEXT NOT NULL, name TEXT NOT NULL, seq INTEGER NOT NULL, private INTEGER NOT NULL, tries INTEGER NOT NULL,
        due REAL NOT NULL, PRIMARY KEY (target, name)
    ) STRICT, WITHOUT ROWID
    """,
    "ALTER TABLE proposals ADD COLUMN commits INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE replicated ADD COLUMN refused INTEGER NOT NULL DEFAULT 0",
    """
    ALTER TABLE proposals ADD COLUMN hour REAL NOT NULL DEFAULT 0;
    ALTER TABLE proposals ADD COLUMN hourly_commits INTEGER NOT NULL DEFAULT 0
    """,
)


class Connections(NamedTuple):
    """The connections of a process to its database: how many are open, how many of those idle, how many threads wait."""

    open: int
    idle: int
    waiting: int


class HubDatabase(SqliteFile):
    """An open hub.db, created if missing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE, MIGRATIONS)

    def connections(self) -> Connections | None:
        """Return the connections to a server; None for a file, which has none."""
        return None


def hub_secret(database: HubDatabase) -> bytes:
    """Return the secret that all processes of a hub share, with which it signs; the first to ask makes it."""
    sql = "INSERT INTO secrets (name, value) VALUES ('uploads', ?) ON CONFLICT DO NOTHING"
    database.execute(sql, secrets.token_bytes(32))
    return bytes(database.select("SELECT value FROM secrets WHERE name = 'uploads'")[0][0])


class ReadDatabase(SqliteReader):
    """A hub.db of any version and owner, opened only for reading."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE)
