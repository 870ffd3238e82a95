"""Versions of a registry, and the resolution of refs to them.

Every function that takes a ref may raise RefError, NotFoundError or IntegrityError. `adapterhub.ref` parses refs;
`version_selection` and `adapterhub.semver` have the rules for ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.ref import LATEST, Ref
from adapterhub.registry import version_selection
from adapterhub.store.ref_log import TAG_MOVES, Entry, entries_in_force
from adapterhub_converters.errors import IntegrityError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import log_check, withdrawals
from .ledger import Ledger

T = TypeVar("T")
MOVED_TO = "moved to "
"""What the message of a removal begins with that ended a move to the name that follows."""


@dataclass(frozen=True, repr=False)
class Version:
    """One version of a name.

    Attributes:
        digest: Digest of its manifest, which identifies it in any registry.
        size: Bytes of its files; None if its manifest cannot be read.
        tags: Tags that point to it now.
        tag: The tag of the ref that named it, if any.
        deprecated: Why it should no longer be used, possibly empty; None if it is not deprecated.
        new: True if this push created it; False if the name had the same content already.
        moved: True if this push moved a tag to it.
        skipped: Names in the pushed folder that were left out.
        overridden: Codes of the errors in its check that `force` accepted.
    """

    name: str
    number: int
    digest: Digest
    size: int | None
    tags: tuple[str, ...] = ()
    tag: str | None = None
    deprecated: str | None = None
    new: bool = False
    moved: bool = False
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """The name with the version number."""
        return Ref(self.name, number=self.number)

    def __repr__(self) -> str:
        return f"<Version {self.ref} {self.digest[:19]}{''.join(f' {tag}' for tag in self.tags)}>"


@dataclass(frozen=True)
class RestoreResult:
    """The result of undoing the removal of a name.

    Attributes:
        numbers: The versions that are back.
        lost: The versions whose bytes a gc has removed.
    """

    name: str
    numbers: tuple[int, ...]
    lost: tuple[int, ...]


def removed_versions(entries: Iterable[Entry]) -> dict[int, Digest]:
    """Return the versions that the last removal of a name deleted: number to the digest of the manifest."""
    digest_by_number: dict[int, Digest] = {}
    for entry in entries_in_force(entries)[1]:
        if entry.op == "push":
            digest_by_number[entry.number] = entry.digest
        elif entry.op == "drop":
            for number in entry.numbers:
                digest_by_number.pop(number, None)
    return digest_by_number


def tag_number(entries: Iterable[Entry], tag: str) -> int:
    """Return the number of the version that a tag points to after these entries, none of which removes the name; 0 for none."""
    number = 0
    for entry in entries:
        if entry.op in (*TAG_MOVES, "untag") and tag in entry.tags:
            number = 0 if entry.op == "untag" else entry.number
    return number


def previous_number(entries: Iterable[Entry], tag: str, is_usable: Callable[[int], bool]) -> int:
    """Return the number that a tag had before the one it has after these entries, of the last usable version; 0 for none.

    A rollback undoes the moves after the version that it went back to: another one then goes further back, never forth again.
    """
    numbers: list[int] = []
    for entry in entries:
        if entry.op not in TAG_MOVES or tag not in entry.tags:
            continue
        if entry.op == "rollback" and entry.number in numbers:
            while numbers[-1] != entry.number:
                numbers.pop()
        elif numbers[-1:] != [entry.number]:
            numbers.append(entry.number)
    return next((number for number in reversed(numbers[:-1]) if is_usable(number)), 0)


def find_version(ledger: Ledger, ref: Ref) -> Version:
    """Return the version that `ref` names now, as `find_row` finds it, to be used.

    Raises:
        RefusedError: It was withdrawn.
    """
    row, (reasons, withdrawn) = find_row_with_marks(ledger, ref, "deprecate", "withdraw")
    if row.digest in withdrawn:
        raise withdrawals.error(str(ref), row.name, row.number, withdrawn[row.digest])
    return Version(row.name, row.number, row.digest, row.size, row.tags, ref.tag, deprecation_in(reasons, row))


def version_of(ledger: Ledger, row: VersionRow, tag: str | None = None) -> Version:
    """Return the version in a row that was just moved; `tag` is the tag that named it."""
    return Version(row.name, row.number, row.digest, row.size, row.tags, tag, deprecation(ledger, row))


def deprecation(ledger: Ledger, row: VersionRow) -> str | None:
    """Return why a version is deprecated, by itself or with its whole name; None if it is not."""
    return deprecation_in(queries.marks(ledger.index, "deprecate", row.name), row)


def deprecation_in(reasons: Mapping[str, str], row: VersionRow) -> str | None:
    """Return why a version is deprecated, by the deprecations of its name."""
    return reasons.get(str(row.number), reasons.get("0"))


def find_row(ledger: Ledger, ref: Ref) -> VersionRow:
    """Return the version that `ref` names now: by tag, number, digest or range; the newest one for a bare name.

    The index is compared with the log. If they differ, a writer may have moved the ref between the two reads, so the comparison
    is repeated under the write lock.
    """
    if not ledger.index.in_transaction:
        with contextlib.suppress(IntegrityError):
            state = ledger.current(ref.name)
            with ledger.index.snapshot():
                return _resolve_row(ledger, ref, state)
    # Under the lock nothing moves, so a difference that remains is real.
    with ledger.write_lock():
        return _resolve_row(ledger, ref, ledger.current(ref.name))


def find_row_with_marks(ledger: Ledger, ref: Ref, *kinds: str) -> tuple[VersionRow, tuple[dict[str, str], ...]]:
    """Return the version that `ref` names now, and the settings of each of these kinds of its name, as of one moment."""
    return find_row_with(ledger, ref, lambda row: tuple(queries.marks(ledger.index, kind, row.name) for kind in kinds))


def find_row_with(ledger: Ledger, ref: Ref, read: Callable[[VersionRow], T]) -> tuple[VersionRow, T]:
    """Return the version that `ref` names now, and what `read` reads of it from the index, as of one moment."""
    index = ledger.index
    row = find_row(ledger, ref)
    with index.snapshot():
        if queries.versions(index, name=row.name, number=row.number) == [row]:
            return row, read(row)
    # A writer has changed it since.
    with ledger.write_lock():
        row = find_row(ledger, ref)
        return row, read(row)


def _resolve_row(ledger: Ledger, ref: Ref, state: LogState) -> VersionRow:
    if state.seq == 0:
        import difflib  # late: an error alone needs it

        close = difflib.get_close_matches(ref.name, [name.name for name in queries.names(ledger.index)], 1)
        if close:
            hint = f"Did you mean {close[0]}?"
            raise NotFoundError(str(ref), "no such adapter", hint, code="no-such-adapter", meant=close[0])
        raise NotFoundError(str(ref), "no such adapter", "List the adapters of the registry", code="no-such-adapter")
    if state.deleted:
        raise removed_error(ledger, ref, state)
    tag: str | None = None
    if ref.digest:
        rows = queries.versions(ledger.index, name=ref.name, digest_prefix=ref.digest)
        if len(rows) > 1:
            raise version_selection.ambiguous_prefix_error(str(ref), [row.ref for row in rows])
    else:
        number, tag = (ref.number, None) if ref.number else _number_for_tag(ledger, ref)
        rows = queries.versions(ledger.index, name=ref.name, number=number)
    if not rows:
        raise _no_such_version_error(ledger, ref)
    _check_against_log(ledger, state, rows[0], tag)
    return rows[0]


def name_after_move(ledger: Ledger, name: str, state: LogState) -> str:
    """Return the name to which a removed one was moved, as its last entry says; empty if it was only removed."""
    logged = ledger.store.log.entry(name, state.seq)
    message = logged[0].message if logged else ""
    return message.removeprefix(MOVED_TO) if message.startswith(MOVED_TO) else ""


def removed_error(ledger: Ledger, ref: Ref, state: LogState) -> NotFoundError:
    """Return the error for a ref of a name that was removed, or moved to another one."""
    if new_name := name_after_move(ledger, ref.name, state):
        current_ref = replace(ref, name=new_name)
        return NotFoundError(str(ref), f"was moved to {current_ref.name}", f"Write {current_ref}", code="moved")
    return NotFoundError(str(ref), "was removed", "Restore it", code="removed", name=ref.name)


def _check_against_log(ledger: Ledger, state: LogState, row: VersionRow, tag: str | None) -> None:
    identity = (row.name, row.number, row.digest, row.manifest_size)
    verified_head = ledger.verified_heads.get((*identity, tag), "")
    if verified_head != state.head:
        log, pushed, database = ledger.store.log, queries.push_entry_number(ledger.index, row), ledger.index.path
        log_check.check_row(log, state, row, tag, pushed=pushed, database=database, verified_head=verified_head)
        # What was compared with the tag also holds for the version without it.
        ledger.verified_heads |= {(*identity, tag): state.head, (*identity, None): state.head}


def find_exact_row(ledger: Ledger, ref: Ref) -> VersionRow:
    """Return the version of a ref that is about to change: a missing tag is never taken for a range, and a range is refused."""
    if ref.range or (ref.tag and ledger.current(ref.name).number and ref.tag not in queries.tags(ledger.index, ref.name)):
        raise _no_such_version_error(ledger, ref)
    return find_row(ledger, ref)


def _number_for_tag(ledger: Ledger, ref: Ref) -> tuple[int, str | None]:
    """Return the number that a tag or a range refers to, 0 if none, and the tag.

    A missing tag such as `1.2` may be a range, unless it has requirements, which no version of a range has met.
    """
    tags = queries.tags(ledger.index, ref.name)
    if not ref.range and (ref.tag or LATEST) in tags:
        return tags[ref.tag or LATEST], ref.tag or LATEST
    if ref.tag and ledger.has_requirements(ref.tag):
        return 0, None
    matching_tag = version_selection.highest_tag_in_range(ref.range or ref.tag or "", lambda: tags, tags.get, str(ref))
    return (tags[matching_tag], matching_tag) if matching_tag else (0, None)


def _no_such_version_error(ledger: Ledger, ref: Ref) -> NotFoundError:
    tags = queries.tags(ledger.index, ref.name)
    if ref.range:
        versions = [tag for tag in tags if semver.parse(tag)]
        problem = f"no tag is in this range; the version tags are {', '.join(versions[-10:]) or 'none'}"
        return NotFoundError(str(ref), problem, "A range matches tags like 1.2.0")
    usable_rows = [row for row in queries.versions(ledger.index, name=ref.name) if row.withdrawn is None]
    numbers = [f"v{row.number}" for row in usable_rows[:5]]
    problem = f"no such {'tag' if ref.tag else 'version'}; the registry has {', '.join([*tags, *numbers][:10]) or 'none'}"
    return NotFoundError(
        str(ref),
        problem,
        f"List the versions of {ref.name}",
        code="no-such-tag" if ref.tag else "no-such-version",
        name=ref.name,
        repository=ref.name,
    )


def number_before(ledger: Ledger, ref: Ref, end: int, seq: int | None) -> int:
    """Return the number that the tag of `ref` had after an entry of the log.

    Args:
        ledger: The registry's ledger.
        ref: A name and a tag.
        end: The number of entries in the log.
        seq: The entry; None for the one before the tag's last move.
    """
    if seq is not None and not 1 <= seq <= end:
        problem = f"there is no entry {seq}; the log has 1 to {end}"
        raise NotFoundError(str(ref), problem, "Look at the log", code="look-at-log", ref=ref.name)
    removed_number = 0  # the number that the tag had when the name was last removed
    moves: list[tuple[int, int]] = [(0, 0)]  # entry, and the tag's number from there on; 0 for none
    for entry in ledger.store.log.entries(ref.name):
        if entry.op == "delete":
            removed_number = moves[-1][1]
            moves.append((entry.seq, 0))
        elif entry.op == "restore":
            # A restore brings a tag back only if its version came back; `latest` moves instead.
            number = entry.number if ref.tag in entry.tags else removed_number if removed_number in entry.numbers else 0
            moves.append((entry.seq, number))
        elif entry.op in (*TAG_MOVES, "untag") and ref.tag in entry.tags:
            moves.append((entry.seq, 0 if entry.op == "untag" else entry.number))
    if len(moves) == 1:
        raise never_set(ref)
    last_seq = moves[-1][0] - 1 if seq is None else seq
    number = [number for entry_seq, number in moves if entry_seq <= last_seq][-1]
    if not number:
        moment = f"at entry {seq}" if seq is not None else f"before entry {last_seq + 1}"
        raise NotFoundError(str(ref), f"did not exist {moment}", "Look at the log", code="look-at-log", ref=str(ref))
    return number


def never_set(ref: Ref) -> NotFoundError:
    """Return the error for a tag that the log of its name does not mention."""
    return NotFoundError(str(ref), "this tag was never set", "Look at the log", code="look-at-log", ref=ref.name)
