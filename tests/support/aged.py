"""Databases as older adapterhubs made them."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from adapterhub.index import migrations
from adapterhub.index.index_database import APPLICATION_ID


def age(path: Path, version: int) -> None:
    """Put a database with the tables of an earlier version, empty, in place of a registry.db that nobody has open."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA journal_mode = WAL")
        migrations.apply(db, version)
        if version < 8:  # sqlite-utils keeps count from then on
            db.execute(f"DROP TABLE {migrations.migrations.migrations_table}")
