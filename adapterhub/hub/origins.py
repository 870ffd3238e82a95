"""Where mirrored versions came from: the commits of the upstream, each with the version that was made of it.

The time of a row is when it was fetched; 0 for a repository that got its name here: its pins hold, and the upstream has nothing
under that name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from adapterhub.digest import Digest

from .database import HubDatabase


@contextmanager
def making(database: HubDatabase, name: str, commit: str) -> Iterator[None]:
    """Record that the block makes a version of a commit, so that nobody takes it for one of this hub's own before `add`."""
    sql = "INSERT INTO mirrored VALUES (?, ?, '', ?) ON CONFLICT (name, origin) DO NOTHING"
    database.execute(sql, name, commit, time.time())
    try:
        yield
    except BaseException:
        database.execute("DELETE FROM mirrored WHERE name = ? AND origin = ? AND digest = ''", name, commit)
        raise


def add(database: HubDatabase, name: str, commit: str, digest: Digest) -> None:
    """Record the version that a commit of the upstream became; what was recorded first stays, so that a pin never changes."""
    sql = (
        "INSERT INTO mirrored VALUES (?, ?, ?, ?) ON CONFLICT (name, origin) DO UPDATE SET digest = excluded.digest"
        " WHERE mirrored.digest = ''"
    )
    database.execute(sql, name, commit, digest, time.time())


def names(database: HubDatabase, namespace: str) -> set[str]:
    """The names of a namespace that came from the upstream."""
    sql = "SELECT DISTINCT name FROM mirrored WHERE name >= ? AND name < ? AND time > 0"  # 0 is what follows /
    return {str(name) for (name,) in database.select(sql, f"{namespace}/", f"{namespace}0")}


def find(database: HubDatabase, name: str, commit: str) -> Digest:
    """The version that a commit of the upstream became; empty for one that was not fetched."""
    rows = database.select("SELECT digest FROM mirrored WHERE name = ? AND origin = ?", name, commit)
    return str(rows[0][0]) if rows else ""


def has(database: HubDatabase, name: str, digest: Digest) -> bool:
    """Whether a version came from the upstream under this name."""
    return bool(database.select("SELECT 1 FROM mirrored WHERE name = ? AND digest = ? AND time > 0", name, digest))


def move(database: HubDatabase, old: str, new: str) -> None:
    """Have the pins of a repository hold under another name too."""
    sql = (
        "INSERT INTO mirrored SELECT ?, origin, digest, 0 FROM mirrored WHERE name = ? AND digest <> '' ON CONFLICT DO NOTHING"
    )
    database.execute(sql, new, old)
