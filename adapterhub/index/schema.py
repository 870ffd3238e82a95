"""The tables of a new registry.db, as all `migrations` leave them, in plain SQL.

schema.sql is what the migrations make of an empty database; a test compares the two, and shows what a new migration adds.
Applying it needs no sqlite-utils, which takes longer to import than a push takes to run. Statements are separated by empty
lines.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

from .index_database import VERSION

DIGEST = "d4d65cf0948e5a50f7e0ebcebf1b93c0186272633927734ea4c78c9523dd2bf4"
"""What `digest` returns for a new database."""
_SQL = Path(__file__).with_name("schema.sql")
_MAX_OBJECTS = 200  # tables, indexes, triggers


def create(connection: sqlite3.Connection) -> None:
    """Create all tables in an empty database; call this in a transaction."""
    for statement in _SQL.read_text(encoding="utf-8").split("\n\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def digest(connection: sqlite3.Connection) -> str:
    """Return the digest of everything that a database defines, ignoring quotes and spaces; empty for too many objects."""
    objects = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchmany(_MAX_OBJECTS + 1)
    if len(objects) > _MAX_OBJECTS:
        return ""
    quotes = str.maketrans("[]`", '"""')
    lines = sorted(" ".join(f"{kind} {name} {table} {sql}".translate(quotes).split()) for kind, name, table, sql in objects)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
