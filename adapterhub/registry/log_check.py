"""What registry.db says of a name, held against the name's log, which alone is true.

A log is read back from its end, each entry by the digest that the one after it has, and no further than to the entries that
decide: the last move of a tag, the push of a version. A number that was pushed long ago costs a longer walk than the newest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adapterhub.index.queries import Name, Row
from adapterhub.store.ref_log import Entry, RefLog
from adapterhub_converters.errors import IntegrityError


def check_end(log: RefLog, state: Name, database: Path) -> None:
    """Raise IntegrityError unless the log ends where `state` says, so that an entry may follow with the next number."""
    number, last = 0, ""
    for entry in _back(log, state, database):
        number = max(number, entry.number)
        if entry.op in ("push", "delete", "restore"):
            last = last or entry.op
        if entry.op == "push":
            break
    if number > state.number or (last == "delete") != state.deleted:
        raise _wrong(database, f"it has another state of {state.name} than the log")


def check_row(log: RefLog, state: Name, row: Row, tag: str | None, database: Path) -> None:
    """Raise IntegrityError unless a version is what the log pushed under its number, and `tag`, if one led to it, is at it."""
    for entry in _in_force(log, state, row.number, database):
        if entry.op == "drop" and row.number in entry.numbers:
            break
        if tag and tag in entry.tags and entry.op in ("push", "tag", "untag"):
            if entry.op == "untag" or entry.number != row.number:
                there = "is gone" if entry.op == "untag" else f"is v{entry.number}"
                raise _wrong(database, f"{row.name}:{tag} is v{row.number} in it, and {there} in the log")
            tag = None
        if entry.op == "push" and entry.number == row.number:
            if tag or (entry.digest, entry.size) != (row.digest, row.manifest_size):
                break
            return
    raise _wrong(database, f"it has another {f'{row.name}:{tag}' if tag else row.ref} than the log")


def _in_force(log: RefLog, state: Name, number: int, database: Path) -> Iterator[Entry]:
    """Yield the entries that may say something of a version now, newest first; none from before it was removed for good."""
    undone = False
    for entry in _back(log, state, database):
        if entry.op == "restore" and number in entry.numbers:
            undone = True  # all back to the removal
        elif entry.op == "delete" and undone:
            undone = False
        elif entry.op in ("restore", "delete"):
            return
        elif not undone:
            yield entry


def _back(log: RefLog, state: Name, database: Path) -> Iterator[Entry]:
    """Yield the entries of a log, newest first."""
    wanted = state.head
    for seq in range(state.seq, 0, -1):
        found = log.entry(state.name, seq)
        if found is None or found[1] != wanted:
            raise _wrong(database, f"it has another entry {seq} of {state.name} than the log")
        entry, wanted = found[0], found[0].previous
        yield entry


def _wrong(database: Path, what: str) -> IntegrityError:
    return IntegrityError(str(database), what, "Rebuild the index", code="rebuild-index")
