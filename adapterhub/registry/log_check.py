"""Comparison of what registry.db contains about a name with the name's log, which alone is true.

A log is read back from its end, each entry by the digest that the one after it has, and no further than to the entry that
decides: the last move of a tag, or for the next number the last push. The push of a version is read where the index has it,
so that a version by number or digest takes two entries of a log of any length. What one process has found stays true of the log
up to there, which the digests fix, so that later it reads the newer entries only. That an index still has a version which was
removed since, unless that was the last that happened, is left to `fsck`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from adapterhub.digest import Digest
from adapterhub.index.queries import Name, Row
from adapterhub.store.ref_log import Entry, RefLog
from adapterhub_converters.errors import IntegrityError


def check_end(log: RefLog, state: Name, database: Path, *, known: Name | None = None) -> None:
    """Raise IntegrityError unless the log ends at `state`, so that an entry may follow with the next number.

    `known`: An earlier state that was found to be right.
    """
    number, last = 0, ""
    for entry, digest in _back(log, state, database):
        if known and digest == known.head:
            number, last = max(number, known.number), last or ("delete" if known.deleted else "")
            break
        number = max(number, entry.number)
        if entry.op in ("push", "delete", "restore"):
            last = last or entry.op
        if entry.op == "push":
            break
    if number > state.number or (last == "delete") != state.deleted:
        raise _wrong(database, f"it has another state of {state.name} than the log")


def check_row(log: RefLog, state: Name, row: Row, tag: str | None, *, pushed: int, database: Path, known: Digest = "") -> None:
    """Raise IntegrityError unless a version is what the log pushed under its number, and `tag`, if one led to it, is at it.

    Args:
        log: The log.
        state: Its end.
        row: The version.
        tag: A tag that the index has at it.
        pushed: The number of the entry that pushed the version, as the index has it.
        database: The index, for messages.
        known: The digest of an earlier end at which all of this was right.
    """
    if tag:
        _check_tag(log, state, row, tag, known=known, database=database)
    else:
        for entry, _ in itertools.islice(_back(log, state, database), 1):
            if entry.op == "delete":
                raise _wrong(database, f"it has {row.name}, which is removed in the log")
    found = log.entry(row.name, pushed)
    told = ("push", row.number, row.digest, row.manifest_size)
    if found is None or (found[0].op, found[0].number, found[0].digest, found[0].size) != told:
        raise _wrong(database, f"it has another {row.ref} than the log")


def _check_tag(log: RefLog, state: Name, row: Row, tag: str, *, known: Digest, database: Path) -> None:
    for entry, digest in _in_force(log, state, row.number, database):
        if digest == known:
            return
        if entry.op == "drop" and row.number in entry.numbers:
            break
        if tag in entry.tags and entry.op in ("push", "tag", "untag"):
            if entry.op != "untag" and entry.number == row.number:
                return
            there = "is gone" if entry.op == "untag" else f"is v{entry.number}"
            raise _wrong(database, f"{row.name}:{tag} is v{row.number} in it, and {there} in the log")
    raise _wrong(database, f"it has another {row.name}:{tag} than the log")


def _in_force(log: RefLog, state: Name, number: int, database: Path) -> Iterator[tuple[Entry, Digest]]:
    """Yield the entries that may apply to a version now, newest first; none from before it was removed for good."""
    undone = False
    for entry, digest in _back(log, state, database):
        if entry.op == "restore" and number in entry.numbers:
            undone = True  # all back to the removal
        elif entry.op == "delete" and undone:
            undone = False
        elif entry.op in ("restore", "delete"):
            return
        elif not undone:
            yield entry, digest


def _back(log: RefLog, state: Name, database: Path) -> Iterator[tuple[Entry, Digest]]:
    """Yield the entries of a log with their digests, newest first."""
    wanted = state.head
    for seq in range(state.seq, 0, -1):
        found = log.entry(state.name, seq)
        if found is None or found[1] != wanted:
            raise _wrong(database, f"it has another entry {seq} of {state.name} than the log")
        yield found
        wanted = found[0].previous


def _wrong(database: Path, what: str) -> IntegrityError:
    return IntegrityError(str(database), what, "Rebuild the index", code="rebuild-index")
