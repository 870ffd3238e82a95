"""Moves of refs: each is decided under the write lock, for the current state of a name, and becomes one entry of its log."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref, RefError, parse_prefix, parse_tag
from adapterhub.store.ref_log import MAX_RESTORES, Entry, entries_in_force
from adapterhub.store.store import Store
from adapterhub_converters.errors import AdapterhubError, ConflictError, NotFoundError, RefusedError

from . import withdrawals
from .ledger import Ledger
from .version_lookup import (
    RestoreResult,
    Version,
    find_exact_row,
    find_row,
    number_before,
    removed_versions,
    tag_number,
    version_of,
)

ABSENT = "absent"
"""`expect` of a ref that must not exist yet."""
_MAX_MESSAGE = 1000


def now() -> str:
    """Return the current time as log entries have it: ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# ---- push


def latest_tags(tag: str | None) -> tuple[str, ...]:
    """Return the tags that a push to `tag` moves."""
    return (LATEST,) if tag in (None, LATEST) else (LATEST, str(tag))


def check_pushable(ref: Ref) -> None:
    """Raise RefError for a ref with a number, a digest or a range."""
    if ref.number or ref.digest or ref.range:
        raise RefError(
            str(ref), "a push assigns the number itself", f"Push to {ref.name}, or to {ref.name}:TAG", code="version-number"
        )


def checked_tags(ref: Ref, tags: Sequence[str]) -> tuple[str, ...]:
    """Return the tags if all of them can be set by hand; raise RefError or RefusedError otherwise."""
    for tag in tags:
        _check_not_latest(ref.name, parse_tag(tag, f"{ref.name}:{tag}"))
    return tuple(tags)


def checked_message(message: str, ref: Ref) -> str:
    """Return a message for the log, with characters that cannot be encoded replaced; RefError if it is too long."""
    # Arguments of a command line that are not valid UTF-8 arrive as surrogates (PEP 383), which cannot be written.
    message = message.encode(errors="replace").decode()
    if len(message) > _MAX_MESSAGE:
        raise RefError(str(ref), f"the message is over {_MAX_MESSAGE} characters", "Shorten it, or link to a longer one")
    return message


def check_push(ledger: Ledger, ref: Ref, expect: Digest | None) -> None:
    """Raise the error that a push to `ref` would end with now, before its files are stored."""
    check_pushable(ref)
    _check_push(ledger, ref, ledger.current(ref.name), expect)


def push(
    ledger: Ledger,
    ref: Ref,
    manifest: Manifest,
    *,
    expect: Digest | None,
    tags: tuple[str, ...] | None = None,
    message: str = "",
    move_latest_back: bool = False,
    number: int = 0,
    time: str = "",
) -> Version | None:
    """Create a version from a manifest whose blobs are stored, and move tags; return None if a gc has removed any of the blobs.

    Args:
        ledger: The registry's ledger.
        ref: A name, or a name and a tag.
        manifest: The manifest.
        expect: The digest that `ref` must still have, or ABSENT.
        tags: Tags to move; None for those of a push to `ref`.
        message: Why, for the log.
        move_latest_back: Move `latest` even if the content is that of an earlier version.
        number: The number of the version, higher than any that the name has had; 0 for the next one.
        time: When a new version was pushed under another name, as in the log there; empty for now.
    """
    check_pushable(ref)
    new = complete = moved = False
    tags_to_move = tuple(dict.fromkeys(latest_tags(ref.tag) if tags is None else tags))

    def decide(state: LogState) -> Entry | None:
        nonlocal new, complete, moved
        _check_push(ledger, ref, state, expect)
        existing_rows = queries.versions(ledger.index, name=ref.name, digest=manifest.digest)
        withdrawals.check(ledger.index, ref.name, existing_rows[0].number if existing_rows else 0, manifest.digest)
        new = not existing_rows
        # Checked under the write lock: from here on no gc can remove a blob before the entry that names it is committed.
        complete = _is_complete(ledger.store, manifest)
        if not complete:
            return None
        changed_tags = (
            tags_to_move
            if new
            else tuple(tag for tag in tags_to_move if tag not in existing_rows[0].tags and (move_latest_back or tag != LATEST))
        )
        moved = new or bool(changed_tags)
        if not moved:
            return None
        check_protected(ledger, ref.name, *changed_tags)
        # A number is never used twice, not even after a removal: a pinned ref must not come to mean other bytes.
        op, target_number = ("push", max(number, state.number + 1)) if new else ("tag", existing_rows[0].number)
        move_fields = (manifest.digest, len(manifest.raw), target_number, changed_tags, state.head)
        return Entry(ref.name, state.seq + 1, op, (new and time) or now(), *move_fields, message=message)

    ledger.move(ref.name, decide)
    if not complete:
        return None
    # A name has each manifest once, unless another writer has removed it since.
    rows = queries.versions(ledger.index, name=ref.name, digest=manifest.digest)
    if not rows:
        raise NotFoundError(str(ref), "was removed", "Restore it", code="removed", name=ref.name)
    named_tag = ref.tag or next((tag for tag in tags_to_move if tag != LATEST), None)
    return replace(version_of(ledger, rows[0], named_tag), new=new, moved=moved)


def _is_complete(store: Store, manifest: Manifest) -> bool:
    blobs = (Descriptor(oci_manifest.MANIFEST_TYPE, manifest.digest, len(manifest.raw)), manifest.config, *manifest.layers)
    with store.files.folders_kept_open():
        return all(store.has_blob(blob.digest, blob.size) for blob in blobs)


def _check_push(ledger: Ledger, ref: Ref, state: LogState, expect: Digest | None) -> None:
    if state.deleted:
        raise ConflictError(str(ref), "this name was removed", "Restore it first", code="removed-name", name=ref.name)
    check_expect(ledger, ref.name, ref.tag, expect)


def check_expect(ledger: Ledger, name: str, tag: str | None, expect: Digest | None) -> None:
    """Raise ConflictError, which names the current digest, unless a tag (None: `latest`) still points to `expect`."""
    if expect is None:
        return
    expected = expect if expect == ABSENT else parse_prefix(expect, f"{Ref(name, tag=tag)}: expect")
    number = queries.tags(ledger.index, name).get(tag or LATEST, 0)
    rows = queries.versions(ledger.index, name=name, number=number)
    current_digest = rows[0].digest if rows else ABSENT
    # `expect` may be the beginning of a digest.
    if not current_digest.startswith(expected):
        problem = f"moved in the meantime: it is {current_digest}, not {expect}"
        raise ConflictError(str(Ref(name, tag=tag)), problem, "Review that version, then try again")


# ---- tags


def tag(ledger: Ledger, ref: Ref, tag: str, *, expect: Digest | None = None, message: str = "") -> Version:
    """Point `tag` at the version that `ref` names."""
    checked_tags(ref, (tag,))
    message = checked_message(message, ref)
    row = find_row(ledger, ref)

    def decide(state: LogState) -> Entry | None:
        check_expect(ledger, ref.name, tag, expect)
        if tag in find_row(ledger, row.ref).tags:
            return None
        return replace(_tag_entry(ledger, state, row, tag), message=message)

    ledger.move(ref.name, decide)
    return version_of(ledger, find_row(ledger, row.ref), tag)


def restore_tag(ledger: Ledger, ref: Ref, seq: int | None) -> Version:
    """Point the tag of `ref` where it pointed before its last move or removal, or after entry `seq` of the log."""
    tag = _required_tag(ref)
    state = ledger.current(ref.name)
    if state.deleted or not state.seq:
        find_row(ledger, ref)  # raises NotFoundError

    def decide(state: LogState) -> Entry | None:
        row = find_row(ledger, Ref(ref.name, number=number_before(ledger, ref, state.seq, seq)))
        return None if tag in row.tags else _tag_entry(ledger, state, row, tag)

    ledger.move(ref.name, decide)
    return version_of(ledger, find_exact_row(ledger, ref), tag)


def protect(ledger: Ledger, ref: Ref, *, on: bool) -> Version:
    """Protect the tag of `ref`, or lift its protection."""
    tag = _required_tag(ref)
    find_exact_row(ledger, ref)

    def decide(state: LogState) -> Entry | None:
        find_exact_row(ledger, ref)
        if (tag in queries.marks(ledger.index, "protect", ref.name)) == on:
            return None
        op = "protect" if on else "unprotect"
        return Entry(ref.name, state.seq + 1, op, now(), tags=(tag,), previous=state.head)

    ledger.move(ref.name, decide)
    return version_of(ledger, find_exact_row(ledger, ref), tag)


def _tag_entry(ledger: Ledger, state: LogState, row: VersionRow, *tags: str) -> Entry:
    check_protected(ledger, row.name, *tags)
    return Entry(row.name, state.seq + 1, "tag", now(), row.digest, row.manifest_size, row.number, tags, state.head)


def check_protected(ledger: Ledger, name: str, *tags: str) -> None:
    """Raise RefusedError if one of these tags of a name is protected."""
    protected = queries.marks(ledger.index, "protect", name)
    for tag in tags:
        if tag in protected:
            raise RefusedError(f"{name}:{tag}", "is protected", "Unprotect it first", code="protected", ref=f"{name}:{tag}")


def _required_tag(ref: Ref) -> str:
    if ref.tag is None:
        raise RefError(str(ref), "has no tag", f"Write {ref.name}:TAG")
    _check_not_latest(ref.name, ref.tag)
    return ref.tag


def _check_not_latest(name: str, tag: str) -> None:
    if tag == LATEST:
        raise RefusedError(f"{name}:{tag}", "is always the newest push", "Choose another tag", code="latest-tag", name=name)


# ---- deprecation and removal


def deprecate(ledger: Ledger, ref: Ref, message: str, *, undo: bool) -> int:
    """Mark a version, or all versions of a bare name, as deprecated; return its number, 0 for all."""
    row = find_row(ledger, ref)
    number = row.number if ref != Ref(ref.name) else 0
    message = checked_message(message, ref)

    def decide(state: LogState) -> Entry | None:
        # Looked up again under the lock: the name may have been removed since.
        find_row(ledger, Ref(ref.name, number=row.number))
        current_message = queries.marks(ledger.index, "deprecate", ref.name).get(str(number))
        if current_message == (None if undo else message):
            return None
        op, text = ("undeprecate", "") if undo else ("deprecate", message)
        return Entry(ref.name, state.seq + 1, op, now(), number=number, previous=state.head, message=text)

    ledger.move(ref.name, decide)
    return number


def remove(ledger: Ledger, ref: Ref, *, expect: Digest | None, force: bool, message: str = "") -> None:
    """Remove a tag, or a name with all its versions; with `force`, even if other adapters were made from them."""
    message = checked_message(message, ref)
    if ref.number or ref.digest:
        hint = f"Withdraw it, or remove the name {ref.name}, or a tag"
        problem = "a version cannot be removed alone"
        raise RefusedError(str(ref), problem, hint, code="version-stays", name=ref.name, ref=str(ref))
    if ref.tag:
        _check_not_latest(ref.name, ref.tag)
    find_exact_row(ledger, ref)

    def decide(state: LogState) -> Entry:
        check_expect(ledger, ref.name, ref.tag, expect)
        find_exact_row(ledger, ref)
        # Removing a name would remove all its tags, so none of them may be protected.
        for tag in (ref.tag,) if ref.tag else queries.marks(ledger.index, "protect", ref.name):
            check_protected(ledger, ref.name, tag)
        if not (ref.tag or force):
            _check_childless(ledger, ref.name)
        tags = (ref.tag,) if ref.tag else ()
        op = "untag" if tags else "delete"
        return Entry(ref.name, state.seq + 1, op, now(), tags=tags, previous=state.head, message=message)

    ledger.move(ref.name, decide)


def _check_childless(ledger: Ledger, name: str) -> None:
    """Raise RefusedError if versions of other names were made from those of `name`, unless another name has the parent, too."""
    parent_by_child = {
        row.ref: parent.ref
        for parent in queries.versions(ledger.index, name=name)
        for row in queries.versions(ledger.index, parent=parent.digest)
        if row.name != name and all(holder.name == name for holder in queries.versions(ledger.index, digest=parent.digest))
    }
    if parent_by_child:
        child, parent = min(parent_by_child.items(), key=lambda item: str(item[0]))
        remainder = f" ({len(parent_by_child) - 1} more like it)" if len(parent_by_child) > 1 else ""
        problem = f"{child} was made from {parent} and could not be made again{remainder}"
        raise RefusedError(name, problem, "Use force to remove it all the same", code="has-children", child=child.name)


def restore(ledger: Ledger, name: str, *, among: Mapping[int, Digest] | None = None, message: str = "") -> RestoreResult:
    """Undo the removal of a name, except for versions whose bytes gc has removed.

    If `latest` pointed to one of those, it points to the newest version that is back.

    Args:
        ledger: The registry's ledger.
        name: The name.
        among: Versions that may be restored, number to digest; None for all.
        message: Why, for the log.
    """
    result = RestoreResult(name, (), ())

    def decide(state: LogState) -> Entry:
        nonlocal result
        if not state.deleted:
            if not state.seq:
                find_row(ledger, Ref(name))  # raises NotFoundError
            raise RefusedError(name, "was not removed")
        entries = list(ledger.store.log.entries(name))
        # Each restore makes a replay apply the whole log again.
        if sum(entry.op == "restore" for entry in entries) >= MAX_RESTORES:
            raise RefusedError(name, f"was restored {MAX_RESTORES} times, which is the limit", "Push to another name")
        pushed = {
            number: digest
            for number, digest in removed_versions(entries).items()
            if among is None or among.get(number) == digest
        }
        restorable = {number for number, digest in pushed.items() if _is_stored(ledger.store, digest)}
        result = RestoreResult(name, tuple(sorted(restorable)), tuple(sorted(pushed.keys() - restorable)))
        entry = Entry(name, state.seq + 1, "restore", now(), numbers=result.numbers, previous=state.head, message=message)
        if restorable and tag_number(entries_in_force(entries)[1], LATEST) not in restorable:
            number = max(restorable)
            entry = replace(entry, digest=pushed[number], number=number, tags=(LATEST,))
        return entry

    ledger.move(name, decide)
    return result


def _is_stored(store: Store, digest: Digest) -> bool:
    """Return True if a version's manifest can be read and all its blobs are stored."""
    try:
        return _is_complete(store, oci_manifest.parse(store.read_document(digest), digest))
    except AdapterhubError:
        return False
