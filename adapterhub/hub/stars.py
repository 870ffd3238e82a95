"""Stars: one of each account for a name, `likes` in the API of the Hugging Face Hub."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_database import HubDatabase

MAX_STARS = 10_000
"""Names with a star of one account."""


@dataclass(frozen=True, slots=True)
class Star:
    """A star of an account, given at a time in seconds since the epoch."""

    name: str
    account: str
    time: float


def give(database: HubDatabase, name: str, account: str) -> None:
    """Give a name the star of an account; RefusedError if it has given too many."""
    with database.transaction():
        ((count,),) = database.select("SELECT count(*) FROM stars WHERE account = ? AND name <> ?", account, name)
        if count >= MAX_STARS:
            raise RefusedError(name, f"{account} has given {MAX_STARS:,} stars, the most of an account", "Take some away")
        sql = "INSERT INTO stars (name, account, time) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        database.execute(sql, name, account, time.time())


def take_away(database: HubDatabase, name: str, account: str) -> None:
    """Take the star of an account away, if the name has it."""
    database.execute("DELETE FROM stars WHERE name = ? AND account = ?", name, account)


def has_star(database: HubDatabase, name: str, account: str) -> bool:
    """Return whether a name has the star of an account."""
    return bool(database.select("SELECT 1 FROM stars WHERE name = ? AND account = ?", name, account))


def counts(database: HubDatabase, names: Collection[str]) -> Mapping[str, int]:
    """Return the number of stars of each of a page of names that has any."""
    if not names:
        return {}
    marks = ", ".join("?" * len(names))
    sql = f"SELECT name, count(*) FROM stars WHERE name IN ({marks}) GROUP BY name"  # noqa: S608 - marks
    return {str(name): int(count) for name, count in database.select(sql, *names)}


def stars_of_account(database: HubDatabase, account: str, *, after: str = "", limit: int = 100) -> list[Star]:
    """Return the stars of an account by name, after a name."""
    sql = "SELECT name, account, time FROM stars WHERE account = ? AND name > ? ORDER BY name LIMIT ?"
    return [Star(*row) for row in database.select(sql, account, after, limit)]


def stars_of_name(database: HubDatabase, name: str, *, after: str = "", limit: int = 100) -> list[Star]:
    """Return the stars of a name by account, after an account."""
    sql = "SELECT name, account, time FROM stars WHERE name = ? AND account > ? ORDER BY account LIMIT ?"
    return [Star(*row) for row in database.select(sql, name, after, limit)]


def remove(database: HubDatabase, name: str) -> None:
    """Remove the stars of a name."""
    database.execute("DELETE FROM stars WHERE name = ?", name)


def rename(database: HubDatabase, old: str, new: str) -> None:
    """Move the stars of a name to its new name, within a transaction."""
    sql = "INSERT INTO stars (name, account, time) SELECT ?, account, time FROM stars WHERE name = ? ON CONFLICT DO NOTHING"
    database.execute(sql, new, old)
    remove(database, old)
