"""Comparison of what registry.db says about a name with the name's log, which alone is authoritative.

A log is read backwards from its end, each entry by the digest recorded in its successor, and only as far as the entry that
decides: the last move of a tag, or the last push for the next number. The push of a version is read at the position that the
index has for it, so that a version by number or digest takes two entries of a log of any length. The digests fix everything
before an entry, so a process that has compared a log up to there only reads newer entries later. One fault is left to `fsck`:
an index that still has a version which was removed since, unless the removal is the last entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from adapterhub.digest import Digest
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.store.ref_log import TAG_MOVES, Entry, RefLog
from adapterhub_converters.errors import IntegrityError


def check_end(log: RefLog, state: LogState, database: Path, *, verified_state: LogState | None = None) -> None:
    """Raise IntegrityError unless the log ends at `state`, so that an entry may follow with the next number.

    Args:
        log: The log.
        state: The state of the name in the index.
        database: The index, for messages.
        verified_state: An earlier state that was already compared with the log.
    """
    number, last = 0, ""
    for entry, digest in _entries_newest_first(log, state, database):
        if verified_state and digest == verified_state.head:
            number, last = max(number, verified_state.number), last or ("delete" if verified_state.deleted else "")
            break
        number = max(number, entry.number)
        if entry.op in ("push", "delete", "restore"):
            last = last or entry.op
        # The last push has the highest number, so nothing before it matters.
        if entry.op == "push":
            break
    if number > state.number or (last == "delete") != state.deleted:
        raise _stale_index_error(database, f"it has another state of {state.name} than the log")


def check_row(
    log: RefLog, state: LogState, row: VersionRow, tag: str | None, *, pushed: int, database: Path, verified_head: Digest = ""
) -> None:
    """Raise IntegrityError unless the log pushed this version under its number, and `tag`, if given, points to it.

    Args:
        log: The log.
        state: The state of the name in the index, which is the log's end.
        row: The version.
        tag: The tag that led to the version in the index, if any.
        pushed: The number of the entry that pushed the version, according to the index.
        database: The index, for messages.
        verified_head: The digest of an earlier log end at which all of this was compared.
    """
    if tag:
        _check_tag(log, state, row, tag, verified_head=verified_head, database=database)
    else:
        # Without a tag, only the last entry can tell that the version was removed; earlier removals are left to `fsck`.
        for entry, _ in itertools.islice(_entries_newest_first(log, state, database), 1):
            if entry.op == "delete":
                raise _stale_index_error(database, f"it has {row.name}, which is removed in the log")
    logged = log.entry(row.name, pushed)
    expected = ("push", row.number, row.digest, row.manifest_size)
    if logged is None or (logged[0].op, logged[0].number, logged[0].digest, logged[0].size) != expected:
        raise _stale_index_error(database, f"it has another {row.ref} than the log")


def _check_tag(log: RefLog, state: LogState, row: VersionRow, tag: str, *, verified_head: Digest, database: Path) -> None:
    for entry, digest in _entries_in_force(log, state, row.number, database):
        if digest == verified_head:
            return
        if entry.op == "drop" and row.number in entry.numbers:
            break
        if tag in entry.tags and entry.op in (*TAG_MOVES, "untag"):
            if entry.op != "untag" and entry.number == row.number:
                return
            logged_position = "is gone" if entry.op == "untag" else f"is v{entry.number}"
            raise _stale_index_error(database, f"{row.name}:{tag} is v{row.number} in it, and {logged_position} in the log")
    raise _stale_index_error(database, f"it has another {row.name}:{tag} than the log")


def _entries_in_force(log: RefLog, state: LogState, number: int, database: Path) -> Iterator[tuple[Entry, Digest]]:
    """Yield the entries that may apply to a version now, newest first, and none from before it was removed for good."""
    skipping = False
    for entry, digest in _entries_newest_first(log, state, database):
        if entry.op == "restore" and number in entry.numbers:
            if not skipping:
                yield entry, digest
            skipping = True  # skip everything back to the removal, which it undid
        elif entry.op == "delete" and skipping:
            skipping = False
        elif entry.op in ("restore", "delete"):
            return
        elif not skipping:
            yield entry, digest


def _entries_newest_first(log: RefLog, state: LogState, database: Path) -> Iterator[tuple[Entry, Digest]]:
    """Yield the entries of a log with their digests, newest first."""
    expected_digest = state.head
    for seq in range(state.seq, 0, -1):
        logged = log.entry(state.name, seq)
        if logged is None or logged[1] != expected_digest:
            raise _stale_index_error(database, f"it has another entry {seq} of {state.name} than the log")
        yield logged
        expected_digest = logged[0].previous


def _stale_index_error(database: Path, problem: str) -> IntegrityError:
    return IntegrityError(str(database), problem, "Rebuild the index", code="rebuild-index")
