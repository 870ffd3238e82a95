"""The tables of a new registry.db, as all `migrations` leave them, in plain SQL.

schema.sql is what the migrations make of an empty database; a test compares, and shows what a new migration adds. Applying
it needs no sqlite-utils, which takes longer to import than a push takes to run. Statements are separated by empty lines.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from .database import VERSION

_SQL = Path(__file__).with_name("schema.sql")


def create(connection: sqlite3.Connection) -> None:
    """Create all tables in an empty database; call this in a transaction."""
    for statement in _SQL.read_text(encoding="utf-8").split("\n\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
