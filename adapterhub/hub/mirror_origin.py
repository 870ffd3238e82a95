"""The origin of mirrored versions: commits of the upstream, each with the version made from it.

`time` is when a row was fetched. It is 0 for a repository that got its name by a rename here: its pins stay valid, but the
upstream has nothing under that name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from adapterhub.digest import Digest

from .hub_database import HubDatabase


@contextmanager
def reserve(database: HubDatabase, name: str, commit: str) -> Iterator[None]:
    """Record that the block creates a version from a commit, so that nobody takes it for one of this hub's own before `add`."""
    sql = "INSERT INTO mirrored (name, origin, digest, time) VALUES (?, ?, '', ?) ON CONFLICT (name, origin) DO NOTHING"
    database.execute(sql, name, commit, time.time())
    try:
        yield
    except BaseException:
        # Also when canceled: the name must not stay reserved for the upstream.
        database.execute("DELETE FROM mirrored WHERE name = ? AND origin = ? AND digest = ''", name, commit)
        raise


def add(database: HubDatabase, name: str, commit: str, digest: Digest) -> None:
    """Record the version a commit of the upstream became. An existing row stays, so that a pin never changes."""
    sql = (
        "INSERT INTO mirrored (name, origin, digest, time) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (name, origin) DO UPDATE SET digest = excluded.digest WHERE mirrored.digest = ''"
    )
    database.execute(sql, name, commit, digest, time.time())


def names(database: HubDatabase, namespace: str) -> set[str]:
    """Return the names of a namespace that came from the upstream."""
    sql = "SELECT DISTINCT name FROM mirrored WHERE name >= ? AND name < ? AND time > 0"  # "0" follows "/" in ASCII
    return {str(name) for (name,) in database.select(sql, f"{namespace}/", f"{namespace}0")}


def find(database: HubDatabase, name: str, commit: str) -> Digest:
    """Return the version a commit of the upstream became; empty if it was never fetched."""
    rows = database.select("SELECT digest FROM mirrored WHERE name = ? AND origin = ?", name, commit)
    return str(rows[0][0]) if rows else ""


def is_mirrored(database: HubDatabase, name: str, digest: Digest) -> bool:
    """Return whether a version came from the upstream under this name."""
    return bool(database.select("SELECT 1 FROM mirrored WHERE name = ? AND digest = ? AND time > 0", name, digest))


def copy_pins(database: HubDatabase, old: str, new: str) -> None:
    """Make the pins of a repository valid under another name, too."""
    sql = (
        "INSERT INTO mirrored (name, origin, digest, time)"
        " SELECT ?, origin, digest, 0 FROM mirrored WHERE name = ? AND digest <> '' ON CONFLICT DO NOTHING"
    )
    database.execute(sql, new, old)
