"""Promotions, approvals, rollbacks and withdrawals: each is one entry of a name's log, decided under the write lock.

`tag_gate` decides whether a tag may move, here as for every other move.
"""

from __future__ import annotations

from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.manifest.release_statement import MAX_BUNDLE, ReleaseStatement
from adapterhub.ref import LATEST, Ref, RefError
from adapterhub.registry import withdrawals
from adapterhub.registry.ledger import Ledger
from adapterhub.registry.moves import check_expect, check_protected, checked_message, now
from adapterhub.registry.version_lookup import Version, find_exact_row, find_row, previous_number, version_of
from adapterhub.store.ref_log import Entry, entries_in_force
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

_MAX_APPROVALS = 10  # of one version for one tag by one author, of which one counts
_WITHDRAWN, _USABLE_AGAIN = " is withdrawn: ", " can be used again"
"""What the messages say of the entries by which a withdrawal, or its end, moved `latest`; before it is the version."""


@dataclass(frozen=True)
class Withdrawal:
    """A version that was withdrawn.

    Attributes:
        reason: Why.
        tags: The tags that meant it and mean it still: they cannot be used until they move.
        latest: The number of the version that `latest` means now; 0 if it means the withdrawn one.
        moved_latest: Whether `latest` meant it before.
    """

    name: str
    number: int
    digest: Digest
    reason: str
    tags: tuple[str, ...]
    latest: int
    moved_latest: bool = False

    @property
    def ref(self) -> Ref:
        """The name with the version number."""
        return Ref(self.name, number=self.number)


def approve(ledger: Ledger, ref: Ref, tag: str, statement: ReleaseStatement) -> Version:
    """Record that somebody approves a version for a tag; whether that counts is decided when the tag moves."""
    row = find_row(ledger, ref)
    _check_text(statement.text, ref)
    if len(statement.bundle) > MAX_BUNDLE:
        raise UsageError(str(ref), f"the signature has over {MAX_BUNDLE:,} characters", "Sign it with another key")
    text = statement.dump()

    def decide(state: LogState) -> Entry:
        find_row(ledger, row.ref)
        withdrawals.check(ledger.index, row.name, row.number, row.digest)
        earlier = sum(
            entry.op == "approve" and (entry.number, entry.author, entry.tags) == (row.number, ledger.author, (tag,))
            for entry in ledger.store.log.entries(row.name)
        )
        # Each is read, and its signature verified, whenever the tag is to move.
        if earlier >= _MAX_APPROVALS:
            problem = f"was approved {earlier} times for {tag} by the same author, which is the limit"
            raise RefusedError(str(ref), problem, "An approval that was made once counts")
        return _entry(row, state, "approve", (tag,), text)

    ledger.move(row.name, decide)
    return version_of(ledger, find_row(ledger, row.ref), ref.tag)


def rollback(ledger: Ledger, ref: Ref, message: str, *, expect: Digest | None = None) -> tuple[Version, Version]:
    """Point the tag of `ref` at the version it had before, one step back; return the version it left and the one it has now.

    Args:
        ledger: The registry's ledger.
        ref: The tag.
        message: Why, for the log.
        expect: The digest that the tag must still have, so that a second request does not go two steps back; None for any.

    Raises:
        ConflictError: The tag has another digest.
        NotFoundError: It had no other version that can still be used.
    """
    tag = ref.tag
    if tag is None:
        raise RefError(str(ref), "has no tag", f"Write {ref.name}:TAG")
    if tag == LATEST:
        raise RefusedError(str(ref), "is always the newest push", "Choose another tag", code="latest-tag", name=ref.name)
    message = checked_message(message, ref)
    left = version_of(ledger, find_exact_row(ledger, ref), tag)

    def decide(state: LogState) -> Entry:
        nonlocal left
        check_expect(ledger, ref.name, tag, expect)
        left = version_of(ledger, find_exact_row(ledger, ref), tag)
        entries, _ = entries_in_force(ledger.store.log.entries(ref.name))
        number = previous_number(entries, tag, lambda number: _is_usable(ledger, ref.name, number))
        if not number:
            problem = "had no other version before that can be used"
            raise NotFoundError(str(ref), problem, "Look at the log", code="look-at-log", ref=str(ref))
        check_protected(ledger, ref.name, tag)
        return _entry(find_row(ledger, Ref(ref.name, number=number)), state, "rollback", (tag,), message)

    ledger.move(ref.name, decide)
    return left, version_of(ledger, find_exact_row(ledger, ref), tag)


def _is_usable(ledger: Ledger, name: str, number: int) -> bool:
    rows = queries.versions(ledger.index, name=name, number=number)
    return bool(rows) and rows[0].digest not in withdrawals.reasons(ledger.index, name)


def withdraw(ledger: Ledger, ref: Ref, statement: ReleaseStatement) -> Withdrawal:
    """Withdraw a version; `latest` first moves to the newest other one, and other tags stay where they are.

    If the process ends in between, the same call finishes it.
    """
    row = find_row(ledger, ref)
    _check_text(statement.text, ref)
    moved = _move_latest(ledger, row, statement.text)

    def decide(state: LogState) -> Entry | None:
        find_row(ledger, row.ref)
        is_withdrawn = row.digest in withdrawals.reasons(ledger.index, row.name)
        return None if is_withdrawn else _entry(row, state, "withdraw", (), statement.dump())

    ledger.move(row.name, decide)
    row, tags = find_row(ledger, row.ref), queries.tags(ledger.index, row.name)
    reason = withdrawals.reasons(ledger.index, row.name)[row.digest]
    latest = tags.get(LATEST, 0)
    kept_tags = tuple(sorted(tag for tag in row.tags if tag != LATEST))
    return Withdrawal(row.name, row.number, row.digest, reason, kept_tags, latest if latest != row.number else 0, moved)


def _move_latest(ledger: Ledger, row: VersionRow, reason: str) -> bool:
    """Move `latest` from a version to the newest other one that can be used; return whether it meant the version."""
    moved = False

    def decide(state: LogState) -> Entry | None:
        nonlocal moved
        if queries.tags(ledger.index, row.name).get(LATEST) != row.number:
            return None
        others = [other for other in queries.versions(ledger.index, name=row.name) if other.number != row.number]
        target = next((other for other in others if _is_usable(ledger, row.name, other.number)), None)
        moved = target is not None
        message = f"v{row.number}{_WITHDRAWN}{reason}"
        return _entry(target, state, "tag", (LATEST,), message[:1000]) if target else None

    ledger.move(row.name, decide)
    return moved


def copy_withdrawal(ledger: Ledger, entry: Entry, name: str) -> None:
    """Withdraw under another name what an entry withdraws, though a gc may have removed the version: its bytes stay barred."""

    def decide(state: LogState) -> Entry | None:
        is_withdrawn = entry.digest in withdrawals.reasons(ledger.index, name)
        return None if is_withdrawn else replace(entry, name=name, seq=state.seq + 1, previous=state.head)

    ledger.move(name, decide)


def undo_withdrawal(ledger: Ledger, ref: Ref) -> Version:
    """Let a withdrawn version be used again; `latest` moves to the newest version if a withdrawal was what moved it last."""
    row = find_row(ledger, ref)

    def decide(state: LogState) -> Entry | None:
        find_row(ledger, row.ref)
        is_withdrawn = row.digest in withdrawals.reasons(ledger.index, row.name)
        return _entry(row, state, "unwithdraw", (), "") if is_withdrawn else None

    ledger.move(row.name, decide)
    _return_latest(ledger, row)
    return version_of(ledger, find_row(ledger, row.ref), ref.tag)


def _return_latest(ledger: Ledger, row: VersionRow) -> None:
    """Move `latest` to a version that is the newest that can be used, if a withdrawal was what moved it last."""

    def decide(state: LogState) -> Entry | None:
        entries, _ = entries_in_force(ledger.store.log.entries(row.name))
        last = next((entry for entry in reversed(entries) if LATEST in entry.tags), None)
        if last is None or last.op != "tag" or last.number >= row.number:
            return None
        if _WITHDRAWN not in last.message and _USABLE_AGAIN not in last.message:
            return None
        versions = queries.versions(ledger.index, name=row.name)
        newest = next((version for version in versions if _is_usable(ledger, row.name, version.number)), None)
        is_newest = newest is not None and newest.number == row.number
        return _entry(row, state, "tag", (LATEST,), f"v{row.number}{_USABLE_AGAIN}") if is_newest else None

    ledger.move(row.name, decide)


def _check_text(text: str, ref: Ref) -> None:
    if not checked_message(text, ref).strip():
        raise UsageError("message", "is empty", "Say why")


def _entry(row: VersionRow, state: LogState, op: str, tags: tuple[str, ...], message: str) -> Entry:
    position = (row.digest, row.manifest_size, row.number, tags, state.head)
    return Entry(row.name, state.seq + 1, op, now(), *position, message=message)
